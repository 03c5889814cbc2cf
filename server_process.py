"""Run the server: listening socket, connection limits, PID file, graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import resource
import signal
import socket
import struct
import sys
import threading
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterator
from functools import partial
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, cast

import h11
import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from config import Settings, SettingsError
from errors import ConnectionsExhaustedError, InvalidRequestError, RequestTimeoutError, ShuttingDownError, TTSError
from files import read_regular_file, write_file

_BACKLOG = 2048
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_KEEP_ALIVE_SECONDS = 75  # longer than most connection pools keep a connection, so that the client closes it first
_MAX_HEAD_BYTES = 64 * 1024
_MAX_HEAD_LINES = 4096  # of a head that is not complete
_MAX_FRAMING_BYTES = 8 * 1024  # of chunk headers, beside one eighth of the body: a chunk costs some 20 µs, whatever it contains
_MAX_MESSAGE_BYTES = 64 * 1024  # of a WebSocket; the longest text, 4096 characters, takes 49 kB if each is escaped twice (\\ud83d\\ude00)
_SLICE_BYTES = 8 * 1024  # parsed at once
_SMALL_SLICE_BYTES = 1024  # of a head, and of a body in small chunks
_PIECE_BYTES = 64 * 1024  # sent at once
# After each system call, the event loop waits so long for the interpreter's lock while a model's thread computes. With Python's 5 ms, a few log
# lines and answers add up to 0.1 s (measured with `make bench-attacks`: the longest stall 112 ms, and 30 ms with this).
_SWITCH_SECONDS = 0.001
_STALLED_SECONDS = 2.0  # without reading; at the limit of connections such a client's connection is closed
_LINGER_SECONDS = 1.0
_LINGER_BYTES = 1 << 20
# The addresses from which X-Forwarded-For is accepted, the same that count as this machine. With HOST=:: a local proxy is ::ffff:127.0.0.1.
_LOCAL_ADDRESSES = ("127.0.0.0/8", "::1", "::ffff:127.0.0.0/104")
_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - compared with HOST
_MAX_PID_FILE_BYTES = 1024
_LISTENING_NUMBER = 1000  # file numbers of the listening sockets; each process that is started copies a table of this size
_MAX_OPEN_FILES = 10_240  # the most that macOS allows a process; launchd starts a process with 256

logger = logging.getLogger(__name__)


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with the limits that uvicorn 0.54.0 lacks.

    Without them, a client that sends one byte a second, or reads nothing, holds a connection and its answer forever; connections use up
    the file descriptors, and neither new clients nor ffmpeg get one; and one connection can keep the event loop busy.

    Attributes:
        head_seconds: Maximum time for a request's head, counted from the connection or from the head's first byte.
        body_seconds: Maximum time for a request's body. 10 MiB at 1 Mbit/s take 84 s.
        write_seconds: Maximum time in which a client reads nothing of what is sent to it.
        limit: Maximum number of connections. At the limit one that is idle is closed, else one whose client has stopped reading.
        client_limit: Maximum number of connections from one address.
        idle: Connections without a request in progress; the longest idle first.
        unread: Connections with bytes that their clients have not read.
        clients: Number of connections from each address.
    """

    head_seconds: ClassVar[float] = 20.0
    body_seconds: ClassVar[float] = 120.0
    write_seconds: ClassVar[float] = 120.0
    limit: ClassVar[int] = 5_000
    client_limit: ClassVar[int] = 5_000
    idle: ClassVar[OrderedDict[GuardedProtocol, None]] = OrderedDict()
    unread: ClassVar[set[GuardedProtocol]] = set()
    clients: ClassVar[Counter[str]] = Counter()

    _timeout: asyncio.TimerHandle | None = None
    _timeout_state: object = None  # the h11 state in which the timeout was started
    _held = b""  # received, but not parsed yet
    _payload = 0  # bytes of the current body
    _framing = 0  # bytes of its chunk headers
    _parse_later = False  # `_parse` will be called in the next round of the event loop
    _lingering: _LingeringTransport | None = None
    _socket: asyncio.Protocol | None = None  # the WebSocket's protocol, once the connection has become one
    _unread_bytes = 0
    _read_at = 0.0  # when the client has last read something
    _write_watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's own signature
        """Accept a connection; at a limit, close another one of little use, or refuse this one."""
        transport.set_write_buffer_limits(0)  # uvicorn then sends the next piece only when the system has taken the one before
        self._lingering = _LingeringTransport(transport, self)
        super().connection_made(cast(asyncio.Transport, self._lingering))
        self.app = cast(Any, partial(_send_in_pieces, self, self.app))
        self.clients[self._address] += 1
        if not self._make_room():
            self._refuse(ConnectionsExhaustedError("The server has too many connections. Try again later.", headers={"Retry-After": "10"}))
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection."""
        self.idle.pop(self, None)
        self.unread.discard(self)
        self.clients[self._address] -= 1
        if not self.clients[self._address]:
            del self.clients[self._address]
        self._held = b""
        self._cancel_timeout()
        self._cancel_write_watch()
        super().connection_lost(exc)
        if self._socket is not None:
            self._socket.connection_lost(exc)

    def become_socket(self, protocol: asyncio.Protocol) -> None:
        """Pass everything to `protocol` from now on, because the connection has become a WebSocket. It still counts, and its client must read."""
        self._socket = protocol
        self.idle.pop(self, None)
        self._cancel_timeout()

    @property
    def is_socket(self) -> bool:
        """Whether the connection has become a WebSocket."""
        return self._socket is not None

    def data_received(self, data: bytes) -> None:
        """Receive part of a request, or of a WebSocket's messages."""
        if self._lingering is not None and self._lingering.is_closing():
            self._lingering.drop(data)
            return
        if self._socket is not None:
            self._socket.data_received(data)
            return
        self._held += data
        if not self._parse_later:
            self._parse()

    def on_response_complete(self) -> None:
        """Prepare for the next request, which may have been received already."""
        super().on_response_complete()
        self._parse()

    def pause_writing(self) -> None:
        """Watch whether the client reads: called when the system does not take all bytes at once."""
        super().pause_writing()
        self._unread_bytes, self._read_at = self.transport.get_write_buffer_size(), self.loop.time()
        self.unread.add(self)
        self._watch_writing()
        if self._socket is not None:
            self._socket.pause_writing()

    def resume_writing(self) -> None:
        """Continue to send: called when the system has taken all bytes."""
        super().resume_writing()
        self.unread.discard(self)
        self._cancel_write_watch()
        if self._socket is not None:
            self._socket.resume_writing()

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
        """Close the connection at once; reset it if the client has not read everything, so that the system frees its buffers, too."""
        self.idle.pop(self, None)
        if self in self.unread:
            with contextlib.suppress(OSError):
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def linger(self) -> None:
        """Let the connection be closed before others: it only waits for the client to read a refusal."""
        self._held = b""
        self.idle[self] = None

    def unread_seconds(self) -> float:
        """Return for how long the client has read nothing of what is sent to it."""
        size = self.transport.get_write_buffer_size()
        if size < self._unread_bytes:
            self._read_at = self.loop.time()
        self._unread_bytes = size
        return self.loop.time() - self._read_at

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    def _make_room(self) -> bool:
        """Return whether this connection may stay, after closing another one at each limit that is exceeded."""
        if self.clients[self._address] > self.client_limit and not self._drop_one({self._address}):
            return False
        return len(self.connections) <= self.limit or self._drop_one(self.clients)

    def _drop_one(self, addresses: Container[str]) -> bool:
        """Close the connection from `addresses` that has been idle longest, else the one that has been unread longest."""
        victim = next((each for each in self.idle if each._address in addresses and each is not self), None)
        if victim is None:
            stalled = [(each.unread_seconds(), id(each), each) for each in self.unread if each._address in addresses]
            seconds, _, victim = max(stalled, default=(0.0, 0, self))
            if seconds < _STALLED_SECONDS:
                return False
        victim.drop()
        return True

    def _parse(self) -> None:
        """Parse what was received, in slices: the limits are checked between them, and a pipelined request waits its turn."""
        self._parse_later = False
        while self._held and not self._parse_later and not self.is_socket and not self.transport.is_closing():
            if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):  # an answer is in progress
                self.flow.pause_reading()
                break
            size = _SLICE_BYTES if self._payload > 8 * self._framing else _SMALL_SLICE_BYTES
            piece, self._held = self._held[:size], self._held[size:]
            self._parse_slice(piece)
            if 8 * self._framing > self._payload:  # small chunks take long: the rest in the next round of the event loop
                self._parse_later = True
                self.loop.call_soon(self._parse)
        self._watch()

    def _parse_slice(self, piece: bytes) -> None:
        in_body = self.conn.their_state is h11.SEND_BODY
        before = len(self.cycle.body) if in_body else 0
        super().data_received(piece)
        if self.is_socket:
            return
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0].count(b"\n") > _MAX_HEAD_LINES:
            self.send_400_response("")
        elif self.conn.their_state is not h11.SEND_BODY:
            self._payload = self._framing = 0
        elif in_body:
            payload = len(self.cycle.body) - before
            self._payload += payload
            self._framing += len(piece) - payload
            if self._framing > _MAX_FRAMING_BYTES + self._payload // 8:
                self._refuse(InvalidRequestError("The chunks of the body are too small. Send larger ones.", code="invalid_http"))

    def _watch(self) -> None:
        """Update the list of idle connections, and start or cancel the timeout for what the client has to send next."""
        if self.is_socket or self.transport.is_closing():
            self._cancel_timeout()
            return
        state = self.conn.their_state
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

    def _watch_writing(self) -> None:
        """Abort the connection once the client has read nothing for `write_seconds`: `close` would wait until it has read everything."""
        left = self.write_seconds - self.unread_seconds()
        if left > 0:
            self._write_watch = self.loop.call_later(min(left, self.write_seconds / 8), self._watch_writing)
        else:
            logger.info("closed a connection whose client read nothing for %g s", self.write_seconds)
            self.drop()

    def _cancel_write_watch(self) -> None:
        if self._write_watch is not None:
            self._write_watch.cancel()
            self._write_watch = None

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
        fields = {"status": error.status, "code": error.code, "reason": error.message}
        message = "id=%s status=%d code=%s refused before a complete request arrived"
        logger.info(message, request_id, error.status, error.code, extra={"fields": fields})
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        headers |= {"X-Request-Id": request_id} | error.headers
        response = h11.Response(status_code=error.status, headers=list(headers.items()), reason=HTTPStatus(error.status).phrase)
        events = (response, h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))


