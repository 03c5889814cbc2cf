"""Request and response models, and the OpenAPI document."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from audio_formats import FORMATS
from errors import InputTooLongError, InvalidFormatError, InvalidInputError, InvalidRequestError, InvalidVoiceError, shorten

# A cap on what one request may carry, in bytes: 4096 characters are 24 KiB at most when all are escaped (\\uXXXX).
MAX_BODY_BYTES = 1 << 20


class VoiceId(BaseModel):
    """A voice as an object, as OpenAI's clients send a custom one."""

    id: str = Field(max_length=200)


def _clean(value: object) -> object:
    r"""Without surrounding space, and without lone surrogates ("\ud800" in JSON), which are no characters and cannot be encoded."""
    return value.encode("utf-8", "ignore").decode("utf-8").strip() if isinstance(value, str) else value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _number(value: object) -> object:
    """A number, as JSON has them: pydantic takes true and "1" for one as well."""
    if isinstance(value, bool | str):
        raise ValueError("not a number")  # noqa: TRY004 - what pydantic makes a fault of the field
    return value


_Number = BeforeValidator(_number)

_EXAMPLE: dict[str, Any] = {"model": "csm-1b", "input": "Hello! This is my own voice server speaking.", "voice": "alloy"}


class SpeechRequest(BaseModel):
    """What OpenAI's clients send, and a few fields more. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [_EXAMPLE, _EXAMPLE | {"voice": "heart", "response_format": "wav", "speed": 1.25, "seed": 7}]})  # fmt: skip

    model: str = Field(description="Accepted and not used: the voice decides which model speaks.", max_length=200)
    input: Annotated[str, BeforeValidator(_clean)] = Field(
        description="The text to speak; up to MAX_INPUT_LENGTH (4096) characters.", min_length=1
    )
    voice: str | VoiceId = Field(description="A voice's name or alias, or an object with its `id`. OpenAI's names reach the default voice.")
    response_format: Annotated[Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] | None, BeforeValidator(_lower)] = Field(
        None, description="`mp3` unless DEFAULT_FORMAT says otherwise. `pcm` is 16-bit little-endian mono at 24 kHz and always streams."
    )
    speed: Annotated[float, _Number] = Field(1.0, ge=0.25, le=4.0, allow_inf_nan=False, description="Pace; the pitch is kept.")
    instructions: str | None = Field(None, description="Accepted and not used.")
    stream: bool = Field(False, strict=True, description="Send the sound while it is generated.")
    stream_format: Literal["audio", "sse"] | None = Field(
        None, description="`audio` streams bytes, `sse` server-sent events with base64 chunks."
    )
    normalize: bool | None = Field(
        None, strict=True, description="Read Markdown, URLs and emoji as a person would; NORMALIZE_TEXT when absent."
    )
    timestamps: bool = Field(False, strict=True, description="Tell when each sentence starts and ends.")
    seed: Annotated[int | None, _Number] = Field(
        None, ge=0, le=2**32 - 1, description="The same text, voice and seed give the same samples."
    )
    temperature: Annotated[float | None, _Number] = Field(
        None, ge=0.0, le=2.0, allow_inf_nan=False, description="The sampler's, in place of the voice's."
    )
    top_k: Annotated[int | None, _Number] = Field(None, ge=1, le=2051, description="The sampler's, in place of the voice's.")

    @property
    def voice_name(self) -> str:
        """The voice's name, however it was given."""
        return self.voice if isinstance(self.voice, str) else self.voice.id

    def check_length(self, limit: int) -> None:
        """Refuse a text over MAX_INPUT_LENGTH.

        Raises:
            InputTooLongError: Says how long the text is and how long it may be.
        """
        if len(self.input) > limit:
            raise InputTooLongError(
                f"'input' has {len(self.input)} characters; at most {limit} are allowed. Send it in parts, or raise MAX_INPUT_LENGTH.",
                param="input",
            )


# pydantic's names of faults after which it is enough to say what is allowed.
_OUT_OF_BOUNDS = {"greater_than_equal", "less_than_equal", "finite_number", "literal_error", "value_error"}
_KINDS = {"input": InvalidInputError, "voice": InvalidVoiceError, "response_format": InvalidFormatError}


def explain(fault: dict[str, Any], voices: list[str]) -> InvalidRequestError:
    """One of pydantic's faults as an error of ours.

    Args:
        fault: The first of `RequestValidationError.errors()`.
        voices: The voices there are, for a fault of `voice`.
    """
    if fault["type"] == "json_invalid":
        place = f" at character {fault['loc'][-1]}" if isinstance(fault["loc"][-1], int) else ""
        return InvalidRequestError(f"The body is not valid JSON{place}: {fault['ctx']['error']}.", code="invalid_json")
    location = [part for part in fault["loc"] if part not in ("body", "query", "path")]
    if not location:
        return InvalidRequestError("The body must be a JSON object, sent with 'Content-Type: application/json'.", code="invalid_json")
    name = str(location[0])
    kind = _KINDS.get(name)
    message = f"{_what(name, fault)}{_right(name, voices)}"
    return kind(message, param=name) if kind else InvalidRequestError(message, param=name, code=f"invalid_{name}")


def _what(name: str, fault: dict[str, Any]) -> str:
    if fault["type"] == "missing":
        return f"'{name}' is missing."
    if name == "input" and fault["type"] == "string_too_short":
        return "'input' is empty."
    given = "null" if fault["input"] is None else shorten(fault["input"])
    value = "" if name == "input" else f"={given}"  # the text is never repeated: messages reach logs
    reason = "" if fault["type"] in _OUT_OF_BOUNDS and _right(name, []) else f": {fault['msg'][0].lower()}{fault['msg'][1:]}"
    return f"'{name}'{value} is not valid{reason}."


def _right(name: str, voices: list[str]) -> str:
    if name == "voice":
        return f" Available voices: {', '.join(voices) or 'none'}."
    if name == "response_format":
        return " Available formats: mp3, opus, aac, flac, wav, pcm."
    if name == "model":
        return " Any text will do: the voice decides which model speaks."
    if name == "input":
        return " It must be a text of at least one character."
    field = SpeechRequest.model_fields.get(name)
    bounds = [
        next((getattr(rule, side) for rule in (field.metadata if field else ()) if hasattr(rule, side)), None) for side in ("ge", "le")
    ]
    return f" Allowed: {bounds[0]} to {bounds[1]}." if None not in bounds else ""


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
    """A segment and when it is heard, in seconds."""

    segment: int
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
