"""The voices over HTTP: listing them, adding one from a recording, deleting it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from config import Settings
from errors import ForbiddenError, InvalidAudioError, InvalidRequestError, NotFoundError
from http_middleware import require_owner
from recordings import read_recording_bytes
from speech_model import ModelLoadError, Samples
from speech_response import run_until_gone
from speech_turns import Turns
from tts_engine import TTSEngine
from voice_form import VoiceForm, clean_words, read_voice_form
from voice_presets import Voice, VoicePresetManager
from voice_store import StoredVoice, VoiceStore, clean_name

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MOST_WAITING = 8  # recordings of up to 10 MiB each, which are in temporary files meanwhile
_CLIENT_CLOSED = 499  # nginx's status for a client that went away; only our log sees it


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
        self._turns = Turns(_MOST_WAITING, settings.queue_timeout)

    def describe(self, voice: Voice) -> dict[str, Any]:
        """One entry of the list."""
        return {
            "id": voice.id,
            "name": voice.name,
            "description": voice.preset.description,
            "model": voice.preset.model,
            "ready": self._engine.host(voice).ready,
            "aliases": self._presets.aliases_of(voice.id),
            "uploaded": voice.uploaded,
        }

    def list(self) -> dict[str, Any]:
        """All voices."""
        return {"voices": [self.describe(voice) for voice in self._presets.voices()]}

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
            self._presets.check_new_name(name)
            stored = await run_until_gone(self._keep(form, name), request.receive)
        await asyncio.to_thread(self._presets.refresh)
        request.state.facts["voice"] = stored.id
        return self.get(stored.id) | {"ref_text": stored.description.ref_text}

    async def delete(self, voice_id: str, request: Request) -> dict[str, Any]:
        """Remove an added voice. Who speaks with it at this moment is not disturbed: its recording has been read by then.

        Raises:
            ForbiddenError: Who asks may not, or it is a preset.
            NotFoundError: There is none.
        """
        require_owner(request, self._settings)
        if any(voice.id == voice_id and not voice.uploaded for voice in self._presets.voices()):
            raise ForbiddenError("This voice is a preset of the server's owner, not one that was added here: it is removed with its file.")
        await asyncio.to_thread(self._store.delete, voice_id)
        await asyncio.to_thread(self._presets.refresh)
        return {"id": voice_id, "object": "audio.voice", "deleted": True}

    def _voice(self, voice_id: str) -> Voice:
        for voice in self._presets.voices():
            if voice.id == voice_id:
                return voice
        raise NotFoundError("There is no voice with this id. GET /v1/audio/voices lists the voices.")

    def drain(self) -> None:
        """Take no more recordings, and refuse those that wait."""
        self._turns.close()

    async def _keep(self, form: VoiceForm, name: str) -> StoredVoice:
        async with self._turns.turn():
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
    from speech_check import SpeechCheck  # a recogniser is large, and seldom needed: loaded for this once, then let go

    needed = "'ref_text' is missing: the words of the recording, exactly as spoken."
    try:
        words = clean_words(SpeechCheck().transcribe(samples))
    except ModelLoadError as error:
        logger.info("no recogniser for a recording without words: %s", error.message)
        raise InvalidRequestError(
            f"{needed} This server has no speech recogniser to find them.", param="ref_text", code="invalid_ref_text"
        ) from None
    if not words:
        raise InvalidRequestError(f"{needed} The speech recogniser heard none.", param="ref_text", code="invalid_ref_text")
    return words


async def fresh_voices(request: Request) -> None:
    """Before a request is served: read voices that have changed on disk, in a thread, as a recording may have to be decoded."""
    presets: VoicePresetManager = request.app.state.server.presets
    if presets.changed():
        await asyncio.to_thread(presets.refresh)


@voice_routes.get("/audio/voices", summary="The voices")
async def list_voices(request: Request) -> dict[str, Any]:
    """Every voice, whether it is ready, and the other names that reach it."""
    return _endpoint(request).list()


@voice_routes.post("/audio/voices", summary="Add a voice from a recording", openapi_extra=VoiceForm.OPENAPI)
async def create_voice(request: Request) -> Response:
    """As OpenAI's custom voices, with the words of the recording; from this machine, or with the key."""
    try:
        return JSONResponse(await _endpoint(request).add(request))
    except ClientDisconnect:
        return Response(status_code=_CLIENT_CLOSED)


@voice_routes.get("/audio/voices/{voice_id}", summary="One voice")
async def get_voice(voice_id: str, request: Request) -> dict[str, Any]:
    """A voice by its id."""
    return _endpoint(request).get(voice_id)


@voice_routes.delete("/audio/voices/{voice_id}", summary="Delete a voice that was added")
async def delete_voice(voice_id: str, request: Request) -> dict[str, Any]:
    """The recording and all that was made from it go with it; from this machine, or with the key."""
    return await _endpoint(request).delete(voice_id, request)


def _endpoint(request: Request) -> VoiceEndpoint:
    endpoint: VoiceEndpoint = request.app.state.server.voices
    return endpoint
