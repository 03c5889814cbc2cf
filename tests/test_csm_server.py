"""The guard through the server: checkpoints that end, that never end, that say nothing, silence or no numbers, and what the caller gets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import tiny_csm
from conftest import RunningServer, start_server
from listening import decode
from tiny_csm import AT_ONCE, NEVER, NOT_A_NUMBER, SILENCE, ends_after

CAP_FRAMES = 4
FRAME = 1920  # samples
# By capital letter in the text: N never ends, E ends at once, S is silent, X is no number, R ends at once or after three frames.
SCRIPT = {"": [ends_after(3)], "N": [NEVER], "E": [AT_ONCE], "S": [SILENCE], "X": [NOT_A_NUMBER], "R": [AT_ONCE, ends_after(3)]}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("guarded")
    presets = folder / "presets"
    presets.mkdir()
    tiny = {"name": "tiny", "voice_key": "conversational_a", "max_audio_length_ms": CAP_FRAMES * 80}
    (presets / "tiny.json").write_text(json.dumps(tiny))
    settings = {"CSM": "on", "DEFAULT_VOICE": "tiny", "PRESETS_DIR": presets, "MODEL_DTYPE": "float32", "MAX_RETRIES": 2}
    running = start_server(folder, **settings, **tiny_csm.environment(tiny_csm.build(script=SCRIPT)))
    try:
        running.wait_for(lambda health: health["models"]["csm-1b"]["state"] == "ready", 180)
        yield running
    finally:
        running.stop()


def speak(server: RunningServer, text: str, **fields: Any) -> httpx.Response:
    body = {"model": "m", "voice": "tiny", "input": text, "response_format": "wav", "seed": 1} | fields
    return httpx.post(f"{server.url}/v1/audio/speech", json=body, timeout=240)


def test_a_group_that_ends_by_itself_is_taken_as_it_is(guarded: RunningServer) -> None:
    response = speak(guarded, "hello.")
    assert response.headers["x-retries"] == "0"
    assert 0 < decode(response.content, "wav")[0].size <= 3 * FRAME


def test_a_group_that_never_ends_is_said_again_then_cut_at_its_budget(guarded: RunningServer) -> None:
    response = speak(guarded, "N hello.")
    assert response.headers["x-retries"] == "2"
    assert 0 < decode(response.content, "wav")[0].size <= CAP_FRAMES * FRAME
    assert guarded.log_text().count("unended") >= 3
    assert "retries=2" in guarded.log_text()


def test_a_group_that_comes_out_right_at_a_later_attempt_is_played_whole(guarded: RunningServer) -> None:
    for seed in range(40):
        response = speak(guarded, "R hello.", seed=seed)
        assert response.status_code == 200 or "3 attempt(s)" in response.json()["error"]["message"]
        if response.headers.get("x-retries", "0") != "0":
            break
    assert response.headers["x-retries"] in {"1", "2"}
    assert 0 < decode(response.content, "wav")[0].size <= 3 * FRAME
    assert "too short" in guarded.log_text() or "empty" in guarded.log_text()


@pytest.mark.parametrize("letter", ["E", "S", "X"])
def test_nothing_silence_and_no_number_are_told_and_never_sent(guarded: RunningServer, letter: str) -> None:
    response = speak(guarded, f"{letter} hello.")
    assert response.status_code == 500, response.headers
    error = response.json()["error"]
    assert error["code"] == "internal_error"
    assert "3 attempt(s)" in error["message"]


def test_a_stream_whose_sound_stops_being_numbers_is_broken_off(guarded: RunningServer) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        speak(guarded, "X hello.", stream=True)
    assert speak(guarded, "hello.").status_code == 200
