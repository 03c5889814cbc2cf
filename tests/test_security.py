"""Security: requests open no files or addresses, secrets and texts are never shown or logged, malformed HTTP is refused."""

from __future__ import annotations

import json
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import listening
import pytest
from conftest import PROJECT, RunningServer, start_server

KEY = "sk-a-key-for-the-tests-of-security"
TEXT = "The ptarmigan whispered a secret about xylophones"
BODY: dict[str, Any] = {"model": "m", "voice": "heart", "input": TEXT + "."}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Run a server with a key and debug logging; its ffmpeg records its arguments."""
    folder = tmp_path_factory.mktemp("watched")
    program = folder / "tools" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {folder}/calls\nexec {listening.ffmpeg()} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    running = start_server(
        folder, PATH=f"{program.parent}:/usr/bin:/bin", API_KEY=KEY, LOG_LEVEL="debug", CORS_ORIGINS="https://chat.example.com"
    )
    try:
        running.wait_for(lambda health: health["status"] == "ok")
        yield running
    finally:
        running.stop()


@pytest.fixture
def owner(watched: RunningServer) -> Iterator[httpx.Client]:
    with watched.client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


def all_logs(server: RunningServer) -> str:
    return server.log_text() + "".join(file.read_text(errors="replace") for file in server.cache_dir.glob("server.log*"))


@pytest.mark.parametrize(
    "path", ["/v1/audio/voices", "/audio/voices", "/v1/audio/voices/heart", "/v1/models", "/v1/audio/models", "/metrics"]
)
def test_with_a_key_set_nothing_is_readable_without_it(watched: RunningServer, owner: httpx.Client, path: str) -> None:
    assert httpx.get(watched.url + path).status_code == 401
    assert httpx.get(watched.url + path, headers={"Authorization": f"Bearer {KEY}x"}).status_code == 401
    assert owner.get(path).status_code == 200


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/audio/voices"), ("DELETE", "/v1/audio/voices/heart"), ("POST", "/admin/reload"), ("GET", "/v1/audio/speech/x/timestamps"), ("POST", "/audio/speech")])  # fmt: skip
def test_with_a_key_set_nothing_is_done_without_it(watched: RunningServer, method: str, path: str) -> None:
    response = httpx.request(method, watched.url + path)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/health", "/health/ready"])
def test_open_paths_show_nothing_about_the_owner(watched: RunningServer, path: str) -> None:
    response = httpx.get(watched.url + path)
    assert response.status_code == 200
    for told in (KEY, str(PROJECT), str(watched.cache_dir), "ffmpeg_path"):
        assert told not in response.text


def test_the_key_is_accepted_nowhere_but_in_its_headers(watched: RunningServer) -> None:
    for url, headers in [
        (f"/v1/models?api_key={KEY}", {}),
        (f"/v1/models?authorization=Bearer%20{KEY}", {}),
        ("/v1/models", {"Cookie": f"key={KEY}"}),
        ("/v1/models", {"Authorization": f"Basic {KEY}"}),
        ("/v1/models/../../health/../v1/models", {}),
        ("/playground/../v1/models", {}),
        ("/docs-files/%2e%2e/v1/models", {}),
    ]:
        assert httpx.get(watched.url + url, headers=headers).status_code in (401, 404), url


def test_a_page_of_an_allowed_origin_still_needs_the_key(watched: RunningServer) -> None:
    asked = {
        "Origin": "https://chat.example.com",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    preflight = httpx.options(f"{watched.url}/v1/audio/speech", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://chat.example.com"
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-credentials" not in preflight.headers
    foreign = httpx.options(f"{watched.url}/v1/audio/speech", headers=asked | {"Origin": "https://evil.example.com"})
    assert "access-control-allow-origin" not in foreign.headers
    assert httpx.post(f"{watched.url}/v1/audio/speech", json=BODY, headers=asked).status_code == 401


def test_simple_requests_from_other_sites_are_refused(server: RunningServer) -> None:
    origin = {"Origin": "https://evil.example.com"}
    as_text = {"Content-Type": "text/plain"}
    assert httpx.post(f"{server.url}/v1/audio/speech", content=json.dumps(BODY), headers=origin | as_text).status_code == 400
    assert httpx.post(f"{server.url}/admin/reload", headers=origin).status_code == 403
    form = {"name": "Mallory", "consent": "true", "ref_text": "Words."}
    answer = httpx.post(f"{server.url}/v1/audio/voices", data=form, files={"audio_sample": ("a.wav", b"RIFF")}, headers=origin)
    assert answer.status_code == 403
    assert httpx.post(f"{server.url}/admin/reload", headers={"Origin": "null"}).status_code == 403


def test_a_forwarded_address_counts_as_the_clients(server: RunningServer) -> None:
    for address in ("203.0.113.9", "127.0.0.1, 203.0.113.9", "nonsense", "::ffff:203.0.113.9"):
        assert httpx.post(f"{server.url}/admin/reload", headers={"X-Forwarded-For": address}).status_code == 403, address
    assert "ffmpeg_path" not in httpx.get(f"{server.url}/health", headers={"X-Forwarded-For": "203.0.113.9"}).json()


def test_this_machine_counts_as_this_machine_by_every_address(make_server: Callable[..., RunningServer]) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server = make_server(HOST="::")
    for host in ("127.0.0.1", "[::1]"):
        assert httpx.post(f"http://{host}:{server.port}/admin/reload").status_code == 200, host


def test_a_local_proxy_is_not_taken_for_its_clients_by_any_address(make_server: Callable[..., RunningServer]) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server = make_server(HOST="::")
    for host in ("127.0.0.1", "127.0.0.2", "[::1]"):
        url = f"http://{host}:{server.port}"
        assert httpx.post(f"{url}/admin/reload", headers={"X-Forwarded-For": "203.0.113.9"}).status_code == 403, host
        assert "ffmpeg_path" not in httpx.get(f"{url}/health", headers={"X-Forwarded-For": "203.0.113.9"}).json()


def test_neither_text_nor_key_is_in_any_log_and_no_text_in_any_error(watched: RunningServer, owner: httpx.Client) -> None:
    bodies: list[dict[str, Any]] = [
        BODY,
        BODY | {"stream_format": "sse", "timestamps": True},
        BODY | {"timestamps": True, "speed": 2.0, "response_format": "flac"},
        BODY | {"voice": "conversational"},
        BODY | {"voice": "nobody"},
        BODY | {"speed": 99},
        BODY | {"input": [TEXT]},
        BODY | {"input": {"text": TEXT}},
        BODY | {"input": (TEXT + " ") * 200},
        {"input": TEXT},
        BODY | {"instructions": 5},
    ]
    for body in bodies:
        answer = owner.post("/v1/audio/speech", json=body)
        if answer.status_code != 200:
            assert "ptarmigan" not in answer.text, body
            assert "ptarmigan" not in str(answer.headers)
        assert KEY not in answer.text
        assert KEY not in str(answer.headers)
    owner.post("/v1/audio/speech", content=json.dumps(BODY)[:-3])
    owner.get(f"/v1/models?input={TEXT}")
    with owner.stream("POST", "/v1/audio/speech", json=BODY | {"input": f"{TEXT}. " * 40, "response_format": "pcm"}) as response:
        next(response.iter_raw())
    watched.wait_for(lambda health: health["status"] == "ok")
    logs = all_logs(watched)
    assert "DEBUG" in logs
    assert "ptarmigan" not in logs
    assert KEY not in logs
    for path in (PROJECT, watched.cache_dir, watched.log.parent, Path.home(), Path(tempfile.gettempdir())):
        assert str(path) not in logs


def test_nothing_that_a_request_names_is_opened(watched: RunningServer, owner: httpx.Client, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.5)
        address = f"http://127.0.0.1:{trap.getsockname()[1]}/voice.wav"
        named = [
            address,
            address.replace("http", "tcp"),
            f"file://{PROJECT}/pyproject.toml",
            "/etc/passwd",
            "../../pyproject.toml",
            f"concat:{address}",
        ]
        for name in named:
            for field in (
                "voice",
                "model",
                "instructions",
                "response_format",
                "stream_format",
                "ref_audio",
                "audio_sample",
                "speaker_embedding_path",
            ):
                answer = owner.post("/v1/audio/speech", json=BODY | {field: name})
                assert answer.status_code in (200, 400)
                assert "root:" not in answer.text[:500]
            owner.post("/v1/audio/speech", json=BODY | {"voice": {"id": name}})
            owner.get(f"/v1/audio/voices/{name}")
            owner.delete(f"/v1/audio/voices/{name}")
            form = {"name": name, "consent": "true", "ref_text": name}
            assert owner.post("/v1/audio/voices", data=form, files={"audio_sample": (name, name.encode())}).status_code == 400
        with pytest.raises(TimeoutError):
            trap.accept()
    calls = (watched.log.parent / "calls").read_text()
    assert calls
    for told in ("127.0.0.1", "passwd", "pyproject", "ptarmigan", "concat"):
        assert told not in calls


def exchange(server: RunningServer, data: bytes) -> bytes:
    """Send these bytes, and return what arrives until the server closes the connection or is silent for a second."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as opened:
        opened.sendall(data)
        opened.settimeout(1.0)
        try:
            while piece := opened.recv(65536):
                received += piece
        except (TimeoutError, ConnectionResetError):
            pass
    return received


