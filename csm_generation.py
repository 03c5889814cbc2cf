"""Speaks with a loaded CSM: batches of segments, streaming, retries, cancellation, text order."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice

import mlx.core as mx
import numpy as np
from mlx_audio.tts.models.sesame import Model
from numpy.typing import NDArray

from audio_formats import SAMPLE_RATE, Samples
from config import Settings
from csm_decoding import (
    BATCH_POSITIONS,
    CONTEXT,
    CodecDecoder,
    FrameBatch,
    PrefixCache,
    PromptTokens,
    RowSampler,
    attempt_seed,
    memory_errors,
)
from csm_prompts import PromptStore, joined
from csm_quality import FRAME_MS, Attempt, Fault, Pace, PauseLimiter, best, frame_budget, judge, repaired, silent
from errors import InputTooLongError, InternalError
from speech_model import Codes, ContextPart, SegmentChunk, SpeechOptions, SpokenWord
from transcription import Hearing, Recognizer, installed_recognizer
from voice_presets import Voice

logger = logging.getLogger(__name__)

# Samples. A streamed segment that is still silent after this is retried: nothing of it was sent yet.
_LONGEST_SILENT_START = 2 * SAMPLE_RATE
# With VERIFY=auto, this share of the segments that the guard finds right is transcribed, too.
_SAMPLED = 10
SAMPLE_SEED = 1 << 32  # an attempt's number that no attempt has
_FRAME_SAMPLES = SAMPLE_RATE * FRAME_MS // 1000
_WARM_UP_FRAMES = 2
_CHECKED_FRAMES = 50  # of all rows together
_WARM_UP_TEXT = "Hi."

_Check = Callable[[], None]
"""Raises _CancelledError when the request is cancelled."""


class _CancelledError(Exception):
    """The request is cancelled."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: as the request says, else as the preset says."""

    seed: int
    temperature: float
    top_k: int


@dataclass
class Segment:
    """One segment of the text, and the attempts at it so far."""

    index: int
    text: str
    prompt: PromptTokens
    budget: int  # the most frames
    pace: Pace  # of the voice in this request
    sampled: bool  # transcribed even if nothing is wrong with it
    timed: bool  # the times of its words are wanted
    indent: int  # the white space before it in the text that the model was given
    prefix: list[mx.array] | None  # the beginning of the prompt that was already read (PrefixCache)
    attempts: list[Attempt] = field(default_factory=list)


@dataclass
class Row:
    """A segment in a batch."""

    segment: Segment
    frames: list[NDArray[np.int32]] = field(default_factory=list)  # shape (codebooks,) each
    ended: bool = False  # by the model, not by the budget
    left: bool = False  # the batch

    def add(self, frame: NDArray[np.int32]) -> None:
        """Add the next frame; all codebooks 0 is CSM's end of speech."""
        if frame.any():
            self.frames.append(frame)
        else:
            self.ended = True
        self.left = self.ended or len(self.frames) >= self.segment.budget


class TextOrder:
    """Puts finished segments into the text's order."""

    def __init__(self, first: int = 0) -> None:
        self._ready: dict[int, SegmentChunk] = {}
        self._next = first

    def add(self, chunk: SegmentChunk) -> None:
        """Add a complete segment."""
        self._ready[chunk.segment] = chunk

    def skip(self, segment: int) -> None:
        """Continue after `segment`, which was streamed."""
        self._next = segment + 1

    def release(self) -> Iterator[SegmentChunk]:
        """Yield the segments that are next in the text."""
        while self._next in self._ready:
            self._next += 1
            yield self._ready.pop(self._next - 1)


