"""The server process: sockets, connection limits, PID file, and orderly shutdown."""

from __future__ import annotations

import asyncio
import contextlib
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
from typing import ClassVar

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from config import Settings, SettingsError
from errors import ConnectionsExhaustedError, InvalidRequestError, RequestTimeoutError, ShuttingDownError, TTSError
from files import write_file

_WANTED_DESCRIPTORS = 10_240  # the most that macOS gives a process; launchd starts one with 256
_NOT_HTTP = "This is not a valid HTTP request."


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with the bounds that it lacks (0.54.0): a time for a request to arrive in, and room for new connections.

    Without the first, a client that sends one byte a second holds a connection for ever. Without the second, idle connections use up the
    file descriptors, and then neither a client nor ffmpeg gets one. Where all are taken, the one that has been idle longest makes room.

    Attributes:
        head_seconds: That the head of a request may take, from the connection or its own first byte.
        body_seconds: That its body may take: 10 MiB at 1 Mbit/s are 84 s.
        limit: Connections at a time.
        idle: Those in no request, the longest idle first.
    """

    head_seconds: ClassVar[float] = 20.0
    body_seconds: ClassVar[float] = 120.0
    limit: ClassVar[int] = 5_000
    idle: ClassVar[OrderedDict[GuardedProtocol, None]] = OrderedDict()

    _deadline: asyncio.TimerHandle | None = None
    _awaited: object = None  # h11's state in which the deadline was set

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Take a connection, at the cost of an idle one where there are too many."""
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
        """Forget it."""
        self.idle.pop(self, None)
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take some bytes of a request."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """A response has been sent; the next request may be there already."""
        super().on_response_complete()
        self._watch()

    def shutdown(self) -> None:
        """The server goes down: a request that has not arrived whole is not waited for."""
        if self.conn.their_state is h11.SEND_BODY:
            self._refuse(ShuttingDownError())
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Say, in the envelope of all other errors, that this was no HTTP."""
        self._refuse(InvalidRequestError(_NOT_HTTP, code="invalid_http"))

    def drop(self) -> None:
        """Close a connection that is in no request, at once."""
        self.idle.pop(self, None)
        self.transport.abort()

    def _watch(self) -> None:
        """Note whether it is idle, and set the deadline for what the client owes: a head, or the rest of a body."""
        state = h11.CLOSED if self.transport.is_closing() else self.conn.their_state
        if state is not h11.IDLE:
            self.idle.pop(self, None)
        elif self not in self.idle:
            self.idle[self] = None
        if state is h11.SEND_BODY:
            self._arm(state, self.body_seconds)
        elif state is h11.IDLE and (self.cycle is None or self.conn.trailing_data[0]):
            self._arm(state, self.head_seconds)
        else:
            self._disarm()

    def _arm(self, state: object, seconds: float) -> None:
        """Set the deadline unless it runs already: more bytes do not put it off."""
        if self._deadline is None or self._awaited is not state:
            self._disarm()
            self._awaited = state
            self._deadline = self.loop.call_later(seconds, self._too_slow, seconds)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self, seconds: float) -> None:
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self.transport.close()  # not a byte came: who opens connections in advance, as browsers do, expects no answer
        else:
            self._refuse(RequestTimeoutError(f"The request did not arrive within {seconds:g} s."))

    def _refuse(self, error: TTSError) -> None:
        """Answer, where no answer has begun, and close. What the application still does for the request is told that the client went."""
        self._disarm()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.envelope()).encode()
            request_id = uuid.uuid4().hex
            logger.info("id=%s status=%d code=%s before any request was understood", request_id, error.status, error.code)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
            headers |= {"X-Request-Id": request_id} | error.headers
            response = h11.Response(status_code=error.status, headers=list(headers.items()), reason=HTTPStatus(error.status).phrase)
            events = (response, h11.Data(data=body), h11.EndOfMessage())
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # now: the application may answer before the transport says that it is closed
            self.cycle.message_event.set()
        self.transport.close()


