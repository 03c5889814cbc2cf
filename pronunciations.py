"""The owner's pronunciations: `pronunciations.json` beside the presets says how words and phrases are spoken."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import regex
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from errors import shorten
from files import read_json

FILE = "pronunciations.json"
"""Its name, in the folder of the presets."""

_MAX_BYTES = 256 * 1024
_MAX_WORD = 100
_MAX_SPOKEN = 200
# The signs that hibari's voices know: IPA, and capitals for diphthongs.
PHONEMES = "̃ʣʥʦʨᵝꭧAIOQSTWYᵊabcdefhijklmnopqrstuvwxyzɑɐɒæβɔɕçɖðʤəɚɛɜɟɡɥɨɪʝɯɰŋɳɲɴøɸθœɹɾɻʁɽʂʃʈʧʊʋʌɣɤχʎʒʔˈˌːʰʲ↓→↗↘ᵻ"
# Usual IPA, in the signs of which the voices have heard most in their training; longer ones first.
_USUAL = {
    **{"eɪ": "A", "aɪ": "I", "oʊ": "O", "əʊ": "Q", "aʊ": "W", "ɔɪ": "Y", "tʃ": "ʧ", "dʒ": "ʤ"},
    **{"ɝ": "ɜɹ", "ɚ": "əɹ", "r": "ɹ", "g": "ɡ", "ɫ": "l", "'": "ˈ", "’": "ˈ", ",": "ˌ", ":": "ː", ".": "", "-": ""},
}
_TIE = "\u0361"

Pronounce = Callable[[str], Iterator[tuple[int, int, str]]]
"""Takes a text and yields the start and end of each word that has a pronunciation, and what is spoken in its place."""


class Pronunciation(BaseModel):
    """How a word or phrase is spoken.

    Attributes:
        say: Written as it should be read, for all voices.
        ipa: Its phonemes, for voices that take them; they use `say` no more.
        case_sensitive: Only this spelling, upper and lower case included.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    say: str | None = Field(None, min_length=1, max_length=_MAX_SPOKEN)
    ipa: str | None = Field(None, min_length=1, max_length=_MAX_SPOKEN)
    case_sensitive: bool = False


_FILE_CONTENT: TypeAdapter[dict[str, str | Pronunciation]] = TypeAdapter(dict[str, str | Pronunciation])


class Pronunciations:
    """An immutable set of pronunciations.

    Args:
        entries: By word or phrase, in Unicode's normal form C. `ipa` is in `PHONEMES`.
    """

    def __init__(self, entries: Mapping[str, Pronunciation] | None = None) -> None:
        entries = entries or {}
        self._exact = {word: entry for word, entry in entries.items() if entry.case_sensitive}
        self._folded = {word.casefold(): entry for word, entry in entries.items() if not entry.case_sensitive}
        # The longest first, so that a phrase goes before its first word.
        words = sorted(entries, key=len, reverse=True)
        alternatives = "|".join(regex.escape(word, literal_spaces=True) for word in words)
        self._pattern = regex.compile(rf"(?i)(?<![\p{{L}}\p{{M}}\p{{N}}])(?:{alternatives})(?![\p{{L}}\p{{M}}\p{{N}}])") if words else None

    def pronounce(self, *, phonemes: bool) -> Pronounce | None:
        """Return the function that finds the words of a text; None if there are no pronunciations.

        Args:
            phonemes: The voice takes phonemes, as `[word](/phonemes/)`.
        """
        pattern = self._pattern
        if pattern is None:
            return None

        def find(text: str) -> Iterator[tuple[int, int, str]]:
            for match in pattern.finditer(text):
                entry = self._exact.get(match[0]) or self._folded.get(match[0].casefold())
                if entry and entry.ipa and phonemes:
                    yield *match.span(), f"[{regex.sub(r'[][()]', '', match[0])}](/{entry.ipa}/)"
                elif entry and entry.say:
                    yield *match.span(), entry.say

        return find

    def said(self, word: str) -> str:
        """Return how a word is written as it should be read; the word itself if only its phonemes are known, or nothing."""
        entry = self._exact.get(word) or self._folded.get(word.casefold())
        return entry.say if entry and entry.say else word


def read_pronunciations(path: Path) -> Pronunciations:
    """Read and check the file; without one there are no pronunciations.

    Raises:
        ValueError: It is invalid; the message has the word and the reason.
    """
    try:
        content = _FILE_CONTENT.validate_python(read_json(path, _MAX_BYTES))
    except FileNotFoundError:
        return Pronunciations()
    except OSError as error:
        raise ValueError(f"the file cannot be read: {error.strerror or type(error).__name__}") from None
    except ValidationError as error:
        fault = error.errors(include_url=False)[-1]
        word = shorten(fault["loc"][0]) if fault["loc"] else "the file"
        form = 'must be a respelling, or "/IPA/", or {"say": …, "ipa": …, "case_sensitive": true}'
        raise ValueError(f"{word} {form}" if fault["loc"] else 'the file must hold one JSON object, {"word": "respelling"}') from None
    return Pronunciations(_checked(content))


def _checked(content: Mapping[str, str | Pronunciation]) -> dict[str, Pronunciation]:
    entries: dict[str, Pronunciation] = {}
    seen: set[tuple[bool, str]] = set()
    for word, given in content.items():
        if isinstance(given, str) and len(given) > _MAX_SPOKEN:
            raise ValueError(f"{shorten(word)}: a pronunciation has at most {_MAX_SPOKEN} characters")
        entry = _entry(given) if isinstance(given, str) else given
        plain = " ".join(unicodedata.normalize("NFC", word).split())
        key = plain if entry.case_sensitive else plain.casefold()
        if not 0 < len(plain) <= _MAX_WORD or not regex.search(r"[\p{L}\p{N}]", plain):
            raise ValueError(f"{shorten(word)}: a word or phrase must have 1 to {_MAX_WORD} characters, one of them a letter or digit")
        if (entry.case_sensitive, key) in seen:
            raise ValueError(f"{shorten(word)} is there twice; only words with case_sensitive may differ in case alone")
        if not entry.say and not entry.ipa:
            raise ValueError(f"{shorten(word)} has neither say nor ipa")
        seen.add((entry.case_sensitive, key))
        entries[plain] = entry.model_copy(update={"ipa": _phonemes(word, entry.ipa)}) if entry.ipa else entry
    return entries


def _entry(given: str) -> Pronunciation:
    phonetic = len(given) > 2 and given.startswith("/") and given.endswith("/")
    return Pronunciation(ipa=given[1:-1]) if phonetic else Pronunciation(say=given or None)


def _phonemes(word: str, ipa: str) -> str:
    """Return IPA in the signs of the voices."""
    text = unicodedata.normalize("NFC", ipa.strip().strip("/")).replace(_TIE, "")
    for usual, ours in _USUAL.items():
        text = text.replace(usual, ours)
    if unknown := next((sign for sign in text if sign != " " and sign not in PHONEMES), None):
        raise ValueError(f"{shorten(word)}: no voice knows the sign {shorten(unknown)} of its ipa")
    return text
