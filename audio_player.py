"""The loudspeaker, by way of the system's own player: fed through a pipe where it reads one, else a file after the other."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from audio_formats import SAMPLE_RATE
from background_call import call_in_background
from ffmpeg_program import kill_group
from new_file import OutputError
from temporary_files import temporary_folder

_RATE = str(SAMPLE_RATE)
_STDERR_KEPT = 2048
_PROBE_SECONDS = 5
_WAITING_BYTES = 60 * 2 * SAMPLE_RATE  # a minute


def _aplay(program: str) -> list[str]:
    return [program, "-q", "-t", "raw", "-f", "S16_LE", "-r", _RATE, "-c", "1", "-"]


def _ffplay(program: str) -> list[str]:
    # One channel is what the demuxer takes raw samples for; the option that says so has another name in each major version.
    return [program, "-nodisp", "-autoexit", "-loglevel", "error", "-f", "s16le", "-sample_rate", _RATE, "-i", "pipe:0"]


def _pw_play(program: str) -> list[str]:
    # Older versions take "-" for raw samples anyway and refuse --raw; newer ones want it.
    command = [program, "--help"]
    try:
        asked = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_SECONDS, check=False)  # noqa: S603 - found on PATH
        described = asked.stdout
    except (OSError, subprocess.TimeoutExpired):
        described = b""
    raw = ["--raw"] if b"--raw" in described else []
    return [program, *raw, "--rate", _RATE, "--channels", "1", "--format", "s16", "-"]


# In the order they are tried. afplay is last: it reads only files, so the sound reaches it in parts.
_PIPED: dict[str, Callable[[str], list[str]]] = {"aplay": _aplay, "ffplay": _ffplay, "pw-play": _pw_play}
PLAYERS = (*_PIPED, "afplay")


def require_player() -> None:
    """Notice before any work that there is no player.

    Raises:
        OutputError: There is none.
    """
    if not any(shutil.which(name) for name in PLAYERS):
        raise OutputError(f"There is no player on this machine ({', '.join(PLAYERS)}). Write a file instead: -o speech.mp3")


async def open_player() -> PipePlayer | FilePlayer:
    """The first player there is, started. It takes signed 16-bit little-endian samples, mono, 24 kHz.

    Raises:
        OutputError: There is none, or it cannot be started.
    """
    for name, command in _PIPED.items():
        if program := shutil.which(name):
            return await PipePlayer.start(name, await call_in_background(lambda: command(program)))  # noqa: B023 - awaited at once
    require_player()
    return FilePlayer("afplay", shutil.which("afplay") or "afplay")


class _Process:
    """A running player, and the end of what it complains."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.stdin = process.stdin
        self._name = name
        self._process = process
        self._said = bytearray()
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, name: str, command: Sequence[str], stdin: int) -> _Process:
        # A group of its own: Ctrl-C is for us, and we end it.
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise OutputError(f"The player {name} cannot be started: {error.strerror}.") from None
        return cls(name, process)

    async def ended(self) -> None:
        """Wait for its end.

        Raises:
            OutputError: It was not a good one.
        """
        await asyncio.wait({self._listening})
        if await self._process.wait() != 0:
            raise self.failure()

    def failure(self) -> OutputError:
        lines = self._said.decode("utf-8", "replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it did not say why")
        return OutputError(f"The player {self._name} failed: {said[:300]}")

    async def aclose(self) -> None:
        """Kill it unless it has ended, and wait until it is reaped."""
        if self._process.returncode is None:
            kill_group(self._process.pid)
        await asyncio.wait({self._listening})
        await self._process.wait()

    async def _listen(self) -> None:
        stderr = cast(asyncio.StreamReader, self._process.stderr)
        while data := await stderr.read(4096):
            self._said += data
            del self._said[:-_STDERR_KEPT]


