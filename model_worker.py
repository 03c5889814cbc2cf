"""The one thread on which everything with one model happens."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_LOOK_SECONDS = 1.0


class WorkerLostError(Exception):
    """The thread has ended with jobs in line, which nobody will do now."""


class ModelWorker:
    """A thread that does one job after another, in the order in which they came.

    MLX ties its streams and its random state to a thread (mlx 0.32: a model loaded on one thread raises "There is no Stream" on
    another), so load, speech and close of a model share one. The thread is a daemon: a job that hangs in native code, which nothing
    can interrupt, must not keep the process from ending.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"model-{name}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are still done."""
        return self._thread.is_alive()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Run `job` when those before it are done; the future holds what it returns or raises."""
        future: Future[T] = Future()
        self._jobs.put((job, future))
        return future

    async def do(self, job: Callable[[], T]) -> T:
        """Run `job` and wait for what it returns or raises.

        Raises:
            WorkerLostError: The thread ended before the job did.
        """
        future = asyncio.wrap_future(self.submit(job))
        try:
            while not future.done() and self.alive:
                await asyncio.wait({future}, timeout=_LOOK_SECONDS)
            if not future.done():
                raise WorkerLostError
            return future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        """End the thread after the jobs that are already in line."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = job()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del item, job, future  # or the last utterance's samples would live until the next one
