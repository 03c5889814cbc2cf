"""The models of requests, of errors and of the server's state, and the OpenAPI document. Other answers' models are beside their routes."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from audio_formats import FORMATS, SAMPLE_RATE
from config import FormatName
from errors import (
    AuthenticationError,
    BodyTooLargeError,
    ConflictError,
    ForbiddenError,
    HostNotAllowedError,
    InputTooLongError,
    InternalError,
    InvalidFormatError,
    InvalidInputError,
    InvalidRequestError,
    InvalidVoiceError,
    ModelNotReadyError,
    NotFoundError,
    RateLimitError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
    shorten,
)

MAX_BODY_BYTES = 1 << 20
"""Limit for a JSON body. The default limit of 4096 characters needs 24 KiB at most, when all are escaped (\\uXXXX)."""


class VoiceId(BaseModel):
    """A voice as an object: OpenAI's clients send custom voices like this."""

    id: str = Field(max_length=200)


def _clean(value: object) -> object:
    r"""Remove surrounding space and lone surrogates ("\ud800" in JSON), which cannot be encoded."""
    return value.encode("utf-8", "ignore").decode("utf-8").strip() if isinstance(value, str) else value


def _clean_text(value: object) -> object:
    """Remove what `_clean` removes, but keep the space around the text: offsets of words count from the caller's first character."""
    return value.encode("utf-8", "ignore").decode("utf-8") if isinstance(value, str) and _clean(value) else _clean(value)


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _number(value: object) -> object:
    """Refuse true and "1", which pydantic would accept as numbers."""
    if isinstance(value, bool | str):
        raise ValueError("not a number")  # noqa: TRY004 - pydantic reports a ValueError as a fault of the field
    return value


_Number = BeforeValidator(_number)

_REQUIRED = ("model", "input", "voice")
SPEECH_EXAMPLE: dict[str, Any] = {"model": "csm-1b", "input": "Hello! This is my own voice server speaking.", "voice": "alloy"}


def document_nulls(schema: dict[str, Any]) -> None:
    """Add null to each optional field that lacks it."""
    for name, field in schema["properties"].items():
        if name in schema["required"] or {"type": "null"} in field.get("anyOf", ()):
            continue
        rules = {key: field.pop(key) for key in set(field) - {"title", "description", "default"}}
        field["anyOf"] = [*(rules.get("anyOf") or [rules]), {"type": "null"}]


def _document_speech(schema: dict[str, Any]) -> None:
    """Add the examples and the nulls."""
    schema["examples"] = [SPEECH_EXAMPLE, SPEECH_EXAMPLE | {"voice": "heart", "response_format": "wav", "speed": 1.25, "seed": 7}]
    document_nulls(schema)


