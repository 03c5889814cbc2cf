"""The engine: the built-in model and CSM (through real mlx-audio) load and speak, and a model that fails is handled."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
import tiny_csm
from conftest import RunningServer
from hibari import g2p
from listening import decode, transcribe, word_error_rate

from audio_formats import Samples
from config import Settings
from errors import GenerationTimeoutError, InternalError, InvalidInputError
from hibari_model import HibariModel
from model_host import Heartbeat, ModelHost, RequestQueue
from speech_model import LoadProgress, ModelLoadError, SegmentChunk, SpeechOptions
from tts_engine import TTSEngine, Utterance
from voice_presets import Voice, VoicePresetManager

# Each engine here would read the built-in voice's dictionaries again; nothing changes them.
g2p._load_json = cache(g2p._load_json)

T = TypeVar("T")
TEXT = "Good morning. It is a quarter past seven, and the kettle is on."


def with_engine(work: Callable[[TTSEngine, VoicePresetManager], Coroutine[Any, Any, T]], tmp_path: Path, **settings: Any) -> T:
    """Run `work` with an engine whose built-in voice is ready."""

    async def scenario() -> T:
        chosen = Settings(csm="off", cache_dir=tmp_path, default_voice="heart", **settings)
        presets = VoicePresetManager(chosen.presets_dir, chosen.default_voice)
        engine = TTSEngine(chosen, presets)
        await engine.start()
        await engine.hosts["hibari"].settled()
        try:
            return await work(engine, presets)
        finally:
            await engine.close()

    return asyncio.run(scenario())


async def spoken(utterance: Utterance) -> Samples:
    return np.concatenate([samples async for samples in utterance])


def test_the_built_in_voice_says_the_text(tmp_path: Path) -> None:
    async def work(engine: TTSEngine, presets: VoicePresetManager) -> Utterance:
        utterance = engine.speak(TEXT, presets.catalog.resolve("heart"), SpeechOptions(seed=1))
        samples = await spoken(utterance)
        assert samples.dtype == np.float32
        assert samples.ndim == 1
        assert word_error_rate(TEXT, transcribe(samples, utterance.sample_rate)) == 0
        assert utterance.audio_seconds == pytest.approx(samples.size / 24_000)
        return utterance

    utterance = with_engine(work, tmp_path)
    assert utterance.segments == ["Good morning. ", "It is a quarter past seven, and the kettle is on."]
    assert [timestamp.segment for timestamp in utterance.timestamps] == [0, 1]
    assert utterance.generation_time > 0


def test_one_seed_gives_the_same_samples_on_the_first_and_the_hundredth_time(tmp_path: Path) -> None:
    async def work(engine: TTSEngine, presets: VoicePresetManager) -> None:
        voice = presets.catalog.resolve("heart")
        first = await spoken(engine.speak("Hello.", voice, SpeechOptions(seed=9)))
        for seed in range(98):
            await spoken(engine.speak("Something in between.", voice, SpeechOptions(seed=seed)))
        assert np.array_equal(await spoken(engine.speak("Hello.", voice, SpeechOptions(seed=9))), first)

    with_engine(work, tmp_path)


def test_closing_an_utterance_frees_the_slot_for_the_next(tmp_path: Path) -> None:
    async def work(engine: TTSEngine, presets: VoicePresetManager) -> None:
        voice, queue = presets.catalog.resolve("heart"), engine.hosts["hibari"].queue
        running = engine.speak(TEXT * 60, voice, SpeechOptions(seed=1))
        waiting = engine.speak(TEXT, voice, SpeechOptions(seed=1))
        async for _ in running:
            break
        assert (queue.active, queue.waiting) == (1, 1)
        await waiting.aclose()
        assert (queue.active, queue.waiting) == (1, 0)
        await running.aclose()
        assert (queue.active, queue.waiting) == (0, 0)
        assert running.audio_seconds < 60
        assert (await spoken(engine.speak("Next.", voice, SpeechOptions(seed=1)))).size > 0

    with_engine(work, tmp_path)


def test_texts_with_nothing_to_speak_are_refused(tmp_path: Path) -> None:
    async def work(engine: TTSEngine, _: VoicePresetManager) -> None:
        for text in ("***", "🎉", "\n\n---\n\n", "\u200b"):
            with pytest.raises(InvalidInputError):
                engine.prepare_text(text)
            with pytest.raises(InvalidInputError):
                engine.prepare_text(text, normalize=False)
        assert engine.prepare_text("**Hello** [you](https://example.com)") == "Hello you"
        assert engine.prepare_text("**Hello**", normalize=False) == "**Hello**"

    with_engine(work, tmp_path)


class FaultyVoice(HibariModel):
    """The built-in voice, which calls `fault` at a segment that contains "fault"."""

    def __init__(self, fault: Callable[[], None]) -> None:
        super().__init__()
        self._fault = fault

    def speak(self, segments: Sequence[str], voice: Voice, options: SpeechOptions, cancelled: Callable[[], bool]) -> Iterator[SegmentChunk]:
        for chunk in super().speak(segments, voice, options, cancelled):
            yield chunk
            if "fault" in segments[chunk.segment]:
                self._fault()


class PacedVoice(HibariModel):
    """The built-in voice with a known pace: it waits 0.2 s for each text and 5 ms for each character."""

    def speak(self, segments: Sequence[str], voice: Voice, options: SpeechOptions, cancelled: Callable[[], bool]) -> Iterator[SegmentChunk]:
        time.sleep(0.2 + 0.005 * sum(map(len, segments)))
        yield from super().speak(segments, voice, options, cancelled)


def test_the_time_for_a_text_is_known_from_the_models_pace_and_its_queue(tmp_path: Path) -> None:
    async def work(engine: TTSEngine, presets: VoicePresetManager) -> None:
        await engine.hosts["hibari"].close()
        host = ModelHost(PacedVoice, RequestQueue(5, 30), stall_seconds=60, after_load=lambda model: model.warm_up([]))
        engine.hosts["hibari"] = host
        host.start()
        await host.settled()
        voice = presets.catalog.resolve("heart")
        assert engine.expected_seconds(voice, 100) is None
        for text in ("Hello.", "A much longer sentence than the one before it, and nothing else."):
            await spoken(engine.speak(text, voice, SpeechOptions(seed=1)))
        alone = engine.expected_seconds(voice, 400)
        assert alone is not None
        assert alone > 0.2 + 0.005 * 400
        waiting = [engine.speak("x " * 50, voice, SpeechOptions(seed=1)) for _ in range(3)]
        queued = engine.expected_seconds(voice, 400)
        assert queued is not None
        assert queued > alone + 2 * (0.2 + 0.005 * 100)
        for utterance in waiting:
            await utterance.aclose()
        assert engine.expected_seconds(voice, 400) == alone, "what was stopped says nothing about the pace"

    with_engine(work, tmp_path)


def with_faulty(fault: Callable[[], None], expected: type[Exception], tmp_path: Path, stall_seconds: float = 60.0) -> None:
    """Check that the utterance's reader gets the fault and that the next utterance works."""

    async def work(engine: TTSEngine, presets: VoicePresetManager) -> None:
        await engine.hosts["hibari"].close()
        host = ModelHost(
            lambda: FaultyVoice(fault), RequestQueue(5, 30), stall_seconds=stall_seconds, after_load=lambda model: model.warm_up([])
        )
        engine.hosts["hibari"] = host
        host.start()
        await host.settled()
        voice = presets.catalog.resolve("heart")
        spoiled = engine.speak("A good sentence. A fault is here. And another.", voice, SpeechOptions(seed=1))
        with pytest.raises(expected):
            await spoken(spoiled)
        await host.settled()
        assert (host.queue.active, host.queue.waiting) == (0, 0)
        assert host.ready
        assert (await spoken(engine.speak("All is well again.", voice, SpeechOptions(seed=1)))).size > 0

    with_engine(work, tmp_path)


