"""Middleware and checks for every HTTP request: request id, log line, Host, API key, body size, client disconnect."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
import socket
import time
import uuid
from collections import Counter
from collections.abc import Awaitable
from functools import lru_cache
from typing import Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from config import Settings
from errors import (
    AuthenticationError,
    BodyTooLargeError,
    ForbiddenError,
    HostNotAllowedError,
    InternalError,
    InvalidRequestError,
    ShuttingDownError,
    TTSError,
    UnreadAudioError,
    UnsupportedMediaTypeError,
    lacks_memory,
    no_memory,
    shorten,
)
from schemas import MAX_BODY_BYTES

logger = logging.getLogger("sesame_tts.request")

T = TypeVar("T")

CLIENT_CLOSED = 499
"""Nginx's status for a client that disconnected before the answer. Only the log shows it."""

DOCS_FILES = "/docs-files"
"""Path of the files that `/docs` loads."""

# A recording has at most 10 MiB; 1 MiB more is enough for the form's other fields and boundaries.
_MAX_UPLOAD_BYTES = 11 << 20
_UPLOAD_PATHS = re.compile(r"(?:/v1)?/audio/(?:voices|conversations/[^/]+/turns)")

_UNEXPECTED = "Unexpected server error. The server's log has the details under this request's id."
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LOGGED_METHOD_CHARACTERS = 16  # a client can send a method of 64 KiB
_ABSOLUTE_FORM = re.compile(r"https?://(?P<host>[^/?#]*)", re.IGNORECASE)
_SOCKET_OPENED, _SOCKET_FAILED = 101, 1011  # the status of a WebSocket's handshake, and the code that closes one after an unexpected error
_STARTS = ("http.response.start", "websocket.http.response.start", "websocket.accept")
_QUIET_PATHS = ("/health", "/health/ready", "/metrics")
_OPEN_PATHS = ("/", "/health", "/health/ready", "/docs", "/openapi.json", "/favicon.ico", "/docs/oauth2-redirect")
_OPEN_PREFIXES = ("/playground/", f"{DOCS_FILES}/")
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".home.arpa", ".lan")


def error_response(error: TTSError) -> JSONResponse:
    """Return an error as a response with OpenAI's error envelope. `RequestLog` finds the error in the scope's state."""
    return _ErrorResponse(error)


class _ErrorResponse(JSONResponse):
    def __init__(self, error: TTSError) -> None:
        super().__init__(error.envelope(), error.status, headers=error.headers)
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["error"] = self._error
        await super().__call__(scope, receive, send)


class RequestLog:
    """The outermost middleware: sets `X-Request-Id`, logs one line after each answer, and turns unexpected exceptions into status 500.

    Routes add log fields to `scope["state"]["log_fields"]`. They are logged unchanged and must not contain a text or a key.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        scope = _with_plain_path(scope)
        state = scope.setdefault("state", {})
        state["request_id"], state["log_fields"] = request_id, {}
        status: dict[str, Any] = {"status": "aborted"}
        started = time.monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] in _STARTS:
                status["status"] = message.get("status", _SOCKET_OPENED)
                message.setdefault("headers", [])
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # SHUTDOWN_TIMEOUT has passed
            if status["status"] == "aborted":
                await error_response(ShuttingDownError())(scope, receive, send_with_id)
            raise
        except Exception as error:
            _log_failure(request_id, error)
            if status["status"] == _SOCKET_OPENED:
                await send({"type": "websocket.close", "code": _SOCKET_FAILED})
                return
            if status["status"] != "aborted":
                raise  # uvicorn then closes the connection, which is the only way to report an error after the response has started
            shown = no_memory() if lacks_memory(error) else InternalError(_UNEXPECTED)
            await error_response(shown)(scope, receive, send_with_id)
        finally:
            _log(scope, status["status"], time.monotonic() - started)


class AccessMiddleware:
    """Refuses requests with a foreign Host, a missing API key, or a body that is too large, before the body is read."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._keys = [key.get_secret_value().encode() for key in settings.api_key]
        self._allowed_hosts = {host.lower() for host in settings.allowed_hosts} | _own_names()
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit = _MAX_UPLOAD_BYTES if _UPLOAD_PATHS.fullmatch(scope["path"]) else MAX_BODY_BYTES
        try:
            _check_framing(headers)
            for host in (headers.get("host", ""), *scope["state"].get("target_hosts", ())):
                self._check_host(host)
            scope["state"]["authorized"] = self._has_key(headers)
            self._check_key(scope)
            if scope["type"] == "websocket":  # a browser sends no preflight for it
                _check_origin(HTTPConnection(scope), self._settings, "open a connection")
            _check_length(headers, limit)
            _check_encoding(headers)
        except TTSError as error:
            await error_response(error)(scope, receive, send)
            return
        if scope.get("method") == "HEAD":  # answered as GET; uvicorn, which has the original scope, leaves the body out
            scope = {**scope, "method": "GET"}
        await self._app(scope, _limited(receive, limit), send)

    def _check_host(self, host_header: str) -> None:
        """Refuse foreign host names: a web page whose own name resolves to 127.0.0.1 must not reach this server (DNS rebinding).

        Raises:
            HostNotAllowedError: The host is neither local nor in ALLOWED_HOSTS.
        """
        host = _host_of(host_header)
        if not _is_local(host) and host not in self._allowed_hosts:
            raise HostNotAllowedError(
                f"Host {shorten(host)} is not allowed. If it is a name of this server, set ALLOWED_HOSTS={shorten(host)[1:-1]}."
            )

    def _has_key(self, headers: Headers) -> bool:
        """Return whether the request has one of the API keys. Each key is compared in constant time."""
        if not self._keys:
            return False
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        return any([hmac.compare_digest(given.strip().encode(), key) for key in self._keys])  # noqa: C419 - a generator would stop at the first match

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"]
        if not self._keys or scope["state"]["authorized"] or scope.get("method") == "OPTIONS":
            return
        if path in _OPEN_PATHS or path.startswith(_OPEN_PREFIXES):
            return
        raise AuthenticationError("The API key is missing or wrong: send 'Authorization: Bearer <key>' with a key from this server's API_KEY.", headers={"WWW-Authenticate": "Bearer"})  # fmt: skip