class _LingeringTransport:
    """A transport whose `close` waits a moment if the client is still sending, and drops what arrives without parsing it.

    Closing a socket that has unread data resets the connection, and the client may lose the answer (RFC 9112, section 9.6).
    """

    def __init__(self, transport: asyncio.Transport, protocol: GuardedProtocol) -> None:
        self._transport = transport
        self._protocol = protocol
        self._closing = False
        self._dropped = 0

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the transport has
        """Return everything else from the transport itself."""
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Return whether `close` or `abort` was called."""
        return self._closing or self._transport.is_closing()

    def set_protocol(self, protocol: asyncio.Protocol) -> None:
        """Give the connection to a WebSocket's protocol, behind the one that guards it."""
        self._protocol.become_socket(protocol)

    def close(self) -> None:
        """Close the connection, after at most a second if the client is still sending."""
        if self.is_closing():
            return
        self._closing = True
        if self._protocol.is_socket or self._protocol.conn.their_state is not h11.SEND_BODY:
            self._transport.close()
            return
        self._protocol.linger()
        with contextlib.suppress(OSError):  # the client has gone
            self._transport.write_eof()
        self._transport.resume_reading()
        self._protocol.loop.call_later(_LINGER_SECONDS, self._transport.close)

    def drop(self, data: bytes) -> None:
        """Ignore what the client still sends, up to a limit."""
        self._dropped += len(data)
        if self._dropped > _LINGER_BYTES:
            self._transport.close()


