"""Runs ffmpeg: finds the program, starts and watches processes, manages temporary folders."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import TypeVar, cast

from errors import ConversionError, shorten

TEMPORARY_PREFIX = "sesame-tts-"
"""What every temporary folder's name begins with; the process id follows: it tells what a killed server left from what is in use."""


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that only this user can enter, removed at the end.

    Raises:
        ConversionError: It cannot be made.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY_PREFIX}{os.getpid()}-"))
    except OSError as error:
        logger.error("no temporary folder: %s", error.strerror)  # noqa: TRY400 - the cause is all there is to know
        raise ConversionError("The server has no room for a temporary file.") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clean_temporary_files() -> int:
    """Remove what servers that were killed left in the temporary folder; returns how many folders that were."""
    stale = [folder for folder in Path(tempfile.gettempdir()).glob(f"{TEMPORARY_PREFIX}*-*") if _is_stale(folder)]
    for folder in stale:
        shutil.rmtree(folder, ignore_errors=True)
    return len(stale)


def _is_stale(folder: Path) -> bool:
    """Whether it is ours and its process is gone."""
    number = folder.name[len(TEMPORARY_PREFIX) :].split("-")[0]
    try:
        if not number.isdecimal() or folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
            return False
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


logger = logging.getLogger(__name__)

QUIET = ("-nostdin", "-hide_banner", "-loglevel", "error", "-y")
"""The options before all others: ask nothing, say only what fails, overwrite."""

STDERR_KEPT = 4096
"""Bytes of ffmpeg's own words that are kept."""


@cache
def _bundled_ffmpeg() -> str | None:
    """Where imageio-ffmpeg has its binary. The library runs it once to see whether it works."""
    import imageio_ffmpeg

    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError:
        return None


def find_ffmpeg() -> str | None:
    """The ffmpeg to use: the one on PATH, else imageio-ffmpeg's; None if there is none.

    Looked up each time (some microseconds), so one that is installed or removed while the server runs is noticed.
    """
    found = shutil.which("ffmpeg") or shutil.which(_bundled_ffmpeg() or "")
    return str(Path(found).absolute()) if found else None


def ffmpeg_version() -> str | None:
    """The version that ffmpeg gives itself; None if there is none or it does not run. The first call starts a process, later ones do not."""
    program = find_ffmpeg()
    if program is None:
        return None
    try:
        return _version_of(program, Path(program).stat().st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=4)
