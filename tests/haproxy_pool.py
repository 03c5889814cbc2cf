"""Two real servers behind a real HAProxy that reads `deploy/haproxy.cfg`, all on loopback; for the tests and for `benchmarks/pool.py`."""

from __future__ import annotations

import csv
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from conftest import PROJECT, START_SECONDS, RunningServer, free_port, start_server

CONFIG = PROJECT / "deploy" / "haproxy.cfg"
NAMES = ("one", "two")


def haproxy_program() -> str | None:
    """HAProxy, if it is installed. Debian puts it where a user's PATH does not look."""
    return shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def until(condition: Callable[[], object], seconds: float = START_SECONDS) -> None:
    """Wait for `condition`.

    Raises:
        AssertionError: It did not come true in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


class Pool:
    """The servers `one` and `two`, and HAProxy in front of them.

    Args:
        folder: For the servers' files.
        settings: Of both servers, by their environment names.
    """

    def __init__(self, folder: Path, **settings: object) -> None:
        self._folder = folder
        self._settings = settings
        self._short = Path(tempfile.mkdtemp(prefix="pool-"))  # a socket's path may have 104 characters on a Mac, 108 on Linux
        self._socket = self._short / "admin.sock"
        self.ports = dict(zip(NAMES, (free_port(), free_port()), strict=True))
        self.url = f"http://127.0.0.1:{free_port()}"
        self.servers: dict[str, RunningServer] = {}
        self._haproxy: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start everything, and wait until HAProxy has found both servers ready."""
        for name in NAMES:
            self.start_server(name)
        program = haproxy_program()
        assert program, "HAProxy is not installed"
        addresses = {f"POOL_{name.upper()}": f"127.0.0.1:{port}" for name, port in self.ports.items()}
        environment = {"POOL_BIND": self.url.removeprefix("http://"), "POOL_SOCKET": str(self._socket), **addresses}
        with (self._folder / "haproxy.log").open("ab") as log:
            self._haproxy = subprocess.Popen([program, "-db", "-f", CONFIG], env=environment, stdout=log, stderr=log)
        until(self._socket.exists)
        for name in NAMES:
            self.wait_until_up(name)

    def start_server(self, name: str) -> None:
        """Start one server, on the port it always has; not waited for."""
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        self.servers[name] = start_server(folder, PORT=self.ports[name], **self._settings)

    def wait_until_up(self, name: str) -> None:
        """Wait until HAProxy gives the server work."""
        until(lambda: self.statistics(name)["status"].startswith("UP"))

    def tell(self, command: str) -> str:
        """What HAProxy answers to a line on its admin socket."""
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(10)
            line.connect(str(self._socket))
            line.sendall(command.encode() + b"\n")
            return b"".join(iter(lambda: line.recv(65536), b"")).decode()

    def statistics(self, name: str) -> dict[str, str]:
        """HAProxy's figures of one server (or of `BACKEND`) for speech: `scur` sessions now, `stot` so far, `qcur` waiting, `status`."""
        rows = csv.DictReader(self.tell("show stat").removeprefix("# ").splitlines())
        return next(row for row in rows if (row["pxname"], row["svname"]) == ("speech", name))

    def restart_in_order(self, name: str) -> int:
        """As docs/DEPLOY.md says: no new work from HAProxy, SIGTERM, start again, wait until it is ready. The stopped server's exit status."""
        self.tell(f"set server speech/{name} state drain")
        until(lambda: self.statistics(name)["scur"] == "0")
        status = self.servers[name].stop()
        self.start_server(name)
        self.servers[name].wait_for(lambda health: health["status"] == "ok")
        self.tell(f"set server speech/{name} state ready")
        self.wait_until_up(name)
        return status

    def client(self, **options: object) -> httpx.Client:
        """An HTTP client of the pool."""
        return httpx.Client(base_url=self.url, timeout=120, **options)  # type: ignore[arg-type]  # handed on as they are

    def stop(self) -> None:
        """End everything."""
        if self._haproxy:
            self._haproxy.kill()
            self._haproxy.wait(10)
        for server in self.servers.values():
            server.stop()
        shutil.rmtree(self._short, ignore_errors=True)
