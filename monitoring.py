"""What people and machines see of the server: its log, in a file and on a terminal, and its Prometheus metrics."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from model_host import ModelHost

LOG_FILE = "server.log"
"""The name of the log file in CACHE_DIR."""

_LOG_FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s"
_LOG_BYTES = 5_000_000
_OLD_LOGS = 4  # rotated files that are kept: 25 MB in all
_WRITE_FAILURE_SECONDS = 3600.0
_VERBOSE_LOGGERS = ("httpx", "httpcore", "urllib3", "huggingface_hub", "asyncio", "multipart", "python_multipart", "filelock", "numba")

_POLL_SECONDS = 0.5
_SPEED_SECONDS = 30.0  # the speed of a download is that of the last seconds; huggingface_hub reports every 10 MB
_DEFAULT_WIDTH = 80
_LABEL_WIDTH = 9
_LEAST_WIDTH = 40  # a narrower terminal breaks the lines itself

_BOLD, _DIM, _RED, _GREEN, _YELLOW = "1", "2", "31", "32", "33"
_CLEAR_LINE = "\r\033[K"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_FACTORS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 5)


# --- The log ---


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


# --- On a terminal ---


class DownloadSpeed:
    """Describes how far a download is, with its speed and the remaining time."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def describe(self, progress: Mapping[str, Any], now: float) -> str:
        """Return a text like "40% of 3100 MB, 12.0 MB/s, 3 min left"; "" outside a download.

        Args:
            progress: The field of this name in `/health`.
            now: The time on the monotonic clock.
        """
        done, total = progress.get("done"), progress.get("total")
        if done is None or not total:
            self._samples.clear()
            return ""
        self._samples.append((now, done))
        while now - self._samples[0][0] > _SPEED_SECONDS:
            self._samples.popleft()
        return f"{100 * done // total}% of {total / 1e6:.0f} MB{self._speed(done, total)}"

    def _speed(self, done: int, total: int) -> str:
        """Return speed and remaining time; nothing before two samples differ."""
        (before, least), (now, _) = self._samples[0], self._samples[-1]
        if done <= least or now <= before:
            return ""
        speed = (done - least) / (now - before)
        return f", {speed / 1e6:.1f} MB/s, {_duration((total - done) / speed)} left"


@dataclass(frozen=True)
class Facts:
    """What the banner says about this server, apart from its models.

    Attributes:
        version: Of the server.
        url: Of the server on this machine, without a path.
        page: Whether the page is served.
        keyed: Whether requests need a key.
        log: The log file, which may be missing.
    """

    version: str
    url: str
    page: bool
    keyed: bool
    log: Path


@dataclass(frozen=True)
class Voices:
    """Which voice speaks.

    Attributes:
        default: The default voice.
        speaker: The voice that speaks for the default voice now; None if none can.
        models: The models' states, as in `/health`.
    """

    default: str
    speaker: str | None
    models: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class _Line:
    """A line for the terminal: its text, and how many of its first characters have the colour; None: all of them."""

    text: str
    color: str
    colored: int | None = None

    def painted(self, wrapped: str, paint: Callable[[str, str], str]) -> str:
        """Return the text, which has been wrapped, in its colour."""
        end = len(wrapped) if self.colored is None else self.colored
        return paint(wrapped[:end], self.color) + wrapped[end:]


