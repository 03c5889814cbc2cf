"""One text being said: from its pieces to the file or loudspeaker they go to, with progress and captions, ended early by a signal."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from audio_formats import AudioFormat, Mark
from audio_player import open_player
from captions import Caption, to_json, to_srt, to_webvtt
from config import Settings
from new_file import write_file
from progress_bar import ProgressBar
from reading import Reading, Speaker
from sound_sinks import AudioFile, Descriptor, Sink, SoundStream
from speech_model import Samples

_BLOCK_SECONDS = 0.5  # of sound that is handed on at once, so that the bar moves and a signal is heeded
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Output:
    """Where the sound goes.

    Attributes:
        path: A file; None for a descriptor or the loudspeaker.
        descriptor: An open one; None for a file or the loudspeaker.
        format: Of the sound; raw samples for the loudspeaker.
        speed: From 0.25 to 4.0.
        captions: A file for them, if they are wanted.
    """

    path: Path | None
    descriptor: int | None
    format: AudioFormat
    speed: float = 1.0
    captions: Path | None = None

    @property
    def streamed(self) -> bool:
        """Whether somebody takes the sound while it is made."""
        return self.path is None


class Interrupted(Exception):
    """A signal has ended the recital.

    Attributes:
        status: The exit status that tells which.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


async def recite(pieces: Sequence[str], speaker: Speaker, output: Output, settings: Settings, seed: int | None, bar: ProgressBar) -> None:
    """Say `pieces` (from `reading.cut`), all of them or, where that fails, nothing that looks like all of them.

    Raises:
        TTSError: The speaker or the encoder failed.
        OutputError: The file cannot be written, or the player failed.
        BrokenPipeError: The reader of a descriptor went away.
    """
    read = Reading(pieces, speaker, secrets.randbits(32) if seed is None else seed, settings.pause_ms)
    captions: list[Caption] = []
    seconds = 0.0
    async with aclosing(read.parts()) as parts, _lazily(lambda: _open(output, speaker, settings)) as sink:
        async for part in parts:
            for caption in part.captions:
                captions.append(caption)
                bar.caption(caption)
            for block in _blocks(part.samples, speaker.sample_rate):
                await sink.write(block)
                seconds += block.size / speaker.sample_rate
                bar.move(seconds)
        await sink.finish()
    bar.finish(seconds)
    if output.captions is not None:
        write_file(output.captions, _rendered(captions, output))


def run_until_signal(work: Coroutine[Any, Any, None]) -> None:
    """Run `work`. Ctrl-C, SIGTERM or a closed terminal cancel it, once, and it is waited for until it has cleaned up.

    A signal that whoever started us wants to be ignored (nohup) stays ignored.

    Raises:
        Interrupted: A signal came.
    """
    came: list[int] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(work)

        def end(number: int) -> None:
            if not came:
                came.append(number)
                task.cancel()

        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, end, number)
        try:
            await task
        except asyncio.CancelledError:
            if not came:
                raise

    asyncio.run(run())
    if came:
        raise Interrupted(came[0])


class _Lazy:
    """A sink that is opened with the first sound: only then it is known who speaks, and nothing is made for a text that cannot be said."""

    def __init__(self, opening: Callable[[], Coroutine[Any, Any, Sink]]) -> None:
        self._opening = opening
        self._sink: Sink | None = None

    async def write(self, samples: Samples) -> None:
        if self._sink is None:
            self._sink = await self._opening()
        await self._sink.write(samples)

    async def finish(self) -> None:
        if self._sink is not None:
            await self._sink.finish()

    async def aclose(self) -> None:
        if self._sink is not None:
            await self._sink.aclose()


@asynccontextmanager
async def _lazily(opening: Callable[[], Coroutine[Any, Any, Sink]]) -> AsyncIterator[Sink]:
    sink = _Lazy(opening)
    try:
        yield sink
    finally:
        await sink.aclose()


async def _open(output: Output, speaker: Speaker, settings: Settings) -> Sink:
    """The sink, with the speaker's name in the metadata."""
    mark = Mark(speaker.model, speaker.voice) if settings.synthetic_mark and speaker.model else None
    if output.path is not None and (output.path.is_file() or not output.path.exists()):
        return await AudioFile.open(output.path, output.format, speaker.sample_rate, output.speed, mark)
    if output.path is not None:  # a named pipe, /dev/stdout
        target = Descriptor(os.open(output.path, os.O_WRONLY))
    elif output.descriptor is not None:
        target = Descriptor(output.descriptor)
    else:
        return await SoundStream.open(await open_player(), output.format, speaker.sample_rate, output.speed, None)
    return await SoundStream.open(target, output.format, speaker.sample_rate, output.speed, mark)


def _blocks(samples: Samples, sample_rate: int) -> list[Samples]:
    size = int(sample_rate * _BLOCK_SECONDS)
    return [samples[start : start + size] for start in range(0, samples.size, size)]


def _rendered(captions: Sequence[Caption], output: Output) -> str:
    """The captions in the form that the file's ending asks for, in the sound's own time."""
    told = [replace(c, start=round(c.start / output.speed, 3), end=round(c.end / output.speed, 3)) for c in captions]
    ending = output.captions.suffix.lower() if output.captions else ""
    if ending == ".vtt":
        return to_webvtt(told)
    return to_srt(told) if ending == ".srt" else json.dumps(to_json(told), ensure_ascii=False, indent=2) + "\n"
