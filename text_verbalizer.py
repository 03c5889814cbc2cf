"""Turn written forms (numbers, dates, money, symbols, abbreviations) into the words that a person would read out.

`verbalize` is the only way in, so that another grammar or language can take the place of this one. English is read by three readers, one
after another: our own rules (text_english), NeMo's grammars (kitten-text-processing) for single words that the rules leave, and last the
names of single digits and symbols.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import overload

import regex
from anyascii import anyascii

import text_english
import text_english_words
from pronunciations import Pronounce

# Text without any of these is spoken as it is written. Measured: 10 µs a sentence.
_WRITTEN = regex.compile(
    r"[\p{N}\p{S}#%&*@\\/§¶_]|\p{Lu}\p{Lu}|\.\p{L}|['’]re\b"
    rf"|[.-](?<=\b(?:{text_english.ABBREVIATED})[.-])"
    r"|\b(?:Mr|Mrs|Ms|Dr|aka|btw|vs|tv)\b|\b[IVX]\b|[[\p{L}]--[\p{Latin}\p{Common}]]",
    flags=regex.V1,
)
_FOREIGN_WORD = regex.compile(
    r"(?![μΩπ]\p{Latin}{0,2}\b)[[\p{L}\p{M}]--[\p{Latin}\p{Common}\p{Inherited}]][\p{L}\p{M}'’-]*+", flags=regex.V1
)
_FOREIGN_LETTER = regex.compile(r"[[\p{L}]--[\p{Latin}\p{Common}\p{Inherited}]]", flags=regex.V1)
_LETTER = regex.compile(r"\p{L}")
# Letters of Greek that stand for themselves in English text ("the α particle") are read by name.
_GREEK_NAMES = dict(zip("αβγδεζηθικλμνξοπρστυφχψω", text_english_words.GREEK_LETTERS, strict=True))
_TOKEN = re.compile(r"\S+")
_UNREAD = regex.compile(r"[\p{N}\p{Sm}\p{Sc}#%&@§]")
_EDGES = "\"'“”‘’()[]{}.,;:!?…-–—*"
# The grammar takes 5 to 100 ms a word and its time grows faster than the word, so a call gives it this many words of this length.
_LONGEST_TOKEN = 24
_MOST_TOKENS = 12
_CACHED = 4096
# How many characters more than itself a character has when it is read out. "1234" has 4 characters and its words 40, a year's fewer.
_DIGIT_CHARACTERS = 5
_LETTER_CHARACTERS = 4  # "W" is "double u"
_SIGN = regex.compile(r"[\p{N}\p{S}#%&@*\\/§¶_]")
_SIGN_CHARACTERS = {sign: len(words) for sign, words in text_english.signs().items()}
_SPELLED = re.compile(r"(?<![A-Za-z])(?![AI](?![A-Za-z]))(?:[A-Z]|[B-DF-HJ-NP-TV-XZ]{2,}|[A-Z]{13,})(?![A-Za-z])")
_IDEOGRAPH = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]")
_IDEOGRAPH_CHARACTERS = 3

_CHARACTER_SECONDS = 0.063

LANGUAGES = ("en",)


@dataclass(frozen=True)
class Piece:
    """Some words and the part of the written text they stand for.

    Attributes:
        spoken: What is said; may be empty.
        start: Offset of the first character in the written text.
        end: Offset after the last character.
    """

    spoken: str
    start: int
    end: int


@dataclass(frozen=True)
class SpokenText:
    """A text as it is said, with the way back to the written one.

    Attributes:
        pieces: In order and without gaps: together they cover the written text. A piece that was not changed has the written text itself.
    """

    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        """The words to speak."""
        return "".join(piece.spoken for piece in self.pieces)

    def source_span(self, start: int, end: int) -> tuple[int, int]:
        """Return the part of the written text that `text[start:end]` stands for: exact in unchanged pieces, else the whole written form."""
        starts = list(accumulate((len(piece.spoken) for piece in self.pieces), initial=0))
        return self._source(starts, start, first=True), self._source(starts, max(start, end - 1), first=False)

    def _source(self, starts: Sequence[int], offset: int, *, first: bool) -> int:
        index = min(bisect_right(starts, offset), len(self.pieces)) - 1
        piece = self.pieces[index]
        if len(piece.spoken) == piece.end - piece.start:
            return min(piece.end, piece.start + offset - starts[index] + (0 if first else 1))
        return piece.start if first else piece.end


def verbalize(text: str, language: str = "en", pronounce: Pronounce | None = None) -> SpokenText:
    """Return `text` as a person would read it out, with the written span of each piece.

    Sentence ends, punctuation and plain words stay. Deterministic; may be called from any thread. Texts in other languages than `LANGUAGES`
    come back as they are. Meant for a sentence or a few: the time is linear in the text, below 1 ms for a sentence of
    numbers and dates, and 5 to 100 ms more for each word that only the grammar can read (at most 12; the rest is read sign by sign).

    Args:
        text: As it is written.
        language: Of the voice.
        pronounce: The owner's pronunciations, which come before all rules; for all languages.
    """
    owned = [Piece(spoken, start, end) for start, end, spoken in pronounce(text)] if pronounce else []
    if language not in LANGUAGES or not _is_written(text):
        return SpokenText(tuple(_pieces(text, owned) if owned else [Piece(text, 0, len(text))]))
    return SpokenText(tuple(_pieces(text, _readings(text, owned))))


def unread(text: str) -> SpokenText:
    """Return a text that is spoken as it is written."""
    return SpokenText((Piece(text, 0, len(text)),))


def _is_written(text: str) -> bool:
    return _WRITTEN.search(text) is not None


class SpokenSegments(Sequence[str]):
    """The spoken words of a text's segments, read one segment ahead of the voice.

    A segment is read when it is asked for, unless that was done already in the background while the one before it was spoken.

    Args:
        segments: The written segments.
        language: See `verbalize`; None leaves them as they are.
        pronounce: See `verbalize`.
    """

    def __init__(self, segments: Sequence[str], language: str | None, pronounce: Pronounce | None = None) -> None:
        self._segments = segments
        self._language = language
        self._pronounce = pronounce
        self._ahead: dict[int, Future[SpokenText]] = {}
        self._places = range(len(segments))  # of its segments; fewer in a part

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> SpokenSegments: ...
    def __getitem__(self, index: int | slice) -> str | SpokenSegments:
        """Return the words of a segment; a part of the segments is read when it is asked for them, too."""
        if isinstance(index, slice):
            part = copy(self)
            part._places = self._places[index]
            return part
        place = self._places[index]
        text = self.reading(place).text
        if self._needs_reading(place + 1):
            self._ahead[place + 1] = _reader().submit(self._read, place + 1)
        return text

    def reading(self, index: int) -> SpokenText:
        """Return the words of segment `index` of the whole text, with the way back to the written ones."""
        if index in self._ahead:
            return self._ahead[index].result()
        return self._read(index)

    def _read(self, index: int) -> SpokenText:
        text = self._segments[index]
        if self._language is None:
            return unread(text)
        return verbalize(text, self._language, self._pronounce)

    def _needs_reading(self, index: int) -> bool:
        return (
            self._language in LANGUAGES and index < len(self._segments) and index not in self._ahead and _is_written(self._segments[index])
        )


@lru_cache(maxsize=1)
def _reader() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "verbalizer")


def warm_up() -> None:
    """Load the grammar in the background (0.15 s), so that no text waits for it."""
    _reader().submit(verbalize, "a1b2c3")


def spoken_length(text: str, pronounce: Pronounce | None = None) -> int:
    """Return about how many characters `text` has once it is read out, without reading it."""
    owned = sum(len(spoken) - (end - start) for start, end, spoken in pronounce(text)) if pronounce else 0
    signs = sum(_SIGN_CHARACTERS.get(sign, _DIGIT_CHARACTERS) for sign in _SIGN.findall(text))
    return len(text.strip()) + signs + _LETTER_CHARACTERS * sum(map(len, _SPELLED.findall(text))) + owned


def expected_seconds(text: str) -> float:
    """Return about how long it takes to say `text` at a speed of 1, without reading it."""
    return _CHARACTER_SECONDS * (spoken_length(text) + _IDEOGRAPH_CHARACTERS * len(_IDEOGRAPH.findall(text)))


def foreign_words(text: str) -> int:
    """Return how many words are in a script other than Latin."""
    return 0 if text.isascii() else sum(1 for _ in _FOREIGN_WORD.finditer(text))


def mostly_foreign(text: str) -> bool:
    """Return whether more than a third of the letters are in scripts other than Latin: too many to transliterate."""
    if text.isascii():
        return False
    return 3 * sum(1 for _ in _FOREIGN_LETTER.finditer(text)) > sum(1 for _ in _LETTER.finditer(text))


# --- Readings ---


class _Readings:
    """The written forms that have been read, by their start; a form is never read twice."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.pieces: list[Piece] = []
        self._taken = bytearray(len(text))

    def free(self, start: int, end: int) -> bool:
        return not any(self._taken[start:end])

    def add(self, start: int, end: int, spoken: str) -> None:
        self.pieces.append(Piece(spoken, start, end))
        self._taken[start:end] = b"\x01" * (end - start)

    def apply(self, rules: text_english.Rules) -> None:
        for pattern, reader in text_english.compiled(rules):
            for match in pattern.finditer(self.text):
                start, end = match.span()
                if end > start and self.free(start, end) and (spoken := reader(match)) is not None:
                    self.add(start, end, spoken)


