"""The engine: takes a text and a voice and gives sound, each utterance in its turn on its model."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable

import numpy as np

from audio_formats import Samples
from audio_joiner import SegmentJoiner, SegmentTimestamp
from config import Settings
from csm_model import CsmModel
from errors import InsufficientMemoryError, InternalError, InvalidInputError, TTSError
from hibari_model import HibariModel
from model_host import Heartbeat, ModelHost, RequestQueue
from speech_model import SpeechModel, SpeechOptions
from text_normalizer import has_speech, normalize_text
from text_splitter import split_text
from voice_presets import Voice, VoicePresetManager

logger = logging.getLogger(__name__)

_SEED_BITS = 32


class Utterance:
    """One text being spoken: an async iterator of its samples, and what is known of it.

    Attributes:
        voice: The voice that speaks.
        sample_rate: In Hz.
        seed: With it, the same text and voice give the same samples again.
        queue_time: Seconds it waited for its turn.
        generation_time: Seconds the model has worked on it.
        first_audio_time: Seconds from the turn to the first samples.
        audio_seconds: Of sound so far.
        retries: Segments that were generated again.
        word_error_rate: The worst segment's, where a recogniser listened.
        segments: The text as it was split.
        timestamps: When each segment starts and ends, in seconds.
    """

    def __init__(self, voice: Voice, sample_rate: int, seed: int) -> None:
        self.voice = voice
        self.sample_rate = sample_rate
        self.seed = seed
        self.queue_time = 0.0
        self.generation_time = 0.0
        self.first_audio_time: float | None = None
        self.audio_seconds = 0.0
        self.retries = 0
        self.word_error_rate: float | None = None
        self.segments: list[str] = []
        self.timestamps: list[SegmentTimestamp] = []
        self._heartbeat = Heartbeat()
        # Unbounded in form, bounded in fact: an utterance ends, at MAX_INPUT_LENGTH characters at the latest. A bound below its length
        # would let a slow reader hold the model, which is the one thing this buffer is for.
        self._buffer: asyncio.Queue[Samples | BaseException | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._has_slot = False
        self._begun = asyncio.Event()
        self._failure: BaseException | None = None

    async def begun(self) -> None:
        """Return once its turn has come.

        Raises:
            TTSError: It did not come: the queue was full, or the wait too long.
        """
        await self._begun.wait()
        if not self._has_slot and self._failure:
            raise self._failure

    async def __aiter__(self) -> AsyncIterator[Samples]:
        """The samples, as they come; raises what went wrong in place of what is missing."""
        while (item := await self._buffer.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    async def samples(self) -> Samples:
        """All of the samples, once the last one is there."""
        parts = [part async for part in self]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    async def aclose(self) -> None:
        """Stop the work, at whatever stage it is, and wait until the turn is free for the next."""
        self._heartbeat.stop()
        if self._task is None:
            return
        if not self._has_slot:
            self._task.cancel()
        await asyncio.wait({self._task})


class TTSEngine:
    """Owns the models and speaks with them.

    Args:
        settings: The settings.
        presets: The voices, for the warm-up.
    """

    def __init__(self, settings: Settings, presets: VoicePresetManager) -> None:
        self._settings = settings
        self._presets = presets
        off = None if settings.csm_enabled else _why_disabled(settings)
        self._hosts: dict[str, ModelHost] = {
            "hibari": ModelHost(HibariModel, self._new_queue(), stall_seconds=settings.generation_timeout, after_load=self._warm_up),
            "csm-1b": ModelHost(
                lambda: CsmModel(settings),
                self._new_queue(),
                disabled=off,
                stall_seconds=settings.generation_timeout,
                idle_seconds=settings.idle_unload_seconds,
                after_load=self._warm_up,
            ),
        }
        self._running: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load the built-in voice (a third of a second), then CSM in the background.

        One after the other, because importing MLX and transformers beside it would hold the built-in voice up for seconds.
        """
        self._hosts["hibari"].start()
        self._loading_csm = asyncio.create_task(self._start_csm())

    async def close(self) -> None:
        """End everything: what still runs is stopped."""
        self.drain()
        self._loading_csm.cancel()
        for task in list(self._running):
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
        for host in self._hosts.values():
            await host.close()

    def drain(self) -> None:
        """Take no new work: who waits is told so, who has the turn may finish."""
        for host in self._hosts.values():
            host.queue.close()

    def reload(self) -> None:
        """Load models again that failed to load."""
        for host in self._hosts.values():
            if host.state == "failed":
                host.reload()

    def host(self, voice: Voice) -> ModelHost:
        """The host of the model that speaks with this voice."""
        return self._hosts[voice.preset.model]

    @property
    def hosts(self) -> dict[str, ModelHost]:
        """The models' hosts, by model id."""
        return self._hosts

    def check_ready(self, voice: Voice) -> None:
        """Refuse, with a clear reason and another voice's name, what cannot be spoken now.

        Raises:
            ModelNotReadyError: The voice's model is loading, failed or switched off.
        """
        voices = self._presets.catalog.voices
        ready = [other.preset.name for other in voices if self.host(other).ready]
        loading = [other.preset.name for other in voices if self.host(other).state == "loading"]
        advice = f"Voice '{ready[0]}' is ready." if ready else f"Voice '{loading[0]}' is being loaded." if loading else "No voice is ready."
        self.host(voice).check_ready(advice)

    def prepare_text(self, text: str, *, normalize: bool | None = None) -> str:
        """The text as it will be spoken.

        Raises:
            InvalidInputError: Nothing in it can be said.
        """
        if self._settings.normalize_text if normalize is None else normalize:
            text = normalize_text(text)
        if not has_speech(text):
            raise InvalidInputError(
                "'input' has nothing that can be said: it holds no letter and no digit once timestamps are removed.", param="input"
            )
        return text

    def speak(self, text: str, voice: Voice, options: SpeechOptions) -> Utterance:
        """Begin to say `text` (from `prepare_text`), as soon as the model's turn comes.

        Every later failure, a full queue's too, is raised where the utterance is read. Close it when it is no longer wanted.

        Raises:
            InvalidInputError: The voice's model is known not to be able to say this text.
        """
        host = self.host(voice)
        if (reason := host.model.refusal(text)) is not None:
            raise InvalidInputError(f"Voice '{voice.preset.name}' cannot say all of 'input': {reason}", param="input")
        utterance = Utterance(voice, host.model.sample_rate, options.seed)
        utterance._task = task = asyncio.create_task(self._run(text, utterance, host, options))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return utterance

    async def _run(self, text: str, utterance: Utterance, host: ModelHost, options: SpeechOptions) -> None:
        """Wait for the turn, speak, give the turn on; whatever happens reaches the utterance's reader."""
        end: BaseException | None = None
        try:
            async with host.queue.slot() as waited:
                utterance._has_slot = True
                utterance.queue_time = waited
                utterance._begun.set()
                emit = _emitter(utterance, asyncio.get_running_loop())
                started = time.monotonic()
                try:
                    await host.run(lambda model: self._speak_on_thread(text, utterance, model, options, emit), utterance._heartbeat)
                finally:
                    utterance.generation_time = time.monotonic() - started
        except TTSError as error:
            end = error
        except MemoryError:
            end = InsufficientMemoryError("The machine has too little free memory for this text. Send a shorter one, or try again later.")
        except asyncio.CancelledError:
            end = InternalError("The utterance was stopped.")
        except BaseException as error:
            logger.exception("the model failed")
            end = InternalError(f"The model failed ({type(error).__name__}). The server's log has the details.")
        utterance._failure = end
        utterance._begun.set()
        utterance._buffer.put_nowait(end)

    def _speak_on_thread(
        self, text: str, utterance: Utterance, model: SpeechModel, options: SpeechOptions, emit: Callable[[Samples], None]
    ) -> None:
        """The whole of one utterance, on the model's thread."""
        heartbeat, voice = utterance._heartbeat, utterance.voice
        segments = split_text(text, model.segment_lengths, lambda segment: model.fits(segment, voice))
        joiner = SegmentJoiner(model.sample_rate, self._settings.pause_ms)
        utterance.segments, utterance.timestamps = segments, joiner.timestamps
        finished = 0
        stream = model.speak(segments, voice, options, heartbeat.cancelled)
        for chunk in stream:
            emit(joiner.push(chunk))
            if chunk.last:
                finished += 1
                utterance.retries += chunk.retries
                if chunk.word_error_rate is not None:
                    utterance.word_error_rate = max(utterance.word_error_rate or 0.0, chunk.word_error_rate)
        if heartbeat.stopped:
            return
        if finished != len(segments):
            raise InternalError(f"The model spoke {finished} of {len(segments)} parts of the text.")
        if not utterance.audio_seconds:
            raise InvalidInputError(f"Voice '{voice.preset.name}' cannot say this text: no sound came of it.", param="input")

    def _warm_up(self, model: SpeechModel) -> None:
        # The owner's voices only: people may have added a hundred, and one that is deleted at this moment must not fail the load.
        model.warm_up([voice for voice in self._presets.catalog.voices if voice.preset.model == model.id and not voice.uploaded])

    async def _start_csm(self) -> None:
        await self._hosts["hibari"].settled()
        self._hosts["csm-1b"].start()

    def _new_queue(self) -> RequestQueue:
        return RequestQueue(self._settings.max_queue, self._settings.queue_timeout)


def new_seed() -> int:
    """A seed for an utterance that asked for none."""
    return secrets.randbits(_SEED_BITS)


def _emitter(utterance: Utterance, loop: asyncio.AbstractEventLoop) -> Callable[[Samples], None]:
    """How the model's thread hands samples to the utterance's reader."""
    started = time.monotonic()

    def emit(samples: Samples) -> None:
        if not samples.size:
            return
        if utterance.first_audio_time is None:
            utterance.first_audio_time = time.monotonic() - started
        utterance.audio_seconds += samples.size / utterance.sample_rate
        loop.call_soon_threadsafe(utterance._buffer.put_nowait, samples)

    return emit


def _why_disabled(settings: Settings) -> str:
    if settings.csm == "off":
        return "CSM=off."
    return (
        "this machine has neither Apple Silicon nor MLX's CUDA backend, and CSM-1B is far too slow without (CSM=on loads it all the same)."
    )
