"""Checks whether CSM spoke a segment well: frame budgets, faults, repairs."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import regex
from numpy.typing import NDArray

from audio_formats import SAMPLE_RATE, Samples
from speech_model import CODEC_FRAMES_PER_SECOND
from transcription import Hearing

FRAME_MS = round(1000 / CODEC_FRAMES_PER_SECOND)

# Pace, in syllables a second. Pellegrino, Coupé and Marsico (Language 87, 2011) measured averages from 5.2 (Mandarin) to 7.8 (Japanese),
# English 6.2; half of that is slower than any reader.
_SLOWEST_PACE = 3.0
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

# The length of the built-in voice's readings, fitted to 50 texts: with these, all lie within 0.84 to 1.18 of it.
_SYLLABLE_SECONDS = 0.2
_CLAUSE_SECONDS = 0.18
_SENTENCE_SECONDS = 0.5
# Of the voice's expected length. A good reading at 0.8 or 1.25 times the speed of the voice's prompt has 0.67 to 1.47.
_TOO_SHORT, _TOO_LONG = 0.6, 1.65
_DOUBTFUL = (0.85, 1.2)
_DOUBTFUL_SECONDS = 0.1
_WORDS_SAID = 0.9  # of it: the earliest end of all words
_GRACE_SECONDS = 0.25  # at the end of speech, which is too quiet to be found by its level
_HESITATION_SECONDS = 1.0
_SHORTEST_SECONDS = 0.08  # one frame
# A voice's pace is that of its prompt and its accepted segments, against this many seconds of the built-in voice's, within limits.
_PRIOR_SECONDS = 5.0
_LONGEST_PROMPT_SECONDS = 10.0  # a longer one counts no more: a conversation is not a reading
_PACE_RANGE = (0.7, 1.5)

_BLOCK_MS = 20
_BLOCK = SAMPLE_RATE * _BLOCK_MS // 1000
# Speech is at most about 35 dB quieter than its loudest vowels (ITU-T P.56 counts levels within 15.9 dB of the mean as active); in prompts
# recorded in a room, the noise is 45 to 55 dB quieter.
_QUIET_BELOW_LOUDEST_DB = -40.0
_QUIET_DBFS = -60.0
_SILENT_DBFS = -50.0
# Speech behind a loud burst may be below that limit, too. It rises and falls; the noise in a pause hardly does.
_SPEECH_RISE_DB = 15.0
_SPEECH_RANGE_DB = 10.0
# The last 20 ms of 500 whole readings were at least 67 dB below the loudest block; within a word they are seldom more than 35 dB below it.
_CUT_OFF_DB = -35.0

_DEAD_SECONDS = 2.0  # longer than any pause within two or three sentences
_STUCK_SECONDS = 1.5  # longer than any vowel or fricative
# Standard deviation of a band's level over 1.5 s in windows of 100 ms, mean of all bands. Measured: at least 9 dB for the built-in voice,
# 0 for a tone, 1.6 to 1.8 for steady noise.
_STUCK_DEVIATION_DB = 3.0
_WINDOW = SAMPLE_RATE // 10
_HOP = _WINDOW // 2
_BANDS = 20

# Notes stay, harmonics of a voice glide. The share of moments (170 ms, 150 Hz to 3 kHz) whose spectrum is the same 160 ms later, measured:
# at most 0.04 for the built-in voice, at least 0.21 for music.
_SAME_SPECTRUM = 0.9  # cosine
_MOST_SAME = 0.12
_NOTE_WINDOW = 4096
_NOTE_HOP = SAMPLE_RATE // 50
_NOTE_LAG = 8  # hops
_NOTE_BINS = slice(150 * _NOTE_WINDOW // SAMPLE_RATE, 3000 * _NOTE_WINDOW // SAMPLE_RATE)
_NOTE_RANGE_DB = 30.0
_FEWEST_MOMENTS = 25

_PAUSE_BLOCKS = 6  # 120 ms: between words, not inside a plosive
_KEPT_PAUSE_BLOCKS = 3
_TIME_ERROR_SECONDS = 0.1

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
    NOT_SPEECH = 9
    TOO_SHORT = 8
    CUT_OFF = 7
    UNENDED = 6
    WRONG_WORDS = 5
    STUCK = 4
    TOO_LONG = 3
    DEAD = 2

    @property
    def label(self) -> str:
        """Its name in the log and in the metrics."""
        return self.name.lower().replace("_", " ")

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
    hearing: Hearing | None = None  # None if no recogniser checked it
    frames: Sequence[NDArray[np.int32]] = ()  # of codes

    @property
    def usable(self) -> bool:
        """Whether it may be played at all."""
        return not any(fault.unusable for fault in self.faults)

    @property
    def word_error_rate(self) -> float | None:
        """The share of wrong words, if a recogniser checked it."""
        return self.hearing.word_error_rate if self.hearing else None


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


class Pace:
    """The length of a voice's readings: estimated from its prompt, then also from its accepted segments.

    Args:
        transcript: The words of the prompt.
        seconds: The length of the prompt.
    """

    def __init__(self, transcript: str = "", seconds: float = 0.0) -> None:
        self._taken = self._expected = _PRIOR_SECONDS
        expected = _expected_seconds(transcript)[0]
        weight = min(1.0, _LONGEST_PROMPT_SECONDS / expected) if expected else 0.0
        self._learn(expected * weight, seconds * weight)

    def learn(self, text: str, samples: Samples) -> None:
        """Take an accepted reading of `text` into account."""
        self._learn(_expected_seconds(text)[0], _sounding_seconds(_levels(samples)))

    def shortest(self, text: str) -> float:
        """Return the shortest time in which the voice can read `text`, in seconds of sound."""
        return max(_SHORTEST_SECONDS, _TOO_SHORT * self._factor * _expected_seconds(text)[0] - _GRACE_SECONDS)

    def longest(self, text: str) -> float:
        """Return the longest time that the voice needs for `text`, in seconds of sound."""
        return _TOO_LONG * self._factor * _expected_seconds(text)[1] + _HESITATION_SECONDS

    def words_said(self, text: str) -> float:
        """Return after how many seconds of sound all words of `text` may have been said."""
        return max(self.shortest(text), _WORDS_SAID * self._factor * _expected_seconds(text)[0])

    def doubtful(self, text: str, samples: Samples) -> bool:
        """Return whether a reading is unusually short or long for `text`, though it may be right."""
        seconds = _sounding_seconds(_levels(samples))
        least, most = _expected_seconds(text)
        low, high = _DOUBTFUL
        return not low * self._factor * least - _DOUBTFUL_SECONDS <= seconds <= high * self._factor * most + _DOUBTFUL_SECONDS

    @property
    def _factor(self) -> float:
        """The voice's time over the built-in voice's."""
        low, high = _PACE_RANGE
        return min(max(self._taken / self._expected, low), high)

    def _learn(self, expected: float, taken: float) -> None:
        """Add a reading, unless its length says that the words are not all that was said."""
        if _TOO_SHORT * expected <= taken <= _TOO_LONG * expected:
            self._expected += expected
            self._taken += taken


def _expected_seconds(text: str) -> tuple[float, float]:
    """Return the least and the most seconds in which the built-in voice would read `text`."""
    syllables = _syllables(text)
    inner_ends = len(_SENTENCE_MARK.findall(text.strip()[:-1]))
    pauses = len(_CLAUSE_MARK.findall(text)) * _CLAUSE_SECONDS + inner_ends * _SENTENCE_SECONDS
    return syllables.fewest * _SYLLABLE_SECONDS + pauses, syllables.most * _SYLLABLE_SECONDS + pauses


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


def judge(text: str, samples: Samples, ended: bool, pace: Pace | None = None) -> tuple[Fault, ...]:
    """Return the faults of `samples` as speech of `text`.

    Args:
        text: The segment's text.
        samples: float32, shape (n,), 24 kHz.
        ended: Whether the model ended by itself.
        pace: The voice's; None for the built-in voice's.
    """
    if not len(samples):
        return (Fault.EMPTY,)
    if not np.isfinite(samples).all():
        return (Fault.NOT_FINITE,)
    levels = _levels(samples)
    if levels.max() < _amplitude(_SILENT_DBFS):
        return (Fault.SILENT,)
    pace = pace or Pace()
    first, last = _edges(levels)
    stuck = _stuck_start(samples) is not None
    found = {
        Fault.NOT_SPEECH: not stuck and _is_music(samples),
        Fault.TOO_SHORT: _sounding_seconds(levels) < pace.shortest(text),
        Fault.CUT_OFF: ended and _levels(samples[-_BLOCK:])[0] > levels.max() * _amplitude(_CUT_OFF_DB),
        Fault.UNENDED: not ended,
        Fault.STUCK: stuck,
        Fault.TOO_LONG: ended and _sounding_seconds(levels) > pace.longest(text),
        Fault.DEAD: any(end - start >= _DEAD_SECONDS * 1000 / _BLOCK_MS for start, end in _quiet_runs(levels[first:last])),
    }
    return tuple(fault for fault, is_there in found.items() if is_there)


def silent(samples: Samples) -> bool:
    """Return whether `samples`, shape (n,), are inaudible; NaN counts as audible."""
    return not len(samples) or bool(_levels(samples).max() < _amplitude(_SILENT_DBFS))


def best(attempts: Sequence[Attempt]) -> Attempt:
    """Return the attempt with the least severe faults, the earliest of equals."""
    return min(attempts, key=lambda attempt: sum(fault.value for fault in attempt.faults) + (attempt.word_error_rate or 0.0))


def repaired(text: str, attempt: Attempt, pace: Pace | None = None) -> Samples:
    """Return an attempt's samples without a stuck tone at the end, and, if the budget cut them off, only up to the end of the text.

    That is where the last right word ends, if a recogniser found it; else the first pause after the words can have been said.
    """
    samples = attempt.samples
    if Fault.STUCK in attempt.faults:
        samples = _without_stuck_tail(samples)
    if Fault.UNENDED not in attempt.faults:
        return samples
    if attempt.hearing and attempt.hearing.end is not None:
        return _to_quiet_block(samples, attempt.hearing.end)
    return _to_first_pause(samples, (pace or Pace()).words_said(text))


def _without_stuck_tail(samples: Samples) -> Samples:
    """Return `samples` up to a sound that stays the same until the end; unchanged if there is none."""
    start = _stuck_start(samples)
    if start is None or _stuck_start(samples[-round(_STUCK_SECONDS * SAMPLE_RATE) - _WINDOW :]) is None:
        return samples
    return samples[:start] if start else samples


def _to_first_pause(samples: Samples, at_least: float) -> Samples:
    """Return `samples` up to the first pause that begins after `at_least` seconds of sound; unchanged if there is none."""
    levels = _levels(samples)
    first = _edges(levels)[0] if len(levels) else 0
    earliest = first + at_least * 1000 / _BLOCK_MS
    starts = (start for start, end in _quiet_runs(levels) if start >= earliest and end - start >= _PAUSE_BLOCKS)
    start = next(starts, None)
    return samples if start is None else samples[: (start + _KEPT_PAUSE_BLOCKS) * _BLOCK]


def _to_quiet_block(samples: Samples, seconds: float) -> Samples:
    """Return `samples` up to the quietest block near `seconds`: a recogniser's times are exact to 0.1 s or so."""
    levels = _levels(samples)
    near = round((seconds - _TIME_ERROR_SECONDS) * 1000 / _BLOCK_MS), round((seconds + 2 * _TIME_ERROR_SECONDS) * 1000 / _BLOCK_MS)
    first = min(max(0, near[0]), len(levels) - 1)
    quietest = first + int(np.argmin(levels[first : max(near[1], first + 1)]))
    return samples[: (quietest + 1) * _BLOCK]


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


