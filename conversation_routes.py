"""/v1/audio/conversations/{id}/turns: add the turns of other speakers, list them, forget them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema
from starlette.datastructures import UploadFile
from starlette.requests import Request

from conversations import Conversations, Turn
from errors import InvalidAudioError
from http_middleware import run_until_gone
from recordings import read_recording_bytes
from schemas import ConversationTurn, ConversationTurns, ForgottenConversation, refusals
from speech_model import Codes, ContextPart
from tts_engine import TTSEngine
from voice_routes import read_form

_CODEBOOKS = 32


def _words(text: str) -> str:
    text = " ".join(text.split())
    if not text:
        raise ValueError("is empty.")
    return text


class TurnForm(BaseModel):
    """A turn of another speaker."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    text: Annotated[str, Field(max_length=4000, description="What was said."), AfterValidator(_words)]
    speaker: int = Field(1, ge=0, le=9, description="CSM's number of the speaker. The voices that come with the server have 0.")
    audio_sample: Annotated[UploadFile | None, WithJsonSchema({"type": "string", "format": "binary"})] = Field(
        None,
        description="1 to 60 s of it, as for a voice. Without it the turn is listed, but is not in the next reply's prompt (`in_prompt`).",
    )


_FORM_DOCUMENT: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": TurnForm.model_json_schema()}}}
}


class ConversationEndpoint:
    """Adds, lists and forgets turns.

    Args:
        conversations: Where they are kept.
        engine: Encodes recordings.
    """

    def __init__(self, conversations: Conversations, engine: TTSEngine) -> None:
        self.conversations = conversations
        self._engine = engine

    async def add(self, key: str, request: Request) -> dict[str, Any]:
        """Add the turn in the request's form.

        Raises:
            TTSError: The form or the recording is invalid, or CSM, which has to encode it, is not ready.
            ClientDisconnect: The client disconnected.
        """
        async with read_form(request, TurnForm) as form:
            codes = await run_until_gone(self._encoded(form.audio_sample), request.receive)
        turn = Turn("user", form.speaker, [ContextPart(form.text, form.speaker, codes)])
        self.conversations.add(key, turn)
        return described(turn, with_text=True)

    async def _encoded(self, recording: UploadFile | None) -> Codes:
        if recording is None:
            return np.zeros((0, _CODEBOOKS), np.int16)
        data = await recording.read()
        try:
            samples = await asyncio.to_thread(read_recording_bytes, data)
        except InvalidAudioError as error:
            raise InvalidAudioError(error.message, param="audio_sample") from None
        return await self._engine.encode(samples)


def described(turn: Turn, *, with_text: bool) -> dict[str, Any]:
    """Return a turn as the API shows it."""
    shown = {"role": turn.role, "speaker": turn.speaker, "seconds": round(turn.seconds, 2), "characters": len(turn.text)}
    shown |= {"in_prompt": any(len(part.codes) for part in turn.parts)}
    return shown | ({"text": turn.text} if with_text else {})


async def _endpoint(request: Request) -> ConversationEndpoint:
    endpoint: ConversationEndpoint = request.app.state.server.conversations
    return endpoint


Endpoint = Annotated[ConversationEndpoint, Depends(_endpoint)]

router = APIRouter(tags=["conversations"], prefix="/audio/conversations/{conversation}/turns")


@router.post(
    "",
    operation_id="addTurn",
    summary="Add a turn of another speaker",
    response_model=ConversationTurn,
    response_model_exclude_unset=True,
    openapi_extra=_FORM_DOCUMENT,
    responses=refusals(429),
)
async def add_turn(conversation: str, request: Request, endpoint: Endpoint) -> dict[str, Any]:
    """Add what somebody else has said, with its recording if there is one: CSM hears it before the next reply. A turn without a recording is listed only."""
    return await endpoint.add(conversation, request)


@router.get(
    "",
    operation_id="listTurns",
    summary="List the turns of a conversation",
    response_model=ConversationTurns,
    response_model_exclude_unset=True,
    responses=refusals(404),
)
async def list_turns(conversation: str, endpoint: Endpoint, text: bool = False) -> dict[str, Any]:
    """Return the turns, the oldest first; with `?text=true` also their words."""
    return {"turns": [described(turn, with_text=text) for turn in endpoint.conversations.turns(conversation)]}


@router.delete(
    "", operation_id="forgetConversation", summary="Forget a conversation", response_model=ForgottenConversation, responses=refusals(404)
)
async def forget(conversation: str, endpoint: Endpoint) -> dict[str, Any]:
    """Remove the conversation from memory, the only place where it is."""
    endpoint.conversations.forget(conversation)
    return {"id": conversation, "deleted": True}
