"""A model's thread that ends during or between jobs, or during a load or unload: the caller gets an error, the next one is served."""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections.abc import Callable, Coroutine

import pytest

from errors import GenerationTimeoutError
from hibari_model import HibariModel
from model_host import Heartbeat, ModelHost, RequestQueue

# The tests end threads on purpose, and pytest warns about it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def doom(host: ModelHost) -> None:
    """Make the interpreter raise SystemExit in the model's thread at its next step."""
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(host._worker._thread.ident or 0), ctypes.py_object(SystemExit)) == 1


async def rate(host: ModelHost) -> int:
    async with host.queue.slot():
        return await host.run(lambda model: model.sample_rate, Heartbeat())


def with_host(work: Callable[[ModelHost], Coroutine[None, None, None]], idle_seconds: float = 0) -> None:
    async def scenario() -> None:
        host = ModelHost(HibariModel, RequestQueue(5, 30), stall_seconds=600, idle_seconds=idle_seconds)
        host.start()
        try:
            await work(host)
        finally:
            await host.close()

    asyncio.run(scenario())


async def reached(host: ModelHost, state: str) -> None:
    end = time.monotonic() + 60
    while host.state != state:
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


def test_a_thread_that_dies_fails_one_request_and_the_model_recovers() -> None:
    async def work(host: ModelHost) -> None:
        await host.settled()
        for _ in range(2):
            doom(host)
            with pytest.raises(GenerationTimeoutError):
                await rate(host)
            await host.settled()
            assert host.state == "ready"
            assert await rate(host) == 24_000

    with_host(work)


def test_a_thread_that_dies_between_load_and_unload_is_replaced() -> None:
    async def work(host: ModelHost) -> None:
        await host.settled()
        doom(host)
        await reached(host, "unloaded")
        assert await rate(host) == 24_000

    with_host(work, idle_seconds=0.3)


def test_a_thread_that_dies_before_a_load_is_reported_and_a_reload_works() -> None:
    async def work(host: ModelHost) -> None:
        await host.settled()
        doom(host)
        host.reload()
        await host.settled()
        assert host.state == "failed"
        assert "thread ended" in (host.error or "")
        assert host.next_try_seconds() is not None, "it is retried without a reload, too"
        host.reload()
        await host.settled()
        assert await rate(host) == 24_000

    with_host(work)
