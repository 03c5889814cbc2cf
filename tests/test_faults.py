"""Real faults around a running server: the affected request gets an error, the next one is served, nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import listening
import psutil
import pytest
import uvicorn
from conftest import PROJECT, RunningServer, clean_environment, fork_server, free_port

from config import Settings
from http_middleware import RequestLog
from server import create_app
from server_process import GuardedProtocol

BODY: dict[str, Any] = {"model": "m", "voice": "heart", "input": "This is said in spite of it all."}
STREAMED = BODY | {"stream": True}
LONG: dict[str, Any] = {
    "input": BODY["input"] * 15,
    "speed": 0.25,
    "seed": 1,
}  # two minutes, for a quarter of the work that such a text takes at speed 1


def speak(server: RunningServer, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/audio/speech", json=BODY | fields, timeout=60)


def failed(response: httpx.Response, code: str) -> str:
    error = response.json()["error"]
    assert error["code"] == code, error
    assert str(PROJECT) not in response.text
    assert "/tmp" not in response.text  # noqa: S108 - looked for, not used
    return str(error["message"])


def speaks_without_ffmpeg(started: RunningServer) -> None:
    """Check a server that found no ffmpeg at its start: it reports that, and serves the formats that need none."""
    health = started.wait_for(lambda health: health["models"]["hibari"]["state"] == "ready")
    assert (health["status"], health["ffmpeg"], health["ffmpeg_version"]) == ("degraded", False, None)
    assert "ffmpeg is missing" in failed(speak(started), "conversion_failed")
    assert speak(started, response_format="pcm").status_code == 200


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with its own presets and its own ffmpeg, which is installed after the start and runs the shell code in the file `fault`."""
    from conftest import start_server

    folder = tmp_path_factory.mktemp("faults")
    tools = folder / "tools"
    tools.mkdir()
    for name in ("cat", "head", "sleep"):  # what the scripts below need, and no other program: the machine's own ffmpeg must not be found
        (tools / name).symlink_to(shutil.which(name) or "")
    script = f'#!/bin/sh\ncase "$*" in *-version*) ;; *) eval "$(cat {tools}/fault)" ;; esac\nexec {listening.ffmpeg()} "$@"\n'
    (tools / "fault").write_text("")
    shutil.copytree(PROJECT / "presets", folder / "presets")
    running = start_server(folder, PATH=tools, PRESETS_DIR=folder / "presets", IMAGEIO_FFMPEG_EXE="/nowhere/ffmpeg")
    try:
        speaks_without_ffmpeg(running)
        (tools / "ffmpeg").write_text(script)
        (tools / "ffmpeg").chmod(0o755)
        running.wait_for(lambda health: health["status"] == "ok")
        yield running
        until(lambda: psutil.Process(running.process.pid).children(recursive=True) == [])
    finally:
        running.stop()


@pytest.mark.parametrize("fault", ["exit 1", "exit 0", "echo this is no sound; exit 0", "cat >/dev/null; echo this is no sound; exit 0", "head -c 9000 >/dev/null; kill -9 $$", "head -c 3000000 /dev/zero; exit 3"])  # fmt: skip
def test_an_ffmpeg_that_fails_is_reported_and_the_next_request_served(own: RunningServer, fault: str) -> None:
    (own.log.parent / "tools" / "fault").write_text(fault)
    try:
        failed(speak(own), "conversion_failed")
        with contextlib.suppress(httpx.RemoteProtocolError):  # a stream that had begun is disconnected instead
            failed(speak(own, stream=True), "conversion_failed")
        assert speak(own, response_format="pcm").status_code == 200
    finally:
        (own.log.parent / "tools" / "fault").write_text("")
    assert speak(own).status_code == 200


def test_an_ffmpeg_that_hangs_is_killed(own: RunningServer) -> None:
    (own.log.parent / "tools" / "fault").write_text("sleep 100; exit 0")
    try:
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda streamed: speak(own, stream=streamed), (False, True)))
    finally:
        (own.log.parent / "tools" / "fault").write_text("")
    for answer in answers:
        assert "20 s" in failed(answer, "conversion_failed")
    assert speak(own).status_code == 200


