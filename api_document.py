"""The OpenAPI document: what FastAPI cannot know, which is every refusal, every answer's shape, and when a key is needed."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from audio_converter import FORMATS

Document = dict[str, Any]
"""An OpenAPI document, or a part of one."""


class _Shape(BaseModel):
    """A JSON object; a later version may add fields."""

    model_config = ConfigDict(extra="allow")


class ErrorDetail(_Shape):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class Error(_Shape):
    """OpenAI's envelope of every error."""

    error: ErrorDetail


class Model(_Shape):
    """A model, as OpenAI lists it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Shape):
    """OpenAI's list of models."""

    object: Literal["list"]
    data: list[Model]


class AudioModel(_Shape):
    """A model, as Open WebUI reads it."""

    id: str


class AudioModelList(_Shape):
    """Open WebUI's list of models."""

    models: list[AudioModel]


class VoiceEntry(_Shape):
    """A voice."""

    id: str
    name: str
    description: str
    model: str
    ready: bool
    aliases: list[str]
    uploaded: bool


class VoiceList(_Shape):
    """The voices."""

    voices: list[VoiceEntry]


class VoiceDetails(VoiceEntry):
    """One voice, and when it was added."""

    object: Literal["audio.voice"]
    created_at: int | None


class DeletedVoice(_Shape):
    """What is left of a voice."""

    id: str
    object: Literal["audio.voice"]
    deleted: Literal[True]


class SpokenCaption(_Shape):
    """A sentence group and when it is heard, in seconds."""

    group: int
    text: str
    start: float
    end: float


class Captions(_Shape):
    """An answer's captions."""

    captions: list[SpokenCaption]


class Health(_Shape):
    """How the server is; where a key is set, those without it are told `status` only."""

    status: Literal["ok", "loading", "degraded"]


class Readiness(_Shape):
    """Whether the default voice can speak."""

    ready: bool


class Reloaded(_Shape):
    """The models' states."""

    models: dict[str, Literal["loading", "ready", "unloaded", "failed", "disabled"]]


_REASONS = {
    400: "The request is at fault",
    401: "The API key is missing or wrong",
    403: "Only for the owner",
    404: "There is nothing under this name or id",
    408: "The request did not arrive in time",
    409: "The name is taken, or there are too many voices",
    413: "The body is too large",
    421: "The Host header names a host this server does not answer for",
    429: "The queue is full",
    500: "The server is at fault",
    503: "The voice's model is not ready, the wait was too long, the memory too small, or the server goes down",
}
_EVERYWHERE = (400, 408, 413, 421, 500, 503)  # before a route is chosen, or whatever it is
_OPEN = ("/health", "/health/ready")
_REFUSALS: dict[tuple[str, str], tuple[int, ...]] = {
    ("post", "/v1/audio/speech"): (429,),
    ("get", "/v1/audio/speech/{answer}/timestamps"): (404,),
    ("get", "/v1/models/{model}"): (404,),
    ("post", "/v1/audio/voices"): (403, 409, 429),
    ("get", "/v1/audio/voices/{voice_id}"): (404,),
    ("delete", "/v1/audio/voices/{voice_id}"): (403, 404),
    ("post", "/admin/reload"): (403,),
}
_TEXT: Document = {"schema": {"type": "string"}}
_ANSWERS: dict[tuple[str, str], type[_Shape] | Document] = {
    ("post", "/v1/audio/speech"): {form.content_type: {} for form in FORMATS.values()} | {"text/event-stream": {}},
    ("get", "/v1/audio/speech/{answer}/timestamps"): Captions,
    ("get", "/v1/audio/models"): AudioModelList,
    ("get", "/v1/models"): ModelList,
    ("get", "/v1/models/{model}"): Model,
    ("get", "/v1/audio/voices"): VoiceList,
    ("post", "/v1/audio/voices"): VoiceDetails,
    ("get", "/v1/audio/voices/{voice_id}"): VoiceDetails,
    ("delete", "/v1/audio/voices/{voice_id}"): DeletedVoice,
    ("get", "/health"): Health,
    ("get", "/health/ready"): Readiness,
    ("get", "/metrics"): {"text/plain": _TEXT},
    ("post", "/admin/reload"): Reloaded,
}
_SPEECH_HEADERS = {
    "X-Voice": "The voice that spoke.",
    "X-Model": "Its model.",
    "X-Seed": "With it, the same text and voice give the same samples again.",
    "X-Queue-Time": "Seconds spent waiting for the turn.",
}


def complete_document(app: FastAPI, *, keyed: bool) -> None:
    """Have /openapi.json say what the server really answers.

    Args:
        app: Its routes may be added later.
        keyed: Whether API_KEY is set.
    """
    plain = app.openapi

    @cache
    def completed() -> Document:
        return _completed(plain(), keyed)

    app.openapi = completed  # type: ignore[method-assign]  # FastAPI's own way of extending the document


def _completed(document: Document, keyed: bool) -> Document:
    shapes: list[type[BaseModel]] = [Error, *(answer for answer in _ANSWERS.values() if isinstance(answer, type))]
    _, schemas = models_json_schema([(shape, "validation") for shape in shapes], ref_template="#/components/schemas/{model}")
    known = document["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own 422, which this server never sends
        known.pop(unused, None)
    known |= schemas["$defs"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            needs_key = keyed and path not in _OPEN
            operation["security"] = [{"HTTPBearer": []}] if needs_key else [{}, {"HTTPBearer": []}]
            operation["responses"] = _responses(method, path, needs_key=needs_key)
    return document


def _responses(method: str, path: str, *, needs_key: bool) -> Document:
    answer = _ANSWERS.get((method, path), {})
    good: Document = {"description": "As asked", "content": _json(answer) if isinstance(answer, type) else dict(answer)}
    if answer is Captions:
        good["content"] |= {"text/vtt": _TEXT, "application/x-subrip": _TEXT}
    if path == "/v1/audio/speech":
        good["description"] = "The speech"
        good["headers"] = {name: {"description": text, "schema": {"type": "string"}} for name, text in _SPEECH_HEADERS.items()}
    statuses = sorted({*_EVERYWHERE, *_REFUSALS.get((method, path), ()), *([401] if needs_key else [])})
    refusals = {str(status): {"description": _REASONS[status], "content": _json(Error)} for status in statuses}
    if path == "/health/ready":
        refusals["503"] = {"description": "It cannot speak yet", "content": _json(Readiness)}
    return {"200": good} | refusals


def _json(shape: type[_Shape]) -> Document:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape.__name__}"}}}
