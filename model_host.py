"""Runs one model: its thread, its request queue, loading, unloading, and status."""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from errors import GenerationTimeoutError, ModelNotReadyError, QueueTimeoutError, RateLimitError, ShuttingDownError
from speech_model import LoadProgress, ModelLoadError, SpeechModel

_FIRST_GUESS_SECONDS = 5.0  # of one utterance, until some have been measured
_WEIGHT_OF_LATEST = 0.3  # in the running mean of how long a turn takes


class RequestQueue:
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
    async def slot(self) -> AsyncIterator[float]:
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
        """In how many seconds, about, those who wait now will have been served, going by how long queue have taken."""
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


logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "unloaded", "failed", "disabled"]

_FIRST_RETRY_SECONDS = 30.0
_LONGEST_RETRY_SECONDS = 1800.0
_LOADING_RETRY_SECONDS = 10.0
_HOPELESS_RETRY_SECONDS = 3600.0  # what Retry-After says where only the owner can mend it
_LONGEST_CLIENT_WAIT = 60.0  # OpenAI's clients honour a Retry-After up to this
_PROGRESS_LOG_SECONDS = 5.0
_STOP_GRACE_SECONDS = 10.0  # that a model gets to notice it was cancelled before its thread is given up


@dataclass
class Heartbeat:
    """How a running job is watched and stopped from outside its thread.

    The model asks `cancelled` at least once a frame; that each question is a sign of life tells a slow model from a hung one.
    """

    _stopped: bool = False
    last: float = field(default_factory=time.monotonic)

    def cancelled(self) -> bool:
        """Asked by the model, on its thread."""
        self.last = time.monotonic()
        return self._stopped

    def stop(self) -> None:
        """Ask the model to end."""
        self._stopped = True

    @property
    def stopped(self) -> bool:
        """Whether it was asked to end."""
        return self._stopped


