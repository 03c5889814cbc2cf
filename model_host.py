"""Run one model: its request queue, its thread, loading, unloading and status."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

import anyio
import numpy as np

from errors import GenerationTimeoutError, ModelNotReadyError, QueueTimeoutError, RateLimitError, ShuttingDownError
from speech_model import CODEC_FRAMES_PER_SECOND, LoadProgress, ModelLoadError, SpeechModel

logger = logging.getLogger(__name__)

_ASSUMED_SLOT_SECONDS = 5.0  # until some slots have been measured
_LATEST_SLOT_WEIGHT = 0.3  # in the running mean of how long a slot is held

_MEASURED_UTTERANCES = 32  # from which the pace is taken

_WATCH_SECONDS = 1.0  # between two looks at the thread

_FIRST_RETRY_SECONDS = 30.0
_LONGEST_RETRY_SECONDS = 1800.0
_IDLE_CHECK_SECONDS = 5.0
_PROGRESS_LOG_SECONDS = 5.0

_LOADING_RETRY_AFTER = 10.0
_OWNER_RETRY_AFTER = 3600.0  # where only the owner can repair the model
_LONGEST_CLIENT_WAIT = 60.0  # OpenAI's clients ignore a longer Retry-After

T = TypeVar("T")

State = Literal["loading", "ready", "unloaded", "failed", "disabled"]


class RequestQueue:
    """One slot for work. New requests get it in the order of their arrival, in turns with those that had it before and want it again.

    So a new request waits for one turn of a long text for each new one before it, not for all long texts, and these go on however many
    requests come.

    Args:
        limit: The most requests that may wait; further ones are refused.
        timeout: The longest wait, in seconds.

    Attributes:
        active: The number of requests that hold the slot, 0 or 1.
    """

    def __init__(self, limit: int, timeout: float) -> None:
        self.active = 0
        self._limit = limit
        self._timeout = timeout
        self._free = True
        self._new: deque[anyio.Event] = deque()
        self._returning: deque[anyio.Event] = deque()
        self._latest = self._returning  # the line that got the slot last
        self._waits: dict[anyio.CancelScope, bool] = {}  # of the new ones, and whether a closed queue takes them
        self._closed = False
        self._mean_seconds = _ASSUMED_SLOT_SECONDS

    @property
    def waiting(self) -> int:
        """The number of requests that wait for the slot, for the first time or again."""
        return len(self._new) + len(self._returning)

    @asynccontextmanager
    async def slot(self, *, again: bool = False, continued: bool = False) -> AsyncIterator[float]:
        """Wait for the slot and hold it. Yields the time spent waiting, in seconds.

        Args:
            again: The request has held the slot before, and let others go first. It waits as long as it takes.
            continued: It continues one that has held the slot before: a closed queue takes it.

        Raises:
            RateLimitError: The queue is full.
            QueueTimeoutError: The wait exceeded the timeout.
            ShuttingDownError: The queue is closed.
        """
        asked = time.monotonic()
        await (self._wait(self._returning) if again else self._acquire(continued))
        self.active += 1
        started = time.monotonic()
        try:
            yield started - asked
        finally:
            self._mean_seconds += _LATEST_SLOT_WEIGHT * (time.monotonic() - started - self._mean_seconds)
            self.active -= 1
            self._release()

    def close(self) -> None:
        """Refuse the waiting requests and all later ones; those that have begun continue."""
        self._closed = True
        for wait, continued in self._waits.items():
            if not continued:
                wait.cancel()

    def retry_after(self) -> int:
        """Estimate in how many seconds the waiting requests will be done, from the mean time a slot is held."""
        return max(1, math.ceil(self._mean_seconds * max(1, self.waiting)))

    async def _acquire(self, continued: bool) -> None:
        if self._closed and not continued:
            raise ShuttingDownError
        if not self._free and self.waiting >= self._limit:
            raise RateLimitError(
                f"The queue is full: {self.waiting} requests are waiting. Try again in {self.retry_after()} s.",
                headers={"Retry-After": str(self.retry_after())},
            )
        with anyio.move_on_after(self._timeout) as wait:
            self._waits[wait] = continued
            try:
                await self._wait(self._new)
            finally:
                del self._waits[wait]
        if wait.cancelled_caught and self._closed and not continued:
            raise ShuttingDownError
        if wait.cancelled_caught:
            raise QueueTimeoutError(
                f"The request waited {self._timeout:g} s in the queue, the most that QUEUE_TIMEOUT allows. Try again later.",
                headers={"Retry-After": str(self.retry_after())},
            )

    async def _wait(self, line: deque[anyio.Event]) -> None:
        if self._free:
            self._free = False
            return
        given = anyio.Event()
        line.append(given)
        try:
            await given.wait()
        except BaseException:
            if given.is_set():
                self._release()
            else:
                line.remove(given)
            raise

    def _release(self) -> None:
        """Give the slot to the first of the line that did not get it last, else of the other one."""
        other = self._new if self._latest is self._returning else self._returning
        self._latest = other or self._latest
        if self._latest:
            self._latest.popleft().set()
        else:
            self._free = True


class Pace:
    """How fast a model speaks: a time to start and a time for each character, fitted to its latest utterances."""

    def __init__(self) -> None:
        self._measured: deque[tuple[int, float, float]] = deque(maxlen=_MEASURED_UTTERANCES)  # characters, seconds of audio and of work
        self._info: dict[str, float | int] | None = {}  # None: to be computed again

    def observe(self, characters: int, audio_seconds: float, seconds: float) -> None:
        """Add a complete utterance."""
        self._measured.append((characters, audio_seconds, seconds))
        self._info = None

    def seconds(self, characters: int) -> float | None:
        """Return how long a text of this length would take, without the queue; None before the first utterance."""
        if not self._measured:
            return None
        start, each = self._fit()
        return start + each * characters

    def info(self) -> dict[str, float | int]:
        """Return what `/health` shows; empty before the first utterance. Computed once for each utterance."""
        if self._info is None:
            self._info = self._summary()
        return self._info

    def _summary(self) -> dict[str, float | int]:
        start, each = self._fit()
        _, audio, work = np.sum(np.array(self._measured), axis=0)
        frames = float(audio * CODEC_FRAMES_PER_SECOND / work) if work else 0.0
        return {
            "frames_per_second": round(frames, 2),
            "start_seconds": round(start, 4),
            "seconds_per_character": round(each, 6),
            "utterances": len(self._measured),
        }

    def _fit(self) -> tuple[float, float]:
        """Return the time to start and the time a character, in seconds, by least squares; neither is negative."""
        characters, _, seconds = np.array(self._measured, np.float64).T
        spread = characters - characters.mean()
        each = float(spread @ seconds / (spread @ spread)) if spread.any() else 0.0
        longest = float(seconds.mean() / characters.mean())
        each = min(max(each, 0.0), longest) if spread.any() else longest
        return float(seconds.mean()) - each * float(characters.mean()), each


class WorkerLostError(Exception):
    """The thread has ended before the job did."""


class ModelWorker:
    """A thread that runs one job after another, in the order of submission.

    MLX binds its streams and its random state to a thread (mlx 0.32: a model loaded on one thread raises "There is no Stream" on
    another), so a model loads, speaks and closes on one thread. The thread is a daemon, because nothing can interrupt a job that
    hangs in native code, and the process must be able to end.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"model-{name}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread is still running."""
        return self._thread.is_alive()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Run `job` after the jobs before it; the future gets its result or exception."""
        future: Future[T] = Future()
        self._jobs.put((job, future))
        return future

    async def do(self, job: Callable[[], T]) -> T:
        """Run `job` and return its result.

        Raises:
            WorkerLostError: The thread ended before the job did.
            BaseException: Whatever the job raises.
        """
        future = asyncio.wrap_future(self.submit(job))
        try:
            while not future.done() and self.alive:
                await asyncio.wait({future}, timeout=_WATCH_SECONDS)
            if not future.done():
                raise WorkerLostError
            return future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        """End the thread after the submitted jobs."""
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
                del result
            del item, job, future  # frees the samples now, not after the next job


def started_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Return an executor with all its threads started: without memory for a new thread, `Thread.start` may wait for ever, in the event loop."""
    executor = ThreadPoolExecutor(count, name)
    together = threading.Barrier(count + 1)
    for _ in range(count):
        executor.submit(together.wait)
    together.wait()
    return executor


