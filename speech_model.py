"""The interface of a speech model, and the values it takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from audio_formats import Samples
from voice_presets import Voice

Codes = NDArray[np.int16]
"""Speech as Mimi's tokens, shape (frames, codebooks)."""

CODEC_FRAMES_PER_SECOND = 12.5
"""Of Mimi, CSM's codec."""


@dataclass(frozen=True)
class ContextPart:
    """Something that was said before.

    Attributes:
        text: Its words.
        speaker: CSM's number of who said it, 0 to 9.
        codes: How it sounded; no frames if that is not known.
    """

    text: str
    speaker: int
    codes: Codes


@dataclass(frozen=True)
class SpeechOptions:
    """The options of one utterance.

    Attributes:
        seed: The same text, voice and seed give the same samples.
        temperature: Overrides the preset's sampling temperature.
        top_k: Overrides the preset's top-k.
        streamed: The samples are sent while they are generated, so the first segment is returned in small chunks.
        verbalize: Numbers, symbols and abbreviations are read out as words; None is NORMALIZE_TEXT. Models get True or False.
        speed: At which the audio is played later. The engine makes the pauses of the text longer by it, so that they are exact then, and
            limits the length of the audio.
        word_times: The times of the words are wanted, so a model that does not know them may find out with a recogniser.
        context: What was said before in the conversation, the oldest first; None if the text belongs to none.
    """

    seed: int
    temperature: float | None = None
    top_k: int | None = None
    streamed: bool = False
    verbalize: bool | None = None
    speed: float = 1.0
    word_times: bool = False
    context: tuple[ContextPart, ...] | None = None


@dataclass(frozen=True)
class SpokenWord:
    """A word of a segment's spoken text, and when it is heard.

    Attributes:
        start_char: Offset of its first character in the text that the model was given.
        end_char: Offset after its last character.
        start: Seconds from the segment's first sample.
        end: Seconds from the segment's first sample.
    """

    start_char: int
    end_char: int
    start: float
    end: float


@dataclass(frozen=True)
class SegmentChunk:
    """Some samples of one segment.

    All chunks of segment 0 come first, then all of segment 1, and so on. Exactly one chunk of each segment, the final one, has `last`
    set; its samples may be empty.

    Attributes:
        segment: The segment's index in the text.
        samples: float32, shape (n,), at the model's sample rate.
        last: Whether this is the segment's final chunk.
        retries: How often the segment was generated again (final chunk only).
        word_error_rate: Between the text and what a recogniser heard, if one checked it (final chunk only).
        words: When each word is heard, in order, if the model knows (final chunk only).
        codes: Its codec tokens so far, if the model generates such.
    """

    segment: int
    samples: Samples
    last: bool
    retries: int = 0
    word_error_rate: float | None = None
    words: tuple[SpokenWord, ...] = ()
    codes: Codes | None = None


@dataclass(frozen=True)
class SegmentLengths:
    """How long a segment may be for a model to speak it well, in characters.

    Attributes:
        target: Sentences are joined up to this length.
        maximum: A longer sentence is split at a clause, else at a word.
        first: The target of the first segment: shorter, so that audio starts early.
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
    """A speech model. All methods except `info` and `refusal` run on the model's own thread."""

    id: str
    sample_rate: int
    takes_phonemes: bool
    """A word may be written as `[word](/phonemes/)`."""
    segment_lengths: SegmentLengths
    takes_turns: bool  # between two segments of `speak`, another text may be spoken
    takes_context: bool
    """Whether `SpeechOptions.context` has an effect."""

    def load(self, report: Callable[[LoadProgress], None]) -> None:
        """Load the model; pass each step to `report`.

        Raises:
            ModelLoadError: Says what failed and what to do.
        """

    def warm_up(self, voices: Sequence[Voice]) -> None:
        """Do the work that would slow down the first request. `voices` are the presets of this model."""

    def refusal(self, text: str) -> str | None:
        """Return why the model cannot speak `text`, or None. Safe to call from any thread, also before the load."""

    def unavailable(self, voice: Voice) -> str | None:
        """Return why this voice cannot speak even when the model is loaded, or None. Safe to call from any thread, at any time."""

    def fits(self, text: str, voice: Voice) -> bool:
        """Return whether the voice's prompt and `text` fit into the model's context."""

    def speak(self, segments: Sequence[str], voice: Voice, options: SpeechOptions, cancelled: Callable[[], bool]) -> Iterator[SegmentChunk]:
        """Speak the segments, one after another.

        The model calls `cancelled` at least once a frame and ends at once, without a final chunk, when it returns true. Closing the
        iterator has the same effect.
        """

    def info(self) -> dict[str, Any]:
        """Return details for `/health`: source, dtype, memory, watermark. Safe to call from any thread, at any time."""

    def close(self) -> None:
        """Free the memory; `load` may be called again."""


class ModelLoadError(Exception):
    """A load failed. The message says what failed and what to do, without a path or a token.

    Attributes:
        retry: Whether a later attempt can succeed without anyone's help.
    """

    def __init__(self, message: str, *, retry: bool = True) -> None:
        super().__init__(message)
        self.message = message
        self.retry = retry
