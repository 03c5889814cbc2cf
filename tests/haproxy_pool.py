"""Two servers behind HAProxy with `deploy/haproxy.cfg`, all on loopback; for the tests and `benchmarks/pool.py`."""

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
    """Return the path of HAProxy, or None. Debian installs it in a folder that is not on a user's PATH."""
    return shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def until(condition: Callable[[], object], seconds: float = START_SECONDS) -> None:
    """Wait for `condition`.

    Raises:
        AssertionError: It did not become true in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


class Pool:
    """The servers `one` and `two` with HAProxy in front.

    Args:
        folder: Folder for the servers' files.
        settings: Settings of both servers, by the names of their environment variables.
    """

    def __init__(self, folder: Path, **settings: object) -> None:
        self._folder = folder
        self._settings = settings
        self._short = Path(
            tempfile.mkdtemp(prefix="pool-")
        )  # short, because a socket's path is limited to 104 characters on a Mac and 108 on Linux
        self._socket = self._short / "admin.sock"
        self.ports = dict(zip(NAMES, (free_port(), free_port()), strict=True))
        self.url = f"http://127.0.0.1:{free_port()}"
        self.servers: dict[str, RunningServer] = {}
        self._haproxy: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start both servers and HAProxy, and wait until HAProxy uses both."""
        for name in NAMES:
            self.start_server(name)
        for server in self.servers.values():
            server.wait_for(lambda health: health["status"] == "ok")  # HAProxy treats a server as ready until its first check
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
        """Start one server on its port, without waiting until it is ready."""
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        self.servers[name] = start_server(folder, PORT=self.ports[name], **self._settings)

    def wait_until_up(self, name: str) -> None:
        """Wait until HAProxy sends requests to the server."""
        until(lambda: self.statistics(name)["status"].startswith("UP"))

    def tell(self, command: str) -> str:
        """Send a command to HAProxy's admin socket and return the answer."""
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(10)
            line.connect(str(self._socket))
            line.sendall(command.encode() + b"\n")
            return b"".join(iter(lambda: line.recv(65536), b"")).decode()

    def statistics(self, name: str) -> dict[str, str]:
        """Return HAProxy's statistics of one speech server, or of `BACKEND`: `scur` current sessions, `stot` total, `qcur` queued, `status`."""
        rows = csv.DictReader(self.tell("show stat").removeprefix("# ").splitlines())
        return next(row for row in rows if (row["pxname"], row["svname"]) == ("speech", name))

    def restart_in_order(self, name: str) -> int:
        """Restart a server as described in docs/DEPLOY.md: drain, stop, start, wait until ready. Return the exit status of the old process."""
        self.tell(f"set server speech/{name} state drain")
        until(lambda: self.statistics(name)["scur"] == "0")
        status = self.servers[name].stop()
        self.start_server(name)
        self.servers[name].wait_for(lambda health: health["status"] == "ok")
        self.tell(f"set server speech/{name} state ready")
        self.wait_until_up(name)
        return status

    def client(self, **options: object) -> httpx.Client:
        """Return an HTTP client for the pool."""
        return httpx.Client(base_url=self.url, timeout=120, **options)  # type: ignore[arg-type]  # passed on unchanged

    def stop(self) -> None:
        """Stop HAProxy and the servers."""
        if self._haproxy:
            self._haproxy.kill()
            self._haproxy.wait(10)
        for server in self.servers.values():
            server.stop()
        shutil.rmtree(self._short, ignore_errors=True)
