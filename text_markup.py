"""Instructions inside a text: pauses, voice tags and SSML.

`[pause:1.5s]` and `<break time="1.5s"/>` are silence, `[voice:NAME]` changes the voice. `prepare` cleans the text around them and writes all of
them in the bracket form; `passages` cuts the result at them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

import regex

from errors import InvalidInputError
from text_normalizer import has_speech

MAX_PAUSE = 10.0
"""Seconds of one pause."""

MAX_PAUSES = 60.0
"""Seconds of all pauses of a text."""

_BREAK_SECONDS = "0.5s"  # of <break/> without a time
_MARK = regex.compile(r"(?i)\[\s*+(pause|voice)\s*+:([^\[\]\n]{0,200}+)\]")
_BREAK = regex.compile(r"(?i)<break\b([^<>]*)>(?:\s*</break\s*>)?")
_TIME_ATTRIBUTE = regex.compile(r"""(?i)\btime\s*=\s*["']?\s*([^"'\s/>]+)""")
_TIME = regex.compile(r"(?i)\+?(\d{1,6}(?:\.\d{0,6})?|\.\d{1,6})\s*(ms|s)")
_SPEAK = regex.compile(r"(?i)\s*(?:<\?xml[^<>]*\?>\s*)?<speak\b[^<>]*>")
_SSML_TAG = regex.compile(r"(?s)<!--.*?(?:-->|\Z)|<\?[^<>]*\?>|</?([A-Za-z][\w:.-]*)[^<>]*>")
_PARAGRAPHS = ("p", "s")
# What ends a sentence or clause goes before a pause: no passage begins with it.
_ENDS = ".,;:!?…。，、；：！？"
_END = rf"[{_ENDS}]+[\"'”’)\]]*+(?!\S)"
_PUNCTUATION = rf"({_END}(?:[ \t]++{_END})*+)"


@dataclass(frozen=True)
class Passage:
    """A part of a text between two instructions.

    Attributes:
        text: To be spoken; empty for a pause at the text's end.
        pause: Seconds of silence before it; None: whatever is usual between two sentences.
        voice: The name of its voice; None: the voice of the request.
    """

    text: str
    pause: float | None = None
    voice: str | None = None


def prepare(text: str, normalize: Callable[[str], str]) -> str:
    """Return `text` after `normalize`, with its instructions in the bracket form; the same again if it is prepared again.

    SSML is read if the text begins with `<speak>`: other tags than `<break>` are dropped, their text is kept. `<break>` works in any text.
    """
    if "[" not in text and "<" not in text:
        return normalize(text)
    text = _BREAK.sub(_as_pause, text)
    if _SPEAK.match(text):
        text = _SSML_TAG.sub(lambda tag: "\n\n" if (tag[1] or "").lower() in _PARAGRAPHS else "", text)
    if not _MARK.search(text):
        return normalize(text)
    # For `normalize`, a mark is a word like any other: so it stays where it is, in lists, tables and emphasis.
    key = _unused_word(text)
    marks: list[str] = []

    def hide(mark: regex.Match[str]) -> str:
        marks.append(f"[{mark[1].lower()}:{mark[2].strip()}]")
        before, after = text[max(0, mark.start() - 1) : mark.start()], text[mark.end() : mark.end() + 1]
        return f"{_gap(before)}{key}{len(marks) - 1}{key}{_gap(after)}"

    word = rf"{key}\d+{key}"
    run = rf"(?<![ \t])(?<!{key}[ \t]*)[ \t]*+({word}(?:[ \t]*+{word})*+)[ \t]*+{_PUNCTUATION}"
    prepared = regex.sub(run, _after_punctuation, normalize(_MARK.sub(hide, text)))
    shown: str = regex.sub(word, lambda hidden: marks[int(hidden[0][len(key) : -len(key)])], prepared)
    return shown.strip()


def passages(text: str) -> list[Passage]:
    """Return a text from `prepare`, cut at its instructions.

    Raises:
        InvalidInputError: A pause is too long or no time, or all are too long together. The message never has the text.
    """
    found: list[Passage] = []
    pause: float | None = None
    voice: str | None = None
    total = 0.0
    position = 0
    for mark in (*_MARK.finditer(text), None):
        words = text[position : mark.start() if mark else len(text)]
        if has_speech(words):
            found.append(Passage(words, pause, voice))
            pause = None
        if mark is None:
            break
        position = mark.end()
        if mark[1].lower() == "voice":
            voice = mark[2].strip()
        else:
            seconds = _seconds(mark[2])
            pause = (pause or 0.0) + seconds
            total += seconds
    if total > MAX_PAUSES:
        raise InvalidInputError(
            f"The pauses in 'input' are {total:g} s long together: at most {MAX_PAUSES:g} s are allowed.", param="input"
        )
    return found if pause is None else [*found, Passage("", pause, voice)]


def without_marks(text: str) -> str:
    """Return a text from `prepare` without its instructions."""
    plain: str = _MARK.sub(" ", text)
    return plain


def blanked(text: str) -> str:
    """Return the text of a request with spaces in place of its instructions and SSML tags: each word stays at its offset."""

    def blank(found: regex.Match[str]) -> str:
        return " " * len(found[0])

    if "[" not in text and "<" not in text:
        return text
    tags = _SSML_TAG if _SPEAK.match(text) else _BREAK
    readable: str = _MARK.sub(blank, tags.sub(blank, text))
    return readable


def with_voices(pieces: list[str]) -> list[str]:
    """Return the pieces of a prepared text, each beginning with the voice tag that it was cut off from."""
    result: list[str] = []
    voice = ""
    for piece in pieces:
        tags = [mark for mark in _MARK.finditer(piece) if mark[1].lower() == "voice"]
        begins = bool(tags) and not has_speech(without_marks(piece[: tags[0].start()]))
        result.append(piece if begins or not voice else f"{voice} {piece}")
        voice = last_voice(piece) or voice
    return result


def last_voice(text: str) -> str:
    """Return the last voice tag of a text, as it is written there; empty if there is none."""
    return next((str(mark[0]) for mark in reversed(list(_MARK.finditer(text))) if mark[1].lower() == "voice"), "")


def stretch(text: str, factor: float) -> str:
    """Return a prepared text with pauses `factor` times as long, for audio that is made `factor` times as fast later.

    Raises:
        InvalidInputError: A pause is too long or no time.
    """

    def longer(mark: regex.Match[str]) -> str:
        if mark[1].lower() != "pause":
            return str(mark[0])
        seconds = _seconds(mark[2]) * factor
        parts = max(1, -int(-seconds // MAX_PAUSE))
        return " ".join([f"[pause:{seconds / parts:.6f}s]"] * parts)

    stretched: str = _MARK.sub(longer, text)
    return stretched


def _seconds(time: str) -> float:
    match = _TIME.fullmatch(time.strip())
    if match is None:
        raise InvalidInputError("A pause in 'input' has no valid time. Write it as [pause:1.5s] or [pause:400ms].", param="input")
    seconds = float(Decimal(match[1]) / (1000 if match[2].lower() == "ms" else 1))
    if seconds > MAX_PAUSE:
        raise InvalidInputError(f"A pause in 'input' is {seconds:g} s long: at most {MAX_PAUSE:g} s are allowed.", param="input")
    return seconds


def _as_pause(tag: regex.Match[str]) -> str:
    time = _TIME_ATTRIBUTE.search(tag[1])
    return f"[pause:{time[1] if time else _BREAK_SECONDS}]"


def _after_punctuation(run: regex.Match[str]) -> str:
    """Return marks after the punctuation that follows them; without it if there is some before them."""
    ended = run.string[max(0, run.start() - 1) : run.start()] in tuple(_ENDS)
    return f" {run[1]}" if ended else f"{run[2]} {run[1]}"


def _gap(neighbour: str) -> str:
    """Return a space, unless there is one or emphasis begins or ends here, which would lose its meaning beside a space."""
    return "" if not neighbour or neighbour.isspace() or neighbour in "*_~" else " "


def _unused_word(text: str) -> str:
    word = "zqx"
    while word in text:
        word += "q"
    return word
