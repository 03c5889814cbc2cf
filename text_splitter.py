"""Cut a text at the ends of sentences: all of it into segments that a model can speak well, or, while it is still being written, piece by piece."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, takewhile

import regex
import sentencex

from speech_model import SegmentLengths

# A single line break before a list marker ends the line. Other single line breaks are only wrapping.
_LIST_MARKER = re.compile(r"(?:[-*+•‣◦▪●–—]|[(\[]?(?:[0-9]{1,3}|[A-Za-z])[.)\]])[ \t]")
_LINE_BREAK = re.compile("\r\n|[\n\r\x0b\x0c\x85\u2028\u2029]")
_WHITESPACE = re.compile(r"\s+")

# Text that sentencex must not look into. Each match is replaced by as many letters, so that offsets stay the same.
_OPAQUE = regex.compile(
    r"\b[A-Za-z][A-Za-z0-9+.-]{0,15}+://[^\s<>\"“”]*[^\s<>\"“”.,;:!?…)\]'’]"  # a URL without the punctuation of its sentence
    r"|\bwww\.[^\s<>\"“”]*[^\s<>\"“”.,;:!?…)\]'’]"
    r"|(?<!\S)\.(?=\w)"  # .NET, .5
    # Abbreviations that sentencex 1.0.32 takes for the end of a sentence (each one tried before a number and before a word).
    r"|\b(?i:approx|est|max|tel|incl|excl|resp|govt|vol|ch|eq|avg|ed|eds|min|ca|temp|tbsp|tsp)\.(?=\s+[\p{N}\p{Ll}])"
)
_WINDOW = 4096  # characters per call: longer paragraphs are rare, and 16384 closing quotes in one call take half a second
_CLOSERS = re.compile(r"""["'”’»›)\]}」』】》〉）］]*""")
_CJK_CLOSERS = frozenset("”’」』】》〉）］")
# Sentence ends that need no space after them: every Sentence_Terminal character beyond ASCII (。！？ । ؟ ۔ ։ ። ။ and so on).
_WIDE_END = regex.compile(r"[[\p{Sentence_Terminal}｡]--[\x00-\x7F‼⁇⁈⁉]]+", flags=regex.V1)
# Sentence ends that sentencex misses: inside brackets, and the Greek question mark.
_BRACKETED_END = regex.compile(r"(?:[!?…]|\p{Ll}\p{Ll}\.)[)\]]+[\"'”’]*\s+(?=[\p{Lu}\p{Lt}\p{Lo}\p{N}(\[\"“‘«])")
_GREEK_QUESTION = regex.compile(r"(?<=\p{Greek});\s+(?=\p{Greek})")
# "1." and "A." belong to the sentence that follows.
_ENUMERATOR = re.compile(r"\s*[(\[]?(?:[0-9]{1,3}|[A-Za-z])[.)]\s*")

# Where a sentence that is too long may be cut, best first. The lookbehinds keep the search linear in a run of the same character.
_INNER_SENTENCE = regex.compile(r"(?<![.!?…])[.!?…]++[\"'”’»)\]]*+\s++(?=[^\p{Ll}\s])")
_CLAUSE = regex.compile(
    r"(?<![,;:،؛、，；：፣፤፥၊·])[,;:،؛、，；：፣፤፥၊·]++[\"'”’»)\]」』]*+\s++|(?<![、，；：])[、，；：]++[」』”’）]*+|[—―…]++\s*+|\s[–-]\s++|[)\]]\s++"
)
_WORD_REACH = 60  # characters on either side of the middle in which to look for a word boundary
_WORD_EDGE = regex.compile(r"(?w)\b")
# In a run of flags, \X counts those before each one: quadratic.
_CLUSTER = regex.compile(r"\p{RI}{2}[\p{GCB=Extend}\p{GCB=SpacingMark}\p{GCB=ZWJ}]*+|\X")

# What may still be open at the end of a text that is being written. Markup that is not closed within this length, in characters, is none.
_LONGEST_OPEN = 1000

_NEXT_WORD = re.compile(r"\s*\S+\s")
# What may still change at the end of the text, if the writer has only paused: a word without a space after it, and numbers.
_UNFINISHED = regex.compile(r"(?:(?<!\S)(?=\S*[\p{N}\p{Sc}])\S++\s*+)*(?:(?<!\S)\S++)?\Z")
_FINISHED_WORD = regex.compile(r"\p{L}[.!?…。！？]+[\"'”’»)\]]*\Z")

