"""A pool of two servers behind HAProxy, which are killed and restarted under load."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest
from haproxy_pool import CONFIG, NAMES, Pool, haproxy_program, until
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

pytestmark = pytest.mark.skipif(haproxy_program() is None, reason="haproxy is not installed (Debian: apt-get install haproxy)")

KEY = {"Authorization": "Bearer pool-key"}
SENTENCE = "One machine of the pool says this sentence, and another one says the next. "


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = Pool(tmp_path_factory.mktemp("pool"), API_KEY="pool-key", DEFAULT_VOICE="heart")
    try:
        made.start()
        yield made
    finally:
        made.stop()


def request(sentences: int, **fields: object) -> dict[str, object]:
    return {"model": "tts-1", "voice": "heart", "input": SENTENCE * sentences, "response_format": "wav", "seed": 1} | fields


def speak(pool: Pool, sentences: int = 2, **fields: object) -> httpx.Response:
    with pool.client(headers=KEY) as client:
        return client.post("/v1/audio/speech", json=request(sentences, **fields))


class Load:
    """Clients that send requests until `end`, with a short pause after each answer; all answers are kept."""

    def __init__(self, pool: Pool, clients: int, sentences: int) -> None:
        self._pool = pool
        self._sentences = sentences
        self._over = False
        self.answers: list[httpx.Response | httpx.TransportError] = []
        self._executor = ThreadPoolExecutor(clients)
        self._futures: list[Future[None]] = [self._executor.submit(self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        while not self._over:
            try:
                self.answers.append(speak(self._pool, self._sentences))
            except httpx.TransportError as error:
                self.answers.append(error)
            time.sleep(0.1)

    def end(self) -> list[httpx.Response | httpx.TransportError]:
        """Let the last requests finish and return the answers that are not a complete file."""
        self._over = True
        for future in self._futures:
            future.result()
        self._executor.shutdown()
        whole = max(len(answer.content) for answer in self.answers if isinstance(answer, httpx.Response))
        return [answer for answer in self.answers if not isinstance(answer, httpx.Response) or len(answer.content) != whole]


def test_haproxy_accepts_the_configuration() -> None:
    program = haproxy_program()
    assert program
    checked = subprocess.run([program, "-c", "-f", CONFIG], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_each_server_gets_one_request_and_the_others_wait_in_haproxy(pool: Pool) -> None:
    before = {name: int(pool.statistics(name)["stot"]) for name in NAMES}
    with ThreadPoolExecutor(8) as executor:
        futures = [executor.submit(speak, pool, 2) for _ in range(8)]
        until(lambda: int(pool.statistics("BACKEND")["qmax"]) > 0)
        while not all(future.done() for future in futures):
            assert all(int(pool.statistics(name)["scur"]) <= 1 for name in NAMES)
            for server in pool.servers.values():
                health = httpx.get(f"{server.url}/health", headers=KEY, timeout=30).json()
                assert health["queue"]["waiting"] == 0
        answers = [future.result() for future in futures]
    assert [answer.status_code for answer in answers] == [200] * 8
    assert len({answer.content for answer in answers}) == 1, "the same seed gives the same audio on both servers"
    shares = [int(pool.statistics(name)["stot"]) - before[name] for name in NAMES]
    assert sum(shares) == 8
    assert min(shares) >= 1


def test_keys_and_errors_are_passed_through(pool: Pool) -> None:
    with pool.client() as client:
        refused = client.post("/v1/audio/speech", json=request(1))
    assert refused.status_code == 401
    assert refused.json()["error"]["type"]
    unknown = speak(pool, voice="nobody")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (400, "invalid_voice")


def stuck(pool: Pool, head: bytes, body: bytes) -> socket.socket:
    """Send the beginning of a speech request, and no more."""
    host, port = pool.url.removeprefix("http://").split(":")
    opened = socket.create_connection((host, int(port)), timeout=30)
    opened.sendall(b"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + head + b"\r\n\r\n" + body)
    return opened


WITH_KEY_FORM = b"Authorization: Bearer anything\r\n"
UNFINISHED = {
    "length": (WITH_KEY_FORM + b"Content-Length: 24000", b"{" * 20_000, b"408"),
    "chunked": (WITH_KEY_FORM + b"Transfer-Encoding: chunked", b"4e20\r\n" + b"{" * 20_000, b"408"),
    "endless": (WITH_KEY_FORM + b"Transfer-Encoding: chunked", (b"4e20\r\n" + b"{" * 20_000 + b"\r\n") * 10, b"413"),
    "too-long": (WITH_KEY_FORM + b"Content-Length: 200000", b"{" * 20_000, b"413"),
    "no-key": (b"Content-Length: 24000", b"{" * 20_000, b"401"),
    "no-key-form": (b"Authorization: Bearer \r\nContent-Length: 24000", b"{" * 20_000, b"401"),
}


def test_requests_that_do_not_end_occupy_no_server(pool: Pool) -> None:
    before = {name: int(pool.statistics(name)["stot"]) for name in NAMES}
    open_requests = [(stuck(pool, head, body), status) for head, body, status in UNFINISHED.values() for _ in range(2)]
    try:
        assert [speak(pool, 1).status_code for _ in range(4)] == [200] * 4
        assert sum(int(pool.statistics(name)["stot"]) - before[name] for name in NAMES) == 4, "none of the others has reached a server"
        for opened, status in open_requests:
            answer = b"".join(iter(lambda opened=opened: opened.recv(65536), b""))  # type: ignore[misc]
            assert answer.startswith(b"HTTP/1.1 " + status)
            assert json.loads(answer[answer.index(b"{") :])["error"]["code"] in ("request_timeout", "body_too_large", "invalid_api_key")
    finally:
        for opened, _ in open_requests:
            opened.close()


def test_the_longest_text_fits_however_it_is_escaped(pool: Pool) -> None:
    body = json.dumps(request(1) | {"instructions": "\U0001f600" * 4096})
    assert len(body) > 49_000
    with pool.client(headers=KEY) as client:
        assert client.post("/v1/audio/speech", content=body, headers={"Content-Type": "application/json"}).status_code == 200


def test_a_stream_is_neither_buffered_nor_changed(pool: Pool) -> None:
    fields = request(8, response_format="pcm", stream=True)
    with pool.client(headers=KEY) as client, client.stream("POST", "/v1/audio/speech", json=fields) as answer:
        chunks = answer.iter_raw()
        through = next(chunks)
        assert sum(int(pool.statistics(name)["scur"]) for name in NAMES) == 1, (
            "the first audio has arrived while the server still generates"
        )
        through += b"".join(chunks)
    with pool.servers["one"].client(headers=KEY) as client:
        direct = client.post("/v1/audio/speech", json=fields).content
    assert through == direct


def test_timestamps_come_from_the_server_that_spoke(pool: Pool) -> None:
    with ThreadPoolExecutor(4) as executor:
        answers = list(executor.map(lambda _: speak(pool, timestamps=True), range(4)))
    with pool.client(headers=KEY) as client:
        for answer in answers:
            captions = client.get(answer.headers["X-Timestamps"])
            assert captions.status_code == 200, captions.text


def test_the_pool_refuses_what_belongs_to_a_single_server(pool: Pool) -> None:
    with pool.client(headers=KEY) as client:
        assert client.post("/v1/audio/voices", data={"name": "x"}).json()["error"]["code"] == "forbidden"
        assert client.delete("/v1/audio/voices/x").status_code == 403
        assert client.post("/admin/reload").status_code == 404
        assert client.get("/metrics").status_code == 404
        for method, disguised in (
            ("POST", "/%61dmin/reload"),
            ("GET", "/%6Detrics"),
            ("DELETE", "/v1/audio/%76oices/x"),
            ("POST", "/v1/audio/%73peech"),
        ):
            response = client.request(method, disguised)
            assert (response.status_code, response.json()["error"]["code"]) == (400, "bad_request")
        assert client.get("/v1/audio/voices").status_code == 200


def test_a_copied_voice_folder_is_used_at_once(pool: Pool) -> None:
    one, two = (pool.servers[name] for name in NAMES)
    with one.client(headers=KEY) as client:
        sample = client.post("/v1/audio/speech", json=request(1)).content
        form = {"name": "Shared", "consent": "true", "ref_text": "Words."}
        assert client.post("/v1/audio/voices", data=form, files={"audio_sample": ("a.wav", sample)}).status_code == 200
    shutil.copytree(one.cache_dir / "voices", two.cache_dir / "voices", dirs_exist_ok=True)
    with two.client(headers=KEY) as client:
        assert "Shared" in {voice["name"] for voice in client.get("/v1/audio/voices").json()["voices"]}


def test_disconnected_clients_leave_the_queue(pool: Pool) -> None:
    with ThreadPoolExecutor(2) as executor:
        busy = [executor.submit(speak, pool, 18) for _ in NAMES]
        until(lambda: all(pool.statistics(name)["scur"] == "1" for name in NAMES))
        before = sum(int(pool.statistics(name)["stot"]) for name in NAMES)
        with pool.client(headers=KEY) as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/audio/speech", json=request(1), timeout=0.2)
        until(lambda: pool.statistics("BACKEND")["qcur"] == "0")
        assert [future.result().status_code for future in busy] == [200, 200]
    assert sum(int(pool.statistics(name)["stot"]) for name in NAMES) == before, "no server has generated speech for a disconnected client"


def test_a_server_killed_under_load_fails_only_its_request_in_progress(pool: Pool) -> None:
    load = Load(pool, clients=3, sentences=4)
    until(lambda: len(load.answers) >= 4)
    until(lambda: pool.statistics("one")["scur"] == "1")
    victim = pool.servers["one"].process
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait(10)
    count = len(load.answers)
    until(lambda: len(load.answers) >= count + 6)
    pool.start_server("one")
    pool.wait_until_up("one")
    before = int(pool.statistics("one")["stot"])
    until(lambda: int(pool.statistics("one")["stot"]) > before)
    failed = load.end()
    assert len(failed) <= 1, "it had one request in progress"
    for answer in failed:
        assert isinstance(answer, httpx.Response)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "machine_lost")


def test_a_killed_server_disconnects_its_stream_and_the_other_one_works(pool: Pool) -> None:
    fields = request(20, response_format="pcm", stream=True)
    with pool.client(headers=KEY) as client, client.stream("POST", "/v1/audio/speech", json=fields) as answer:
        chunks = answer.iter_raw()
        next(chunks)
        (speaking,) = [name for name in NAMES if pool.statistics(name)["scur"] == "1"]
        victim = pool.servers[speaking].process
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait(10)
        with pytest.raises(httpx.RemoteProtocolError):
            list(chunks)
    assert [speak(pool).status_code for _ in range(3)] == [200] * 3, "a refused connection is retried on another server"
    pool.start_server(speaking)
    pool.wait_until_up(speaking)


def test_a_rolling_restart_fails_no_request(pool: Pool) -> None:
    load = Load(pool, clients=4, sentences=3)
    for name in NAMES:
        count = len(load.answers)
        until(lambda count=count: len(load.answers) >= count + 4)  # type: ignore[misc]
        assert pool.restart_in_order(name) == 0
    assert load.end() == []


def test_without_a_server_the_error_has_openais_format(pool: Pool) -> None:
    for name in NAMES:
        pool.tell(f"set server speech/{name} state maint")
    try:
        answer = speak(pool)
    finally:
        for name in NAMES:
            pool.tell(f"set server speech/{name} state ready")
            pool.wait_until_up(name)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert answer.json()["error"]["code"] == "no_machine"


def test_a_websocket_passes_and_occupies_no_server(pool: Pool) -> None:
    address = pool.url.replace("http", "ws") + "/v1/audio/speech/stream"
    with pytest.raises(InvalidStatus) as refused, connect(address, proxy=None):
        pass
    assert refused.value.response.status_code == 401
    with connect(address, additional_headers=KEY, proxy=None) as opened:
        opened.send(json.dumps({"type": "session.start", "voice": "heart", "seed": 1}))
        opened.send(json.dumps({"type": "input_text.append", "text": SENTENCE + "And"}))
        audio = b""
        while not audio:
            message = opened.recv(60)
            audio = message if isinstance(message, bytes) else b""
        assert [speak(pool, 1).status_code for _ in range(3)] == [200] * 3
        opened.send(json.dumps({"type": "input_text.done"}))
        while '"done"' not in str(message):
            message = opened.recv(60)
            audio += message if isinstance(message, bytes) else b""
    direct = speak(pool, 1, response_format="pcm", input=SENTENCE.strip()).content
    assert audio.startswith(direct[: len(direct) // 2])
