"""Run the server: create the application from its routers, middleware, page and error handlers, and serve it."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import logging
import mimetypes
import os
import resource
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, cast

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Mount, NoMatchFound
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from client_routes import router as client_routes
from config import PROJECT_DIR, VERSION, Settings, SettingsError, load_settings
from conversation_routes import Conversations
from conversation_routes import router as conversation_routes
from errors import InvalidRequestError, MethodNotAllowedError, NotFoundError, TTSError, shorten
from ffmpeg import clean_temporary_files, ffmpeg_version, find_ffmpeg, watch_children_without_threads
from http_middleware import CLIENT_CLOSED, DOCS_FILES, AccessMiddleware, RequestLog, error_response, is_owner, require_owner
from model_host import started_threads
from monitoring import LOG_FILE, Facts, Metrics, Terminal, Voices, configure_logging, on_terminal
from schemas import (
    COMMON_REFUSALS,
    Health,
    Readiness,
    Reloaded,
    complete_document,
    explain,
    refusals,
)
from server_process import listen, serve
from speech_routes import SpeechService
from speech_routes import router as speech_routes
from speech_socket import router as socket_routes
from tts_engine import TTSEngine
from voice_presets import VoicePresetManager
from voice_routes import VoiceEndpoint, fresh_voices
from voice_routes import router as voice_routes
from voice_store import VoiceStore

logger = logging.getLogger(__name__)

# Threads for short blocking calls, such as reading small files. Each thread permanently keeps memory (its malloc arena; the sixth thread
# added 9 MB, measured). asyncio's default is four threads more than there are cores.
_HELPER_THREADS = 4

_BEARER = Depends(HTTPBearer(auto_error=False, description="One of the keys in API_KEY, if it is set."))
_PAGE_DIR = PROJECT_DIR / "playground"
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self' blob:; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_MORE_TYPES = {".webmanifest": "application/manifest+json", ".js": "text/javascript"}  # unknown, or another by a system's own table
_PAGE_HEADERS = {
    "Content-Security-Policy": _PAGE_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Server:
    """The objects that all requests share."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = VoiceStore(*settings.voice_folders)
        self.presets = VoicePresetManager(settings.presets_dir, settings.default_voice, self.store)
        self.engine = TTSEngine(settings, self.presets)
        self.metrics = Metrics(self.engine.hosts)
        self.conversations = Conversations(settings)
        self.speech = SpeechService(settings, self.presets, self.engine, self.metrics, self.conversations)
        self.voices = VoiceEndpoint(settings, self.presets, self.store, self.engine)
        self._started = time.monotonic()

    def drain(self) -> None:
        """Refuse new requests and those in the queues; requests in progress continue."""
        self.engine.drain()
        self.speech.drain()
        self.voices.drain()

    def default_ready(self) -> bool:
        """Return whether the default voice can speak."""
        default = self.presets.catalog.default
        return default is not None and self.engine.ready(default)

    def fallback(self) -> dict[str, str] | None:
        """Return which voice speaks for the default voice while that is not ready."""
        default = self.presets.catalog.default
        if default is None or self.engine.ready(default):
            return None
        speaker = self.engine.fallback(named=False)
        return {"voice": speaker.name, "replaces": default.name} if speaker else None

    def voices_now(self) -> Voices:
        """Return which voice speaks now and the states of the models, for the terminal."""
        speaker = self.settings.default_voice if self.default_ready() else fallback["voice"] if (fallback := self.fallback()) else None
        return Voices(self.settings.default_voice, speaker, {name: host.info() for name, host in self.engine.hosts.items()})

    def setting_faults(self) -> list[str]:
        """Return a message for each setting with an unknown voice. The server runs nevertheless: its preset may be added later."""
        fallback = self.settings.fallback_voice if self.settings.fallback_allowed else ""
        named = {"DEFAULT_VOICE": self.settings.default_voice, "FALLBACK_VOICE": fallback}
        return [
            f"{setting}={shorten(voice)} is not a voice. Available voices: {', '.join(self.presets.catalog.names())}."
            for setting, voice in named.items()
            if voice and not self.presets.catalog.knows(voice)
        ]

    def status(self) -> Literal["ok", "loading", "degraded"]:
        """Return `degraded` after a failure, `loading` while a model is loading, else `ok`."""
        states = {host.state for host in self.engine.hosts.values()}
        if "failed" in states or find_ffmpeg() is None or self.setting_faults():
            return "degraded"
        if "loading" in states:
            return "loading"
        return "ok" if self.default_ready() else "degraded"

    def health(self, *, to_owner: bool) -> dict[str, Any]:
        """Return what `Health` describes, and for the owner `ffmpeg_path`: neither it nor its field's name is shown to others.

        A dictionary, because it is asked for often, and to make and to check the objects of the schema would take most of its time.
        """
        models = {name: host.info() for name, host in self.engine.hosts.items()}
        csm, catalog, ffmpeg = models["csm-1b"], self.presets.catalog, find_ffmpeg()
        queues = [host.queue for host in self.engine.hosts.values()]
        return {
            "status": self.status(),
            "model": {
                "id": self.settings.model_id,
                "loaded": csm["loaded"],
                "sample_rate": csm["sample_rate"],
                "peak_memory_gb": csm.get("peak_memory_gb"),
                "error": csm["error"],
            },
            "models": models,
            "ffmpeg": ffmpeg is not None,
            "ffmpeg_version": ffmpeg_version(),
            "voices": catalog.names(),
            "default_voice": self.settings.default_voice,
            "fallback": self.fallback(),
            "max_input_length": self.settings.max_input_length,
            "skipped_presets": [asdict(skipped) for skipped in catalog.skipped],
            "queue": {
                "active": sum(queue.active for queue in queues),
                "waiting": sum(queue.waiting for queue in queues),
                "limit": self.settings.max_queue,
            },
            "setting_faults": self.setting_faults(),
            "peak_resident_gb": _peak_resident_gb(),
            "uptime_seconds": round(time.monotonic() - self._started, 3),
            "version": VERSION,
        } | ({"ffmpeg_path": ffmpeg} if to_owner else {})


