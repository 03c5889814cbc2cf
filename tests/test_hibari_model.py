"""hibari's five voices: the one in the package, and the four that are downloaded, from a hub of our own that serves copies of the first."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hibari.voices
import httpx
import numpy as np
import pytest
from conftest import RunningServer, start_server
from huggingface_hub import constants
from listening import Samples, decode, transcribe, word_error_rate
from small_hub import SmallHub

from hibari_model import HibariModel, VoiceFiles, _spectrum
from speech_model import ModelLoadError, SpeechOptions
from voice_presets import Voice, VoicePreset

REPO = "maureesewilliams/hibari"
HEART = Path(hibari.voices.ASSETS, "hibari.onnx")
TEXT = "The small boats came home before the storm."
COPIES = {"emma": "bf_emma.int8.onnx", "fenrir": "am_fenrir_v2.int8.onnx"}  # in the registry of these tests they are copies of heart


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    (folder / "voices").mkdir()
    for name in COPIES.values():
        (folder / "voices" / name).symlink_to(HEART)
    return folder


@pytest.fixture
def hub(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SmallHub]:
    """A hub for this process, and hibari's registry with the copies' digests."""
    heart = hibari.voices.VOICES["heart"]
    for key in COPIES:
        monkeypatch.setitem(hibari.voices.VOICES, key, hibari.voices.VOICES[key] | {name: heart[name] for name in ("bytes", "sha256")})
    monkeypatch.setenv("HIBARI_HOME", str(tmp_path / "hibari"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with SmallHub({REPO: repository}) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}")
        yield running


def voice(key: str) -> Voice:
    return Voice(VoicePreset(name=key, model="hibari", voice_key=key), Path())


def test_a_download_continues_where_an_earlier_one_stopped(hub: SmallHub, tmp_path: Path) -> None:
    files = VoiceFiles(tmp_path / "ours")
    (tmp_path / "ours").mkdir()
    part = tmp_path / "ours" / f"{hibari.voices.VOICES['fenrir']['sha256']}.incomplete"
    part.write_bytes(HEART.read_bytes()[:3_000_000])
    assert files.fetch(["fenrir", "heart"])
    assert hub.requests == [(f"/{REPO}/resolve/main/voices/{COPIES['fenrir']}", "bytes=3000000-")]
    assert files.read("fenrir") == HEART.read_bytes()
    assert not part.exists()
    assert files.fetch(["fenrir"])
    assert len(hub.requests) == 1


def test_a_damaged_download_is_refused_and_fetched_again(hub: SmallHub, tmp_path: Path) -> None:
    files = VoiceFiles(tmp_path / "ours")
    hub.corrupt = True
    assert not files.fetch(["emma"])
    assert "arrived damaged" in (files.missing("emma") or "")
    hub.corrupt = False
    assert files.fetch(["emma"])
    path = next(path for path in (tmp_path / "ours").iterdir() if path.stat().st_size > 1000)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelLoadError, match="not downloaded"):
        files.read("emma")
    assert files.fetch(["emma"])
    assert hashlib.sha256(files.read("emma")).hexdigest() == hibari.voices.VOICES["emma"]["sha256"]


def test_a_file_in_hibaris_own_folder_is_used(hub: SmallHub, tmp_path: Path) -> None:
    (tmp_path / "hibari").mkdir()
    shutil.copy(HEART, tmp_path / "hibari" / COPIES["fenrir"])
    files = VoiceFiles(tmp_path / "ours")
    assert files.fetch(["fenrir"])
    assert hub.requests == []
    assert files.read("fenrir") == HEART.read_bytes()


def test_without_a_network_the_reason_is_given_and_nothing_is_tried(hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    files = VoiceFiles(tmp_path / "ours")
    assert files.pending("kore")
    assert not files.fetch(["kore"])
    assert files.missing("kore") == "is not downloaded: HF_HUB_OFFLINE is set."
    assert not files.pending("kore")
    assert hub.requests == []


def test_a_hub_that_cannot_be_reached_is_asked_once_and_reported_once(
    hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # huggingface_hub waits a second before each of its own retries
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
        files = VoiceFiles(tmp_path / "ours")
        for _ in range(2):
            assert not files.fetch(["emma", "fenrir"])
    assert [
        record.message.partition(" (")[0] for record in caplog.records if record.name == "hibari_model" and record.levelname == "WARNING"
    ] == ["voices emma, fenrir: the hub cannot be reached"]
    assert files.missing("emma") == files.missing("fenrir")
    assert "check the network" in (files.missing("fenrir") or "")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    assert files.fetch(["emma", "fenrir"])


def test_voices_are_loaded_when_they_speak_share_the_lexicons_and_are_freed_when_idle(hub: SmallHub, tmp_path: Path) -> None:
    files = VoiceFiles(tmp_path / "ours")
    assert files.fetch(COPIES)
    model = HibariModel(files)
    model.load(lambda _: None)
    assert list(model._voices) == ["heart"]
    for key in ("fenrir", "emma"):
        chunks = list(model.speak([TEXT], voice(key), SpeechOptions(seed=1), lambda: False))
        assert sum(chunk.samples.size for chunk in chunks) > 24_000
    assert model._voices["fenrir"].g2p is model._voices["heart"].g2p
    assert model._voices["emma"].g2p._g2p.british
    assert not model.free_idle(60)
    assert model.free_idle(0)
    assert list(model._voices) == ["heart"]
    assert list(model._pronunciations) == [False]


class _NoNoise:
    """A voice's network whose outputs ask for no noise: they are the size and phase of the filter, then the size of the noise."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.runs: list[Any] = []

    def run(self, names: None, inputs: dict[str, Any]) -> list[Any]:
        outputs = self._session.run(names, inputs)
        outputs[2][:] = -100
        return list(outputs)


