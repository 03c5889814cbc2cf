"""The errors of the server, as one tree, and the JSON envelope in which a client gets them.

    TTSError
    ├── InvalidRequestError            400  the request is wrong; repeating it does not help
    │   ├── InvalidInputError          400  invalid_input: no text, or a text that the voice cannot speak
    │   │   └── NothingToSpeakError    400  invalid_input: no letter and no digit
    │   ├── InputTooLongError          400  input_too_long
    │   ├── InvalidVoiceError          400  invalid_voice: lists the available voices
    │   ├── InvalidFormatError         400  invalid_format: lists the available formats
    │   ├── InvalidAudioError          400  invalid_audio: a recording that is not usable as a voice
    │   ├── AuthenticationError        401  invalid_api_key
    │   ├── ForbiddenError             403  forbidden
    │   ├── NotFoundError              404  not_found
    │   ├── MethodNotAllowedError      405  method_not_allowed
    │   ├── RequestTimeoutError        408  request_timeout: the request did not arrive in time
    │   ├── ConflictError              409  already_exists
    │   ├── BodyTooLargeError          413  body_too_large
    │   ├── UnsupportedMediaTypeError  415  unsupported_media_type: a compressed body
    │   └── HostNotAllowedError        421  host_not_allowed
    ├── RateLimitError                 429  rate_limit_exceeded: the queue is full
    └── ServerError                    500  the server failed
        ├── ConversionError            500  conversion_failed: ffmpeg
        ├── StorageError               500  storage_failed: the disk is full or not writable
        ├── InternalError              500  internal_error
        ├── ModelNotReadyError         503  model_not_ready
        ├── QueueTimeoutError          503  queue_timeout
        ├── DeadlineError              503  deadline_unreachable: the speech would not be complete in time
        ├── GenerationTimeoutError     503  generation_timeout
        ├── InsufficientMemoryError    503  insufficient_memory
        ├── ConnectionsExhaustedError  503  too_many_connections
        ├── UnreadAudioError           503  too_much_unread: clients do not read their answers
        └── ShuttingDownError          503  shutting_down

The envelope is OpenAI's, `{"error": {"message", "type", "param", "code"}}`: its clients read these four fields. Errors of libraries are
translated where they are caught: those of a model in `tts_engine`, of a load in `model_host`, of ffmpeg in `ffmpeg`.
"""

from __future__ import annotations

from typing import Any

_SHOWN_CHARACTERS = 60
_LACKS_MEMORY = ("can't start new thread", "Failed to allocate memory", "bad_alloc")


class TTSError(Exception):
    """An error that a client gets in OpenAI's envelope.

    Args:
        message: What failed, with the value, and what to do. The client reads it: it contains no path, no spoken text and no key.
        param: The request field that is wrong, if any.
        code: Replaces the class's code.
        headers: Response headers such as `Retry-After`.
    """

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code
        self.headers = headers or {}

    def envelope(self) -> dict[str, dict[str, Any]]:
        """Return the response body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequestError(TTSError):
    """The request is wrong."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidInputError(InvalidRequestError):
    """`input` is empty, or the voice cannot speak it."""

    code = "invalid_input"


class NothingToSpeakError(InvalidInputError):
    """`input` contains no letter and no digit."""


class InputTooLongError(InvalidRequestError):
    """`input` is longer than MAX_INPUT_LENGTH characters, or would become more than MAX_AUDIO_SECONDS of audio."""

    code = "input_too_long"


class InvalidVoiceError(InvalidRequestError):
    """`voice` is neither a voice nor an alias."""

    code = "invalid_voice"


class InvalidFormatError(InvalidRequestError):
    """`response_format` is not an available format."""

    code = "invalid_format"


class InvalidAudioError(InvalidRequestError):
    """A recording is not usable as a voice: unreadable, silent, too short or too long."""

    code = "invalid_audio"


class AuthenticationError(InvalidRequestError):
    """The server requires an API key, and the request has none or a wrong one."""

    status = 401
    code = "invalid_api_key"


class ForbiddenError(InvalidRequestError):
    """The request is not allowed from its origin or address."""

    status = 403
    code = "forbidden"


class NotFoundError(InvalidRequestError):
    """There is nothing with this path or id."""

    status = 404
    code = "not_found"


class MethodNotAllowedError(InvalidRequestError):
    """The path does not support the method."""

    status = 405
    code = "method_not_allowed"


class RequestTimeoutError(InvalidRequestError):
    """The request did not arrive in time."""

    status = 408
    code = "request_timeout"


class ConflictError(InvalidRequestError):
    """The name is already used."""

    status = 409
    code = "already_exists"


class BodyTooLargeError(InvalidRequestError):
    """The body is larger than the limit."""

    status = 413
    code = "body_too_large"


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body is compressed."""

    status = 415
    code = "unsupported_media_type"


class HostNotAllowedError(InvalidRequestError):
    """The Host header is not an allowed host (protection against DNS rebinding)."""

    status = 421
    code = "host_not_allowed"


class RateLimitError(TTSError):
    """The queue is full."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class ServerError(TTSError):
    """The server failed; the same request may succeed later."""


class ConversionError(ServerError):
    """ffmpeg is missing, failed or hangs."""

    code = "conversion_failed"


class StorageError(ServerError):
    """The server cannot store a file: its disk is full or not writable."""

    code = "storage_failed"


class InternalError(ServerError):
    """An unexpected error; the log has the traceback with the request's id."""


class ModelNotReadyError(ServerError):
    """The voice's model is loading, failed to load, or is switched off."""

    status = 503
    code = "model_not_ready"


class QueueTimeoutError(ServerError):
    """The request waited longer than QUEUE_TIMEOUT in the queue."""

    status = 503
    code = "queue_timeout"


class DeadlineError(ServerError):
    """The speech would not be complete before the request's deadline."""

    status = 503
    code = "deadline_unreachable"


class GenerationTimeoutError(ServerError):
    """The model made no progress for longer than GENERATION_TIMEOUT."""

    status = 503
    code = "generation_timeout"


class InsufficientMemoryError(ServerError):
    """The machine has too little free memory for this utterance."""

    status = 503
    code = "insufficient_memory"


class ConnectionsExhaustedError(ServerError):
    """The limit of connections is reached, and all are in use."""

    status = 503
    code = "too_many_connections"


class UnreadAudioError(ServerError):
    """The clients, or this one, have left too much generated audio unread."""

    status = 503
    code = "too_much_unread"


class ShuttingDownError(ServerError):
    """The server is shutting down and accepts no new work."""

    status = 503
    code = "shutting_down"

    def __init__(self) -> None:
        super().__init__("The server is shutting down. Try again in a moment.", headers={"Retry-After": "10"})


def lacks_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is short. Python's for a thread and onnxruntime's are no MemoryError."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _LACKS_MEMORY)


def no_memory() -> InsufficientMemoryError:
    """Return the error for a lack of memory."""
    return InsufficientMemoryError("There is not enough free memory for this text. Send a shorter one, or try again later.")


def shorten(value: object, limit: int = _SHOWN_CHARACTERS) -> str:
    """Return `value` as a short, printable Python literal for a message, so that no input floods a log or a response."""
    text = value if isinstance(value, str) else repr(value)
    # A lone surrogate from JSON ("\\ud800") cannot be encoded as UTF-8 and would make the error message itself fail.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return repr(shown) if isinstance(value, str) else shown
