"""Programs forked by `server_forker.py`: real processes whose start takes a fraction of a second."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from contextlib import suppress
from pathlib import Path
from typing import IO

import as_mac
import tiny_csm

PROJECT = Path(__file__).resolve().parent.parent


class ForkedProcess:
    """A forked program, with the methods of `subprocess.Popen` that tests use.

    Attributes:
        stdout: The reading end of its standard output, if that is a pipe.
        stderr: The same for standard error.
    """

    def __init__(self, pid: int, exit_status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdout: IO[bytes] | None = None
        self.stderr: IO[bytes] | None = None
        self._exit_status = exit_status
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        if (status := self._wait(timeout)) is None:
            raise subprocess.TimeoutExpired(f"forked {self.pid}", timeout or 0)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """Read both pipes to their ends and wait for the process."""
        pool = ThreadPoolExecutor(2)
        reads = [pool.submit(_read_and_close, pipe) for pipe in (self.stdout, self.stderr)]
        pool.shutdown(wait=False)
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            output, errors = (read.result(None if deadline is None else max(0.0, deadline - time.monotonic())) for read in reads)
        except NotInTime:
            raise subprocess.TimeoutExpired(f"forked {self.pid}", timeout or 0) from None
        self.wait(None if deadline is None else max(1.0, deadline - time.monotonic()))
        return output, errors

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _wait(self, timeout: float | None) -> int | None:
        with self._lock:
            if self.returncode is None and select.select([self._exit_status], [], [], timeout)[0]:
                with os.fdopen(self._exit_status, "rb") as pipe:
                    self.returncode = int(pipe.read())
            return self.returncode


def _read_and_close(pipe: IO[bytes] | None) -> bytes:
    if pipe is None or pipe.closed:
        return b""
    with pipe:
        return pipe.read()


class ServerForker:
    """A connection to `server_forker.py`, at most one of each kind a test process; all processes of a test run share the forkers.

    The first one that needs a forker starts it, and it ends with its last connection.

    Args:
        arguments: For `server_forker.py`.
        project: The folder of our programs: this one, or a copy.

    Attributes:
        address: The name of its socket, for `forked_program.py`.
    """

    def __init__(self, *arguments: str, project: Path = PROJECT) -> None:
        folder = hashlib.sha256(str(project).encode()).hexdigest()[:8]
        self.address = Path(os.environ["TEST_RUN_FOLDER"], "-".join(("forker", folder, *arguments)))
        self._socket = _connect(self.address, arguments, project)
        self._answers = self._socket.makefile("r")
        self._lock = threading.Lock()

    def start(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        cwd: Path,
        streams: Sequence[int],
        descriptors: int | None = None,
        mounts_of: int | None = None,
    ) -> ForkedProcess:
        """Fork a program.

        Args:
            command: `server.py`, `say.py`, `supervisor.py` or the path of another program, and its arguments.
            environment: All of it.
            cwd: The working directory.
            streams: The descriptors of its standard input, output and error.
            descriptors: The limit of its open files; None for that of the tests.
            mounts_of: The PID of a process whose mounts and users it sees; None for those of the tests.
        """
        request = {"command": list(command), "env": environment, "cwd": str(cwd), "mac": as_mac.active()}
        request |= {"descriptors": descriptors, "mounts_of": mounts_of}
        exit_status, theirs = os.pipe()
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode() + b"\n"], [*streams, theirs])
            os.close(theirs)
            return ForkedProcess(int(self._answers.readline()), exit_status)

    def close(self) -> None:
        """End all programs that this process has had forked, and wait for their ends."""
        self._socket.shutdown(socket.SHUT_WR)
        self._answers.read()
        self._answers.close()
        self._socket.close()


def _connect(name: Path, arguments: tuple[str, ...], project: Path) -> socket.socket:
    with name.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection = _greeted(name)
        if connection is None:  # there is none, or it is just ending
            name.unlink(missing_ok=True)
            _start_forker(name, arguments, project)
            connection = _greeted(name)
    assert connection, "server_forker.py has ended: its standard error says why"
    return connection


def _greeted(name: Path) -> socket.socket | None:
    """Connect to the forker at `name` and wait for its greeting."""
    connection = socket.socket(socket.AF_UNIX)
    with suppress(OSError):
        connection.connect(str(name))
        if connection.recv(1):
            return connection
    connection.close()
    return None


def _start_forker(name: Path, arguments: tuple[str, ...], project: Path) -> None:
    """Start it in the background of a shell: it outlives this process, and is none of its children."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(name))
        listener.listen()
        program = [sys.executable, str(Path(__file__).with_name("server_forker.py")), str(listener.fileno()), *arguments]
        environment = os.environ | {"PYTHONPATH": str(project)}
        shell = ["/bin/sh", "-c", '"$@" &', "sh", *program]
        subprocess.run(shell, cwd=project, env=environment, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[listener.fileno()], check=True)


SERVER_FORKERS: dict[tuple[str, ...], ServerForker] = {}


def server_forker(environment: dict[str, str]) -> ServerForker:
    """The forker of programs with this environment: another one if they have CSM with a small codec."""
    arguments = ("csm",) if tiny_csm.SMALL_CODEC in environment else ()
    if arguments not in SERVER_FORKERS:
        SERVER_FORKERS[arguments] = ServerForker(*arguments)
    return SERVER_FORKERS[arguments]


def end_server_forkers() -> None:
    """End them and all that they have forked."""
    for forker in SERVER_FORKERS.values():
        forker.close()
