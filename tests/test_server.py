"""Successful requests to every endpoint of a running server. The audio of every format is decoded and transcribed."""

from __future__ import annotations

import gzip
import json
import socket
import wave
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from conftest import RunningServer
from listening import decode, duration, transcribe, word_error_rate

from schemas import Health

SENTENCE = "Good morning! The coffee is ready, and the sun is shining."
FORMATS = {"mp3": "audio/mpeg", "opus": "audio/opus", "aac": "audio/aac", "flac": "audio/flac", "wav": "audio/wav", "pcm": "audio/pcm"}


def speak(server: RunningServer, path: str = "/v1/audio/speech", **fields: Any) -> httpx.Response:
    body = {"model": "csm-1b", "input": SENTENCE, "voice": "heart"} | fields
    with server.client() as client:
        response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_contains_the_sentence(server: RunningServer, name: str) -> None:
    response = speak(server, response_format=name)
    assert response.headers["content-type"] == FORMATS[name]
    assert response.headers["content-disposition"] == f"attachment; filename=speech.{name}"
    samples, rate = decode(response.content, name)
    assert rate == (48_000 if name == "opus" else 24_000)  # Opus always decodes to 48 kHz
    assert word_error_rate(SENTENCE, transcribe(samples, rate)) == 0


@pytest.mark.parametrize("name", ["mp3", "opus", "flac", "wav"])
def test_complete_files_have_exact_durations(server: RunningServer, name: str) -> None:
    response = speak(server, response_format=name, seed=1)
    said = float(response.headers["x-audio-duration"])
    reference = speak(server, response_format="wav", seed=1)
    with wave.open(BytesIO(reference.content)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24_000)
        exact = file.getnframes() / file.getframerate()
    assert said == pytest.approx(exact, abs=0.001)
    samples, rate = decode(response.content, name)
    assert samples.size / rate == pytest.approx(exact, abs=0.002)
    # mutagen counts an MP3's whole frames, of 48 ms; what the decoder plays of them is in the header, and exact.
    assert duration(response.content, name) == pytest.approx(exact, abs=0.05 if name == "mp3" else 0.01)
    assert int(response.headers["content-length"]) == len(response.content)


def test_without_a_format_it_is_mp3(server: RunningServer) -> None:
    response = speak(server)
    assert response.headers["content-type"] == "audio/mpeg"
    assert decode(response.content, "mp3")[0].size > 24_000


def test_answers_have_headers_about_voice_seed_and_times(server: RunningServer) -> None:
    headers = speak(server, seed=5).headers
    assert headers["x-voice"] == "heart"
    assert headers["x-model"] == "hibari"
    assert headers["x-seed"] == "5"
    assert len(headers["x-request-id"]) == 32
    assert 0 < float(headers["x-generation-time"]) < float(headers["x-audio-duration"])
    assert float(headers["x-queue-time"]) >= 0


def test_a_given_request_id_comes_back(server: RunningServer) -> None:
    response = httpx.get(f"{server.url}/health", headers={"X-Request-Id": "my-id.7"})
    assert response.headers["x-request-id"] == "my-id.7"


def test_the_path_without_v1_speaks_too(server: RunningServer) -> None:
    assert decode(speak(server, "/audio/speech").content, "mp3")[0].size > 24_000


@pytest.mark.parametrize("voice", ["heart", "alloy", "coral", {"id": "heart"}, {"id": "nova"}])
def test_voices_are_reached_by_name_alias_and_id(server: RunningServer, voice: object) -> None:
    assert speak(server, voice=voice, input="Hi.").headers["x-voice"] == "heart"


def test_the_same_seed_gives_the_same_samples_however_often(server: RunningServer) -> None:
    first = speak(server, response_format="pcm", seed=42).content
    speak(server, response_format="pcm", seed=43, input="Something else in between.")
    assert speak(server, response_format="pcm", seed=42).content == first
    assert speak(server, response_format="pcm", seed=43).content != first


@pytest.mark.parametrize("speed", [0.25, 0.5, 2.0, 4.0])
def test_speed_changes_the_length(server: RunningServer, speed: float) -> None:
    normal = float(speak(server, response_format="wav", seed=1).headers["x-audio-duration"])
    changed = speak(server, response_format="wav", seed=1, speed=speed)
    assert float(changed.headers["x-audio-duration"]) == pytest.approx(normal / speed, rel=0.03)
    with wave.open(BytesIO(changed.content)) as file:
        assert file.getnframes() / 24_000 == pytest.approx(float(changed.headers["x-audio-duration"]), abs=0.001)