def test_a_missing_ffmpeg_is_reported_until_it_is_back(own: RunningServer) -> None:
    program = own.log.parent / "tools" / "ffmpeg"
    program.rename(program.with_name("gone"))
    try:
        for streamed in (False, True):
            assert "ffmpeg is missing" in failed(speak(own, stream=streamed), "conversion_failed")
        assert own.health()["status"] == "degraded"
        assert speak(own, response_format="pcm").status_code == 200
    finally:
        program.with_name("gone").rename(program)
    assert speak(own).status_code == 200
    assert own.health()["status"] == "ok"


def test_presets_that_are_removed_and_restored(own: RunningServer) -> None:
    folder = own.log.parent / "presets"
    folder.rename(folder.with_name("away"))
    try:
        failed(speak(own), "invalid_voice")
        failed(speak(own, voice="alloy"), "invalid_voice")
        assert own.health()["status"] == "degraded"
        assert httpx.get(f"{own.url}/v1/audio/voices").json() == {"voices": []}
    finally:
        folder.with_name("away").rename(folder)
    assert speak(own).status_code == 200
    assert own.health()["status"] == "ok"


def test_a_full_disk_costs_files_and_log_lines_and_nothing_else(own: RunningServer) -> None:
    log = own.cache_dir / "server.log"
    pid, limit = own.process.pid, resource.RLIMIT_FSIZE
    before = resource.prlimit(pid, limit)
    resource.prlimit(pid, limit, (log.stat().st_size + 100, before[1]))
    try:
        for _ in range(3):
            failed(speak(own, response_format="flac", input=BODY["input"] * 10), "conversion_failed")
            assert speak(own, stream=True).status_code == 200
    finally:
        resource.prlimit(pid, limit, before)
    answer = speak(own)
    assert answer.status_code == 200
    # The line is written after the answer's last byte.
    until(lambda: answer.headers["x-request-id"] in log.read_text())


def test_missing_file_descriptors_affect_no_later_request(own: RunningServer) -> None:
    pid, limit = own.process.pid, resource.RLIMIT_NOFILE
    with own.client() as client:
        assert client.get("/health").status_code == 200
        before = resource.prlimit(pid, limit)
        resource.prlimit(pid, limit, (min(set(range(1000)) - {int(file.name) for file in Path(f"/proc/{pid}/fd").iterdir()}), before[1]))
        try:
            failed(client.post("/v1/audio/speech", json=BODY), "conversion_failed")
            assert client.post("/v1/audio/speech", json=BODY | {"response_format": "pcm"}).status_code == 200
            assert {"heart"} <= {voice["id"] for voice in client.get("/v1/audio/voices").json()["voices"]}
        finally:
            resource.prlimit(pid, limit, before)
        assert client.post("/v1/audio/speech", json=BODY).status_code == 200
    assert speak(own).status_code == 200


