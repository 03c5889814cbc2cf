"""Find the words that a voice says wrong: have a speech recogniser hear each of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
import regex
from anyio import to_thread

from pronunciations import Pronunciations
from say_reading import Speaker
from transcription import HeardWord, Recognizer, compare

# A recogniser hears a word in a sentence far better than alone (docs/LOG.md).
_SENTENCE = "The word is {}."
_BEFORE = regex.compile(r"(?i)^\W*the word is\W*")


@dataclass(frozen=True)
class CheckedWord:
    """A word or phrase, and what the recogniser heard in its place.

    Attributes:
        word: As it was given.
        heard: What was heard.
        right: Whether that is the word, or its respelling.
    """

    word: str
    heard: str
    right: bool


def words_of(text: str) -> list[str]:
    """Return the words and phrases of a file, one a line, each once."""
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


async def check_words(
    words: Sequence[str], speaker: Speaker, recognizer: Recognizer, known: Pronunciations, seed: int
) -> AsyncIterator[CheckedWord]:
    """Speak each word and yield what is heard.

    Raises:
        TTSError: The speaker failed.
    """
    for word in words:
        async with aclosing(speaker.speak(_SENTENCE.format(word), seed)) as parts:
            samples = np.concatenate([np.zeros(0, np.float32), *[part.samples async for part in parts]])
        heard = await to_thread.run_sync(recognizer.transcribe, samples)
        expected = {word, known.said(word)}
        right = any(compare(_SENTENCE.format(each), [HeardWord(heard)]).word_error_rate == 0 for each in expected)
        yield CheckedWord(word, _BEFORE.sub("", heard).strip(" ."), right)
