"""Convert speech samples to audio files: complete with exact headers, or streamed while they are generated."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audio_formats import FORMATS, SAMPLE_RATE, AudioFormat, LengthMeter, Samples, SyntheticTag, tag_arguments
from errors import ConversionError
from ffmpeg import STALL_TIMEOUT, ByteQueue, FfmpegProcess, temporary_folder

MIN_SPEED, MAX_SPEED = 0.25, 4.0  # OpenAI's range

# ffmpeg reads raw samples in blocks of a tenth of a second at the declared rate, rounded down to a power of two (libavformat/pcm.c). At
# 24 kHz that is 85 ms, so CSM's first frame of 80 ms would wait for the second. We declare a quarter of the rate, which makes the blocks
# 21 ms, and correct it with `asetrate`. The samples stay the same (measured: the encoded bytes are identical).
_RATE_DIVISOR = 4

_LENGTH_TOLERANCE = 0.05  # seconds; the encoders add padding, and take nothing away

_WRONG = "The conversion failed: ffmpeg's output is not {name}."
_TOO_SHORT = "The conversion failed: ffmpeg encoded {got:.2f} s of {expected:.2f} s."
_NO_AUDIO = "The speech cannot be converted: the model produced no audio."


@dataclass(frozen=True)
class Converted:
    """A complete file.

    Attributes:
        data: The file's bytes.
        duration: Seconds of audio that were encoded. Files last exactly that, but AAC in ADTS plays up to 0.1 s longer: it cannot say how
            much of its first and last frame is padding.
    """

    data: bytes
    duration: float


def to_int16(samples: Samples) -> bytes:
    """Return float32 `samples` of shape (n,) as signed 16-bit little-endian, clipped to [-1, 1].

    Raises:
        ConversionError: A sample is NaN or infinite.
    """
    values = np.asarray(samples, dtype=np.float32).reshape(-1)
    if not np.isfinite(values).all():
        raise ConversionError("The speech cannot be converted: the model produced samples that are not numbers.")
    return bytes(np.rint(np.clip(values, -1.0, 1.0) * 32767.0).astype("<i2").tobytes())


def encoder_arguments(
    fmt: AudioFormat,
    sample_rate: int,
    speed: float,
    tag: SyntheticTag | None,
    target: str,
    *,
    streamed: bool = False,
    output_rate: int = SAMPLE_RATE,
) -> list[str]:
    """Return ffmpeg's arguments that encode signed 16-bit samples from standard input as `fmt` into the file or pipe `target`.

    Raises:
        ValueError: `speed` is out of range.
    """
    source = ["-f", "s16le", "-ar", str(sample_rate // _RATE_DIVISOR), "-ac", "1", "-i", "pipe:0"]
    filters = ["-af", ",".join([f"asetrate={sample_rate}", *_tempo(speed)])]
    result = ["-ar", str(output_rate), "-ac", "1", *fmt.encoder, *(fmt.streaming if streamed else ()), *tag_arguments(fmt, tag)]
    return [*source, *filters, *result, target]


async def convert(
    samples: Samples,
    sample_rate: int,
    fmt: AudioFormat,
    *,
    speed: float = 1.0,
    tag: SyntheticTag | None = None,
    output_rate: int = SAMPLE_RATE,
    stall_timeout: float = STALL_TIMEOUT,
) -> Converted:
    """Return a complete file with exact headers. If cancelled, it leaves no process and no file.

    Args:
        samples: float32, shape (n,), n > 0.
        sample_rate: The rate of `samples`, in Hz.
        fmt: The format to encode to.
        speed: From 0.25 to 4.0; the pitch stays.
        tag: Written into the file's metadata if the format has any.
        output_rate: The file's sample rate, in Hz.
        stall_timeout: Seconds without progress after which ffmpeg counts as hung.

    Raises:
        ConversionError: There are no samples, or ffmpeg is missing, failed or hung.
        ValueError: `speed` is out of range.
    """
    pcm = await asyncio.to_thread(to_int16, samples)
    if not pcm:
        raise ConversionError(_NO_AUDIO)
    if needs_ffmpeg(FORMATS["pcm"], sample_rate, speed, output_rate):
        # A separate run before the encoding, so that the length of what is encoded is known.
        pcm = await _resampled(pcm, sample_rate, speed, output_rate, stall_timeout)
    duration = len(pcm) / 2 / output_rate
    if fmt.name == "pcm":
        return Converted(pcm, duration)
    return Converted(await _encode(pcm, fmt, tag, output_rate, stall_timeout), duration)


class StreamEncoder:
    """Encode one streamed response: takes samples as they are generated, gives bytes as soon as they exist.

    An async context manager. One task calls `write` and at the end `finish`; another one iterates over the bytes. ffmpeg starts on entry, so
    that it is ready before the first samples. `aclose` may be called at any time, from any task, more than once.

    The arguments are those of `convert`.

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
        output_rate: int = SAMPLE_RATE,
        stall_timeout: float = STALL_TIMEOUT,
    ) -> None:
        self._format = fmt
        self._arguments = encoder_arguments(fmt, sample_rate, speed, tag, "pipe:1", streamed=True, output_rate=output_rate)
        self._needs_ffmpeg = needs_ffmpeg(fmt, sample_rate, speed, output_rate)
        self._stall_timeout = stall_timeout
        self._process: FfmpegProcess | None = None
        self._output = ByteQueue()
        self._meter = LengthMeter(fmt, output_rate)
        self._input_rate = sample_rate * speed  # input samples for each second of the output
        self._exact = speed == 1.0
        self._input_bytes = 0

    async def __aenter__(self) -> StreamEncoder:
        """Start ffmpeg.

        Raises:
            ConversionError: ffmpeg is missing or cannot be started.
        """
        if self._needs_ffmpeg:
            self._process = await FfmpegProcess.start(self._arguments, stall_timeout=self._stall_timeout)
            self._output = self._process.output
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def unread(self) -> int:
        """The number of encoded bytes that wait to be read."""
        return self._output.size

    async def write(self, samples: Samples) -> None:
        """Encode more samples, float32 of shape (n,).

        Raises:
            ConversionError: ffmpeg has ended or hangs, or a sample is not a number.
        """
        try:
            data = to_int16(samples)
            self._input_bytes += len(data)
            if self._process is not None:
                await self._process.write(data)
            elif data:
                self._output.put(data)
        except ConversionError as error:
            self._output.end(error)  # or the reader would wait for ever
            raise

    async def finish(self) -> None:
        """End the input. Does not wait for ffmpeg: the iteration ends when ffmpeg has succeeded, and raises if it failed."""
        if not self._input_bytes:
            self._output.end(ConversionError(_NO_AUDIO))
        if self._process is not None:
            self._process.close_input()
        else:
            self._output.end()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the encoded bytes as soon as they are ready, at most 64 KiB at once.

        Raises:
            ConversionError: ffmpeg failed, hung, produced another format or too little, or `aclose` was called before the end.
        """
        data = await self._output.get()
        if not self._format.begins(data):
            raise ConversionError(_WRONG.format(name=self._format.name))
        while data:
            self._meter.feed(data)
            yield data
            data = await self._output.get()
        _check_length(self._meter, self._input_bytes / 2 / self._input_rate, exact=self._exact)

    async def aclose(self) -> None:
        """Stop encoding; no process is left when this returns."""
        if self._process is not None:
            await self._process.aclose()
        self._output.end(ConversionError("The conversion was cancelled."))


def _tempo(speed: float) -> list[str]:
    """Return atempo filters that change the speed and keep the pitch.

    Beyond a factor of 2 one atempo skips samples instead of blending them (its documentation), so several filters share the factor.
    """
    if not MIN_SPEED <= speed <= MAX_SPEED:  # NaN fails too
        raise ValueError(f"speed must be from {MIN_SPEED} to {MAX_SPEED}")
    if speed == 1.0:
        return []
    count = math.ceil(abs(math.log2(speed)))
    return [f"atempo={speed ** (1 / count):.9f}"] * count


def needs_ffmpeg(fmt: AudioFormat, sample_rate: int, speed: float, output_rate: int) -> bool:
    """Return whether the samples have to be encoded or changed. Else `to_int16` is enough."""
    return fmt.name != "pcm" or speed != 1.0 or sample_rate != output_rate


async def _run(arguments: list[str], data: bytes, folder: Path | None, stall_timeout: float) -> bytes:
    """Feed `data` to one ffmpeg and return its standard output."""
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


async def _resampled(pcm: bytes, sample_rate: int, speed: float, output_rate: int, stall_timeout: float) -> bytes:
    arguments = encoder_arguments(FORMATS["pcm"], sample_rate, speed, None, "pipe:1", output_rate=output_rate)
    changed = await _run(arguments, pcm, None, stall_timeout)
    expected = len(pcm) / 2 / sample_rate / speed
    if len(changed) % 2 or abs(len(changed) / 2 / output_rate - expected) > 0.2 + 0.05 * expected:
        raise ConversionError(_WRONG.format(name="the same speech at the requested speed and sample rate"))
    return changed


async def _encode(pcm: bytes, fmt: AudioFormat, tag: SyntheticTag | None, rate: int, stall_timeout: float) -> bytes:
    """Encode into a file, not a pipe: ffmpeg must seek back to write the length into the header."""
    with temporary_folder() as folder:
        file = folder / f"speech.{fmt.name}"
        await _run(encoder_arguments(fmt, rate, 1.0, tag, file.name, output_rate=rate), pcm, folder, stall_timeout)
        try:
            data = await asyncio.to_thread(file.read_bytes)
        except OSError:
            data = b""
    if not fmt.begins(data):
        raise ConversionError(_WRONG.format(name=fmt.name))
    await asyncio.to_thread(_check_file, data, fmt, len(pcm) / 2 / rate)
    return data


def _check_file(data: bytes, fmt: AudioFormat, expected: float) -> None:
    meter = LengthMeter(fmt, SAMPLE_RATE)
    meter.feed(data)
    _check_length(meter, expected)


def _check_length(meter: LengthMeter, expected: float, *, exact: bool = True) -> None:
    """Compare the audio that came out with what went in. atempo meets a speed to one percent only.

    Raises:
        ConversionError: Some is missing.
    """
    got = meter.seconds()
    if got < expected - (_LENGTH_TOLERANCE if exact else 0.2 + 0.05 * expected):
        raise ConversionError(_TOO_SHORT.format(got=got, expected=expected))
