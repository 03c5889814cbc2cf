"""What every HTTP request passes through: its id and log line, the check of its Host, its size, and its key."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
import socket
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
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
    shorten,
)
from schemas import MAX_BODY_BYTES

logger = logging.getLogger("sesame_tts.request")

# A recording is 10 MiB at most; its form's other fields and boundaries fit into one more.
MAX_UPLOAD_BYTES = 11 << 20
_UPLOAD_PATHS = ("/v1/audio/voices", "/audio/voices")

_UNFORESEEN = "The server failed in an unforeseen way. Its log has the details, under this request's id."
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LONGEST_METHOD = 16  # of those there are; a made-up one may have 64 KiB
_QUIET_PATHS = ("/health", "/health/ready", "/metrics")
_OPEN_PATHS = ("/", "/health", "/health/ready", "/docs", "/openapi.json", "/favicon.ico", "/docs/oauth2-redirect")
DOCS_FILES = "/docs-files"
_OPEN_PREFIXES = ("/playground/", f"{DOCS_FILES}/")
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".home.arpa", ".lan")


def error_response(error: TTSError) -> JSONResponse:
    """The envelope of an error, as a response."""
    return JSONResponse(error.envelope(), error.status, headers=error.headers)


class RequestLog:
    """Outermost: gives each request an id, answers with it, and logs one line when the answer is over.

    The route adds its own facts to `scope["state"]["log_fields"]`; they come into the line as they are. Never the text, never a key.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        state = scope.setdefault("state", {})
        state["request_id"], state["log_fields"] = request_id, {}
        status: dict[str, Any] = {"status": "aborted"}
        started = time.monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                status["status"] = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # SHUTDOWN_TIMEOUT has passed
            if status["status"] == "aborted":
                await error_response(ShuttingDownError("The server went down before this was done. Try again in a moment.", headers={"Retry-After": "10"}))(scope, receive, send_with_id)  # fmt: skip
            raise
        except Exception as error:
            _log_failure(request_id, error)
            if status["status"] != "aborted":
                raise  # the only way to break off a response that has begun; uvicorn then closes the connection
            await error_response(InternalError(_UNFORESEEN))(scope, receive, send_with_id)
        finally:
            _log(scope, status["status"], time.monotonic() - started)


def _log_failure(request_id: str, error: Exception) -> None:
    """A failure that was foreseen is one line, any other a traceback; both under the request's id."""
    foreseen = error if isinstance(error, TTSError) else error.__cause__  # Starlette wraps an error that came after the response's start
    if isinstance(foreseen, TTSError):
        logger.error("id=%s broken off: %s", request_id, foreseen.message)
    else:
        logger.error("id=%s failed in an unforeseen way", request_id, exc_info=error)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _log(scope: Scope, status: object, seconds: float) -> None:
    state = scope["state"]
    facts = {"id": state["request_id"], "method": scope["method"][:_LONGEST_METHOD], "path": shorten(scope["path"]), "status": status}
    facts |= state["log_fields"] | {"seconds": f"{seconds:.3f}"}
    level = logging.DEBUG if scope["path"] in _QUIET_PATHS and status in (200, 503) else logging.INFO
    logger.log(level, " ".join(f"{name}={value}" for name, value in facts.items()))


class AccessMiddleware:
    """Refuses, before anything is read: a foreign Host, a missing key, a body that is too large."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._keys = [key.get_secret_value().encode() for key in settings.api_key]
        self._allowed_hosts = {host.lower() for host in settings.allowed_hosts} | _own_names()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit = MAX_UPLOAD_BYTES if scope["path"] in _UPLOAD_PATHS else MAX_BODY_BYTES
        try:
            _check_framing(headers)
            self._check_host(headers.get("host", ""))
            scope["state"]["authorized"] = self._has_key(headers)
            self._check_key(scope)
            _check_length(headers, limit)
        except TTSError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, _limited(receive, limit), send)

    def _check_host(self, host_header: str) -> None:
        """A web page of another site that resolves its own name to 127.0.0.1 must not reach this server (DNS rebinding).

        Raises:
            HostNotAllowedError: Names the setting that allows it.
        """
        host = _host_of(host_header)
        if not _is_local(host) and host not in self._allowed_hosts:
            raise HostNotAllowedError(
                f"This server does not answer for the host {shorten(host)}. If that is its name, add it: ALLOWED_HOSTS={shorten(host)[1:-1]}."
            )

    def _has_key(self, headers: Headers) -> bool:
        """Whether the request carries a key of ours; compared in constant time, against every key."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        return any([hmac.compare_digest(given.strip().encode(), key) for key in self._keys])  # noqa: C419 - all are compared, always

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"]
        if not self._keys or scope["state"]["authorized"] or scope["method"] == "OPTIONS":
            return
        if path in _OPEN_PATHS or path.startswith(_OPEN_PREFIXES):
            return
        raise AuthenticationError("The API key is missing or wrong: send 'Authorization: Bearer <key>' with a key from this server's API_KEY.", headers={"WWW-Authenticate": "Bearer"})  # fmt: skip


def require_owner(request: Request, settings: Settings) -> None:
    """Let only the owner change things: from this machine, or from another with the key, and never from a foreign web page.

    Raises:
        ForbiddenError: Says what is needed.
    """
    origin = request.headers.get("origin")
    own_origin = f"{request.url.scheme}://{request.headers.get('host', '')}"
    if origin and origin != own_origin and origin not in settings.cors_origins:
        raise ForbiddenError(f"The web page at {shorten(origin)} may not change anything here. CORS_ORIGINS lists the pages that may.")
    if is_owner(request):
        return
    raise ForbiddenError("From another machine this needs a key: set API_KEY on the server and send 'Authorization: Bearer <key>'.")


def is_owner(request: Request) -> bool:
    """Whether the request has the key, or comes from this machine."""
    if request.state.authorized or request.client is None:
        return bool(request.state.authorized)
    try:
        address = ipaddress.ip_address(request.client.host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback  # with HOST=:: an IPv4 client is ::ffff:127.0.0.1


def _check_framing(headers: Headers) -> None:
    """Refuse a request that tells its length in two ways: a proxy in front may believe the other one (RFC 9112, section 6.3).

    Raises:
        InvalidRequestError: The connection is closed after it.
    """
    if "transfer-encoding" in headers and "content-length" in headers:
        message = "Content-Length and Transfer-Encoding cannot both be there."
        raise InvalidRequestError(message, code="invalid_http", headers={"Connection": "close"})


def _check_length(headers: Headers, limit: int) -> None:
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body is larger than {limit >> 20} MiB, the most that is read here.", headers={"Connection": "close"})


def _limited(receive: Receive, limit: int) -> Receive:
    """`receive` that refuses a chunked body as soon as it grows past the limit."""
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise _too_large(limit)
        return message

    return limited


def _host_of(header: str) -> str:
    """The host of a Host header, without its port, in lower case."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.rpartition(":")[0].lower() if ":" in header else header.lower()


def _is_local(host: str) -> bool:
    """Hosts that no public DNS can point here: addresses, single labels, and the names kept for private networks."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(_LOCAL_SUFFIXES)
    return True


def _own_names() -> set[str]:
    name = socket.gethostname().lower()
    return {name, f"{name}.local"}
