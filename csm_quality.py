"""Checks the quality of a CSM segment: frame budgets, faults, and repairs."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import regex
from numpy.typing import NDArray

from audio_formats import Samples

SAMPLE_RATE = 24_000
FRAME_MS = 80  # of CSM's codec: 12.5 frames a second

# Pace, in syllables a second. Pellegrino, Coupé and Marsico (Language 87, 2011) measured averages from 5.2 (Mandarin) to 7.8 (Japanese),
# English 6.2; half of that is slower than anybody reads aloud, and above 9 nobody reads intelligibly.
_SLOWEST_PACE = 3.0
_FASTEST_PACE = 9.0
# The same in words, because short words are said slowly: "slower than normal" begins under 100 a minute (Tauroza and Allison 1990, lectures).
_SLOWEST_WORDS = 100 / 60
_LETTERS_PER_SYLLABLE = 3.0  # English running text has 2.8 to 3.2
# The most and the fewest syllables that one sign stands for: "77,000" says 7 with two digits of five, "2000" says 3 with four.
_DIGIT_SYLLABLES = (0.5, 3.0)
_SPELLED_SYLLABLES = (0.3, 1.5)  # a capital in "NATO" (fewest), in "WWW" (most)
_SYMBOL_SYLLABLES = (0.0, 2.0)  # "%", "$", "@", "&", "+", "=", "/"
_IDEOGRAPH_SYLLABLES = (0.5, 2.0)  # a Chinese character is one; a Japanese one up to two, its kana with long vowels less than one
_CLAUSE_PAUSE = 0.3
_SENTENCE_PAUSE = 0.7
_MARGIN_SECONDS = 2.0  # silence before and after, a breath, hesitation
_GRACE_SECONDS = 0.25  # what the level-based end of speech misses of it
_SHORTEST_SECONDS = 0.08  # one frame

_BLOCK_MS = 20
_BLOCK = SAMPLE_RATE * _BLOCK_MS // 1000
# Speech lies within about 35 dB below its loudest vowels (ITU-T P.56 counts as active what is within 15.9 dB of the mean); prompts recorded
# in a room have their noise 45 to 55 dB below.
_QUIET_BELOW_LOUDEST_DB = -40.0
_QUIET_DBFS = -60.0
_SILENT_DBFS = -50.0

_DEAD_SECONDS = 2.0  # no reader pauses so long within two or three sentences
_STUCK_SECONDS = 1.5  # no vowel or fricative is held so long
# Standard deviation of a band's level over 1.5 s, in windows of 100 ms, mean of the bands; measured: the built-in voice never under 9 dB,
# a tone 0, noise of one colour 1.6 to 1.8.
_STUCK_DEVIATION_DB = 3.0
_WINDOW = SAMPLE_RATE // 10
_HOP = _WINDOW // 2
_BANDS = 20

_PAUSE_BLOCKS = 6  # 120 ms: between words, not inside a plosive
_KEPT_PAUSE_BLOCKS = 3

_SPELLED = regex.compile(r"\b\p{Lu}{2,}\b")
_IDEOGRAPH = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]")
_LETTER = regex.compile(r"\p{L}")
_DIGIT = regex.compile(r"\p{N}")
_SYMBOL = regex.compile(r"[\p{S}%&@#*/\\]")
_WORD = regex.compile(r"[\p{L}\p{N}]+(?:['’-][\p{L}\p{N}]+)*")
_CLAUSE_MARK = regex.compile(r"[,;:–—、，；：]")
_SENTENCE_MARK = regex.compile(r"[.!?…。！？]+(?=\s|$)|[。！？\n]")


class Fault(enum.Enum):
    """What can be wrong with a spoken segment; the value is its weight when the best of several attempts is chosen.

    Words that are missing are worse than words too many.
    """

    NOT_FINITE = 1001
    EMPTY = 1000
    SILENT = 999
    TOO_SHORT = 8
    UNENDED = 6
    STUCK = 4
    WRONG_WORDS = 3
    DEAD = 2

    @property
    def unusable(self) -> bool:
        """Whether nothing that has this fault may be played."""
        return self in (Fault.NOT_FINITE, Fault.EMPTY, Fault.SILENT)


@dataclass(frozen=True)
class Attempt:
    """One try at saying a segment.

    Attributes:
        samples: float32, shape (n,), 24 kHz.
        ended: The model ended by itself, before the frame budget did.
        faults: What is wrong with it.
        word_error_rate: What a recogniser made of it, where one was asked.
    """

    samples: Samples
    ended: bool
    faults: tuple[Fault, ...] = ()
    word_error_rate: float | None = None

    @property
    def usable(self) -> bool:
        """Whether it may be played at all."""
        return not any(fault.unusable for fault in self.faults)


@dataclass(frozen=True)
class _Syllables:
    """How many syllables a text has, at least and at most, and its pauses in seconds."""

    fewest: float
    most: float
    words: int
    pauses: float


def frame_budget(text: str, longest_ms: float) -> int:
    """The number of 80 ms frames that `text` needs at the slowest natural pace, with a margin; at most `longest_ms`, at least 1."""
    said = _syllables(text)
    seconds = max(said.most / _SLOWEST_PACE, said.words / _SLOWEST_WORDS) + said.pauses + _MARGIN_SECONDS
    return max(1, min(int(seconds * 1000 / FRAME_MS), int(longest_ms / FRAME_MS)))


def shortest_seconds(text: str) -> float:
    """No reader says `text` in less than this."""
    return max(_SHORTEST_SECONDS, _syllables(text).fewest / _FASTEST_PACE - _GRACE_SECONDS)


def _syllables(text: str) -> _Syllables:
    spelled = sum(len(run) for run in _SPELLED.findall(text))
    ideographs = len(_IDEOGRAPH.findall(text))
    letters = len(_LETTER.findall(text)) - spelled - ideographs
    counted = ((len(_DIGIT.findall(text)), _DIGIT_SYLLABLES), (spelled, _SPELLED_SYLLABLES), (ideographs, _IDEOGRAPH_SYLLABLES))
    signs = (*counted, (len(_SYMBOL.findall(text)), _SYMBOL_SYLLABLES))
    base = letters / _LETTERS_PER_SYLLABLE
    pauses = len(_CLAUSE_MARK.findall(text)) * _CLAUSE_PAUSE + len(_SENTENCE_MARK.findall(text)) * _SENTENCE_PAUSE
    return _Syllables(
        fewest=base + sum(count * low for count, (low, _) in signs),
        most=base + sum(count * high for count, (_, high) in signs),
        words=len(_WORD.findall(text)),
        pauses=pauses,
    )


def judge(text: str, samples: Samples, ended: bool) -> tuple[Fault, ...]:
    """What is wrong with `samples` as a reading of `text`; nothing, if it can be one.

    Args:
        text: What was to be said.
        samples: float32, shape (n,), 24 kHz.
        ended: The model ended by itself.
    """
    if not len(samples):
        return (Fault.EMPTY,)
    if not np.isfinite(samples).all():
        return (Fault.NOT_FINITE,)
    levels = _levels(samples)
    if levels.max() < _amplitude(_SILENT_DBFS):
        return (Fault.SILENT,)
    first, last = _edges(levels)
    found = {
        Fault.TOO_SHORT: (last - first) * _BLOCK_MS / 1000 < shortest_seconds(text),
        Fault.UNENDED: not ended,
        Fault.STUCK: _stuck_start(samples) is not None,
        Fault.DEAD: any(end - start >= _DEAD_SECONDS * 1000 / _BLOCK_MS for start, end in _quiet_runs(levels[first:last])),
    }
    return tuple(fault for fault, is_there in found.items() if is_there)


def silent(samples: Samples) -> bool:
    """Whether nothing can be heard in `samples` (shape (n,)); NaN counts as sound."""
    return not len(samples) or bool(_levels(samples).max() < _amplitude(_SILENT_DBFS))


def best(attempts: Sequence[Attempt]) -> Attempt:
    """The attempt with the least wrong with it, the earliest of several."""
    return min(attempts, key=lambda attempt: sum(fault.value for fault in attempt.faults) + (attempt.word_error_rate or 0.0))


def repaired(text: str, attempt: Attempt) -> Samples:
    """An attempt's samples without its runaway tail: a tone that never stops goes, and words cut off by the budget go back to the last pause."""
    samples = attempt.samples
    if Fault.STUCK in attempt.faults:
        samples = _without_stuck_tail(samples)
    if Fault.UNENDED in attempt.faults:
        samples = _to_last_pause(samples, shortest_seconds(text))
    return samples


