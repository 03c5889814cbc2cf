"""Captions, the text of each segment or word with its time, as JSON, WebVTT and SRT."""

from __future__ import annotations

import uuid
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import SequenceMatcher
from itertools import accumulate

import regex

from audio_joiner import SegmentTimestamp
from text_markup import blanked
from text_verbalizer import SpokenText, unread

_KEPT_ANSWERS = 64
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+")
_COMPARED_WORDS = 200  # around a difference of two texts
_EDGES = "\"'“”‘’«»()[]{}<>.,;:!?…—–*_`#|~ \t\r\n"


@dataclass(frozen=True)
class Caption:
    """A segment's text, and its start and end in seconds from the start of the audio."""

    group: int
    text: str
    start: float
    end: float


def captions_of(segments: Sequence[str], timestamps: Sequence[SegmentTimestamp], speed: float) -> list[Caption]:
    """Return the captions of an utterance. `timestamps` are at normal speed; the captions are at `speed`."""
    return [
        Caption(
            timestamp.segment,
            " ".join(segments[timestamp.segment].split()),
            round(timestamp.start / speed, 3),
            round(timestamp.end / speed, 3),
        )
        for timestamp in timestamps
    ]


@dataclass(frozen=True)
class WordCaption:
    """A word of the caller's text, with its segment, its start and end in seconds, and its place in the text."""

    group: int
    text: str
    start: float
    end: float
    start_char: int
    end_char: int


class WordFinder:
    """Finds the words of an utterance in the text that the caller sent.

    Args:
        source: The caller's text.
        segments: The text that was spoken, without Markdown, as it was split.
        reading: Returns the words of a segment, by its index; None: they are those of the segments.
    """

    def __init__(self, source: str, segments: Sequence[str], reading: Callable[[int], SpokenText] | None = None) -> None:
        self._source = source
        readable = blanked(source)
        self._text = "".join(segments)
        self._starts = list(accumulate(map(len, segments), initial=0))
        self._reading = reading or (lambda index: unread(segments[index]))
        self._here = [match.span() for match in _WORD.finditer(self._text)]
        self._there = _places(self._text, self._here, readable)

    def words(self, timestamps: Sequence[SegmentTimestamp], speed: float, end: float | None = None) -> list[WordCaption]:
        """Return the words of some segments, in order.

        Args:
            timestamps: At normal speed.
            speed: The speed of the audio.
            end: The end of the speech in seconds, if these are the last words: the last one ends there.
        """
        words: list[WordCaption] = []
        for timestamp in timestamps:
            reading = self._reading(timestamp.segment)
            for word in timestamp.words:
                first, last = (self._starts[timestamp.segment] + place for place in reading.source_span(word.start_char, word.end_char))
                if (place := self._place(first, last)) is not None:
                    _add(words, WordCaption(timestamp.segment, "", word.start / speed, word.end / speed, *place))
        if words and end is not None:
            words[-1] = replace(words[-1], end=end)
        return [self._worded(word) for word in words]

    def located(self, words: Sequence[WordCaption]) -> list[WordCaption]:
        """Return words whose places are in the joined segments with their places in the caller's text."""
        located: list[WordCaption] = []
        for word in words:
            if (place := self._place(word.start_char, word.end_char)) is not None:
                _add(located, replace(word, start_char=place[0], end_char=place[1]))
        return [self._worded(word) for word in located]

    def _worded(self, word: WordCaption) -> WordCaption:
        return replace(word, text=self._source[word.start_char : word.end_char], start=round(word.start, 3), end=round(word.end, 3))

    def _place(self, first: int, last: int) -> tuple[int, int] | None:
        """Return where `text[first:last]` is in the caller's text; None if it is not."""
        while first < last and self._text[first] in _EDGES:
            first += 1
        while last > first and self._text[last - 1] in _EDGES:
            last -= 1
        if self._text == self._source:
            return (first, last) if first < last else None
        found = []
        for number in range(bisect_right(self._here, first, key=lambda span: span[1]), len(self._here)):
            here, there = self._here[number], self._there[number]
            if here[0] >= last:
                break
            if there is not None:
                found.append((here, there))
        if not found:
            return None
        (start, _), (_, end) = found[0][1], found[-1][1]
        before, after = self._text[first : found[0][0][0]], self._text[found[-1][0][1] : last]
        start -= len(before) if self._source[max(0, start - len(before)) : start] == before else 0
        end += len(after) if self._source[end : end + len(after)] == after else 0
        return start, end


