"""Speak a text of any length: split it into pieces, generate them one after another, send the audio and captions to the output.

Or speak single words, to find those that a voice says wrong.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import regex
from anyio import to_thread

from audio_formats import AudioFormat, Samples, SyntheticTag
from captions import Caption, WordCaption, WordFinder, to_json, to_srt, to_webvtt
from config import Settings
from errors import InputTooLongError, InvalidInputError
from files import write_output
from pronunciations import Pronunciations
from say_output import AudioFile, AudioStream, Descriptor, Loudspeaker, ProgressBar, Sink
from speech_model import SegmentLengths
from text_markup import blanked, passages, prepare, stretch, with_voices, without_marks
from text_normalizer import has_speech, normalize_text
from text_splitter import split_text
from transcription import HeardWord, Recognizer, compare

# With this much audio generated but not yet played, the next piece waits: it leaves the model to other clients and bounds the memory.
_AHEAD_SECONDS = 60.0
_BLOCK_SECONDS = 0.5  # of audio written at once: small enough for a smooth progress bar and a quick reaction to signals
_SEEDS = 2**32

# A recogniser hears a word in a sentence far better than alone (docs/LOG.md).
_SENTENCE = "The word is {}."
_BEFORE = regex.compile(r"(?i)^\W*the word is\W*")


@dataclass(frozen=True)
class Part:
    """Some of the audio.

    Attributes:
        samples: float32, shape (n,).
        captions: Of the segments that ended, in seconds from the start of the piece (from a speaker) or of the text.
        words: Their words, with their places in the piece or in all pieces; none unless the speaker was asked for them, or if the voice does
            not know them.
    """

    samples: Samples
    captions: tuple[Caption, ...] = ()
    words: tuple[WordCaption, ...] = ()


class Speaker(Protocol):
    """Speaks one piece of text at a time.

    Attributes:
        sample_rate: Of its audio, in Hz.
        voice: The voice that speaks, known from the first part on.
        model: The voice's model, known from the first part on.
    """

    sample_rate: int
    voice: str
    model: str

    def speak(self, text: str, seed: int) -> AsyncGenerator[Part, None]:
        """Speak `text`. Closing the generator stops the work.

        Raises:
            InputTooLongError: `text` is longer than the speaker accepts.
            TTSError: Any other failure.
        """


@dataclass(frozen=True)
class Output:
    """Where the audio goes.

    Attributes:
        path: A file; None for a descriptor or the loudspeaker.
        descriptor: An open file descriptor; None for a file or the loudspeaker.
        format: Of the audio; raw samples for the loudspeaker.
        speed: From 0.25 to 4.0.
        captions: A file for the captions, if they are wanted.
        words: The text as it was given, if the captions are to have its words; else None.
    """

    path: Path | None
    descriptor: int | None
    format: AudioFormat
    speed: float = 1.0
    captions: Path | None = None
    words: str | None = None

    @property
    def streamed(self) -> bool:
        """Whether the audio is consumed while it is generated."""
        return self.path is None


def clean_text(text: str, *, normalize: bool, speed: float = 1.0) -> str:
    """Return `text` as it will be spoken. Normalize the whole text before it is split, or a split could fall inside a table.

    Args:
        text: As it was given.
        normalize: Remove Markdown, links and emoji.
        speed: At which the audio is written or played in the end: the text's pauses are made longer by it.

    Raises:
        InvalidInputError: It contains no letter and no digit, or a pause that is too long.
    """
    text = text.encode("utf-8", "ignore").decode("utf-8").strip()  # an argument that is not UTF-8 holds surrogates, which cannot be sent
    text = prepare(text, normalize_text if normalize else str)
    if not has_speech(without_marks(text)):
        raise InvalidInputError("There is nothing to say: the text has no letter and no digit.")
    return stretch(text, speed)


def split_pieces(text: str, limit: int) -> list[str]:
    """Split `text` into pieces of at most `limit` characters, at the ends of sentences and preferably of paragraphs.

    Pieces without a letter or digit (a line of stars) are dropped: they cannot be spoken. A piece begins with the voice tag of the one before.
    """
    pieces = split_text(text, SegmentLengths(target=limit, maximum=limit, first=limit))
    return [piece for piece in with_voices(pieces) if has_speech(without_marks(piece))]


def sentences(pieces: Sequence[str]) -> list[str]:
    """Return the sentences of all pieces in order."""
    whole = [SegmentLengths(target=1, maximum=max(2, len(piece)), first=1) for piece in pieces]
    return [
        sentence
        for piece, lengths in zip(pieces, whole, strict=True)
        for part in passages(piece)
        for sentence in split_text(part.text, lengths)
    ]


async def speak_pieces(
    pieces: Sequence[str], speaker: Speaker, output: Output, settings: Settings, seed: int | None, bar: ProgressBar
) -> float:
    """Speak `pieces` (from `split_pieces`) into `output` and return the length of the audio in seconds. After a failure no file is left.

    Raises:
        TTSError: The speaker or the encoder failed.
        OutputError: The file cannot be written, or the loudspeaker failed.
        BrokenPipeError: The reader of a descriptor closed it.
    """
    reading = Reading(pieces, speaker, secrets.randbits(32) if seed is None else seed, settings.pause_ms)
    captions: list[Caption] = []
    words: list[WordCaption] = []
    seconds = 0.0
    async with aclosing(reading.parts()) as parts, aclosing(_LazySink(lambda: _open(output, speaker, settings))) as sink:
        async for part in parts:
            words += part.words
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
        found = None if output.words is None else WordFinder(output.words, reading.spoken).located(words)
        write_output(output.captions, _rendered(captions, found, output.captions.suffix.lower(), output.speed))
    return seconds / output.speed


class Reading:
    """Generates pieces in order while the audio before them is consumed.

    Pieces are separated by the same pause as sentences. Piece n has the seed `seed` + n: the same text, voice and seed give the same
    audio, and a text of one piece sounds the same as from the speech endpoint.

    Args:
        pieces: From `split_pieces`.
        speaker: Speaks them.
        seed: Of the first piece.
        pause_ms: Silence between two pieces, in milliseconds.

    Attributes:
        spoken: The pieces so far, without pauses and voice tags; `words` have their places in them, joined.
    """

    def __init__(self, pieces: Sequence[str], speaker: Speaker, seed: int, pause_ms: int) -> None:
        self.spoken: list[str] = []
        self._pieces = deque(pieces)
        self._speaker = speaker
        self._seed = seed
        self._pause_ms = pause_ms
        self._queue: asyncio.Queue[Part | Exception | None] = asyncio.Queue()
        self._room = asyncio.Event()
        self._queued = 0  # samples put into the queue
        self._taken = 0  # samples taken from the queue
        self._segments = 0
        self._offset = 0.0  # seconds from the start of the audio to the current piece
        self._start_char = 0  # of the current piece in all pieces

    async def parts(self) -> AsyncGenerator[Part, None]:
        """Yield the audio. A failure is raised after the audio before it; closing the generator stops the work."""
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
        while (self._queued - self._taken) / self._speaker.sample_rate > _AHEAD_SECONDS:
            self._room.clear()
            await self._room.wait()

    async def _speak_next(self, piece: str) -> None:
        started = False
        try:
            async with aclosing(self._speaker.speak(piece, self._seed)) as parts:
                async for part in parts:
                    if not started:
                        started = True
                        self._start_piece(piece)
                    self._put(part)
        except InputTooLongError:
            smaller = split_pieces(piece, max(1, len(piece) // 2))
            if started or len(smaller) < 2:
                raise
            self._pieces.extendleft(reversed(smaller))
        else:
            self._seed = (self._seed + 1) % _SEEDS

    def _start_piece(self, piece: str) -> None:
        self._start_char = sum(map(len, self.spoken))
        self.spoken.append(blanked(piece))
        if self._queued:
            self._put(Part(np.zeros(self._speaker.sample_rate * self._pause_ms // 1000, np.float32)))
        self._offset = self._queued / self._speaker.sample_rate

    def _put(self, part: Part) -> None:
        self._queued += part.samples.size
        groups = {caption.group: group for group, caption in enumerate(part.captions, self._segments)}
        self._segments += len(groups)
        captions = tuple(
            replace(caption, group=groups[caption.group], start=caption.start + self._offset, end=caption.end + self._offset)
            for caption in part.captions
        )
        words = tuple(self._shifted(word, groups[word.group]) for word in part.words)
        self._queue.put_nowait(Part(part.samples, captions, words))

    def _shifted(self, word: WordCaption, group: int) -> WordCaption:
        """Return a piece's word as a word of the whole text."""
        start_char, end_char = word.start_char + self._start_char, word.end_char + self._start_char
        return WordCaption(group, word.text, word.start + self._offset, word.end + self._offset, start_char, end_char)


