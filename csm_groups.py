"""What the generation loop carries along: sentence groups, their rows in a batch, and the order in which they are heard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from csm_batch import PromptTokens
from speech_guard import SAMPLE_RATE, Attempt, PauseLimiter, silent
from speech_model import GroupChunk, Samples

# A streamed group that is still silent after this is said again: nothing of it has been heard yet.
_LONGEST_SILENT_START = 2 * SAMPLE_RATE


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: the request's wishes, else the preset's."""

    seed: int
    temperature: float
    top_k: int


@dataclass
class Group:
    """One sentence group on its way.

    Attributes:
        index: Its place in the text.
        text: What is to be said.
        prompt: What the model continues.
        budget: It gets no more frames than this.
        attempts: How it came out so far.
    """

    index: int
    text: str
    prompt: PromptTokens
    budget: int
    attempts: list[Attempt] = field(default_factory=list)


@dataclass
class Row:
    """A group in a batch: the frames it has, of shape (codebooks,) each, whether it ended by itself, and whether it left the batch."""

    group: Group
    frames: list[NDArray[np.int32]] = field(default_factory=list)
    ended: bool = False
    left: bool = False

    def take(self, frame: NDArray[np.int32]) -> None:
        """The next frame; all codebooks 0 is CSM's end of speech."""
        if frame.any():
            self.frames.append(frame)
        else:
            self.ended = True
        self.left = self.ended or len(self.frames) >= self.group.budget


class TextOrder:
    """Holds back what is ready before its turn."""

    def __init__(self) -> None:
        self._ready: dict[int, GroupChunk] = {}
        self._next = 0

    def add(self, chunk: GroupChunk) -> None:
        """A whole group is ready."""
        self._ready[chunk.group] = chunk

    def passed_on(self, group: int) -> None:
        """That group went out by another way."""
        self._next = group + 1

    def release(self) -> Iterator[GroupChunk]:
        """The groups whose turn it is."""
        while self._next in self._ready:
            self._next += 1
            yield self._ready.pop(self._next - 1)


class LiveGroup:
    """A group that is heard while it is generated.

    Args:
        limiter: Shortens its pauses, and has it held back while it is silent; without one all is passed on as it comes.
    """

    def __init__(self, limiter: PauseLimiter | None) -> None:
        self.heard = False
        self.broken = False
        self._limiter = limiter
        self._blocks: list[Samples] = []
        self._held: list[Samples] = []

    @property
    def hopeless(self) -> bool:
        """Whether it should be said again rather than waited for: not a number, or silent for too long."""
        return self.broken or (not self.heard and sum(map(len, self._held)) > _LONGEST_SILENT_START)

    def feed(self, sound: Samples) -> Samples:
        """What may be heard now that `sound`, shape (n,), has come."""
        self._blocks.append(sound)
        self._held.append(sound)
        self.broken = not np.isfinite(sound).all()
        held = np.concatenate(self._held)
        if self.broken or not len(held) or (self._limiter and not self.heard and silent(held)):
            return np.empty(0, np.float32)
        self.heard = True
        self._held = []
        return self._limiter.feed(held) if self._limiter else held

    def flush(self) -> Samples:
        """What is still to be heard at its end."""
        return self._limiter.flush() if self._limiter else np.empty(0, np.float32)

    def samples(self) -> Samples:
        """All of it, as the model gave it."""
        return np.concatenate(self._blocks)