async def _send_all_but_last(message: Message, send: Send) -> Message:
    """Send a large body in pieces, and return the message with the last piece."""
    body = message["body"]
    last = (len(body) - 1) // _PIECE_BYTES * _PIECE_BYTES
    for start in range(0, last, _PIECE_BYTES):
        await send({"type": "http.response.body", "body": body[start : start + _PIECE_BYTES], "more_body": True})
        await asyncio.sleep(0)  # other requests get their turn even if this client reads as fast as we send
    return {**message, "body": body[last:]}


async def _send_in_pieces(protocol: GuardedProtocol, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run the application; pass on its response in pieces, and close the connection after it if the request's body has not arrived.

    asyncio copies what the system does not take into a buffer of its own; a piece bounds it. A body that nobody reads any more would have
    to be parsed to find the next request.
    """

    async def send_piece(message: Message) -> None:
        if message["type"] == "http.response.start":
            for _ in range(2):  # a small body that comes right after its head has arrived by then
                if protocol.conn.their_state is h11.SEND_BODY:
                    await asyncio.sleep(0)
            if protocol.conn.their_state is h11.SEND_BODY:
                MutableHeaders(scope=message)["Connection"] = "close"
        elif len(message.get("body", b"")) > _PIECE_BYTES:
            message = await _send_all_but_last(message, send)
        await send(message)

    await app(scope, receive, send_piece)


class _SocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's protocol for WebSockets; at the shutdown it leaves an open one to the application, which completes its speech and closes it."""

    def shutdown(self) -> None:
        """Close the connection only if it is not open."""
        self.close_timeout = _LINGER_SECONDS  # for the client to answer the close message
        if self.close_sent or not self.handshake_complete:
            super().shutdown()


class _Server(uvicorn.Server):
    """uvicorn's server, with a callback when the shutdown begins and exit status 0 after it.

    uvicorn raises the signal again after its shutdown, so the process ends as killed by a signal, which launchd treats as a crash.
    """

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT, SIGTERM and SIGHUP (its terminal was closed). A signal that was ignored at the start stays so, as `nohup` wants."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = [number for number in _STOP_SIGNALS if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
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
    """Keep `cache_dir`/server.pid while the server runs, and a lock on it, which the system releases however the process ends.

    Replaces the file of a killed server; logs a warning if it cannot be written.
    """
    path = cache_dir / "server.pid"
    lock = None
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps({"pid": os.getpid(), "port": port}).encode())
        lock = os.open(path, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        logger.warning("no PID file: CACHE_DIR cannot be written (%s)", error.strerror or type(error).__name__)
    try:
        yield
    finally:
        if _pid_file_content(path).get("pid") == os.getpid():
            with contextlib.suppress(OSError):
                path.unlink()
        if lock is not None:
            os.close(lock)


def protocol_for(settings: Settings, open_files: int) -> type[GuardedProtocol]:
    """Return the protocol with the limits of the settings and lists of its own, so that two servers in one process do not share them."""

    class Protocol(GuardedProtocol):
        write_seconds = settings.client_timeout
        limit = settings.max_connections or open_files // 2
        client_limit = settings.max_client_connections or limit - limit // 4
        idle: ClassVar[OrderedDict[GuardedProtocol, None]] = OrderedDict()
        unread: ClassVar[set[GuardedProtocol]] = set()
        clients: ClassVar[Counter[str]] = Counter()

    return Protocol


def serve(app: ASGIApp, settings: Settings, bound: list[socket.socket], on_stop: Callable[[], None]) -> None:
    """Serve until a signal ends the process.

    Args:
        app: The application.
        settings: SHUTDOWN_TIMEOUT limits how long requests in progress may take after the signal.
        bound: The sockets from `listen`.
        on_stop: Called in the event loop when the shutdown begins.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    open_files = _raise_open_file_limit()
    bound = [_with_high_number(each, open_files) for each in bound]
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.shutdown_timeout),
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        http=protocol_for(settings, open_files),
        forwarded_allow_ips=list(_LOCAL_ADDRESSES),
        backlog=max(1, min(512, open_files // 8)),
        ws=_SocketProtocol,
        ws_max_size=_MAX_MESSAGE_BYTES,
        ws_per_message_deflate=False,  # audio does not become smaller, and what a small message unpacks to has no bound
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


def _with_high_number(bound: socket.socket, open_files: int) -> socket.socket:
    """Return the socket under a file number above those of connections.

    The files of a killed process are closed one by one, the highest number first (measured on Linux). If its connections were closed before
    the listening socket, a proxy could connect again in between, and would lose its next request, too.
    """
    number = fcntl.fcntl(bound, fcntl.F_DUPFD_CLOEXEC, min(_LISTENING_NUMBER, open_files // 2))
    moved = socket.socket(bound.family, bound.type, bound.proto, fileno=number)
    bound.close()
    return moved


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
    """Return the content of the PID file (`pid`, `port`) if its server is running, else an empty dict.

    The number alone proves nothing: after a crash the system may have given it to another process.
    """
    path = cache_dir / "server.pid"
    content = _pid_file_content(path)
    return content if content and _is_locked(path) else {}


def _pid_file_content(path: Path) -> dict[str, int]:
    try:
        content = json.loads(read_regular_file(path, _MAX_PID_FILE_BYTES))
        return {name: int(content[name]) for name in ("pid", "port")}
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return {}


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
