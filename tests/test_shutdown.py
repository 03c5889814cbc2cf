"""Shutdown: one signal, two signals, SHUTDOWN_TIMEOUT, SIGKILL; and the next start."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import soundfile
from conftest import RunningServer, start_server, still_running
from listening import decode

from server_process import pid_file

SENTENCE = "This sentence is spoken to its very end, whatever happens meanwhile. "
LONG: dict[str, Any] = {"model": "m", "voice": "heart", "input": SENTENCE * 32, "response_format": "wav"}
SHORT: dict[str, Any] = LONG | {"input": SENTENCE}


def speak(server: RunningServer, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/audio/speech", json=body, timeout=120)


def busy(health: dict[str, Any], waiting: int = 0) -> bool:
    return bool(health["queue"]["active"] == 1 and health["queue"]["waiting"] >= waiting)


def left_over(cache_dir: Path) -> list[str]:
    """Return the files in the cache folder, except the log."""
    return sorted(
        str(file.relative_to(cache_dir)) for file in cache_dir.rglob("*") if file.is_file() and not file.name.startswith("server.log")
    )


def test_a_request_in_progress_finishes_and_waiting_ones_get_503(make_server: Callable[..., RunningServer]) -> None:
    server = make_server()
    with ThreadPoolExecutor(4) as pool:
        running = pool.submit(speak, server, LONG)
        server.wait_for(busy)
        waiting = [pool.submit(speak, server, SHORT) for _ in range(3)]
        server.wait_for(lambda health: busy(health, waiting=3))
        server.process.terminate()
        finished, refused = running.result(), [answer.result() for answer in waiting]
    samples, rate = decode(finished.content, "wav")
    assert finished.status_code == 200
    assert samples.size / rate == pytest.approx(float(finished.headers["x-audio-duration"]), abs=0.01)
    for answer in refused:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert int(answer.headers["retry-after"]) > 0
    assert server.process.wait(30) == 0
    assert left_over(server.cache_dir) == []
    assert "Traceback" not in server.log_text()
    with pytest.raises(httpx.ConnectError):
        speak(server, SHORT)


def test_a_stream_finishes_too(make_server: Callable[..., RunningServer]) -> None:
    server = make_server()
    with server.client() as client, client.stream("POST", "/v1/audio/speech", json=LONG | {"stream_format": "sse"}) as response:
        pieces = response.iter_text()
        text = next(pieces)
        server.process.send_signal(signal.SIGINT)
        text += "".join(pieces)
    events = [json.loads(line[6:])["type"] for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "speech.audio.done"
    assert server.process.wait(30) == 0


def test_a_second_sigterm_changes_nothing_and_a_second_ctrl_c_stops_at_once(make_server: Callable[..., RunningServer]) -> None:
    for number, finishes in ((signal.SIGTERM, True), (signal.SIGINT, False)):
        server = make_server()
        with server.client() as client, client.stream("POST", "/v1/audio/speech", json=LONG | {"stream": True}) as response:
            pieces = response.iter_raw()
            size = len(next(pieces))
            for _ in range(2):
                server.process.send_signal(number)
                time.sleep(0.2)
            try:
                size += sum(map(len, pieces))
                whole = True
            except httpx.RemoteProtocolError:
                whole = False
        assert server.process.wait(30) == 0
        assert whole or not finishes
        assert left_over(server.cache_dir) == []


def half_requests(port: int) -> list[socket.socket]:
    """Open three connections: idle, in the middle of a head, and in the middle of a body."""
    started = [b"", b"POST /v1/audio/speech HTTP/1.1\r\nHost: localh", b"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"]  # fmt: skip
    sockets = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in started]
    for opened, data in zip(sockets, started, strict=True):
        opened.sendall(data)
    return sockets


def test_shutdown_does_not_wait_for_incomplete_requests(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(SHUTDOWN_TIMEOUT=600)
    idle, in_head, in_body = half_requests(server.port)
    server.wait_for(lambda health: health["status"] == "ok")
    server.process.terminate()
    assert idle.recv(1000) == b""
    assert in_head.recv(1000) == b""
    answer = in_body.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b'"code": "shutting_down"' in answer
    assert server.process.wait(30) == 0
    for opened in (idle, in_head, in_body):
        opened.close()


def test_requests_after_the_timeout_get_503_and_the_exit_status_is_0(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(SHUTDOWN_TIMEOUT=0)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(speak, server, LONG | {"speed": 0.25, "response_format": "flac"})
        server.wait_for(busy)
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.process.terminate()
        answer = running.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
    assert server.process.wait(30) == 0
    assert not still_running(children)
    assert left_over(server.cache_dir) == []


def test_a_stream_after_the_timeout_is_disconnected(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(SHUTDOWN_TIMEOUT=0)
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    slow.settimeout(30)
    slow.connect(("127.0.0.1", server.port))
    body = json.dumps(LONG | {"response_format": "pcm"}).encode()
    head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with slow:
        slow.sendall(head.encode() + body)
        received = slow.recv(1000)
        server.process.terminate()
        assert server.process.wait(30) == 0
        try:
            while data := slow.recv(65536):
                received += data
        except ConnectionResetError:
            pass
    assert not received.endswith(b"0\r\n\r\n")


def test_the_server_starts_after_a_kill_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    recording = wave_bytes()
    for delay in (0.0, 0.4):
        server = start_server(tmp_path)
        server.wait_for(lambda health: health["status"] == "ok")
        work = [LONG, LONG | {"stream": True}, SHORT | {"response_format": "opus"}, SHORT | {"timestamps": True, "speed": 2.0}]
        threads = [threading.Thread(target=quietly, args=(speak, server, body)) for body in work]
        threads += [threading.Thread(target=quietly, args=(add_voice, server, recording, f"Voice {delay} {n}")) for n in range(3)]
        for thread in threads:
            thread.start()
        half = half_requests(server.port)
        server.wait_for(busy)
        time.sleep(delay)
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.process.kill()
        server.process.wait(10)
        for thread in threads:
            thread.join()
        for opened in half:
            opened.close()
        assert not still_running(children)  # an encoder ends when its input is closed
    again = start_server(tmp_path)
    try:
        again.wait_for(lambda health: health["status"] == "ok")
        assert speak(again, SHORT).status_code == 200
        for voice in httpx.get(f"{again.url}/v1/audio/voices").json()["voices"]:
            if voice["uploaded"]:
                assert httpx.delete(f"{again.url}/v1/audio/voices/{voice['id']}").status_code == 200
        assert list(scratch.glob("sesame-tts-*")) == []
        assert json.loads((again.cache_dir / "server.pid").read_text())["pid"] == again.process.pid
    finally:
        assert again.stop() == 0
    assert set(left_over(again.cache_dir)) <= {"voices/.lock"}


def quietly(call: Callable[..., object], *arguments: object) -> None:
    """Make a request and ignore a lost connection."""
    try:
        call(*arguments)
    except httpx.HTTPError:
        return


def add_voice(server: RunningServer, recording: bytes, name: str) -> httpx.Response:
    form = {"name": name, "consent": "true", "ref_text": "A sound."}
    return httpx.post(f"{server.url}/v1/audio/voices", data=form, files={"audio_sample": ("a.wav", recording)}, timeout=60)


def wave_bytes() -> bytes:
    """Return 30 s of audio as WAV."""
    samples = (8000 * np.sin(np.arange(30 * 24_000) / 20)).astype("<i2")
    file = io.BytesIO()
    soundfile.write(file, samples, 24_000, format="WAV")
    return file.getvalue()


def test_the_server_starts_with_any_content_in_the_pid_file(tmp_path: Path) -> None:
    path = tmp_path / "server.pid"
    for content in (b"", b"not json", b'{"pid": 1, "port": 1}', b'{"pid": "x"}', b"[]", b'{"pid": 99999999, "port": 1}', b"\xff"):
        path.write_bytes(content)
        with pid_file(tmp_path, 8880):
            assert json.loads(path.read_text()) == {"pid": os.getpid(), "port": 8880}
        assert not path.exists()