HEAD = b"POST /v1/nothing HTTP/1.1\r\nHost: localhost\r\n"
HIDDEN = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 100\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"Content-Length: 4\r\nContent-Length: 44\r\n\r\nabcd" + HIDDEN,
        HEAD + b"Content-Length: 4, 44\r\n\r\nabcd" + HIDDEN,
        HEAD + b"Content-Length: +4\r\n\r\nabcd" + HIDDEN,
        HEAD + b"Content-Length: -4\r\n\r\n" + HIDDEN,
        HEAD + b"Content-Length: 0x4\r\n\r\nabcd" + HIDDEN,
        HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n" + HIDDEN,
        HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + HIDDEN,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n" + HIDDEN,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;\nx\r\n" + HIDDEN,
        HEAD + b"X: a\0b\r\n\r\n" + HIDDEN,
        HEAD + b"X\r\n : y\r\n\r\n" + HIDDEN,
        HEAD + b"Content-Length: 4\r\n\r\nabcdand more than was said\r\n\r\n" + HIDDEN,
        HEAD + b"Host: evil.example.com\r\n\r\n" + HIDDEN,
        b"POST /v1/nothing HTTP/1.1\r\n\r\n" + HIDDEN,
        b"GET /hea\0lth HTTP/1.1\r\nHost: localhost\r\n\r\n" + HIDDEN,
        b"GET  /health  HTTP/1.1\r\nHost: localhost\r\n\r\n" + HIDDEN,
        b"GET /" + b"a" * 400_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        HEAD + b"X: " + b"a" * 400_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + b"\0" * 100,
        bytes(range(256)),
    ],
    ids=range(27),
)
def test_malformed_http_is_refused_and_hides_no_second_request(server: RunningServer, data: bytes) -> None:
    answer = exchange(server, data)
    assert b'"uptime_seconds"' not in answer
    last = answer[answer.rindex(b"HTTP/1.1 ") :]
    assert last.startswith(b"HTTP/1.1 400 Bad Request\r\n") or b"HTTP/1.1" not in answer
    assert json.loads(last[last.index(b"{") :])["error"]["code"] == "invalid_http"
    assert "Traceback" not in server.log_text(), "invalid requests must not fill the log with tracebacks"


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd",
        HEAD + b"X: a\r\n b\r\nContent-Length: 4\r\n\r\nabcd",
        HEAD + b"Expect: 100-continue\r\nContent-Length: 4\r\n\r\nabcd",
        HEAD + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n",
        HEAD + b"X: y\r\n" * 2000 + b"\r\n",
    ],
    ids=["same-length-twice", "folded-header", "expect", "http2", "many-headers"],
)
def test_unusual_but_unambiguous_http_is_answered(server: RunningServer, data: bytes) -> None:
    answer = exchange(server, data + HIDDEN)
    assert answer.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 100 "))
    assert b'"uptime_seconds"' in answer


