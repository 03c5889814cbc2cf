"""/v1/audio/voices: list voices, add one from a recording, delete one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, TypeVar

import regex
from fastapi import APIRouter, Depends, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, field_validator
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from audio_formats import SAMPLE_RATE, Samples
from config import Settings
from errors import BodyTooLargeError, ForbiddenError, InvalidAudioError, InvalidRequestError, NotFoundError, StorageError
from http_middleware import require_owner, run_until_gone
from model_host import RequestQueue
from recordings import read_recording_bytes
from schemas import ResponseModel, refusals
from speech_model import ModelLoadError
from tts_engine import TTSEngine
from voice_presets import Voice, VoiceCatalog, VoicePresetManager
from voice_store import MAX_NAME, MAX_WORDS, StoredVoice, VoiceStore, clean_name

logger = logging.getLogger(__name__)

T = TypeVar("T")
Form = TypeVar("Form", bound=BaseModel)

MAX_SAMPLE_BYTES = 10 << 20
"""OpenAI's limit for a recording."""

_MAX_CONSENT = 200
_NO_CONSENT = frozenset({"", "false", "no", "0", "off", "f", "n", "none", "null", "undefined"})
_MOST_WAITING = 8  # recordings of up to 10 MiB each, which wait in temporary files
_WORD = regex.compile(r"[\p{L}\p{N}]")
_MOST_LETTERS_A_SECOND = 35  # twice as fast as fluent English: such words belong to another recording
_INVISIBLE = regex.compile(r"[\p{Z}\p{C}]+")


def clean_words(text: str) -> str:
    """Return `text` with single spaces and without invisible characters; empty if it contains no word."""
    cleaned = _INVISIBLE.sub(" ", text).strip()
    return cleaned if _WORD.search(cleaned) else ""


def check_pace(words: str, seconds: float) -> None:
    """Refuse words that cannot be those of a recording: CSM would repeat or skip words of what it speaks later.

    Raises:
        InvalidRequestError: Nobody can say so many words in so short a time.
    """
    if len(_WORD.findall(words)) > _MOST_LETTERS_A_SECOND * seconds:
        count = len(words.split())
        raise _bad_field(
            "ref_text", f"has {count} words, too many for a recording of {seconds:.1f} s. Send the words that are heard in it."
        )


class VoiceForm(BaseModel):
    """The form that adds a voice."""

    model_config = ConfigDict(arbitrary_types_allowed=True, str_strip_whitespace=True)

    name: str = Field(min_length=1, max_length=MAX_NAME, examples=["Grandmother"], description="The name of the voice.")
    consent: str = Field(
        min_length=1,
        max_length=_MAX_CONSENT,
        examples=["true"],
        description="`true`, or the id of a consent: the speaker agrees. Stored with the date.",
    )
    ref_text: Annotated[
        str,
        Field(
            max_length=MAX_WORDS,
            examples=["These are the words that I say in the recording."],
            description="The words of the recording, exactly as spoken. May be left out where a speech recogniser is installed.",
        ),
        AfterValidator(clean_words),
    ] = ""
    audio_sample: Annotated[UploadFile, WithJsonSchema({"type": "string", "format": "binary"})] = Field(
        description="1 to 60 s of speech as WAV, MP3, M4A, FLAC, Ogg, Opus or WebM; up to 10 MiB."
    )

    @field_validator("consent")
    @classmethod
    def _is_consent(cls, consent: str) -> str:
        if consent.lower() in _NO_CONSENT:
            raise ValueError("must be 'true', or the id of a consent: a voice may be used only if its speaker agrees.")
        return consent


class VoiceEntry(ResponseModel):
    """A voice."""

    id: str
    name: str
    display_name: str
    description: str
    model: str
    ready: bool
    reason: str | None
    aliases: list[str]
    uploaded: bool


class VoiceList(ResponseModel):
    """All voices."""

    voices: list[VoiceEntry]


class VoiceDetails(VoiceEntry):
    """A voice, with the Unix time when it was added; null for presets."""

    object: Literal["audio.voice"]
    created_at: int | None


class DeletedVoice(ResponseModel):
    """The answer to the deletion of a voice."""

    id: str
    object: Literal["audio.voice"]
    deleted: Literal[True]


# The form is read here and not by FastAPI, which would read it before it is known whether the client may add a voice, without limits for
# the number of parts, and would report a full disk as a bad request.
_FORM_DOCUMENT: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": VoiceForm.model_json_schema()}}}
}

_FAULTS = {  # by pydantic's error types
    "missing": "is missing, or the form ends before it.",
    "string_type": "must be text, not a file.",
    "string_too_short": "is empty.",
    "is_instance_of": "must be a file: send it with a file name.",
}