def test_a_server_starts_with_a_cache_that_cannot_be_written(make_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    server = make_server(CACHE_DIR=tmp_path / "file" / "cache")
    assert speak(server).status_code == 200
    form = {"name": "Somebody", "consent": "true", "ref_text": "A sound."}
    files = {"audio_sample": ("a.wav", speak(server, response_format="wav").content)}
    failed(httpx.post(f"{server.url}/v1/audio/voices", data=form, files=files, timeout=60), "storage_failed")
    assert server.stop() == 0
    assert "no log file: CACHE_DIR cannot be written" in server.log_text()
    assert "no PID file: CACHE_DIR cannot be written" in server.log_text()
    assert "Traceback" not in server.log_text()


def test_an_allocation_that_fails_is_reported_as_a_lack_of_memory() -> None:
    async def greedy(*_: object) -> None:
        bytes(1 << 60)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(RequestLog(greedy))  # the outermost part of the application
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/v1/audio/speech", json=BODY)

    answer = asyncio.run(ask())
    assert answer.status_code == 503
    failed(answer, "insufficient_memory")


def test_without_address_space_requests_are_refused_and_none_hangs(make_server: Callable[..., RunningServer]) -> None:
    server = make_server()
    pid, limit = server.process.pid, resource.RLIMIT_AS
    before = resource.prlimit(pid, limit)
    resource.prlimit(pid, limit, (psutil.Process(pid).memory_info().vms, before[1]))
    try:
        answers = [speak(server, input=BODY["input"] * 20, response_format="wav")]
        answers += [speak(server, stream=streamed, response_format="mp3") for streamed in (False, True)]
    finally:
        resource.prlimit(pid, limit, before)
    assert 503 in [answer.status_code for answer in answers]
    for answer in answers:
        assert answer.status_code == 200 or failed(answer, "insufficient_memory")
    assert speak(server).status_code == 200


def test_an_ffmpeg_whose_version_hangs_delays_nothing(make_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    script = tmp_path / "ffmpeg"
    script.write_text(f'#!/bin/sh\ncase "$*" in *-version*) exec sleep 100 ;; esac\nexec {listening.ffmpeg()} "$@"\n')
    script.chmod(0o755)
    server = make_server(PATH=f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    health = httpx.get(f"{server.url}/health", timeout=5).json()  # the version is given up after 10 s
    assert (health["ffmpeg"], health["ffmpeg_version"]) == (True, None)
    assert speak(server).status_code == 200


def test_a_pipe_among_the_presets_blocks_nobody(own: RunningServer) -> None:
    pipe = own.log.parent / "presets" / "pipe.json"
    os.mkfifo(pipe)
    try:
        assert speak(own).status_code == 200
        assert {"file": "pipe.json", "reason": "it is not a regular file"} in own.health()["skipped_presets"]
    finally:
        pipe.unlink()


def test_a_hangup_ends_the_server_after_its_answers(make_server: Callable[..., RunningServer]) -> None:
    server = make_server()
    with server.client() as client, client.stream("POST", "/v1/audio/speech", json=STREAMED | LONG) as answer:
        pieces = answer.iter_raw()
        size = len(next(pieces))
        server.process.send_signal(signal.SIGHUP)
        size += sum(map(len, pieces))
    assert size > 60 * 8000, "the answer is whole: 15 sentences of at least four seconds, 32 kB each"
    assert server.process.wait(30) == 0


# Connections


class Impatient(GuardedProtocol):
    """The real protocol with shorter timeouts."""

    head_seconds = 0.3
    body_seconds = 0.6


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server with short timeouts."""
    chosen: dict[str, Any] = {"csm": "off", "default_voice": "heart", "cache_dir": tmp_path_factory.mktemp("impatient")}
    app = create_app(Settings(**chosen))
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, http=Impatient, ws="none", log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < end
            time.sleep(0.05)
        yield port
    finally:
        server.should_exit = True
        thread.join(30)


HEAD = b"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def until_closed(opened: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := opened.recv(65536):
            received += data
    return received


def drip(port: int, first: bytes, slow: bytes) -> bytes:
    """Send `first` at once and `slow` byte by byte; return the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as opened:
        opened.sendall(first)
        with contextlib.suppress(OSError):
            for byte in slow:
                opened.sendall(bytes([byte]))
                time.sleep(0.1)
        return until_closed(opened)


@pytest.mark.parametrize(
    ("first", "slow"),
    [
        (b"", HEAD),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", HEAD),
        (HEAD + b"Content-Length: 1000\r\n\r\n", b"{" * 60),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n{\r\n" * 10),
        (HEAD + b"Content-Length: 1000\r\n\r\n{", b""),
    ],
    ids=["head", "second-head", "body", "chunked-body", "half-a-body"],
)
def test_a_request_that_does_not_arrive_times_out(impatient: int, first: bytes, slow: bytes) -> None:
    answer = drip(impatient, first, slow)
    assert b"HTTP/1.1 408 Request Timeout" in answer
    assert json.loads(answer[answer.index(b'{"error"') :])["error"]["code"] == "request_timeout"


def test_a_connection_without_a_byte_is_closed_without_an_answer(impatient: int) -> None:
    assert drip(impatient, b"", b"") == b""


def test_a_refused_request_whose_body_never_ends_times_out(impatient: int) -> None:
    answer = drip(impatient, b"POST /v1/nothing HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 10)
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert answer.count(b"HTTP/1.1") == 1


def test_pauses_between_requests_do_not_time_out(impatient: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{impatient}", timeout=30) as client:
        for _ in range(3):
            assert client.get("/health").status_code == 200
            time.sleep(0.5)
        assert client.post("/v1/audio/speech", json=BODY | {"input": BODY["input"] * 40}).status_code == 200


def limited_server(folder: Path, descriptors: int, **settings: object) -> RunningServer:
    """Start a server with a limit of open files."""
    port, log = free_port(), folder / "stderr.log"
    process = fork_server(clean_environment(folder / "cache", PORT=port, **settings), log, descriptors=descriptors)
    return RunningServer(process, port, folder / "cache", log)


def test_more_idle_connections_than_the_limit_keep_nobody_out(tmp_path: Path) -> None:
    server = limited_server(tmp_path, 256)
    idle: list[socket.socket] = []
    try:
        server.wait_for(lambda health: health["status"] == "ok")
        for _ in range(5):
            idle += [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(100)]
            for opened in idle[-50:]:
                opened.sendall(b"GET /health HTTP/1.1\r\nHost: ")
            assert speak(server).status_code == 200
            assert speak(server, stream=True, response_format="opus").status_code == 200
        assert len(psutil.Process(server.process.pid).net_connections()) <= 256 // 2 + 2
        assert "Traceback" not in server.log_text()
    finally:
        for opened in idle:
            opened.close()
        assert server.stop() == 0


DOCS_SCRIPT = b"GET /docs-files/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n"


def non_readers(port: int, count: int, data: bytes) -> list[socket.socket]:
    """Open connections that send `data` and read nothing."""
    opened = []
    for _ in range(count):
        each = socket.socket()
        each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        each.settimeout(30)
        each.connect(("127.0.0.1", port))
        with contextlib.suppress(ConnectionError):  # it was closed to make room for others
            each.sendall(data)
        opened.append(each)
    return opened


def speech_request(**fields: Any) -> bytes:
    body = json.dumps(BODY | fields).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_more_clients_than_the_limit_that_read_nothing_keep_nobody_out(tmp_path: Path) -> None:
    key = {"Authorization": "Bearer k"}
    server = limited_server(tmp_path, 256, API_KEY="k")
    silent: list[socket.socket] = []
    try:
        server.wait_for(lambda health: health["status"] == "ok")
        process = psutil.Process(server.process.pid)
        before = process.memory_info().rss
        silent = non_readers(server.port, 130, DOCS_SCRIPT * 6)
        for fields in ({}, {"stream": True, "response_format": "opus"}):
            answer = post_patiently(server, BODY | fields, key)
            assert answer.status_code == 200
        assert process.num_fds() <= 256 // 2 + 40
        assert process.memory_info().rss - before < 60e6
        assert "Traceback" not in server.log_text()
    finally:
        for opened in silent:
            opened.close()
        assert server.stop() == 0


def post_patiently(server: RunningServer, body: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
    """Send a request as clients do that obey `Retry-After`: a client counts as stalled only after two seconds."""
    for _ in range(10):
        answer = httpx.post(f"{server.url}/v1/audio/speech", json=body, headers=headers, timeout=60)
        if answer.status_code != 503:
            break
        assert answer.headers["retry-after"]
        time.sleep(1)
    return answer


def test_a_client_that_reads_nothing_is_disconnected_and_its_audio_freed(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(CLIENT_TIMEOUT=1)
    process = psutil.Process(server.process.pid)
    requests = [{"response_format": "wav"}, {"response_format": "pcm"}, {"response_format": "wav", "stream_format": "sse"}]
    silent = [each for fields in requests for each in non_readers(server.port, 1, speech_request(**LONG, **fields))]
    silent += non_readers(server.port, 1, DOCS_SCRIPT * 6)
    try:
        until(lambda: len(process.net_connections()) >= len(silent))
        until(lambda: not [each for each in process.net_connections() if each.status in ("ESTABLISHED", "FIN_WAIT1")])
        assert server.log_text().count("read nothing for 1 s") == len(silent)
        for opened in silent:
            with pytest.raises(ConnectionResetError):  # the rest of the answer was dropped, not sent later
                while opened.recv(1 << 20):
                    pass
    finally:
        for opened in silent:
            opened.close()
    assert speak(server).status_code == 200


def test_unread_audio_is_bounded_for_one_client_and_for_all(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(MAX_CLIENT_UNREAD_MB=9, MAX_UNREAD_MB=14)
    long = LONG | {"response_format": "wav"}

    def ask(address: str) -> httpx.Response:
        headers = {"X-Forwarded-For": address}
        return httpx.post(f"{server.url}/v1/audio/speech", json=BODY | long, headers=headers, timeout=60)

    size = len(speak(server, **long).content)
    assert 4.7e6 < size < 7e6
    silent = non_readers(server.port, 1, speech_request(**long))
    try:
        until(lambda: speak(server, **long).status_code == 503)
        failed(speak(server, **long), "too_much_unread")
        assert speak(server).status_code == 200, "there is room for a short answer"
        assert len(ask("192.0.2.1").content) == size, "another client has its own share"
        silent += non_readers(server.port, 1, speech_request(**long).replace(b"\r\n", b"\r\nX-Forwarded-For: 192.0.2.2\r\n", 1))
        until(lambda: ask("192.0.2.1").status_code == 503)
    finally:
        for opened in silent:
            opened.close()
    until(lambda: speak(server, **long).status_code == 200)


def test_a_stream_that_nobody_reads_ends_at_the_limit(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(MAX_CLIENT_UNREAD_MB=2)
    (silent,) = non_readers(server.port, 1, speech_request(input=BODY["input"] * 60, response_format="pcm"))
    try:
        until(lambda: server.health()["models"]["hibari"]["active"] == 1)
        until(lambda: server.health()["models"]["hibari"]["active"] == 0)
        failed(speak(server), "too_much_unread")
    finally:
        silent.close()
    until(lambda: speak(server).status_code == 200)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# Floods: without a key, from ten connections.


FLOODS = {
    "one-byte-chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n" * 10_000),
    "headers": (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a:\r\n" * 12_000 + b"\r\n"),
    "pipelined-requests": (b"", b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2_000),
}


class Flood:
    """Connections that send the same bytes again and again, and connect anew when they are closed."""

    def __init__(self, port: int, first: bytes, again: bytes, connections: int = 10) -> None:
        self._port, self._first, self._again = port, first, again
        self._over = threading.Event()
        self.sent = 0
        self._threads = [threading.Thread(target=self._send) for _ in range(connections)]

    def _send(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=5) as opened:
                opened.sendall(self._first)
                while not self._over.is_set():
                    opened.sendall(self._again[:65536])
                    self.sent += 1
                    time.sleep(0.03)  # 2 MB/s each

    def __enter__(self) -> Flood:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)


@pytest.mark.parametrize("kind", FLOODS)
def test_a_flood_from_ten_connections_leaves_others_their_turn(keyed: RunningServer, kind: str) -> None:
    with Flood(keyed.port, *FLOODS[kind]) as flood, keyed.client(headers={"Authorization": "Bearer k"}) as client:
        until(lambda: flood.sent > 20)
        for _ in range(3):
            assert client.get("/health").status_code == 200
            assert client.post("/v1/audio/speech", json=BODY).status_code == 200
    assert "Traceback" not in keyed.log_text()


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with a key."""
    from conftest import start_server

    running = start_server(tmp_path_factory.mktemp("keyed"), API_KEY="k")
    try:
        running.wait_for(lambda health: health["status"] == "ok")
        yield running
    finally:
        running.stop()


@pytest.mark.parametrize(("head", "status"), [(HEAD, b"401"), (b"POST /nothing HTTP/1.1\r\nHost: localhost\r\n", b"401"), (b"POST /health HTTP/1.1\r\nHost: localhost\r\n", b"405")])  # fmt: skip
def test_a_refused_request_is_closed_before_its_body_has_arrived(keyed: RunningServer, head: bytes, status: bytes) -> None:
    with socket.create_connection(("127.0.0.1", keyed.port), timeout=30) as opened:
        opened.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n")
        answer = until_closed(opened)
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert b"connection: close" in answer.lower()


def test_a_client_that_sends_a_large_body_still_gets_its_refusal(keyed: RunningServer) -> None:
    answer = httpx.post(f"{keyed.url}/v1/audio/speech", content=b"x" * 900_000, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_a_body_of_tiny_chunks_is_refused_by_its_bytes_on_the_wire(keyed: RunningServer) -> None:
    head = HEAD + b"Authorization: Bearer k\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = json.dumps(BODY).encode()
    small = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", keyed.port), timeout=30) as opened:
        opened.sendall(head + small)
        assert opened.recv(100).startswith(b"HTTP/1.1 200 ")
    with socket.create_connection(("127.0.0.1", keyed.port), timeout=30) as opened:
        with contextlib.suppress(ConnectionError):
            opened.sendall(head + b"1\r\na\r\n" * 100_000)
        answer = until_closed(opened)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"chunks of the body are too small" in answer


def test_a_thousand_idle_connections_cost_little(server: RunningServer) -> None:
    process = psutil.Process(server.process.pid)
    before, descriptors = process.memory_info().rss, process.num_fds()
    idle = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(1000)]
    try:
        assert speak(server).status_code == 200
        assert process.memory_info().rss - before < 60e6
    finally:
        for opened in idle:
            opened.close()
    until(lambda: process.num_fds() <= descriptors + 5)