def _without_stuck_tail(samples: Samples) -> Samples:
    """`samples` up to where a sound begins that does not change any more; whole, if something follows that sound."""
    start = _stuck_start(samples)
    if start is None or _stuck_start(samples[-round(_STUCK_SECONDS * SAMPLE_RATE) - _WINDOW :]) is None:
        return samples
    return samples[:start] if start else samples


def _to_last_pause(samples: Samples, at_least: float) -> Samples:
    """`samples` up to its last pause that begins after `at_least` seconds of sound; whole, if there is none."""
    levels = _levels(samples)
    first = _edges(levels)[0] if len(levels) else 0
    earliest = first + at_least * 1000 / _BLOCK_MS
    starts = [start for start, end in _quiet_runs(levels) if start >= earliest and end - start >= _PAUSE_BLOCKS]
    return samples[: (starts[-1] + _KEPT_PAUSE_BLOCKS) * _BLOCK] if starts else samples


def _amplitude(decibels: float) -> float:
    return float(10 ** (decibels / 20))


def _levels(samples: Samples) -> NDArray[np.float64]:
    """The RMS of each 20 ms block, shape (blocks,); the last block may be shorter."""
    padded = np.pad(samples.astype(np.float64), (0, -len(samples) % _BLOCK))
    return np.asarray(np.sqrt(np.square(padded.reshape(-1, _BLOCK)).mean(axis=1)))


