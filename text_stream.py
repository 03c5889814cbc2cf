"""Cut a text that is still being written into pieces of whole sentences, each as soon as it is certain."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import regex

from speech_model import SegmentLengths
from text_splitter import sentences, split_text

_LONGEST_OPEN = 1000  # characters. Markup that is not closed within this length is none

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
_LIST_MARKER = re.compile(r"^[ \t]*[*_]+[ \t]", re.MULTILINE)


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
        ends = [end for end in _sentence_ends(part) if not _is_open(part[:end])]
        return self._packed([*ends, len(part)]) or len(split_text(part, self._lengths)[0])

    def _certain_end(self) -> int | None:
        """Return where the next piece ends; None if more text could still change that."""
        ends = []
        for end in _sentence_ends(self._pending):
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


def _sentence_ends(text: str) -> Iterator[int]:
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
    paragraph = _LIST_MARKER.sub("", _PARAGRAPH.split(text)[-1])
    if _OPEN_BRACKET.search(paragraph) or _TABLE.search(paragraph):
        return True
    if "```" not in paragraph and paragraph.count("`") % 2:
        return True
    return len(_OPENING.findall(paragraph)) > len(_CLOSING.findall(paragraph))