@asynccontextmanager
async def read_form(request: Request, kind: type[Form]) -> AsyncIterator[Form]:
    """Read the form of a request. Its recording is in an unnamed temporary file, which is removed when the context ends.

    Raises:
        InvalidRequestError: A field is missing, sent twice, or invalid.
        BodyTooLargeError: The recording is too large.
        StorageError: There is no room for a temporary file.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise _bad_form("The body must be a form, sent as multipart/form-data.")
    try:
        form = await request.form(max_files=2, max_fields=20)
    except HTTPException as error:
        raise _bad_form(f"The form cannot be read: {error.detail}") from None
    except OSError as error:
        logger.error("a form cannot be stored while it is read: %s", error.strerror)  # noqa: TRY400 - the cause is enough
        raise StorageError("The server has no room for a temporary file.") from None
    try:
        yield _validated(form, kind)
    finally:
        await form.close()


def _validated(form: FormData, kind: type[Form]) -> Form:
    for field in kind.model_fields:
        if (count := len(form.getlist(field))) > 1:
            raise _bad_field(field, f"was sent {count} times.")
    try:
        checked = kind.model_validate(dict(form))
    except ValidationError as error:
        raise _explained(error) from None
    _check_size(getattr(checked, "audio_sample", None))
    return checked


def _check_size(recording: UploadFile | None) -> None:
    if recording is None:
        return
    size = recording.size or 0
    if not size:
        raise InvalidAudioError("The recording is empty.", param="audio_sample")
    if size > MAX_SAMPLE_BYTES:
        raise BodyTooLargeError(f"The recording has {size} bytes; at most {MAX_SAMPLE_BYTES} (10 MiB) are allowed.", param="audio_sample")


def _explained(error: ValidationError) -> InvalidRequestError:
    fault: Any = error.errors(include_url=False)[0]
    if fault["type"] == "string_too_long":
        reason = f"has {len(fault['input'].strip())} characters; at most {fault['ctx']['max_length']} are allowed."
    elif fault["type"] == "value_error":
        reason = str(fault["ctx"]["error"])
    else:
        reason = _FAULTS.get(fault["type"], "is not valid.")
    return _bad_field(str(fault["loc"][0]), reason)


def _bad_field(field: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"'{field}' {reason}", param=field, code=f"invalid_{field}")


def _bad_form(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, code="invalid_form")


class VoiceEndpoint:
    """Describes, adds and deletes voices.

    Args:
        settings: Decide whether a request comes from the owner.
        presets: All voices.
        store: The added voices.
        engine: Tells which voices are ready.
    """

    def __init__(self, settings: Settings, presets: VoicePresetManager, store: VoiceStore, engine: TTSEngine) -> None:
        self._settings = settings
        self._presets = presets
        self._store = store
        self._engine = engine
        # One recording at a time: each may take tens of MB, and a whole core while it is transcribed.
        self._queue = RequestQueue(_MOST_WAITING, settings.queue_timeout)

    def describe(self, voice: Voice, catalog: VoiceCatalog) -> dict[str, Any]:
        """Return a voice's entry in the list of voices."""
        reason = self._engine.not_ready_reason(voice)
        return {
            "id": voice.id,
            "name": voice.name,
            "display_name": voice.display_name,
            "description": voice.preset.description,
            "model": voice.preset.model,
            "ready": reason is None,
            "reason": reason,
            "aliases": catalog.aliases_of(voice),
            "uploaded": voice.uploaded,
        }

    def details(self, voice_id: str, catalog: VoiceCatalog) -> dict[str, Any]:
        """Return all about the voice with this id.

        Raises:
            NotFoundError: There is none.
        """
        voice = catalog.get(voice_id)
        if voice is None:
            raise NotFoundError("There is no voice with this id. GET /v1/audio/voices lists the voices.")
        return {"object": "audio.voice", "created_at": voice.created_at} | self.describe(voice, catalog)

    async def add(self, request: Request, catalog: VoiceCatalog) -> dict[str, Any]:
        """Add the voice in the request's form. If it is refused, or the client disconnects, nothing is left on the disk.

        Raises:
            TTSError: The client is not the owner, the queue is full, or the form, the name, the consent or the recording is invalid.
            ClientDisconnect: The client disconnected.
        """
        require_owner(request, self._settings)
        async with read_form(request, VoiceForm) as form:
            name = clean_name(form.name)
            catalog.check_new_name(name)
            stored = await run_until_gone(self._store_voice(form, name), request.receive)
        catalog = await asyncio.to_thread(self._presets.refresh)
        request.state.log_fields["voice"] = stored.id
        return self.details(stored.id, catalog) | {"ref_text": stored.description.ref_text}

    async def delete(self, voice_id: str, request: Request, catalog: VoiceCatalog) -> dict[str, Any]:
        """Delete an added voice. Speech that is being generated with it goes on: the recording has been read before.

        Raises:
            ForbiddenError: The client is not the owner, or the voice is a preset.
            NotFoundError: There is no such voice.
        """
        require_owner(request, self._settings)
        voice = catalog.get(voice_id)
        if voice is not None and not voice.uploaded:
            raise ForbiddenError("This voice is a preset of the server's owner, not an added voice: delete its file to remove it.")
        await asyncio.to_thread(self._store.delete, voice_id)
        await asyncio.to_thread(self._presets.refresh)
        return {"id": voice_id, "object": "audio.voice", "deleted": True}

    def drain(self) -> None:
        """Accept no more recordings, and refuse those that wait."""
        self._queue.close()

    async def _store_voice(self, form: VoiceForm, name: str) -> StoredVoice:
        async with self._queue.slot():
            samples = await _in_thread(lambda: read_recording_bytes(form.audio_sample.file.read()))
            words = form.ref_text or await _in_thread(lambda: _transcribe(samples))
            check_pace(words, len(samples) / SAMPLE_RATE)
            return await _in_thread(lambda: self._store.add(name, samples, words, form.consent))


