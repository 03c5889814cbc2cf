"""Turns on a model: one utterance at a time, first come first served, with a bounded queue."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from errors import QueueTimeoutError, RateLimitError, ShuttingDownError

_FIRST_GUESS_SECONDS = 5.0  # of one utterance, until some have been measured
_WEIGHT_OF_LATEST = 0.3  # in the running mean of how long a turn takes


class Turns:
    """Who speaks next.

    Args:
        limit: How many may wait; one more is refused.
        timeout: How long one may wait, in seconds.
    """

    def __init__(self, limit: int, timeout: float) -> None:
        self.active = 0
        self.waiting = 0
        self._limit = limit
        self._timeout = timeout
        self._semaphore = asyncio.Semaphore(1)
        self._closed = asyncio.Event()
        self._mean_seconds = _FIRST_GUESS_SECONDS

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[float]:
        """Wait for the turn and hold it; the value is the time spent waiting, in seconds.

        Raises:
            RateLimitError: The queue is full.
            QueueTimeoutError: The turn did not come in time.
            ShuttingDownError: The server goes down.
        """
        started = time.monotonic()
        await self._take()
        self.active += 1
        taken = time.monotonic()
        try:
            yield taken - started
        finally:
            self._mean_seconds += _WEIGHT_OF_LATEST * (time.monotonic() - taken - self._mean_seconds)
            self.active -= 1
            self._semaphore.release()

    def close(self) -> None:
        """Refuse everybody who waits, and everybody who still comes."""
        self._closed.set()

    def retry_after(self) -> int:
        """In how many seconds, about, those who wait now will have been served, going by how long turns have taken."""
        return max(1, math.ceil(self._mean_seconds * max(1, self.waiting)))

    async def _take(self) -> None:
        if self._closed.is_set():
            raise _shutting_down()
        if not self._semaphore.locked():
            await self._semaphore.acquire()  # free: taken without waiting, so the bound on the queue does not apply
            return
        if self.waiting >= self._limit:
            raise RateLimitError(
                f"The queue is full: as many requests as may wait for their turn do ({self.waiting}). Try again in {self.retry_after()} s.",
                headers={"Retry-After": str(self.retry_after())},
            )
        self.waiting += 1
        try:
            await self._acquire()
        finally:
            self.waiting -= 1

    async def _acquire(self) -> None:
        """Take the semaphore, unless time runs out or the server goes down.

        `asyncio.wait_for` around `acquire` can lose a turn that comes at the same moment as the time-out (Python before 3.12), so the
        two are waited for side by side and a turn that came after all is given back.
        """
        acquiring = asyncio.ensure_future(self._semaphore.acquire())
        closing = asyncio.ensure_future(self._closed.wait())
        try:
            await asyncio.wait({acquiring, closing}, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
            if self._closed.is_set():
                raise _shutting_down()
            if not acquiring.done():
                raise QueueTimeoutError(
                    f"The request waited {self._timeout:g} s for its turn, the most that QUEUE_TIMEOUT allows. Try again later.",
                    headers={"Retry-After": str(self.retry_after())},
                )
        except BaseException:
            _give_back(acquiring, self._semaphore)
            raise
        finally:
            closing.cancel()


def _give_back(acquiring: asyncio.Future[Any], semaphore: asyncio.Semaphore) -> None:
    if acquiring.done() and not acquiring.cancelled():
        semaphore.release()
    else:
        acquiring.cancel()


def _shutting_down() -> ShuttingDownError:
    return ShuttingDownError("The server is shutting down. Try again in a moment.", headers={"Retry-After": "10"})
