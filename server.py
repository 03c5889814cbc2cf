"""The HTTP server: its routes, and the application they make up."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import captions
from config import PROJECT_DIR, Settings, SettingsError, load_settings
from errors import InvalidRequestError, MethodNotAllowedError, NotFoundError, TTSError, shorten
from ffmpeg import clean_temporary_files, ffmpeg_version, find_ffmpeg
from http_middleware import DOCS_FILES, AccessMiddleware, RequestLog, error_response, is_owner, require_owner
from monitoring import Metrics, configure_logging
from schemas import SpeechRequest, complete_document, explain
from server_process import listen, serve
from speech_routes import SpeechEndpoint
from tts_engine import TTSEngine
from voice_presets import VoicePresetManager
from voice_routes import VoiceEndpoint, fresh_voices, voice_routes
from voice_store import VoiceStore

logger = logging.getLogger(__name__)

VERSION = "1.0.0"

# For what blocks for a moment: samples to bytes, small files. Each thread keeps memory of its own for good (its allocator's arena; 9 MB at the
# sixth, measured), and asyncio would make up to four more of them than there are cores.
_HELPER_THREADS = 4

_MODELS = {
    "csm-1b": {"id": "csm-1b", "object": "model", "created": 1740000000, "owned_by": "sesame"},
    "hibari": {"id": "hibari", "object": "model", "created": 1760000000, "owned_by": "hibari"},
}
_PAGE_DIR = PROJECT_DIR / "playground"
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Server:
    """What the routes share.

    Attributes:
        settings: The settings.
        store: The voices that people added.
        presets: All voices.
        engine: The models.
        metrics: The figures.
        speech: The speech endpoint.
        voices: The endpoint of the voices.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = VoiceStore(settings.cache_dir / "voices")
        self.presets = VoicePresetManager(settings.presets_dir, settings.default_voice, self.store)
        self.engine = TTSEngine(settings, self.presets)
        self.metrics = Metrics(self.engine.hosts)
        self.speech = SpeechEndpoint(settings, self.presets, self.engine, self.metrics)
        self.voices = VoiceEndpoint(settings, self.presets, self.store, self.engine)
        self._started = time.monotonic()

    def drain(self) -> None:
        """Take no more work, and refuse what waits."""
        self.engine.drain()
        self.voices.drain()

    def default_ready(self) -> bool:
        """Whether the default voice can speak."""
        try:
            return self.engine.host(self.presets.catalog.resolve(self.settings.default_voice)).ready
        except TTSError:
            return False

    def setting_faults(self) -> list[str]:
        """Settings that name a voice there is not. Not an end to the start: presets come and go while the server runs."""
        named = {"DEFAULT_VOICE": self.settings.default_voice, "FALLBACK_VOICE": self.settings.fallback_voice}
        return [
            f"{setting}={shorten(voice)} is no voice. Available voices: {', '.join(self.presets.catalog.names())}."
            for setting, voice in named.items()
            if voice and not self.presets.catalog.knows(voice)
        ]

    def status(self) -> Literal["ok", "loading", "degraded"]:
        """`degraded` when something wanted has failed, `loading` while something is still coming, else `ok`."""
        states = {host.state for host in self.engine.hosts.values()}
        if "failed" in states or find_ffmpeg() is None or self.setting_faults():
            return "degraded"
        if "loading" in states:
            return "loading"
        return "ok" if self.default_ready() else "degraded"

    def health(self, *, to_owner: bool) -> dict[str, Any]:
        """The whole of `/health`; where ffmpeg lies is for the owner only, as no path goes to another machine."""
        models = {name: host.info() for name, host in self.engine.hosts.items()}
        csm = models["csm-1b"]
        ffmpeg = find_ffmpeg()
        place = {"ffmpeg_path": ffmpeg} if to_owner else {}
        return place | {
            "status": self.status(),
            "model": {key: csm.get(key) for key in ("loaded", "sample_rate", "peak_memory_gb", "error")} | {"id": self.settings.model_id},
            "models": models,
            "ffmpeg": ffmpeg is not None,
            "ffmpeg_version": ffmpeg_version(),
            "voices": self.presets.catalog.names(),
            "default_voice": self.settings.default_voice,
            "max_input_length": self.settings.max_input_length,
            "skipped_presets": [asdict(skipped) for skipped in self.presets.catalog.skipped],
            "queue": {
                "active": sum(host.queue.active for host in self.engine.hosts.values()),
                "waiting": sum(host.queue.waiting for host in self.engine.hosts.values()),
                "limit": self.settings.max_queue,
            },
            "setting_faults": self.setting_faults(),
            "peak_resident_gb": _peak_resident_gb(),
            "uptime_seconds": round(time.monotonic() - self._started, 3),
            "version": VERSION,
        }