class SpeechFields(BaseModel):
    """How to speak: all of a speech request but its text. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", json_schema_extra=_document_speech)

    model: str = Field(description="Ignored: the voice decides which model speaks.", max_length=200)
    voice: str | VoiceId = Field(description="A voice's name or alias, or an object with its `id`. OpenAI's names reach the default voice.")
    response_format: Annotated[FormatName | None, BeforeValidator(_lower)] = Field(
        None, description="`mp3` unless DEFAULT_FORMAT says otherwise. `pcm` is 16-bit little-endian mono at 24 kHz and always streams."
    )
    speed: Annotated[float, _Number] = Field(
        1.0, ge=0.25, le=4.0, allow_inf_nan=False, description="Speed of the speech; the pitch does not change."
    )
    instructions: str | None = Field(None, description="Ignored.")
    stream: bool = Field(False, strict=True, description="Send the audio while it is generated.")
    stream_format: Literal["audio", "sse"] | None = Field(
        None, description="`audio` streams bytes, `sse` server-sent events with base64 chunks."
    )
    normalize: bool | None = Field(
        None,
        strict=True,
        description="Turn Markdown, URLs, emoji, numbers and abbreviations into plain words; the default is NORMALIZE_TEXT.",
    )
    timestamps: Annotated[bool, Field(strict=True)] | Literal["word"] = Field(
        False, description="Report the start and end of each segment; `word`: of each word too."
    )
    seed: Annotated[int | None, _Number] = Field(
        None, ge=0, le=2**32 - 1, description="The same text, voice and seed give the same samples."
    )
    temperature: Annotated[float | None, _Number] = Field(
        None, ge=0.0, le=2.0, allow_inf_nan=False, description="Sampling temperature; the default is the voice's."
    )
    top_k: Annotated[int | None, _Number] = Field(
        None, ge=1, le=2051, description="Number of candidates in sampling; the default is the voice's."
    )
    conversation: str | None = Field(
        None, min_length=1, max_length=200, description="Any id: what was said before under it is the context of this reply (CSM only)."
    )
    sample_rate: Annotated[int, _Number] = Field(
        SAMPLE_RATE, ge=8000, le=48_000, description="Sample rate of `pcm` and `wav` in Hz, such as 8000 for telephony."
    )
    deadline_ms: Annotated[int | None, _Number] = Field(
        None, ge=1, le=3_600_000, description="Refuse at once if the speech cannot be complete in so many milliseconds."
    )
    on_deadline: Literal["error", "fallback"] = Field(
        "error", description="`fallback` lets the built-in voice speak if the deadline cannot be met."
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: object) -> object:
        """Drop optional fields that are null: some clients serialize all fields that are not set."""
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None or name in _REQUIRED}

    @property
    def voice_name(self) -> str:
        """The voice's name or id."""
        return self.voice if isinstance(self.voice, str) else self.voice.id


class SpeechRequest(SpeechFields):
    """OpenAI's speech request with some more fields."""

    input: Annotated[str, BeforeValidator(_clean_text)] = Field(
        description="The text to speak; up to MAX_INPUT_LENGTH (4096) characters. `[pause:1.5s]` is silence, `[voice:NAME]` changes the voice.",
        min_length=1,
    )

    def check_length(self, limit: int) -> None:
        """Refuse a text over MAX_INPUT_LENGTH.

        Raises:
            InputTooLongError: The text is longer than `limit`, in characters.
        """
        length = len(self.input.strip())
        if length > limit:
            raise InputTooLongError(
                f"'input' has {length} characters; at most {limit} are allowed. Send it in parts, or raise MAX_INPUT_LENGTH.",
                param="input",
            )


class SessionStart(SpeechFields):
    """The first message of a WebSocket: how to speak the text of those that follow."""

    model: str = Field("csm-1b", max_length=200)


# pydantic's error types for which the allowed values are explanation enough.
_OUT_OF_BOUNDS = {"greater_than_equal", "less_than_equal", "finite_number", "literal_error", "value_error"}
_KINDS = {"input": InvalidInputError, "voice": InvalidVoiceError, "response_format": InvalidFormatError}


def explain(fault: dict[str, Any], voices: list[str]) -> InvalidRequestError:
    """Return a pydantic error as one of our errors.

    Args:
        fault: The first of `RequestValidationError.errors()`.
        voices: Names of the available voices, for an error in `voice`.
    """
    if fault["type"] == "json_invalid":
        place = f" at character {fault['loc'][-1]}" if isinstance(fault["loc"][-1], int) else ""
        return InvalidRequestError(f"The body is not valid JSON{place}: {fault['ctx']['error']}.", code="invalid_json")
    location = [part for part in fault["loc"] if part not in ("body", "query", "path")]
    if not location:
        return InvalidRequestError("The body must be a JSON object, sent with 'Content-Type: application/json'.", code="invalid_json")
    name = str(location[0])
    kind = _KINDS.get(name)
    message = f"{_problem(name, fault)}{_allowed(name, voices)}"
    return kind(message, param=name) if kind else InvalidRequestError(message, param=name, code=f"invalid_{name}")