def _sounding_seconds(levels: NDArray[np.float64]) -> float:
    """Return the seconds from the first to the last block with sound."""
    first, last = _edges(levels) if len(levels) else (0, 0)
    return (last - first) * _BLOCK_MS / 1000


class _QuietBlocks:
    """Tells quiet blocks from sound: by their level below the loudest block, unless they rise and fall as speech does.

    Args:
        loudest: The loudest block's level, where it is known before.
    """

    def __init__(self, loudest: float = 0.0) -> None:
        self._loudest = loudest
        self._lowest = np.inf  # since the last sound

    def quiet(self, level: float) -> bool:
        """Return whether the next block, which has this level, is quiet."""
        self._loudest = max(self._loudest, level)
        speech = level > max(_amplitude(_QUIET_DBFS), self._lowest * _amplitude(_SPEECH_RISE_DB))
        if speech and level < _threshold(self._loudest):
            self._loudest = level * _amplitude(-_QUIET_BELOW_LOUDEST_DB - _SPEECH_RANGE_DB)
        if speech or level >= _threshold(self._loudest):
            self._lowest = np.inf
            return False
        self._lowest = min(self._lowest, level)
        return True


def _quiet_runs(levels: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Return the ranges of quiet blocks, [start, end) each."""
    if not len(levels):
        return []
    blocks = _QuietBlocks(float(levels.max()))
    quiet = np.concatenate([[False], [blocks.quiet(float(level)) for level in levels], [False]])
    changes = np.flatnonzero(np.diff(quiet.astype(np.int8)))
    return [(int(start), int(end)) for start, end in zip(changes[::2], changes[1::2], strict=True)]


def _is_music(samples: Samples) -> bool:
    """Return whether too many moments of `samples` sound the same a little later: notes or tones, not speech."""
    if len(samples) < _NOTE_WINDOW + (_NOTE_LAG + _FEWEST_MOMENTS) * _NOTE_HOP:
        return False
    windows = np.lib.stride_tricks.sliding_window_view(samples, _NOTE_WINDOW)[::_NOTE_HOP] * np.hanning(_NOTE_WINDOW).astype(np.float32)
    spectra = np.abs(np.fft.rfft(windows, axis=1))[:, _NOTE_BINS]
    sizes = np.linalg.norm(spectra, axis=1)
    heard = sizes > sizes.max() * _amplitude(-_NOTE_RANGE_DB)
    compared = heard[_NOTE_LAG:] & heard[:-_NOTE_LAG]
    products = (spectra[_NOTE_LAG:] * spectra[:-_NOTE_LAG]).sum(axis=1)
    same = products > _SAME_SPECTRUM * sizes[_NOTE_LAG:] * sizes[:-_NOTE_LAG]
    return int(compared.sum()) >= _FEWEST_MOMENTS and bool(same[compared].mean() > _MOST_SAME)


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
        self._blocks = _QuietBlocks()
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
        if not self._blocks.quiet(level):
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
