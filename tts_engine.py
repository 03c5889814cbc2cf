"""Turn a text and a voice into samples: one utterance at a time on each model, cancellable at any moment."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby
from typing import cast

import anyio

from audio_formats import Samples
from audio_joiner import SegmentJoiner, SegmentTimestamp
from config import BUILT_IN_VOICE, Settings
from csm_model import CsmModel
from errors import (
    InputTooLongError,
    InternalError,
    InvalidInputError,
    InvalidVoiceError,
    ModelNotReadyError,
    NothingToSpeakError,
    TTSError,
    lacks_memory,
    no_memory,
    shorten,
)
from hibari_model import HibariModel, VoiceFiles
from model_host import Heartbeat, ModelHost, RequestQueue, started_threads
from pronunciations import Pronounce
from speech_model import Codes, ContextPart, ModelLoadError, SegmentChunk, SpeechModel, SpeechOptions
from text_markup import Passage, passages, prepare, without_marks
from text_normalizer import has_speech, normalize_text
from text_splitter import split_text
from text_verbalizer import SpokenSegments, expected_seconds, foreign_words, mostly_foreign, spoken_length, warm_up
from voice_presets import Voice, VoicePresetManager

logger = logging.getLogger(__name__)

_SEED_BITS = 32
_IDLE_CHECK_SECONDS = 5.0
_DOWNLOAD_RETRY_AFTER = 30
_TURN_SECONDS = 0.5  # of work, after which an utterance lets a waiting one go first
_TEXT_THREADS = 2  # more would only delay the event loop: they share the interpreter's lock


class Utterance:
    """One text being spoken: an async iterator of its samples, with its measurements.

    The reader uses `begun`, iteration and `aclose`. The engine uses `start`, `begin`, `push`, `finish_segment` and `end`.

    Attributes:
        voice: The voice that speaks.
        sample_rate: In Hz.
        seed: The same text, voice and seed give the same samples.
        heartbeat: Watches and stops the model's work.
        queue_time: Seconds spent waiting in the queue.
        generation_time: Seconds the model has worked; 0 until it ends.
        first_audio_time: Seconds from the end of the wait to the first samples.
        audio_seconds: Length of the samples so far.
        retries: How many segments were generated again.
        word_error_rate: The highest of all segments, where a recogniser checks them.
        segments: The text as it was split, as the client wrote it.
        spoken: The words of the segments.
        characters: Length of the text.
        said: The segments that have codec tokens, for the conversation, by number; of an unfinished segment, its tokens so far.
        on_complete: Called once all samples are there, before the reader sees the end.
        transliterated: How many words in foreign scripts are spoken in Latin letters.
        timestamps: Start and end of each finished segment, in seconds.
    """

    def __init__(self, voice: Voice, sample_rate: int, seed: int) -> None:
        self.voice = voice
        self.sample_rate = sample_rate
        self.seed = seed
        self.heartbeat = Heartbeat()
        self.queue_time = 0.0
        self.generation_time = 0.0
        self.first_audio_time: float | None = None
        self.audio_seconds = 0.0
        self.retries = 0
        self.word_error_rate: float | None = None
        self.segments: list[str] = []
        self.spoken = SpokenSegments((), None)
        self.characters = 0
        self.said: dict[int, ContextPart] = {}
        self.on_complete: Callable[[], None] = lambda: None
        self.transliterated = 0
        self.timestamps: list[SegmentTimestamp] = []
        # MAX_AUDIO_SECONDS bounds the buffer. A smaller bound would let a slow reader block the model.
        self._buffer: asyncio.Queue[Samples | TTSError | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._scope = anyio.CancelScope()
        self._task: asyncio.Task[None] | None = None
        self._begun_at: float | None = None
        self._failure: TTSError | None = None
        self._begun_or_ended = asyncio.Event()

    async def begun(self) -> None:
        """Wait until the model starts to work on it.

        Raises:
            TTSError: The model does not: the queue was full, or the wait too long.
        """
        await self._begun_or_ended.wait()
        if self._begun_at is None and self._failure:
            raise self._failure

    async def __aiter__(self) -> AsyncIterator[Samples]:
        """Yield the samples as they are generated.

        Raises:
            TTSError: The utterance failed; the samples so far have been yielded.
        """
        while (item := await self._buffer.get()) is not None:
            if isinstance(item, TTSError):
                raise item
            yield item

    @property
    def elapsed(self) -> float:
        """Seconds since the model started to work on it; 0 before."""
        return 0.0 if self._begun_at is None else time.monotonic() - self._begun_at

    @property
    def measured(self) -> dict[str, float | None]:
        """Its measurements for the metrics, in seconds; None for what did not take place."""
        started = self.generation_time > 0
        return {
            "queue": self.queue_time if started else None,
            "generation": self.generation_time if started else None,
            "first_audio": self.first_audio_time,
            "audio": self.audio_seconds or None,
        }

    async def aclose(self) -> None:
        """Stop waiting or speaking, and return when the model is free for the next utterance."""
        self.heartbeat.stop()
        self._scope.cancel()
        if self._task:
            await asyncio.wait({self._task})

    def start(self, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Run `work` in a task, which `aclose` cancels. Whatever `work` raises reaches the reader as a TTSError."""
        self._task = asyncio.create_task(self._run(work))
        return self._task

    def begin(self, queue_time: float) -> None:
        """Note that the wait is over and the model starts."""
        self.queue_time = queue_time
        self._begun_at = time.monotonic()
        self._begun_or_ended.set()

    def resume(self, queue_time: float) -> None:
        """Note that the model goes on after another wait."""
        self.queue_time += queue_time
        if self._begun_at is not None:
            self._begun_at += queue_time

    def push(self, samples: Samples) -> None:
        """Pass samples to the reader. Called on the model's thread."""
        if not samples.size:
            return
        if self.first_audio_time is None and self._begun_at is not None:
            self.first_audio_time = time.monotonic() - self._begun_at
        self.audio_seconds += samples.size / self.sample_rate
        self._loop.call_soon_threadsafe(self._buffer.put_nowait, samples)

    def note_codes(self, chunk: SegmentChunk) -> None:
        """Note the codec tokens of a segment so far. Called on the model's thread."""
        if chunk.codes is not None:
            self.said[chunk.segment] = ContextPart(self.spoken[chunk.segment].strip(), self.voice.preset.speaker_id, chunk.codes)

    def finish_segment(self, last: SegmentChunk) -> None:
        """Add what a segment's last chunk says about its quality. Called on the model's thread."""
        self.retries += last.retries
        if last.word_error_rate is not None:
            self.word_error_rate = max(self.word_error_rate or 0.0, last.word_error_rate)

    def end(self, failure: TTSError | None) -> None:
        """Tell the reader that no more samples come, and why if something failed."""
        if self._begun_at is not None:
            self.generation_time = time.monotonic() - self._begun_at
        self._failure = failure
        self._begun_or_ended.set()
        if failure is None:
            self.on_complete()
        self._buffer.put_nowait(failure)

    async def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        failure: TTSError | None = None
        try:
            with self._scope:
                await work()
            if self._scope.cancelled_caught:
                failure = InternalError("The utterance was stopped.")
        except BaseException as error:
            failure = _as_tts_error(error)
        self.end(failure)


