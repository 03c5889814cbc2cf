"""Speech samples to the bytes of an audio file: whole, with exact headers, or streamed as they come."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from audio_formats import FORMATS, SAMPLE_RATE, AudioFormat, Samples, SyntheticTag, tag_arguments
from errors import ConversionError
from ffmpeg import STALL_TIMEOUT, ByteQueue, FfmpegProcess, temporary_folder

MIN_SPEED, MAX_SPEED = 0.25, 4.0  # OpenAI's range

# ffmpeg reads raw samples in blocks of a tenth of the *declared* second, rounded down to a power of two (libavformat/pcm.c): 85 ms at
# 24 kHz, so that CSM's first frame of 80 ms would wait for its second. Declared at a quarter of the rate and then set right by
# `asetrate`, the blocks are 21 ms; the samples stay the same (measured: the encoded bytes are identical).
_RATE_DIVISOR = 4

_WRONG = "The conversion failed: ffmpeg gave something that is not {name}."


@dataclass(frozen=True)
class Converted:
    """A complete file.

    Attributes:
        data: Its bytes.
        duration: Seconds of sound that went into the encoder. A lossless file and an MP3 last exactly that; Opus too; ADTS AAC, which
            cannot say how much of its first and last frame is padding, plays up to 0.1 s longer.
    """

    data: bytes
    duration: float


def to_int16(samples: Samples) -> bytes:
    """`samples`, float32 of shape (n,), as signed 16-bit little-endian; what is outside [-1, 1] is clipped.

    Raises:
        ConversionError: One is not a finite number.
    """
    values = np.asarray(samples, dtype=np.float32).reshape(-1)
    if not np.isfinite(values).all():
        raise ConversionError("The speech cannot be converted: the model gave samples that are not numbers.")
    return bytes(np.rint(np.clip(values, -1.0, 1.0) * 32767.0).astype("<i2").tobytes())


def _tempo(speed: float) -> list[str]:
    """atempo filters that change the speed and keep the pitch.

    Beyond a factor of 2 one atempo drops samples instead of blending them (its documentation), so the factor is shared among several.
    """
    if not MIN_SPEED <= speed <= MAX_SPEED:  # NaN fails too
        raise ValueError(f"speed must be from {MIN_SPEED} to {MAX_SPEED}")
    if speed == 1.0:
        return []
    count = math.ceil(abs(math.log2(speed)))
    return [f"atempo={speed ** (1 / count):.9f}"] * count


def encoder_arguments(
    fmt: AudioFormat, sample_rate: int, speed: float, tag: SyntheticTag | None, target: str, *, streamed: bool = False
) -> list[str]:
    """ffmpeg's arguments to make `fmt` of signed 16-bit samples from its standard input; `target` is the output's name.

    Raises:
        ValueError: `speed` is out of range.
    """
    source = ["-f", "s16le", "-ar", str(sample_rate // _RATE_DIVISOR), "-ac", "1", "-i", "pipe:0"]
    filters = ["-af", ",".join([f"asetrate={sample_rate}", *_tempo(speed)])]
    result = ["-ar", str(SAMPLE_RATE), "-ac", "1", *fmt.encoder, *(fmt.streaming if streamed else ()), *tag_arguments(fmt, tag)]
    return [*source, *filters, *result, target]


def _needs_ffmpeg(fmt: AudioFormat, sample_rate: int, speed: float) -> bool:
    return fmt.name != "pcm" or speed != 1.0 or sample_rate != SAMPLE_RATE


async def _run(arguments: list[str], data: bytes, folder: Path | None, stall_timeout: float) -> bytes:
    """Feed `data` to one ffmpeg; returns what it wrote to its standard output."""
    process = await FfmpegProcess.start(arguments, folder=folder, stall_timeout=stall_timeout)
    try:
        await process.write(data)
        process.close_input()
        pieces = []
        while piece := await process.output.get():
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        await process.aclose()


async def convert(
    samples: Samples,
    sample_rate: int,
    fmt: AudioFormat,
    *,
    speed: float = 1.0,
    tag: SyntheticTag | None = None,
    stall_timeout: float = STALL_TIMEOUT,
) -> Converted:
    """A complete file whose headers are exact. Cancelled, it leaves neither a process nor a file.

    Args:
        samples: float32, shape (n,), n > 0.
        sample_rate: Of `samples`, in Hz.
        fmt: What to make of them.
        speed: From 0.25 to 4.0; the pitch stays.
        tag: To be written into the file's metadata, where it has some.
        stall_timeout: Seconds without progress after which ffmpeg counts as hung.

    Raises:
        ConversionError: There is nothing to convert, or ffmpeg is missing, failed or hung.
        ValueError: `speed` is out of range.
    """
    pcm = await asyncio.to_thread(to_int16, samples)
    if not pcm:
        raise ConversionError("The speech cannot be converted: it holds no sound.")
    if _needs_ffmpeg(FORMATS["pcm"], sample_rate, speed):
        # Before it is encoded, so that the length of what goes into the file is known.
        pcm = await _at_speed(pcm, sample_rate, speed, stall_timeout)
    duration = len(pcm) / 2 / SAMPLE_RATE
    if fmt.name == "pcm":
        return Converted(pcm, duration)
    return Converted(await _encode(pcm, fmt, tag, stall_timeout), duration)


async def _at_speed(pcm: bytes, sample_rate: int, speed: float, stall_timeout: float) -> bytes:
    raw = FORMATS["pcm"]
    changed = await _run(encoder_arguments(raw, sample_rate, speed, None, "pipe:1"), pcm, None, stall_timeout)
    expected = len(pcm) / 2 / sample_rate / speed
    if len(changed) % 2 or abs(len(changed) / 2 / SAMPLE_RATE - expected) > 0.2 + 0.05 * expected:
        raise ConversionError(_WRONG.format(name="the same speech at another speed"))
    return changed


async def _encode(pcm: bytes, fmt: AudioFormat, tag: SyntheticTag | None, stall_timeout: float) -> bytes:
    """Encode into a file: a pipe cannot be sought in, and then no header could say how long the sound is."""
    with temporary_folder() as folder:
        file = folder / f"speech.{fmt.extension}"
        await _run(encoder_arguments(fmt, SAMPLE_RATE, 1.0, tag, file.name), pcm, folder, stall_timeout)
        try:
            data = await asyncio.to_thread(file.read_bytes)
        except OSError:
            data = b""
    if not fmt.begins(data):
        raise ConversionError(_WRONG.format(name=fmt.name))
    return data


class StreamEncoder:
    """One streamed answer: samples go in as they are made, encoded bytes come out as soon as they exist.

    An async context manager. One task calls `write` and, at the end, `finish`; another iterates over the bytes. ffmpeg is started on entry, so
    that it is there before the first sound. `aclose` may be called at any time, from any task, more than once.

    Args:
        fmt: What to encode to.
        sample_rate: Of the samples, in Hz.
        speed: From 0.25 to 4.0; the pitch stays.
        tag: To be written into the metadata, where there is some.
        stall_timeout: Seconds without progress after which ffmpeg counts as hung.

    Raises:
        ValueError: `speed` is out of range.
    """

    def __init__(
        self,
        fmt: AudioFormat,
        sample_rate: int,
        *,
        speed: float = 1.0,
        tag: SyntheticTag | None = None,
        stall_timeout: float = STALL_TIMEOUT,
    ) -> None:
        self._format = fmt
        self._arguments = encoder_arguments(fmt, sample_rate, speed, tag, "pipe:1", streamed=True)
        self._needs_ffmpeg = _needs_ffmpeg(fmt, sample_rate, speed)
        self._stall_timeout = stall_timeout
        self._process: FfmpegProcess | None = None
        self._output = ByteQueue()
        self._silent = True

    async def __aenter__(self) -> StreamEncoder:
        """Start ffmpeg.

        Raises:
            ConversionError: It is missing or cannot be started.
        """
        if self._needs_ffmpeg:
            self._process = await FfmpegProcess.start(self._arguments, stall_timeout=self._stall_timeout)
            self._output = self._process.output
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def write(self, samples: Samples) -> None:
        """Encode some more samples, float32 of shape (n,).

        Raises:
            ConversionError: ffmpeg has ended or hangs, or a sample is not a number.
        """
        try:
            data = to_int16(samples)
            self._silent = self._silent and not data
            if self._process is not None:
                await self._process.write(data)
            elif data:
                self._output.put(data)
        except ConversionError as error:
            self._output.end(error)  # who reads must not wait for an end that nobody will write
            raise

    async def finish(self) -> None:
        """All samples are written. Does not wait for ffmpeg: the iteration ends when that has ended well, and raises when not."""
        if self._silent:
            self._output.end(ConversionError("The speech cannot be converted: it holds no sound."))
        if self._process is not None:
            self._process.close_input()
        else:
            self._output.end()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The encoded bytes, each time all that there are.

        Raises:
            ConversionError: ffmpeg failed, was killed, hung, or gave something else; or `aclose` was called before the end.
        """
        data = await self._output.get()
        if not self._format.begins(data):
            raise ConversionError(_WRONG.format(name=self._format.name))
        while data:
            yield data
            data = await self._output.get()

    async def aclose(self) -> None:
        """End everything: no process is left when this returns."""
        if self._process is not None:
            await self._process.aclose()
        self._output.end(ConversionError("The conversion was given up."))