def test_unknown_fields_are_ignored(server: RunningServer) -> None:
    speak(server, extra={"a": 1}, instructions="Speak happily.", emotion="glad")


def test_models_are_listed_as_openai_lists_them(server: RunningServer) -> None:
    with server.client() as client:
        listed = client.get("/v1/models").json()
        one = client.get("/v1/models/csm-1b").json()
    assert listed["object"] == "list"
    assert {"id": "csm-1b", "object": "model", "created": 1740000000, "owned_by": "sesame"} in listed["data"]
    assert one == listed["data"][0]


def test_voices_are_listed_with_readiness_aliases_and_description(server: RunningServer) -> None:
    voices = {voice["id"]: voice for voice in httpx.get(f"{server.url}/v1/audio/voices").json()["voices"]}
    assert set(voices) == {"heart", "emma", "fenrir", "hibari-fable", "kore", "conversational", "conversational_b"}
    assert voices["heart"]["ready"] is True
    assert voices["conversational"]["ready"] is False
    assert "coral" in voices["heart"]["aliases"]
    assert voices["heart"]["description"]
    assert {voice["model"] for voice in voices.values()} == {"hibari", "csm-1b"}


def test_health_shows_models_ffmpeg_voices_and_queue(server: RunningServer) -> None:
    health = server.health()
    assert health["status"] == "ok"
    assert health["model"]["id"] == "sesame/csm-1b"
    assert health["model"]["loaded"] is False
    assert health["models"]["hibari"]["state"] == "ready"
    assert health["models"]["hibari"]["watermark"] is False
    assert health["models"]["csm-1b"]["state"] == "disabled"
    assert health["ffmpeg"] is True
    assert health["ffmpeg_path"]
    assert health["ffmpeg_version"]
    assert health["voices"] == ["conversational", "conversational_b", "emma", "fenrir", "heart", "hibari-fable", "kore"]
    assert health["queue"]["active"] == 0
    assert health["uptime_seconds"] > 0
    documented = Health.model_validate(health, strict=True)  # the answer is not made from it
    assert documented.model_fields_set == set(Health.model_fields) | {"ffmpeg_path"}
    assert httpx.get(f"{server.url}/health/ready").status_code == 200


def test_the_documentation_has_an_example_that_works(server: RunningServer) -> None:
    schema = httpx.get(f"{server.url}/openapi.json").json()
    body = schema["components"]["schemas"]["SpeechRequest"]
    example = body["examples"][0]
    assert httpx.get(f"{server.url}/docs").status_code == 200
    assert speak(server, **example).headers["x-voice"] == "heart"


