"""What a turn has spoken, and how much of that was heard when its playback was interrupted: text and codec tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import regex

from audio_joiner import SegmentTimestamp
from captions import WordCaption
from speech_model import ContextPart
from text_splitter import Piece

WORD = regex.compile(r"\S*[\p{L}\p{N}]\S*")
"""A word as people count them, with its punctuation."""

_CHARACTERS_PER_SECOND = 15.0  # of speech, until a piece has been measured


@dataclass(frozen=True)
class SpokenPart:
    """A segment as the conversation keeps it, or the beginning of one.

    Attributes:
        part: Its whole text, and its codec tokens so far.
        start: Where its audio begins, in seconds of the turn's audio.
        end: Where the audio of its tokens ends.
        complete: Whether that is the whole segment.
    """

    part: ContextPart
    start: float
    end: float
    complete: bool

    def heard(self, seconds: float, pace: float) -> ContextPart | None:
        """Return what was heard of it at `seconds`, tokens and text; None if not even a word was.

        Args:
            seconds: Of the turn's audio.
            pace: Characters a second, for a segment that is not complete.
        """
        if self.complete and seconds >= self.end:
            return self.part
        seconds = min(seconds, self.end)
        part, text_end = self.part, _text_end(self.part.text, self.start, self.end, None if self.complete else pace)
        text = part.text[: _whole_words(part.text, _share(seconds, self.start, text_end))].rstrip()
        frames = int(len(part.codes) * _share(seconds, self.start, self.end))
        return ContextPart(text, part.speaker, part.codes[:frames]) if frames and text else None


@dataclass
class Spoken:
    """A piece of the text that is being spoken or was.

    Attributes:
        piece: The text, as the client wrote it.
        start: Where its audio begins, in seconds of the turn's audio.
        end: Where its audio ends, so far.
        complete: Whether all of it has been spoken.
        words: When each word is heard, if the voice knows that.
        parts: Its segments that have codec tokens.
    """

    piece: Piece
    start: float
    end: float
    complete: bool = False
    words: list[WordCaption] = field(default_factory=list)
    parts: list[SpokenPart] = field(default_factory=list)

    def note(
        self, finished: Sequence[SegmentTimestamp], unfinished: SegmentTimestamp | None, said: Mapping[int, ContextPart], speed: float
    ) -> None:
        """Note when it was spoken.

        Args:
            finished: Its segments that are complete, at normal speed.
            unfinished: The one of which only the beginning is there, if there is one.
            said: The segments that have codec tokens, by number.
            speed: Of the turn's audio.
        """
        times = [*finished, unfinished] if unfinished else finished
        if times:
            self.start, self.end = times[0].start / speed, times[-1].end / speed
        self.parts = [
            SpokenPart(said[each.segment], each.start / speed, each.end / speed, each is not unfinished)
            for each in times
            if each.segment in said
        ]

    def heard(self, seconds: float, pace: float) -> int:
        """Return how many characters of the piece were heard at `seconds`: whole words; arguments as for `SpokenPart.heard`."""
        text = self.piece.text
        if self.complete and seconds >= self.end:
            return len(text)
        if self.words:
            return max((word.end_char for word in self.words if word.end <= seconds), default=0)
        seconds = min(seconds, self.end)
        return _whole_words(text, _share(seconds, self.start, _text_end(text, self.start, self.end, None if self.complete else pace)))


class Playback:
    """The pieces that a turn has spoken, in order.

    Args:
        speed: Of the turn's audio.
    """

    def __init__(self, speed: float) -> None:
        self._speed = speed
        self._pieces: list[Spoken] = []

    def __len__(self) -> int:
        """Return how many pieces there are."""
        return len(self._pieces)

    def begin(self, piece: Piece, start: float) -> Spoken:
        """Add a piece whose audio begins at `start` seconds of the turn's audio."""
        self._pieces.append(Spoken(piece, start, start))
        return self._pieces[-1]

    def heard(self, seconds: float) -> int:
        """Return the offset in the turn's text after the last word that was heard, if so many seconds of the audio were played."""
        reached, pace = 0, self._pace()
        for spoken in self._pieces:
            if seconds > spoken.start and (count := spoken.heard(seconds, pace)):
                reached = spoken.piece.start + count
        return reached

    def parts(self, seconds: float = math.inf) -> list[ContextPart]:
        """Return the segments that were heard; the last one may be the beginning of one."""
        pace = self._pace()
        heard = (part.heard(seconds, pace) for spoken in self._pieces for part in spoken.parts)
        return [part for part in heard if part is not None]

    def _pace(self) -> float:
        """Return the characters a second of the complete pieces."""
        complete = [spoken for spoken in self._pieces if spoken.complete]
        seconds = sum(spoken.end - spoken.start for spoken in complete)
        return sum(len(spoken.piece.text) for spoken in complete) / seconds if seconds else _CHARACTERS_PER_SECOND * self._speed


def _text_end(text: str, start: float, end: float, pace: float | None) -> float:
    """Return where all of `text` is spoken: at `end`, or if only its beginning was, where it would be at this pace."""
    return end if pace is None else max(end, start + len(text) / pace)


def _share(seconds: float, start: float, end: float) -> float:
    """Return which share of the time from `start` to `end` has passed at `seconds`, from 0 to 1."""
    return min(1.0, max(0.0, seconds - start) / (end - start)) if end > start else 0.0


def _whole_words(text: str, share: float) -> int:
    """Return the offset after the words that end within `share` of the text."""
    return max((word.end() for word in WORD.finditer(text) if word.end() <= len(text) * share), default=0)
