"""The request queue: order, limits, and clients that disconnect at any moment."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from conftest import RunningServer

from errors import QueueTimeoutError, RateLimitError, ShuttingDownError
from model_host import RequestQueue

SENTENCE = "One after another they all come in their turn. "
LONG = SENTENCE * 60  # two minutes of speech, two seconds of work
BODY: dict[str, Any] = {"model": "m", "voice": "heart", "response_format": "mp3"}


def idle(health: dict[str, Any]) -> bool:
    return bool(health["queue"]["active"] == 0 and health["queue"]["waiting"] == 0)


def test_requests_are_served_in_the_order_of_arrival() -> None:
    async def scenario() -> list[int]:
        queue, order = RequestQueue(limit=50, timeout=10), []

        async def one(number: int) -> None:
            async with queue.slot():
                order.append(number)
                await asyncio.sleep(0)

        await asyncio.gather(*(one(number) for number in range(30)))
        return order

    assert asyncio.run(scenario()) == list(range(30))


def test_new_requests_and_returning_ones_take_turns_so_that_neither_wait_for_all_of_the_others() -> None:
    async def scenario(new: str, returning: str) -> str:
        queue, order = RequestQueue(limit=50, timeout=10), []

        async def one(name: str) -> None:
            async with queue.slot(again=name in returning):
                order.append(name)

        async with queue.slot():
            tasks = [asyncio.create_task(one(name)) for name in returning + new]
            await asyncio.sleep(0.01)
        await asyncio.gather(*tasks)
        return "".join(order)

    assert asyncio.run(scenario(new="xyz", returning="ABC")) == "xAyBzC"
    assert asyncio.run(scenario(new="x", returning="ABC")) == "xABC"
    assert asyncio.run(scenario(new="xyz", returning="A")) == "xAyz"


def test_a_closed_queue_takes_only_what_continues_a_request_that_has_begun() -> None:
    async def scenario() -> None:
        queue, spoken = RequestQueue(limit=9, timeout=10), []

        async def one(name: str, *, continued: bool) -> None:
            async with queue.slot(continued=continued):
                spoken.append(name)
                await asyncio.sleep(0.01)

        names = {"held": False, "new": False, "next": True}
        waiting = [asyncio.create_task(one(name, continued=continued)) for name, continued in names.items()]
        await asyncio.sleep(0)
        queue.close()
        waiting += [asyncio.create_task(one(f"late {name}", continued=continued)) for name, continued in names.items()]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results].count(ShuttingDownError) == 3
        assert spoken == ["held", "next", "late next"]

    asyncio.run(scenario())


def test_one_request_too_many_is_refused_with_a_retry_after() -> None:
    async def scenario() -> RateLimitError:
        queue = RequestQueue(limit=2, timeout=10)

        async def hold() -> None:
            async with queue.slot():
                await asyncio.sleep(0.2)

        tasks = [asyncio.create_task(hold()) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert (queue.active, queue.waiting) == (1, 2)
        with pytest.raises(RateLimitError) as refused:
            async with queue.slot():
                pass
        await asyncio.gather(*tasks)
        assert (queue.active, queue.waiting) == (0, 0)
        return refused.value

    assert int(asyncio.run(scenario()).headers["Retry-After"]) >= 1


def test_a_wait_that_times_out_loses_no_slot() -> None:
    async def scenario() -> None:
        queue = RequestQueue(limit=5, timeout=0.05)
        async with queue.slot():
            with pytest.raises(QueueTimeoutError, match="QUEUE_TIMEOUT"):
                async with queue.slot():
                    pass
        async with queue.slot() as waited:
            assert waited < 0.05

    asyncio.run(scenario())


def test_cancelled_waiters_never_keep_the_slot() -> None:
    async def scenario() -> None:
        queue, generator = RequestQueue(limit=100, timeout=10), random.Random(1)

        async def one() -> None:
            async with queue.slot():
                await asyncio.sleep(0.001)

        for _ in range(40):
            tasks = [asyncio.create_task(one()) for _ in range(8)]
            await asyncio.sleep(generator.random() * 0.006)
            for task in generator.sample(tasks, 5):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert (queue.active, queue.waiting) == (0, 0)
        await asyncio.wait_for(one(), 1)

    asyncio.run(scenario())


def test_closing_refuses_the_waiting_and_lets_the_active_finish() -> None:
    async def scenario() -> None:
        queue = RequestQueue(limit=5, timeout=10)
        async with queue.slot():
            waiting = asyncio.create_task(queue.slot().__aenter__())
            await asyncio.sleep(0.01)
            queue.close()
            with pytest.raises(ShuttingDownError):
                await waiting
        with pytest.raises(ShuttingDownError):
            async with queue.slot():
                pass

    asyncio.run(scenario())


def test_thirty_clients_are_all_answered_or_refused_with_a_retry_after(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(MAX_QUEUE=12)
    with ThreadPoolExecutor(30) as pool, server.client(limits=httpx.Limits(max_connections=40)) as client:
        answers = list(pool.map(lambda n: client.post("/v1/audio/speech", json=BODY | {"input": SENTENCE * 4, "seed": n}), range(30)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 13
    for answer in answers:
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
            assert int(answer.headers["retry-after"]) >= 1
    server.wait_for(idle)


def test_a_wait_that_is_too_long_is_refused(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(QUEUE_TIMEOUT=0.02)
    with server.client() as client, client.stream("POST", "/v1/audio/speech", json=BODY | {"input": LONG, "stream": True}):
        response = client.post("/v1/audio/speech", json=BODY | {"input": SENTENCE})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "queue_timeout"
    assert "retry-after" in response.headers


def post_and_leave(port: int, body: bytes, after: float) -> None:
    """Send a request and close the socket `after` seconds later, whatever has arrived by then."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)  # fmt: skip
        connection.settimeout(after)
        deadline = time.monotonic() + after
        try:
            while time.monotonic() < deadline and connection.recv(4096):
                pass
        except TimeoutError:
            pass