async def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


CurrentServer = Annotated[Server, Depends(_server)]


# The middleware `_StatusFirst` calls these; FastAPI documents them and refuses other methods.
status_routes = APIRouter(tags=["service"], responses=COMMON_REFUSALS)
_KEY_ACCEPTED: dict[str, Any] = {"security": [{"HTTPBearer": []}]}


@status_routes.get(
    "/health", operation_id="getHealth", summary="Get the server's state", response_model=Health, openapi_extra=_KEY_ACCEPTED
)
async def health(request: Request) -> Response:
    """Return the state of models, queue, ffmpeg and voices. If API_KEY is set, requests without the key get `status` only."""
    server = await _server(request)
    await fresh_voices(request)
    stranger = server.settings.api_key and not request.state.authorized
    state = {"status": server.status()} if stranger else server.health(to_owner=is_owner(request))
    return Response(to_json(state), media_type="application/json")  # a fifth of the time that JSONResponse takes


@status_routes.get(
    "/health/ready",
    operation_id="getReadiness",
    summary="Check whether the default voice is ready",
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "The default voice is not ready"}},
    openapi_extra=_KEY_ACCEPTED,
)
async def ready(request: Request) -> JSONResponse:
    """Return 200 if the default voice can speak, else 503."""
    server = await _server(request)
    await fresh_voices(request)
    is_ready = server.default_ready()
    return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)