def guarded_protocol() -> tuple[type[GuardedProtocol], int]:
    """The protocol for one server, and how many connections may wait to be taken.

    The process's limit of open files is raised as far as it may be. Half of it is for connections and an eighth for those that come in one
    moment, before the bound is looked at; what remains is for ffmpeg's pipes, files and logs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    descriptors = 1 << 16 if soft == resource.RLIM_INFINITY else soft

    class Protocol(GuardedProtocol):
        """With a count of its own, so that two servers in one process do not meet."""

        limit = descriptors // 2
        idle: ClassVar[OrderedDict[GuardedProtocol, None]] = OrderedDict()

    return Protocol, max(1, min(512, descriptors // 8))


logger = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 75  # longer than most clients' pools keep a connection, so that the server is not the one that closes it
_LARGEST_HEAD_BYTES = 64 * 1024


def listen(settings: Settings) -> socket.socket:
    """A socket bound to HOST:PORT. Bound before anything is loaded, so that a taken port is told within a moment.

    Raises:
        SettingsError: Says who holds the port, as far as that can be known.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise SettingsError(f"HOST={settings.host!r} cannot be used: it is neither an address nor a name of this machine.") from None
    # The protocol by name: asyncio queue Nagle's algorithm off only where it says TCP. Without that every answer on a kept connection
    # waits for the client's delayed acknowledgement (measured on Linux: 47 ms instead of 5 for a small one).
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise SettingsError(_why_not_bound(settings, error)) from None
    bound.listen(_BACKLOG)
    return bound


def _why_not_bound(settings: Settings, error: OSError) -> str:
    place = f"PORT={settings.port}"
    if isinstance(error, PermissionError):
        return f"{place} cannot be used: ports below 1024 need root. Choose another, 8880 for example."
    holder = _running_server(settings.cache_dir)
    if holder and holder.get("port") == settings.port:
        return f"{place} is taken: sesame-tts is already running there (process {holder['pid']})."
    if error.strerror and "in use" in error.strerror:
        return f"{place} is taken by another program (`lsof -i :{settings.port}` shows which). Choose another port."
    return f"HOST={settings.host} {place} cannot be used: {error.strerror}."


def _running_server(cache_dir: Path) -> dict[str, int] | None:
    """What the PID file says, if the process it names is alive."""
    try:
        holder = json.loads((cache_dir / "server.pid").read_text())
        os.kill(holder["pid"], 0)
    except PermissionError:
        return dict(holder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(holder)


@contextlib.contextmanager
def pid_file(cache_dir: Path, port: int) -> Iterator[None]:
    """`cache_dir`/server.pid while the server runs. A file left by a killed server is replaced; a folder that cannot be written is told."""
    path = cache_dir / "server.pid"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps({"pid": os.getpid(), "port": port}).encode())
    except OSError as error:
        logger.warning("no PID file: CACHE_DIR cannot be written (%s)", error.strerror or type(error).__name__)
    try:
        yield
    finally:
        holder = _running_server(cache_dir)
        if holder and holder.get("pid") == os.getpid():
            with contextlib.suppress(OSError):
                path.unlink()


class _Server(uvicorn.Server):
    """uvicorn, with an orderly end: told when the end begins, and exit status 0 after it.

    uvicorn raises the signal again when it is done, so that the shell sees a killed process; launchd would take that for a crash.
    """

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the two signals that end a service."""
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
        """The first signal begins an orderly end, a second Ctrl-C cuts it short."""
        if not self.should_exit:
            # Not here: a signal comes between any two instructions, of the logging or of the queue too.
            asyncio.get_running_loop().call_soon_threadsafe(self._begin_end)
        super().handle_exit(sig, frame)

    def _begin_end(self) -> None:
        logger.info("stopping: no new work, what is being spoken is finished first")
        self._on_stop()


def serve(app: ASGIApp, settings: Settings, bound: socket.socket, on_stop: Callable[[], None]) -> None:
    """Serve until a signal ends it.

    Args:
        app: The application.
        settings: SHUTDOWN_TIMEOUT bounds how long requests in progress may take to finish.
        bound: From `listen`.
        on_stop: Called in the event loop when the end begins.
    """
    protocol, backlog = guarded_protocol()
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.shutdown_timeout),
        h11_max_incomplete_event_size=_LARGEST_HEAD_BYTES,
        http=protocol,
        backlog=backlog,
        ws="none",
    )
    with pid_file(settings.cache_dir, bound.getsockname()[1]):
        _Server(config, on_stop).run(sockets=[bound])