def test_the_official_client_speaks(server: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
        answer = client.audio.speech.create(model="gpt-4o-mini-tts", voice="coral", input=SENTENCE)
        samples, rate = decode(answer.content, "mp3")
        assert client.models.list().data[0].id == "csm-1b"
    assert word_error_rate(SENTENCE, transcribe(samples, rate)) == 0


def test_the_official_client_gets_its_own_exceptions(server: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.audio.speech.create(model="m", voice="nobody", input="Hi.")
        assert bad.value.code == "invalid_voice"
        assert bad.value.param == "voice"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4")
        with pytest.raises(openai.InternalServerError) as unready:
            client.audio.speech.create(model="m", voice="conversational", input="Hi.")
        assert unready.value.status_code == 503
        assert unready.value.code == "model_not_ready"


def test_speech_is_neither_clipped_nor_silent(server: RunningServer) -> None:
    samples, _ = decode(speak(server, response_format="wav").content, "wav")
    assert 0.05 < float(np.abs(samples).max()) < 1.0
    assert 0.01 < float(np.sqrt(np.mean(samples**2))) < 0.3


def test_the_log_has_one_line_a_request_and_never_the_text(server: RunningServer) -> None:
    answer = speak(server, input="Ultramarine xylophones.", speed=1.5, response_format="flac")
    line = next(line for line in server.log_text().splitlines() if answer.headers["x-request-id"] in line)
    for fact in (
        "characters=23",
        "voice=heart",
        "model=hibari",
        "format=flac",
        "speed=1.5",
        "queue=",
        "generation=",
        "audio=",
        "rtf=",
        "status=200",
    ):
        assert fact in line
    assert (server.cache_dir / "server.log").read_text().count(answer.headers["x-request-id"]) == 1
    assert "xylophone" not in server.log_text().lower()


def test_metrics_count_what_was_spoken(server: RunningServer) -> None:
    speak(server, response_format="opus")
    text = httpx.get(f"{server.url}/metrics").text
    assert 'sesame_tts_requests_total{format="opus",model="hibari",outcome="200"}' in text
    for name in ("queue_seconds", "generation_seconds", "first_audio_seconds", "audio_seconds", "real_time_factor"):
        assert f'sesame_tts_{name}_count{{model="hibari"}}' in text
    assert 'sesame_tts_active{model="hibari"} 0.0' in text


def test_null_means_absent_for_every_optional_field(server: RunningServer) -> None:
    optional: dict[str, Any] = dict.fromkeys(
        ("speed", "stream", "stream_format", "timestamps", "seed", "temperature", "top_k", "normalize", "instructions")
    )
    response = speak(server, **{**optional, "response_format": None, "sample_rate": None})
    assert response.headers["content-type"] == "audio/mpeg"
    refused = httpx.post(f"{server.url}/v1/audio/speech", json={"model": "m", "voice": None, "input": SENTENCE})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_voice")


@pytest.mark.parametrize("voice", [" heart ", "Heart", "HEART", "default", "Alloy", {"id": "Heart"}])
def test_space_and_case_of_a_voice_do_not_matter(server: RunningServer, voice: object) -> None:
    assert speak(server, voice=voice, response_format="pcm", input="Yes.").headers["x-voice"] == "heart"


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/v1/audio/voices", "/openapi.json", "/docs"])
def test_head_answers_as_get_without_a_body(server: RunningServer, path: str) -> None:
    head, get = httpx.head(server.url + path), httpx.get(server.url + path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize("model", ["tts-1", "tts-1-hd-1106", "gpt-4o-mini-tts", "gpt-4o-mini-tts-2025-12-15", "kokoro"])
def test_the_models_of_other_servers_are_found(server: RunningServer, model: str) -> None:
    found = httpx.get(f"{server.url}/v1/models/{model}").json()
    assert (found["id"], found["object"]) == (model, "model")


def raw(server: RunningServer, target: str, host: str = "localhost") -> bytes:
    """Return the answer to a GET with this request target, which no HTTP client sends."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("target", ["//v1/models", "/v1//models", "http://localhost/v1/models", "HTTP://localhost:8880//v1/models"])
def test_other_spellings_of_a_path_reach_it(server: RunningServer, target: str) -> None:
    assert raw(server, target).startswith(b"HTTP/1.1 200 ")


def test_the_host_of_an_absolute_target_is_checked_too(server: RunningServer) -> None:
    assert raw(server, "http://evil.example.com/v1/models").startswith(b"HTTP/1.1 421 ")


def test_a_compressed_body_is_refused(server: RunningServer) -> None:
    body = gzip.compress(json.dumps({"model": "m", "voice": "heart", "input": SENTENCE}).encode())
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    refused = httpx.post(f"{server.url}/v1/audio/speech", content=body, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(("name", "rate", "streamed"), [("wav", 8000, False), ("wav", 48_000, True), ("pcm", 16_000, True)])
def test_the_sample_rate_is_as_asked(server: RunningServer, name: str, rate: int, streamed: bool) -> None:
    usual = decode(speak(server, response_format=name, seed=1, stream=streamed).content, name)[0]
    data = speak(server, response_format=name, seed=1, stream=streamed, sample_rate=rate).content
    if name == "wav":
        with wave.open(BytesIO(data)) as file:
            assert file.getframerate() == rate
    samples = np.frombuffer(data[44 if name == "wav" else 0 :], "<i2") / 32768
    assert samples.size / rate == pytest.approx(usual.size / 24_000, abs=0.05)
    assert word_error_rate(SENTENCE, transcribe(samples.astype(np.float32), rate)) == 0


def test_a_sample_rate_that_a_format_does_not_have_is_refused(server: RunningServer) -> None:
    body = {"model": "m", "voice": "heart", "input": SENTENCE, "response_format": "mp3", "sample_rate": 8000}
    refused = httpx.post(f"{server.url}/v1/audio/speech", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_sample_rate")