class _StatusFirst:
    """The innermost middleware: answers `/health` and `/health/ready` itself.

    Nothing is requested as often, and FastAPI's routing, dependencies and validation would take most of the time of such a request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._endpoints = {route.path: route.endpoint for route in status_routes.routes if isinstance(route, APIRoute)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        endpoint = self._endpoints.get(scope.get("path", "")) if scope.get("method") == "GET" else None
        if endpoint is None:
            await self._app(scope, receive, send)
        else:
            response = await endpoint(Request(scope, receive))
            await response(scope, receive, send)


service_routes = APIRouter(tags=["service"])


@service_routes.get(
    "/metrics",
    operation_id="getMetrics",
    summary="Get metrics for Prometheus",
    response_class=Response,  # PlainTextResponse would document the errors as plain text, too
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def get_metrics(server: CurrentServer) -> Response:
    """Return the queue, generation and first audio times, real-time factors and outcomes of speech requests."""
    return Response(server.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


@service_routes.post(
    "/admin/reload", operation_id="reloadModels", summary="Reload failed models", response_model=Reloaded, responses=refusals(403)
)
async def reload(request: Request, server: CurrentServer) -> dict[str, Any]:
    """Load models that failed to load again, without waiting for the next retry. Allowed from this machine, or with the key."""
    require_owner(request, server.settings)
    server.engine.reload()
    return {"models": {name: host.state for name, host in server.engine.hosts.items()}}


def create_app(settings: Settings, terminal: Terminal | None = None) -> FastAPI:
    """Create the application. Its models start to load on startup; `terminal` shows how."""
    server = Server(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(started_threads(_HELPER_THREADS, "helper"))
        watch_children_without_threads()
        await asyncio.to_thread(_prepare, app, server)
        await server.engine.start()
        watching = asyncio.create_task(terminal.watch(server.voices_now)) if terminal else None
        yield
        if watching:
            watching.cancel()
        await server.engine.close()

    app = FastAPIOffline(
        title="Sesame TTS",
        version=VERSION,
        lifespan=lifespan,
        redoc_url=None,
        openapi_tags=[{"name": name} for name in ("speech", "voices", "conversations", "service")],
        swagger_ui_parameters={"tryItOutEnabled": True, "defaultModelsExpandDepth": 0, "displayRequestDuration": True},
        static_url=DOCS_FILES,
        description="OpenAI's speech API on your own machine.",
    )
    app.state.server = server
    complete_document(app, keyed=bool(settings.api_key))
    _include_routers(app)
    _serve_docs(app)
    if settings.playground:
        _serve_page(app)
    _add_error_handlers(app, server)
    _add_middleware(app, settings)
    return app


def _add_middleware(app: FastAPI, settings: Settings) -> None:
    """Add the middleware, the innermost first."""
    app.add_middleware(_StatusFirst)
    app.add_middleware(AccessMiddleware, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
            allow_private_network=True,
        )
    app.add_middleware(RequestLog)


def _include_routers(app: FastAPI) -> None:
    """Add the API. Only its routes refresh the voices: the page's files do not need them."""
    shared: dict[str, Any] = {"dependencies": [Depends(fresh_voices), _BEARER], "responses": COMMON_REFUSALS}
    app.include_router(status_routes)
    app.include_router(speech_routes, prefix="/v1", **shared)
    app.include_router(service_routes, **shared)
    app.include_router(voice_routes, prefix="/v1", **shared)
    app.include_router(conversation_routes, prefix="/v1", **shared)
    app.include_router(client_routes, prefix="/v1", **shared)
    for router in (speech_routes, voice_routes, conversation_routes, client_routes):
        app.include_router(router, **shared, include_in_schema=False)
    for prefix in ("/v1", ""):
        app.include_router(socket_routes, prefix=prefix)


def _prepare(app: FastAPI, server: Server) -> None:
    """Do slow work that would otherwise delay the first requests: build the routes, clean folders, find ffmpeg, read the voices."""
    with suppress(NoMatchFound):
        app.url_path_for("")  # FastAPI builds what it needs of an included router when it first looks for a route there
    clean_temporary_files()
    server.store.clean()
    find_ffmpeg()
    ffmpeg_version()
    server.presets.refresh()
    for fault in server.setting_faults():
        logger.warning("%s", fault)


