"""Logging and Prometheus metrics."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from model_host import ModelHost

LOG_FILE = "server.log"
"""The name of the log file in CACHE_DIR."""

_LOG_FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s"
_LOG_BYTES = 5_000_000
_OLD_LOGS = 4  # rotated files that are kept: 25 MB in all
_WRITE_FAILURE_SECONDS = 3600.0
_VERBOSE_LOGGERS = ("httpx", "httpcore", "urllib3", "huggingface_hub", "asyncio", "multipart", "python_multipart", "filelock", "numba")

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_FACTORS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 5)


class Metrics:
    """The server's Prometheus metrics, in their own registry, so that two servers in one process do not share them."""

    def __init__(self, hosts: dict[str, ModelHost]) -> None:
        self._hosts = hosts
        self._registry = CollectorRegistry()
        self._active = self._gauge("active", "Utterances being generated")
        self._waiting = self._gauge("waiting", "Utterances waiting in the request queue")
        self._ready = self._gauge("model_ready", "1 when the model can speak")
        self._queue = self._histogram("queue_seconds", "Time spent in the request queue", _SECONDS)
        self._generation = self._histogram("generation_seconds", "Time the model worked", _SECONDS)
        self._first_audio = self._histogram("first_audio_seconds", "Time from the end of the wait to the first samples", _SECONDS)
        self._audio = self._histogram("audio_seconds", "Length of the speech", _SECONDS)
        self._factor = self._histogram("real_time_factor", "Generation time over length of speech", _FACTORS)
        self._outcomes = Counter(
            "sesame_tts_requests",
            "Speech requests by outcome: an HTTP status, or cancelled",
            ["model", "format", "outcome"],
            registry=self._registry,
        )
        self._registry.register(_Faults(hosts))

    def observe(
        self,
        *,
        model: str,
        format_name: str,
        outcome: str,
        queue: float | None = None,
        generation: float | None = None,
        first_audio: float | None = None,
        audio: float | None = None,
    ) -> None:
        """Record one speech request; all times in seconds."""
        self._outcomes.labels(model, format_name, outcome).inc()
        pairs = ((self._queue, queue), (self._generation, generation), (self._first_audio, first_audio), (self._audio, audio))
        for histogram, value in pairs:
            if value is not None:
                histogram.labels(model).observe(value)
        if generation is not None and audio:
            self._factor.labels(model).observe(generation / audio)

    def render(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        for model, host in self._hosts.items():
            self._active.labels(model).set(host.queue.active)
            self._waiting.labels(model).set(host.queue.waiting)
            self._ready.labels(model).set(host.ready)
        return generate_latest(self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"sesame_tts_{name}", text, ["model"], registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"sesame_tts_{name}", text, ["model"], buckets=buckets, registry=self._registry)


class _Faults(Collector):
    """Counts the faults that the quality checks found in the models' speech, by kind. The models count; a reload begins at 0."""

    def __init__(self, hosts: dict[str, ModelHost]) -> None:
        self._hosts = hosts

    def collect(self) -> Iterator[Metric]:
        """Yield the counter."""
        text = "Faults of generated segments, each attempt counted"
        counter = CounterMetricFamily("sesame_tts_segment_faults", text, labels=["model", "fault"])
        for name, host in self._hosts.items():
            for fault, count in host.info().get("faults", {}).items():
                counter.add_metric([name, fault], count)
        yield counter


class _LogFile(RotatingFileHandler):
    """A rotating log file that survives a full disk: lines that cannot be written are dropped, with one message an hour on stderr."""

    _reported_at = -_WRITE_FAILURE_SECONDS

    def handleError(self, record: logging.LogRecord) -> None:
        """Report, at most once an hour, that a line could not be written."""
        now = time.monotonic()
        if now - self._reported_at >= _WRITE_FAILURE_SECONDS:
            self._reported_at = now
            print(f"the log file cannot be written: {sys.exc_info()[1]!r}", file=sys.stderr)


def configure_logging(level: str, folder: Path, *, to_stderr: bool = True, terminal: logging.Handler | None = None) -> None:
    """Log to `folder`/server.log and to stderr; if that is a terminal, to its handler. Without a folder to write to, log to stderr anyway."""
    display = terminal or logging.StreamHandler()
    handlers = [display] if to_stderr else []
    failure = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(folder / LOG_FILE, maxBytes=_LOG_BYTES, backupCount=_OLD_LOGS, encoding="utf-8"))
    except OSError as error:
        failure = error.strerror or type(error).__name__
        handlers = [display]
    formatter = logging.Formatter(_LOG_FORMAT, datefmt="%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    for handler in handlers:
        handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=handlers, force=True)
    if failure:
        logging.getLogger(__name__).warning("no log file: CACHE_DIR cannot be written (%s)", failure)
    uvicorn = logging.getLogger("uvicorn.error")
    uvicorn.addFilter(_is_new)
    uvicorn.setLevel(max(logging.INFO, logging.getLogger().level))  # at DEBUG it shows a WebSocket's messages, which contain the text
    for name in _VERBOSE_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.getLogger("huggingface_hub.file_download").setLevel(logging.ERROR)  # a warning a retry; our own line says what failed


def _is_new(record: logging.LogRecord) -> bool:
    """Leave out uvicorn's traceback of an application error, and its line for a WebSocket: `RequestLog` logs both with the request's id."""
    return not str(record.msg).startswith(("Exception in ASGI application", '%s - "WebSocket'))
