"""Captions: which part of the text is heard when, as JSON, WebVTT and SRT."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from audio_joiner import SegmentTimestamp

_KEPT_ANSWERS = 64


@dataclass(frozen=True)
class Caption:
    """A segment's text and when it is heard, in seconds from the start of the audio."""

    group: int
    text: str
    start: float
    end: float


def captions_of(segments: Sequence[str], timestamps: Sequence[SegmentTimestamp], speed: float) -> list[Caption]:
    """The captions of an utterance, in the audio's own time: at double speed everything is heard in half of it."""
    return [
        Caption(
            timestamp.segment,
            " ".join(segments[timestamp.segment].split()),
            round(timestamp.start / speed, 3),
            round(timestamp.end / speed, 3),
        )
        for timestamp in timestamps
    ]


def to_json(captions: Sequence[Caption]) -> dict[str, list[dict[str, object]]]:
    """`{"captions": [{"group", "text", "start", "end"}]}`."""
    return {"captions": [asdict(caption) for caption in captions]}


def to_webvtt(captions: Sequence[Caption]) -> str:
    """A WebVTT file (W3C WebVTT, section 4)."""
    cues = [f"{_clock(c.start, '.')} --> {_clock(c.end, '.')}\n{_escape(c.text)}\n" for c in captions]
    return "\n".join(["WEBVTT\n", *cues])


def to_srt(captions: Sequence[Caption]) -> str:
    """A SubRip file."""
    return "\n".join(f"{number}\n{_clock(c.start, ',')} --> {_clock(c.end, ',')}\n{c.text}\n" for number, c in enumerate(captions, 1))


class CaptionStore:
    """The captions of the last answers, in memory only: they hold the spoken text."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, list[Caption]] = OrderedDict()

    def keep(self, key: str, captions: list[Caption]) -> None:
        """Keep an answer's captions under a `new_key()`."""
        self._answers[key] = captions
        while len(self._answers) > _KEPT_ANSWERS:
            self._answers.popitem(last=False)

    def get(self, key: str) -> list[Caption] | None:
        """The captions kept under `key`, unless newer answers have taken their place."""
        return self._answers.get(key)


def new_key() -> str:
    """An id for an answer's captions, which cannot be guessed."""
    return uuid.uuid4().hex


def _clock(seconds: float, separator: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{separator}{rest % 1000:03d}"


def _escape(text: str) -> str:
    """WebVTT reads & and < as markup, and --> as the end of the text."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
