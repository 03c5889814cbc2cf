"""The form that brings a voice: its fields, checked one by one."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import regex
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from errors import BodyTooLargeError, InvalidAudioError, InvalidRequestError, StorageError
from voice_store import MAX_NAME, MAX_WORDS

logger = logging.getLogger(__name__)

MAX_SAMPLE_BYTES = 10 << 20
"""OpenAI's limit for a recording."""

_MAX_CONSENT = 200
_REFUSALS = frozenset({"", "false", "no", "0", "off", "f", "n", "none", "null", "undefined"})
_WORD = regex.compile(r"[\p{L}\p{N}]")
_INVISIBLE = regex.compile(r"[\p{Z}\p{C}]+")


@dataclass(frozen=True)
class VoiceForm:
    """What a form holds.

    Attributes:
        name: As it was sent.
        consent: A word for yes, or the id of a consent.
        ref_text: The recording's words; empty where they were not sent.
        audio_sample: The recording, at its beginning.
    """

    name: str
    consent: str
    ref_text: str
    audio_sample: BinaryIO

    OPENAPI: ClassVar[dict[str, Any]] = {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["name", "audio_sample", "consent"],
                        "properties": {
                            "name": {
                                "type": "string",
                                "minLength": 1,
                                "maxLength": MAX_NAME,
                                "example": "Grandmother",
                                "description": "What the voice is called.",
                            },
                            "audio_sample": {
                                "type": "string",
                                "format": "binary",
                                "description": "1 to 60 s of speech as WAV, MP3, M4A, FLAC, Ogg, Opus or WebM; up to 10 MiB.",
                            },
                            "consent": {
                                "type": "string",
                                "minLength": 1,
                                "maxLength": _MAX_CONSENT,
                                "example": "true",
                                "description": "`true`, or the id of a consent: the speaker agrees. Kept with the date.",
                            },
                            "ref_text": {
                                "type": "string",
                                "maxLength": MAX_WORDS,
                                "example": "These are the words that I say in the recording.",
                                "description": "The words of the recording, exactly as spoken. Where a recogniser is installed, they may be left out.",
                            },
                        },
                    }
                }
            },
        }
    }


@asynccontextmanager
async def read_voice_form(request: Request) -> AsyncIterator[VoiceForm]:
    """The form of a request. Its recording, kept in a nameless temporary file, is gone when the context ends.

    Raises:
        InvalidRequestError: Something is missing, twice there, or of the wrong kind.
        BodyTooLargeError: The recording is.
        StorageError: There is no room for a temporary file.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise _bad_form("The body must be a form, sent as multipart/form-data.")
    try:
        form = await request.form(max_files=2, max_fields=20)
    except HTTPException as error:
        raise _bad_form(f"The form cannot be read: {error.detail}") from None
    except OSError as error:
        logger.error("a form cannot be kept while it is read: %s", error.strerror)  # noqa: TRY400 - the cause is all there is to know
        raise StorageError("The server has no room for a temporary file.") from None
    try:
        yield _checked(form)
    finally:
        await form.close()


def clean_words(text: str) -> str:
    """`text` with single spaces and nothing invisible; empty when no word is in it."""
    cleaned = _INVISIBLE.sub(" ", text).strip()
    return cleaned if _WORD.search(cleaned) else ""


def _checked(form: FormData) -> VoiceForm:
    name = _text(form, "name", MAX_NAME)
    consent = _text(form, "consent", _MAX_CONSENT)
    if consent.lower() in _REFUSALS:
        raise _bad_field("consent", "'consent' must be 'true', or the id of a consent: a voice may be used only if its speaker agrees.")
    words = clean_words(_text(form, "ref_text", MAX_WORDS)) if "ref_text" in form else ""
    return VoiceForm(name, consent, words, _sample(form))


def _only(form: FormData, field: str) -> str | UploadFile:
    values = form.getlist(field)
    if not values:
        raise _bad_field(field, f"'{field}' is missing, or the form ends before it does.")
    if len(values) > 1:
        raise _bad_field(field, f"'{field}' is there {len(values)} times.")
    return values[0]


def _text(form: FormData, field: str, longest: int) -> str:
    value = _only(form, field)
    if not isinstance(value, str):
        raise _bad_field(field, f"'{field}' must be a text, not a file.")
    if len(value.strip()) > longest:
        raise _bad_field(field, f"'{field}' has {len(value.strip())} characters; at most {longest} are allowed.")
    return value.strip()


def _sample(form: FormData) -> BinaryIO:
    value = _only(form, "audio_sample")
    if isinstance(value, str):
        raise _bad_field("audio_sample", "'audio_sample' must be a file: send it with a file name.")
    if not value.size:
        raise InvalidAudioError("The recording is empty.", param="audio_sample")
    if value.size > MAX_SAMPLE_BYTES:
        raise BodyTooLargeError(
            f"The recording has {value.size} bytes; at most {MAX_SAMPLE_BYTES} (10 MiB) are allowed.", param="audio_sample"
        )
    return value.file


def _bad_field(field: str, message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=field, code=f"invalid_{field}")


def _bad_form(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, code="invalid_form")
