"""Run the server: listening socket, connection limits, PID file, graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import resource
import signal
import socket
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from config import Settings, SettingsError
from errors import ConnectionsExhaustedError, InvalidRequestError, RequestTimeoutError, ShuttingDownError, TTSError
from files import write_file

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 75  # longer than most connection pools keep a connection, so that the client closes it first
_MAX_HEAD_BYTES = 64 * 1024
_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - compared with HOST
_MAX_OPEN_FILES = 10_240  # the most that macOS allows a process; launchd starts a process with 256

logger = logging.getLogger(__name__)


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with two limits that uvicorn 0.54.0 lacks: request timeouts and a maximum number of connections.

    Without timeouts, a client that sends one byte a second holds a connection forever. Without a maximum, idle connections use up the
    file descriptors, and neither new clients nor ffmpeg get one. At the maximum, the connection that has been idle longest is closed.

    Attributes:
        head_seconds: Maximum time for a request's head, counted from the connection or from the head's first byte.
        body_seconds: Maximum time for a request's body. 10 MiB at 1 Mbit/s take 84 s.
        limit: Maximum number of connections.
        idle: Connections without a request in progress; the longest idle first.
    """

    head_seconds: ClassVar[float] = 20.0
    body_seconds: ClassVar[float] = 120.0
    limit: ClassVar[int] = 5_000
    idle: ClassVar[OrderedDict[GuardedProtocol, None]] = OrderedDict()

    _timeout: asyncio.TimerHandle | None = None
    _timeout_state: object = None  # the h11 state in which the timeout was started

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's own signature
        """Accept a connection; at the limit, close the longest idle one, or refuse this one if none is idle."""
        super().connection_made(transport)
        if len(self.connections) > self.limit:
            if not self.idle:
                self._refuse(
                    ConnectionsExhaustedError("The server has too many connections. Try again later.", headers={"Retry-After": "10"})
                )
                return
            next(iter(self.idle)).drop()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection."""
        self.idle.pop(self, None)
        self._cancel_timeout()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Receive part of a request."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Prepare for the next request, which may have been received already."""
        super().on_response_complete()
        self._watch()

    def shutdown(self) -> None:
        """Shut down; answer 503 to a request whose body has not arrived completely."""
        if self.conn.their_state is h11.SEND_BODY:
            self._refuse(ShuttingDownError())
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not valid HTTP, with the same JSON envelope as all other errors."""
        self._refuse(InvalidRequestError("This is not a valid HTTP request.", code="invalid_http"))

    def drop(self) -> None:
        """Close an idle connection at once."""
        self.idle.pop(self, None)
        self.transport.abort()

    def _watch(self) -> None:
        """Update the list of idle connections, and start or cancel the timeout for what the client has to send next."""
        state = h11.CLOSED if self.transport.is_closing() else self.conn.their_state
        if state is not h11.IDLE:
            self.idle.pop(self, None)
        elif self not in self.idle:
            self.idle[self] = None
        if state is h11.SEND_BODY:
            self._start_timeout(state, self.body_seconds)
        elif state is h11.IDLE and (self.cycle is None or self.conn.trailing_data[0]):
            self._start_timeout(state, self.head_seconds)
        else:
            self._cancel_timeout()

    def _start_timeout(self, state: object, seconds: float) -> None:
        """Start the timeout unless it is running for this state: more bytes do not extend it."""
        if self._timeout is None or self._timeout_state is not state:
            self._cancel_timeout()
            self._timeout_state = state
            self._timeout = self.loop.call_later(seconds, self._on_timeout, seconds)

    def _cancel_timeout(self) -> None:
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None

    def _on_timeout(self, seconds: float) -> None:
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self.transport.close()  # nothing was sent: browsers open spare connections and expect no answer on them
        else:
            self._refuse(RequestTimeoutError(f"The request did not arrive within {seconds:g} s."))

    def _refuse(self, error: TTSError) -> None:
        """Send `error` if no response has started, and close the connection. The application sees a client disconnect."""
        self._cancel_timeout()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._send_error(error)
        if self.cycle is not None and not self.cycle.response_complete:
            # Now, because the application may answer before the transport reports that it is closed.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _send_error(self, error: TTSError) -> None:
        body = json.dumps(error.envelope()).encode()
        request_id = uuid.uuid4().hex
        logger.info("id=%s status=%d code=%s refused before a complete request arrived", request_id, error.status, error.code)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        headers |= {"X-Request-Id": request_id} | error.headers
        response = h11.Response(status_code=error.status, headers=list(headers.items()), reason=HTTPStatus(error.status).phrase)
        events = (response, h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))


class _Server(uvicorn.Server):
    """uvicorn's server, with a callback when the shutdown begins and exit status 0 after it.

    uvicorn raises the signal again after its shutdown, so the process ends as killed by a signal, which launchd treats as a crash.
    """

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Shut down gracefully on the first signal, at once on a second Ctrl-C."""
        if not self.should_exit:
            # In the event loop, because a signal can interrupt any instruction, including those of the logging or the request queue.
            asyncio.get_running_loop().call_soon_threadsafe(self._begin_shutdown)
        super().handle_exit(sig, frame)

    def _begin_shutdown(self) -> None:
        logger.info("stopping: requests in progress are completed, new ones are refused")
        self._on_stop()