def _problem(name: str, fault: dict[str, Any]) -> str:
    if fault["type"] == "missing":
        return f"'{name}' is missing."
    if name == "input" and fault["type"] == "string_too_short":
        return "'input' is empty."
    given = "null" if fault["input"] is None else shorten(fault["input"])
    value = "" if name == "input" else f"={given}"  # the text is never logged, and messages are
    reason = "" if fault["type"] in _OUT_OF_BOUNDS and _allowed(name, []) else f": {fault['msg'][0].lower()}{fault['msg'][1:]}"
    return f"'{name}'{value} is not valid{reason}."


def _allowed(name: str, voices: list[str]) -> str:
    if name == "voice":
        return f" Available voices: {', '.join(voices) or 'none'}."
    if name == "response_format":
        return f" Available formats: {', '.join(FORMATS)}."
    if name == "model":
        return " Any text is allowed: the voice decides which model speaks."
    if name == "input":
        return " It must be a text of at least one character."
    field = SpeechRequest.model_fields.get(name)
    bounds = [
        next((getattr(rule, side) for rule in (field.metadata if field else ()) if hasattr(rule, side)), None) for side in ("ge", "le")
    ]
    return f" Allowed: {bounds[0]} to {bounds[1]}." if None not in bounds else ""


class ResponseModel(BaseModel):
    """A JSON object of an answer. Later versions may add fields."""

    model_config = ConfigDict(extra="allow")


class ErrorDetail(ResponseModel):
    """The error of an answer."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class Error(ResponseModel):
    """OpenAI's error envelope, the body of every error."""

    error: ErrorDetail


State = Literal["loading", "ready", "unloaded", "failed", "disabled"]


class Progress(ResponseModel):
    """The progress of a model that is loading; sizes in bytes, while files are downloaded."""

    stage: str
    done: int | None
    total: int | None
    fraction: float | None


class PaceStatus(ResponseModel):
    """How fast a model speaks, from its latest utterances; `utterances` is their number."""

    frames_per_second: float
    start_seconds: float
    seconds_per_character: float
    utterances: int


class ModelStatus(ResponseModel):
    """The state of a model. What is known only after loading, or only in some states, is absent until then."""

    id: str
    state: State
    loaded: bool
    error: str | None
    sample_rate: int
    watermark: bool
    active: int
    waiting: int
    next_try_seconds: float | None = None
    progress: Progress | None = None
    pace: PaceStatus | None = None
    source: str | None = None
    dtype: str | None = None
    memory_gb: float | None = None
    peak_memory_gb: float | None = None


class CsmStatus(ResponseModel):
    """The state of the model that MODEL_ID names."""

    id: str
    loaded: bool
    sample_rate: int
    peak_memory_gb: float | None
    error: str | None


class QueueStatus(ResponseModel):
    """The request queues of all models together."""

    active: int
    waiting: int
    limit: int


class SkippedPresetFile(ResponseModel):
    """A preset file that cannot be used."""

    file: str
    reason: str


class Fallback(ResponseModel):
    """The voice that speaks for the default voice while that is not ready."""

    voice: str
    replaces: str


class Health(ResponseModel):
    """The state of the server. If API_KEY is set, requests without the key get `status` only."""

    status: Literal["ok", "loading", "degraded"]
    model: CsmStatus | None = None
    models: dict[str, ModelStatus] | None = None
    ffmpeg: bool | None = None
    ffmpeg_version: str | None = None
    voices: list[str] | None = None
    default_voice: str | None = None
    fallback: Fallback | None = None
    max_input_length: int | None = None
    skipped_presets: list[SkippedPresetFile] | None = None
    queue: QueueStatus | None = None
    setting_faults: list[str] | None = None
    peak_resident_gb: float | None = None
    uptime_seconds: float | None = None
    version: str | None = None


class Readiness(ResponseModel):
    """Whether the default voice can speak."""

    ready: bool


class Reloaded(ResponseModel):
    """The state of each model."""

    models: dict[str, State]


