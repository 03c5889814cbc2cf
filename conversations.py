"""Keep the last turns of conversations, in memory only: what was said, as text and codec tokens, is the context of the next reply."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal

from config import Settings
from errors import NotFoundError
from speech_model import CODEC_FRAMES_PER_SECOND, ContextPart

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
