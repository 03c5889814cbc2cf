"""Everything that can go wrong, as one tree of errors, and the one envelope in which each is told to a client.

    TTSError
    ├── InvalidRequestError            400  the request is at fault; sending it again cannot help
    │   ├── InvalidInputError          400  invalid_input: no text, or nothing in it that can be said
    │   ├── InputTooLongError          400  input_too_long
    │   ├── InvalidVoiceError          400  invalid_voice: lists the voices there are
    │   ├── InvalidFormatError         400  invalid_format: lists the formats there are
    │   ├── InvalidAudioError          400  invalid_audio: a recording that cannot serve as a voice
    │   ├── AuthenticationError        401  invalid_api_key
    │   ├── ForbiddenError             403  forbidden
    │   ├── NotFoundError              404  not_found
    │   ├── MethodNotAllowedError      405  method_not_allowed
    │   ├── RequestTimeoutError        408  request_timeout: the request did not arrive in time
    │   ├── ConflictError              409  already_exists
    │   ├── BodyTooLargeError          413  body_too_large
    │   └── HostNotAllowedError        421  host_not_allowed
    ├── RateLimitError                 429  rate_limit_exceeded: the queue is full
    └── ServerError                    500  the server is at fault
        ├── ConversionError            500  conversion_failed: ffmpeg
        ├── StorageError               500  storage_failed: the disk is full, or cannot be written to
        ├── InternalError              500  internal_error
        ├── ModelNotReadyError         503  model_not_ready
        ├── QueueTimeoutError          503  queue_timeout
        ├── GenerationTimeoutError     503  generation_timeout
        ├── InsufficientMemoryError    503  insufficient_memory
        ├── ConnectionsExhaustedError  503  too_many_connections
        └── ShuttingDownError          503  shutting_down

The eight rows of the first draft's error table keep their status and code; the others follow its style. The envelope is OpenAI's,
`{"error": {"message", "type", "param", "code"}}`, because its clients read those four fields and no others.
"""

from __future__ import annotations

from typing import Any

_SHOWN_CHARACTERS = 60


def shorten(value: object, limit: int = _SHOWN_CHARACTERS) -> str:
    """`value` as a short, printable Python literal, fit for a message: nothing a client sends can flood a log or an answer."""
    text = value if isinstance(value, str) else repr(value)
    # A lone surrogate from JSON ("\\ud800") cannot be encoded as UTF-8: it would make the error message itself fail.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return repr(shown) if isinstance(value, str) else shown


class TTSError(Exception):
    """An error with a place in OpenAI's envelope.

    Args:
        message: A sentence that says which value, what was wrong with it and what would be right. It reaches the client: no path,
            no spoken text, no key.
        param: The request field at fault, if one is.
        code: A narrower code than the class's own.
        headers: Extra response headers, `Retry-After` above all.
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
        """The body of the answer."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequestError(TTSError):
    """The request is at fault."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidInputError(InvalidRequestError):
    """`input` is empty, or nothing in it can be said."""

    code = "invalid_input"


class InputTooLongError(InvalidRequestError):
    """`input` has more than MAX_INPUT_LENGTH characters."""

    code = "input_too_long"


class InvalidVoiceError(InvalidRequestError):
    """`voice` names no preset and no alias."""

    code = "invalid_voice"


class InvalidFormatError(InvalidRequestError):
    """`response_format` is none of the formats."""

    code = "invalid_format"


class InvalidAudioError(InvalidRequestError):
    """A recording that cannot serve as a voice prompt: unreadable, silent, too short or too long."""

    code = "invalid_audio"


class AuthenticationError(InvalidRequestError):
    """The server has an API key and the request does not carry it."""

    status = 401
    code = "invalid_api_key"


class ForbiddenError(InvalidRequestError):
    """The request may not do this from where it comes."""

    status = 403
    code = "forbidden"


class NotFoundError(InvalidRequestError):
    """Nothing is at this path, or under this id."""

    status = 404
    code = "not_found"


class MethodNotAllowedError(InvalidRequestError):
    """The path exists, the method does not."""

    status = 405
    code = "method_not_allowed"


class RequestTimeoutError(InvalidRequestError):
    """The request did not arrive in the time that one may take."""

    status = 408
    code = "request_timeout"


class ConflictError(InvalidRequestError):
    """The name is taken."""

    status = 409
    code = "already_exists"


class BodyTooLargeError(InvalidRequestError):
    """The body is larger than any request needs."""

    status = 413
    code = "body_too_large"


class HostNotAllowedError(InvalidRequestError):
    """The Host header names a host this server does not answer for (a guard against DNS rebinding)."""

    status = 421
    code = "host_not_allowed"


class RateLimitError(TTSError):
    """The queue is full."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class ServerError(TTSError):
    """The server is at fault; the same request may succeed later."""


class ConversionError(ServerError):
    """ffmpeg is missing, failed or hung."""

    code = "conversion_failed"


class StorageError(ServerError):
    """The server cannot keep what it was given: its disk is full or cannot be written to."""

    code = "storage_failed"


class InternalError(ServerError):
    """Something nobody foresaw; the log has the traceback under the request's id."""


class ModelNotReadyError(ServerError):
    """The voice's model is loading, failed to load, or is switched off."""

    status = 503
    code = "model_not_ready"


class QueueTimeoutError(ServerError):
    """The request waited longer than QUEUE_TIMEOUT for its turn."""

    status = 503
    code = "queue_timeout"


class GenerationTimeoutError(ServerError):
    """The model gave no sound for longer than GENERATION_TIMEOUT."""

    status = 503
    code = "generation_timeout"


class InsufficientMemoryError(ServerError):
    """The machine ran out of memory for this utterance."""

    status = 503
    code = "insufficient_memory"


class ConnectionsExhaustedError(ServerError):
    """There are as many connections as the machine's limits allow, and all are in use."""

    status = 503
    code = "too_many_connections"


class ShuttingDownError(ServerError):
    """The server is shutting down and accepts no new work."""

    status = 503
    code = "shutting_down"

    def __init__(self) -> None:
        super().__init__("The server is shutting down. Try again in a moment.", headers={"Retry-After": "10"})