@pytest.mark.parametrize(
    "text", ["No.", TEXT, f"{TEXT[:-1]}, and the people on the pier counted them one by one, until the last was there."]
)
def test_the_voice_sounds_as_hibari_makes_it_but_comes_in_parts(text: str) -> None:
    model = HibariModel()
    model.load(lambda _: None)
    heart = model._voices["heart"]
    heart.sess = _NoNoise(heart.sess)
    chunks = [chunk.samples for chunk in model.speak([text], voice("heart"), SpeechOptions(seed=1), lambda: False)]
    np.testing.assert_allclose(np.concatenate(chunks), heart(text), atol=1e-6)
    assert chunks[0].size <= 24_000


def test_the_noise_has_the_sizes_that_the_network_asks_for_and_normal_parts() -> None:
    """hibari draws the two parts of each complex number; here they come from a size and a phase."""
    silent = np.full((100, 601), -100, np.float32)
    asked = np.tile(np.linspace(-3, 1, 601, dtype=np.float32), (100, 1))
    pulses = np.zeros((100, 1200), np.float32)
    noise = _spectrum(pulses, [silent, silent, asked, silent, silent], np.random.default_rng(1)) / np.exp(asked)
    parts = np.stack([noise.real, noise.imag]).reshape(2, -1)
    np.testing.assert_allclose(np.cov(parts), np.eye(2), atol=0.02)
    for part in parts:
        shares = np.mean(np.abs(part)[:, None] < [0.5, 1, 2, 3], axis=0)
        np.testing.assert_allclose(shares, [0.3829, 0.6827, 0.9545, 0.9973], atol=0.005)  # of the normal distribution