class ModelHost:
    """One model, from load to close.

    Args:
        create: Makes the model, unloaded. Called again when a hung model has to be left behind.
        queue: The model's queue.
        disabled: Why the model is switched off, if it is.
        stall_seconds: A job without a sign of life for longer than this is given up.
        idle_seconds: The model is unloaded after so long without work; 0 keeps it for ever.
        after_load: Runs on the model's thread once it is loaded (the warm-up).
    """

    def __init__(
        self,
        create: Callable[[], SpeechModel],
        queue: RequestQueue,
        *,
        disabled: str | None = None,
        stall_seconds: float,
        idle_seconds: float = 0.0,
        after_load: Callable[[SpeechModel], None] = lambda _: None,
    ) -> None:
        self.model = create()
        self.queue = queue
        self.state: State = "disabled" if disabled else "loading"
        self.error: str | None = disabled
        self.progress: LoadProgress | None = None
        self._next_try: float | None = None
        self._create = create
        self._after_load = after_load
        self._stall_seconds = stall_seconds
        self._idle_seconds = idle_seconds
        self._worker = ModelWorker(self.model.id)
        self._reload = asyncio.Event()
        self._settled = asyncio.Event()  # set while it is known whether the model can speak
        self._last_work = time.monotonic()
        self._keeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to load, in the background."""
        if self.state != "disabled":
            self._keeper = asyncio.create_task(self._keep_loaded(), name=f"keep-{self.model.id}")

    async def close(self) -> None:
        """End the background work and the thread."""
        if self._keeper:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        self._worker.close()

    def reload(self) -> None:
        """Load again, now: after a failure, or because files have changed. `settled` waits for the end of that load."""
        if self._keeper:
            self._settled.clear()
            self._reload.set()

    async def settled(self) -> None:
        """Return once the current load has come to its end, good or bad."""
        await self._settled.wait()

    @property
    def ready(self) -> bool:
        """Whether a request can be taken. An unloaded model can: it loads again within the request's turn."""
        return self.state in ("ready", "unloaded")

    def check_ready(self, advice: str) -> None:
        """Refuse a request for a model that cannot speak now.

        Raises:
            ModelNotReadyError: Says why; `advice` says what to do instead.
        """
        if self.ready:
            return
        if self.state == "loading":
            stage = f" ({self.progress})" if self.progress else ""
            raise self._not_ready(f"is still loading{stage}. {advice}", _LOADING_RETRY_SECONDS)
        what = "is switched off" if self.state == "disabled" else "could not be loaded"
        raise self._not_ready(f"{what}: {self.error} {advice}", self.next_try_seconds() or _HOPELESS_RETRY_SECONDS)

    def next_try_seconds(self) -> float | None:
        """In how many seconds a failed load is tried again; None where it is not."""
        return None if self._next_try is None else max(0.0, self._next_try - time.monotonic())

    def _not_ready(self, what: str, retry_seconds: float) -> ModelNotReadyError:
        headers = {"Retry-After": str(math.ceil(retry_seconds))}
        if retry_seconds > _LONGEST_CLIENT_WAIT:
            # OpenAI's clients would otherwise try twice more, at their own pace, for what no such wait can mend. They read this header.
            headers["X-Should-Retry"] = "false"
        return ModelNotReadyError(f"Model '{self.model.id}' {what}", param="voice", headers=headers)

    async def run(self, job: Callable[[SpeechModel], T], heartbeat: Heartbeat) -> T:
        """Do `job` on the model's thread and wait until it is over, also when the caller is cancelled. Call it within a turn.

        Raises:
            GenerationTimeoutError: The model hung, or its thread ended: it is left behind and the model is loaded anew on another.
            ModelNotReadyError: The model had been unloaded and cannot be loaded again.
        """
        if self.state == "unloaded":
            await self._load_on_demand()
        future = asyncio.wrap_future(self._worker.submit(lambda: job(self.model)))
        heartbeat.last = time.monotonic()
        try:
            while not future.done():
                await _wait_uncancelled(future, min(1.0, self._stall_seconds), heartbeat)
                silent = time.monotonic() - heartbeat.last
                patience = min(_STOP_GRACE_SECONDS, self._stall_seconds) if heartbeat.stopped else self._stall_seconds
                if not future.done() and (silent > patience or not self._worker.alive):
                    self._abandon()
                    raise GenerationTimeoutError(
                        f"Model '{self.model.id}' gave no sign of life for {silent:.0f} s and is loaded anew. Try again in a moment.",
                        headers={"Retry-After": "30"},
                    )
            return future.result()
        finally:
            self._last_work = time.monotonic()

    def info(self) -> dict[str, Any]:
        """The model's part of `/health`."""
        facts: dict[str, Any] = {"id": self.model.id, "state": self.state, "loaded": self.state == "ready", "error": self.error}
        if self.state == "failed":
            facts["next_try_seconds"] = self.next_try_seconds()
        if self.state == "loading" and self.progress:
            facts["progress"] = asdict(self.progress) | {"fraction": self.progress.fraction}
        return facts | self.model.info() | {"active": self.queue.active, "waiting": self.queue.waiting}

    async def _keep_loaded(self) -> None:
        """Load, and load again: after failures with growing pauses, when asked to, and on demand once unloaded."""
        pause = _FIRST_RETRY_SECONDS
        while True:
            self._reload.clear()
            try:
                await self._load()
                pause = _FIRST_RETRY_SECONDS
                await self._wait_while_ready()
            except ModelLoadError as error:
                wait = pause if error.retry else None
                self._fail(error.message, wait)
                pause = min(2 * pause, _LONGEST_RETRY_SECONDS)
                await _wait_event(self._reload, wait)

    async def _load(self) -> None:
        self._settled.clear()
        self.state, self.error, self.progress, self._next_try = "loading", None, None, None
        started = time.monotonic()
        logger.info("model %s: loading", self.model.id)
        model, worker = self.model, self._worker
        reporter = _ProgressReporter(self)

        def load() -> None:
            model.close()
            model.load(reporter.report)
            self._after_load(model)

        try:
            await worker.do(load)
        except (ModelLoadError, asyncio.CancelledError):
            raise
        except WorkerLostError as error:
            self._replace_worker()
            raise ModelLoadError("The model's thread ended while it was loading.") from error
        except MemoryError as error:
            raise ModelLoadError(
                "There is not enough memory to load the model: close other programs or choose a smaller one (MODEL_ID)."
            ) from error
        except BaseException as error:
            logger.exception("model %s: the load failed in an unforeseen way", self.model.id)
            raise ModelLoadError(f"The load failed in an unforeseen way ({type(error).__name__}); the log has the details.") from error
        self.state, self.progress = "ready", None
        self._settled.set()
        logger.info("model %s: ready after %.1f s", self.model.id, time.monotonic() - started)

    def _fail(self, message: str, wait: float | None) -> None:
        self.state, self.error, self.progress = "failed", message, None
        self._next_try = None if wait is None else time.monotonic() + wait
        self._settled.set()
        again = f"next try in {wait:.0f} s" if wait is not None else "it is not tried again before a restart or a reload"
        logger.error("model %s: %s (%s)", self.model.id, message, again)

    async def _wait_while_ready(self) -> None:
        """Return when the model has to be loaded again."""
        while True:
            asked = await _wait_event(self._reload, min(self._idle_seconds, 5.0) if self._idle_seconds and self.state == "ready" else None)
            if asked:
                return
            idle = time.monotonic() - self._last_work
            if self.state == "ready" and idle >= self._idle_seconds and not self.queue.active:
                await self._unload()
                logger.info("model %s: unloaded after %.0f s without work", self.model.id, idle)

    async def _unload(self) -> None:
        async with self.queue.slot():
            try:
                await self._worker.do(self.model.close)
            except Exception:
                logger.exception("model %s: could not be closed in order; it is given up", self.model.id)
                self._replace_worker()
            self.state = "unloaded"

    async def _load_on_demand(self) -> None:
        self.reload()
        await self.settled()
        if self.state != "ready":
            raise self._not_ready(f"could not be loaded: {self.error}", self.next_try_seconds() or _HOPELESS_RETRY_SECONDS)

    def _abandon(self) -> None:
        """Leave a thread that hangs or has ended behind, with the model on it, and load another model on another thread."""
        what = "hung" if self._worker.alive else "lost its thread"
        logger.error("model %s: %s; the model is loaded anew on another thread", self.model.id, what)
        self._replace_worker()
        self.state = "loading"
        self.reload()

    def _replace_worker(self) -> None:
        self._worker.close()
        self.model = self._create()
        self._worker = ModelWorker(self.model.id)


class _ProgressReporter:
    """Takes a load's progress on the model's thread: keeps the latest for `/health`, and logs a line every few seconds."""

    def __init__(self, host: ModelHost) -> None:
        self._host = host
        self._logged_at = 0.0
        self._logged_stage = ""

    def report(self, progress: LoadProgress) -> None:
        self._host.progress = progress
        now = time.monotonic()
        if progress.stage == self._logged_stage and now - self._logged_at < _PROGRESS_LOG_SECONDS:
            return
        self._logged_at, self._logged_stage = now, progress.stage
        logger.info("model %s: %s", self._host.model.id, progress)


async def _wait_event(event: asyncio.Event, timeout: float | None) -> bool:
    """Whether the event came before the time ran out."""
    try:
        await asyncio.wait_for(event.wait(), timeout)
    except asyncio.TimeoutError:
        return False
    return True


async def _wait_uncancelled(future: asyncio.Future[Any], timeout: float, heartbeat: Heartbeat) -> None:
    """Wait for the future; a cancellation of the waiting task becomes a request to stop, for the turn must not end before the job does."""
    try:
        await asyncio.wait({future}, timeout=timeout)
    except asyncio.CancelledError:
        heartbeat.stop()