class TTSEngine:
    """Owns the models and speaks with them.

    Args:
        settings: Which models to load, and their limits.
        presets: The voices, for the warm-up and for advice in errors.

    Attributes:
        hosts: The models' hosts, by model id.
    """

    def __init__(self, settings: Settings, presets: VoicePresetManager) -> None:
        self._settings = settings
        self._presets = presets
        self._voice_files = VoiceFiles(settings.cache_dir / "hibari")
        why_disabled = None if settings.csm_enabled else _why_disabled(settings)
        self.hosts = {
            "hibari": self._new_host(lambda: HibariModel(self._voice_files)),
            "csm-1b": self._new_host(lambda: CsmModel(settings), why_disabled, settings.idle_unload_seconds),
        }
        self._running: set[Utterance] = set()
        self._replaced: set[str] = set()  # the voices that others speak for; one warning each
        self._background: list[asyncio.Task[None]] = []
        self._text_threads = started_threads(_TEXT_THREADS, "text")

    async def start(self, only: Voice | None = None) -> None:
        """Load the built-in voice (0.3 s), then CSM and the files of the other built-in voices, all in the background.

        Not at the same time: importing MLX and transformers would delay the built-in voice by seconds.

        Args:
            only: The only voice that will speak: no other voice's file is downloaded.
        """
        self.hosts["hibari"].start()
        self._background = [asyncio.create_task(self._start_others(only))]
        if self._settings.idle_unload_seconds:
            self._background.append(asyncio.create_task(self._free_idle_voices(self._settings.idle_unload_seconds)))

    async def close(self) -> None:
        """Stop all utterances and end all models' threads."""
        self.drain()
        self._voice_files.close()
        self._text_threads.shutdown(wait=False, cancel_futures=True)
        for task in self._background:
            task.cancel()
        await asyncio.gather(*(utterance.aclose() for utterance in self._running))
        for host in self.hosts.values():
            await host.close()

    def drain(self) -> None:
        """Refuse new and waiting requests; the active ones may finish."""
        for host in self.hosts.values():
            host.queue.close()

    def reload(self) -> None:
        """Load again the models that failed to load, and download again the voices that could not be downloaded."""
        self._voice_files.fetch_again()
        for host in self.hosts.values():
            if host.state == "failed":
                host.reload()

    def host(self, voice: Voice) -> ModelHost:
        """Return the host of the voice's model."""
        return self.hosts[voice.preset.model]

    def check_ready(self, voice: Voice) -> None:
        """Refuse a voice that cannot serve a request now.

        Raises:
            ModelNotReadyError: The model is loading, failed or switched off, or the voice is not downloaded; the message names another
                voice if one is ready.
        """
        host = self.host(voice)
        if not host.ready:
            raise host.not_ready_error(self._other_voice())
        if reason := self.not_ready_reason(voice):
            raise _not_downloaded(f"{reason} {self._other_voice()}")

    def ready(self, voice: Voice) -> bool:
        """Return whether a voice can serve a request now."""
        return self.not_ready_reason(voice) is None

    def loading(self, voice: Voice) -> bool:
        """Return whether the voice's model is being loaded, or its file downloaded for the first time."""
        preset = voice.preset
        fetching = preset.model == "hibari" and preset.voice_key is not None and self._voice_files.pending(preset.voice_key)
        return self.host(voice).state == "loading" or fetching

    def not_ready_reason(self, voice: Voice) -> str | None:
        """Return why a voice cannot serve a request now; None if it can."""
        host = self.host(voice)
        if not host.ready:
            return host.not_ready_error().message
        reason = host.model.unavailable(voice)
        return f"Voice '{voice.name}' {reason}" if reason else None

    def choose_voice(self, name: str) -> tuple[Voice, Voice | None]:
        """Return the voice that speaks for `name` now, and the voice it replaces: the one that `name` selects, if that is not ready.

        Raises:
            InvalidVoiceError: There is no voice of this name.
            ModelNotReadyError: The voice is not ready, and no other may speak.
        """
        selected = self._presets.catalog.resolve(name)
        if self.ready(selected):
            self._replaced.discard(selected.id)
            return selected, None
        speaker = self.fallback(named=not self._presets.catalog.means_default(name))
        if speaker is None:
            self.check_ready(selected)
            return selected, None  # it became ready meanwhile
        if selected.id not in self._replaced:
            self._replaced.add(selected.id)
            logger.warning("voice %s is not ready; voice %s speaks instead: %s", selected.id, speaker.id, self.not_ready_reason(selected))
        return speaker, selected

    def fallback(self, *, named: bool) -> Voice | None:
        """Return the voice that speaks while the requested one is not ready, if one is.

        FALLBACK_VOICE may replace any voice. The best of the ready voices replaces only the default voice, because a client that
        sends one of OpenAI's names wants speech, whoever speaks.

        Args:
            named: The client has asked for one voice by its own name.
        """
        if not self._settings.fallback_allowed:
            return None
        catalog = self._presets.catalog
        names = [self._settings.fallback_voice] if self._settings.fallback_voice else []
        if not named:
            names += [BUILT_IN_VOICE, *(voice.id for voice in catalog.voices if not voice.uploaded)]
        candidates = (catalog.resolve(name) for name in names if catalog.knows(name))
        return next((voice for voice in candidates if self.ready(voice)), None)

    def built_in_voice(self) -> Voice | None:
        """Return the built-in voice if it is ready and may speak for others."""
        catalog = self._presets.catalog
        if not self._settings.fallback_allowed or not catalog.knows(BUILT_IN_VOICE):
            return None
        voice = catalog.resolve(BUILT_IN_VOICE)
        return voice if self.ready(voice) else None

    def expected_seconds(self, voice: Voice, characters: int) -> float | None:
        """Return in how many seconds a text would be spoken, with the texts before it; None before the model has spoken anything."""
        pace = self.host(voice).pace
        own = pace.seconds(characters)
        before = (each for each in self._running if each.voice.preset.model == voice.preset.model)
        waiting = sum(max(0.0, (pace.seconds(each.characters) or 0.0) - each.elapsed) for each in before)
        return None if own is None else own + waiting

    async def prepared(self, text: str, *, normalize: bool | None = None) -> str:
        """Return what `prepare_text` returns, from a thread: a long text takes long enough to delay other requests' audio."""
        return await asyncio.get_running_loop().run_in_executor(self._text_threads, lambda: self.prepare_text(text, normalize=normalize))

    def prepare_text(self, text: str, *, normalize: bool | None = None) -> str:
        """Return the text as it will be spoken, with its pauses and voice tags. Safe to call from any thread.

        Args:
            text: The text of the request.
            normalize: Overrides NORMALIZE_TEXT.

        Raises:
            NothingToSpeakError: Nothing in it can be spoken.
            InvalidInputError: A pause in it is too long.
        """
        cleaned = self._settings.normalize_text if normalize is None else normalize
        text = prepare(text, normalize_text if cleaned else str)
        passages(text)
        if not has_speech(without_marks(text)):
            raise NothingToSpeakError(
                "'input' has nothing to speak: without markup and symbols it contains no letter and no digit.", param="input"
            )
        return text

    def speak(self, text: str, voice: Voice, options: SpeechOptions, joiner: SegmentJoiner | None = None) -> Utterance:
        """Queue `text` (from `prepare_text`) and return its utterance, which the caller must close.

        All later failures, including a full queue, are raised where the utterance is read.

        Args:
            joiner: Continues the audio of an earlier utterance, which has ended; its timestamps continue, too. Then the text is spoken even
                if the shutdown has begun.

        Raises:
            InvalidInputError: The voice's model cannot speak this text.
            InputTooLongError: It would become more than MAX_AUDIO_SECONDS of audio.
            InvalidVoiceError: A voice tag names no voice of this model.
            ModelNotReadyError: The voice of a tag is not ready.
        """
        host = self.host(voice)
        parts = passages(text)
        voices = self._voices_of(parts, voice)
        text = without_marks(text)
        self._check_seconds(expected_seconds(text) / options.speed, "about ")
        options = replace(options, verbalize=self._settings.normalize_text if options.verbalize is None else options.verbalize)
        transliterated = foreign_words(text) if options.verbalize and not mostly_foreign(text) else 0
        if not transliterated and (reason := host.model.refusal(text)) is not None:
            raise InvalidInputError(f"Voice '{voice.preset.name}' cannot speak all of 'input': {reason}", param="input")
        script = [(part, voices[part.voice]) for part in parts]
        utterance = Utterance(voice, host.model.sample_rate, options.seed)
        utterance.transliterated, utterance.characters = transliterated, len(text)

        continued = joiner is not None and joiner.duration > 0
        speak = partial(self._speak_on_thread, script, utterance, options, joiner)
        work = partial(self._take_turns, host, utterance, speak, continued=continued)

        self._running.add(utterance)
        utterance.start(work).add_done_callback(lambda _: self._running.discard(utterance))
        return utterance

    async def _take_turns(
        self, host: ModelHost, utterance: Utterance, speak: Callable[[SpeechModel], Iterator[None]], *, continued: bool
    ) -> None:
        """Hold the model's slot until the utterance is complete; let waiting ones go first where `speak` pauses after `_TURN_SECONDS`."""
        speaking: list[Iterator[None]] = []

        def finished(model: SpeechModel) -> bool:
            if not speaking:
                speaking.append(speak(model))
            end = time.monotonic() + _TURN_SECONDS
            return all(not host.queue.waiting or time.monotonic() < end for _ in speaking[0])

        async with host.queue.slot(continued=continued) as waited:
            utterance.begin(waited)
            complete = await host.run(finished, utterance.heartbeat)
        while not complete:
            async with host.queue.slot(again=True) as waited:
                utterance.resume(waited)
                complete = await host.run(finished, utterance.heartbeat)
        if not utterance.heartbeat.stopped:
            host.pace.observe(utterance.characters, utterance.audio_seconds, utterance.elapsed)

    def new_joiner(self, sample_rate: int) -> SegmentJoiner:
        """Return what joins the segments of a text, or of several."""
        return SegmentJoiner(sample_rate, self._settings.pause_ms)

    def _voices_of(self, parts: Sequence[Passage], voice: Voice) -> dict[str | None, Voice]:
        """Return the voices of a text, by their names in its tags; None is the voice of the request."""
        voices: dict[str | None, Voice] = {None: voice}
        for name in {part.voice for part in parts if part.voice is not None}:
            voices[name], _ = self.choose_voice(name)
            if voices[name].preset.model != voice.preset.model:
                raise InvalidVoiceError(
                    f"[voice:{shorten(name)}] in 'input' is a voice of {voices[name].preset.model}, and voice '{voice.name}' is one of "
                    f"{voice.preset.model}: all voices of a text must be of the same model.",
                    param="input",
                )
        return voices

    def _speak_on_thread(
        self,
        script: Sequence[tuple[Passage, Voice]],
        utterance: Utterance,
        options: SpeechOptions,
        joiner: SegmentJoiner | None,
        model: SpeechModel,
    ) -> Iterator[None]:
        """Split the text, speak the segments and join them; yield where another utterance may go first. Runs on the model's thread."""
        pronounce = self._presets.catalog.pronunciations.pronounce(phonemes=model.takes_phonemes) if options.verbalize else None
        turns = _turns(script, model, pronounce)
        segments = [segment for turn in turns for segment in turn.segments]
        joiner = joiner or self.new_joiner(model.sample_rate)
        joiner.request(_pauses(turns, options.speed))
        utterance.segments, utterance.timestamps = segments, joiner.timestamps
        utterance.spoken = SpokenSegments(segments, utterance.voice.preset.language if options.verbalize else None, pronounce)
        finished = 0
        for chunk in _spoken(turns, utterance, model, options):
            utterance.push(joiner.push(chunk))
            utterance.note_codes(chunk)
            self._check_seconds(utterance.audio_seconds / options.speed, "more than ")
            if chunk.last:
                finished += 1
                utterance.finish_segment(chunk)
                if model.takes_turns:
                    yield
        if utterance.heartbeat.stopped:
            return
        if finished != len(segments):
            raise InternalError(f"The model spoke {finished} of {len(segments)} segments.")
        if not utterance.audio_seconds:
            raise InvalidInputError(f"Voice '{utterance.voice.name}' cannot speak this text: the model produced no audio.", param="input")
        utterance.push(joiner.finish())

    def _check_seconds(self, seconds: float, about: str) -> None:
        """Raise InputTooLongError if a text becomes too much audio, at the speed of its request."""
        longest = self._settings.max_audio_seconds
        if seconds > longest:
            raise InputTooLongError(
                f"'input' becomes {about}{seconds:.0f} s of audio, and MAX_AUDIO_SECONDS allows {longest:g} s. "
                "Send it in parts, or with a higher 'speed'.",
                param="input",
            )

    def takes_context(self, voice: Voice) -> bool:
        """Return whether the voice's model hears what was said before."""
        return self.host(voice).model.takes_context

    async def encode(self, samples: Samples) -> Codes:
        """Return a recording's codec tokens, after the requests before it.

        Raises:
            ModelNotReadyError: CSM, whose codec it is, is not ready.
            TTSError: The queue is full, or the wait too long.
        """
        host = self.hosts["csm-1b"]
        if not host.ready:
            raise host.not_ready_error("Send the turn without a recording, or try again later.")
        async with host.queue.slot():
            return await host.run(lambda model: cast(CsmModel, model).encode(samples), Heartbeat())

    def _other_voice(self) -> str:
        """Return a sentence that names a voice to use instead."""
        voices = self._presets.catalog.voices
        if ready := next((voice for voice in voices if self.ready(voice)), None):
            return f"Voice '{ready.preset.name}' is ready."
        if loading := next((voice for voice in voices if self.host(voice).state == "loading"), None):
            return f"Voice '{loading.preset.name}' is loading."
        return "No voice is ready."

    def _warm_up(self, model: SpeechModel) -> None:
        # Without uploaded voices: there may be a hundred, and one that is deleted meanwhile must not fail the load.
        model.warm_up([voice for voice in self._presets.catalog.voices if voice.preset.model == model.id and not voice.uploaded])

    async def _start_others(self, only: Voice | None) -> None:
        await self.hosts["hibari"].settled()
        warm_up()
        self.hosts["csm-1b"].start()
        self._voice_files.keep_fetching(lambda: self._hibari_keys(only))

    def _hibari_keys(self, only: Voice | None) -> list[str]:
        """Return the voices of hibari that are wanted: `only`, or all that there are presets for."""
        presets = [voice.preset for voice in ([only] if only else self._presets.catalog.voices)]
        return [preset.voice_key for preset in presets if preset.model == "hibari" and preset.voice_key]

    async def _free_idle_voices(self, seconds: float) -> None:
        host = self.hosts["hibari"]
        while True:
            await asyncio.sleep(min(seconds, _IDLE_CHECK_SECONDS))
            if host.state == "ready" and not host.queue.active:
                async with host.queue.slot():
                    await host.run(lambda model: isinstance(model, HibariModel) and model.free_idle(seconds), Heartbeat())

    def _new_host(self, create: Callable[[], SpeechModel], disabled: str | None = None, idle_seconds: float = 0.0) -> ModelHost:
        settings = self._settings
        queue = RequestQueue(settings.max_queue, settings.queue_timeout)
        return ModelHost(
            create,
            queue,
            disabled=disabled,
            stall_seconds=settings.generation_timeout,
            idle_seconds=idle_seconds,
            after_load=self._warm_up,
        )


