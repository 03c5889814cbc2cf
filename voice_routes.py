"""Voices over HTTP: list, add from a recording, delete."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO, ClassVar, TypeVar

import regex
from fastapi import APIRouter, Depends, Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from audio_formats import Samples
from config import Settings
from errors import BodyTooLargeError, ForbiddenError, InvalidAudioError, InvalidRequestError, NotFoundError, StorageError
from http_middleware import require_owner, run_until_gone
from model_host import RequestQueue
from recordings import read_recording_bytes
from schemas import DeletedVoice, VoiceDetails, VoiceList, refusals
from speech_model import ModelLoadError
from tts_engine import TTSEngine
from voice_presets import Voice, VoiceCatalog, VoicePresetManager
from voice_store import MAX_NAME, MAX_WORDS, StoredVoice, VoiceStore, clean_name

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


logger = logging.getLogger(__name__)

T = TypeVar("T")

_MOST_WAITING = 8  # recordings of up to 10 MiB each, which are in temporary files meanwhile


voice_routes = APIRouter(tags=["voices"])


class VoiceEndpoint:
    """Answers requests about voices.

    Args:
        settings: For whether a request comes from the owner.
        presets: The voices.
        store: Where added voices are kept.
        engine: Knows which voices are ready.
    """

    def __init__(self, settings: Settings, presets: VoicePresetManager, store: VoiceStore, engine: TTSEngine) -> None:
        self._settings = settings
        self._presets = presets
        self._store = store
        self._engine = engine
        # One recording at a time: each may take tens of MB, and all of a core while its words are being heard.
        self._queue = RequestQueue(_MOST_WAITING, settings.queue_timeout)

    def describe(self, voice: Voice) -> dict[str, Any]:
        """One entry of the list."""
        return {
            "id": voice.id,
            "name": voice.name,
            "description": voice.preset.description,
            "model": voice.preset.model,
            "ready": self._engine.host(voice).ready,
            "aliases": self._presets.catalog.aliases_of(voice),
            "uploaded": voice.uploaded,
        }

    def list(self) -> dict[str, Any]:
        """All voices."""
        return {"voices": [self.describe(voice) for voice in self._presets.catalog.voices]}

    def get(self, voice_id: str) -> dict[str, Any]:
        """One voice, by its id alone.

        Raises:
            NotFoundError: There is none.
        """
        return {"object": "audio.voice", "created_at": self._voice(voice_id).created_at} | self.describe(self._voice(voice_id))

    async def add(self, request: Request) -> dict[str, Any]:
        """Keep the voice that a form holds; whatever is refused, or given up by the client, leaves nothing behind.

        Raises:
            TTSError: Who asks may not, too many ask, or the form, the name, the consent or the recording will not do.
            ClientDisconnect: The client went.
        """
        require_owner(request, self._settings)
        async with read_voice_form(request) as form:
            name = clean_name(form.name)
            self._presets.catalog.check_new_name(name)
            stored = await run_until_gone(self._keep(form, name), request.receive)
        await asyncio.to_thread(self._presets.refresh)
        request.state.log_fields["voice"] = stored.id
        return self.get(stored.id) | {"ref_text": stored.description.ref_text}

    async def delete(self, voice_id: str, request: Request) -> dict[str, Any]:
        """Remove an added voice. Who speaks with it at this moment is not disturbed: its recording has been read by then.

        Raises:
            ForbiddenError: Who asks may not, or it is a preset.
            NotFoundError: There is none.
        """
        require_owner(request, self._settings)
        voice = self._presets.catalog.get(voice_id)
        if voice is not None and not voice.uploaded:
            raise ForbiddenError("This voice is a preset of the server's owner, not one that was added here: it is removed with its file.")
        await asyncio.to_thread(self._store.delete, voice_id)
        await asyncio.to_thread(self._presets.refresh)
        return {"id": voice_id, "object": "audio.voice", "deleted": True}

    def _voice(self, voice_id: str) -> Voice:
        voice = self._presets.catalog.get(voice_id)
        if voice is None:
            raise NotFoundError("There is no voice with this id. GET /v1/audio/voices lists the voices.")
        return voice

    def drain(self) -> None:
        """Take no more recordings, and refuse those that wait."""
        self._queue.close()

    async def _keep(self, form: VoiceForm, name: str) -> StoredVoice:
        async with self._queue.slot():
            try:
                samples = await _in_thread(lambda: read_recording_bytes(form.audio_sample.read()))
            except InvalidAudioError as error:
                raise InvalidAudioError(error.message, param="audio_sample") from None
            words = form.ref_text or await _in_thread(lambda: _heard(samples))
            return await _in_thread(lambda: self._store.add(name, samples, words, form.consent))


async def _in_thread(work: Callable[[], T]) -> T:
    """What `work` gives. A thread cannot be stopped, so its end is waited for even when nobody wants its result any more."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        running.exception()  # seen, or asyncio would report it as lost
        raise


