"""A model's thread that ends during or between jobs, or during a load or unload: the caller gets an error, the next one is served."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import time
import weakref
from collections.abc import Callable, Coroutine

import pytest

from errors import GenerationTimeoutError
from hibari_model import HibariModel
from model_host import Heartbeat, ModelHost, Pace, RequestQueue
from speech_model import LoadProgress

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


def test_a_full_garbage_collection_does_not_look_at_a_loaded_model_but_finds_what_it_leaves_behind() -> None:
    left: list[weakref.ref[HibariModel]] = []

    class Cyclic(HibariModel):
        def load(self, report: Callable[[LoadProgress], None]) -> None:
            super().load(report)
            part = HibariModel()
            part.__dict__["itself"] = part
            left.append(weakref.ref(part))
            self.part: HibariModel | None = part

        def close(self) -> None:
            super().close()
            self.part = None

    async def work() -> None:
        host = ModelHost(Cyclic, RequestQueue(5, 30), stall_seconds=600, idle_seconds=0.2)
        host.start()
        await host.settled()
        assert not any(each is host.model for each in gc.get_objects())
        await reached(host, "unloaded")
        gc.unfreeze()
        gc.collect()
        assert left[0]() is None
        await host.close()

    asyncio.run(work())


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


def test_the_pace_is_fitted_to_what_was_measured() -> None:
    pace = Pace()
    assert (pace.seconds(100), pace.info()) == (None, {})
    pace.observe(50, 4.0, 2.0)
    assert pace.seconds(100) == pytest.approx(4.0)  # one length alone says nothing about the time to start
    for characters in (100, 400, 200, 50):
        pace.observe(characters, characters * 0.08, 1.0 + characters * 0.02)
    assert pace.seconds(1000) == pytest.approx(21.0)
    assert pace.info()["frames_per_second"] == pytest.approx(64 * 12.5 / 21, rel=0.01)
    for _ in range(32):
        pace.observe(100, 8.0, 0.5)
    assert pace.seconds(200) == pytest.approx(1.0), "only the latest count"


def test_noise_never_gives_a_negative_time() -> None:
    pace = Pace()
    for characters, seconds in ((10, 5.0), (1000, 1.0)):
        pace.observe(characters, 1.0, seconds)
    assert pace.seconds(1) == pace.seconds(5000) == pytest.approx(3.0)
