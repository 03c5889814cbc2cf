"""Streamed answers: the same audio as complete answers, sent while it is generated, and a closed connection after a failure."""

from __future__ import annotations

import base64
import json
import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from conftest import RunningServer
from listening import decode, transcribe, word_error_rate

TEXT = (
    "The train left the station at nine. Nobody had expected it to be on time! Was that not a good sign? "
    "Outside, the fields were green, and the river was full after the rain. By noon they had reached the coast."
)
FORMATS = ["mp3", "opus", "aac", "flac", "wav", "pcm"]
BODY: dict[str, Any] = {"model": "csm-1b", "input": TEXT, "voice": "heart", "seed": 11}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    blocks = [block for block in response.text.split("\n\n") if block]
    assert all(block.startswith("data: ") for block in blocks)
    return [json.loads(block[6:]) for block in blocks]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_streams_the_whole_text(server: RunningServer, name: str) -> None:
    with server.client() as client:
        response = client.post("/v1/audio/speech", json=BODY | {"response_format": name, "stream": True})
        complete = client.post("/v1/audio/speech", json=BODY | {"response_format": name})
    assert "content-length" not in response.headers
    streamed, rate = decode(response.content, name)
    whole, _ = decode(complete.content, name)
    # A streamed MP3 cannot say how much of its first and last frame is the encoder's padding: up to 2 frames of 48 ms.
    assert streamed.size / rate == pytest.approx(whole.size / rate, abs=0.1 if name == "mp3" else 0.03)
    assert word_error_rate(TEXT, transcribe(streamed, rate)) == 0
    if name in {"flac", "wav", "pcm"}:
        assert np.array_equal(streamed, whole)


@pytest.mark.parametrize("asked", [{"stream": True}, {"stream_format": "audio"}, {"response_format": "pcm"}])
def test_every_way_of_asking_streams(server: RunningServer, asked: dict[str, Any]) -> None:
    with server.client() as client, client.stream("POST", "/v1/audio/speech", json=BODY | asked) as response:
        assert response.headers["transfer-encoding"] == "chunked"
        assert len(list(response.iter_raw())) > 1


def test_audio_is_sent_while_the_rest_is_generated(server: RunningServer) -> None:
    long = BODY | {"input": " ".join([TEXT] * 9), "response_format": "pcm"}
    with server.client() as client, client.stream("POST", "/v1/audio/speech", json=long) as response:
        pieces = response.iter_raw()
        first = next(pieces)
        assert server.health()["models"]["hibari"]["active"] == 1
        rest = b"".join(pieces)
    assert len(first) < len(rest)


def test_events_are_openais(server: RunningServer) -> None:
    with server.client() as client:
        response = client.post("/v1/audio/speech", json=BODY | {"stream_format": "sse", "response_format": "wav"})
        complete = client.post("/v1/audio/speech", json=BODY | {"response_format": "wav"})
    assert response.headers["content-type"].startswith("text/event-stream")
    told = events(response)
    assert {event["type"] for event in told[:-1]} == {"speech.audio.delta"}
    assert told[-1]["type"] == "speech.audio.done"
    usage = told[-1]["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0
    audio = b"".join(base64.b64decode(event["audio"]) for event in told[:-1])
    assert np.array_equal(decode(audio, "wav")[0], decode(complete.content, "wav")[0])


def test_a_reader_that_pauses_gets_small_events(server: RunningServer) -> None:
    long = BODY | {"input": " ".join([TEXT] * 6), "stream_format": "sse", "response_format": "pcm"}
    with server.client() as client, client.stream("POST", "/v1/audio/speech", json=long) as response:
        lines = response.iter_lines()
        sizes = [len(next(lines))]
        end = time.monotonic() + 60
        while server.health()["models"]["hibari"]["active"]:  # meanwhile all audio is generated, and most of it waits in the server
            assert time.monotonic() < end
            time.sleep(0.05)
        sizes += [len(line) for line in lines]
    assert sum(sizes) > 2_000_000
    assert max(sizes) <= 64_000


def test_the_official_client_reads_the_events(server: RunningServer) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as client,
        client.audio.speech.with_streaming_response.create(
            model="m", voice="alloy", input="Hello there.", response_format="pcm", stream_format="sse"
        ) as response,
    ):
        lines = [line for line in response.iter_lines() if line]
    kinds = [json.loads(line.removeprefix("data: "))["type"] for line in lines]
    assert kinds[-1] == "speech.audio.done"
    assert kinds.count("speech.audio.delta") == len(kinds) - 1 > 0


