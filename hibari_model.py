"""The built-in voice: hibari, which ships inside its wheel and needs no download."""

from __future__ import annotations

import importlib.metadata
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import regex

from speech_model import LoadProgress, ModelLoadError, SegmentChunk, SegmentLengths, SpeechOptions
from voice_presets import Voice

# Measured: of Latin, Greek and Cyrillic letters hibari makes some sound, of all others none.
_SOUNDLESS = regex.compile(r"[\p{L}--[\p{Latin}\p{Greek}\p{Cyrillic}\p{Common}]]", regex.V1)
_NUMBER = re.compile(r"\d[\d,]*")
_LONGEST_NUMBER = 36  # digits: hibari counts to decillions


class HibariModel:
    """hibari behind the shape of a `SpeechModel`."""

    id = "hibari"
    sample_rate = 24_000
    # One sentence a segment: the voice says sentences one at a time anyway, and each is out after some 50 ms. It has no context to
    # overflow, but longer than 400 phonemes it breaks a sentence itself, so we break it first, where our own pause rules hold.
    segment_lengths = SegmentLengths(target=1, maximum=320, first=1)

    def __init__(self) -> None:
        self._voice: Any = None

    def load(self, report: Callable[[LoadProgress], None]) -> None:
        """Read the model and the lexicons from the package (0.3 s).

        Raises:
            ModelLoadError: The package is damaged or missing.
        """
        report(LoadProgress("reading the built-in voice"))
        # onnxruntime 1.32 begins a telemetry session in every process unless told not to.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        try:
            from hibari import Hibari

            self._voice = Hibari()
        except Exception as error:
            raise ModelLoadError(
                f"The built-in voice could not be read ({type(error).__name__}): install the pinned packages again with `make setup`.",
                retry=False,
            ) from error

    def warm_up(self, voices: Sequence[Voice]) -> None:
        """Say a word: the lexicons and the tagger are read at the first one."""
        self._voice("Hello.")

    def refusal(self, text: str) -> str | None:
        """hibari leaves out, without a word, letters of which it knows no sound: such a text is refused, not spoken in part."""
        letter = _SOUNDLESS.search(text)
        if letter is None:
            return None
        script = unicodedata.name(letter[0], "unknown").split()[0].capitalize().replace("Cjk", "Chinese")
        return f"this voice speaks English and has no sound for {script} letters. Leave them out, write them in Latin letters, or use another model's voice."

    def fits(self, text: str, voice: Voice) -> bool:
        """Always: this voice has no context to overflow."""
        return True

    def speak(self, segments: Sequence[str], voice: Voice, options: SpeechOptions, cancelled: Callable[[], bool]) -> Iterator[SegmentChunk]:
        """Say each segment; the noise in the voice is seeded by the utterance's seed and the segment's index."""
        for index, segment in enumerate(segments):
            for samples in self._voice.stream(_sayable(segment), seed=[options.seed, index]):
                if cancelled():
                    return
                yield SegmentChunk(index, samples, last=False)
            yield SegmentChunk(index, np.zeros(0, np.float32), last=True)

    def info(self) -> dict[str, Any]:
        """Facts for `/health`."""
        version = importlib.metadata.version("hibari-tts")
        return {"source": f"hibari-tts {version}", "dtype": "int8", "sample_rate": self.sample_rate, "watermark": False}

    def close(self) -> None:
        """Let the model go."""
        self._voice = None


def _sayable(text: str) -> str:
    """`text` without the two things at which hibari 0.2.1 raises: a number it has no word for, and digits in circles, raised or lowered."""
    plain = "".join(str(unicodedata.digit(sign)) if sign.isdigit() and not sign.isdecimal() else sign for sign in text)
    return _NUMBER.sub(lambda number: _spelt(number[0]), plain)


def _spelt(number: str) -> str:
    digits = number.replace(",", "")
    return number if len(digits) <= _LONGEST_NUMBER else " ".join(digits)
