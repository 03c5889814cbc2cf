"""Conversations: what was said before, kept in memory as the context of the next reply, and /v1/audio/conversations/{id}/turns.

It is kept as text and codec tokens. The routes add the turns of other speakers, list all turns, and forget them.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema
from starlette.datastructures import UploadFile
from starlette.requests import Request

from config import Settings
from errors import NotFoundError
from http_middleware import run_until_gone
from recordings import read_recording_bytes
from schemas import ResponseModel, refusals
from speech_model import CODEC_FRAMES_PER_SECOND, Codes, ContextPart
from tts_engine import TTSEngine
from voice_routes import read_form

_CODEBOOKS = 32

Role = Literal["assistant", "user"]


@dataclass(eq=False)
class Turn:
    """What one speaker said without interruption.

    Attributes:
        role: `assistant` if the server spoke it.
        speaker: CSM's number of the speaker.
        parts: Its segments, in order.
    """

    role: Role
    speaker: int
    parts: list[ContextPart] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All its words."""
        return " ".join(part.text for part in self.parts)

    @property
    def seconds(self) -> float:
        """The length of its audio."""
        return sum(len(part.codes) for part in self.parts) / CODEC_FRAMES_PER_SECOND

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return sum(part.codes.nbytes + len(part.text) for part in self.parts)


@dataclass
class _Conversation:
    turns: list[Turn] = field(default_factory=list)
    used: float = field(default_factory=time.monotonic)


class Conversations:
    """The conversations there are, each under the id that its client has chosen. For the event loop's thread.

    Args:
        settings: How many conversations, turns and bytes are kept, and for how long.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._kept: OrderedDict[str, _Conversation] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def context(self, key: str) -> tuple[ContextPart, ...]:
        """Return what was said so far and how it sounded, the oldest first. A turn without a recording is left out."""
        conversation = self._kept.get(key)
        if conversation is None:
            return ()
        self._touch(key, conversation)
        return tuple(part for turn in conversation.turns for part in turn.parts if len(part.codes))

    def turns(self, key: str) -> list[Turn]:
        """Return the turns, the oldest first.

        Raises:
            NotFoundError: There is no such conversation.
        """
        if key not in self._kept:
            raise NotFoundError(
                "There is no conversation with this id. One is kept from its first turn until CONVERSATION_IDLE_SECONDS after its last use."
            )
        return self._kept[key].turns

    def add(self, key: str, turn: Turn) -> None:
        """Add a turn, and drop what exceeds the limits: the oldest turns, and the conversations that were not used for longest."""
        conversation = self._kept.setdefault(key, _Conversation())
        conversation.turns.append(turn)
        del conversation.turns[: -self._settings.max_conversation_turns]
        self._touch(key, conversation)
        self.shrink()

    def remove(self, key: str, turn: Turn) -> None:
        """Remove one turn, if it is still there."""
        conversation = self._kept.get(key)
        if conversation and turn in conversation.turns:
            conversation.turns.remove(turn)

    def forget(self, key: str) -> None:
        """Remove a conversation.

        Raises:
            NotFoundError: There is no such conversation.
        """
        self.turns(key)
        del self._kept[key]

    def shrink(self) -> None:
        """Drop the conversations that were not used for longest, until the rest is within the limits."""
        sizes = {key: sum(turn.size for turn in conversation.turns) for key, conversation in self._kept.items()}
        total, limit = sum(sizes.values()), self._settings.max_conversations_mb * 1_000_000
        while self._kept and (len(self._kept) > self._settings.max_conversations or total > limit):
            key, _ = self._kept.popitem(last=False)
            total -= sizes[key]

    def _touch(self, key: str, conversation: _Conversation) -> None:
        conversation.used = time.monotonic()
        self._kept.move_to_end(key)
        if self._timer is None:
            self._start_timer(self._settings.conversation_idle_seconds)

    def _start_timer(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._drop_idle)

    def _drop_idle(self) -> None:
        """Forget what has not been used for CONVERSATION_IDLE_SECONDS."""
        self._timer = None
        seconds = self._settings.conversation_idle_seconds
        now = time.monotonic()
        while self._kept and now - next(iter(self._kept.values())).used >= seconds:
            self._kept.popitem(last=False)
        if self._kept:
            self._start_timer(next(iter(self._kept.values())).used + seconds - now)


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


class ConversationTurn(ResponseModel):
    """What one speaker of a conversation said."""

    role: Literal["assistant", "user"]
    speaker: int
    seconds: float
    characters: int
    in_prompt: bool
    text: str | None = None


class ConversationTurns(ResponseModel):
    """The turns of a conversation, the oldest first."""

    turns: list[ConversationTurn]


class ForgottenConversation(ResponseModel):
    """The answer to the deletion of a conversation."""

    id: str
    deleted: Literal[True]


_FORM_DOCUMENT: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": TurnForm.model_json_schema()}}}
}


async def _encoded(recording: UploadFile | None, engine: TTSEngine) -> Codes:
    if recording is None:
        return np.zeros((0, _CODEBOOKS), np.int16)
    samples = await asyncio.to_thread(read_recording_bytes, await recording.read())
    return await engine.encode(samples)


def _described(turn: Turn, *, with_text: bool) -> dict[str, Any]:
    """Return a turn as the API shows it."""
    shown = {"role": turn.role, "speaker": turn.speaker, "seconds": round(turn.seconds, 2), "characters": len(turn.text)}
    shown |= {"in_prompt": any(len(part.codes) for part in turn.parts)}
    return shown | ({"text": turn.text} if with_text else {})


async def _conversations(request: Request) -> Conversations:
    conversations: Conversations = request.app.state.server.conversations
    return conversations


_Conversations = Annotated[Conversations, Depends(_conversations)]

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
async def add_turn(conversation: str, request: Request, conversations: _Conversations) -> dict[str, Any]:
    """Add what somebody else has said, with its recording if there is one: CSM hears it before the next reply. A turn without a recording is listed only."""
    async with read_form(request, TurnForm) as form:
        codes = await run_until_gone(_encoded(form.audio_sample, request.app.state.server.engine), request.receive)
    turn = Turn("user", form.speaker, [ContextPart(form.text, form.speaker, codes)])
    conversations.add(conversation, turn)
    return _described(turn, with_text=True)


@router.get(
    "",
    operation_id="listTurns",
    summary="List the turns of a conversation",
    response_model=ConversationTurns,
    response_model_exclude_unset=True,
    responses=refusals(404),
)
async def list_turns(conversation: str, conversations: _Conversations, text: bool = False) -> dict[str, Any]:
    """Return the turns, the oldest first; with `?text=true` also their words."""
    return {"turns": [_described(turn, with_text=text) for turn in conversations.turns(conversation)]}


@router.delete(
    "", operation_id="forgetConversation", summary="Forget a conversation", response_model=ForgottenConversation, responses=refusals(404)
)
async def forget(conversation: str, conversations: _Conversations) -> dict[str, Any]:
    """Remove the conversation from memory, the only place where it is."""
    conversations.forget(conversation)
    return {"id": conversation, "deleted": True}