def _threshold(loudest: float) -> float:
    """The level under which a block is quiet, next to blocks of the level `loudest`."""
    return max(_amplitude(_QUIET_DBFS), loudest * _amplitude(_QUIET_BELOW_LOUDEST_DB))


def _edges(levels: NDArray[np.float64]) -> tuple[int, int]:
    """The blocks between which there is sound: [first, last)."""
    loud = np.flatnonzero(levels >= _threshold(levels.max()))
    return (int(loud[0]), int(loud[-1]) + 1) if len(loud) else (0, 0)


def _quiet_runs(levels: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Stretches of quiet blocks, [start, end) each."""
    if not len(levels):
        return []
    quiet = np.concatenate([[False], levels < _threshold(levels.max()), [False]])
    changes = np.flatnonzero(np.diff(quiet.astype(np.int8)))
    return [(int(start), int(end)) for start, end in zip(changes[::2], changes[1::2], strict=True)]


def _stuck_start(samples: Samples) -> int | None:
    """The sample where a sound begins that stays the same for `_STUCK_SECONDS`, if there is one.

    The spectrum is looked at in 100 ms windows and 20 bands; a stretch is stuck when the bands' levels hardly move.
    """
    spectra = _band_levels(samples)
    width = round(_STUCK_SECONDS * SAMPLE_RATE / _HOP)
    if len(spectra) < width:
        return None
    stretches = np.lib.stride_tricks.sliding_window_view(spectra, width, axis=0)
    heard = spectra.max(axis=1) > spectra.max() + _QUIET_BELOW_LOUDEST_DB
    heard_throughout = np.lib.stride_tricks.sliding_window_view(heard, width).all(axis=1)
    stuck = np.flatnonzero((stretches.std(axis=-1).mean(axis=1) < _STUCK_DEVIATION_DB) & heard_throughout)
    return int(stuck[0]) * _HOP if len(stuck) else None


def _band_levels(samples: Samples) -> NDArray[np.float64]:
    """dB in 20 bands from 80 Hz to 8 kHz, shape (windows, bands); what lies 60 dB under the loudest is as good as nothing."""
    if len(samples) < _WINDOW:
        return np.empty((0, _BANDS))
    windows = np.lib.stride_tricks.sliding_window_view(samples, _WINDOW)[::_HOP] * np.hanning(_WINDOW)
    power = np.square(np.abs(np.fft.rfft(windows, axis=1)))
    edges = np.round(np.geomspace(80, 8000, _BANDS + 1) * _WINDOW / SAMPLE_RATE).astype(int)
    edges = np.maximum.accumulate(np.maximum(edges, edges[0] + np.arange(_BANDS + 1)))
    bands = np.add.reduceat(power, edges, axis=1)[:, :_BANDS]
    decibels = 10 * np.log10(bands + 1e-12)
    return np.asarray(np.maximum(decibels, decibels.max() - 60))


class PauseLimiter:
    """Shortens dead stretches to a length, in samples that arrive bit by bit; how they are cut into pieces makes no difference.

    What is kept of a long pause is its beginning and its last 20 ms, faded into one another.

    Args:
        longest_ms: No pause stays longer than this.
    """

    def __init__(self, longest_ms: int) -> None:
        self._longest = max(2, longest_ms // _BLOCK_MS)
        self._loudest = 0.0
        self._quiet = 0
        self._head: Samples | None = None
        self._tail: Samples | None = None
        self._rest = np.empty(0, np.float32)

    def feed(self, samples: Samples) -> Samples:
        """What of `samples`, shape (n,), and of what was held back is to be played now."""
        joined = np.concatenate([self._rest, samples])
        whole = len(joined) - len(joined) % _BLOCK
        self._rest = joined[whole:]
        kept = [part for block in joined[:whole].reshape(-1, _BLOCK) for part in self._next(block)]
        return np.concatenate(kept) if kept else np.empty(0, np.float32)

    def flush(self) -> Samples:
        """What was held back, at the end."""
        parts = [part for part in (self._head, self._rest) if part is not None]
        self._head, self._tail, self._rest = None, None, np.empty(0, np.float32)
        return np.concatenate(parts)

    def _next(self, block: Samples) -> list[Samples]:
        level = float(_levels(block)[0])
        self._loudest = max(self._loudest, level)
        if level >= _threshold(self._loudest):
            self._quiet = 0
            return [*self._joint(), block]
        self._quiet += 1
        if self._quiet < self._longest:
            return [block]
        if self._head is None:
            self._head = block
        else:
            self._tail = block
        return []

    def _joint(self) -> list[Samples]:
        """The block that is heard for a held-back part of a pause."""
        head, tail = self._head, self._tail
        self._head = self._tail = None
        if head is None:
            return []
        if tail is None:
            return [head]
        fade = np.linspace(0, 1, _BLOCK, dtype=np.float32)
        return [head * (1 - fade) + tail * fade]