@pytest.mark.parametrize("error", [RuntimeError("broken"), SystemExit(3), KeyboardInterrupt()])
def test_whatever_a_model_raises_reaches_the_caller_and_the_thread_survives(error: BaseException, tmp_path: Path) -> None:
    def fault() -> None:
        raise error

    with_faulty(fault, InternalError, tmp_path)


def test_out_of_memory_has_its_own_error(tmp_path: Path) -> None:
    from errors import InsufficientMemoryError

    def fault() -> None:
        raise MemoryError

    with_faulty(fault, InsufficientMemoryError, tmp_path)


def test_a_hung_model_is_abandoned_and_loaded_again(tmp_path: Path) -> None:
    hangs = iter([20.0])
    with_faulty(lambda: time.sleep(next(hangs, 0)), GenerationTimeoutError, tmp_path, stall_seconds=1.0)


class FailingLoad(HibariModel):
    """Fails to load once for each of `failures`."""

    def __init__(self, failures: list[BaseException]) -> None:
        super().__init__()
        self._failures = failures

    def load(self, report: Callable[[LoadProgress], None]) -> None:
        report(LoadProgress("trying", 1, 4))
        if self._failures:
            raise self._failures.pop(0)
        super().load(report)


def test_a_failed_load_is_reported_and_retried_on_reload() -> None:
    async def scenario() -> None:
        failures: list[BaseException] = [ModelLoadError("The disk is full: free 7 GB."), ValueError("?"), MemoryError()]
        host = ModelHost(lambda: FailingLoad(failures), RequestQueue(5, 30), stall_seconds=60)
        host.start()
        for message in ("The disk is full: free 7 GB.", "Unexpected error during the load (ValueError)", "not enough memory"):
            await host.settled()
            assert host.state == "failed"
            assert message in (host.error or "")
            host.reload()
        await host.settled()
        assert host.state == "ready"
        assert host.error is None
        await host.close()

    asyncio.run(scenario())