_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_OPEN_TAG = re.compile(r"</?[A-Za-z!][^<>]*\Z")
_OPEN_BRACKET = re.compile(r"\[[^\[\]]*\Z|\]\([^()\s]*\Z")
_TABLE = re.compile(r"^[ \t]*\|", re.MULTILINE)
_OPENING = regex.compile(r"(?<![\w*~])(?:\*{1,3}|~~)(?=[^\s*~])|(?<![\w_])_{1,3}(?=[^\s_])")
_CLOSING = regex.compile(r"(?<=[^\s*~])(?:\*{1,3}|~~)(?![\w*~])|(?<=[^\s_])_{1,3}(?![\w_])")
_STARRED_ITEM = re.compile(r"^[ \t]*[*_]+[ \t]", re.MULTILINE)


def always(_segment: str) -> bool:
    """Return True: the `fits` of a model without a limit of its own."""
    return True


def split_text(text: str, segment_lengths: SegmentLengths, fits: Callable[[str], bool] = always) -> list[str]:
    """Return `text` as segments to be spoken one after another; joined, they are exactly `text`.

    Sentences are found by sentencex (its English rules) and by the sentence terminators of other scripts. They are packed into segments of up
    to `segment_lengths.target` characters, the first segment up to `segment_lengths.first`. The end of a paragraph closes a segment that is
    at least half full. A sentence longer than `segment_lengths.maximum` is halved at a clause's punctuation, else between two words. Text
    without spaces (Chinese, Thai, one endless word) is cut at Unicode word boundaries, else between grapheme clusters, so that accents and
    emoji stay whole; only a single cluster that is itself too long is cut inside. Lengths do not count the whitespace around a segment,
    which belongs to the segment before it. Only a blank text gives a blank segment, and an empty text gives none.

    Args:
        text: Any string.
        segment_lengths: The lengths in characters. With a target of 1 each sentence is a segment of its own.
        fits: Whether the model accepts a segment. One that does not fit is halved until it does or is a single character.
    """
    if not text.strip():
        return [text] if text else []
    pieces: list[str] = []
    closing: list[bool] = []  # whether a paragraph ends after the piece
    for sentence, ends_paragraph in sentences(text):
        parts = list(_parts(sentence, lambda part: _size(part) <= segment_lengths.maximum))
        pieces += parts
        closing += [False] * (len(parts) - 1) + [ends_paragraph]
    return _pack(pieces, closing, segment_lengths, fits)


def _size(part: str) -> int:
    return len(part.strip())


# --- Sentences ---


def sentences(text: str) -> Iterator[tuple[str, bool]]:
    """Yield each sentence with the whitespace after it, and whether a paragraph or list item ends with it."""
    for block in _blocks(text):
        start = 0
        for end in _sentence_ends(block):
            yield block[start:end], False
            start = end
        yield block[start:], True


def _blocks(text: str) -> Iterator[str]:
    """Yield paragraphs and list items, each with the whitespace after it; none is blank."""
    start = 0
    last = len(text.rstrip())
    for space in _WHITESPACE.finditer(text, len(text) - len(text.lstrip())):
        end = space.end()
        if end >= last:
            break
        breaks = len(_LINE_BREAK.findall(space.group()))
        if breaks > 1 or "\u2029" in space.group() or (breaks and _LIST_MARKER.match(text, end)):
            yield text[start:end]
            start = end
    yield text[start:]


def _sentence_ends(block: str) -> list[int]:
    """Return the offsets inside `block`, in order, at which a new sentence begins; no sentence is blank."""
    masked = _OPAQUE.sub(lambda match: "x" * len(match.group()), block)
    # sentencex gets one kind of space and of full stop, and no surrogates, which it cannot encode.
    masked = re.sub(r"[\s\ud800-\udfff…]", _plain, masked)
    found = set(_sentencex_ends(masked))
    for pattern in (_BRACKETED_END, _GREEK_QUESTION, _WIDE_END):
        found.update(match.end() for match in pattern.finditer(masked))
    ends: list[int] = []
    previous = 0
    last = len(block.rstrip())
    for offset in sorted(found):
        end = _settled(block, offset)
        if end is not None and previous < end < last and block[previous:end].strip() and not _ENUMERATOR.fullmatch(block, previous, end):
            ends.append(end)
            previous = end
    return ends


def _plain(character: re.Match[str]) -> str:
    if character.group() == "…":
        return "."
    return " " if character.group().isspace() else "x"


def _sentencex_ends(masked: str) -> Iterator[int]:
    """Yield the ends that sentencex finds. It is called window by window: its time grows with the square of the closing quotes in one call."""
    start = 0
    while start < len(masked):
        window = masked[start : start + _WINDOW]
        sentences = sentencex.segment("en", window)
        if start + len(window) < len(masked) and len(sentences) > 1:
            sentences.pop()  # it may go on after the window
        for sentence in sentences:
            start += len(sentence)
            yield start