class LiveSegment:
    """A segment that is streamed while it is generated.

    Args:
        limiter: Shortens its pauses. With it, silence at the beginning is held back; without it, nothing is.
    """

    def __init__(self, limiter: PauseLimiter | None) -> None:
        self.heard = False
        self.broken = False
        self._limiter = limiter
        self._blocks: list[Samples] = []
        self._held: list[Samples] = []
        self._sent: list[Samples] = []

    @property
    def hopeless(self) -> bool:
        """Whether to stop and retry it: it has a sample that is not a number, or is silent for too long."""
        return self.broken or (not self.heard and sum(map(len, self._held)) > _LONGEST_SILENT_START)

    def feed(self, block: Samples) -> Samples:
        """Take the next block, shape (n,); return the samples that can be sent now."""
        self._blocks.append(block)
        self._held.append(block)
        self.broken = not np.isfinite(block).all()
        held = np.concatenate(self._held)
        if self.broken or not len(held) or (self._limiter and not self.heard and silent(held)):
            return np.empty(0, np.float32)
        self.heard = True
        self._held = []
        self._sent.append(self._limiter.feed(held) if self._limiter else held)
        return self._sent[-1]

    def flush(self) -> Samples:
        """Return the samples that are left at the end."""
        self._sent.append(self._limiter.flush() if self._limiter else np.empty(0, np.float32))
        return self._sent[-1]

    def sent(self) -> Samples:
        """Return the whole segment as it was sent."""
        return np.concatenate(self._sent)

    def samples(self) -> Samples:
        """Return the whole segment as the model generated it."""
        return np.concatenate(self._blocks)


