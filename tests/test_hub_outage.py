"""A hub that refuses, fails and recovers while the server runs: errors, built-in voice, reload; then unloading when idle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import tiny_csm
from conftest import RunningServer, start_server
from small_hub import SmallHub, write_presets

REPOSITORY = tiny_csm.MLX_COMMUNITY
REFUSALS = {401: "gated", 404: "does not exist", 429: "too many requests", 500: "answered 500"}
BODY: dict[str, Any] = {"model": "m", "input": "Hello.", "response_format": "pcm"}


@pytest.fixture(scope="module")
def hub() -> Iterator[SmallHub]:
    tiny = tiny_csm.build(repo=REPOSITORY, script={"": [tiny_csm.ends_after(1)]}, small_codec=True)
    with SmallHub({repo: tiny_csm.snapshot_of(tiny, repo) for repo in (REPOSITORY, tiny_csm.MIMI, tiny_csm.TOKENIZER)}) as running:
        yield running


@pytest.fixture(scope="module")
def server(hub: SmallHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("outage")
    presets = write_presets(folder, "tiny", frames=1)
    csm = {"CSM": "on", "MODEL_ID": REPOSITORY, "MODEL_DTYPE": "float32", "GUARD": "off", "PRESETS_DIR": presets, "DEFAULT_VOICE": "tiny"}
    network = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": 0, "HF_HUB_CACHE": folder / "hub", tiny_csm.SMALL_CODEC: 1}
    hub.list_errors[REPOSITORY] = (401, "GatedRepo")
    running = start_server(folder, IDLE_UNLOAD_SECONDS=2, **csm, **network)
    try:
        yield running
    finally:
        running.stop()


def csm_of(health: dict[str, Any]) -> dict[str, Any]:
    return dict(health["models"]["csm-1b"])


def speak(server: RunningServer, voice: str) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/audio/speech", json=BODY | {"voice": voice}, timeout=120)


def test_each_answer_of_the_hub_is_told_the_built_in_voice_speaks_on_and_a_reload_tries_again(hub: SmallHub, server: RunningServer) -> None:
    server.wait_for(lambda health: csm_of(health)["state"] == "failed")
    for status, told in REFUSALS.items():
        hub.list_errors[REPOSITORY] = (status, "RepoNotFound" if status == 404 else "")
        assert httpx.post(f"{server.url}/admin/reload").status_code == 200
        health = server.wait_for(lambda health, told=told: told in (csm_of(health)["error"] or ""))  # type: ignore[misc]
        assert (health["status"], csm_of(health)["state"]) == ("degraded", "failed")
        refused = speak(server, "tiny")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_not_ready")
        assert int(refused.headers["retry-after"]) > 0
        assert speak(server, "heart").status_code == 200
        spoken = speak(server, "alloy")
        assert (spoken.headers["x-voice"], spoken.headers["x-fallback-for"]) == ("heart", "tiny")
        assert health["fallback"] == {"voice": "heart", "replaces": "tiny"}
    hub.list_errors.clear()
    httpx.post(f"{server.url}/admin/reload")
    server.wait_for(lambda health: health["status"] == "ok", 120)
    assert speak(server, "tiny").headers["x-model"] == "csm-1b"
    spoken = speak(server, "alloy")
    assert (spoken.headers["x-voice"], spoken.headers.get("x-fallback-for"), server.health()["fallback"]) == ("tiny", None, None)
    assert server.log_text().count("voice tiny is not ready") == 1


def test_an_idle_model_gives_its_memory_back_and_is_there_again_when_it_is_asked(hub: SmallHub, server: RunningServer) -> None:
    assert speak(server, "tiny").status_code == 200
    loaded = csm_of(server.health())
    hub.requests.clear()
    idle = csm_of(server.wait_for(lambda health: csm_of(health)["state"] == "unloaded", 60))
    assert (idle["loaded"], server.health()["status"]) == (False, "ok")
    assert (idle.get("memory_gb") or 0) < max(0.001, (loaded.get("memory_gb") or 1) / 10)
    assert speak(server, "heart").status_code == 200
    assert csm_of(server.health())["state"] == "unloaded", "another model's voice does not wake it"
    assert speak(server, "tiny").status_code == 200
    assert csm_of(server.health())["memory_gb"] > 0.001
    assert hub.requests == []
    assert "Traceback" not in server.log_text()
