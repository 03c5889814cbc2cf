"""Speaks a text of any length piece by piece."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from audio_formats import AudioFormat, Samples, SyntheticTag
from captions import Caption, to_json, to_srt, to_webvtt
from config import Settings
from errors import InputTooLongError, InvalidInputError
from files import write_output
from say_output import AudioFile, Descriptor, ProgressBar, Sink, SoundStream, open_player
from speech_model import SegmentLengths
from text_normalizer import has_speech, normalize_text
from text_splitter import split_text

# While so many seconds wait to be played, no further piece is asked for: others may want the model, and a book must not fill the memory.
_AHEAD_SECONDS = 60.0
_SEEDS = 2**32


@dataclass(frozen=True)
class Part:
    """Some of the sound.

    Attributes:
        samples: float32, shape (n,).
        captions: Of the segments that have come to their end, in seconds from the beginning of the whole.
    """

    samples: Samples
    captions: tuple[Caption, ...] = ()


class Speaker(Protocol):
    """What can say a piece of text.

    Attributes:
        sample_rate: Of its sound, in Hz.
        voice: Who speaks, known from the first part on.
        model: The voice's model, known from the first part on.
    """

    sample_rate: int
    voice: str
    model: str

    def speak(self, text: str, seed: int) -> AsyncGenerator[Part, None]:
        """Say `text`; the captions count from its own beginning. Closing the generator ends the work.

        Raises:
            InputTooLongError: The speaker takes less text at once.
            TTSError: Anything else that goes wrong.
        """


def readable(text: str, *, normalize: bool) -> str:
    """`text` as it will be spoken: the whole of it is cleaned up before it is cut, or a cut could fall inside a table.

    Raises:
        InvalidInputError: Nothing in it can be said.
    """
    text = text.encode("utf-8", "ignore").decode("utf-8").strip()  # an argument that is not UTF-8 has surrogates, which cannot be sent
    if normalize:
        text = normalize_text(text)
    if not has_speech(text):
        raise InvalidInputError("There is nothing to say: the text holds no letter and no digit.")
    return text


def cut(text: str, limit: int) -> list[str]:
    """`text` in pieces of at most `limit` characters that end where a sentence does, at a paragraph's end where one is near.

    A piece without a letter or digit (a line of stars) is left out: there is nothing in it to be said.
    """
    return [piece for piece in split_text(text, SegmentLengths(target=limit, maximum=limit, first=limit)) if has_speech(piece)]


def sentences(pieces: Sequence[str]) -> list[str]:
    """The sentences of all pieces, one after another."""
    return [sentence for piece in pieces for sentence in split_text(piece, SegmentLengths(target=1, maximum=max(2, len(piece)), first=1))]


class Reading:
    """Pieces on their way from a speaker to whoever listens.

    Between two pieces there is the pause that is between two sentences; the next piece is spoken while the one before is heard. Piece n has
    the seed `seed` + n, so that the same text, voice and seed give the same sound again, and a text of one piece sounds as the speech
    endpoint says it.

    Args:
        pieces: From `cut`.
        speaker: Says them.
        seed: Of the first piece.
        pause_ms: Silence between two pieces, in milliseconds.
    """

    def __init__(self, pieces: Sequence[str], speaker: Speaker, seed: int, pause_ms: int) -> None:
        self._pieces = deque(pieces)
        self._speaker = speaker
        self._seed = seed
        self._pause_ms = pause_ms
        self._queue: asyncio.Queue[Part | Exception | None] = asyncio.Queue()
        self._room = asyncio.Event()
        self._given = 0  # samples put into the queue
        self._taken = 0  # samples taken from it
        self._groups = 0
        self._offset = 0.0  # seconds from the beginning to the present piece

    async def parts(self) -> AsyncGenerator[Part, None]:
        """The sound. Raises what went wrong in place of what is missing; closing the generator ends the work."""
        speaking = asyncio.create_task(self._speak_all())
        try:
            while (item := await self._queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                self._taken += item.samples.size
                self._room.set()
                yield item
        finally:
            speaking.cancel()
            await asyncio.wait({speaking})

    async def _speak_all(self) -> None:
        end: Exception | None = None
        try:
            while self._pieces:
                await self._wait_for_room()
                await self._speak_next(self._pieces.popleft())
        except Exception as error:
            end = error
        self._queue.put_nowait(end)

    async def _wait_for_room(self) -> None:
        while (self._given - self._taken) / self._speaker.sample_rate > _AHEAD_SECONDS:
            self._room.clear()
            await self._room.wait()

    async def _speak_next(self, piece: str) -> None:
        begun = False
        try:
            async with aclosing(self._speaker.speak(piece, self._seed)) as parts:
                async for part in parts:
                    if not begun:
                        begun = True
                        self._begin_piece()
                    self._give(part)
        except InputTooLongError:
            smaller = cut(piece, max(1, len(piece) // 2))
            if begun or len(smaller) < 2:
                raise
            self._pieces.extendleft(reversed(smaller))
        else:
            self._seed = (self._seed + 1) % _SEEDS

    def _begin_piece(self) -> None:
        if self._given:
            self._give(Part(np.zeros(self._speaker.sample_rate * self._pause_ms // 1000, np.float32)))
        self._offset = self._given / self._speaker.sample_rate

    def _give(self, part: Part) -> None:
        self._given += part.samples.size
        captions = [self._placed(caption, index) for index, caption in enumerate(part.captions, self._groups)]
        self._groups += len(captions)
        self._queue.put_nowait(Part(part.samples, tuple(captions)))

    def _placed(self, caption: Caption, segment: int) -> Caption:
        """A piece's caption as one of the whole."""
        return replace(caption, group=segment, start=caption.start + self._offset, end=caption.end + self._offset)


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
        write_output(output.captions, _rendered(captions, output))


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
    tag = SyntheticTag(speaker.model, speaker.voice) if settings.synthetic_mark and speaker.model else None
    if output.path is not None and (output.path.is_file() or not output.path.exists()):
        return await AudioFile.open(output.path, output.format, speaker.sample_rate, output.speed, tag)
    if output.path is not None:  # a named pipe, /dev/stdout
        target = Descriptor(os.open(output.path, os.O_WRONLY))
    elif output.descriptor is not None:
        target = Descriptor(output.descriptor)
    else:
        return await SoundStream.open(await open_player(), output.format, speaker.sample_rate, output.speed, None)
    return await SoundStream.open(target, output.format, speaker.sample_rate, output.speed, tag)


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