def _heard(samples: Samples) -> str:
    """The words of a recording that came without them.

    Raises:
        InvalidRequestError: There is no recogniser, or it heard none.
    """
    from transcription import Recognizer  # a recogniser is large, and seldom needed: loaded for this once, then let go

    needed = "'ref_text' is missing: the words of the recording, exactly as spoken."
    try:
        words = clean_words(Recognizer().transcribe(samples))
    except ModelLoadError as error:
        logger.info("no recogniser for a recording without words: %s", error.message)
        raise InvalidRequestError(
            f"{needed} This server has no speech recogniser to find them.", param="ref_text", code="invalid_ref_text"
        ) from None
    if not words:
        raise InvalidRequestError(f"{needed} The speech recogniser heard none.", param="ref_text", code="invalid_ref_text")
    return words


async def fresh_voices(request: Request) -> VoiceCatalog:
    """Return the voices as they are on disk now. Changes are read in a thread, because a recording may have to be decoded."""
    presets: VoicePresetManager = request.app.state.server.presets
    return await asyncio.to_thread(presets.refresh) if presets.changed() else presets.catalog


FreshVoices = Annotated[VoiceCatalog, Depends(fresh_voices)]
"""The parameter of a route that uses the voices. FastAPI calls the dependency once a request."""


@voice_routes.get("/audio/voices", operation_id="listVoices", summary="List voices", response_model=VoiceList)
async def list_voices(request: Request) -> dict[str, Any]:
    """Every voice, whether it is ready, and the other names that reach it."""
    return _endpoint(request).list()


@voice_routes.post(
    "/audio/voices",
    operation_id="createVoice",
    summary="Add a voice from a recording",
    response_model=VoiceDetails,
    responses=refusals(403, 409, 429),
    openapi_extra=VoiceForm.OPENAPI,
)
async def create_voice(request: Request) -> dict[str, Any]:
    """As OpenAI's custom voices, with the words of the recording; from this machine, or with the key."""
    return await _endpoint(request).add(request)


@voice_routes.get(
    "/audio/voices/{voice_id}", operation_id="getVoice", summary="Get a voice", response_model=VoiceDetails, responses=refusals(404)
)
async def get_voice(voice_id: str, request: Request) -> dict[str, Any]:
    """A voice by its id."""
    return _endpoint(request).get(voice_id)


@voice_routes.delete(
    "/audio/voices/{voice_id}",
    operation_id="deleteVoice",
    summary="Delete an added voice",
    response_model=DeletedVoice,
    responses=refusals(403, 404),
)
async def delete_voice(voice_id: str, request: Request) -> dict[str, Any]:
    """The recording and all that was made from it go with it; from this machine, or with the key."""
    return await _endpoint(request).delete(voice_id, request)


def _endpoint(request: Request) -> VoiceEndpoint:
    endpoint: VoiceEndpoint = request.app.state.server.voices
    return endpoint