Document = dict[str, Any]
"""An OpenAPI document, or a part of one."""

_REASONS = {
    400: "The request is invalid",
    401: "The API key is missing or wrong",
    403: "Allowed with the API key or from this machine only",
    404: "Nothing has this name or id",
    408: "The request did not arrive in time",
    409: "The name is taken, or there are too many voices",
    413: "The body is too large",
    415: "The body is compressed",
    421: "The Host header names a host that is not allowed",
    429: "The queue is full",
    500: "Server error",
    503: "The voice's model is not ready, the queue timeout has passed, memory is short, or the server is shutting down",
}


_SAMPLES = (
    InvalidFormatError("'response_format'='ogg' is not valid. Available formats: mp3, opus, aac, flac, wav, pcm.", param="response_format"),
    AuthenticationError("The API key is missing or wrong: send 'Authorization: Bearer <key>' with a key from this server's API_KEY."),
    ForbiddenError("Requests from another machine need a key for this: set API_KEY on the server and send 'Authorization: Bearer <key>'."),
    NotFoundError("There is no voice with this id. GET /v1/audio/voices lists the voices."),
    RequestTimeoutError("The request did not arrive within 20 s."),
    ConflictError("There are 100 voices, which is the limit: delete one first.", code="too_many_voices"),
    BodyTooLargeError("The body is larger than 1 MiB, the limit for this path."),
    UnsupportedMediaTypeError("Content-Encoding 'gzip' is not supported: send the body uncompressed."),
    HostNotAllowedError("Host 'tts.example.com' is not allowed. If it is a name of this server, set ALLOWED_HOSTS=tts.example.com."),
    RateLimitError("The queue is full: 32 requests are waiting. Try again in 64 s."),
    InternalError("Unexpected server error. The server's log has the details under this request's id."),
    ModelNotReadyError("Model 'csm-1b' is switched off: CSM=off. Voice 'heart' is ready.", param="voice"),
)
"""One error of each status, as the server words it."""
_NOT_FOUND = {
    "/v1/audio/speech/{answer}/timestamps": NotFoundError(
        "There are no timestamps under this id. They exist once an answer is complete, and are kept for the last 64 answers that asked for them."
    ),
    "/v1/models/{model}": NotFoundError("Model 'gpt-9' not found. Models: csm-1b, hibari.", param="model", code="model_not_found"),
}
"""The samples of status 404 that are not about voices, by path."""


def refusals(*statuses: int) -> dict[int | str, Document]:
    """Return error answers for FastAPI's `responses`."""
    return {status: {"model": Error, "description": _REASONS[status]} for status in statuses}


COMMON_REFUSALS = refusals(400, 401, 408, 413, 415, 421, 500, 503)
"""Errors of every route: most are found before a route is chosen."""

_WITHOUT_KEY = ("/health", "/health/ready")


def _add_samples(path: str, responses: Document) -> None:
    """Add a sample to each error. FastAPI drops what is null in an example that it is given."""
    for error in (*_SAMPLES, _NOT_FOUND.get(path, _SAMPLES[0])):
        content = responses.get(str(error.status), {}).get("content", {}).get("application/json", {})
        if content.get("schema") == {"$ref": "#/components/schemas/Error"}:
            content["example"] = error.envelope()


def complete_document(app: FastAPI, *, keyed: bool) -> None:
    """Correct in /openapi.json what FastAPI cannot infer: where a key is needed, that no answer has status 422, and samples of errors.

    Args:
        app: The application. Its routes may be added later.
        keyed: Whether API_KEY is set.
    """
    inferred = app.openapi

    @cache
    def completed() -> Document:
        document = inferred()
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if not keyed or path in _WITHOUT_KEY:
                    operation["responses"].pop("401")
                    operation["security"].insert(0, {})
                _add_samples(path, operation["responses"])
        return document

    app.openapi = completed  # type: ignore[method-assign]  # the way that FastAPI documents
