"""Generates CSM segments: batches, streaming, cancellation, retries, and text order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from mlx_audio.tts.models.sesame import Model
from numpy.typing import NDArray

from audio_formats import Samples
from config import Settings
from csm_decoding import BATCH_POSITIONS, CONTEXT, CodecDecoder, FrameBatch, PromptTokens, RowSampler, attempt_seed, memory_errors
from csm_prompts import PromptStore
from csm_quality import FRAME_MS, SAMPLE_RATE, Attempt, Fault, PauseLimiter, best, frame_budget, judge, repaired, silent
from errors import InputTooLongError, InternalError
from speech_model import SegmentChunk, SpeechOptions
from transcription import MOST_WORD_ERRORS, Recognizer
from voice_presets import Voice

# A streamed segment that is still silent after this is said again: nothing of it has been heard yet.
_LONGEST_SILENT_START = 2 * SAMPLE_RATE


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: the request's wishes, else the preset's."""

    seed: int
    temperature: float
    top_k: int


@dataclass
class Segment:
    """One segment on its way.

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
    """A segment in a batch: the frames it has, of shape (codebooks,) each, whether it ended by itself, and whether it left the batch."""

    segment: Segment
    frames: list[NDArray[np.int32]] = field(default_factory=list)
    ended: bool = False
    left: bool = False

    def take(self, frame: NDArray[np.int32]) -> None:
        """The next frame; all codebooks 0 is CSM's end of speech."""
        if frame.any():
            self.frames.append(frame)
        else:
            self.ended = True
        self.left = self.ended or len(self.frames) >= self.segment.budget


class TextOrder:
    """Holds back what is ready before its turn."""

    def __init__(self) -> None:
        self._ready: dict[int, SegmentChunk] = {}
        self._next = 0

    def add(self, chunk: SegmentChunk) -> None:
        """A whole segment is ready."""
        self._ready[chunk.segment] = chunk

    def passed_on(self, segment: int) -> None:
        """That segment went out by another way."""
        self._next = segment + 1

    def release(self) -> Iterator[SegmentChunk]:
        """The segments whose turn it is."""
        while self._next in self._ready:
            self._next += 1
            yield self._ready.pop(self._next - 1)