def _readings(text: str, owned: Sequence[Piece]) -> list[Piece]:
    readings = _Readings(text)
    for piece in owned:
        readings.add(piece.start, piece.end, piece.spoken)
    if not text.isascii():
        for match in _FOREIGN_WORD.finditer(text):
            if not readings.free(*match.span()):
                continue
            readings.add(match.start(), match.end(), _transliterated(match[0]))
    readings.apply(text_english.RULES)
    _apply_grammar(readings)
    readings.apply(text_english.LAST_RULES)
    return sorted(readings.pieces, key=lambda piece: piece.start)


def _transliterated(word: str) -> str:
    if word.lower() in _GREEK_NAMES:
        return _GREEK_NAMES[word.lower()]
    return anyascii(word).strip() or word


def _apply_grammar(readings: _Readings) -> None:
    left = _MOST_TOKENS
    for match in _TOKEN.finditer(readings.text):
        if not left:
            return
        token = match[0]
        if not _UNREAD.search(token) or not readings.free(*match.span()):
            continue
        core = token.strip(_EDGES)
        start = match.start() + token.index(core)
        if 1 < len(core) <= _LONGEST_TOKEN and _UNREAD.search(core):
            left -= 1
            if (spoken := _by_grammar(core)) is not None:
                readings.add(start, start + len(core), spoken)