def listen(settings: Settings) -> list[socket.socket]:
    """Return sockets that listen on HOST:PORT. Call it before loading anything, so that a port in use is reported at once.

    `localhost` means both loopback addresses, 127.0.0.1 and ::1, whatever the system's resolver returns first. 0.0.0.0 includes ::1, because
    some clients try only the first address of `localhost`. Where IPv6 is off, ::1 is left out.

    Raises:
        SettingsError: HOST or PORT cannot be used; says which program has the port, if that is known.
    """
    bound: list[socket.socket] = []
    try:
        for family, (host, _, *scope) in _addresses(settings):
            port = bound[0].getsockname()[1] if bound else settings.port
            if host in _WILDCARDS:
                _check_loopback(settings, port)
            with contextlib.suppress(_NoIPv6Error) if bound else contextlib.nullcontext():
                bound.append(_bind(settings, family, (host, port, *scope)))
        for each in bound:
            each.listen(_BACKLOG)
    except BaseException:
        for each in bound:
            each.close()
        raise
    return bound


class _NoIPv6Error(SettingsError):
    """This machine has no IPv6."""


def _addresses(settings: Settings) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    """Return the addresses that HOST means, as `socket.bind` takes them."""
    loopback = (socket.AF_INET6, ("::1", settings.port))
    if settings.host == "localhost":
        return [(socket.AF_INET, ("127.0.0.1", settings.port)), loopback]
    if settings.host == "0.0.0.0":  # noqa: S104 - a comparison
        return [(socket.AF_INET, (settings.host, settings.port)), loopback]
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise SettingsError(f"HOST={settings.host!r} cannot be used: it is neither an address nor a name of this machine.") from None
    return [(family, address)]


def _check_loopback(settings: Settings, port: int) -> None:
    """Raise SettingsError if another program has the port on a loopback address only.

    macOS binds 0.0.0.0:PORT beside a program that listens on 127.0.0.1:PORT (read in XNU's in_pcbbind): requests to 127.0.0.1 would then
    reach the other program. The same address twice is refused everywhere, so this binds the loopback address for a moment.
    """
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with contextlib.suppress(_NoIPv6Error):
            _bind(settings, family, (host, port)).close()


def _bind(settings: Settings, family: socket.AddressFamily, address: tuple[Any, ...]) -> socket.socket:
    """Return a socket bound to an address.

    Raises:
        _NoIPv6Error: The address is an IPv6 address that this machine does not have.
        SettingsError: The address cannot be used.
    """
    try:
        # asyncio turns Nagle's algorithm off only for sockets whose protocol is TCP by name. With it, every answer on a kept connection
        # waits for the client's delayed acknowledgement (measured on Linux: 47 ms instead of 5 ms for a small one).
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise _NoIPv6Error(_bind_failure(settings, error)) from None
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if address[0] == "::1":
        bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        kind = _NoIPv6Error if address[0] == "::1" and error.errno == errno.EADDRNOTAVAIL else SettingsError
        raise kind(_bind_failure(settings, error)) from None
    return bound


@contextlib.contextmanager
def pid_file(cache_dir: Path, port: int) -> Iterator[None]:
    """Keep `cache_dir`/server.pid while the server runs. Replaces the file of a killed server; logs a warning if it cannot be written."""
    path = cache_dir / "server.pid"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps({"pid": os.getpid(), "port": port}).encode())
    except OSError as error:
        logger.warning("no PID file: CACHE_DIR cannot be written (%s)", error.strerror or type(error).__name__)
    try:
        yield
    finally:
        if _running_server(cache_dir).get("pid") == os.getpid():
            with contextlib.suppress(OSError):
                path.unlink()


def serve(app: ASGIApp, settings: Settings, bound: list[socket.socket], on_stop: Callable[[], None]) -> None:
    """Serve until a signal ends the process.

    Args:
        app: The application.
        settings: SHUTDOWN_TIMEOUT limits how long requests in progress may take after the signal.
        bound: The sockets from `listen`.
        on_stop: Called in the event loop when the shutdown begins.
    """
    open_files = _raise_open_file_limit()

    class Protocol(GuardedProtocol):
        """Has its own list of idle connections, so that two servers in one process do not share it."""

        limit = open_files // 2
        idle: ClassVar[OrderedDict[GuardedProtocol, None]] = OrderedDict()

    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.shutdown_timeout),
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        http=Protocol,
        backlog=max(1, min(512, open_files // 8)),
        ws="none",
    )
    with pid_file(settings.cache_dir, bound[0].getsockname()[1]):
        _Server(config, on_stop).run(sockets=bound)


def _raise_open_file_limit() -> int:
    """Raise the process's limit of open files as far as allowed, and return it.

    Half of it is for connections and an eighth for the backlog, which is accepted before the limit of connections is checked; the rest
    is for ffmpeg's pipes, files and logs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return 1 << 16 if soft == resource.RLIM_INFINITY else soft


def _bind_failure(settings: Settings, error: OSError) -> str:
    """Return the message for a socket that could not be bound."""
    place = f"PORT={settings.port}"
    if isinstance(error, PermissionError):
        return f"{place} cannot be used: ports below 1024 need root. Choose another one, for example 8880."
    running = _running_server(settings.cache_dir)
    if running.get("port") == settings.port:
        return f"{place} is in use: sesame-tts is already running there (process {running['pid']})."
    if error.strerror and "in use" in error.strerror:
        return f"{place} is in use by another program (`lsof -i :{settings.port}` shows which). Choose another port."
    return f"HOST={settings.host} {place} cannot be used: {error.strerror}."


def _running_server(cache_dir: Path) -> dict[str, int]:
    """Return the content of the PID file (`pid`, `port`) if that process is alive, else an empty dict."""
    try:
        content = dict(json.loads((cache_dir / "server.pid").read_text()))
        with contextlib.suppress(PermissionError):  # another user's process
            os.kill(content["pid"], 0)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return {}
    return content
