"""Where sound goes: into a file that is whole or not there, or, while it is made, to standard output or a loudspeaker."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Protocol

from audio_converter import StreamEncoder, encoder_arguments, to_int16
from audio_formats import AudioFormat, Mark
from background_call import call_in_background
from errors import ConversionError
from ffmpeg_process import FfmpegProcess
from new_file import NewFile, OutputError
from speech_model import Samples

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
    async def open(cls, target: Path, fmt: AudioFormat, sample_rate: int, speed: float, mark: Mark | None) -> AudioFile:
        """Start the encoder on a file beside `target`.

        Raises:
            OutputError: The folder cannot be written.
            ConversionError: ffmpeg is missing or cannot be started.
        """
        file = NewFile(target)
        try:
            # "file:", or ffmpeg would take "a:b.mp3" for an address.
            arguments = encoder_arguments(fmt, sample_rate, speed, mark, f"file:{file.path.name}")
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
    async def open(cls, target: ByteTarget, fmt: AudioFormat, sample_rate: int, speed: float, mark: Mark | None) -> SoundStream:
        """Start the encoder, where the format needs one.

        Raises:
            ConversionError: ffmpeg is missing or cannot be started.
        """
        encoder = StreamEncoder(fmt, sample_rate, speed=speed, mark=mark)
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