class _LazySink:
    """Opens a sink with the first audio: only then is the voice known, and a text that cannot be spoken creates no file."""

    def __init__(self, opening: Callable[[], Awaitable[Sink]]) -> None:
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


async def _open(output: Output, speaker: Speaker, settings: Settings) -> Sink:
    tag = SyntheticTag(speaker.model, speaker.voice) if settings.synthetic_mark and speaker.model else None
    if output.path is not None and (output.path.is_file() or not output.path.exists()):
        return await AudioFile.open(output.path, output.format, speaker.sample_rate, output.speed, tag)
    if output.path is not None:  # a named pipe, /dev/stdout
        # In a thread, because it waits until the pipe has a reader.
        descriptor = await to_thread.run_sync(os.open, output.path, os.O_WRONLY, abandon_on_cancel=True)
        target: Descriptor | Loudspeaker = Descriptor(descriptor)
    else:
        target = Loudspeaker() if output.descriptor is None else Descriptor(output.descriptor)
    return await AudioStream.open(target, output.format, speaker.sample_rate, output.speed, tag)


def _blocks(samples: Samples, sample_rate: int) -> list[Samples]:
    size = int(sample_rate * _BLOCK_SECONDS)
    return [samples[start : start + size] for start in range(0, samples.size, size)]