def _settled(block: str, offset: int) -> int | None:
    """Return `offset` moved after closing quotes, brackets and whitespace; None if no sentence can end there."""
    before = block[offset - 1]
    spaced = before.isspace()
    closing = None if spaced else _CLOSERS.match(block, offset)
    closers = closing.group() if closing else ""
    end = offset + len(closers)
    space = _WHITESPACE.match(block, end)
    if spaced or space:
        return space.end() if space else end
    if not closers:
        closers = before if before in _CJK_CLOSERS else ""
    if closers:  # the sentence goes on in 「はい。」と言った, and ends in 「はい。」「いいえ。」
        return end if closers[-1] in _CJK_CLOSERS and regex.match(r"\p{Ps}|[“‘]", block, pos=end) else None
    return end if _WIDE_END.match(before) and not _WIDE_END.match(block[end : end + 1]) else None


# --- Sentences that are too long ---


def _parts(sentence: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """Yield `sentence`, halved until each part fits or cannot be cut."""
    if fits(sentence) or (cut := _cut(sentence)) is None:
        yield sentence
    else:
        yield from _parts(sentence[:cut], fits)
        yield from _parts(sentence[cut:], fits)


def _cut(part: str) -> int | None:
    """Return the best offset near the middle to cut at, or None. Neither side of it is blank."""
    first, last = len(part) - len(part.lstrip()), len(part.rstrip())
    middle = (first + last) // 2
    for offsets in _candidates(part, first, middle, last):
        if (cut := _nearest(middle, offsets, first, last)) is not None:
            return cut
    return None


def _candidates(part: str, first: int, middle: int, last: int) -> Iterator[Iterable[int]]:
    """Yield the ascending offsets of each kind of place to cut at, the best kind first."""
    quarter = (last - first) // 4
    for pattern in (_INNER_SENTENCE, _CLAUSE):  # only in the middle half, so that the parts have similar lengths
        yield (match.end() for match in pattern.finditer(part, first + quarter, last - quarter))
    yield (match.end() for match in _WHITESPACE.finditer(part, first, last))
    start, near = max(first, middle - _WORD_REACH), min(last, middle + _WORD_REACH)
    clusters = list(takewhile(lambda end: end <= near, (match.end() for match in _CLUSTER.finditer(part))))
    # The ends of the searched range always match, so they do not count.
    edges = {start + match.start() for match in _WORD_EDGE.finditer(part[start:near])} - {start, near}
    yield (end for end in clusters if end in edges)
    yield clusters
    yield (middle,)


def _nearest(middle: int, offsets: Iterable[int], first: int, last: int) -> int | None:
    """Return which of the ascending `offsets` is nearest to `middle`, `first` and `last` excluded."""
    best: int | None = None
    for offset in offsets:
        if offset >= last:
            break
        if offset > first and (best is None or abs(offset - middle) < abs(best - middle)):
            best = offset
        if offset >= middle:
            break
    return best


# --- Packing ---


def _pack(pieces: list[str], closing: list[bool], segment_lengths: SegmentLengths, fits: Callable[[str], bool]) -> list[str]:
    """Join `pieces` in order to segments, each as long as its target allows. A piece that does not fit is cut."""
    segments: list[str] = []
    start = 0
    while start < len(pieces):
        limit = min(segment_lengths.target if segments else segment_lengths.first, segment_lengths.maximum)
        stop = _group_end(pieces, closing, start, limit)
        end = _longest_fit(pieces, start, stop, fits)
        if end < stop and len(parts := list(_parts(pieces[end], fits))) > 1:
            pieces[end : end + 1] = parts
            closing[end : end + 1] = [False] * (len(parts) - 1) + [closing[end]]
            continue
        end = max(end, start + 1)
        segments.append("".join(pieces[start:end]))
        start = end
    # The model speaks a few words worse alone than together with the sentence before them.
    if len(segments) > 2 and _size(segments[-1]) * 4 < segment_lengths.target:
        joined = segments[-2] + segments[-1]
        if _size(joined) <= segment_lengths.maximum and fits(joined):
            segments[-2:] = [joined]
    return segments


def _longest_fit(pieces: list[str], start: int, stop: int, fits: Callable[[str], bool]) -> int:
    """Return up to which piece, at most `stop`, those from `start` fit together. `fits` may be slow, so it is not asked for each piece."""

    def too_long(end: int) -> bool:
        return not fits("".join(pieces[start:end]))

    return stop if not too_long(stop) else start + bisect_left(range(start + 1, stop), True, key=too_long)


def _group_end(pieces: list[str], closing: list[bool], start: int, limit: int) -> int:
    """Return after which piece a segment from `start` ends: at a paragraph's end when it is half full, else before it exceeds `limit`."""
    segment = ""
    for place in range(start, len(pieces)):
        segment += pieces[place]
        if place > start and _size(segment) > limit:
            return place
        if closing[place] and _size(segment) * 2 >= limit:
            return place + 1
    return len(pieces)


# --- Texts that are still being written ---


@dataclass(frozen=True)
class Piece:
    """Part of the text, and the offset of its first character."""

    start: int
    text: str

    @property
    def end(self) -> int:
        """The offset after its last character."""
        return self.start + len(self.text)


class TextStream:
    """A text that arrives in parts; joined, the pieces are exactly the text.

    No piece ends inside a word, a number, a tag or other markup, unless that is longer than 1000 characters or `flush` was called there.

    Args:
        lengths: How long the pieces may be, as for `split_text`. What is certain already is put together up to the target.
    """

    def __init__(self, lengths: SegmentLengths) -> None:
        self._lengths = lengths
        self._pending = ""
        self._flushed = 0  # so many characters of `_pending` can be taken without waiting for more
        self._half = ""  # the first half of a surrogate pair whose other half is in the next part
        self._position = 0

    @property
    def pending(self) -> int:
        """The number of characters that have not been taken."""
        return len(self._pending)

    @property
    def length(self) -> int:
        """The number of characters so far."""
        return self._position + len(self._pending)

    def append(self, text: str) -> None:
        """Add the next part. Emoji may be cut in two: JavaScript's strings consist of UTF-16 units."""
        text, self._half = self._half + text, ""
        if "\ud800" <= text[-1:] <= "\udbff":
            text, self._half = text[:-1], text[-1:]
        self._pending += text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")

    def flush(self) -> None:
        """Let everything so far be taken, whether it is complete or not."""
        self._flushed = len(self._pending)

    def take(self, *, paused: bool = False) -> Piece | None:
        """Remove and return the next piece, or None if nothing is certain yet.

        Args:
            paused: The writer has paused: complete words are enough.
        """
        end = self._flushed_end() if self._flushed else self._certain_end()
        if end is None and paused:
            end = _complete_words(self._pending)
        if not end:
            return None
        piece = Piece(self._position, self._pending[:end])
        self._pending = self._pending[end:]
        self._flushed = max(0, self._flushed - end)
        self._position = piece.end
        return piece

    def _flushed_end(self) -> int:
        part = self._pending[: self._flushed]
        ends = [end for end in _inner_ends(part) if not _is_open(part[:end])]
        return self._packed([*ends, len(part)]) or len(split_text(part, self._lengths)[0])

    def _certain_end(self) -> int | None:
        """Return where the next piece ends; None if more text could still change that."""
        ends = []
        for end in _inner_ends(self._pending):
            if _NEXT_WORD.match(self._pending, end) is None:
                break
            if not _is_open(self._pending[:end]):
                ends.append(end)
        if ends:
            return self._packed(ends) or len(split_text(self._pending[: ends[0]], self._lengths)[0])
        return self._forced_end()

    def _packed(self, ends: list[int]) -> int | None:
        """Return the last of the ascending `ends` within the target, or else the first one; None if that is too long."""
        target = self._lengths.target if self._position else self._lengths.first
        within = [end for end in ends if len(self._pending[:end].strip()) <= target]
        if within:
            return within[-1]
        return ends[0] if len(self._pending[: ends[0]].strip()) <= self._lengths.maximum else None

    def _forced_end(self) -> int | None:
        """Return where to cut a sentence that is already too long; None if it is not."""
        size = len(self._pending)
        if size <= self._lengths.maximum or (size <= _LONGEST_OPEN and _is_open(self._pending)):
            return None
        return len(split_text(self._pending[: _complete_words(self._pending) or size], self._lengths)[0])


def _inner_ends(text: str) -> Iterator[int]:
    """Yield the offsets after the sentences of `text`, without its end."""
    for end in accumulate(len(sentence) for sentence, _ in sentences(text)):
        if end < len(text):
            yield end


def _complete_words(text: str) -> int:
    """Return the offset after the words that more text cannot change; 0 if there is none."""
    if _is_open(text):
        return 0
    if _FINISHED_WORD.search(text):
        return len(text)
    unfinished = _UNFINISHED.search(text)
    end = unfinished.start() if unfinished else len(text)
    return end if text[:end].strip() else 0


def _is_open(text: str) -> bool:
    """Return whether `text` ends inside a tag, a link, a table, emphasis, or code: the rest would be read as something else."""
    if len(_FENCE.findall(text)) % 2 or _OPEN_TAG.search(text):
        return True
    paragraph = _STARRED_ITEM.sub("", _PARAGRAPH.split(text)[-1])
    if _OPEN_BRACKET.search(paragraph) or _TABLE.search(paragraph):
        return True
    if "```" not in paragraph and paragraph.count("`") % 2:
        return True
    return len(_OPENING.findall(paragraph)) > len(_CLOSING.findall(paragraph))