class UnreadAudio:
    """Counts the audio that was generated but not yet read by its clients, in all and by address.

    Args:
        settings: MAX_UNREAD_MB and MAX_CLIENT_UNREAD_MB.
    """

    def __init__(self, settings: Settings) -> None:
        self._limit = settings.max_unread_mb * 1_000_000
        self._client_limit = settings.max_client_unread_mb * 1_000_000
        self._held: Counter[str] = Counter()

    def check(self, address: str, more: int = 0) -> None:
        """Check whether there is room for `more` bytes.

        Raises:
            UnreadAudioError: The limit for all clients or for this address would be exceeded.
        """
        if self._held[address] + more > self._client_limit or self._held.total() + more > self._limit:
            raise UnreadAudioError(
                "Too much audio is waiting to be read by its clients. Read the answers, or try again later.", headers={"Retry-After": "10"}
            )

    def add(self, address: str, count: int) -> None:
        """Add `count` bytes; negative once they were read, or their answer has ended."""
        self._held[address] += count
        if not self._held[address]:
            del self._held[address]


def client_address(connection: HTTPConnection) -> str:
    """Return the address of the client."""
    return connection.client.host if connection.client else ""


def require_owner(request: Request, settings: Settings) -> None:
    """Require the API key or a client on this machine, and refuse requests from web pages of other sites.

    Raises:
        ForbiddenError: The request may not change anything.
    """
    _check_origin(request, settings, "change anything")
    if is_owner(request):
        return
    raise ForbiddenError(
        "Requests from another machine need a key for this: set API_KEY on the server and send 'Authorization: Bearer <key>'."
    )


def _check_origin(connection: HTTPConnection, settings: Settings, action: str) -> None:
    """Refuse web pages of other sites.

    Raises:
        ForbiddenError: The page's origin is neither this server's nor in CORS_ORIGINS.
    """
    origin = connection.headers.get("origin")
    own_origin = f"{connection.url.scheme.replace('ws', 'http')}://{connection.headers.get('host', '')}"
    if origin and origin != own_origin and origin not in settings.cors_origins:
        raise ForbiddenError(f"Web pages at {shorten(origin)} may not {action}. Add the origin to CORS_ORIGINS to allow it.")


def is_owner(request: Request) -> bool:
    """Return whether the request has the API key or comes from this machine."""
    if request.state.authorized or request.client is None:
        return bool(request.state.authorized)
    return _is_loopback(request.client.host)


