"""The built-in voice: hibari, whose wheel contains the model, so nothing is downloaded."""

from __future__ import annotations

import importlib.metadata
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import regex

from audio_formats import SAMPLE_RATE
from speech_model import LoadProgress, ModelLoadError, SegmentChunk, SegmentLengths, SpeechOptions
from voice_presets import Voice

# hibari reads Greek and Cyrillic by the names of the letters, and skips those of other scripts.
_UNKNOWN_LETTER = regex.compile(r"[\p{L}--[\p{Latin}\p{Common}μΩπ]]", regex.V1)
_ACCENTED_WORD = regex.compile(r"[\p{Latin}\p{M}'’]*[[\p{Latin}]--[A-Za-z]][\p{Latin}\p{M}'’]*", regex.V1)
# Its table takes a word at a sentence's end for an abbreviation.
_NO = re.compile(r"\b([Nn]os?)\.(?!\s?\d)")
# Names that neither its lexicon nor its spelling rules get right, in its phonemes.
_NAMES = {
    "José": "hOzˈA",
    "Beyoncé": "biˈɑnsA",
    "Dvořák": "dvˈɔɹʒɑk",
    "Łódź": "wˈʊʧ",
    "São": "sˈW",
    "Zoë": "zˈOi",
    "Chloë": "klˈOi",
    "Renée": "ɹənˈA",
    "André": "ˈɑndɹA",
    "Curaçao": "kjˈʊɹəsW",
}
_NUMBER = re.compile(r"\d[\d,]*")
_LONGEST_NUMBER = 36  # digits: hibari has words up to decillions


class HibariModel:
    """hibari as a `SpeechModel`."""

    id = "hibari"
    sample_rate = SAMPLE_RATE
    # One sentence a segment: hibari speaks sentence by sentence anyway, in about 50 ms each. It splits a sentence of more than 400
    # phonemes itself; splitting it earlier keeps our own pauses.
    segment_lengths = SegmentLengths(target=1, maximum=320, first=1)

    def __init__(self) -> None:
        self._voice: Any = None
        self._pronunciation = _Pronunciation()

    def load(self, report: Callable[[LoadProgress], None]) -> None:
        """Load the model and the lexicons from the package (0.3 s).

        Raises:
            ModelLoadError: The package is damaged or missing.
        """
        report(LoadProgress("loading the built-in voice"))
        # onnxruntime 1.32 starts a telemetry session in every process unless this is set.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        try:
            from hibari import Hibari

            self._voice = Hibari(g2p=self._pronunciation)
        except Exception as error:
            raise ModelLoadError(
                f"The built-in voice could not be loaded ({type(error).__name__}): install the pinned packages again with `make setup`.",
                retry=False,
            ) from error

    def warm_up(self, voices: Sequence[Voice]) -> None:
        """Speak one word: hibari loads its lexicons and its tagger with the first one."""
        self._voice("Hello.")

    def refusal(self, text: str) -> str | None:
        """Refuse a text with letters that hibari cannot pronounce: it would skip them silently."""
        letter = _UNKNOWN_LETTER.search(text)
        if letter is None:
            return None
        script = unicodedata.name(letter[0], "unknown").split()[0].capitalize().replace("Cjk", "Chinese")
        return f"this voice speaks English and cannot pronounce {script} letters. Remove them, write them in Latin letters, or use another model's voice."

    def fits(self, text: str, voice: Voice) -> bool:
        """Return True: hibari has no context limit."""
        return True

    def speak(self, segments: Sequence[str], voice: Voice, options: SpeechOptions, cancelled: Callable[[], bool]) -> Iterator[SegmentChunk]:
        """Speak each segment; the utterance's seed and the segment's index seed the voice's noise."""
        self._pronunciation.verbalized = options.verbalize is True
        for index, segment in enumerate(segments):
            for samples in self._voice.stream(_speakable(segment), seed=[options.seed, index]):
                if cancelled():
                    return
                yield SegmentChunk(index, samples, last=False)
            yield SegmentChunk(index, np.zeros(0, np.float32), last=True)

    def info(self) -> dict[str, Any]:
        """Return details for `/health`."""
        version = importlib.metadata.version("hibari-tts")
        return {"source": f"hibari-tts {version}", "dtype": "int8", "sample_rate": self.sample_rate, "watermark": False}

    def close(self) -> None:
        """Free the model."""
        self._voice = None


class _Pronunciation:
    """hibari's text to phonemes.

    Attributes:
        verbalized: The text is in words already, so hibari's own reading of numbers and abbreviations, which mistakes words for them, is off.
    """

    def __init__(self) -> None:
        self.verbalized = False
        self._g2p: Any = None

    def __call__(self, text: str) -> str:
        """Return the phonemes of a sentence."""
        if self._g2p is None:
            from hibari.g2p import G2P

            self._g2p = G2P()
        if self.verbalized:
            text = _ACCENTED_WORD.sub(lambda word: self._accented(word[0]), " ".join(text.split()))
        phonemes: str = self._g2p(text, normalize_text=not self.verbalized)
        return phonemes

    def _accented(self, word: str) -> str:
        """Return a word with accents as hibari says it best: from our table, or without accents where only that is in its lexicon."""
        if word in _NAMES:
            return f"[{word}](/{_NAMES[word]}/)"
        plain = "".join(sign for sign in unicodedata.normalize("NFKD", word) if not unicodedata.combining(sign))
        lexicon = self._g2p.lexicon
        known = [form in lexicon.golds or form in lexicon.silvers for form in (word, word.lower(), plain, plain.lower())]
        return plain if plain.isascii() and not any(known[:2]) and any(known[2:]) else word


def _speakable(text: str) -> str:
    """Replace what makes hibari 0.2.1 raise: circled, superscript and subscript digits, and numbers that it has no word for."""
    plain = "".join(str(unicodedata.digit(sign)) if sign.isdigit() and not sign.isdecimal() else sign for sign in text)
    return _NUMBER.sub(lambda number: _spelled(number[0]), _NO.sub(r"\1 .", plain))


def _spelled(number: str) -> str:
    digits = number.replace(",", "")
    return number if len(digits) <= _LONGEST_NUMBER else " ".join(digits)
