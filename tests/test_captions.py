"""When each word is heard, and where it is in the text that the caller sent."""

from __future__ import annotations

import json
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import RunningServer
from listening import _whisper, decode

from captions import WordFinder
from text_normalizer import normalize_text

MARKDOWN = """  # A **bold** plan

- Pay $5.20 on Dec 2, not before.
- See [the guide](https://example.com/a/b) & don't worry.

```python
skipped = 1
```
The dog’s bowl isn't "empty": it is 50% full."""
HEARD = [
    "bold",
    "plan",
    "Pay",
    "$5.20",
    "on",
    "Dec_2",
    "not",
    "before",
    "See",
    "the",
    "guide",
    "don't",
    "worry",
    "The",
    "dog’s",
    "bowl",
    "isn't",
    "empty",
    "it",
    "is",
    "50%",
    "full",
]


def speak(server: RunningServer, text: str, **fields: Any) -> httpx.Response:
    body = {"model": "m", "voice": "heart", "input": text, "response_format": "wav", "timestamps": "word", "seed": 3} | fields
    return httpx.post(f"{server.url}/v1/audio/speech", json=body, timeout=60)


def document(server: RunningServer, answer: httpx.Response, form: str = "json") -> str:
    return httpx.get(f"{server.url}{answer.headers['X-Timestamps']}", params={"format": form}).text


def check(words: list[dict[str, Any]], text: str, seconds: float) -> None:
    """The words are in order, do not overlap, quote the text, and end with the audio."""
    assert words
    for word in words:
        assert word["text"] == text[word["start_char"] : word["end_char"]]
        assert word["start"] < word["end"]
    for one, next_ in pairwise(words):
        assert one["end"] <= next_["start"]
        assert one["end_char"] <= next_["start_char"]
    assert words[-1]["end"] == pytest.approx(seconds, abs=0.001)


@pytest.mark.parametrize("speed", [1.0, 1.5])
def test_words_are_found_in_the_callers_markdown(server: RunningServer, speed: float) -> None:
    answer = speak(server, MARKDOWN, speed=speed)
    timestamps = json.loads(document(server, answer))
    samples, rate = decode(answer.content, "wav")
    check(timestamps["words"], MARKDOWN, len(samples) / rate)
    heard = [word["text"] for word in timestamps["words"]]
    assert [word.replace(" ", "_") for word in heard if word not in {"A", "&"}] == HEARD
    groups = {caption["group"]: caption for caption in timestamps["captions"]}
    assert all(groups[word["group"]]["start"] <= word["start"] <= groups[word["group"]]["end"] for word in timestamps["words"])


def test_files_have_a_cue_for_each_word(server: RunningServer) -> None:
    answer = speak(server, "Two words.")
    vtt, srt = (document(server, answer, form) for form in ("vtt", "srt"))
    assert [line for line in vtt.splitlines() if line and "-->" not in line] == ["WEBVTT", "Two", "words"]
    assert srt.splitlines()[2] == "Two"
    assert "words" not in json.loads(document(server, speak(server, "Two words.", timestamps=True)))


def test_events_have_the_words_of_their_sentence(server: RunningServer) -> None:
    text = "One is here. Two are there."
    answer = speak(server, text, stream_format="sse", response_format="pcm")
    events = [json.loads(line[5:]) for line in answer.text.splitlines() if line.startswith("data:")]
    words = [word for event in events if event["type"] == "speech.audio.timestamps" for word in event["words"]]
    assert [word["text"] for word in words] == ["One", "is", "here", "Two", "are", "there"]
    plain = json.loads(document(server, speak(server, text)))["words"]
    assert words == plain


def test_words_are_refused_other_values(server: RunningServer) -> None:
    for value in ("words", 1, "true"):
        assert speak(server, "Hello.", timestamps=value).json()["error"]["code"] == "invalid_timestamps"


def test_a_pause_between_two_words_is_silent_and_the_words_are_not(server: RunningServer) -> None:
    text = " ".join(
        f"{word}." for word in ["Apple", "River", "Mountain", "Yellow", "Garden", "Window", "Summer", "Bottle", "Market", "Doctor"] * 20
    )
    answer = speak(server, text)
    words = json.loads(document(server, answer))["words"]
    samples, rate = decode(answer.content, "wav")
    assert len(words) == 200
    check(words, text, len(samples) / rate)
    loud = 10 ** (-40 / 20) * np.abs(samples).max()

    def peak(start: float, end: float) -> float:
        return float(np.abs(samples[round(start * rate) : round(end * rate)]).max())

    for one, next_ in pairwise(words):
        assert peak(one["start"], one["end"]) > loud
        assert peak(one["end"], next_["start"]) < loud


def test_words_are_where_a_recogniser_hears_them(server: RunningServer) -> None:
    starts, ends = [], []
    for text in (
        "The small boats came home before the storm, and nobody on the old stone pier had seen a wind like that for twenty years.",
        "She opened the window, looked at the quiet street below, and wondered why the milk had not been delivered.",
        "Our train leaves at noon, so we should finish breakfast now and carry the heavy bags downstairs together.",
    ):
        answer = speak(server, text)
        words = json.loads(document(server, answer))["words"]
        samples, rate = decode(answer.content, "wav")
        sound = np.interp(np.arange(0, len(samples), rate / 16_000), np.arange(len(samples)), samples).astype(np.float32)
        segments, _ = _whisper().transcribe(sound, language="en", word_timestamps=True)
        heard = [word for segment in segments for word in segment.words or ()]
        ours, theirs = [word["text"].lower() for word in words], [word.word.strip(" ,.").lower() for word in heard]
        for a, b, count in SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks():
            for one, other in zip(words[a : a + count], heard[b : b + count], strict=True):
                starts.append(abs(one["start"] - other.start))
                ends.append(abs(one["end"] - other.end))
    assert len(starts) > 55
    assert float(np.median(starts)) < 0.06, starts
    assert float(np.median(ends)) < 0.06, ends


def test_a_long_text_is_searched_in_linear_time() -> None:
    text = "\n\n".join(f"## Part {number}\n\nThe **{number}th** of the many parts: the end of the part." for number in range(2000))
    spoken = normalize_text(text)
    finder = WordFinder(text, [spoken])
    assert None not in finder._there
