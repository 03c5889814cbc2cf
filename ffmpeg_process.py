"""A running ffmpeg that is fed piece by piece: read, watched, and killed and reaped whatever happens."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, cast

from errors import ConversionError
from ffmpeg_program import QUIET, STDERR_KEPT, kill_group, log_failure, not_started, require_ffmpeg

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