def test_a_body_in_small_chunks_is_read_to_its_end_and_what_follows_it_too(server: RunningServer) -> None:
    body = json.dumps({"model": "m", "input": "Hello.", "voice": "nobody"}).encode().ljust(4000)
    chunks = b"".join(b"8\r\n%b\r\n" % body[start : start + 8] for start in range(0, len(body), 8))
    head = b"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = exchange(server, head + chunks + b"0\r\n\r\n" + HIDDEN)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"invalid_voice"' in answer
    assert b'"uptime_seconds"' in answer


def test_an_upgrade_of_another_method_ends_the_connection(server: RunningServer) -> None:
    """A WebSocket's handshake is a GET. What follows on the connection is not read as a request."""
    answer = exchange(server, HEAD + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + HIDDEN)
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert b"uptime_seconds" not in answer


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 1000\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n{"], ids=["length", "chunk"]
)
@pytest.mark.parametrize("path", [b"speech", b"voices"])
def test_a_body_shorter_than_announced_is_refused_and_frees_everything(server: RunningServer, path: bytes, framing: bytes) -> None:
    head = b"POST /v1/audio/" + path + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as opened:
        opened.sendall(head + framing)
        opened.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: opened.recv(65536), b""))
    assert received == b"" or received.startswith(b"HTTP/1.1 400 ")
    assert server.wait_for(lambda health: health["queue"]["active"] == 0)["status"] == "ok"
    assert "Traceback" not in server.log_text()


