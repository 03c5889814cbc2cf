"""Cuts a text into segments of sentences that a model can say well, without losing or doubling a character."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile

import regex
import sentencex

from speech_model import SegmentLengths

# A list item's mark: a single line break in front of it ends the line before. Other single line breaks are only wrapping.
_LIST_MARK = re.compile(r"(?:[-*+•‣◦▪●–—]|[(\[]?(?:[0-9]{1,3}|[A-Za-z])[.)\]])[ \t]")
_LINE_BREAK = re.compile("\r\n|[\n\r\x0b\x0c\x85\u2028\u2029]")
_WHITESPACE = re.compile(r"\s+")

# What sentencex must not look into. Each match is overwritten with letters, so that the offsets stay what they are.
_OPAQUE = regex.compile(
    r"\b[A-Za-z][A-Za-z0-9+.-]{0,15}+://[^\s<>\"“”]*[^\s<>\"“”.,;:!?…)\]'’]"  # a URL without the sentence's own punctuation
    r"|\bwww\.[^\s<>\"“”]*[^\s<>\"“”.,;:!?…)\]'’]"
    r"|(?<!\S)\.(?=\w)"  # .NET, .5
    # Abbreviations that sentencex 1.0.32 takes for a sentence's end (tried one by one in front of a number and of a word).
    r"|\b(?i:approx|est|max|tel|incl|excl|resp|govt|vol|ch|eq|avg|ed|eds|min|ca|temp|tbsp|tsp)\.(?=\s+[\p{N}\p{Ll}])"
)
_WINDOW = 4096  # characters; longer paragraphs are rare, and 16384 closing quotes cost half a second at once
_CLOSERS = re.compile(r"""["'”’»›)\]}」』】》〉）］]*""")
_CJK_CLOSERS = frozenset("”’」』】》〉）］")
# Ends that need no space behind them: every Sentence_Terminal character beyond ASCII (。！？ । ؟ ۔ ։ ። ။ and so on).
_WIDE_END = regex.compile(r"[[\p{Sentence_Terminal}｡]--[\x00-\x7F‼⁇⁈⁉]]+", flags=regex.V1)
# Sentence ends that sentencex passes over: inside brackets, and Greek's question mark.
_BRACKETED_END = regex.compile(r"(?:[!?…]|\p{Ll}\p{Ll}\.)[)\]]+[\"'”’]*\s+(?=[\p{Lu}\p{Lt}\p{Lo}\p{N}(\[\"“‘«])")
_GREEK_QUESTION = regex.compile(r"(?<=\p{Greek});\s+(?=\p{Greek})")
# "1." and "A." number what follows; alone they are no sentence.
_ENUMERATOR = re.compile(r"\s*[(\[]?(?:[0-9]{1,3}|[A-Za-z])[.)]\s*")

# Where a sentence that is too long may break, best first. The lookbehinds keep the search linear in a run of the same mark.
_INNER_SENTENCE = regex.compile(r"(?<![.!?…])[.!?…]++[\"'”’»)\]]*+\s++(?=[^\p{Ll}\s])")
_CLAUSE = regex.compile(
    r"(?<![,;:،؛、，；：፣፤፥၊·])[,;:،؛、，；：፣፤፥၊·]++[\"'”’»)\]」』]*+\s++|(?<![、，；：])[、，；：]++[」』”’）]*+|[—―…]++\s*+|\s[–-]\s++|[)\]]\s++"
)
_WORD_REACH = 60  # characters to look for a word's edge, either side of the middle
_WORD_EDGE = regex.compile(r"(?w)\b")
_CLUSTER = regex.compile(r"\X")


def always(_segment: str) -> bool:
    """Every segment fits: for a model without a limit of its own."""
    return True


def split_text(text: str, segment_lengths: SegmentLengths, fits: Callable[[str], bool] = always) -> list[str]:
    """`text` as segments to be spoken one after another; joined they are `text` again, to the character.

    Sentences are found by sentencex (its English rules, and the terminators of other scripts) and packed up to `segment_lengths.target`
    characters, the first segment up to `segment_lengths.first`; the end of a paragraph closes a segment that is at least half full. A sentence
    longer than `segment_lengths.maximum` is halved at a clause's punctuation, else between two words. Where there is no space at all (Chinese,
    Thai, one endless word) the cut falls at Unicode's word edges, else between two grapheme clusters, so that no accent and no emoji
    comes apart; only a single cluster that is itself too long is cut inside. Lengths do not count the whitespace around a segment, which
    stays with the segment before it. No segment is blank unless the text is; no text gives no segment.

    Args:
        text: Any string.
        segment_lengths: The lengths, in characters. With a target of 1 each sentence is a segment of its own.
        fits: Whether the model can take a segment at all. One that does not fit is halved until it does, or is a single character.
    """
    if not text.strip():
        return [text] if text else []
    pieces: list[str] = []
    closing: list[bool] = []  # whether a paragraph ends behind the piece
    for sentence, ends_paragraph in _sentences(text):
        parts = list(_parts(sentence, lambda part: _size(part) <= segment_lengths.maximum and fits(part)))
        pieces += parts
        closing += [False] * (len(parts) - 1) + [ends_paragraph]
    return _pack(pieces, closing, segment_lengths, fits)


def _size(part: str) -> int:
    return len(part.strip())


# --- Sentences ---


def _sentences(text: str) -> Iterator[tuple[str, bool]]:
    """Each sentence with the whitespace behind it, and whether a paragraph or list item ends with it."""
    for block in _blocks(text):
        start = 0
        ends = _sentence_ends(block)
        for end in ends:
            yield block[start:end], False
            start = end
        yield block[start:], True


