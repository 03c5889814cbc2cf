"""Encode speech samples while they are generated: to complete files with exact headers, or to streams."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audio_formats import SAMPLE_RATE, AudioFormat, LengthMeter, Samples, SyntheticTag, tag_arguments, wav_header
from errors import ConversionError
from ffmpeg import STALL_TIMEOUT, ByteQueue, FfmpegProcess, muxer_name, temporary_folder

MIN_SPEED, MAX_SPEED = 0.25, 4.0  # OpenAI's range

# ffmpeg reads raw samples in blocks of a tenth of a second at the declared rate, rounded down to a power of two (libavformat/pcm.c). At
# 24 kHz that is 85 ms, so CSM's first frame of 80 ms would wait for the second. For a stream we declare a quarter of the rate, which makes
# the blocks 21 ms, and for a file four times the rate, because larger blocks take less processor time. `asetrate` corrects the rate. The samples
# stay the same (measured: the encoded bytes are identical, except for FLAC, whose encoder makes a frame of each block that it gets).
_STREAM_RATE, _FILE_RATE = 1 / 4, 4
_BLOCK_SAMPLES = 512  # a stream's block at 24 kHz

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
    counted: bool = False,
    output_rate: int = SAMPLE_RATE,
) -> list[str]:
    """Return ffmpeg's arguments that encode signed 16-bit samples from standard input as `fmt` into the file or pipe `target`.

    With `counted`, standard output gets the encoder's input as signed 16-bit samples.

    Raises:
        ValueError: `speed` is out of range.
    """
    declared = int(sample_rate * (_STREAM_RATE if streamed or fmt.name == "flac" else _FILE_RATE))
    source = ["-f", "s16le", "-ar", str(declared), "-ac", "1", "-i", "pipe:0"]
    filters = ",".join([f"asetrate={sample_rate}", *_tempo(speed)])
    result = ["-ar", str(output_rate), "-ac", "1", *fmt.encoder, *(fmt.streaming if streamed else ()), *tag_arguments(fmt, tag), target]
    if not counted:
        return [*source, "-af", filters, *result]
    graph = f"[0]{filters},aresample={output_rate},asetnsamples=n={_BLOCK_SAMPLES}:p=0,asplit[file][count]"
    return [*source, "-filter_complex", graph, "-map", "[file]", *result, "-map", "[count]", "-f", "s16le", "pipe:1"]


class Encoder:
    """Encode one answer: takes samples as they are generated, gives a stream of bytes or a complete file.

    An async context manager. One task calls `write`. For a stream it calls `finish` at the end, and another task iterates over the bytes;
    for a complete file it calls `file`. ffmpeg starts on entry, so that it is ready before the first samples. `aclose` may be called at any
    time, from any task, more than once; it leaves no process and no file.

    Args:
        fmt: The format to encode to.
        sample_rate: The rate of the samples, in Hz.
        streamed: Give bytes as soon as they exist. A complete file has exact headers instead.
        speed: From 0.25 to 4.0; the pitch stays.
        tag: Written into the file's metadata if the format has any.
        output_rate: The sample rate of the result, in Hz.
        stall_timeout: Seconds without progress after which ffmpeg counts as hung.

    Raises:
        ValueError: `speed` is out of range.
    """

    def __init__(
        self,
        fmt: AudioFormat,
        sample_rate: int,
        *,
        streamed: bool,
        speed: float = 1.0,
        tag: SyntheticTag | None = None,
        output_rate: int = SAMPLE_RATE,
        stall_timeout: float = STALL_TIMEOUT,
    ) -> None:
        self._format, self._tag, self._streamed = fmt, tag, streamed
        self._sample_rate, self._output_rate, self._speed = sample_rate, output_rate, speed
        self._stall_timeout = stall_timeout
        self._unchanged = speed == 1.0 and sample_rate == output_rate
        self._piped = streamed or fmt.name == "pcm"
        self._arguments = encoder_arguments(
            fmt,
            sample_rate,
            speed,
            tag,
            "pipe:1" if self._piped else _file_name(fmt),
            streamed=streamed,
            counted=not self._piped and not self._unchanged,
            output_rate=output_rate,
        )
        self._process: FfmpegProcess | None = None
        self._output = ByteQueue()
        self._folder: Path | None = None
        self._cleanup = ExitStack()
        self._wav_writer: str | None = None
        self._input_bytes = 0

    async def __aenter__(self) -> Encoder:
        """Start ffmpeg, unless the format is raw samples or a header before them.

        Raises:
            ConversionError: ffmpeg is missing or cannot be started, or there is no room for a temporary file.
        """
        if self._unchanged and self._format.name == "wav":
            self._wav_writer = muxer_name()
        if not self._wav_writer and needs_ffmpeg(self._format, self._sample_rate, self._speed, self._output_rate):
            try:
                await self._start_ffmpeg()
            except BaseException:
                await self.aclose()
                raise
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
            if self._process is not None:
                await self._process.write(data)
            elif data:
                if self._streamed and not self._input_bytes:
                    self._output.put(self._wav_head(None))
                self._output.put(data)
            self._input_bytes += len(data)
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

    async def file(self) -> Converted:
        """End the input and return the complete file.

        Raises:
            ConversionError: There were no samples; or ffmpeg failed, hung, or produced another format or length.
        """
        await self.finish()
        pieces = []
        while piece := await self._output.get():
            pieces.append(piece)
        duration = self._encoded_seconds()
        return await asyncio.to_thread(self._whole_file, b"".join(pieces), duration)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the encoded bytes as soon as they are ready, at most 64 KiB at once.

        Raises:
            ConversionError: ffmpeg failed, hung, produced another format or too little, or `aclose` was called before the end.
        """
        meter = LengthMeter(self._format, self._output_rate)
        data = await self._output.get()
        if not self._format.begins(data):
            raise ConversionError(_WRONG.format(name=self._format.name))
        while data:
            meter.feed(data)
            yield data
            data = await self._output.get()
        expected = self._input_seconds / self._speed
        _check_length(meter, expected, _LENGTH_TOLERANCE if self._speed == 1.0 else _tempo_tolerance(expected))

    async def aclose(self) -> None:
        """Stop encoding; no process and no file is left when this returns."""
        try:
            if self._process is not None:
                await self._process.aclose()
        finally:
            self._cleanup.close()
            self._output.end(ConversionError("The conversion was cancelled."))

    @property
    def _input_seconds(self) -> float:
        return self._input_bytes / 2 / self._sample_rate

    async def _start_ffmpeg(self) -> None:
        if not self._piped:
            self._folder = self._cleanup.enter_context(temporary_folder())
        self._process = await FfmpegProcess.start(
            self._arguments, folder=self._folder, keep_output=self._piped, stall_timeout=self._stall_timeout
        )
        self._output = self._process.output

    def _wav_head(self, size: int | None) -> bytes:
        return wav_header(self._output_rate, self._tag, self._wav_writer, size) if self._wav_writer else b""

    def _encoded_seconds(self) -> float:
        """Return the length of what was encoded: counted, where a filter has changed it.

        Raises:
            ConversionError: It is not the input's, at the requested speed.
        """
        if self._unchanged or self._process is None:
            return self._input_seconds
        expected, size = self._input_seconds / self._speed, self._process.received
        seconds = size / 2 / self._output_rate
        if size % 2 or abs(seconds - expected) > _tempo_tolerance(expected):
            raise ConversionError(_WRONG.format(name="the same speech at the requested speed and sample rate"))
        return seconds

    def _whole_file(self, data: bytes, duration: float) -> Converted:
        """Read what ffmpeg has written, or put the header before `data`; check it."""
        if self._folder is not None:
            try:
                data = (self._folder / _file_name(self._format)).read_bytes()
            except OSError:
                data = b""
        elif self._wav_writer:
            data = self._wav_head(len(data)) + data
        if not self._format.begins(data):
            raise ConversionError(_WRONG.format(name=self._format.name))
        meter = LengthMeter(self._format, self._output_rate)
        meter.feed(data)
        _check_length(meter, duration, _LENGTH_TOLERANCE)
        return Converted(data, duration)


def _file_name(fmt: AudioFormat) -> str:
    return f"speech.{fmt.name}"


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


def _tempo_tolerance(expected: float) -> float:
    """Return by how many seconds atempo may miss `expected`: it meets a speed to one percent only."""
    return 0.2 + 0.05 * expected


def _check_length(meter: LengthMeter, expected: float, tolerance: float) -> None:
    """Compare the audio that came out with what went in.

    Raises:
        ConversionError: Some is missing.
    """
    got = meter.seconds()
    if got < expected - tolerance:
        raise ConversionError(_TOO_SHORT.format(got=got, expected=expected))