async def run_until_gone(work: Awaitable[T], receive: Receive) -> T:
    """Return the result of `work`; if the client disconnects first, cancel `work`.

    Asyncio tasks instead of an anyio task group: a cancelled anyio scope also cancels every `await` in the cleanup of `work`, which has to
    wait for the end of ffmpeg processes and threads, and a task group would wrap our errors in an ExceptionGroup.

    Raises:
        ClientDisconnect: The client disconnected.
    """
    working = asyncio.ensure_future(work)
    tasks = (working, asyncio.ensure_future(_disconnected(receive)))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return await working
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.exception()  # retrieved, or asyncio would log it as lost


def _log_failure(request_id: str, error: Exception) -> None:
    """Log a TTSError as one line, and any other exception with its traceback."""
    known = error if isinstance(error, TTSError) else error.__cause__  # Starlette wraps errors that are raised after the response's start
    if isinstance(known, TTSError):
        logger.error("id=%s failed after the response had started: %s", request_id, known.message)
    else:
        logger.error("id=%s failed unexpectedly", request_id, exc_info=error)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _log(scope: Scope, status: object, seconds: float) -> None:
    level = _log_level(scope["path"], status)
    if not logger.isEnabledFor(level):
        return
    state = scope["state"]
    method = scope.get("method", "WS")[:_LOGGED_METHOD_CHARACTERS]
    fields = {"id": state["request_id"], "method": method, "path": shorten(scope["path"]), "status": status}
    error: TTSError | None = state.get("error")
    fields |= state["log_fields"] | ({"code": error.code} if error else {}) | {"seconds": f"{seconds:.3f}"}
    line = " ".join(f"{name}={value}" for name, value in fields.items())
    logger.log(level, line, extra={"fields": fields | ({"reason": error.message} if error else {})})


def _log_level(path: str, status: object) -> int:
    """Return DEBUG for health checks and the files of pages, unless they fail."""
    asset = path.startswith(_OPEN_PREFIXES) and status in (200, 304)
    return logging.DEBUG if asset or (path in _QUIET_PATHS and status in (200, 503)) else logging.INFO


def _check_framing(headers: Headers) -> None:
    """Refuse a request with two length headers: a proxy in front may use the other one (request smuggling, RFC 9112, section 6.3).

    Raises:
        InvalidRequestError: Both headers are present. The connection is closed.
    """
    if "transfer-encoding" in headers and "content-length" in headers:
        message = "Content-Length and Transfer-Encoding are mutually exclusive."
        raise InvalidRequestError(message, code="invalid_http", headers={"Connection": "close"})


def _check_encoding(headers: Headers) -> None:
    """Refuse a compressed body: it would be read as broken JSON.

    Raises:
        UnsupportedMediaTypeError: The body has a content encoding.
    """
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaTypeError(f"Content-Encoding {shorten(encoding)} is not supported: send the body uncompressed.")


def _with_plain_path(scope: Scope) -> Scope:
    """Return the scope with a path that routes and checks read alike: without empty segments, and without an absolute form's host.

    A base URL that ends in a slash gives `//audio/speech`. The host of an absolute-form target (RFC 9112, section 3.2.2) is kept in the
    state, because it is checked like the Host header.
    """
    path = scope["path"]
    if absolute := _ABSOLUTE_FORM.match(path):
        scope.setdefault("state", {})["target_hosts"] = [absolute["host"]]
        path = path[absolute.end() :] or "/"
    return {**scope, "path": re.sub("/{2,}", "/", path) if "//" in path else path}


def _check_length(headers: Headers, limit: int) -> None:
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body is larger than {limit >> 20} MiB, the limit for this path.", headers={"Connection": "close"})


def _limited(receive: Receive, limit: int) -> Receive:
    """Wrap `receive` so that a chunked body is refused as soon as it exceeds the limit."""
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise _too_large(limit)
        return message

    return limited


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _host_of(header: str) -> str:
    """Return the host of a Host header without its port, in lower case."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.rpartition(":")[0].lower() if ":" in header else header.lower()


@lru_cache(maxsize=64)
def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback  # with HOST=:: a local IPv4 client is ::ffff:127.0.0.1


@lru_cache(maxsize=64)
def _is_local(host: str) -> bool:
    """Return whether public DNS cannot hold this host: IP addresses, single labels, and names reserved for private networks."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(_LOCAL_SUFFIXES)
    return True


def _own_names() -> set[str]:
    name = socket.gethostname().lower()
    return {name, f"{name}.local"}