def test_an_idle_model_is_unloaded_and_loaded_again_on_demand() -> None:
    async def scenario() -> None:
        host = ModelHost(HibariModel, RequestQueue(5, 30), stall_seconds=60, idle_seconds=0.2)
        host.start()
        await host.settled()
        while host.state != "unloaded":
            await asyncio.sleep(0.05)
        assert host.ready
        async with host.queue.slot():
            rate = await host.run(lambda model: model.sample_rate, Heartbeat())
        assert rate == 24_000
        assert str(host.state) == "ready"  # str: mypy still assumes "unloaded"
        await host.close()

    asyncio.run(scenario())


@pytest.fixture(scope="module")
def csm_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Settings for a server whose CSM is the tiny checkpoint: a few frames of noise a segment, so its output is not checked."""
    presets = tmp_path_factory.mktemp("presets")
    tiny = {"name": "tiny", "voice_key": "conversational_a", "max_audio_length_ms": 240}
    (presets / "tiny.json").write_text(json.dumps(tiny))
    (presets / "brief.json").write_text(json.dumps(tiny | {"name": "brief", "max_audio_length_ms": 80}))
    (presets / "heart.json").write_text(json.dumps({"name": "heart", "model": "hibari", "voice_key": "heart"}))
    outcomes = [tiny_csm.ends_after(frames) for frames in (1, 2, 3)]
    environment = tiny_csm.environment(tiny_csm.build(script={"": outcomes}, small_codec=True))
    return {
        "CSM": "on",
        "GUARD": "off",
        "MODEL_DTYPE": "float32",
        "DEFAULT_VOICE": "tiny",
        "PRESETS_DIR": presets,
        "PAUSE_MS": 100,
        **environment,
    }


@pytest.fixture(scope="module")
def csm_server(tmp_path_factory: pytest.TempPathFactory, csm_settings: dict[str, object]) -> Iterator[RunningServer]:
    from conftest import start_server

    running = start_server(tmp_path_factory.mktemp("csm"), **csm_settings)
    try:
        health = running.wait_for(lambda health: health["models"]["csm-1b"]["state"] in {"ready", "failed"}, 180)
        assert health["models"]["csm-1b"]["state"] == "ready", health
        yield running
    finally:
        running.stop()


def speak(server: RunningServer, **fields: Any) -> httpx.Response:
    body = {"model": "csm-1b", "input": "Hello.", "voice": "tiny", "response_format": "wav"} | fields
    response = httpx.post(f"{server.url}/v1/audio/speech", json=body, timeout=240)
    assert response.status_code == 200, response.text
    return response


def test_csm_loads_from_a_hugging_face_cache_and_speaks(csm_server: RunningServer) -> None:
    health = csm_server.health()
    assert health["status"] == "ok"
    assert health["model"]["loaded"] is True
    assert health["model"]["sample_rate"] == 24_000
    assert health["model"]["peak_memory_gb"] > 0
    csm = health["models"]["csm-1b"]
    assert (csm["source"], csm["dtype"], csm["watermark"]) == ("sesame/csm-1b", "float32", False)
    response = speak(csm_server)
    samples, rate = decode(response.content, "wav")
    assert rate == 24_000
    assert 0 < samples.size <= 3 * 1920  # three frames of 80 ms
    assert np.abs(samples).max() > 0
    assert response.headers["x-model"] == "csm-1b"


def test_csm_starts_every_utterance_from_a_clean_state(csm_server: RunningServer) -> None:
    first = speak(csm_server, seed=4).content
    speak(csm_server, seed=5, input="Another text. With two sentences.")
    assert speak(csm_server, seed=4).content == first
    assert len({speak(csm_server, seed=seed).content for seed in (6, 7, 8)} | {first}) > 1


def test_the_requests_sampler_reaches_csm(csm_server: RunningServer) -> None:
    greedy = {speak(csm_server, seed=seed, temperature=0).content for seed in (1, 2)}
    assert len(greedy) == 1
    assert speak(csm_server, seed=1, top_k=1).content == speak(csm_server, seed=2, top_k=1).content


def test_a_long_text_becomes_one_capped_segment_after_another(csm_server: RunningServer) -> None:
    text = " ".join(f"This is sentence number {number}, and it is long enough to matter." for number in range(12))
    response = speak(csm_server, input=text, timestamps=True)
    captions = httpx.get(f"{csm_server.url}{response.headers['x-timestamps']}").json()["captions"]
    assert len(captions) >= 3
    assert " ".join(caption["text"] for caption in captions) == text
    assert all(caption["end"] - caption["start"] <= 0.2401 for caption in captions)
    assert len(captions[0]["text"]) <= 120


def test_csm_streams_what_it_would_have_sent_complete(csm_server: RunningServer) -> None:
    text = "First comes this. " * 9
    streamed = speak(csm_server, seed=3, input=text, stream=True, response_format="wav")
    complete = speak(csm_server, seed=3, input=text, response_format="wav")
    a, b = decode(streamed.content, "wav")[0], decode(complete.content, "wav")[0]
    assert a.size == b.size
    assert np.abs(a - b).max() <= 2 / 32768  # frames are decoded in other blocks: equal within float error


@pytest.mark.parametrize("stream", [False, True])
def test_a_dialogue_is_spoken_by_its_voices(csm_server: RunningServer, stream: bool) -> None:
    turns = [f"[voice:{voice}] " + "Sentence one is here. " * 20 for voice in ("brief", "tiny", "brief")]
    answer = speak(csm_server, input=" ".join(turns), seed=3, timestamps=True, stream=stream)
    captions = httpx.get(f"{csm_server.url}{answer.headers['x-timestamps']}").json()["captions"]
    assert " ".join(caption["text"] for caption in captions) == " ".join(["Sentence one is here."] * 60)
    frames = [round((caption["end"] - caption["start"]) / 0.08) for caption in captions]
    size = len(frames) // 3
    assert set(frames[:size]) | set(frames[-size:]) == {1}
    assert max(frames[size:-size]) > 1


def test_a_voice_of_another_model_cannot_take_part(csm_server: RunningServer) -> None:
    body = {"model": "m", "voice": "tiny", "input": "Hello. [voice:heart] Hello."}
    refused = httpx.post(f"{csm_server.url}/v1/audio/speech", json=body, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_voice")


def test_the_two_models_speak_side_by_side(csm_server: RunningServer) -> None:
    body = {"model": "m", "input": "A longer sentence that takes CSM a while to say. " * 4, "voice": "tiny", "stream": True}
    with httpx.Client(base_url=csm_server.url, timeout=240) as client, client.stream("POST", "/v1/audio/speech", json=body) as response:
        assert speak(csm_server, voice="heart").headers["x-model"] == "hibari"
        assert len(response.read()) > 0


def test_without_a_hub_the_server_stays_up_and_says_what_to_do(make_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    server = make_server(CSM="on", HF_HUB_CACHE=tmp_path / "empty", HF_HUB_OFFLINE=0, HF_ENDPOINT="http://127.0.0.1:9")
    health = server.wait_for(lambda health: health["models"]["csm-1b"]["state"] == "failed", 60)
    assert health["status"] == "degraded"
    assert "sesame/csm-1b" in health["models"]["csm-1b"]["error"]
    body = {"model": "m", "input": "Hello.", "voice": "conversational"}
    with server.client() as client:
        refused = client.post("/v1/audio/speech", json=body)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "model_not_ready"
        assert "heart" in refused.json()["error"]["message"]
        assert client.post("/v1/audio/speech", json=body | {"voice": "heart"}).status_code == 200
        assert client.post("/admin/reload").json()["models"]["hibari"] == "ready"
