"""Successful requests to every endpoint of a running server. The audio of every format is decoded and transcribed."""

from __future__ import annotations

import wave
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from conftest import RunningServer
from listening import decode, duration, transcribe, word_error_rate

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
