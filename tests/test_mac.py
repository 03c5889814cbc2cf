"""A Mac with Apple Silicon, as our code sees it: the voice that speaks with CSM switched off, and while CSM is being downloaded or has failed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import as_mac
import httpx
import pytest
from client_programs import assert_says
from conftest import RunningServer, start_server
from saying import said, say
from small_hub import SmallHub, write_small_repositories
from test_say import (  # noqa: F401 - they run here again, with the server of this file
    test_help_is_there_without_loading_anything_heavy,
    test_the_running_server_is_used_and_gives_its_very_samples,
    test_the_voices_are_listed,
    test_without_a_server_the_engine_speaks_the_same,
)
from test_server import (  # noqa: F401
    test_answers_have_headers_about_voice_seed_and_times,
    test_every_format_contains_the_sentence,
    test_health_shows_models_ffmpeg_voices_and_queue,
    test_models_are_listed_as_openai_lists_them,
    test_null_means_absent_for_every_optional_field,
    test_the_documentation_has_an_example_that_works,
    test_the_log_has_one_line_a_request_and_never_the_text,
    test_the_models_of_other_servers_are_found,
    test_the_official_client_speaks,
    test_the_path_without_v1_speaks_too,
    test_voices_are_listed_with_readiness_aliases_and_description,
    test_voices_are_reached_by_name_alias_and_id,
)

SENTENCE = "Good morning! The coffee is ready, and the sun is shining."


@pytest.fixture(scope="module", autouse=True)
def _mac() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("config.system_and_processor", as_mac.system_and_processor)
        yield


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallHub]:
    """A hub whose downloads stall in the middle of the weights."""
    with SmallHub(write_small_repositories(tmp_path_factory.mktemp("hub")), silent_after=1_000_000) as running:
        yield running


def downloading(folder: Path, hub: SmallHub, **settings: object) -> RunningServer:
    """A server that uses CSM by default, in the middle of a download."""
    network = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": 0, "HF_HUB_CACHE": folder / "hub", "HF_HOME": folder / "hf"}
    server = start_server(folder, CSM="auto", **network, **settings)
    server.wait_for(lambda health: health["models"]["hibari"]["state"] == "ready" and "progress" in health["models"]["csm-1b"])
    return server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server without CSM, for the tests of `test_server.py` too that are imported here."""
    running = start_server(tmp_path_factory.mktemp("off"), CSM="off")
    running.wait_for(lambda health: health["status"] != "loading")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def waiting(hub: SmallHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that waits for its download, with a small limit for the length of a request."""
    running = downloading(tmp_path_factory.mktemp("downloading"), hub, MAX_INPUT_LENGTH=200)
    yield running
    running.stop()


def speak(server: RunningServer, voice: str, text: str = SENTENCE) -> httpx.Response:
    body = {"model": "tts-1", "input": text, "voice": voice, "response_format": "wav"}
    return httpx.post(f"{server.url}/v1/audio/speech", json=body, timeout=120)


def test_without_csm_the_built_in_voice_is_the_default_and_everything_is_ready(server: RunningServer, tmp_path: Path) -> None:
    health = server.health()
    assert (health["status"], health["default_voice"], health["fallback"]) == ("ok", "heart", None)
    assert httpx.get(f"{server.url}/health/ready").status_code == 200
    spoken = speak(server, "alloy", "Hello.")
    assert (spoken.status_code, spoken.headers["x-voice"]) == (200, "heart")
    assert "x-fallback-for" not in spoken.headers
    said(tmp_path, "Hello.", "-o", "speech.wav", "--server", server.url)


@pytest.mark.parametrize("voice", ["alloy", "verse"])
def test_openais_names_are_spoken_by_the_built_in_voice_while_csm_is_downloaded(waiting: RunningServer, voice: str) -> None:
    spoken = speak(waiting, voice)
    assert (spoken.headers["x-voice"], spoken.headers["x-fallback-for"]) == ("heart", "conversational")
    assert_says(spoken.content, "wav", SENTENCE)
    assert waiting.health()["status"] == "loading"


def test_the_fallback_is_in_health_and_once_in_the_log(waiting: RunningServer) -> None:
    for voice in ("nova", "coral"):
        assert speak(waiting, voice, "Hello.").status_code == 200
    assert waiting.health()["fallback"] == {"voice": "heart", "replaces": "conversational"}
    log = waiting.log_text()
    assert len(re.findall(r"WARNING.* voice conversational is not ready; voice heart speaks instead: .* loading", log)) == 1
    assert "fallback_for=conversational" in log
    assert httpx.get(f"{waiting.url}/health/ready").status_code == 503, "a pool waits for the voice that it was set up for"


def test_the_command_line_names_the_voice_that_speaks_and_keeps_it(waiting: RunningServer, tmp_path: Path) -> None:
    long = "The coffee is ready. " * 15  # more than one request
    ended = say(tmp_path, long, "-o", "speech.wav", "--voice", "alloy", "--server", waiting.url)
    assert (ended.returncode, ended.stderr.decode()) == (0, "say.py: voice 'conversational' is not ready; voice 'heart' speaks instead\n")
    requests = [line for line in waiting.log_text().splitlines() if "streamed=yes" in line]
    assert len(requests) > 1
    assert "fallback_for" in requests[0]
    assert "fallback_for" not in "".join(requests[1:]), "they name the voice of the first"


def refused(response: httpx.Response) -> str:
    error: dict[str, Any] = response.json()["error"]
    assert (response.status_code, error["code"]) == (503, "model_not_ready")
    return str(error["message"])


def test_a_voice_that_is_named_itself_is_not_replaced(waiting: RunningServer) -> None:
    assert "Voice 'heart' is ready" in refused(speak(waiting, "conversational"))


def test_a_text_that_the_fallback_cannot_speak_is_kept_for_the_voice_that_can(waiting: RunningServer) -> None:
    assert "still loading" in refused(speak(waiting, "alloy", "我们今天早上去了港口。"))


def test_the_owner_can_turn_every_fallback_off(hub: SmallHub, tmp_path: Path) -> None:
    server = downloading(tmp_path, hub, FALLBACK_VOICE="none")
    try:
        refused(speak(server, "alloy"))
        refused(speak(server, "conversational"))
        health = server.health()
        assert (health["fallback"], health["setting_faults"]) == (None, [])
    finally:
        server.stop()