class CsmSpeaker:
    """Speaks with a loaded CSM. Use it only on the thread that loaded the model.

    Args:
        model: The loaded CSM.
        prompts: The voices' prompts.
        settings: The limits and the quality checks.
        faults: Counts each fault of an attempt, by its label.

    Raises:
        ModelLoadError: VERIFY=whisper needs a recogniser and there is none.
    """

    def __init__(self, model: Model, prompts: PromptStore, settings: Settings, faults: Counter[str] | None = None) -> None:
        self._model = model
        self._prompts = prompts
        self._guarded = settings.guard == "on"
        self._most_attempts = 1 + (settings.max_retries if self._guarded else 0)
        self._max_batch = settings.max_batch
        self._max_pause_ms = settings.max_pause_ms
        self._context_segments = settings.context_segments
        self._prefixes = PrefixCache(model.model)
        self._decoder = CodecDecoder(model)
        self._faults = Counter() if faults is None else faults
        self._verify = settings.verify
        self._recognizer = Recognizer() if settings.verify == "whisper" else None
        self._empty: tuple[Voice, int] | None = None  # the voice of the coming request, and the length of its prompt without a text

    def fits(self, text: str, voice: Voice) -> bool:
        """Return whether the voice's prompt, `text` and its frames fit into the model's context."""
        room = CONTEXT - frame_budget(text, voice.preset.max_audio_length_ms)
        if self._empty is None or self._empty[0] is not voice:
            self._empty = (voice, len(self._prompts.tokens(voice, "")[0]))
        # A text has at most as many tokens as bytes, and a space before it. Tokenizing takes 10 ms.
        if self._empty[1] + len(text.strip().encode("utf-8", "replace")) + 1 <= room:
            return True
        return len(self._prompts.tokens(voice, text.strip())[0]) <= room

    def encode(self, samples: Samples) -> Codes:
        """Return the codec tokens of a recording at 24 kHz."""
        with memory_errors():
            return self._prompts.encode(samples)

    def warm_up(self, voices: Sequence[Voice], *, checked: bool = False) -> bool:
        """Encode each voice's prompt and generate a few frames, so that the first request does not wait for kernels to compile.

        Args:
            voices: The first one is used for a full batch, too.
            checked: Whether to look at the logits after each prompt and of at least 50 frames.

        Returns:
            Whether all logits were finite numbers; True if not `checked`.
        """
        finite = True
        sizes = [self._max_batch] if self._max_batch > 1 else []
        with memory_errors(), self._cleaned_up():
            for rows, voice in [(size, voice) for size in sizes for voice in voices[:1]] + [(1, voice) for voice in voices]:
                sampler = RowSampler(range(rows), voice.preset.temperature, voice.preset.top_k)
                prompts = [self._prompts.tokens(voice, _WARM_UP_TEXT)] * rows
                batch = FrameBatch(self._model.model, prompts, sampler, self._prefix(voice))
                if checked:
                    finite &= batch.all_finite(-(-_CHECKED_FRAMES // rows) if rows == self._max_batch else 1)
                frames = [batch.step(more=left > 0)[0] for left in reversed(range(_WARM_UP_FRAMES))]
            if voices:
                self._decode(frames, lambda: None)
        return finite

    def speak(self, segments: Sequence[str], voice: Voice, options: SpeechOptions, cancelled: Callable[[], bool]) -> Iterator[SegmentChunk]:
        """Speak the segments as `SpeechModel.speak` does; call `cancelled` before each frame and each decoded block.

        Raises:
            InputTooLongError: A segment leaves no room for its frames in the model's context.
            InternalError: The model produced no usable audio in all attempts.
            InsufficientMemoryError: MLX ran out of memory.
        """

        def check() -> None:
            if cancelled():
                raise _CancelledError

        try:
            with memory_errors(), self._cleaned_up():
                speak = self._in_order if self._context_segments else self._speak
                yield from speak(segments, voice, options, check)
        except _CancelledError:
            return

    @contextmanager
    def _cleaned_up(self) -> Iterator[None]:
        """Reset the codec and free the memory at the end."""
        try:
            yield
        finally:
            self._decoder.begin()
            mx.clear_cache()

    def _in_order(self, texts: Sequence[str], voice: Voice, options: SpeechOptions, check: _Check) -> Iterator[SegmentChunk]:
        """Speak one segment after another, each after up to CONTEXT_SEGMENTS of those before it."""
        said: list[ContextPart] = []
        for index, text in enumerate(texts):
            context = (*(options.context or ()), *said[-self._context_segments :])
            streamed = options.streamed and index == 0
            for chunk in self._speak([text], voice, replace(options, context=context, streamed=streamed), check, index):
                yield chunk
                if chunk.last and chunk.codes is not None:
                    said.append(ContextPart(text.strip(), voice.preset.speaker_id, chunk.codes))

    def _speak(self, texts: Sequence[str], voice: Voice, options: SpeechOptions, check: _Check, first: int = 0) -> Iterator[SegmentChunk]:
        check()
        self._empty = None  # the voice's files may change until the next request
        preset = voice.preset
        temperature = preset.temperature if options.temperature is None else options.temperature
        sampling = Sampling(options.seed, temperature, preset.top_k if options.top_k is None else options.top_k)
        order = TextOrder(first)
        context = None if options.context is None else self._fitting(options.context, texts, voice)
        pace = Pace(*self._prompts.reading(voice)) if self._guarded else Pace()
        coming = _with_text(enumerate(texts, first), lambda index, text: self._segment(index, text, voice, pace, options, context), order)
        pending: list[Segment] = []
        if options.streamed and (live := next(coming, None)):
            yield from order.release()
            yield from self._stream(live, sampling, check)
            order.skip(live.index)
        while True:
            # Only as many as the next batch may have: a text is read out when it is taken.
            pending += islice(coming, max(0, self._max_batch - len(pending)))
            yield from order.release()
            if not pending:
                return
            for row in self._generate(self._next_batch(pending), sampling, check):
                if not row.left:
                    continue
                chunk = self._finish(row, check)
                if chunk is None:
                    pending.append(row.segment)
                else:
                    order.add(chunk)
                    yield from order.release()

    def _fitting(self, context: Sequence[ContextPart], texts: Sequence[str], voice: Voice) -> list[ContextPart]:
        """Return the latest parts of the context that leave room for the voice's prompt and each of the texts with its frames."""
        longest_ms = voice.preset.max_audio_length_ms
        needed = max((len(self._prompts.text(voice, text.strip())[0]) + frame_budget(text, longest_ms) for text in texts), default=0)
        alone, *said = self._prompts.segments(voice, context)
        room = CONTEXT - len(alone[0]) - needed
        count = 0
        for tokens, _ in reversed(said):
            room -= len(tokens)
            if room < 0:
                break
            count += 1
        return list(context[len(context) - count :])

    def _prompt(self, text: str, voice: Voice, context: Sequence[ContextPart] | None) -> tuple[PromptTokens, list[mx.array] | None]:
        """Return a segment's prompt and the state of its beginning, if that was read already."""
        if context is None:
            return self._prompts.tokens(voice, text), self._prefix(voice)
        segments = self._prompts.segments(voice, context)
        return joined(*segments, self._prompts.text(voice, text)), self._prefixes.get(*segments)

    def _segment(
        self, index: int, given: str, voice: Voice, pace: Pace, options: SpeechOptions, context: Sequence[ContextPart] | None = None
    ) -> Segment:
        text = given.strip()
        prompt, prefix = self._prompt(text, voice, context)
        longest_ms = voice.preset.max_audio_length_ms
        budget = frame_budget(text, longest_ms) if self._guarded else max(1, int(longest_ms / FRAME_MS))
        room = CONTEXT - len(prompt[0])
        if room < 1:
            raise InputTooLongError(
                "A part of the text is too long for the model together with this voice's prompt: split it into sentences.", param="input"
            )
        sampled = attempt_seed(options.seed, index, SAMPLE_SEED) % _SAMPLED == 0
        indent = len(given) - len(given.lstrip())
        return Segment(index, text, prompt, min(budget, room), pace, sampled, options.word_times, indent, prefix)

    def _prefix(self, voice: Voice) -> list[mx.array] | None:
        alone = self._prompts.alone(voice)
        return None if alone is None else self._prefixes.get(alone)

    def _next_batch(self, pending: list[Segment]) -> list[Segment]:
        """Remove and return the first segments of `pending`, in text order, as many as fit into the context and `BATCH_POSITIONS`."""
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

    def _generate(
        self, segments: Sequence[Segment], sampling: Sampling, check: _Check, ahead: Callable[[], bool] = lambda: True
    ) -> Iterator[Row]:
        """Generate a batch of segments; yield each row after each of its frames, the last time with `left`.

        `ahead`: whether the frame after the next one may be started before the caller has handled the next one.
        """
        seeds = [attempt_seed(sampling.seed, segment.index, len(segment.attempts)) for segment in segments]
        sampler = RowSampler(seeds, sampling.temperature, sampling.top_k)
        # All segments of a request have the same voice.
        batch = FrameBatch(self._model.model, [segment.prompt for segment in segments], sampler, segments[0].prefix)
        rows = [Row(segment) for segment in segments]
        while rows:
            check()
            frames = batch.step(more=ahead() and any(len(row.frames) + 1 < row.segment.budget for row in rows))
            for row, frame in zip(rows, frames, strict=True):
                row.add(frame)
            staying = [place for place, row in enumerate(rows) if not row.left]
            if 0 < len(staying) < len(rows):
                batch.keep(staying)
            yield from rows
            rows = [rows[place] for place in staying]

    def _decode(self, frames: Sequence[NDArray[np.int32]], check: _Check) -> Samples:
        """Return the samples of a whole segment."""
        self._decoder.begin()
        blocks = []
        for frame in frames:
            blocks.append(self._decoder.push(frame))
            if len(blocks[-1]):
                check()
        return np.concatenate([*blocks, self._decoder.finish()])

    def _finish(self, row: Row, check: _Check) -> SegmentChunk | None:
        """Decode and check a segment that left its batch; return None to retry it."""
        attempt = self._judged(row.segment, self._decode(row.frames, check), row.ended)
        return self._settled(row.segment, replace(attempt, frames=row.frames))

    def _judged(self, segment: Segment, samples: Samples, ended: bool) -> Attempt:
        faults = judge(segment.text, samples, ended, segment.pace)
        if not self._guarded:
            faults = tuple(fault for fault in faults if fault is Fault.NOT_FINITE)
        hearing = None if any(fault.unusable for fault in faults) else self._hear(segment, samples, faults)
        if self._guarded and hearing and hearing.wrong:
            faults = (*faults, Fault.WRONG_WORDS)
        return Attempt(samples, ended, faults, hearing)

    def _hear(self, segment: Segment, samples: Samples, faults: Sequence[Fault]) -> Hearing | None:
        """Transcribe an attempt if VERIFY says so."""
        doubted = bool(faults) or segment.sampled or segment.pace.doubtful(segment.text, samples)
        if self._verify == "auto" and not (self._guarded and doubted):
            return None
        recognizer = self._listener()
        return recognizer.hear(segment.text, samples, times=Fault.UNENDED in faults) if recognizer else None

    def _listener(self) -> Recognizer | None:
        """Return the recogniser, if there is one and VERIFY allows it; VERIFY=auto loads it when it is first needed."""
        if self._recognizer is None and self._verify == "auto":
            self._recognizer = installed_recognizer()
            self._verify = "auto" if self._recognizer else "off"
        return self._recognizer

    def _word_times(self, segment: Segment, samples: Samples) -> tuple[SpokenWord, ...]:
        """Return when each word of a finished segment is heard, if that is wanted and there is a recogniser."""
        recognizer = self._listener() if segment.timed else None
        words = recognizer.word_times(segment.text, samples) if recognizer else ()
        return tuple(replace(word, start_char=word.start_char + segment.indent, end_char=word.end_char + segment.indent) for word in words)

    def _settled(self, segment: Segment, attempt: Attempt) -> SegmentChunk | None:
        """Record an attempt; return the best one, repaired, or None to retry. Raise InternalError if no attempt is usable."""
        self._record(segment, attempt)
        if attempt.faults and len(segment.attempts) < self._most_attempts:
            return None
        chosen = best(segment.attempts)
        if not chosen.usable:
            raise _unplayable(segment)
        samples = repaired(segment.text, chosen, segment.pace)
        codes = _codes(chosen.frames, -(-len(samples) // _FRAME_SAMPLES))
        samples = self._decoder.watermarked(samples)
        if self._guarded:
            limiter = PauseLimiter(self._max_pause_ms)
            samples = np.concatenate([limiter.feed(samples), limiter.flush()])
        words = self._word_times(segment, samples)
        return SegmentChunk(segment.index, samples, True, len(segment.attempts) - 1, chosen.word_error_rate, words, codes)

    def _stream(self, segment: Segment, sampling: Sampling, check: _Check) -> Iterator[SegmentChunk]:
        """Generate one segment and yield its blocks as they come. It can be retried until its first block was sent."""
        while True:
            live = LiveSegment(PauseLimiter(self._max_pause_ms) if self._guarded else None)
            self._decoder.begin()
            # A block is decoded before the next frame is started: else its samples would wait for that frame.
            for row in self._generate([segment], sampling, check, lambda: not self._decoder.at_block_end):
                frames = row.frames
                block = self._decoder.finish() if row.ended else self._decoder.push(row.frames[-1])
                if row.left and not row.ended:
                    block = np.concatenate([block, self._decoder.finish()])
                heard = live.feed(block)
                if live.broken and live.heard:
                    raise _unplayable(segment)
                if live.hopeless:
                    break
                if len(heard):
                    yield SegmentChunk(segment.index, self._decoder.watermarked(heard), last=False, codes=_codes(frames, len(frames)))
            attempt = replace(self._judged(segment, live.samples(), row.ended), frames=frames)
            if live.heard:
                self._record(segment, attempt)
                rest = self._decoder.watermarked(live.flush())
                words, codes = self._word_times(segment, live.sent()), _codes(frames, len(frames))
                yield SegmentChunk(segment.index, rest, True, len(segment.attempts) - 1, attempt.word_error_rate, words, codes)
                return
            chunk = self._settled(segment, attempt)
            if chunk is not None:
                yield chunk
                return

    def _record(self, segment: Segment, attempt: Attempt) -> None:
        """Keep an attempt, count its faults, and learn the voice's pace from one without."""
        segment.attempts.append(attempt)
        self._faults.update(fault.label for fault in attempt.faults)
        if not attempt.faults:
            segment.pace.learn(segment.text, attempt.samples)
        _report(segment, attempt)


def _codes(frames: Sequence[NDArray[np.int32]], count: int) -> Codes | None:
    """Return the first `count` frames as they are kept in a conversation."""
    return np.stack(frames[:count]).astype(np.int16) if frames and count else None


def _with_text(texts: Iterable[tuple[int, str]], make: Callable[[int, str], Segment], order: TextOrder) -> Iterator[Segment]:
    """Yield the segments that have a text; the others are silence."""
    for index, text in texts:
        if text.strip():
            yield make(index, text)
        else:
            order.add(SegmentChunk(index, np.empty(0, np.float32), last=True))


def _report(segment: Segment, attempt: Attempt) -> None:
    """Log the faults and the word error rate of an attempt, never its text."""
    if attempt.faults:
        faults = ", ".join(fault.label for fault in attempt.faults)
        seconds = len(attempt.samples) / SAMPLE_RATE
        logger.warning("segment %d, attempt %d, %.1f s: %s", segment.index + 1, len(segment.attempts), seconds, faults)
    if attempt.word_error_rate is not None:
        logger.info("segment %d: word error rate %.2f", segment.index + 1, attempt.word_error_rate)


def _unplayable(segment: Segment) -> InternalError:
    attempts = max(1, len(segment.attempts))
    return InternalError(
        f"The model produced no usable audio for segment {segment.index + 1} of the text in {attempts} attempt(s). "
        "Try another seed or another voice."
    )
