"""Outputs of the command line: files, pipes, the loudspeaker, and the progress bar."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Protocol

from anyio import to_thread
from tqdm import tqdm

from audio_converter import Encoder, encoder_arguments, to_int16
from audio_formats import SAMPLE_RATE, AudioFormat, Samples, SyntheticTag
from captions import Caption
from errors import ConversionError
from ffmpeg import FfmpegProcess
from files import NewFile, OutputError, output_errors

_MIN_FREE_BYTES = 1 << 20  # with less free space than this, a failed conversion is reported as a full disk

_BUFFER_SECONDS = 1.0  # in the loudspeaker's buffer: the event loop may be busy for a moment
_TAIL = bytes(2 * SAMPLE_RATE // 5)  # silence after the audio: some systems drop what is in the device's own buffer at the end
_POLL_SECONDS = 0.05

_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} sentences{postfix}, {remaining} left"
_REDRAW_SECONDS = 0.1
_DEFAULT_WIDTH = 80


class Sink(Protocol):
    """Accepts audio: float32 samples of shape (n,). `aclose` is always called at the end."""

    async def write(self, samples: Samples) -> None:
        """Write samples; returns when more can be accepted."""

    async def finish(self) -> None:
        """Wait until everything has been written."""

    async def aclose(self) -> None:
        """Release everything. Unfinished output is removed."""


class ByteTarget(Protocol):
    """Accepts encoded bytes. `aclose` is always called at the end."""

    async def write(self, data: bytes) -> None:
        """Write bytes; returns when more can be accepted."""

    async def finish(self) -> None:
        """Wait until everything has been written."""

    async def aclose(self) -> None:
        """Stop at once."""


class AudioFile:
    """An audio file with exact headers, encoded while the samples arrive: a book's samples do not fit into memory.

    Create it with `open`.
    """

    def __init__(self, file: NewFile, encoder: FfmpegProcess, fmt: AudioFormat) -> None:
        self._file = file
        self._encoder = encoder
        self._format = fmt

    @classmethod
    async def open(cls, target: Path, fmt: AudioFormat, sample_rate: int, speed: float, tag: SyntheticTag | None) -> AudioFile:
        """Start the encoder on a temporary file beside `target`.

        Raises:
            OutputError: The folder cannot be written.
            ConversionError: ffmpeg is missing or cannot be started.
        """
        with output_errors(target):
            file = NewFile(target)
        try:
            # "file:", or ffmpeg would take "a:b.mp3" for a URL.
            arguments = encoder_arguments(fmt, sample_rate, speed, tag, f"file:{file.path.name}")
            return cls(file, await FfmpegProcess.start(arguments, folder=file.path.parent), fmt)
        except BaseException:
            file.discard()
            raise

    async def write(self, samples: Samples) -> None:
        """Encode samples.

        Raises:
            OutputError: The disk is full.
            ConversionError: ffmpeg failed.
        """
        with self._full_disk_reported():
            await self._encoder.write(to_int16(samples))

    async def finish(self) -> None:
        """Move the file into place.

        Raises:
            OutputError: It cannot be moved, or the disk is full.
            ConversionError: ffmpeg failed.
        """
        with self._full_disk_reported():
            self._encoder.close_input()
            while await self._encoder.output.get():
                pass
            with self._file.path.open("rb") as file:
                beginning = file.read(16)
            if not self._format.begins(beginning):
                raise ConversionError(f"The conversion failed: ffmpeg's output is not {self._format.name}.")
        with output_errors(self._file.target):
            self._file.commit()

    async def aclose(self) -> None:
        """Stop the encoder, and remove the file unless it is finished."""
        await self._encoder.aclose()
        self._file.discard()

    @contextmanager
    def _full_disk_reported(self) -> Iterator[None]:
        try:
            yield
        except ConversionError:
            if shutil.disk_usage(self._file.path.parent).free < _MIN_FREE_BYTES:
                raise OutputError("The disk is full.") from None
            raise


class AudioStream:
    """Encodes audio while it arrives, and sends the bytes on as fast as the target accepts them. Create it with `open`."""

    def __init__(self, encoder: Encoder, target: ByteTarget) -> None:
        self._encoder = encoder
        self._target = target
        self._idle = asyncio.Event()  # all encoded bytes have been sent
        self._idle.set()
        self._sending = asyncio.create_task(self._send())

    @classmethod
    async def open(cls, target: ByteTarget, fmt: AudioFormat, sample_rate: int, speed: float, tag: SyntheticTag | None) -> AudioStream:
        """Start the encoder, if the format needs one.

        Raises:
            ConversionError: ffmpeg is missing or cannot be started.
        """
        encoder = Encoder(fmt, sample_rate, streamed=True, speed=speed, tag=tag)
        await encoder.__aenter__()
        return cls(encoder, target)

    async def write(self, samples: Samples) -> None:
        """Encode samples, once the bytes before them have been sent.

        Raises:
            OutputError: The target failed.
            ConversionError: ffmpeg failed.
        """
        await self._idle.wait()
        if self._sending.done():
            self._sending.result()
        await self._encoder.write(samples)

    async def finish(self) -> None:
        """Send the rest and wait until all of it has been written.

        Raises:
            OutputError: The target failed.
            ConversionError: ffmpeg failed.
        """
        await self._encoder.finish()
        await self._sending
        await self._target.finish()

    async def aclose(self) -> None:
        """Stop the encoder and the target."""
        self._sending.cancel()
        await asyncio.wait({self._sending})
        await self._encoder.aclose()
        await self._target.aclose()

    async def _send(self) -> None:
        try:
            async for data in self._encoder:
                self._idle.clear()
                await self._target.write(data)
                self._idle.set()
        finally:
            self._idle.set()  # a waiting writer then sees the failure


class Descriptor:
    """Writes bytes to an open file descriptor (standard output, a named pipe), which stays open."""

    def __init__(self, number: int) -> None:
        self._number = number

    async def write(self, data: bytes) -> None:
        """Write all bytes. When it is cancelled, a write to a stalled pipe is left behind in its thread.

        Raises:
            BrokenPipeError: The reader closed the pipe.
            OutputError: Writing failed.
        """
        rest = memoryview(data)
        while rest:
            try:
                written = await to_thread.run_sync(os.write, self._number, rest, abandon_on_cancel=True)
            except BrokenPipeError:
                raise
            except OSError as error:
                raise OutputError(f"The audio cannot be written: {error.strerror}.") from None
            rest = rest[written:]

    async def finish(self) -> None:
        """Do nothing: nothing is buffered."""

    async def aclose(self) -> None:
        """Do nothing: the caller owns the descriptor."""


class Loudspeaker:
    """Plays signed 16-bit samples (mono, 24 kHz) on the default output device.

    Only as much is written as the device has room for: a blocked native call could not be cancelled.

    Raises:
        OutputError: There is no device, or it cannot be opened.
    """

    def __init__(self) -> None:
        self._portaudio = _load_sounddevice()
        self._odd = b""  # half a sample: the encoder's bytes arrive in pieces of any length
        self._stopping = False
        with self._failures_reported():
            self._stream = self._portaudio.RawOutputStream(samplerate=SAMPLE_RATE, channels=1, dtype="int16", latency=_BUFFER_SECONDS)
            self._stream.start()

    async def write(self, data: bytes) -> None:
        """Play samples; returns when all of them are in the device's buffer.

        Raises:
            OutputError: The device failed.
        """
        data = self._odd + data
        whole = len(data) & ~1
        rest, self._odd = data[:whole], data[whole:]
        with self._failures_reported():
            while rest:
                room = 2 * self._stream.write_available
                if room:
                    self._stream.write(rest[:room])
                    rest = rest[room:]
                else:
                    await asyncio.sleep(_POLL_SECONDS)

    async def finish(self) -> None:
        """Wait until the last sample has been played.

        Raises:
            OutputError: The device failed.
        """
        await self.write(_TAIL)
        self._stopping = True
        with self._failures_reported():
            await to_thread.run_sync(self._stream.stop, abandon_on_cancel=True)
        self._stopping = False

    async def aclose(self) -> None:
        """Stop playing at once."""
        if not self._stopping:  # else a thread is left in `stop`, and PortAudio allows one call at a time
            self._stream.close()

    @contextmanager
    def _failures_reported(self) -> Iterator[None]:
        try:
            yield
        except self._portaudio.PortAudioError as error:
            raise OutputError(f"The loudspeaker failed: {error.args[0]}.") from None


def require_loudspeaker(to_write: str = "-o speech.mp3") -> None:
    """Raise before any work if there is no loudspeaker.

    Args:
        to_write: How to write a file instead, for the message.

    Raises:
        OutputError: PortAudio or an output device is missing.
    """
    portaudio = _load_sounddevice(to_write)
    try:
        portaudio.check_output_settings(samplerate=SAMPLE_RATE, channels=1, dtype="int16")
    except (portaudio.PortAudioError, ValueError) as error:
        raise OutputError(f"There is no loudspeaker on this machine ({error.args[0]}). Write a file instead: {to_write}") from None


class ProgressBar:
    """The progress on standard error, if that is a terminal. Texts of one sentence have no bar.

    A caption may hold several sentences (a model's segment) or a part of a long one, so progress is counted in characters without
    spaces.

    Args:
        sentences: Of the whole text.
        program: The program's name, in front of warnings.
    """

    def __init__(self, sentences: Sequence[str], program: str) -> None:
        self._program = program
        self._ends = list(accumulate(_size(sentence) for sentence in sentences))
        self._shown = sys.stderr is not None and sys.stderr.isatty()
        self._captions: list[Caption] = []
        self._written = 0  # captions
        self._characters = 0
        self._bar: tqdm[None] | None = None
        self._drawn = 0.0
        self._status = ""

    def status(self, line: str) -> None:
        """Show what the program waits for, until the next line; "" removes it."""
        if not self._shown or line == self._status or self._bar:
            return
        self._status = line
        sys.stderr.write(f"\r\033[K{line[: _width()]}")
        sys.stderr.flush()

    def warn(self, line: str) -> None:
        """Print a warning, at a terminal or not."""
        self.status("")
        if sys.stderr is not None:
            print(f"{self._program}: {line}", file=sys.stderr)

    def confirm(self, line: str) -> None:
        """Print that the work is done, at a terminal only."""
        if self._shown:
            print(line, file=sys.stderr)

    def caption(self, caption: Caption) -> None:
        """Add the caption of a generated segment."""
        self._captions.append(caption)

    def move(self, seconds: float) -> None:
        """Show that the audio has been written up to `seconds` (at speed 1)."""
        if not self._shown or len(self._ends) < 2:
            return
        while self._written < len(self._captions) and self._captions[self._written].end <= seconds + 0.001:
            self._characters += _size(self._captions[self._written].text)
            self._written += 1
        if self._bar is None:
            self.status("")
            self._bar = _new_bar(len(self._ends))
        self._draw(bisect_right(self._ends, self._characters), seconds)

    def finish(self, seconds: float) -> None:
        """Show the complete bar."""
        if self._bar is not None:
            self._drawn = 0.0
            self._draw(len(self._ends), seconds)

    def close(self) -> None:
        """End the line."""
        self.status("")
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _draw(self, done: int, seconds: float) -> None:
        bar = self._bar
        if bar is None or time.monotonic() - self._drawn < _REDRAW_SECONDS:
            return
        self._drawn = time.monotonic()
        bar.n, bar.ncols = done, _width()
        bar.set_postfix_str(f"{seconds:.0f} s of audio", refresh=False)
        bar.refresh()


def _load_sounddevice(to_write: str = "-o speech.mp3") -> ModuleType:
    try:
        import sounddevice
    except OSError:  # its wheel has PortAudio for macOS, not for Linux
        raise OutputError(
            f"The PortAudio library is missing (on Debian: apt install libportaudio2). Install it, or write a file: {to_write}"
        ) from None
    module: ModuleType = sounddevice
    return module


def _width() -> int:
    """Return the terminal's width less one: a full last column breaks the line on some. Some terminals report 0 for an unknown width."""
    with suppress(OSError):
        return (os.get_terminal_size(sys.stderr.fileno()).columns or _DEFAULT_WIDTH) - 1
    return _DEFAULT_WIDTH - 1


def _size(text: str) -> int:
    return len("".join(text.split()))


def _new_bar(total: int) -> tqdm[None]:
    # By default tqdm creates a lock between processes (on some systems with a helper process) and a monitor thread.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    # nrows: tqdm hides the bar on a terminal whose height is unknown.
    return tqdm(total=total, bar_format=_BAR, file=sys.stderr, ncols=_width(), nrows=2, disable=False)
