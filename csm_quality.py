"""Checks whether CSM spoke a segment well: frame budgets, faults, repairs."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import regex
from numpy.typing import NDArray

from audio_formats import SAMPLE_RATE, Samples

FRAME_MS = 80  # of CSM's codec: 12.5 frames a second

# Pace, in syllables a second. Pellegrino, Coupé and Marsico (Language 87, 2011) measured averages from 5.2 (Mandarin) to 7.8 (Japanese),
# English 6.2; half of that is slower than any reader, and above 9 speech is not intelligible.
_SLOWEST_PACE = 3.0
_FASTEST_PACE = 9.0
# The same in words, because short words are spoken slowly: "slower than normal" begins under 100 a minute (Tauroza and Allison 1990, lectures).
_SLOWEST_WORDS = 100 / 60
_LETTERS_PER_SYLLABLE = 3.0  # English running text has 2.8 to 3.2
# The fewest and the most syllables for one character: "2000" has 3 with four digits, "77,000" has 7 with five.
_DIGIT_SYLLABLES = (0.5, 3.0)
_SPELLED_SYLLABLES = (0.3, 1.5)  # a capital in "NATO" (fewest), in "WWW" (most)
_SYMBOL_SYLLABLES = (0.0, 2.0)  # "%", "$", "@", "&", "+", "=", "/"
_IDEOGRAPH_SYLLABLES = (0.5, 2.0)  # a Chinese character is one; a Japanese one up to two, its kana with long vowels less than one
_CLAUSE_PAUSE = 0.3
_SENTENCE_PAUSE = 0.7
_MARGIN_SECONDS = 2.0  # silence before and after, a breath, hesitation
_GRACE_SECONDS = 0.25  # at the end of speech, which is too quiet to be found by its level
_SHORTEST_SECONDS = 0.08  # one frame

_BLOCK_MS = 20
_BLOCK = SAMPLE_RATE * _BLOCK_MS // 1000
# Speech is at most about 35 dB quieter than its loudest vowels (ITU-T P.56 counts levels within 15.9 dB of the mean as active); in prompts
# recorded in a room, the noise is 45 to 55 dB quieter.
_QUIET_BELOW_LOUDEST_DB = -40.0
_QUIET_DBFS = -60.0
_SILENT_DBFS = -50.0

_DEAD_SECONDS = 2.0  # longer than any pause within two or three sentences
_STUCK_SECONDS = 1.5  # longer than any vowel or fricative
# Standard deviation of a band's level over 1.5 s in windows of 100 ms, mean of all bands. Measured: at least 9 dB for the built-in voice,
# 0 for a tone, 1.6 to 1.8 for steady noise.
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
    """A fault of a spoken segment. The value is its weight in the choice of the best attempt: missing words weigh more than extra words."""

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
        """Whether audio with this fault must never be played."""
        return self in (Fault.NOT_FINITE, Fault.EMPTY, Fault.SILENT)


@dataclass(frozen=True)
class Attempt:
    """One attempt at a segment."""

    samples: Samples
    ended: bool  # by the model, not by the frame budget
    faults: tuple[Fault, ...] = ()
    word_error_rate: float | None = None  # None without a recogniser

    @property
    def usable(self) -> bool:
        """Whether it may be played at all."""
        return not any(fault.unusable for fault in self.faults)


@dataclass(frozen=True)
class _Syllables:
    """Estimates for a text: the fewest and the most syllables, its words, and its pauses in seconds."""

    fewest: float
    most: float
    words: int
    pauses: float


def frame_budget(text: str, longest_ms: float) -> int:
    """Return how many 80 ms frames `text` needs at the slowest natural pace, with a margin: at least 1, at most `longest_ms`."""
    syllables = _syllables(text)
    seconds = max(syllables.most / _SLOWEST_PACE, syllables.words / _SLOWEST_WORDS) + syllables.pauses + _MARGIN_SECONDS
    return max(1, min(int(seconds * 1000 / FRAME_MS), int(longest_ms / FRAME_MS)))


def shortest_seconds(text: str) -> float:
    """Return the shortest time in which `text` can be spoken."""
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
    """Return the faults of `samples` as speech of `text`.

    Args:
        text: The segment's text.
        samples: float32, shape (n,), 24 kHz.
        ended: Whether the model ended by itself.
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
    """Return whether `samples`, shape (n,), are inaudible; NaN counts as audible."""
    return not len(samples) or bool(_levels(samples).max() < _amplitude(_SILENT_DBFS))


def best(attempts: Sequence[Attempt]) -> Attempt:
    """Return the attempt with the least severe faults, the earliest of equals."""
    return min(attempts, key=lambda attempt: sum(fault.value for fault in attempt.faults) + (attempt.word_error_rate or 0.0))