def _peak_resident_gb() -> float:
    """Return the peak resident memory of this process in GB (1e9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 3)  # macOS counts bytes, Linux KiB


class _File:
    """A file that is served from memory: a client that reads slowly holds no file descriptor."""

    def __init__(self, path: Path, headers: dict[str, str]) -> None:
        self._data = path.read_bytes()
        self._type = _MORE_TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        tag = hashlib.sha256(self._data).hexdigest()[:32]
        self._headers = headers | {"ETag": f'"{tag}"', "Vary": "Accept-Encoding"}
        self._zipped_headers = self._headers | {"ETag": f'"{tag}-gzip"', "Content-Encoding": "gzip"}

    @cached_property
    def _zipped(self) -> bytes:
        return gzip.compress(self._data, mtime=0)

    def answer(self, request: Request) -> Response:
        """Return the file, compressed for clients that accept it, or status 304 to a browser that has it."""
        zipped = "gzip" in request.headers.get("accept-encoding", "") and len(self._zipped) < len(self._data)
        headers = self._zipped_headers if zipped else self._headers
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=self._headers | {"ETag": headers["ETag"]})
        return Response(self._zipped if zipped else self._data, headers=headers, media_type=self._type)


def _serve_files(app: FastAPI, prefix: str, folder: Path, headers: dict[str, str]) -> dict[str, _File]:
    """Serve the files of a folder below `prefix`. The list of files is fixed, so that a request's path is never used as a file path."""
    files = {path.name: _File(path, headers) for path in sorted(folder.iterdir()) if path.is_file()}

    @app.api_route(f"{prefix}/{{name}}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        if name not in files:
            raise NotFoundError(f"File {shorten(name)} not found.")
        return files[name].answer(request)

    return files


def _serve_docs(app: FastAPI) -> None:
    """Serve the files of `/docs` from memory, in place of the library's route, which opens a file for each request."""
    mounted = next(route for route in app.router.routes if isinstance(route, Mount) and route.path == DOCS_FILES)
    app.router.routes.remove(mounted)
    folder = Path(cast(StaticFiles, mounted.app).all_directories[0])
    _serve_files(app, DOCS_FILES, folder, {"X-Content-Type-Options": "nosniff"})


def _serve_page(app: FastAPI) -> None:
    """Serve the page at `/`, and its files."""
    files = _serve_files(app, "/playground", _PAGE_DIR, _PAGE_HEADERS)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return files["index.html"].answer(request)


def _add_error_handlers(app: FastAPI, server: Server) -> None:
    """Answer every error with OpenAI's error envelope."""

    @app.exception_handler(TTSError)
    async def known(_: Request, error: TTSError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(explain(error.errors()[0], server.presets.catalog.names()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(_from_http(request, error))

    @app.exception_handler(ClientDisconnect)
    async def disconnected(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED)


def _from_http(request: Request, error: HTTPException) -> TTSError:
    """Return an HTTPException of FastAPI as one of our errors. If it wraps one of ours, raised while the body was read, return that."""
    if isinstance(error.__cause__, TTSError):
        return error.__cause__
    if error.status_code == 404:
        return NotFoundError(f"Path {shorten(request.url.path)} not found. /docs lists all paths.")
    if error.status_code == 405:
        allowed = ", ".join(_methods_at(request.url.path)) or (error.headers or {}).get("Allow", "")
        return MethodNotAllowedError(
            f"Method {shorten(request.method)} is not allowed for this path. Allowed: {allowed}.", headers={"Allow": allowed}
        )
    return InvalidRequestError("The body could not be read: it must be a JSON object in UTF-8.", code="invalid_json")


def _methods_at(path: str) -> list[str]:
    """Return the methods of all routes of a path. FastAPI's exception has those of the first route only."""
    routes = [
        route
        for router in (speech_routes, voice_routes, conversation_routes, client_routes, service_routes, status_routes)
        for route in router.routes
        if isinstance(route, APIRoute)
    ]
    methods = {method for route in routes if route.path_regex.match(path.removeprefix("/v1")) for method in route.methods or ()}
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))


def _terminal(settings: Settings, url: str) -> Terminal | None:
    """Return the display for a person, if standard error is a terminal and LOG_STDERR does not turn it off."""
    if not settings.log_stderr or not on_terminal():
        return None
    facts = Facts(VERSION, url, settings.playground, bool(settings.api_key), settings.cache_dir / LOG_FILE)
    return Terminal(facts, verbose=settings.log_level == "debug")


def main() -> int:
    """Run the server. Return the exit status: 2 (or SETTING_ERROR_STATUS) if a setting is invalid or the port cannot be used, else 0."""
    try:
        settings = load_settings()
        bound = listen(settings)
    except SettingsError as error:
        print(f"sesame-tts: {error}", file=sys.stderr)
        return int(os.environ.get("SETTING_ERROR_STATUS", "2"))  # launchd's service file sets it to 0
    host, port = bound[0].getsockname()[:2]
    here = "localhost" if host in {"0.0.0.0", "::", "127.0.0.1", "::1"} else host  # noqa: S104 - compared, not bound
    terminal = _terminal(settings, f"http://{here}:{port}")
    configure_logging(settings.log_level, settings.cache_dir, to_stderr=settings.log_stderr, terminal=terminal)
    app = create_app(settings, terminal)
    hosts = " and ".join(each.getsockname()[0] for each in bound)
    logger.info(
        "sesame-tts %s listens on %s, port %d: http://%s:%d/ (default voice: %s)", VERSION, hosts, port, here, port, settings.default_voice
    )
    if settings.open_to_network:
        logger.warning("open to the network without a key: other machines can use this server. Set HOST=127.0.0.1 or API_KEY.")
    serve(app, settings, bound, app.state.server.drain)
    logger.info("stopped")
    return 0


def run() -> NoReturn:
    """Run the server and end the process.

    Not with sys.exit: a model's thread may still run MLX code, because a load cannot be interrupted. Finalizing the interpreter then ends in
    "terminate called without an active exception" and status 134, which a supervisor takes for a crash.
    """
    status = main()
    logging.shutdown()
    os._exit(status)


if __name__ == "__main__":
    run()