class LiveSegment:
    """A segment that is heard while it is generated.

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


logger = logging.getLogger(__name__)

_WARM_UP_FRAMES = 2
_WARM_UP_TEXT = "Hi."

_Check = Callable[[], None]


class _CancelledError(Exception):
    """Nobody waits for this utterance any more."""


class CsmSpeaker:
    """Speaks with a loaded CSM. Everything happens on the thread that loaded the model.

    Args:
        model: mlx_audio.tts.models.sesame.Model.
        prompts: The voices' prompts.
        settings: max_batch, guard, max_retries, max_pause_ms and verify.

    Raises:
        ModelLoadError: VERIFY asks for a recogniser and there is none.
    """

    def __init__(self, model: Model, prompts: PromptStore, settings: Settings) -> None:
        self._model = model
        self._prompts = prompts
        self._guarded = settings.guard == "on"
        self._most_attempts = 1 + (settings.max_retries if self._guarded else 0)
        self._max_batch = settings.max_batch
        self._max_pause_ms = settings.max_pause_ms
        self._decoder = CodecDecoder(model)
        self._check = Recognizer() if settings.verify == "whisper" else None

    def fits(self, text: str, voice: Voice) -> bool:
        """Whether the voice's prompt, `text` and the frames that it takes to say it stay within the model's context."""
        tokens, _ = self._prompts.tokens(voice, text.strip())
        return len(tokens) + frame_budget(text, voice.preset.max_audio_length_ms) <= CONTEXT

    def warm_up(self, voices: Sequence[Voice]) -> None:
        """Have each voice's prompt encoded, and say a few frames, so that the first caller does not wait for kernels to be compiled."""
        with memory_errors(), self._cleaned_up():
            for place, voice in enumerate(voices):
                rows = 2 if place == 0 and self._max_batch > 1 else 1
                sampler = RowSampler(range(rows), voice.preset.temperature, voice.preset.top_k)
                batch = FrameBatch(self._model.model, [self._prompts.tokens(voice, _WARM_UP_TEXT)] * rows, sampler)
                frames = [batch.step(more=left > 0)[0] for left in reversed(range(_WARM_UP_FRAMES))]
                if place == 0:
                    self._decode(frames, lambda: None)

    def speak(self, segments: Sequence[str], voice: Voice, options: SpeechOptions, cancelled: Callable[[], bool]) -> Iterator[SegmentChunk]:
        """Say the segments, as `SpeechModel.speak`; `cancelled` is asked before each frame and each decoded block.

        Raises:
            InputTooLongError: A segment leaves no room for its own sound in the model's context.
            InternalError: The model gave nothing that can be played, however often it was asked.
            InsufficientMemoryError: MLX ran out of memory.
        """

        def check() -> None:
            if cancelled():
                raise _CancelledError

        try:
            with memory_errors(), self._cleaned_up():
                yield from self._speak(segments, voice, options, check)
        except _CancelledError:
            return

    @contextmanager
    def _cleaned_up(self) -> Iterator[None]:
        """Leave nothing of an utterance behind: neither the codec's state nor the caches, which mlx-audio keeps until the next."""
        try:
            yield
        finally:
            self._decoder.begin()
            self._model.model.reset_caches()
            mx.clear_cache()

    def _speak(self, texts: Sequence[str], voice: Voice, options: SpeechOptions, check: _Check) -> Iterator[SegmentChunk]:
        check()
        preset = voice.preset
        temperature = preset.temperature if options.temperature is None else options.temperature
        sampling = Sampling(options.seed, temperature, preset.top_k if options.top_k is None else options.top_k)
        order = TextOrder()
        pending = []
        for index, text in enumerate(texts):
            if text.strip():
                pending.append(self._segment(index, text.strip(), voice))
            else:
                order.add(SegmentChunk(index, np.empty(0, np.float32), last=True))
        yield from order.release()
        if options.streamed and pending:
            first = pending.pop(0)
            yield from self._stream(first, sampling, check)
            order.passed_on(first.index)
            yield from order.release()
        while pending:
            for row in self._generate(self._next_batch(pending), sampling, check):
                if not row.left:
                    continue
                chunk = self._finish(row, check)
                if chunk is None:
                    pending.append(row.segment)
                else:
                    order.add(chunk)
                    yield from order.release()

    def _segment(self, index: int, text: str, voice: Voice) -> Segment:
        prompt = self._prompts.tokens(voice, text)
        longest_ms = voice.preset.max_audio_length_ms
        budget = frame_budget(text, longest_ms) if self._guarded else max(1, int(longest_ms / FRAME_MS))
        room = CONTEXT - len(prompt[0])
        if room < 1:
            raise InputTooLongError(
                "A part of the text is too long to be said after this voice's prompt: break it into sentences.", param="input"
            )
        return Segment(index, text, prompt, min(budget, room))

    def _next_batch(self, pending: list[Segment]) -> list[Segment]:
        """Take segments from `pending`, in text order, as many as fit side by side into the context and into `BATCH_POSITIONS`."""
        pending.sort(key=lambda segment: segment.index)
        count = 1
        while count < min(self._max_batch, len(pending)):
            rows = pending[: count + 1]
            length = max(len(row.prompt[0]) for row in rows) + max(row.budget for row in rows)
            if length > CONTEXT or length * len(rows) > BATCH_POSITIONS:
                break
            count += 1
        batch = pending[:count]
        del pending[:count]
        return batch

    def _generate(self, segments: Sequence[Segment], sampling: Sampling, check: _Check) -> Iterator[Row]:
        """The loop: each row is yielded after each of its frames, for the last time with `left`."""
        seeds = [attempt_seed(sampling.seed, segment.index, len(segment.attempts)) for segment in segments]
        sampler = RowSampler(seeds, sampling.temperature, sampling.top_k)
        batch = FrameBatch(self._model.model, [segment.prompt for segment in segments], sampler)
        rows = [Row(segment) for segment in segments]
        while rows:
            check()
            frames = batch.step(more=any(len(row.frames) + 1 < row.segment.budget for row in rows))
            for row, frame in zip(rows, frames, strict=True):
                row.take(frame)
            staying = [place for place, row in enumerate(rows) if not row.left]
            if 0 < len(staying) < len(rows):
                batch.keep(staying)
            yield from rows
            rows = [rows[place] for place in staying]

    def _decode(self, frames: Sequence[NDArray[np.int32]], check: _Check) -> Samples:
        """The samples of a whole segment."""
        self._decoder.begin()
        blocks = []
        for frame in frames:
            blocks.append(self._decoder.push(frame))
            if len(blocks[-1]):
                check()
        return np.concatenate([*blocks, self._decoder.finish()])

    def _finish(self, row: Row, check: _Check) -> SegmentChunk | None:
        """Decode and judge a segment that left its batch; None if it is to be said again."""
        attempt = self._judged(row.segment, self._decode(row.frames, check), row.ended)
        return self._settled(row.segment, attempt)

    def _judged(self, segment: Segment, samples: Samples, ended: bool) -> Attempt:
        faults = judge(segment.text, samples, ended)
        if not self._guarded:
            faults = tuple(fault for fault in faults if fault is Fault.NOT_FINITE)
        if self._check is None or any(fault.unusable for fault in faults):
            return Attempt(samples, ended, faults)
        rate = self._check.word_error_rate(segment.text, samples)
        if self._guarded and rate is not None and rate > MOST_WORD_ERRORS:
            faults = (*faults, Fault.WRONG_WORDS)
        return Attempt(samples, ended, faults, rate)

    def _settled(self, segment: Segment, attempt: Attempt) -> SegmentChunk | None:
        """The segment as it is to be heard; None if it is to be said again.

        Raises:
            InternalError: None of its attempts can be played.
        """
        segment.attempts.append(attempt)
        _report(segment, attempt)
        if attempt.faults and len(segment.attempts) < self._most_attempts:
            return None
        chosen = best(segment.attempts)
        if not chosen.usable:
            raise _unplayable(segment)
        samples = self._decoder.watermarked(repaired(segment.text, chosen))
        if self._guarded:
            limiter = PauseLimiter(self._max_pause_ms)
            samples = np.concatenate([limiter.feed(samples), limiter.flush()])
        return SegmentChunk(segment.index, samples, True, len(segment.attempts) - 1, chosen.word_error_rate)

    def _stream(self, segment: Segment, sampling: Sampling, check: _Check) -> Iterator[SegmentChunk]:
        """Say a segment alone and pass it on as it comes. As long as nothing of it was heard, it can be said again."""
        while True:
            live = LiveSegment(PauseLimiter(self._max_pause_ms) if self._guarded else None)
            self._decoder.begin()
            for row in self._generate([segment], sampling, check):
                sound = self._decoder.finish() if row.ended else self._decoder.push(row.frames[-1])
                if row.left and not row.ended:
                    sound = np.concatenate([sound, self._decoder.finish()])
                heard = live.feed(sound)
                if live.broken and live.heard:
                    raise _unplayable(segment)
                if live.hopeless:
                    break
                if len(heard):
                    yield SegmentChunk(segment.index, self._decoder.watermarked(heard), last=False)
            attempt = self._judged(segment, live.samples(), row.ended)
            if live.heard:
                segment.attempts.append(attempt)
                _report(segment, attempt)
                rest = self._decoder.watermarked(live.flush())
                yield SegmentChunk(segment.index, rest, True, len(segment.attempts) - 1, attempt.word_error_rate)
                return
            chunk = self._settled(segment, attempt)
            if chunk is not None:
                yield chunk
                return


def _report(segment: Segment, attempt: Attempt) -> None:
    """One line about an attempt that has something wrong with it; the text is nobody's business."""
    if attempt.faults:
        faults = ", ".join(fault.name.lower().replace("_", " ") for fault in attempt.faults)
        seconds = len(attempt.samples) / SAMPLE_RATE
        logger.warning("segment %d, attempt %d, %.1f s: %s", segment.index + 1, max(1, len(segment.attempts)), seconds, faults)
    if attempt.word_error_rate is not None:
        logger.info("segment %d: word error rate %.2f", segment.index + 1, attempt.word_error_rate)


def _unplayable(segment: Segment) -> InternalError:
    attempts = max(1, len(segment.attempts))
    return InternalError(
        f"The model gave no sound that can be played for segment {segment.index + 1} of the text, in {attempts} attempt(s). "
        "Try again with another seed, or with another voice."
    )