class Terminal(logging.Handler):
    """A log handler for a person: requests, warnings and errors as short lines in local time, above a live line that shows a load.

    Records of requests have an attribute `fields`: the fields of the log line, and `reason` if the request was refused.

    Args:
        facts: For the banner.
        verbose: Show all records.
    """

    def __init__(self, facts: Facts, *, verbose: bool) -> None:
        super().__init__()
        self._stream = sys.stderr
        self._facts = facts
        self._verbose = verbose
        self._colored = not os.environ.get("NO_COLOR")
        self._live = ""
        self._speaker: str | None = None
        self._speed = DownloadSpeed()

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record, unless it is of no use to a person."""
        try:
            if (line := self._line(record)) is not None:
                clock = f"{time.strftime('%H:%M:%S', time.localtime(record.created))}  "
                self._print(
                    self._paint(clock, _DIM) + line.painted(self._wrapped(clock + line.text, len(clock))[len(clock) :], self._paint)
                )
        except Exception:
            self.handleError(record)

    async def watch(self, read: Callable[[], Voices]) -> None:
        """Show the load, the banner once a voice is ready or none is loading, and each change of the voice that speaks; until cancelled."""
        try:
            greeted = False
            while True:
                voices = read()
                loading = [name for name, model in voices.models.items() if model["state"] == "loading"]
                if not greeted and (voices.speaker is not None or not loading):
                    greeted = True
                    self._say(self._banner(voices))
                elif voices.speaker not in (None, self._speaker):
                    self._say(f"Voice {voices.speaker} is ready: it speaks for OpenAI's names from now on.")
                self._speaker = voices.speaker
                self._show(self._progress(loading[-1], voices.models[loading[-1]]) if loading else "")
                await asyncio.sleep(_POLL_SECONDS)
        finally:
            self._show("")

    def _line(self, record: logging.LogRecord) -> _Line | None:
        fields: dict[str, Any] | None = getattr(record, "fields", None)
        if fields is not None:
            return self._request(fields)
        if record.levelno < logging.WARNING and record.name != "server_process" and not self._verbose:
            return None
        color = _RED if record.levelno >= logging.ERROR else _YELLOW if record.levelno >= logging.WARNING else ""
        return _Line(_printable(record.getMessage()), color)

    def _request(self, fields: Mapping[str, Any]) -> _Line:
        status = fields["status"]  # a number, or "aborted"
        color = _RED if not isinstance(status, int) or status >= 500 else _YELLOW if status >= 400 else _GREEN
        place = f"{fields['method']} {fields['path'][1:-1]}" if "path" in fields else "incomplete request"
        return _Line(f"{status}  {_printable(place)}  {_printable(_outcome(fields))}", color, len(str(status)))

    def _banner(self, voices: Voices) -> str:
        facts = self._facts
        ready = voices.speaker is not None
        title = f"Sesame TTS {facts.version} {'is ready' if ready else 'runs, but no voice is ready'}"
        rows = [("Open", f"{facts.url}/")] if facts.page else []
        rows += [("Clients", f"{facts.url}/v1, {'with a key from API_KEY' if facts.keyed else 'any API key'}")]
        rows += [("Voice", _voice(voices)), ("CSM-1B", _csm(voices.models["csm-1b"]))]
        rows += [("Log", _short(facts.log) if facts.log.exists() else "none: CACHE_DIR cannot be written"), ("Stop", "Ctrl-C")]
        lines = [self._row(label, _printable(text)) for label, text in rows]
        return "\n".join(["", f"  {self._paint(title, _BOLD)}", "", *lines, ""])

    def _row(self, label: str, text: str) -> str:
        margin = f"  {label.ljust(_LABEL_WIDTH)}"
        return self._paint(margin, _DIM) + self._wrapped(margin + text, len(margin))[len(margin) :]

    def _wrapped(self, text: str, indent: int) -> str:
        """Return the text in lines that fit into the terminal, broken between words; all but the first are indented."""
        width = max(self._width(), _LEAST_WIDTH)
        return textwrap.fill(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)

    def _progress(self, name: str, model: Mapping[str, Any]) -> str:
        """Return the live line: the figures first, because the line is cut at the terminal's width."""
        progress = model.get("progress") or {"stage": "loading"}
        figures = self._speed.describe(progress, time.monotonic())
        return f"{name}: {', '.join(filter(None, (figures, progress['stage'])))}"

    def _say(self, text: str) -> None:
        with suppress(OSError), self._locked():
            self._print(text)

    def _show(self, live: str) -> None:
        """Replace the live line below all others; "" removes it."""
        if live != self._live:
            with suppress(OSError), self._locked():
                self._live = live
                self._write(_CLEAR_LINE)

    def _print(self, text: str) -> None:
        self._write(f"{_CLEAR_LINE if self._live else ''}{text}\n")

    def _write(self, text: str) -> None:
        live = self._paint(_printable(self._live)[: self._width()], _DIM) if self._live else ""
        self._stream.write(text + live)
        self._stream.flush()

    def _width(self) -> int:
        """Return the terminal's width less one: a full last column breaks the line on some. Some terminals report 0 for an unknown width."""
        with suppress(OSError):
            return (os.get_terminal_size(self._stream.fileno()).columns or _DEFAULT_WIDTH) - 1
        return _DEFAULT_WIDTH - 1

    def _paint(self, text: str, color: str) -> str:
        return f"\033[{color}m{text}\033[0m" if self._colored and color else text

    def _locked(self) -> Any:  # noqa: ANN401 - a lock of the logging module, which has no public type
        assert self.lock is not None  # noqa: S101 - set by logging.Handler
        return self.lock