async def _in_thread(work: Callable[[], T]) -> T:
    """Return the result of `work`. A thread cannot be stopped: when cancelled, wait until `work` has ended.

    Not `anyio.to_thread`: its shield does not hold against the cancellation of an asyncio task, and its threads are not the limited pool.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        running.exception()  # retrieved, or asyncio would log it as lost
        raise


def _transcribe(samples: Samples) -> str:
    """Return the words of a recording that was sent without them.

    Raises:
        InvalidRequestError: There is no recogniser, or it found no words.
    """
    from transcription import Recognizer  # large and seldom needed: loaded for this one call

    needed = "is missing: the words of the recording, exactly as spoken."
    try:
        words = clean_words(Recognizer().transcribe(samples))
    except ModelLoadError as error:
        logger.info("no recogniser for a recording without words: %s", error.message)
        raise _bad_field("ref_text", f"{needed} This server has no speech recogniser to find them.") from None
    if not words:
        raise _bad_field("ref_text", f"{needed} The speech recogniser found none.")
    return words


async def fresh_voices(request: Request) -> VoiceCatalog:
    """Return the voices as they are on disk now. Changes are read in a thread, because a recording may have to be decoded."""
    presets: VoicePresetManager = request.app.state.server.presets
    return await asyncio.to_thread(presets.refresh) if presets.changed() else presets.catalog


async def _endpoint(request: Request) -> VoiceEndpoint:
    endpoint: VoiceEndpoint = request.app.state.server.voices
    return endpoint


FreshVoices = Annotated[VoiceCatalog, Depends(fresh_voices)]
"""The parameter of a route that uses the voices. FastAPI calls the dependency once a request."""

_Endpoint = Annotated[VoiceEndpoint, Depends(_endpoint)]

router = APIRouter(prefix="/audio/voices", tags=["voices"])


@router.get("", operation_id="listVoices", summary="List voices", response_model=VoiceList)
async def list_voices(endpoint: _Endpoint, catalog: FreshVoices) -> dict[str, Any]:
    """List all voices, whether each is ready, and their aliases."""
    return {"voices": [endpoint.describe(voice, catalog) for voice in catalog.voices]}


@router.post(
    "",
    operation_id="createVoice",
    summary="Add a voice from a recording",
    response_model=VoiceDetails,
    responses=refusals(403, 409, 429),
    openapi_extra=_FORM_DOCUMENT,
)
async def create_voice(request: Request, endpoint: _Endpoint, catalog: FreshVoices) -> dict[str, Any]:
    """Like OpenAI's custom voices, plus the words of the recording. Allowed from this machine, or with the API key."""
    return await endpoint.add(request, catalog)


@router.get("/{voice_id}", operation_id="getVoice", summary="Get a voice", response_model=VoiceDetails, responses=refusals(404))
async def get_voice(voice_id: str, endpoint: _Endpoint, catalog: FreshVoices) -> dict[str, Any]:
    """Get a voice by its id."""
    return endpoint.details(voice_id, catalog)


@router.delete(
    "/{voice_id}",
    operation_id="deleteVoice",
    summary="Delete an added voice",
    response_model=DeletedVoice,
    responses=refusals(403, 404),
)
async def delete_voice(voice_id: str, request: Request, endpoint: _Endpoint, catalog: FreshVoices) -> dict[str, Any]:
    """Delete the recording and everything made from it. Allowed from this machine, or with the API key."""
    return await endpoint.delete(voice_id, request, catalog)