def test_timestamps_match_the_audio_of_each_sentence(server: RunningServer) -> None:
    with server.client() as client:
        told = events(client.post("/v1/audio/speech", json=BODY | {"stream_format": "sse", "response_format": "pcm", "timestamps": True}))
        complete = client.post("/v1/audio/speech", json=BODY | {"response_format": "wav", "timestamps": True})
        path = complete.headers["x-timestamps"]
        captions = client.get(path).json()["captions"]
        vtt, srt = client.get(f"{path}?format=vtt"), client.get(f"{path}?format=srt")
        streamed = client.post("/v1/audio/speech", json=BODY | {"response_format": "mp3", "stream": True, "timestamps": True})
        assert client.get(streamed.headers["x-timestamps"]).json()["captions"] == captions
    marks = [{key: event[key] for key in ("group", "text", "start", "end")} for event in told if event["type"] == "speech.audio.timestamps"]
    assert marks == captions
    assert [caption["group"] for caption in captions] == list(range(5))
    assert " ".join(caption["text"] for caption in captions) == TEXT
    samples, rate = decode(complete.content, "wav")
    for caption in captions:
        heard = transcribe(samples[int(caption["start"] * rate) : int(caption["end"] * rate)], rate)
        assert word_error_rate(caption["text"], heard) <= 0.2
    assert vtt.text.startswith("WEBVTT\n\n00:00:00.000 --> ")
    assert vtt.headers["content-type"].startswith("text/vtt")
    assert srt.text.startswith("1\n00:00:00,000 --> ")


def test_timestamps_follow_the_speed(server: RunningServer) -> None:
    with server.client() as client:
        ends = []
        for speed in (1.0, 2.0):
            answer = client.post("/v1/audio/speech", json=BODY | {"response_format": "wav", "timestamps": True, "speed": speed})
            ends.append(client.get(answer.headers["x-timestamps"]).json()["captions"][-1]["end"])
            assert ends[-1] <= float(answer.headers["x-audio-duration"]) + 0.05
    assert ends[1] == pytest.approx(ends[0] / 2, abs=0.01)


def test_refusals_of_streams_have_their_status(server: RunningServer) -> None:
    with server.client() as client:
        for asked in ({"stream": True}, {"stream_format": "sse"}):
            response = client.post("/v1/audio/speech", json=BODY | asked | {"voice": "nobody"})
            assert response.status_code == 400
            assert response.json()["error"]["code"] == "invalid_voice"


def ffmpeg_that_dies(folder: Path) -> str:
    """Return a PATH with an ffmpeg that is killed after some output, as an out-of-memory killer would do."""
    import listening

    folder.mkdir()
    script = folder / "ffmpeg"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *version*) exec "{listening.ffmpeg()}" "$@";; esac\n"{listening.ffmpeg()}" "$@" | head -c 30000\nkill -9 $$\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def events_until_broken(client: httpx.Client, body: dict[str, object]) -> tuple[dict[str, Any], bool]:
    """Return the last event of a stream, and whether its connection was closed before the end of the body."""
    last: dict[str, Any] = {}
    try:
        with client.stream("POST", "/v1/audio/speech", json=body) as response:
            for line in response.iter_lines():
                last = json.loads(line.removeprefix("data: ")) if line else last
    except httpx.RemoteProtocolError:
        return last, True
    return last, False


def test_a_failure_midway_closes_the_connection(make_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    server = make_server(PATH=ffmpeg_that_dies(tmp_path / "bin"))
    long = BODY | {"input": " ".join([TEXT] * 4)}
    with server.client() as client:
        with pytest.raises(httpx.RemoteProtocolError):
            client.post("/v1/audio/speech", json=long | {"response_format": "flac", "stream": True})
        said_why, broken = events_until_broken(client, long | {"response_format": "flac", "stream_format": "sse"})
        assert broken
        assert said_why["type"] == "speech.audio.error"
        assert said_why["error"]["code"] == "conversion_failed"
        assert client.post("/v1/audio/speech", json=long | {"response_format": "flac"}).json()["error"]["code"] == "conversion_failed"
        assert client.post("/v1/audio/speech", json=BODY | {"response_format": "pcm"}).status_code == 200


def test_killing_the_encoder_breaks_the_stream_and_serves_the_next(server: RunningServer) -> None:
    long = BODY | {"input": " ".join([TEXT] * 19), "response_format": "mp3", "stream": True}
    with server.client() as client:
        with pytest.raises(httpx.RemoteProtocolError), client.stream("POST", "/v1/audio/speech", json=long) as response:
            pieces = response.iter_raw()
            next(pieces)
            for child in psutil.Process(server.process.pid).children(recursive=True):
                child.send_signal(signal.SIGKILL)
            list(pieces)
        time.sleep(0.2)
        assert psutil.Process(server.process.pid).children(recursive=True) == []
        assert client.post("/v1/audio/speech", json=BODY).status_code == 200
