"""Outputs of the command line: files, pipes, the loudspeaker, and the progress bar."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
import wave
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from tqdm import tqdm

from audio_converter import StreamEncoder, encoder_arguments, to_int16
from audio_formats import SAMPLE_RATE, AudioFormat, Samples, SyntheticTag
from background_call import call_in_background
from captions import Caption
from errors import ConversionError
from ffmpeg import FfmpegProcess, kill_group, temporary_folder
from files import NewFile, OutputError, output_errors

_LEAST_FREE_BYTES = 1 << 20  # below this, a conversion that failed failed for want of room


class Sink(Protocol):
    """Takes an utterance's samples, float32 of shape (n,). `aclose` is called in the end, whatever happens."""

    async def write(self, samples: Samples) -> None:
        """Take some; returns when it is ready for more."""

    async def finish(self) -> None:
        """All is written; returns when all has arrived."""

    async def aclose(self) -> None:
        """End everything. What was not finished leaves nothing behind."""


class AudioFile:
    """A complete audio file with exact headers, encoded while the samples come: a book's do not fit into the memory.

    Make one with `open`.
    """

    def __init__(self, file: NewFile, encoder: FfmpegProcess, fmt: AudioFormat) -> None:
        self._file = file
        self._encoder = encoder
        self._format = fmt

    @classmethod
    async def open(cls, target: Path, fmt: AudioFormat, sample_rate: int, speed: float, tag: SyntheticTag | None) -> AudioFile:
        """Start the encoder on a file beside `target`.

        Raises:
            OutputError: The folder cannot be written.
            ConversionError: ffmpeg is missing or cannot be started.
        """
        with output_errors(target):
            file = NewFile(target)
        try:
            # "file:", or ffmpeg would take "a:b.mp3" for an address.
            arguments = encoder_arguments(fmt, sample_rate, speed, tag, f"file:{file.path.name}")
            return cls(file, await FfmpegProcess.start(arguments, folder=file.path.parent), fmt)
        except BaseException:
            file.discard()
            raise

    async def write(self, samples: Samples) -> None:
        """Encode some more.

        Raises:
            OutputError: The disk is full.
            ConversionError: ffmpeg failed.
        """
        try:
            await self._encoder.write(to_int16(samples))
        except ConversionError as error:
            raise self._explained(error) from None

    async def finish(self) -> None:
        """Move the file into place.

        Raises:
            OutputError: It cannot be moved, or the disk is full.
            ConversionError: ffmpeg failed.
        """
        self._encoder.close_input()
        try:
            while await self._encoder.output.get():
                pass
        except ConversionError as error:
            raise self._explained(error) from None
        if not self._format.begins(_beginning(self.file_path)):
            raise self._explained(ConversionError(f"The conversion failed: ffmpeg gave something that is not {self._format.name}."))
        with output_errors(self._file.target):
            self._file.commit()

    async def aclose(self) -> None:
        """End the encoder, and remove the file unless it is finished."""
        await self._encoder.aclose()
        self._file.discard()

    @property
    def file_path(self) -> Path:
        """Where the file is while it is made."""
        return self._file.path

    def _explained(self, error: ConversionError) -> Exception:
        if shutil.disk_usage(self.file_path.parent).free < _LEAST_FREE_BYTES:
            return OutputError("The disk is full.")
        return error


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


class ByteTarget(Protocol):
    """What a stream of bytes is sent to."""

    async def write(self, data: bytes) -> None:
        """Send some; returns when it can take more."""

    async def finish(self) -> None:
        """All is sent; returns when all has arrived."""

    async def aclose(self) -> None:
        """End at once."""


class SoundStream:
    """Encodes sound while it comes, and sends the bytes on at the pace of whoever takes them. Make one with `open`."""

    def __init__(self, encoder: StreamEncoder, target: ByteTarget) -> None:
        self._encoder = encoder
        self._target = target
        self._taken = asyncio.Event()  # all that has been encoded is sent
        self._taken.set()
        self._sending = asyncio.create_task(self._send())

    @classmethod
    async def open(cls, target: ByteTarget, fmt: AudioFormat, sample_rate: int, speed: float, tag: SyntheticTag | None) -> SoundStream:
        """Start the encoder, where the format needs one.

        Raises:
            ConversionError: ffmpeg is missing or cannot be started.
        """
        encoder = StreamEncoder(fmt, sample_rate, speed=speed, tag=tag)
        await encoder.__aenter__()
        return cls(encoder, target)

    async def write(self, samples: Samples) -> None:
        """Encode some more, once what came before has been taken.

        Raises:
            OutputError: The target failed.
            ConversionError: ffmpeg failed.
        """
        await self._taken.wait()
        if self._sending.done():
            self._sending.result()
        await self._encoder.write(samples)

    async def finish(self) -> None:
        """Send the rest, and wait until it has arrived.

        Raises:
            OutputError: The target failed.
            ConversionError: ffmpeg failed.
        """
        await self._encoder.finish()
        await self._sending
        await self._target.finish()

    async def aclose(self) -> None:
        """End the encoder and the target."""
        self._sending.cancel()
        await asyncio.wait({self._sending})
        await self._encoder.aclose()
        await self._target.aclose()

    async def _send(self) -> None:
        try:
            async for data in self._encoder:
                self._taken.clear()
                await self._target.write(data)
                self._taken.set()
        finally:
            self._taken.set()  # a writer that waits is told of the failure