@dataclass(frozen=True)
class _Turn:
    """Segments that one voice speaks after a pause.

    Attributes:
        pause: Seconds of silence before it; None: as between two sentences.
        segments: The text; none at the end of a text that ends with a pause.
    """

    voice: Voice
    pause: float | None
    segments: list[str]


def _turns(script: Sequence[tuple[Passage, Voice]], model: SpeechModel, pronounce: Pronounce | None) -> list[_Turn]:
    lengths, longest = model.segment_lengths, model.segment_lengths.maximum
    turns: list[_Turn] = []
    for passage, voice in script:

        def fits(segment: str, voice: Voice = voice) -> bool:
            return spoken_length(segment, pronounce) <= longest and model.fits(segment, voice)

        turns.append(_Turn(voice, passage.pause, split_text(passage.text, lengths, fits)))
        lengths = replace(lengths, first=lengths.target)  # only the very first segment is short
    return turns


def _pauses(turns: Sequence[_Turn], speed: float) -> dict[int, float]:
    """Return the requested seconds of silence at normal speed, by the segment that follows."""
    starts = accumulate((len(turn.segments) for turn in turns), initial=0)
    return {start: turn.pause * speed for start, turn in zip(starts, turns, strict=False) if turn.pause is not None}


def _spoken(turns: Sequence[_Turn], utterance: Utterance, model: SpeechModel, options: SpeechOptions) -> Iterator[SegmentChunk]:
    """Have the model speak; consecutive turns of one voice together."""
    start = 0
    for _, group in groupby(turns, lambda turn: turn.voice.id):
        same = list(group)
        words = utterance.spoken[start : start + sum(len(turn.segments) for turn in same)]
        if words:
            for chunk in model.speak(words, same[0].voice, options, utterance.heartbeat.cancelled):
                yield replace(chunk, segment=chunk.segment + start) if start else chunk
        start += len(words)
        options = replace(options, streamed=False)


def new_seed() -> int:
    """Return a random seed."""
    return secrets.randbits(_SEED_BITS)


def _as_tts_error(error: BaseException) -> TTSError:
    """Translate whatever a model raised."""
    if isinstance(error, TTSError):
        return error
    if isinstance(error, ModelLoadError):
        return _not_downloaded(error.message)
    if lacks_memory(error):
        return no_memory()
    if isinstance(error, asyncio.CancelledError):
        return InternalError("The utterance was stopped.")
    logger.error("unexpected error in the model", exc_info=error)
    return InternalError(f"Unexpected error in the model ({type(error).__name__}). See the server's log.")


def _not_downloaded(message: str) -> ModelNotReadyError:
    return ModelNotReadyError(message, param="voice", headers={"Retry-After": str(_DOWNLOAD_RETRY_AFTER)})


def _why_disabled(settings: Settings) -> str:
    if settings.csm == "off":
        return "CSM=off."
    return "it needs Apple Silicon, or an NVIDIA GPU with MLX's CUDA backend; without them it is far too slow (CSM=on loads it anyway)."
