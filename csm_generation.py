"""CSM speaks sentence groups: one generation loop for one row or many; what comes out is judged, said again if need be, put in text order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
from mlx_audio.tts.models.sesame import Model
from numpy.typing import NDArray

from config import Settings
from csm_batch import BATCH_POSITIONS, CONTEXT, FrameBatch, memory_errors
from csm_codec import CodecDecoder
from csm_groups import Group, LiveGroup, Row, Sampling, TextOrder
from csm_prompts import PromptStore
from csm_sampler import RowSampler, attempt_seed
from errors import InputTooLongError, InternalError
from speech_check import MOST_WORD_ERRORS, SpeechCheck
from speech_guard import FRAME_MS, SAMPLE_RATE, Attempt, Fault, PauseLimiter, best, frame_budget, judge, repaired
from speech_model import GroupChunk, Samples, SpeechOptions
from voice_presets import Voice

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
        self._check = SpeechCheck() if settings.verify == "whisper" else None

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

    def speak(self, groups: Sequence[str], voice: Voice, options: SpeechOptions, cancelled: Callable[[], bool]) -> Iterator[GroupChunk]:
        """Say the groups, as `SpeechModel.speak`; `cancelled` is asked before each frame and each decoded block.

        Raises:
            InputTooLongError: A group leaves no room for its own sound in the model's context.
            InternalError: The model gave nothing that can be played, however often it was asked.
            InsufficientMemoryError: MLX ran out of memory.
        """

        def check() -> None:
            if cancelled():
                raise _CancelledError

        try:
            with memory_errors(), self._cleaned_up():
                yield from self._speak(groups, voice, options, check)
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

    def _speak(self, texts: Sequence[str], voice: Voice, options: SpeechOptions, check: _Check) -> Iterator[GroupChunk]:
        check()
        preset = voice.preset
        temperature = preset.temperature if options.temperature is None else options.temperature
        sampling = Sampling(options.seed, temperature, preset.top_k if options.top_k is None else options.top_k)
        order = TextOrder()
        pending = []
        for index, text in enumerate(texts):
            if text.strip():
                pending.append(self._group(index, text.strip(), voice))
            else:
                order.add(GroupChunk(index, np.empty(0, np.float32), last=True))
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
                    pending.append(row.group)
                else:
                    order.add(chunk)
                    yield from order.release()

    def _group(self, index: int, text: str, voice: Voice) -> Group:
        prompt = self._prompts.tokens(voice, text)
        longest_ms = voice.preset.max_audio_length_ms
        budget = frame_budget(text, longest_ms) if self._guarded else max(1, int(longest_ms / FRAME_MS))
        room = CONTEXT - len(prompt[0])
        if room < 1:
            raise InputTooLongError(
                "A part of the text is too long to be said after this voice's prompt: break it into sentences.", param="input"
            )
        return Group(index, text, prompt, min(budget, room))

    def _next_batch(self, pending: list[Group]) -> list[Group]:
        """Take groups from `pending`, in text order, as many as fit side by side into the context and into `BATCH_POSITIONS`."""
        pending.sort(key=lambda group: group.index)
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

    def _generate(self, groups: Sequence[Group], sampling: Sampling, check: _Check) -> Iterator[Row]:
        """The loop: each row is yielded after each of its frames, for the last time with `left`."""
        seeds = [attempt_seed(sampling.seed, group.index, len(group.attempts)) for group in groups]
        sampler = RowSampler(seeds, sampling.temperature, sampling.top_k)
        batch = FrameBatch(self._model.model, [group.prompt for group in groups], sampler)
        rows = [Row(group) for group in groups]
        while rows:
            check()
            frames = batch.step(more=any(len(row.frames) + 1 < row.group.budget for row in rows))
            for row, frame in zip(rows, frames, strict=True):
                row.take(frame)
            staying = [place for place, row in enumerate(rows) if not row.left]
            if 0 < len(staying) < len(rows):
                batch.keep(staying)
            yield from rows
            rows = [rows[place] for place in staying]

    def _decode(self, frames: Sequence[NDArray[np.int32]], check: _Check) -> Samples:
        """The samples of a whole group."""
        self._decoder.begin()
        blocks = []
        for frame in frames:
            blocks.append(self._decoder.push(frame))
            if len(blocks[-1]):
                check()
        return np.concatenate([*blocks, self._decoder.finish()])

    def _finish(self, row: Row, check: _Check) -> GroupChunk | None:
        """Decode and judge a group that left its batch; None if it is to be said again."""
        attempt = self._judged(row.group, self._decode(row.frames, check), row.ended)
        return self._settled(row.group, attempt)

    def _judged(self, group: Group, samples: Samples, ended: bool) -> Attempt:
        faults = judge(group.text, samples, ended)
        if not self._guarded:
            faults = tuple(fault for fault in faults if fault is Fault.NOT_FINITE)
        if self._check is None or any(fault.unusable for fault in faults):
            return Attempt(samples, ended, faults)
        rate = self._check.word_error_rate(group.text, samples)
        if self._guarded and rate is not None and rate > MOST_WORD_ERRORS:
            faults = (*faults, Fault.WRONG_WORDS)
        return Attempt(samples, ended, faults, rate)

    def _settled(self, group: Group, attempt: Attempt) -> GroupChunk | None:
        """The group as it is to be heard; None if it is to be said again.

        Raises:
            InternalError: None of its attempts can be played.
        """
        group.attempts.append(attempt)
        _report(group, attempt)
        if attempt.faults and len(group.attempts) < self._most_attempts:
            return None
        chosen = best(group.attempts)
        if not chosen.usable:
            raise _unplayable(group)
        samples = self._decoder.watermarked(repaired(group.text, chosen))
        if self._guarded:
            limiter = PauseLimiter(self._max_pause_ms)
            samples = np.concatenate([limiter.feed(samples), limiter.flush()])
        return GroupChunk(group.index, samples, True, len(group.attempts) - 1, chosen.word_error_rate)

    def _stream(self, group: Group, sampling: Sampling, check: _Check) -> Iterator[GroupChunk]:
        """Say a group alone and pass it on as it comes. As long as nothing of it was heard, it can be said again."""
        while True:
            live = LiveGroup(PauseLimiter(self._max_pause_ms) if self._guarded else None)
            self._decoder.begin()
            for row in self._generate([group], sampling, check):
                sound = self._decoder.finish() if row.ended else self._decoder.push(row.frames[-1])
                if row.left and not row.ended:
                    sound = np.concatenate([sound, self._decoder.finish()])
                heard = live.feed(sound)
                if live.broken and live.heard:
                    raise _unplayable(group)
                if live.hopeless:
                    break
                if len(heard):
                    yield GroupChunk(group.index, self._decoder.watermarked(heard), last=False)
            attempt = self._judged(group, live.samples(), row.ended)
            if live.heard:
                group.attempts.append(attempt)
                _report(group, attempt)
                rest = self._decoder.watermarked(live.flush())
                yield GroupChunk(group.index, rest, True, len(group.attempts) - 1, attempt.word_error_rate)
                return
            chunk = self._settled(group, attempt)
            if chunk is not None:
                yield chunk
                return


def _report(group: Group, attempt: Attempt) -> None:
    """One line about an attempt that has something wrong with it; the text is nobody's business."""
    if attempt.faults:
        faults = ", ".join(fault.name.lower().replace("_", " ") for fault in attempt.faults)
        seconds = len(attempt.samples) / SAMPLE_RATE
        logger.warning("group %d, attempt %d, %.1f s: %s", group.index + 1, max(1, len(group.attempts)), seconds, faults)
    if attempt.word_error_rate is not None:
        logger.info("group %d: word error rate %.2f", group.index + 1, attempt.word_error_rate)


def _unplayable(group: Group) -> InternalError:
    attempts = max(1, len(group.attempts))
    return InternalError(
        f"The model gave no sound that can be played for sentence group {group.index + 1} of the text, in {attempts} attempt(s). "
        "Try again with another seed, or with another voice."
    )