def on_terminal() -> bool:
    """Return whether standard error is a terminal that can rewrite a line."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def _duration(seconds: float) -> str:
    """Return a duration as people say it: "40 s", "12 min", "1 h 5 min"."""
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _outcome(fields: Mapping[str, Any]) -> str:
    """Return what became of a request: the code and reason of a refusal, what was spoken, or how long it took."""
    if "reason" in fields:
        return f"{fields['code']}: {fields['reason']}"
    if fields["status"] == 499:
        return "the client disconnected"
    if "turns" in fields:
        return f"{fields['turns']} spoken in {float(fields['seconds']):.1f} s"
    if "audio" not in fields:
        return f"{fields['seconds']} s"
    instead = f" instead of {fields['fallback_for']}" if "fallback_for" in fields else ""
    failed = f", {fields['outcome']}" if "outcome" in fields else ""
    return f"{fields['voice']}{instead}, {fields['format']}, {float(fields['audio']):.1f} s of speech in {float(fields['seconds']):.1f} s{failed}"


def _voice(voices: Voices) -> str:
    if voices.speaker is None:
        return f"{voices.default}, not ready"
    return voices.speaker if voices.speaker == voices.default else f"{voices.speaker}, until {voices.default} is ready"


def _csm(model: Mapping[str, Any]) -> str:
    state = model["state"]
    if state == "disabled":
        return f"off: {model['error']}"
    if state == "failed":
        return f"failed: {model['error']}"
    return "loading; the last line shows how far it is" if state == "loading" else "ready"


def _short(path: Path) -> str:
    """Return a path with the home folder as ~."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def _printable(text: str) -> str:
    """Return the text without control characters: a request must not control the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


# --- Metrics ---


class Metrics:
    """The server's Prometheus metrics, in their own registry, so that two servers in one process do not share them."""

    def __init__(self, hosts: dict[str, ModelHost]) -> None:
        self._hosts = hosts
        self._registry = CollectorRegistry()
        self._active = self._gauge("active", "Utterances being generated")
        self._waiting = self._gauge("waiting", "Utterances waiting in the request queue")
        self._ready = self._gauge("model_ready", "1 when the model can speak")
        self._seconds = {
            "queue": self._histogram("queue_seconds", "Time spent in the request queue", _SECONDS),
            "generation": self._histogram("generation_seconds", "Time the model worked", _SECONDS),
            "first_audio": self._histogram("first_audio_seconds", "Time from the end of the wait to the first samples", _SECONDS),
            "audio": self._histogram("audio_seconds", "Length of the speech", _SECONDS),
        }
        self._factor = self._histogram("real_time_factor", "Generation time over length of speech", _FACTORS)
        self._outcomes = Counter(
            "sesame_tts_requests",
            "Speech requests by outcome: an HTTP status, or cancelled",
            ["model", "format", "outcome"],
            registry=self._registry,
        )
        self._registry.register(_Faults(hosts))

    def observe(self, model: str, format_name: str, outcome: str, measured: Mapping[str, float | None]) -> None:
        """Record one speech request; `measured` as in `Utterance`."""
        self._outcomes.labels(model, format_name, outcome).inc()
        for name, seconds in measured.items():
            if seconds is not None:
                self._seconds[name].labels(model).observe(seconds)
        generation, audio = measured.get("generation"), measured.get("audio")
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