@lru_cache(maxsize=_CACHED)
def _by_grammar(token: str) -> str | None:
    """Return what NeMo's grammars make of a single word; None if a digit or symbol is left."""
    spoken = _grammar()(token)
    return None if _UNREAD.search(spoken) else spoken


@lru_cache(maxsize=1)
def _grammar() -> Callable[[str], str]:
    from kitten_text_processing import Normalizer

    normalize: Callable[[str], str] = Normalizer(lang="en").normalize
    return normalize


def _pieces(text: str, readings: Sequence[Piece]) -> list[Piece]:
    """Return `readings` and the text between them, with spaces where words would touch."""
    pieces: list[Piece] = []
    position = 0
    last = ""
    for reading in readings:
        if reading.start > position:
            pieces.append(Piece(text[position : reading.start], position, reading.start))
            last = text[reading.start - 1]
        after = text[reading.end : reading.end + 1]
        spoken = f" {reading.spoken}" if last.isalnum() and (reading.spoken or after)[:1].isalnum() else reading.spoken
        if spoken[-1:].isalnum() and after.isalnum():
            spoken += " "
        pieces.append(Piece(spoken, reading.start, reading.end))
        position, last = reading.end, spoken[-1:] or last
    if position < len(text):
        pieces.append(Piece(text[position:], position, len(text)))
    return pieces
