"""Logging and Prometheus metrics."""

from __future__ import annotations

import logging
import sys
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from model_host import ModelHost

_FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s"
_FILE_BYTES = 5_000_000
_FILE_COUNT = 4  # rotated ones kept beside the current: 25 MB at most
_COMPLAINT_SECONDS = 3600.0


class _PatientFileHandler(RotatingFileHandler):
    """A rotating file that outlives a full disk: what cannot be written is dropped, and stderr is told once an hour."""

    _complained_at = -_COMPLAINT_SECONDS

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by logging when a line could not be written."""
        now = time.monotonic()
        if now - self._complained_at >= _COMPLAINT_SECONDS:
            self._complained_at = now
            print(f"the log file cannot be written: {sys.exc_info()[1]!r}", file=sys.stderr)


def configure_logging(level: str, folder: Path, *, to_stderr: bool = True) -> None:
    """Send the log to stderr and to `folder`/server.log. A folder that cannot be written costs the file, not the start."""
    formatter = logging.Formatter(_FORMAT, datefmt="%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    root = logging.getLogger()
    root.setLevel(level.upper())
    for handler in list(root.handlers):
        root.removeHandler(handler)
    if to_stderr:
        _add(root, logging.StreamHandler(), formatter)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _add(root, _PatientFileHandler(folder / "server.log", maxBytes=_FILE_BYTES, backupCount=_FILE_COUNT, encoding="utf-8"), formatter)
    except OSError as error:
        _add(root, logging.StreamHandler(), formatter) if not to_stderr else None
        logging.getLogger(__name__).warning("no log file: CACHE_DIR cannot be written (%s)", error.strerror or type(error).__name__)
    logging.getLogger("uvicorn.error").addFilter(_already_told)
    for noisy in ("httpx", "httpcore", "urllib3", "huggingface_hub", "asyncio", "multipart", "python_multipart", "filelock", "numba"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


def _already_told(record: logging.LogRecord) -> bool:
    """Leave out uvicorn's traceback of an application error: `RequestLog` has told it, with the request's id."""
    return not str(record.msg).startswith("Exception in ASGI application")


def _add(root: logging.Logger, handler: logging.Handler, formatter: logging.Formatter) -> None:
    handler.setFormatter(formatter)
    root.addHandler(handler)


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_FACTORS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 5)


class Metrics:
    """The server's figures, in a registry of their own, so that two servers in one process do not meet."""

    def __init__(self, hosts: dict[str, ModelHost]) -> None:
        self._hosts = hosts
        self.registry = CollectorRegistry()
        labels = ["model"]
        self._active = Gauge("sesame_tts_active", "Utterances being generated", labels, registry=self.registry)
        self._waiting = Gauge("sesame_tts_waiting", "Utterances waiting for their turn", labels, registry=self.registry)
        self._ready = Gauge("sesame_tts_model_ready", "1 when the model can speak", labels, registry=self.registry)
        self._queue = self._histogram("queue_seconds", "Time spent waiting for the turn", _SECONDS)
        self._generation = self._histogram("generation_seconds", "Time the model worked", _SECONDS)
        self._first_audio = self._histogram("first_audio_seconds", "Time from the turn to the first samples", _SECONDS)
        self._audio = self._histogram("audio_seconds", "Length of the speech", _SECONDS)
        self._factor = self._histogram("real_time_factor", "Generation time over length of speech", _FACTORS)
        self._outcomes = Counter(
            "sesame_tts_requests",
            "Speech requests by outcome: an HTTP status, or cancelled",
            [*labels, "format", "outcome"],
            registry=self.registry,
        )

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
        """The text that Prometheus reads."""
        for model, host in self._hosts.items():
            self._active.labels(model).set(host.queue.active)
            self._waiting.labels(model).set(host.queue.waiting)
            self._ready.labels(model).set(host.ready)
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"sesame_tts_{name}", text, ["model"], buckets=buckets, registry=self.registry)