class Descriptor:
    """An open file descriptor (standard output, a named pipe) as a target of bytes."""

    def __init__(self, number: int) -> None:
        self._number = number

    async def write(self, data: bytes) -> None:
        """Write all of it.

        Raises:
            BrokenPipeError: Nobody reads it any more.
            OutputError: It cannot be written.
        """
        rest = memoryview(data)
        while rest:
            try:
                written = await call_in_background(lambda part=rest: os.write(self._number, part))  # type: ignore[misc]
            except BrokenPipeError:
                raise
            except OSError as error:
                raise OutputError(f"The audio cannot be written: {error.strerror}.") from None
            rest = rest[written:]

    async def finish(self) -> None:
        """Nothing is held back."""

    async def aclose(self) -> None:
        """It stays open: it was open before."""


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
        # A segment of its own: Ctrl-C is for us, and we end it.
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


_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} sentences{postfix}, {remaining} left"
_REDRAW_SECONDS = 0.1
_USUAL_WIDTH = 80


class ProgressBar:
    """On standard error, if that is a terminal; else silent. The bar is for texts of two sentences and more.

    A caption may hold several sentences (a model's segment), or a part of a long one, so what has been said is counted in
    characters, without spaces.

    Args:
        sentences: Of the whole text.
    """

    def __init__(self, sentences: Sequence[str]) -> None:
        self._ends = list(accumulate(_size(sentence) for sentence in sentences))
        self._shown = sys.stderr is not None and sys.stderr.isatty()
        self._captions: list[Caption] = []
        self._heard = 0
        self._characters = 0
        self._bar: tqdm[None] | None = None
        self._drawn = 0.0
        self._told = ""

    def tell(self, line: str) -> None:
        """Show what is being waited for, until the next line; "" removes it."""
        if not self._shown or line == self._told or self._bar:
            return
        self._told = line
        sys.stderr.write(f"\r\033[K{line[: _width()]}")
        sys.stderr.flush()

    def warn(self, line: str) -> None:
        """Say something that is to be read in any case, terminal or not."""
        self.tell("")
        if sys.stderr is not None:
            print(f"say.py: {line}", file=sys.stderr)

    def caption(self, caption: Caption) -> None:
        """A segment has been made."""
        self._captions.append(caption)

    def move(self, seconds: float) -> None:
        """The sound has arrived where it goes, up to here (in seconds at speed 1)."""
        if not self._shown or len(self._ends) < 2:
            return
        while self._heard < len(self._captions) and self._captions[self._heard].end <= seconds + 0.001:
            self._characters += _size(self._captions[self._heard].text)
            self._heard += 1
        if self._bar is None:
            self.tell("")
            self._bar = _new_bar(len(self._ends))
        self._draw(bisect_right(self._ends, self._characters), seconds)

    def finish(self, seconds: float) -> None:
        """All is done."""
        if self._bar is not None:
            self._drawn = 0.0
            self._draw(len(self._ends), seconds)

    def close(self) -> None:
        """Leave the line."""
        self.tell("")
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _draw(self, done: int, seconds: float) -> None:
        bar = self._bar
        if bar is None or time.monotonic() - self._drawn < _REDRAW_SECONDS:
            return
        self._drawn = time.monotonic()
        bar.n, bar.ncols = done, _width()
        bar.set_postfix_str(f"{seconds:.0f} s of sound", refresh=False)
        bar.refresh()


def _width() -> int:
    """Of the terminal that the bar is on, less the last column, where some would break the line. Some say 0 for a width unknown."""
    with suppress(OSError):
        return (os.get_terminal_size(sys.stderr.fileno()).columns or _USUAL_WIDTH) - 1
    return _USUAL_WIDTH - 1


def _size(text: str) -> int:
    return len("".join(text.split()))


def _new_bar(total: int) -> tqdm[None]:
    # By default tqdm takes a lock that works between processes (some systems run a helper process for it) and a thread that watches.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    # It measures the terminal as well, and shows nothing on one of a height unknown: the one line that is needed is always there.
    return tqdm(total=total, bar_format=_BAR, file=sys.stderr, ncols=_width(), nrows=2, disable=False)