speech_routes = APIRouter(tags=["speech"])
service_routes = APIRouter(tags=["service"])


@speech_routes.post("/audio/speech", response_class=Response, summary="Speak a text")
async def create_speech(body: SpeechRequest, request: Request) -> Response:
    """OpenAI's speech endpoint: a complete file, or a stream of bytes or events when asked for."""
    return await _server(request).speech.answer(body, request)


@speech_routes.get("/audio/speech/{answer}/timestamps", summary="When each sentence of an answer is heard")
async def get_timestamps(answer: str, request: Request, format: Literal["json", "vtt", "srt"] = "json") -> Response:
    """The captions of an answer that was asked for with `timestamps: true`; its `X-Timestamps` header names this path.

    Those of a streamed answer are there once it has ended.
    """
    found = _server(request).speech.captions.get(answer)
    if found is None:
        raise NotFoundError(
            "There are no timestamps under this id: they are there once an answer has ended, and are kept for the last 64 that asked for them."
        )
    if format == "vtt":
        return Response(captions.to_webvtt(found), media_type="text/vtt")
    if format == "srt":
        return Response(captions.to_srt(found), media_type="application/x-subrip")
    return JSONResponse(captions.to_json(found))


@speech_routes.get("/audio/models", summary="The models, as Open WebUI asks for them")
async def list_audio_models() -> dict[str, Any]:
    """`{"models": [{"id"}]}`."""
    return {"models": [{"id": name} for name in _MODELS]}


@speech_routes.get("/models", summary="The models")
async def list_models() -> dict[str, Any]:
    """OpenAI's list of models."""
    return {"object": "list", "data": list(_MODELS.values())}


@speech_routes.get("/models/{model}", summary="One model")
async def get_model(model: str) -> dict[str, Any]:
    """One of the models."""
    if model not in _MODELS:
        raise NotFoundError(f"Model {shorten(model)} not found. Models: {', '.join(_MODELS)}.", param="model", code="model_not_found")
    return _MODELS[model]


@service_routes.get("/health", summary="How the server is")
async def health(request: Request) -> dict[str, Any]:
    """State of each model, the queue, ffmpeg, the voices. With an API key set, only `status` for those who do not have it."""
    server = _server(request)
    if server.settings.api_key and not request.state.authorized:
        return {"status": server.status()}
    return server.health(to_owner=is_owner(request))


@service_routes.get("/health/ready", summary="Whether the default voice can speak")
async def ready(request: Request) -> JSONResponse:
    """200 once the default voice's model is ready, 503 until then."""
    is_ready = _server(request).default_ready()
    return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)


@service_routes.get("/metrics", response_class=PlainTextResponse, summary="Figures for Prometheus")
async def get_metrics(request: Request) -> Response:
    """Queue, generation, first audio, real-time factor and outcomes."""
    return Response(_server(request).metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


@service_routes.post("/admin/reload", summary="Load models that failed again, now")
async def reload(request: Request) -> dict[str, Any]:
    """From this machine, or with the key."""
    server = _server(request)
    require_owner(request, server.settings)
    server.engine.reload()
    return {"models": {name: host.state for name, host in server.engine.hosts.items()}}


def create_app(settings: Settings) -> FastAPI:
    """The application. Its models begin to load when it starts up."""
    server = Server(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_HELPER_THREADS, "helper"))
        await asyncio.to_thread(_look_around, server)
        await server.engine.start()
        yield
        await server.engine.close()

    app = FastAPIOffline(
        title="Sesame TTS",
        version=VERSION,
        lifespan=lifespan,
        redoc_url=None,
        static_url=DOCS_FILES,
        description="OpenAI's speech API on your own machine.",
        dependencies=[Depends(fresh_voices), Depends(HTTPBearer(auto_error=False, description="One of API_KEY, where it is set."))],
    )
    app.state.server = server
    complete_document(app, keyed=bool(settings.api_key))
    for routes in (speech_routes, voice_routes):
        app.include_router(routes, prefix="/v1")
        app.include_router(routes, include_in_schema=False)
    app.include_router(service_routes)
    if settings.playground:
        _add_page(app)
    _add_error_handlers(app, server)
    app.add_middleware(AccessMiddleware, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["*"], allow_headers=["*"], expose_headers=["*"]
        )
    app.add_middleware(RequestLog)
    return app