class PipePlayer:
    """A player that reads samples from its standard input: it plays from the first ones on. Make one with `start`."""

    def __init__(self, process: _Process) -> None:
        self._process = process
        self._stdin = cast(asyncio.StreamWriter, process.stdin)
        self._stdin.transport.set_write_buffer_limits(0)  # what is not in the pipe yet holds the writer up

    @classmethod
    async def start(cls, name: str, command: Sequence[str]) -> PipePlayer:
        """Start it.

        Raises:
            OutputError: It cannot be started.
        """
        return cls(await _Process.start(name, command, subprocess.PIPE))

    async def write(self, data: bytes) -> None:
        """Play some samples; returns when most of them have been taken.

        Raises:
            OutputError: The player has ended.
        """
        try:
            self._stdin.write(data)
            await self._stdin.drain()
        except ConnectionError:
            await self._process.ended()
            raise self._process.failure() from None

    async def finish(self) -> None:
        """Wait until the last sample is heard.

        Raises:
            OutputError: The player failed.
        """
        self._stdin.close()
        await self._process.ended()

    async def aclose(self) -> None:
        """Be silent."""
        await self._process.aclose()
        self._stdin.close()


class FilePlayer:
    """A player that reads only complete files: it gets all that is there up to a pause, and after that what has come meanwhile.

    So the first sentence is heard as soon as it is complete, and where two files meet there is silence anyway.
    """

    def __init__(self, name: str, program: str) -> None:
        self._name = name
        self._program = program
        self._samples = bytearray()
        self._all_there = False
        self._more = asyncio.Event()
        self._room = asyncio.Event()
        self._playing = asyncio.create_task(self._play_all())

    async def write(self, data: bytes) -> None:
        """Play some samples; returns while less than a minute waits.

        Raises:
            OutputError: The player failed.
        """
        self._samples += data
        self._more.set()
        while len(self._samples) > _WAITING_BYTES and not self._playing.done():
            self._room.clear()
            await self._room.wait()
        if self._playing.done():
            self._playing.result()

    async def finish(self) -> None:
        """Wait until the last sample is heard.

        Raises:
            OutputError: The player failed.
        """
        self._all_there = True
        self._more.set()
        await self._playing

    async def aclose(self) -> None:
        """Be silent."""
        self._playing.cancel()
        await asyncio.wait({self._playing})

    async def _play_all(self) -> None:
        try:
            with temporary_folder() as folder:
                while samples := await self._next():
                    await self._play(folder / "speech.wav", samples)
        finally:
            self._room.set()

    async def _next(self) -> bytes:
        """All samples up to the last pause, once there are some; at the end all; then nothing."""
        while not (count := self._playable()) and not self._all_there:
            self._more.clear()
            await self._more.wait()
        taken = bytes(self._samples[:count])
        del self._samples[:count]
        self._room.set()
        return taken

    def _playable(self) -> int:
        """How many bytes may go into the next file."""
        everything = self._all_there or len(self._samples) > _WAITING_BYTES
        return len(self._samples) if everything else last_pause(self._samples)

    async def _play(self, file: Path, samples: bytes) -> None:
        with wave.open(str(file), "wb") as writer:
            writer.setparams((1, 2, SAMPLE_RATE, 0, "NONE", "not compressed"))
            writer.writeframes(samples)
        process = await _Process.start(self._name, [self._program, str(file)], subprocess.DEVNULL)
        try:
            await process.ended()
        finally:
            await process.aclose()


# The pauses between sentences are digital silence of 200 ms and more, 50 ms at the fastest speed; at other speeds than 1 the filter
# leaves some noise in the last bits.
_PAUSE_SAMPLES = SAMPLE_RATE // 25
_QUIET = 16


def last_pause(samples: bytes | bytearray) -> int:
    """How many bytes of the 16-bit `samples` lie before the middle of the last pause that is over; 0 if there is none."""
    values = np.frombuffer(bytes(samples), "<i2").astype(np.int32)
    loud = np.flatnonzero(np.abs(values) > _QUIET)
    gaps = np.flatnonzero(np.diff(loud) > _PAUSE_SAMPLES)
    if not len(gaps):
        return 0
    before = int(gaps[-1])
    return 2 * ((int(loud[before]) + 1 + int(loud[before + 1])) // 2)
