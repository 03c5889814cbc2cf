"""Run ffmpeg: find it, start, feed, watch and kill its processes, and manage temporary folders."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NoReturn, TypeVar, cast

import anyio

from errors import ConversionError, TTSError, lacks_memory, no_memory, shorten
from files import FileSignature, file_signature

logger = logging.getLogger(__name__)

STALL_TIMEOUT = 20.0
"""Seconds without progress after which an ffmpeg counts as hung. It needs some milliseconds for 4 s of sound."""

_QUIET = ("-nostdin", "-hide_banner", "-loglevel", "error", "-y")  # ask nothing, report only errors, overwrite
_TEMPORARY_PREFIX = "sesame-tts-"  # the process id follows, which tells the folders of a killed server from those in use
_VERSION_SECONDS = 10.0
_STDERR_KEPT = 4096  # bytes
_PIECE = 64 * 1024
_CANCELLED = "was cancelled"
# How much less processor time ffmpeg gets than the server where both want the same core (as `nice`, 10 of 19). It needs 1 % of a core to encode
# as fast as the speech is heard, and all requests wait for the one thread of the voice.
_NICER = 10

_Result = TypeVar("_Result")

_found: dict[str | None, str] = {}  # the program that was found, by the PATH that was searched
_versions: dict[tuple[str, FileSignature | None], tuple[str, str] | None] = {}  # of the latest program and its writer of files


class FfmpegFailedError(Exception):
    """ffmpeg ended with a bad status or took too long."""


class ByteQueue:
    """A byte queue between two tasks, without a limit of its own.

    A limit would let a slow reader block ffmpeg, and with it the model that all other requests need. `speech_routes` ends a stream whose
    queue has become too large.

    Attributes:
        size: Number of queued bytes.
    """

    def __init__(self) -> None:
        self.size = 0
        self._pieces: deque[bytes] = deque()
        self._ended = False
        self._error: TTSError | None = None
        self._changed = asyncio.Event()

    def put(self, data: bytes) -> None:
        """Append `data`."""
        self._pieces.extend(data[start : start + _PIECE] for start in range(0, len(data), _PIECE))
        self.size += len(data)
        self._changed.set()

    def end(self, error: TTSError | None = None) -> None:
        """End the queue, with `error` after a failure. Only the first call counts."""
        if not self._ended:
            self._ended, self._error = True, error
            self._changed.set()

    async def get(self) -> bytes:
        """Return queued bytes, from one to 64 KiB; b"" at the end.

        Raises:
            ConversionError: The queue ended with it.
        """
        while not self._pieces and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        taken: list[bytes] = []
        room = _PIECE
        while self._pieces and len(self._pieces[0]) <= room:
            taken.append(self._pieces.popleft())
            room -= len(taken[-1])
        data = b"".join(taken)
        self.size -= len(data)
        if not data and self._error is not None:
            raise self._error
        return data


class FfmpegProcess:
    """A running ffmpeg that reads from its standard input.

    Create it with `start`, and always call `aclose` in the end: it kills and reaps a process that still runs.

    Attributes:
        output: Its standard output.
        received: Number of bytes on its standard output so far.
    """

    def __init__(self, process: asyncio.subprocess.Process, stall_timeout: float, *, keep_output: bool = True) -> None:
        self.output = ByteQueue()
        self.received = 0
        self._keep_output = keep_output
        self._process = process
        _make_nicer(process.pid)
        self._stall_timeout = stall_timeout
        self._input_closed = False
        self._killed: str | None = None
        self._error: ConversionError | None = None
        # All three are pipes (see `start`).
        self._stdin = cast(asyncio.StreamWriter, process.stdin)
        self._stdout = cast(asyncio.StreamReader, process.stdout)
        self._stderr = cast(asyncio.StreamReader, process.stderr)
        self._stdin.transport.set_write_buffer_limits(0)  # drain() then waits until all data is in the pipe: a stall shows at once
        self._ended = asyncio.ensure_future(self._follow())
        self._watch: asyncio.Future[None] | None = None

    @classmethod
    async def start(
        cls, arguments: Sequence[str], *, folder: Path | None = None, keep_output: bool = True, stall_timeout: float = STALL_TIMEOUT
    ) -> FfmpegProcess:
        """Start ffmpeg with `arguments` in `folder`.

        Args:
            arguments: ffmpeg's arguments, without the program.
            folder: The working directory.
            keep_output: Put its standard output into `output`; else it is only counted.
            stall_timeout: Seconds without progress after which it counts as hung.

        Raises:
            ConversionError: ffmpeg is missing or cannot be started.
        """
        spawning = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                require_ffmpeg(),
                *_QUIET,
                *arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                # Ctrl-C in the terminal must reach only the server, which lets running requests finish. Not a session of its own: Linux shares
                # the processor between sessions first (autogroup), so that two of ffmpeg would get twice as much as the whole server.
                process_group=0,
            )
        )
        try:
            return cls(await _to_the_end(spawning), stall_timeout, keep_output=keep_output)
        except OSError as error:
            raise _not_started(error) from None
        except asyncio.CancelledError:
            # asyncio can lose the child process when its start is cancelled, so the start is always waited for.
            if spawning.exception() is None:
                await cls(spawning.result(), stall_timeout).aclose()
            raise

    async def write(self, data: bytes) -> None:
        """Send `data` to ffmpeg.

        Raises:
            ConversionError: ffmpeg has ended or hangs.
        """
        for start in range(0, len(data), _PIECE):
            if self._ended.done():
                await self._fail("ended too early")
            self._stdin.write(data[start : start + _PIECE])
            if self._stdin.transport.get_write_buffer_size():
                await self._drain()

    def close_input(self) -> None:
        """Close ffmpeg's input. It then ends by itself, or is killed when it makes no progress."""
        if not self._input_closed:
            self._input_closed = True
            self._stdin.close()
            self._watch = asyncio.ensure_future(self._kill_when_stalled())

    async def aclose(self) -> None:
        """Kill the process unless it has ended, and wait until it is reaped."""
        self._kill(_CANCELLED)
        if self._watch is not None:
            self._watch.cancel()
        self._stdin.close()
        await _to_the_end(self._ended)

    async def _follow(self) -> None:
        """Read all output, then the exit status. The task ends with the process."""
        errors = asyncio.ensure_future(_read_tail(self._stderr))
        try:
            while data := await self._stdout.read(_PIECE):
                self.received += len(data)
                if self._keep_output:
                    self.output.put(data)
            stderr = await errors
            status = await self._process.wait()
        except BaseException as error:
            self._kill(_CANCELLED)
            self.output.end(no_memory() if lacks_memory(error) else ConversionError("The conversion was cancelled."))
            raise
        finally:
            errors.cancel()
        if status != 0 or not self._input_closed:
            what = self._killed or (f"was killed by signal {-status}" if status < 0 else f"ended too early with status {status}")
            if what != _CANCELLED:
                _log_failure(what, stderr)
            self._error = ConversionError(f"The conversion failed: ffmpeg {what}.")
        self.output.end(self._error)

    async def _drain(self) -> None:
        try:
            with anyio.fail_after(self._stall_timeout):
                await self._stdin.drain()
        except TimeoutError:
            await self._fail(f"accepted no input for {self._stall_timeout:g} s and was killed")
        except OSError:  # a broken pipe
            await asyncio.wait({self._ended}, timeout=1)  # it is probably ending, and its own status explains more than our kill
            await self._fail("stopped reading and was killed")

    async def _fail(self, what: str) -> NoReturn:
        self._kill(what)
        await _to_the_end(self._ended)
        raise self._error or ConversionError(f"The conversion failed: ffmpeg {what}.")

    async def _kill_when_stalled(self) -> None:
        seen = -1
        while seen != self.received:
            seen = self.received
            await asyncio.wait({self._ended}, timeout=self._stall_timeout)
            if self._ended.done():
                return
        self._kill(f"made no progress for {self._stall_timeout:g} s and was killed")

    def _kill(self, why: str) -> None:
        if self._process.returncode is None:
            self._killed = self._killed or why
            _kill_group(self._process.pid)