@dataclass
class Heartbeat:
    """Watches and stops a running job from outside its thread.

    The model calls `cancelled` at least once a frame. Each call shows that it is slow at most, not hung.
    """

    stopped: bool = False
    last: float = field(default_factory=time.monotonic)

    def cancelled(self) -> bool:
        """Return whether the job must end. Called by the model, on its thread."""
        self.last = time.monotonic()
        return self.stopped

    def stop(self) -> None:
        """Ask the job to end."""
        self.stopped = True


class ModelHost:
    """One model, from load to close.

    Args:
        create: Makes the model, unloaded. Called again when a model that hangs is abandoned.
        queue: The model's request queue.
        disabled: Why the model is switched off; None where it is on.
        stall_seconds: A job that shows no progress for longer than this is abandoned.
        idle_seconds: The model is unloaded after this long without work; 0 means never.
        after_load: Runs on the model's thread after each load (the warm-up).
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
        self.pace = Pace()
        self.state: State = "disabled" if disabled else "loading"
        self.error: str | None = disabled
        self.progress: LoadProgress | None = None
        self._create = create
        self._after_load = after_load
        self._stall_seconds = stall_seconds
        self._idle_seconds = idle_seconds
        self._worker = ModelWorker(self.model.id)
        self._load_task: asyncio.Task[None] | None = None
        self._reload = asyncio.Event()
        self._settled = asyncio.Event()  # set while no load is running
        self._next_try: float | None = None
        self._logged_progress = ("", 0.0)  # the stage, and when
        self._last_work = time.monotonic()

    def start(self) -> None:
        """Start loading in the background."""
        if self.state != "disabled":
            self._load_task = asyncio.create_task(self._keep_loaded(), name=f"load-{self.model.id}")

    async def close(self) -> None:
        """End the background task and the thread."""
        if self._load_task:
            self._load_task.cancel()
            await asyncio.wait({self._load_task})
        self._worker.close()

    def reload(self) -> None:
        """Start loading again now. `settled` waits for that load."""
        if self._load_task:
            self._settled.clear()
            self._reload.set()

    async def settled(self) -> None:
        """Wait until the current load has succeeded or failed."""
        await self._settled.wait()

    @property
    def ready(self) -> bool:
        """Whether the model accepts requests. An unloaded model does: it loads again when the request gets its slot."""
        return self.state in ("ready", "unloaded")

    def next_try_seconds(self) -> float | None:
        """Return in how many seconds a failed load is retried; None when it is not."""
        return None if self._next_try is None else max(0.0, self._next_try - time.monotonic())

    def not_ready_error(self, advice: str = "") -> ModelNotReadyError:
        """Return the error for a request that the model cannot serve now; `advice` says what to do instead."""
        seconds = self.next_try_seconds() or _OWNER_RETRY_AFTER
        if self.state == "loading":
            reason, seconds = "is still loading" + (f" ({self.progress})." if self.progress else "."), _LOADING_RETRY_AFTER
        elif self.state == "disabled":
            reason = f"is switched off: {self.error}"
        else:
            reason = f"could not be loaded: {self.error}"
        headers = {"Retry-After": str(math.ceil(seconds))}
        if seconds > _LONGEST_CLIENT_WAIT:
            headers["X-Should-Retry"] = "false"  # keeps OpenAI's clients from retrying at once
        return ModelNotReadyError(f"Model '{self.model.id}' {reason} {advice}".rstrip(), param="voice", headers=headers)

    async def run(self, job: Callable[[SpeechModel], T], heartbeat: Heartbeat) -> T:
        """Run `job` on the model's thread and return its result. Call it while holding the queue's slot.

        An anyio cancellation waits for the job's end, so that the slot is not free while the job still runs: to end a job early,
        stop its heartbeat.

        Raises:
            GenerationTimeoutError: The model hung or its thread ended; it is abandoned and loaded again on a new thread.
            ModelNotReadyError: The model was unloaded and could not be loaded again.
        """
        try:
            with anyio.CancelScope(shield=True):
                if self.state == "unloaded":
                    await self._load_on_demand()
                future = asyncio.wrap_future(self._worker.submit(partial(job, self.model)))
                await self._watch(future, heartbeat)
            return future.result()
        finally:
            self._last_work = time.monotonic()

    def info(self) -> dict[str, Any]:
        """Return the model's part of `/health`."""
        info: dict[str, Any] = {"id": self.model.id, "state": self.state, "loaded": self.state == "ready", "error": self.error}
        if self.state == "failed":
            info["next_try_seconds"] = self.next_try_seconds()
        if self.state == "loading" and self.progress:
            info["progress"] = asdict(self.progress) | {"fraction": self.progress.fraction}
        if pace := self.pace.info():
            info["pace"] = pace
        return info | self.model.info() | {"active": self.queue.active, "waiting": self.queue.waiting}

    async def _watch(self, future: asyncio.Future[Any], heartbeat: Heartbeat) -> None:
        """Wait for the job's end; abandon the thread when it hangs or has ended."""
        heartbeat.last = time.monotonic()
        while not future.done():
            await asyncio.wait({future}, timeout=min(_WATCH_SECONDS, self._stall_seconds))
            silent = time.monotonic() - heartbeat.last
            if not future.done() and (silent > self._stall_seconds or not self._worker.alive):
                self._abandon()
                raise GenerationTimeoutError(
                    f"Model '{self.model.id}' made no progress for {silent:.0f} s and is being loaded again. Try again in a moment.",
                    headers={"Retry-After": "30"},
                )

    def _abandon(self) -> None:
        """Leave the thread and the model on it, and load a new model on a new thread."""
        reason = "it hangs" if self._worker.alive else "its thread ended"
        logger.error("model %s: %s; loading it again on a new thread", self.model.id, reason)
        self._replace_worker()
        self.state = "loading"
        self.reload()

    def _replace_worker(self) -> None:
        self._worker.close()
        self.model = self._create()
        self._worker = ModelWorker(self.model.id)

    async def _keep_loaded(self) -> None:
        """Load the model, and load it again after a failure (the pauses grow) and after each `reload`."""
        pause = _FIRST_RETRY_SECONDS
        while True:
            self._reload.clear()
            try:
                await self._load()
            except ModelLoadError as error:
                wait = pause if error.retry else None
                self._fail(error.message, wait)
                pause = min(2 * pause, _LONGEST_RETRY_SECONDS)
                with anyio.move_on_after(wait):
                    await self._reload.wait()
            else:
                pause = _FIRST_RETRY_SECONDS
                await self._wait_for_reload()

    async def _load(self) -> None:
        """Load the model on its thread.

        Raises:
            ModelLoadError: It failed, for whatever reason.
        """
        self._settled.clear()
        self.state, self.error, self.progress = "loading", None, None
        self._next_try, self._logged_progress = None, ("", 0.0)
        started = time.monotonic()
        logger.info("model %s: loading", self.model.id)
        try:
            await self._worker.do(partial(self._load_on_thread, self.model))
        except (ModelLoadError, asyncio.CancelledError):
            raise
        except BaseException as error:
            raise self._load_error(error) from error
        self.state, self.progress = "ready", None
        self._settled.set()
        logger.info("model %s: ready after %.1f s", self.model.id, time.monotonic() - started)

    def _load_on_thread(self, model: SpeechModel) -> None:
        with _frozen_afterwards():
            model.close()
            model.load(self._report)
            self._after_load(model)

    def _report(self, progress: LoadProgress) -> None:
        """Store the progress for `/health` and log it every few seconds. Called on the model's thread."""
        self.progress = progress
        now = time.monotonic()
        stage, logged = self._logged_progress
        if progress.stage != stage or now - logged >= _PROGRESS_LOG_SECONDS:
            self._logged_progress = (progress.stage, now)
            logger.info("model %s: %s", self.model.id, progress)

    def _load_error(self, error: BaseException) -> ModelLoadError:
        if isinstance(error, WorkerLostError):
            self._replace_worker()
            return ModelLoadError("The model's thread ended during the load.")
        if isinstance(error, MemoryError):
            return ModelLoadError("There is not enough memory to load the model: close other programs or choose a smaller one (MODEL_ID).")
        logger.error("model %s: unexpected error during the load", self.model.id, exc_info=error)
        return ModelLoadError(f"Unexpected error during the load ({type(error).__name__}). See the server's log.")

    def _fail(self, message: str, wait: float | None) -> None:
        self.state, self.error, self.progress = "failed", message, None
        self._next_try = None if wait is None else time.monotonic() + wait
        self._settled.set()
        retry = "no retry before a restart or a reload" if wait is None else f"retrying in {wait:.0f} s"
        logger.error("model %s: %s (%s)", self.model.id, message, retry)

    async def _wait_for_reload(self) -> None:
        """Return once the model must be loaded again; unload it meanwhile when it is idle."""
        while True:
            watched = self._idle_seconds and self.state == "ready"
            with anyio.move_on_after(min(self._idle_seconds, _IDLE_CHECK_SECONDS) if watched else None):
                await self._reload.wait()
                return
            idle = time.monotonic() - self._last_work
            if self.state == "ready" and idle >= self._idle_seconds and not self.queue.active:
                await self._unload()
                logger.info("model %s: unloaded after %.0f s without work", self.model.id, idle)

    async def _unload(self) -> None:
        async with self.queue.slot():
            try:
                await self._worker.do(partial(_close, self.model))
            except Exception:
                logger.exception("model %s: it could not be closed; replacing it", self.model.id)
                self._replace_worker()
            self.state = "unloaded"

    async def _load_on_demand(self) -> None:
        self.reload()
        await self.settled()
        if self.state != "ready":
            raise self.not_ready_error()


def _close(model: SpeechModel) -> None:
    with _frozen_afterwards():
        model.close()


@contextmanager
def _frozen_afterwards() -> Iterator[None]:
    """Let the garbage collector look at everything; afterwards it leaves out what there is.

    A loaded model, the lexicons and the modules stay for months, and each full collection would look at all of them again while every
    thread waits (0.05 to 0.1 s, measured with the built-in voice).
    """
    gc.unfreeze()
    yield
    gc.freeze()