def test_clients_that_disconnect_at_random_moments_leave_nothing_behind(server: RunningServer) -> None:
    process, log_before = psutil.Process(server.process.pid), len(server.log_text())
    httpx.post(f"{server.url}/v1/audio/speech", json=BODY | {"input": SENTENCE}, timeout=60)
    threads, generator = process.num_threads(), random.Random(3)
    variants = ['"stream": true', '"stream_format": "sse"', '"response_format": "pcm"', '"response_format": "flac"']
    with ThreadPoolExecutor(10) as pool:
        for number in range(50):
            body = f'{{"model": "m", "voice": "heart", "input": "{LONG}", {variants[number % 4]}}}'.encode()
            pool.submit(post_and_leave, server.port, body, generator.random() * 0.8)
    server.wait_for(idle, 30)
    assert process.children(recursive=True) == []
    assert process.num_threads() <= threads + 8  # the default executor's threads, which are kept
    assert "Traceback" not in server.log_text()[log_before:]
    assert httpx.post(f"{server.url}/v1/audio/speech", json=BODY | {"input": SENTENCE}, timeout=60).status_code == 200


def test_a_client_that_disconnects_leaves_the_queue_at_once(server: RunningServer) -> None:
    with server.client() as client, client.stream("POST", "/v1/audio/speech", json=BODY | {"input": LONG, "stream": True}):
        body = f'{{"model": "m", "voice": "heart", "input": "{LONG}"}}'.encode()
        leaver = threading.Thread(target=post_and_leave, args=(server.port, body, 1.0))
        leaver.start()
        server.wait_for(lambda health: health["queue"]["waiting"] == 1, 15)
        leaver.join()
        server.wait_for(lambda health: health["queue"]["waiting"] == 0, 15)
    server.wait_for(idle, 30)


def test_a_reader_of_one_byte_a_second_blocks_nobody(server: RunningServer) -> None:
    body = f'{{"model": "m", "voice": "heart", "input": "{LONG}", "response_format": "pcm"}}'.encode()
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    slow.connect(("127.0.0.1", server.port))
    with slow:
        slow.sendall(b"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)  # fmt: skip
        for _ in range(3):
            assert slow.recv(1)
            time.sleep(1)
        # The client has read three bytes of about 6 MB of PCM, and the slot is free again nevertheless.
        server.wait_for(idle, 30)
        response = httpx.post(f"{server.url}/v1/audio/speech", json=BODY | {"input": SENTENCE}, timeout=60)
        assert response.status_code == 200
        assert slow.recv(1)
    server.wait_for(idle, 10)


def test_health_answers_while_the_model_works(server: RunningServer) -> None:
    with server.client() as client, client.stream("POST", "/v1/audio/speech", json=BODY | {"input": LONG, "stream": True}):
        busy = [server.health()["queue"]["active"] for _ in range(20)]
    assert busy.count(1) > 0
    server.wait_for(idle, 30)


def test_a_short_text_does_not_wait_for_a_long_one_which_stays_the_same(server: RunningServer) -> None:
    long = BODY | {"input": SENTENCE * 40, "seed": 3, "response_format": "pcm"}
    order: list[str] = []

    def speak(name: str, body: dict[str, Any]) -> bytes:
        with server.client() as client:
            content = client.post("/v1/audio/speech", json=body).content
        order.append(name)
        return content

    with ThreadPoolExecutor(1) as pool:
        together = pool.submit(speak, "long", long)
        server.wait_for(lambda health: health["queue"]["active"] == 1, 15)
        assert speak("short", BODY | {"input": "Next.", "response_format": "pcm"})
        assert together.result() == speak("alone", long)
    assert order == ["short", "long", "alone"]


def test_eight_clients_at_once_get_what_each_seed_gives_alone(server: RunningServer) -> None:
    requests = [
        {"model": "m", "voice": "heart", "input": f"Sentence {seed}. And another one.", "seed": seed, "response_format": name}
        for seed in range(4)
        for name in ("pcm", "wav", "flac")
    ]
    with server.client() as client, ThreadPoolExecutor(8) as pool:
        alone = [client.post("/v1/audio/speech", json=request).content for request in requests]
        together = pool.map(lambda request: client.post("/v1/audio/speech", json=request).content, requests)
        assert list(together) == alone
