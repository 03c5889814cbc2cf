"""Pauses, voice tags and SSML inside a text: exact silence, never read aloud, and the words stay where they are."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import RunningServer
from hypothesis import given
from hypothesis import strategies as st
from listening import Samples, decode, transcribe

from errors import InvalidInputError
from say_reading import clean_text, split_pieces
from text_markup import blanked, passages, prepare, stretch, without_marks
from text_normalizer import normalize_text

RATE = 24_000


def speak(server: RunningServer, text: str, status: int = 200, **fields: Any) -> httpx.Response:
    body = {"model": "m", "voice": "heart", "input": text, "response_format": "wav", "seed": 3} | fields
    answer = httpx.post(f"{server.url}/v1/audio/speech", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer


def stretches(samples: Samples, least: float = 0.3) -> list[float]:
    """The seconds of silence of at least `least`, those at the start and the end included."""
    loud = np.flatnonzero(np.abs(samples) > 1e-3)  # the level below which a voice is silent
    edges = np.concatenate([[-1], loud, [len(samples)]])
    return [round(float(gap), 2) for gap in np.diff(edges) / RATE if gap > least]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Hello.[pause:1.5s]World", [("Hello.", None), ("World", 1.5)]),
        ("One [PAUSE: 400 ms], two", [("One,", None), ("two", 0.4)]),
        ("**bold [pause:1s]words**", [("bold", None), ("words", 1.0)]),
        ("- one [pause:1s]\n- two", [("one.", None), ("two.", 1.0)]),
        ("| a | [pause:2s] b |\n|---|---|", [("a,", None), ("b.", 2.0)]),
        ("# Head\n\n[pause:1s]\n\n[pause:2s]Text", [("Head.", None), ("Text", 3.0)]),
        ("A<break time=\"1s\"/>B <break time='250ms'></break>C<break/>D", [("A", None), ("B", 1.0), ("C", 0.25), ("D", 0.5)]),
        ("[pause:1s]Go.[pause:2s]", [("Go.", 1.0), ("", 2.0)]),
        ("```python\n[pause:1s]\n```\nGo.", [("Go.", None)]),
        ("See [pause](http://example.com) and [pause] and [voice].", [("See pause and [pause] and [voice].", None)]),
    ],
)
def test_pauses_are_found_wherever_they_are(text: str, parts: list[tuple[str, float | None]]) -> None:
    prepared = prepare(text, normalize_text)
    assert prepare(prepared, normalize_text) == prepared
    assert [(part.text.strip(), part.pause) for part in passages(prepared)] == parts


def test_ssml_is_text_with_pauses() -> None:
    text = '<?xml version="1.0"?><speak version="1.1"><!-- no --><p>AT&amp;T <emphasis level="strong">is</emphasis> here</p>'
    text += '<s>I <prosody rate="slow">say</prosody> <phoneme ph="x">so</phoneme>.<break time="1s"/></s></speak>'
    parts = passages(prepare(text, normalize_text))
    assert [(part.text.split(), part.pause) for part in parts] == [(["AT&T", "is", "here", "I", "say", "so."], None), ([], 1.0)]
    assert "\n\n" in parts[0].text


@given(st.text(st.sampled_from("ab .,[]<>*_-\n:10s"), max_size=60), st.sampled_from(["[pause:1s]", "[voice:x]", '<break time="1s"/>']))
def test_any_text_around_a_mark_is_prepared_once_and_keeps_its_offsets(text: str, mark: str) -> None:
    for whole in (text + mark + text, mark + text, text + mark):
        prepared = prepare(whole, str)
        assert prepare(prepared, str) == prepared
        assert len(blanked(whole)) == len(whole)
        assert mark not in without_marks(prepared)


def test_a_million_marks_take_linear_time() -> None:
    for hostile in (
        "[pause:0s]" * 5000,
        "<!--" * 20_000,
        "<break " * 20_000,
        "[voice: " + " " * 50_000,
        " " * 50_000 + "[pause:1s]",
        "[pause:" * 20_000,
    ):
        assert len(blanked("<speak>" + prepare("<speak>" + hostile, str))) > 0


@pytest.mark.parametrize(
    "text", ["a [pause:10.1s] b", "a [pause:2] b", "a [pause:soon] b", 'a <break time="1min"/> b', "a" + "[pause:9s]b" * 7]
)
def test_pauses_that_are_no_time_or_too_long_are_refused(server: RunningServer, text: str) -> None:
    refused = speak(server, text, 400).json()["error"]
    assert (refused["code"], refused["param"]) == ("invalid_input", "input")
    assert "pause" in refused["message"].lower()
    speak(server, "[pause:3s]", 400)


@pytest.mark.parametrize("fields", [{}, {"speed": 2.0}, {"normalize": False}, {"stream": True}, {"speed": 0.5, "stream": True}])
def test_pauses_are_exact_silence(server: RunningServer, fields: dict[str, Any]) -> None:
    answer = speak(server, "[pause:700ms]Hello there.[pause:1.5s]And now [pause:800ms] goodbye.[pause:2s]", **fields)
    samples, _ = decode(answer.content, "wav")
    assert stretches(samples) == pytest.approx([0.7, 1.5, 0.8, 2.0], abs=0.04)


def test_pauses_are_never_read_aloud(server: RunningServer) -> None:
    for text in ("Hello there.[pause:1s]Goodbye.", '<speak>Hello there.<break time="1s"/><emphasis>Goodbye</emphasis>.</speak>'):
        heard = transcribe(*decode(speak(server, text).content, "wav")).lower()
        assert "hello there" in heard
        assert "goodbye" in heard.replace(" ", "")  # the recogniser writes it in two words at times
        assert not any(word in heard for word in ("pause", "break", "emphasis", "second", "one"))


@pytest.mark.parametrize("speed", [1.0, 1.25])
def test_words_stay_where_they_are_in_the_callers_text_and_pauses_are_gaps(server: RunningServer, speed: float) -> None:
    text = '[voice:heart] The **pause** is [pause:1s] 5 seconds.<break time="2s"/>\n\nNo [pause:500ms] break here.[pause:1s]'
    answer = speak(server, text, timestamps="word", speed=speed)
    found = httpx.get(f"{server.url}{answer.headers['X-Timestamps']}").json()
    words = found["words"]
    assert [word["text"] for word in words] == ["The", "pause", "is", "5", "seconds", "No", "break", "here"]
    assert [text[word["start_char"] : word["end_char"]] for word in words] == [word["text"] for word in words]
    gaps = {before["text"]: after["start"] - before["end"] for before, after in pairwise(words)}
    assert [gaps["is"], gaps["seconds"], gaps["No"]] == pytest.approx([1.0, 2.0, 0.5], abs=0.05)
    length = float(answer.headers["X-Audio-Duration"])
    assert length - words[-1]["end"] == pytest.approx(1.0, abs=0.1)
    assert all("[" not in caption["text"] for caption in found["captions"])


def test_unknown_voices_are_refused_and_those_of_the_model_speak(server: RunningServer) -> None:
    refused = speak(server, "Hi. [voice:nobody] Hello.", 400).json()["error"]
    assert refused["code"] == "invalid_voice"
    assert "nobody" in refused["message"]
    plain = decode(speak(server, "Hi. Hello.").content, "wav")[0]
    tagged = decode(speak(server, "[voice:Heart] Hi. [voice:alloy] Hello.").content, "wav")[0]
    assert np.array_equal(plain, tagged)


def test_the_command_line_keeps_pauses_and_voices_in_all_pieces() -> None:
    text = clean_text("[voice:anna] " + "A sentence of some words. " * 20 + "[voice:ben] " + "Another one is here. " * 20, normalize=True)
    pieces = split_pieces(text, 200)
    assert len(pieces) > 4
    voices = [part.voice or "" for piece in pieces for part in passages(piece)]
    assert set(voices) == {"anna", "ben"}
    assert voices == sorted(voices)
    assert sum(part.pause or 0 for part in passages(stretch("a [pause:8s] b [pause:400ms] c", 2.0))) == pytest.approx(16.8)
    with pytest.raises(InvalidInputError):
        clean_text("a [pause:11s] b", normalize=True)