def _look_around(server: Server) -> None:
    """What takes a moment the first time (a process, a few files), done before the first request."""
    clean_temporary_files()
    server.store.clean()
    find_ffmpeg()
    ffmpeg_version()
    server.presets.refresh()
    for fault in server.setting_faults():
        logger.warning("%s", fault)


def _peak_resident_gb() -> float:
    """The most memory this process has had resident, in GB (1e9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 3)  # macOS counts bytes, Linux KiB


def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


def _add_page(app: FastAPI) -> None:
    """The page at `/`, with the assets beside it; a fixed list, so that no path of a request ever becomes a path of a file."""
    assets = {path.name: path for path in sorted(_PAGE_DIR.iterdir()) if path.is_file()}
    headers = {
        "Content-Security-Policy": _PAGE_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(assets["index.html"], headers=headers)

    @app.get("/playground/{name}", include_in_schema=False)
    async def asset(name: str) -> FileResponse:
        if name not in assets:
            raise NotFoundError("There is no such file.")
        return FileResponse(assets[name], headers=headers)


def _add_error_handlers(app: FastAPI, server: Server) -> None:
    """Every error leaves in the one envelope."""

    async def ours(_: Request, error: TTSError) -> JSONResponse:
        return error_response(error)

    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(explain(error.errors()[0], server.presets.catalog.names()))

    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(_from_http(request, error))

    app.add_exception_handler(TTSError, ours)  # type: ignore[arg-type]  # Starlette types its handlers for Exception only
    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, http)  # type: ignore[arg-type]


def _from_http(request: Request, error: HTTPException) -> TTSError:
    """FastAPI's own refusals as errors of ours; one of ours that it caught while it read the body is let through."""
    if isinstance(error.__cause__, TTSError):
        return error.__cause__
    if error.status_code == 404:
        return NotFoundError(f"There is nothing at {shorten(request.url.path)}. /docs lists what there is.")
    if error.status_code == 405:
        allowed = ", ".join(_methods_at(request.url.path)) or (error.headers or {}).get("Allow", "")
        return MethodNotAllowedError(f"{shorten(request.method)} is not possible here; allowed: {allowed}.", headers={"Allow": allowed})
    return InvalidRequestError("The body could not be read: it must be a JSON object in UTF-8.", code="invalid_json")


def _methods_at(path: str) -> list[str]:
    """The methods of all routes at a path; FastAPI's own refusal names those of the first one only."""
    routes = [route for router in (speech_routes, voice_routes, service_routes) for route in router.routes if isinstance(route, APIRoute)]
    return sorted({method for route in routes if route.path_regex.match(path.removeprefix("/v1")) for method in route.methods or ()})


def main() -> int:
    """Run the server; the exit status is 2 when a setting or the port cannot be used."""
    try:
        settings = load_settings()
        bound = listen(settings)
    except SettingsError as error:
        print(f"sesame-tts: {error}", file=sys.stderr)
        return 2
    configure_logging(settings.log_level, settings.cache_dir, to_stderr=settings.log_stderr)
    app = create_app(settings)
    host, port = bound.getsockname()[:2]
    here = "localhost" if host in {"0.0.0.0", "::", "127.0.0.1", "::1"} else host  # noqa: S104 - what to type into a browser, not what to bind to
    logger.info(
        "sesame-tts %s listens on %s, port %d: http://%s:%d/ (default voice: %s)", VERSION, host, port, here, port, settings.default_voice
    )
    if settings.open_to_network:
        logger.warning("open to the network without a key: other machines can use it. Set HOST=127.0.0.1, or API_KEY.")
    serve(app, settings, bound, app.state.server.drain)
    logger.info("stopped")
    return 0


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    # Not sys.exit: a model's thread may be inside MLX (a load cannot be interrupted), and tearing the interpreter down around it ends in
    # "terminate called without an active exception", status 134, which a supervisor takes for a crash.
    os._exit(status)