def _version_of(program: str, _changed: int) -> str | None:
    try:
        ran = subprocess.run([program, "-version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)  # noqa: S603 - fixed arguments
    except (OSError, subprocess.TimeoutExpired):
        return None
    named = re.match(rb"ffmpeg version (\S+)", ran.stdout)
    return named[1].decode("ascii", "replace") if named and ran.returncode == 0 else None


def require_ffmpeg() -> str:
    """`find_ffmpeg`, or the error that says what is missing.

    Raises:
        ConversionError: There is none.
    """
    program = find_ffmpeg()
    if program is None:
        raise ConversionError("ffmpeg is missing on the server: install it (it must be on PATH), or the package imageio-ffmpeg.")
    return program


def log_failure(what: str, stderr: bytes) -> None:
    """Tell the log what happened to an ffmpeg, and the end of what it said itself."""
    logger.error("ffmpeg %s: %s", what, shorten(stderr[-STDERR_KEPT:].decode("utf-8", "replace").strip(), 500))


def kill_group(pid: int) -> None:
    """Kill the process and all that it started: every one of them holds the pipes open."""
    with suppress(ProcessLookupError, PermissionError):  # gone already; macOS says EPERM of a group of zombies
        os.killpg(pid, signal.SIGKILL)


class FfmpegFailedError(Exception):
    """ffmpeg ended with a bad status, or did not end in time."""


def run_ffmpeg(arguments: Sequence[str], *, folder: Path, timeout: float) -> bytes:
    """What ffmpeg writes to its standard output. Blocks; for worker threads.

    Args:
        arguments: ffmpeg's own, without the program.
        folder: Where it runs: file names are relative to it, so that no message holds a path.
        timeout: Seconds it may take altogether.

    Raises:
        ConversionError: ffmpeg is missing or cannot be started.
        FfmpegFailedError: It failed or took too long.
    """
    command = [require_ffmpeg(), *QUIET, *arguments]
    try:
        process = subprocess.Popen(  # noqa: S603 - our own arguments, no shell
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, start_new_session=True
        )
    except OSError as error:
        raise not_started(error) from None
    with process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            log_failure("took too long", b"")
            raise FfmpegFailedError("took too long") from None
        finally:
            if process.returncode is None:
                kill_group(process.pid)
    if process.returncode != 0:
        log_failure(f"ended with status {process.returncode}", errors)
        raise FfmpegFailedError(f"ended with status {process.returncode}")
    return output


def not_started(error: OSError) -> ConversionError:
    """The error for an ffmpeg that the system would not start."""
    logger.error("ffmpeg cannot be started: %s", error.strerror)
    return ConversionError("ffmpeg cannot be started on the server.")


STALL_TIMEOUT = 20.0
"""Seconds without any progress after which an ffmpeg counts as hung. It handles 4 s of sound at a time in some milliseconds."""

_PIECE = 64 * 1024
_GIVEN_UP = "was given up"

_Result = TypeVar("_Result")


async def _to_the_end(task: asyncio.Future[_Result]) -> _Result:
    """The task's result, waited for however often the waiter is cancelled meanwhile; the cancellation is passed on afterwards."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()


class ByteQueue:
    """Bytes from one task to another, without a limit.

    Deliberately so: what is in it is never more than one utterance's encoded sound (a few MB for the longest text), and a limit would let a
    slow reader hold ffmpeg, and through it the model that everybody else is waiting for.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._ended = False
        self._error: ConversionError | None = None
        self._changed = asyncio.Event()

    def put(self, data: bytes) -> None:
        """Append `data`."""
        self._pieces.append(data)
        self._changed.set()

    def end(self, error: ConversionError | None = None) -> None:
        """Nothing follows; with `error`, because something failed. Only the first call counts."""
        if not self._ended:
            self._ended, self._error = True, error
            self._changed.set()

    async def get(self) -> bytes:
        """Everything that is there, at least one byte; b"" at the end.

        Raises:
            ConversionError: At the end, if it was a failure.
        """
        while not self._pieces and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        data = b"".join(self._pieces)
        self._pieces.clear()
        if not data and self._error is not None:
            raise self._error
        return data


class FfmpegProcess:
    """A running ffmpeg that is fed through its standard input. Its standard output is read at once into `output`.

    Make one with `start`, and call `aclose` in the end, whatever happens: it kills and reaps the process if that still runs.
    """

    def __init__(self, process: asyncio.subprocess.Process, stall_timeout: float) -> None:
        self.output = ByteQueue()
        self._process = process
        self._stall_timeout = stall_timeout
        self._input_closed = False
        self._killed: str | None = None
        self._progress = 0
        self._said = bytearray()
        # All three were asked for as pipes in `start`.
        self._stdin = cast(asyncio.StreamWriter, process.stdin)
        self._stdout = cast(asyncio.StreamReader, process.stdout)
        self._stderr = cast(asyncio.StreamReader, process.stderr)
        self._stdin.transport.set_write_buffer_limits(0)  # what drain() let through is in the pipe: that is what a stall is measured by
        self._ended = asyncio.ensure_future(self._follow())
        self._watch: asyncio.Future[None] | None = None

    @classmethod
    async def start(cls, arguments: Sequence[str], *, folder: Path | None = None, stall_timeout: float = STALL_TIMEOUT) -> FfmpegProcess:
        """Start ffmpeg with `arguments` in `folder`.

        Raises:
            ConversionError: ffmpeg is missing or cannot be started.
        """
        spawning = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                require_ffmpeg(),
                *QUIET,
                *arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                # A group of its own: Ctrl-C in the terminal is for the server, which lets a running answer end.
                start_new_session=True,
            )
        )
        try:
            return cls(await _to_the_end(spawning), stall_timeout)
        except OSError as error:
            raise not_started(error) from None
        except asyncio.CancelledError:
            # asyncio itself may forget a child when its start is cancelled, so the start is always waited for.
            if spawning.exception() is None:
                await cls(spawning.result(), stall_timeout).aclose()
            raise

    async def _follow(self) -> None:
        """Read everything the process writes, then its status; the task's end is the process's end."""
        errors = asyncio.ensure_future(self._keep_errors())
        try:
            while data := await self._stdout.read(_PIECE):
                self._progress += 1
                self.output.put(data)
            await errors
            status = await self._process.wait()
        except BaseException:
            self._kill(_GIVEN_UP)
            self.output.end(ConversionError("The conversion was given up."))
            raise
        finally:
            errors.cancel()
        self.output.end(self._fault(status))

    async def _keep_errors(self) -> None:
        while data := await self._stderr.read(_PIECE):
            self._said += data
            del self._said[:-STDERR_KEPT]

    def _fault(self, status: int) -> ConversionError | None:
        if status == 0 and self._input_closed:
            return None
        what = self._killed or (f"was killed by signal {-status}" if status < 0 else f"ended too soon with status {status}")
        if what != _GIVEN_UP:
            log_failure(what, bytes(self._said))
        return ConversionError(f"The conversion failed: ffmpeg {what}.")

    async def write(self, data: bytes) -> None:
        """Hand `data` to ffmpeg.

        Raises:
            ConversionError: ffmpeg has ended or hangs.
        """
        for start in range(0, len(data), _PIECE):
            if self._ended.done():
                await self._fail()
            self._stdin.write(data[start : start + _PIECE])
            if self._stdin.transport.get_write_buffer_size():
                await self._drain()

    async def _drain(self) -> None:
        draining = asyncio.ensure_future(self._stdin.drain())
        try:
            await asyncio.wait({draining, self._ended}, timeout=self._stall_timeout, return_when=asyncio.FIRST_COMPLETED)
            if not draining.done():
                await self._fail(f"took no sound for {self._stall_timeout:g} s and was stopped")
            elif draining.exception() is not None:  # a broken pipe
                await asyncio.wait({self._ended}, timeout=1)  # it is probably ending: its own status says more than our kill
                await self._fail("stopped reading and was stopped")
        finally:
            draining.cancel()

    async def _fail(self, what: str = "ended too soon") -> None:
        self._kill(what)
        await _to_the_end(self._ended)
        raise self._fault(self._process.returncode or 0) or ConversionError(f"The conversion failed: ffmpeg {what}.")

    def close_input(self) -> None:
        """There is no more to come: ffmpeg ends by itself, or is killed when it makes no progress."""
        if not self._input_closed:
            self._input_closed = True
            self._stdin.close()
            self._watch = asyncio.ensure_future(self._kill_when_stalled())

    async def _kill_when_stalled(self) -> None:
        seen = -1
        while seen != self._progress:
            seen = self._progress
            await asyncio.wait({self._ended}, timeout=self._stall_timeout)
            if self._ended.done():
                return
        self._kill(f"made no progress for {self._stall_timeout:g} s and was stopped")

    def _kill(self, why: str) -> None:
        if self._process.returncode is None:
            self._killed = self._killed or why
            kill_group(self._process.pid)

    async def aclose(self) -> None:
        """Kill the process unless it has ended, and wait until it is reaped."""
        self._kill(_GIVEN_UP)
        if self._watch is not None:
            self._watch.cancel()
        self._stdin.close()
        await _to_the_end(self._ended)
