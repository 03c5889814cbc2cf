"""What a speech model is: the shape that both of ours have, and the values that pass in and out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from audio_formats import Samples
from voice_presets import Voice


@dataclass(frozen=True)
class SpeechOptions:
    """How one utterance is to be spoken.

    Attributes:
        seed: Of the utterance's own random stream: the same text, voice and seed give the same samples.
        temperature: The sampler's temperature, in place of the preset's.
        top_k: The sampler's top-k, in place of the preset's.
        streamed: Somebody listens while it is generated, so the first segment's samples are wanted as they come.
    """

    seed: int
    temperature: float | None = None
    top_k: int | None = None
    streamed: bool = False


@dataclass(frozen=True)
class SegmentChunk:
    """Some samples of one segment.

    Chunks come in the text's order: all of segment 0, then all of segment 1. Each segment ends with exactly one chunk whose `last` is true
    (its samples may be empty).

    Attributes:
        segment: The segment's index among those that were asked for.
        samples: float32, shape (n,), at the model's sample rate.
        last: No more of this segment follows.
        retries: How often the segment was generated again (told with the last chunk).
        word_error_rate: What a recogniser made of the segment, where one was asked (told with the last chunk).
    """

    segment: int
    samples: Samples
    last: bool
    retries: int = 0
    word_error_rate: float | None = None


@dataclass(frozen=True)
class SegmentLengths:
    """How long a text a model says well in one go, in characters.

    Attributes:
        target: Sentences are packed together up to this length.
        maximum: A single sentence longer than this is broken at a clause, else at a word.
        first: The target of the first segment, shorter so that sound starts early.
    """

    target: int
    maximum: int
    first: int


@dataclass(frozen=True)
class LoadProgress:
    """The progress of a load.

    Attributes:
        stage: The current step, in words ("downloading model.safetensors", "reading weights").
        done: Bytes downloaded so far; None outside a download.
        total: Bytes to download; None outside a download.
    """

    stage: str
    done: int | None = None
    total: int | None = None

    @property
    def fraction(self) -> float | None:
        """The part that is done, from 0 to 1; None where it is unknown."""
        return self.done / self.total if self.done is not None and self.total else None

    def __str__(self) -> str:
        """Return the progress as people read it: "downloading model.safetensors, 40% of 3100 MB"."""
        return self.stage if self.fraction is None else f"{self.stage}, {self.fraction:.0%} of {(self.total or 0) / 1e6:.0f} MB"


class SpeechModel(Protocol):
    """A model that speaks. All its methods but `info` and `refusal` run on the model's own one thread, from `load` to `close`."""

    id: str
    sample_rate: int
    segment_lengths: SegmentLengths

    def load(self, report: Callable[[LoadProgress], None]) -> None:
        """Make the model ready to speak.

        Raises:
            ModelLoadError: With a sentence that says what failed and what to do.
        """

    def warm_up(self, voices: Sequence[Voice]) -> None:
        """Do once, after the load, what the first caller would else pay for. `voices` are those that this model speaks."""

    def refusal(self, text: str) -> str | None:
        """Why this model cannot say `text`, if that can be seen without trying. Safe to call from any thread, loaded or not."""

    def fits(self, text: str, voice: Voice) -> bool:
        """Whether `text`, behind this voice's prompt, fits into the model's context."""

    def speak(self, segments: Sequence[str], voice: Voice, options: SpeechOptions, cancelled: Callable[[], bool]) -> Iterator[SegmentChunk]:
        """Say each segment in turn.

        `cancelled` is asked at least once a frame; when it says yes, the iterator ends at once, without a last chunk.
        Closing the iterator has the same effect.
        """

    def info(self) -> dict[str, Any]:
        """Facts for `/health`: source, dtype, memory, watermark. Safe to call from any thread, at any time."""

    def close(self) -> None:
        """Give the memory back; `load` may be called again."""


class ModelLoadError(Exception):
    """A load failed; the message says what failed and what to do about it, without a path or a token.

    Attributes:
        retry: Whether another try, later, can succeed without anybody doing anything.
    """

    def __init__(self, message: str, *, retry: bool = True) -> None:
        super().__init__(message)
        self.message = message
        self.retry = retry