def _add(words: list[WordCaption], word: WordCaption) -> None:
    """Append a word, or join it to the one before: "$5" is spoken as two words."""
    if words and word.start_char < words[-1].end_char:
        start, end = words[-1].start_char, max(words[-1].end_char, word.end_char)
        words[-1] = replace(words[-1], start_char=start, end_char=end, end=max(words[-1].end, word.end))
    else:
        words.append(word)


def _places(text: str, words: Sequence[tuple[int, int]], source: str) -> list[tuple[int, int] | None]:
    """Return where each of `words`, spans in `text`, is in `source`, which holds almost the same words in the same order."""
    spans = [match.span() for match in _WORD.finditer(source)]
    there = [source[start:end].casefold() for start, end in spans]
    here = [text[start:end].casefold() for start, end in words]
    places: list[tuple[int, int] | None] = [None] * len(here)
    a = b = 0
    while a < len(here) and b < len(there):
        if here[a] != there[b]:
            window = SequenceMatcher(None, here[a : a + _COMPARED_WORDS], there[b : b + _COMPARED_WORDS], autojunk=False)
            block = window.get_matching_blocks()[0]
            a, b = a + block.a, b + block.b
            if not block.size:
                continue
        places[a] = spans[b]
        a, b = a + 1, b + 1
    return places


def to_json(captions: Sequence[Caption | WordCaption], words: Sequence[WordCaption] | None = None) -> dict[str, list[dict[str, object]]]:
    """Return `{"captions": [{"group", "text", "start", "end"}]}`, with `words` too if there are any."""
    document = {"captions": [asdict(caption) for caption in captions]}
    return document if words is None else document | {"words": [asdict(word) for word in words]}


def to_webvtt(captions: Sequence[Caption | WordCaption]) -> str:
    """Return a WebVTT file (W3C WebVTT, section 4)."""
    cues = [f"{_clock(c.start, '.')} --> {_clock(c.end, '.')}\n{_escape(c.text)}\n" for c in captions]
    return "\n".join(["WEBVTT\n", *cues])


def to_srt(captions: Sequence[Caption | WordCaption]) -> str:
    """Return a SubRip file."""
    return "\n".join(f"{number}\n{_clock(c.start, ',')} --> {_clock(c.end, ',')}\n{c.text}\n" for number, c in enumerate(captions, 1))


@dataclass(frozen=True)
class AnswerCaptions:
    """The captions of an answer, and its words if they were requested (none if the voice does not know when they are heard)."""

    captions: list[Caption]
    words: list[WordCaption] | None = None

    @property
    def finest(self) -> Sequence[Caption | WordCaption]:
        """The words if there are any, else the segments."""
        return self.words or self.captions


class CaptionStore:
    """Keeps the captions of the last 64 answers, in memory only, because they contain the spoken text."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, AnswerCaptions] = OrderedDict()

    def keep(self, key: str, captions: AnswerCaptions) -> None:
        """Keep the captions of an answer under a `new_key()`."""
        self._answers[key] = captions
        while len(self._answers) > _KEPT_ANSWERS:
            self._answers.popitem(last=False)

    def get(self, key: str) -> AnswerCaptions | None:
        """Return the captions under `key`; None if there are none, or newer answers have replaced them."""
        return self._answers.get(key)


def new_key() -> str:
    """Return an unguessable id for an answer's captions."""
    return uuid.uuid4().hex


def _clock(seconds: float, separator: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{separator}{rest % 1000:03d}"


def _escape(text: str) -> str:
    """Escape what WebVTT reads as markup (& and <) or as the end of the text (-->)."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