def repaired(text: str, attempt: Attempt) -> Samples:
    """Return an attempt's samples without a stuck tone at the end, and, if the budget cut them off, only up to the last pause."""
    samples = attempt.samples
    if Fault.STUCK in attempt.faults:
        samples = _without_stuck_tail(samples)
    if Fault.UNENDED in attempt.faults:
        samples = _to_last_pause(samples, shortest_seconds(text))
    return samples


def _without_stuck_tail(samples: Samples) -> Samples:
    """Return `samples` up to a sound that stays the same until the end; unchanged if there is none."""
    start = _stuck_start(samples)
    if start is None or _stuck_start(samples[-round(_STUCK_SECONDS * SAMPLE_RATE) - _WINDOW :]) is None:
        return samples
    return samples[:start] if start else samples


def _to_last_pause(samples: Samples, at_least: float) -> Samples:
    """Return `samples` up to the last pause that begins after `at_least` seconds of sound; unchanged if there is none."""
    levels = _levels(samples)
    first = _edges(levels)[0] if len(levels) else 0
    earliest = first + at_least * 1000 / _BLOCK_MS
    starts = [start for start, end in _quiet_runs(levels) if start >= earliest and end - start >= _PAUSE_BLOCKS]
    return samples[: (starts[-1] + _KEPT_PAUSE_BLOCKS) * _BLOCK] if starts else samples


def _amplitude(decibels: float) -> float:
    return float(10 ** (decibels / 20))


def _levels(samples: Samples) -> NDArray[np.float64]:
    """Return the RMS of each 20 ms block, shape (blocks,); the last block may be shorter."""
    padded = np.pad(samples.astype(np.float64), (0, -len(samples) % _BLOCK))
    return np.asarray(np.sqrt(np.square(padded.reshape(-1, _BLOCK)).mean(axis=1)))


def _threshold(loudest: float) -> float:
    """Return the level below which a block is quiet, where the loudest block has the level `loudest`."""
    return max(_amplitude(_QUIET_DBFS), loudest * _amplitude(_QUIET_BELOW_LOUDEST_DB))


def _edges(levels: NDArray[np.float64]) -> tuple[int, int]:
    """Return the range of blocks with sound: [first, last)."""
    loud = np.flatnonzero(levels >= _threshold(levels.max()))
    return (int(loud[0]), int(loud[-1]) + 1) if len(loud) else (0, 0)


def _quiet_runs(levels: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Return the ranges of quiet blocks, [start, end) each."""
    if not len(levels):
        return []
    quiet = np.concatenate([[False], levels < _threshold(levels.max()), [False]])
    changes = np.flatnonzero(np.diff(quiet.astype(np.int8)))
    return [(int(start), int(end)) for start, end in zip(changes[::2], changes[1::2], strict=True)]


def _stuck_start(samples: Samples) -> int | None:
    """Return the first sample of a sound that stays the same for `_STUCK_SECONDS`, if there is one.

    The spectrum is measured in 100 ms windows and 20 bands; a sound is stuck when the levels of the bands hardly change.
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
    """Return dB in 20 bands from 80 Hz to 8 kHz, shape (windows, bands), at least 60 dB below the loudest."""
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
    """Shortens long pauses in samples that arrive piece by piece; the result does not depend on the pieces.

    The beginning of a long pause and its last 20 ms are kept, with a crossfade between them.

    Args:
        longest_ms: The longest pause that is kept.
    """

    def __init__(self, longest_ms: int) -> None:
        self._longest = max(2, longest_ms // _BLOCK_MS)
        self._loudest = 0.0
        self._quiet = 0
        self._head: Samples | None = None
        self._tail: Samples | None = None
        self._rest = np.empty(0, np.float32)

    def feed(self, samples: Samples) -> Samples:
        """Take more samples, shape (n,); return those that can be played now."""
        joined = np.concatenate([self._rest, samples])
        whole = len(joined) - len(joined) % _BLOCK
        self._rest = joined[whole:]
        kept = [part for block in joined[:whole].reshape(-1, _BLOCK) for part in self._next(block)]
        return np.concatenate(kept) if kept else np.empty(0, np.float32)

    def flush(self) -> Samples:
        """Return the samples that were held back, at the end."""
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
        """Return the block that replaces the held-back part of a pause."""
        head, tail = self._head, self._tail
        self._head = self._tail = None
        if head is None:
            return []
        if tail is None:
            return [head]
        fade = np.linspace(0, 1, _BLOCK, dtype=np.float32)
        return [head * (1 - fade) + tail * fade]
