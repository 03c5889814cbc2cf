"""The body of POST /v1/audio/speech, and how its faults are told."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

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