def test_nothing_a_client_sends_floods_a_log_or_an_answer(server: RunningServer) -> None:
    before = len(server.log_text())
    for data in (
        b"A" * 50_000 + b" /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"a" * 50_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: " + b"a" * 40_000 + b".com\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: " + b"a" * 40_000 + b"\r\n\r\n",
        b"POST /admin/reload HTTP/1.1\r\nHost: localhost\r\nOrigin: " + b"a" * 40_000 + b"\r\n\r\n",
    ):
        assert len(exchange(server, data)) < 3000
    log = server.log_text()
    assert len(log) - before < 5000
    injected = httpx.get(f"{server.url}/%0a2026-01-01T00:00:00.000Z%20INFO%20forged%1b[31m")
    assert injected.status_code == 404
    assert "\x1b" not in server.log_text()
    assert not any(line.startswith("2026-01-01") for line in server.log_text().splitlines())


@pytest.mark.parametrize("path", ["/playground/../server.py", "/playground/%2e%2e%2fserver.py", "/playground/%2e%2e/server.py", "/playground/index.html%00.js", "/docs-files/../server.py", "/docs-files/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/docs-files//etc/passwd", "/presets/heart.json", "/.env", "/server.py"])  # fmt: skip
def test_no_path_reaches_a_file_outside_the_page(server: RunningServer, path: str) -> None:
    assert exchange(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()).startswith(b"HTTP/1.1 404 ")


def test_no_file_holds_the_key(watched: RunningServer) -> None:
    for file in watched.cache_dir.rglob("*"):
        if file.is_file():
            assert KEY.encode() not in file.read_bytes()


def test_the_key_is_accepted_in_x_api_key_too(watched: RunningServer) -> None:
    assert httpx.get(f"{watched.url}/v1/models", headers={"X-Api-Key": KEY}).status_code == 200
    assert httpx.get(f"{watched.url}/v1/models", headers={"X-Api-Key": f"{KEY}x"}).status_code == 401


def test_other_spellings_of_a_path_need_the_key_too(watched: RunningServer) -> None:
    for path in ("//v1/models", "/playground/..//v1/models", "//playground//../v1/models"):
        assert httpx.get(watched.url + path).status_code in (401, 404)


@pytest.mark.parametrize(("origin", "answered"), [("https://chat.example.com", True), ("https://evil.example.com", False)])
def test_a_private_network_preflight_is_answered_for_allowed_origins(watched: RunningServer, origin: str, answered: bool) -> None:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Private-Network": "true"}
    response = httpx.options(f"{watched.url}/v1/audio/speech", headers=headers)
    allowed = response.headers.get("access-control-allow-private-network") == "true" and "access-control-allow-origin" in response.headers
    assert allowed is answered