def find_ffmpeg() -> str | None:
    """Return the path of the ffmpeg to use: the one on PATH, else imageio-ffmpeg's, else None.

    It is searched for once, and again when it is gone. So one that is removed is noticed at once; one that is installed, if there was none.
    """
    path = os.environ.get("PATH")
    program = _found.get(path)
    if program is None or not os.access(program, os.X_OK):
        _found.clear()
        searched = shutil.which("ffmpeg") or shutil.which(_bundled_ffmpeg() or "")
        program = str(Path(searched).absolute()) if searched else None
        if program is not None:
            _found[path] = program
    return program


def require_ffmpeg() -> str:
    """Return the path of the ffmpeg to use.

    Raises:
        ConversionError: There is none.
    """
    program = find_ffmpeg()
    if program is None:
        raise ConversionError("ffmpeg is missing on the server. Install it so that it is on PATH, or install the package imageio-ffmpeg.")
    return program


def ffmpeg_version() -> str | None:
    """Return ffmpeg's version, or None if it is missing, does not run, or has not answered yet.

    Does not wait: a thread asks the program, once for each version of its file, because a program that hangs must not stop its caller.
    """
    key = _version_key()
    if key is None:
        return None
    if key not in _versions:
        _versions.clear()
        with suppress(RuntimeError):  # no memory for a thread: ask again next time
            threading.Thread(target=_ask_version, args=(key,), name="ffmpeg-version", daemon=True).start()
            _versions[key] = None
    known = _versions.get(key)
    return known and known[0]


def muxer_name() -> str | None:
    """Return the name under which ffmpeg writes files ("Lavf" and libavformat's version), or None if `ffmpeg_version` does not know it yet."""
    key = _version_key()
    known = _versions.get(key) if key else None
    return (known and known[1]) or None


def _version_key() -> tuple[str, FileSignature | None] | None:
    program = find_ffmpeg()
    return None if program is None else (program, file_signature(program))


