"""A text of any length read aloud: cut into pieces that a speaker takes, spoken one after another, given out as one sound."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from captions import Caption
from errors import InputTooLongError, InvalidInputError
from speech_model import Grouping, Samples
from text_normalizer import has_speech, speakable
from text_splitter import split_text

# While so many seconds wait to be played, no further piece is asked for: others may want the model, and a book must not fill the memory.
_AHEAD_SECONDS = 60.0
_SEEDS = 2**32


@dataclass(frozen=True)
class Part:
    """Some of the sound.

    Attributes:
        samples: float32, shape (n,).
        captions: Of the sentence groups that have come to their end, in seconds from the beginning of the whole.
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
        text = speakable(text)
    if not has_speech(text):
        raise InvalidInputError("There is nothing to say: the text holds no letter and no digit.")
    return text


def cut(text: str, limit: int) -> list[str]:
    """`text` in pieces of at most `limit` characters that end where a sentence does, at a paragraph's end where one is near.

    A piece without a letter or digit (a line of stars) is left out: there is nothing in it to be said.
    """
    return [piece for piece in split_text(text, Grouping(target=limit, maximum=limit, first=limit)) if has_speech(piece)]


def sentences(pieces: Sequence[str]) -> list[str]:
    """The sentences of all pieces, one after another."""
    return [sentence for piece in pieces for sentence in split_text(piece, Grouping(target=1, maximum=max(2, len(piece)), first=1))]


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

    def _placed(self, caption: Caption, group: int) -> Caption:
        """A piece's caption as one of the whole."""
        return replace(caption, group=group, start=caption.start + self._offset, end=caption.end + self._offset)