def _blocks(text: str) -> Iterator[str]:
    """Paragraphs and list items, each with the whitespace behind it; none is blank."""
    start = 0
    last = len(text.rstrip())
    for space in _WHITESPACE.finditer(text, len(text) - len(text.lstrip())):
        end = space.end()
        if end >= last:
            break
        breaks = len(_LINE_BREAK.findall(space.group()))
        if breaks > 1 or "\u2029" in space.group() or (breaks and _LIST_MARK.match(text, end)):
            yield text[start:end]
            start = end
    yield text[start:]


def _sentence_ends(block: str) -> list[int]:
    """Offsets inside `block`, in order, at which a sentence begins; no sentence is blank."""
    masked = _OPAQUE.sub(lambda match: "x" * len(match.group()), block)
    # sentencex is given one kind of space and full stop, and no surrogate, which it cannot encode.
    masked = re.sub(r"[\s\ud800-\udfff…]", _plain, masked)
    found = set(_sentencex_ends(masked))
    for pattern in (_BRACKETED_END, _GREEK_QUESTION):
        found.update(match.end() for match in pattern.finditer(masked))
    found.update(match.end() for match in _WIDE_END.finditer(masked))
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
    """What sentencex says, asked window by window: its time grows with the square of the closing quotes it is given at once."""
    start = 0
    while start < len(masked):
        window = masked[start : start + _WINDOW]
        sentences = sentencex.segment("en", window)
        if start + len(window) < len(masked) and len(sentences) > 1:
            sentences.pop()  # it may go on behind the window
        for sentence in sentences:
            start += len(sentence)
            yield start


def _settled(block: str, offset: int) -> int | None:
    """`offset` moved behind closing quotes, brackets and whitespace; None where no sentence can end there."""
    before = block[offset - 1]
    spaced = before.isspace()
    closers = "" if spaced else _closers_at(block, offset)
    end = offset + len(closers)
    space = _WHITESPACE.match(block, end)
    if spaced or space:
        return space.end() if space else end
    if not closers:
        closers = before if before in _CJK_CLOSERS else ""
    if closers:  # 「はい。」と言った goes on; 「はい。」「いいえ。」 does not
        return end if closers[-1] in _CJK_CLOSERS and regex.match(r"\p{Ps}|[“‘]", block, pos=end) else None
    return end if _WIDE_END.match(before) and not _WIDE_END.match(block[end : end + 1]) else None


def _closers_at(block: str, offset: int) -> str:
    match = _CLOSERS.match(block, offset)
    return match.group() if match else ""


# --- Sentences that are too long ---


def _parts(sentence: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """`sentence`, halved until each part fits or cannot be cut."""
    if fits(sentence) or (cut := _cut(sentence)) is None:
        yield sentence
    else:
        yield from _parts(sentence[:cut], fits)
        yield from _parts(sentence[cut:], fits)


def _cut(part: str) -> int | None:
    """The best offset near the middle to cut at, both sides keeping something that is not whitespace."""
    first, last = len(part) - len(part.lstrip()), len(part.rstrip())
    middle, quarter = (first + last) // 2, (last - first) // 4
    for pattern in (_INNER_SENTENCE, _CLAUSE):  # only in the middle half: three words and three hundred are no halves
        cut = _nearest(middle, (match.end() for match in pattern.finditer(part, first + quarter, last - quarter)), first, last)
        if cut is not None:
            return cut
    cut = _nearest(middle, (match.end() for match in _WHITESPACE.finditer(part, first, last)), first, last)
    if cut is not None:
        return cut
    start, near = max(first, middle - _WORD_REACH), min(last, middle + _WORD_REACH)
    clusters = list(takewhile(lambda end: end <= near, (match.end() for match in _CLUSTER.finditer(part))))
    edges = {match.start() for match in _WORD_EDGE.finditer(part, start, near)} - {start, near}  # a search always matches its own ends
    for ends in ((end for end in clusters if end in edges), clusters, (middle,)):
        cut = _nearest(middle, ends, first, last)
        if cut is not None:
            return cut
    return None


def _nearest(middle: int, ends: Iterable[int], first: int, last: int) -> int | None:
    """The one of the rising offsets `ends` that is nearest to `middle`, with `first` and `last` left out."""
    best: int | None = None
    for end in ends:
        if end >= last:
            break
        if end > first and (best is None or abs(end - middle) < abs(best - middle)):
            best = end
        if end >= middle:
            break
    return best


# --- Packing ---


def _pack(pieces: list[str], closing: list[bool], segment_lengths: SegmentLengths, fits: Callable[[str], bool]) -> list[str]:
    """`pieces` glued together in order, as many a segment as its target holds."""
    segments: list[str] = []
    segment = ""
    full = False
    for piece, closes in zip(pieces, closing, strict=True):
        limit = min(segment_lengths.target if segments else segment_lengths.first, segment_lengths.maximum)
        if segment and (full or _size(segment + piece) > limit or not fits(segment + piece)):
            segments.append(segment)
            segment = ""
            limit = min(segment_lengths.target, segment_lengths.maximum)
        segment += piece
        full = closes and _size(segment) * 2 >= limit
    segments.append(segment)
    if (
        len(segments) > 2 and _size(segments[-1]) * 4 < segment_lengths.target
    ):  # a few words alone are said worse than behind their sentence
        joined = segments[-2] + segments[-1]
        if _size(joined) <= segment_lengths.maximum and fits(joined):
            segments[-2:] = [joined]
    return segments