def run_ffmpeg(arguments: Sequence[str], *, folder: Path, timeout: float) -> bytes:
    """Run ffmpeg to its end and return its standard output. Blocks; call it in a worker thread.

    Args:
        arguments: ffmpeg's arguments, without the program.
        folder: The working directory. File names are relative to it, so that no error message contains a path.
        timeout: Seconds for the whole run.

    Raises:
        ConversionError: ffmpeg is missing or cannot be started.
        FfmpegFailedError: It failed or took too long.
    """
    try:
        return _run([require_ffmpeg(), *_QUIET, *arguments], folder, timeout)
    except OSError as error:
        raise _not_started(error) from None


def watch_children_without_threads() -> None:
    """Let the running event loop learn of a process's end from a pidfd, where the system has them. Python 3.11 uses a thread for each process.

    Asyncio has one watcher of processes for all loops, so only a loop on the main thread may replace it.
    """
    if sys.platform == "linux" and sys.version_info < (3, 12) and threading.current_thread() is threading.main_thread():
        with suppress(OSError):  # an old kernel
            os.close(os.pidfd_open(os.getpid()))
            watcher = asyncio.PidfdChildWatcher()
            watcher.attach_loop(asyncio.get_running_loop())
            asyncio.set_child_watcher(watcher)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Create a folder that only this user can enter, and remove it at the end.

    Raises:
        ConversionError: It cannot be created.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY_PREFIX}{os.getpid()}-"))
    except OSError as error:
        logger.error("cannot create a temporary folder: %s", error.strerror)  # noqa: TRY400 - a traceback would add nothing
        raise ConversionError("The server has no room for a temporary file.") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clean_temporary_files() -> int:
    """Remove the temporary folders of servers that were killed, and return how many there were."""
    stale = [folder for folder in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY_PREFIX}*-*") if _is_stale(folder)]
    for folder in stale:
        shutil.rmtree(folder, ignore_errors=True)
    return len(stale)


def _is_stale(folder: Path) -> bool:
    """Return whether `folder` is this user's and its process has ended."""
    number = folder.name[len(_TEMPORARY_PREFIX) :].split("-")[0]
    try:
        if number.isdecimal() and not folder.is_symlink() and folder.is_dir() and folder.stat().st_uid == os.getuid():
            os.kill(int(number), 0)
        return False
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False


@cache
def _bundled_ffmpeg() -> str | None:
    """Return the path of imageio-ffmpeg's binary. The library runs it once to see whether it works."""
    import imageio_ffmpeg

    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError:
        return None


def _ask_version(key: tuple[str, FileSignature | None]) -> None:
    with suppress(OSError, FfmpegFailedError):
        answer = _run([key[0], "-version"], None, _VERSION_SECONDS)
        named = re.match(rb"ffmpeg version (\S+)", answer)
        writer = re.search(rb"^libavformat .*/([ .\d]+)$", answer, re.MULTILINE)
        if named and key in _versions:
            muxer = "Lavf" + writer[1].decode().replace(" ", "") if writer else ""
            _versions[key] = named[1].decode("ascii", "replace"), muxer


def _run(command: Sequence[str], folder: Path | None, timeout: float) -> bytes:
    """Run a program to its end and return its standard output.

    Raises:
        OSError: It cannot be started.
        FfmpegFailedError: It failed or took too long.
    """
    process = subprocess.Popen(  # noqa: S603 - our own arguments, no shell
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, process_group=0
    )
    with process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise _run_failed("took too long") from None
        finally:
            if process.returncode is None:
                _kill_group(process.pid)
    if process.returncode != 0:
        raise _run_failed(f"ended with status {process.returncode}", errors)
    return output


def _not_started(error: OSError) -> TTSError:
    logger.error("ffmpeg cannot be started: %s", error.strerror)
    if error.errno == errno.ENOMEM:
        return no_memory()
    return ConversionError("ffmpeg cannot be started on the server.")


def _run_failed(what: str, stderr: bytes = b"") -> FfmpegFailedError:
    _log_failure(what, stderr)
    return FfmpegFailedError(what)


def _log_failure(what: str, stderr: bytes) -> None:
    logger.error("ffmpeg %s: %s", what, shorten(stderr[-_STDERR_KEPT:].decode("utf-8", "replace").strip(), 500))


def _make_nicer(pid: int) -> None:
    with suppress(OSError):  # without it, it is only slower for others
        os.setpriority(os.PRIO_PROCESS, pid, min(19, os.getpriority(os.PRIO_PROCESS, 0) + _NICER))


def _kill_group(pid: int) -> None:
    """Kill the process and all its children: each of them holds the pipes open."""
    with suppress(ProcessLookupError, PermissionError):  # already gone; macOS raises EPERM for a group of zombies
        os.killpg(pid, signal.SIGKILL)


async def _read_tail(stream: asyncio.StreamReader, limit: int = _STDERR_KEPT) -> bytes:
    """Read `stream` to its end and return its last `limit` bytes."""
    tail = bytearray()
    while data := await stream.read(_PIECE):
        tail += data
        del tail[:-limit]
    return bytes(tail)


async def _to_the_end(task: asyncio.Future[_Result]) -> _Result:
    """Wait for the task even if the waiter is cancelled meanwhile, then return its result or raise the cancellation."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()