def test_the_same_seed_gives_the_same_samples_and_another_seed_the_same_sounds() -> None:
    model = HibariModel()
    model.load(lambda _: None)
    first, same, other = (
        np.concatenate([chunk.samples for chunk in model.speak([TEXT], voice("heart"), SpeechOptions(seed=seed), lambda: False)])
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, same)
    assert first.size == other.size
    assert 0 < np.abs(first - other).max() < np.abs(first).max() / 2


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package hibari whose registry says that two voices are copies of heart."""
    source, folder = Path(hibari.voices.__file__).parent, tmp_path_factory.mktemp("package")
    shutil.copytree(source, folder / "hibari", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    assets = folder / "hibari" / "assets"
    assets.mkdir()
    for path in (source / "assets").iterdir():
        if path.name != "voices.json":
            (assets / path.name).symlink_to(path)
    registry: dict[str, dict[str, Any]] = json.loads((source / "assets" / "voices.json").read_text())
    for key in COPIES:
        registry[key] |= {name: registry["heart"][name] for name in ("bytes", "sha256")}
    (assets / "voices.json").write_text(json.dumps(registry))
    return folder


def entries(server: RunningServer) -> dict[str, dict[str, Any]]:
    return {entry["id"]: entry for entry in httpx.get(f"{server.url}/v1/audio/voices").json()["voices"]}


def speak(server: RunningServer, name: str, text: str = TEXT) -> httpx.Response:
    body = {"model": "m", "input": text, "voice": name, "response_format": "wav", "seed": 3}
    return httpx.post(f"{server.url}/v1/audio/speech", json=body, timeout=60)


def check_dialogue(server: RunningServer) -> None:
    """Each speaker of a text says their own lines: the copy of heart that is British is heard by its accent."""
    lines = ["Shall we walk down the path after lunch?", "I can't, I have to water the tomatoes.", "Then ask me again tomorrow."]

    def spoken(*names: str) -> Samples:
        text = " ".join(f"[voice:{name}] {line}[pause:1s]" for name, line in zip(names, lines, strict=True))
        return decode(speak(server, "heart", text).content, "wav")[0]

    dialogue, alone = spoken("heart", "emma", "heart"), spoken("heart", "heart", "heart")
    loud, alone_loud = (np.flatnonzero(np.abs(samples) > 1e-3) for samples in (dialogue, alone))
    (first, second), (first_alone, second_alone) = (
        [int(at) for at in np.flatnonzero(np.diff(at) > 20_000)[:2]] for at in (loud, alone_loud)
    )
    assert np.array_equal(dialogue[: loud[first]], alone[: alone_loud[first_alone]])
    assert dialogue[loud[second + 1] :].size == alone[alone_loud[second_alone + 1] :].size  # other noise, the same sounds
    middle, middle_alone = dialogue[loud[first + 1] : loud[second]], alone[alone_loud[first_alone + 1] : alone_loud[second_alone]]
    assert middle.size != middle_alone.size or not np.array_equal(middle, middle_alone)
    assert word_error_rate(" ".join(lines), transcribe(dialogue, 24_000)) < 0.1


def test_the_server_downloads_the_voices_in_the_background(repository: Path, package: Path, tmp_path: Path) -> None:
    network = {"HF_HUB_OFFLINE": 0, "HF_HUB_CACHE": tmp_path / "hf", "HIBARI_HOME": tmp_path / "home", "PYTHONPATH": package}
    with SmallHub({REPO: repository}, file_errors={REPO: (500, "")}) as hub:
        server = start_server(tmp_path, HF_ENDPOINT=hub.url, IDLE_UNLOAD_SECONDS=1, **network)
        try:
            server.wait_for(lambda health: health["models"]["hibari"]["state"] == "ready")
            assert speak(server, "fable").headers["X-Voice"] == "heart"  # one of OpenAI's names
            refused = speak(server, "emma")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_not_ready")
            assert refused.headers["Retry-After"]
            message = refused.json()["error"]["message"]
            assert "Voice 'emma' is not downloaded" in message
            assert "Voice 'heart' is ready." in message
            server.wait_for(lambda _: "answered 500" in entries(server)["emma"]["reason"])
            hub.file_errors.clear()
            httpx.post(f"{server.url}/admin/reload")
            server.wait_for(lambda _: entries(server)["emma"]["ready"] and entries(server)["fenrir"]["ready"])
            for name, key in (("emma", "emma"), ("am_fenrir", "fenrir")):
                spoken = speak(server, name)
                assert (spoken.status_code, spoken.headers["X-Voice"]) == (200, key)
            assert word_error_rate(TEXT, transcribe(*decode(spoken.content, "wav"))) == 0
            check_dialogue(server)
            server.wait_for(lambda _: "voice fenrir: unloaded after" in server.log_text())
            server.wait_for(lambda _: "404" in (entries(server)["kore"]["reason"] or ""))
            assert server.health()["status"] == "ok"
        finally:
            server.stop()
