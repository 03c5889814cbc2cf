"""Kokoro-FastAPI's clients get their answer: audio in base64 with the time of each word."""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from typing import Any

import httpx
import pytest
from conftest import RunningServer
from listening import decode, transcribe

TEXT = "Hello there. It costs $5 today, my friend."
WORDS = ["Hello", "there", "It", "costs", "$5", "today", "my", "friend"]
TYPES = {"mp3": "audio/mpeg", "opus": "audio/opus", "aac": "audio/aac", "flac": "audio/flac", "wav": "audio/wav", "pcm": "audio/pcm"}


def asked(server: RunningServer, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/dev/captioned_speech", json={"input": TEXT} | fields, timeout=60)


def test_the_request_of_its_own_example_and_test_gets_audio_and_words(server: RunningServer) -> None:
    body = {"model": "kokoro", "input": "test text", "voice": "af_bella", "speed": 1.0, "response_format": "wav", "stream": False}
    answer = asked(server, **body)
    assert answer.status_code == 200, answer.text
    document = json.loads(answer.content)
    assert set(document) == {"audio", "audio_format", "timestamps"}
    samples, rate = decode(base64.b64decode(document["audio"]), "wav")
    assert "test" in transcribe(samples, rate).lower()
    assert [set(word) for word in document["timestamps"]] == [{"word", "start_time", "end_time"}] * 2
    assert [word["word"] for word in document["timestamps"]] == ["test", "text"]
    assert document["timestamps"][-1]["end_time"] == pytest.approx(samples.size / rate, abs=0.05)


@pytest.mark.parametrize("fmt", list(TYPES))
@pytest.mark.parametrize("stream", [True, None, False])
def test_every_format_is_sent_whole_or_in_lines(server: RunningServer, fmt: str, stream: bool | None) -> None:
    answer = asked(server, response_format=fmt, stream=stream, speed=1.25, lang_code=None, normalization_options={"normalize": True})
    assert answer.status_code == 200, answer.text
    lines = [json.loads(line) for line in answer.content.split(b"\n") if line]
    assert stream is not False or len(lines) == 1
    assert answer.headers["Content-Type"] == "application/json"
    assert {line["audio_format"] for line in lines} == {TYPES[fmt]}
    samples, rate = decode(b"".join(base64.b64decode(line["audio"]) for line in lines), fmt)
    words = [word for line in lines for word in line["timestamps"]]
    assert [word["word"] for word in words] == WORDS
    assert all(before["end_time"] <= after["start_time"] for before, after in pairwise(words))
    assert words[-1]["end_time"] == pytest.approx(samples.size / rate, abs=0.12)


def test_lines_are_sent_while_the_rest_is_spoken(server: RunningServer) -> None:
    text = "A sentence of ten words is said here, again and again. " * 30
    # As pcm, because an encoder's first bytes may come after several sentences on a busy machine, and their words with them.
    lines = [json.loads(line) for line in asked(server, input=text, response_format="pcm").text.splitlines()]
    assert sum(len(line["timestamps"]) for line in lines) == 30 * 11
    assert len([line for line in lines if line["timestamps"]]) > 3
    assert len(lines[0]["timestamps"]) <= 2 * 11


@pytest.mark.parametrize(
    ("voice", "speaker"),
    [("af_heart", "heart"), ("am_adam", "heart"), ("bf_lily(2)+af_heart(1)", "heart"), ("jf_alpha", "heart"), ("heart", "heart")],
)
def test_kokoros_voices_are_spoken_by_a_built_in_one(server: RunningServer, voice: str, speaker: str) -> None:
    """Of the other four, none is downloaded here."""
    answer = asked(server, voice=voice, stream=False, input="Hi.")
    assert answer.headers["X-Voice"] == speaker


def test_words_and_readings_are_switched_off(server: RunningServer) -> None:
    assert asked(server, return_timestamps=False, stream=False).json()["timestamps"] is None
    assert all(json.loads(line)["timestamps"] == [] for line in asked(server, return_timestamps=False).text.splitlines())
    for options in ({"normalize": False}, None):
        assert asked(server, normalization_options=options, stream=False).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"voice": "nobody"},
        {"input": ""},
        {"speed": 9},
        {"response_format": "mid"},
        {"stream": "no"},
        {"normalization_options": {"normalize": "no"}},
    ],
)
def test_refusals_have_the_usual_form(server: RunningServer, fields: dict[str, Any]) -> None:
    refused = asked(server, **fields)
    assert refused.status_code == 400
    assert refused.json()["error"]["type"] == "invalid_request_error"
