"""The quality checks through the server: checkpoints that end, never end, or give nothing, silence or NaN, and what the client gets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
import tiny_csm
from conftest import RunningServer, csm_server
from listening import decode
from tiny_csm import AT_ONCE, NEVER, NOT_A_NUMBER, SILENCE, ends_after

CAP_FRAMES = 6
FRAME = 1920  # samples
LONG_FRAMES = 9
# By capital letter in the text: N never ends, E ends at once, S is silent, X is no number, R ends at once or after three frames, U pauses
# and runs on.
SCRIPT = {
    "": [ends_after(3)],
    "N": [NEVER],
    "E": [AT_ONCE],
    "S": [SILENCE],
    "X": [NOT_A_NUMBER],
    "R": [AT_ONCE, ends_after(3)],
    "U": ["sss____ss~"],
}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("guarded")
    presets = folder / "presets"
    presets.mkdir()
    (presets / "hush.json").write_text(json.dumps({"name": "hush", "ref_audio": "hush.wav", "ref_text": "Nothing."}))
    soundfile.write(presets / "hush.wav", np.zeros(48_000), 24_000)
    voices = {"tiny": CAP_FRAMES, "long": LONG_FRAMES}
    with csm_server(folder, tiny_csm.build(script=SCRIPT, small_codec=True), voices, MAX_RETRIES=2) as running:
        yield running


def speak(server: RunningServer, text: str, **fields: Any) -> httpx.Response:
    body = {"model": "m", "voice": "tiny", "input": text, "response_format": "wav", "seed": 1} | fields
    return httpx.post(f"{server.url}/v1/audio/speech", json=body, timeout=240)


def test_a_segment_that_ends_by_itself_is_taken_as_it_is(guarded: RunningServer) -> None:
    response = speak(guarded, "hello.")
    assert response.headers["x-retries"] == "0"
    assert 0 < decode(response.content, "wav")[0].size <= 4 * FRAME


def test_a_segment_that_never_ends_is_said_again_then_cut_at_its_budget(guarded: RunningServer) -> None:
    response = speak(guarded, "N hello.")
    assert response.headers["x-retries"] == "2"
    assert 0 < decode(response.content, "wav")[0].size <= CAP_FRAMES * FRAME
    assert guarded.log_text().count("unended") >= 3
    assert "retries=2" in guarded.log_text()


def test_a_segment_that_comes_out_right_at_a_later_attempt_is_played_whole(guarded: RunningServer) -> None:
    for seed in range(40):
        response = speak(guarded, "R hello.", seed=seed)
        assert response.status_code == 200 or "3 attempt(s)" in response.json()["error"]["message"]
        if response.headers.get("x-retries", "0") != "0":
            break
    assert response.headers["x-retries"] in {"1", "2"}
    assert 0 < decode(response.content, "wav")[0].size <= 4 * FRAME
    assert "too short" in guarded.log_text() or "empty" in guarded.log_text()


def test_a_segment_that_runs_on_is_cut_at_its_first_pause(guarded: RunningServer) -> None:
    response = speak(guarded, "U hi.", voice="long")
    assert response.headers["x-retries"] == "2"
    assert 0 < decode(response.content, "wav")[0].size <= 5 * FRAME


def test_a_segment_that_is_too_short_every_time_is_played_all_the_same(guarded: RunningServer) -> None:
    response = speak(guarded, "hello and so on and on and on and on and on and on.")
    assert response.headers["x-retries"] == "2"
    assert 0 < decode(response.content, "wav")[0].size <= 4 * FRAME
    assert guarded.log_text().count("too short") >= 3


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


def test_a_preset_whose_recording_will_not_do_is_told_in_the_health_and_in_the_log(guarded: RunningServer) -> None:
    (skipped,) = guarded.health()["skipped_presets"]
    assert skipped["file"] == "hush.json"
    assert "silent" in skipped["reason"]
    assert f"preset hush.json is skipped: {skipped['reason']}" in guarded.log_text()
    assert speak(guarded, "hello.", voice="hush").status_code == 400


def test_nothing_draws_progress_bars_into_the_log(guarded: RunningServer) -> None:
    assert speak(guarded, "hello.").status_code == 200
    assert "\r" not in guarded.log_text()
    assert "it/s" not in guarded.log_text()


def test_a_recogniser_finds_wrong_words_has_them_said_again_and_its_figure_told(tmp_path: Path) -> None:
    cache = tiny_csm.build(script=SCRIPT, small_codec=True)
    with csm_server(tmp_path, cache, {"tiny": CAP_FRAMES}, MAX_RETRIES=1, VERIFY="whisper") as running:
        response = speak(running, "hello to you.")
        assert response.headers["x-retries"] == "1"
        assert float(response.headers["x-word-error-rate"]) >= 1
        assert running.log_text().count("wrong words") == 2
        assert running.log_text().count("word error rate") == 2
        metrics = httpx.get(f"{running.url}/metrics", timeout=30).text
        assert 'sesame_tts_segment_faults_total{fault="wrong words",model="csm-1b"} 2.0' in metrics


def test_eight_clients_at_once_get_what_each_seed_gives_alone(guarded: RunningServer) -> None:
    requests = [
        {"model": "m", "voice": "tiny", "input": "A sentence.", "seed": seed, "response_format": name}
        for seed, name in enumerate(("pcm", "wav", "flac"))
    ]
    with guarded.client() as client, ThreadPoolExecutor(8) as pool:
        alone = [client.post("/v1/audio/speech", json=request).content for request in requests]
        together = pool.map(lambda number: client.post("/v1/audio/speech", json=requests[number % 3]).content, range(8))
        assert list(together) == [alone[number % 3] for number in range(8)]


def test_a_deadline_that_cannot_be_met_is_refused_at_once_or_spoken_by_the_built_in_voice(guarded: RunningServer) -> None:
    speak(guarded, "hello.")
    pace = guarded.health()["models"]["csm-1b"]["pace"]
    assert pace["utterances"] >= 1
    assert pace["frames_per_second"] > 0
    refused = speak(guarded, "hello hello hello.", deadline_ms=1)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "deadline_unreachable")
    assert int(refused.headers["X-Needed-Ms"]) > 1
    replaced = speak(guarded, "hello hello hello.", deadline_ms=1, on_deadline="fallback")
    assert (replaced.status_code, replaced.headers["X-Voice"], replaced.headers["X-Fallback-For"]) == (200, "heart", "tiny")
    assert speak(guarded, "hello.", deadline_ms=600_000).headers["X-Voice"] == "tiny"
    late = httpx.post(
        f"{guarded.url}/v1/audio/speech", json={"model": "m", "voice": "tiny", "input": "hello."}, headers={"X-Deadline-Ms": "1"}
    )
    assert late.json()["error"]["code"] == "deadline_unreachable"
    wrong = httpx.post(
        f"{guarded.url}/v1/audio/speech", json={"model": "m", "voice": "tiny", "input": "hello."}, headers={"X-Deadline-Ms": "soon"}
    )
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid_deadline_ms")