def _rendered(captions: Sequence[Caption], words: Sequence[WordCaption] | None, ending: str, speed: float) -> str:
    """Return the captions in the format of the file's ending, with times at the given speed; a cue for each word if there are any."""
    scaled = [replace(c, start=round(c.start / speed, 3), end=round(c.end / speed, 3)) for c in captions]
    heard = [replace(word, start=round(word.start / speed, 3), end=round(word.end / speed, 3)) for word in words or ()]
    if ending == ".vtt":
        return to_webvtt(heard or scaled)
    if ending == ".srt":
        return to_srt(heard or scaled)
    return json.dumps(to_json(scaled, None if words is None else heard), ensure_ascii=False, indent=2) + "\n"


# --- Single words ---


@dataclass(frozen=True)
class CheckedWord:
    """A word or phrase, and what the recogniser heard in its place.

    Attributes:
        word: As it was given.
        heard: What was heard.
        right: Whether that is the word, or its respelling.
    """

    word: str
    heard: str
    right: bool


def words_of(text: str) -> list[str]:
    """Return the words and phrases of a file, one a line, each once."""
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


async def check_words(
    words: Sequence[str], speaker: Speaker, recognizer: Recognizer, known: Pronunciations, seed: int
) -> AsyncIterator[CheckedWord]:
    """Speak each word and yield what is heard.

    Raises:
        TTSError: The speaker failed.
    """
    for word in words:
        async with aclosing(speaker.speak(_SENTENCE.format(word), seed)) as parts:
            samples = np.concatenate([np.zeros(0, np.float32), *[part.samples async for part in parts]])
        heard = await to_thread.run_sync(recognizer.transcribe, samples)
        expected = {word, known.said(word)}
        right = any(compare(_SENTENCE.format(each), [HeardWord(heard)]).word_error_rate == 0 for each in expected)
        yield CheckedWord(word, _BEFORE.sub("", heard).strip(" ."), right)
