"""Captions, the text of each segment with its time, as JSON, WebVTT and SRT."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from audio_joiner import SegmentTimestamp

_KEPT_ANSWERS = 64


@dataclass(frozen=True)
class Caption:
    """A segment's text, and its start and end in seconds from the start of the audio."""

    group: int
    text: str
    start: float
    end: float


def captions_of(segments: Sequence[str], timestamps: Sequence[SegmentTimestamp], speed: float) -> list[Caption]:
    """Return the captions of an utterance. `timestamps` are at normal speed; the captions are at `speed`."""
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
    """Return `{"captions": [{"group", "text", "start", "end"}]}`."""
    return {"captions": [asdict(caption) for caption in captions]}


def to_webvtt(captions: Sequence[Caption]) -> str:
    """Return a WebVTT file (W3C WebVTT, section 4)."""
    cues = [f"{_clock(c.start, '.')} --> {_clock(c.end, '.')}\n{_escape(c.text)}\n" for c in captions]
    return "\n".join(["WEBVTT\n", *cues])


def to_srt(captions: Sequence[Caption]) -> str:
    """Return a SubRip file."""
    return "\n".join(f"{number}\n{_clock(c.start, ',')} --> {_clock(c.end, ',')}\n{c.text}\n" for number, c in enumerate(captions, 1))


class CaptionStore:
    """Keeps the captions of the last 64 answers, in memory only, because they contain the spoken text."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, list[Caption]] = OrderedDict()

    def keep(self, key: str, captions: list[Caption]) -> None:
        """Keep the captions of an answer under a `new_key()`."""
        self._answers[key] = captions
        while len(self._answers) > _KEPT_ANSWERS:
            self._answers.popitem(last=False)

    def get(self, key: str) -> list[Caption] | None:
        """Return the captions under `key`; None if there are none, or newer answers have replaced them."""
        return self._answers.get(key)


def new_key() -> str:
    """Return an unguessable id for an answer's captions."""
    return uuid.uuid4().hex


def _clock(seconds: float, separator: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{separator}{rest % 1000:03d}"


def _escape(text: str) -> str:
    """Escape what WebVTT reads as markup (& and <) or as the end of the text (-->)."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
