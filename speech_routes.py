"""POST /v1/audio/speech and related routes: complete files, byte streams, and event streams."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from audio_converter import StreamEncoder, convert
from audio_formats import FORMATS, AudioFormat, SyntheticTag
from captions import CaptionStore, captions_of, new_key
from config import Settings
from errors import InternalError, ModelNotReadyError, TTSError
from monitoring import Metrics
from schemas import SpeechRequest
from speech_model import SpeechOptions
from tts_engine import TTSEngine, Utterance, new_seed
from voice_presets import Voice, VoicePresetManager

T = TypeVar("T")

# A client that takes nothing at all for so long is gone, whatever its socket says.
_STALLED_SECONDS = 120.0


class SpeechStream(Response):
    """Sends a body piece by piece.

    Args:
        body: The pieces. An exception out of it breaks the connection off, so that the client sees a broken body and never a short one
            that looks whole.
        close: Called once, however it ends; stops the work behind the body.
        headers: Of the response.
        media_type: Of the response.
    """

    def __init__(
        self, body: AsyncIterator[bytes], close: Callable[[], Awaitable[None]], *, headers: dict[str, str], media_type: str
    ) -> None:
        super().__init__(None, headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._body = body
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            sending = self._send(send)
            await run_until_gone(sending, receive)
        except ClientDisconnect:
            scope["state"]["log_fields"]["cancelled"] = "yes"
        finally:
            await self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self._body:
            await _in_time(send({"type": "http.response.body", "body": piece, "more_body": True}))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _in_time(sending: Awaitable[None]) -> None:
    """Wait until a piece is taken.

    Not `asyncio.wait_for`: before Python 3.12 it swallows a cancellation that comes at the moment the piece is taken, and the whole of a
    text was then spoken to nobody (4 of 12 clients that went away, measured on two busy cores).

    Raises:
        ClientDisconnect: Nothing was taken for too long.
    """
    task = asyncio.ensure_future(sending)
    try:
        await asyncio.wait({task}, timeout=_STALLED_SECONDS)
        if not task.done():
            raise ClientDisconnect
        await task
    finally:
        task.cancel()


async def run_until_gone(work: Awaitable[T], receive: Receive) -> T:
    """What `work` gives; when the client goes first, `work` is cancelled.

    Raises:
        ClientDisconnect: The client went.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait({working, leaving})
        for task in (working, leaving):
            if not task.cancelled():
                task.exception()  # seen, or asyncio would report it as lost


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(kind: str, **fields: object) -> bytes:
    """One server-sent event in the form that OpenAI's clients read: only `data`, one JSON object with its `type`."""
    return b"data: " + json.dumps({"type": kind, **fields}, ensure_ascii=False).encode() + b"\n\n"


def audio_event(data: bytes) -> bytes:
    """Some encoded audio as `speech.audio.delta`."""
    return event("speech.audio.delta", audio=base64.b64encode(data).decode())


logger = logging.getLogger(__name__)

_CODEC_FRAMES_A_SECOND = 12.5  # Mimi's; what `usage` counts as output tokens
# Between the event of a failure and the end of its connection: a fetch() whose connection breaks drops what it has not handed over yet.
_TIME_TO_READ = 0.2
_CLIENT_CLOSED = 499  # nginx's status for a client that went away; only our log and metrics see it


@dataclass(frozen=True)
class _Plan:
    """A request, checked: from here on only a failure of ours can spoil it."""

    request: SpeechRequest
    text: str
    voice: Voice
    format: AudioFormat
    options: SpeechOptions
    tag: SyntheticTag | None

    @property
    def sse(self) -> bool:
        return self.request.stream_format == "sse"

    @property
    def streamed(self) -> bool:
        return self.options.streamed


class SpeechEndpoint:
    """Answers speech requests."""

    def __init__(self, settings: Settings, presets: VoicePresetManager, engine: TTSEngine, metrics: Metrics) -> None:
        self._settings = settings
        self._presets = presets
        self._engine = engine
        self._metrics = metrics
        self.captions = CaptionStore()

    async def answer(self, body: SpeechRequest, request: Request) -> Response:
        """The response to a speech request.

        Raises:
            TTSError: Whatever can be refused, and every failure before the first byte.
        """
        try:
            plan = self._plan(body, request)
        except TTSError as error:
            self._metrics.observe(model="-", format_name="-", outcome=str(error.status))
            raise
        utterance = self._engine.speak(plan.text, plan.voice, plan.options)
        try:
            if plan.streamed:
                return await self._stream(plan, utterance, request)
            return await self._complete(plan, utterance, request)
        except ClientDisconnect:
            await self._end(plan, utterance, request, "cancelled")
            return Response(status_code=_CLIENT_CLOSED)
        except BaseException as error:
            await self._end(plan, utterance, request, str(error.status) if isinstance(error, TTSError) else "500")
            raise

    def _plan(self, body: SpeechRequest, request: Request) -> _Plan:
        """Check everything that can be refused before any work.

        Raises:
            TTSError: What is wrong.
        """
        body.check_length(self._settings.max_input_length)
        voice = self._voice(self._presets.catalog.resolve(body.voice_name))
        text = self._engine.prepare_text(body.input, normalize=body.normalize)
        audio_format = FORMATS[body.response_format or self._settings.default_format]
        streamed = body.stream or body.stream_format is not None or audio_format.name == "pcm"
        seed = new_seed() if body.seed is None else body.seed
        options = SpeechOptions(seed, body.temperature, body.top_k, streamed)
        tag = SyntheticTag(voice.preset.model, voice.preset.name) if self._settings.synthetic_mark else None
        facts = {"characters": len(body.input), "voice": voice.preset.name, "model": voice.preset.model}
        request.state.log_fields.update(facts, format=audio_format.name, speed=f"{body.speed:g}", streamed="yes" if streamed else "no")
        return _Plan(body, text, voice, audio_format, options, tag)

    def _voice(self, voice: Voice) -> Voice:
        """The voice, or FALLBACK_VOICE in its place when it is not ready and the owner has named one."""
        try:
            self._engine.check_ready(voice)
        except ModelNotReadyError:
            fallback = self._fallback()
            if fallback is None:
                raise
            logger.warning("voice %s is not ready; FALLBACK_VOICE %s speaks instead", voice.preset.name, fallback.preset.name)
            return fallback
        return voice

    def _fallback(self) -> Voice | None:
        """FALLBACK_VOICE, where it is set, known and ready; a fault of this setting is not the caller's, who gets the first refusal."""
        try:
            fallback = self._presets.catalog.resolve(self._settings.fallback_voice)
            self._engine.check_ready(fallback)
        except TTSError:
            return None
        return fallback

    async def _complete(self, plan: _Plan, utterance: Utterance, request: Request) -> Response:
        async def work() -> tuple[bytes, float]:
            samples = await utterance.samples()
            converted = await convert(samples, utterance.sample_rate, plan.format, speed=plan.request.speed, tag=plan.tag)
            return converted.data, converted.duration

        data, duration = await run_until_gone(work(), request.receive)
        headers = _headers(plan, utterance) | {
            "X-Generation-Time": f"{utterance.generation_time:.3f}",
            "X-Audio-Duration": f"{duration:.3f}",
            "X-Retries": str(utterance.retries),
        }
        if utterance.word_error_rate is not None:
            headers["X-Word-Error-Rate"] = f"{utterance.word_error_rate:.3f}"
        if plan.request.timestamps:
            # The speed as it came out: ffmpeg's atempo meets the asked one to a percent only.
            speed = utterance.audio_seconds / duration
            key = new_key()
            self.captions.keep(key, captions_of(utterance.segments, utterance.timestamps, speed))
            headers["X-Timestamps"] = _timestamps_path(key)
        await self._end(plan, utterance, request, "200")
        return Response(data, headers=headers, media_type=plan.format.content_type)

    async def _stream(self, plan: _Plan, utterance: Utterance, request: Request) -> Response:
        """Start the response once the first bytes are there: until then a failure still has a status of its own."""
        spoken = _Spoken(plan, utterance)
        try:
            pieces = spoken.pieces()
            first = await run_until_gone(_next(pieces), request.receive)
        except BaseException:
            await spoken.close()
            raise
        headers = _headers(plan, utterance)
        body = _chain(first, pieces)
        if plan.sse:
            body = _events(plan, utterance, body)
            del headers["Content-Disposition"]
            headers["Cache-Control"] = "no-cache"
        elif plan.request.timestamps:
            key = new_key()
            body = self._then_captions(key, plan, utterance, body)
            headers["X-Timestamps"] = _timestamps_path(key)

        async def close() -> None:
            await spoken.close()
            outcome = "cancelled" if "cancelled" in request.state.log_fields else "broken" if spoken.failed else "200"
            await self._end(plan, utterance, request, outcome)

        media_type = "text/event-stream" if plan.sse else plan.format.content_type
        return SpeechStream(body, close, headers=headers, media_type=media_type)

    async def _then_captions(self, key: str, plan: _Plan, utterance: Utterance, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The pieces; their captions are kept before the client learns that it has them all."""
        async for piece in pieces:
            yield piece
        self.captions.keep(key, captions_of(utterance.segments, utterance.timestamps, plan.request.speed))

    async def _end(self, plan: _Plan, utterance: Utterance, request: Request, outcome: str) -> None:
        """Free the turn, and tell the log and the metrics what came of it."""
        await utterance.aclose()
        started, audio = utterance.generation_time > 0, utterance.audio_seconds
        self._metrics.observe(
            model=plan.voice.preset.model,
            format_name=plan.format.name,
            outcome=outcome,
            queue=utterance.queue_time if started else None,
            generation=utterance.generation_time if started else None,
            first_audio=utterance.first_audio_time,
            audio=audio or None,
        )
        facts: dict[str, Any] = {"queue": f"{utterance.queue_time:.3f}", "generation": f"{utterance.generation_time:.3f}"}
        facts["audio"] = f"{audio:.3f}"
        facts["rtf"] = f"{utterance.generation_time / audio:.3f}" if audio else "-"
        if utterance.first_audio_time is not None:
            facts["first_audio"] = f"{utterance.first_audio_time:.3f}"
        if utterance.retries:
            facts["retries"] = utterance.retries
        if utterance.word_error_rate is not None:
            facts["wer"] = f"{utterance.word_error_rate:.3f}"
        if outcome != "200":
            facts["outcome"] = outcome
        request.state.log_fields.update(facts)


class _Spoken:
    """A streamed utterance on its way through its one encoder."""

    def __init__(self, plan: _Plan, utterance: Utterance) -> None:
        self.failed = False
        self._utterance = utterance
        self._encoder = StreamEncoder(plan.format, utterance.sample_rate, speed=plan.request.speed, tag=plan.tag)
        self._error: BaseException | None = None
        self._pump: asyncio.Task[None] | None = None

    async def pieces(self) -> AsyncIterator[bytes]:
        """The encoded bytes; raises what went wrong in place of what is missing."""
        await self._utterance.begun()  # a request that waits for its turn holds no process
        async with self._encoder:
            self._pump = asyncio.create_task(self._feed())
            try:
                async for piece in self._encoder:
                    yield piece
            except TTSError as error:
                self._error = self._error or error
        if self._error:
            self.failed = True
            raise self._error

    async def close(self) -> None:
        """Stop feeding, and end the encoder's process."""
        if self._pump:
            self._pump.cancel()
            await asyncio.wait({self._pump})
        await self._encoder.aclose()

    async def _feed(self) -> None:
        """Take the samples as fast as the model makes them: the encoder's buffer, not the client, sets the pace."""
        try:
            async for samples in self._utterance:
                await self._encoder.write(samples)
            await self._encoder.finish()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._error = error
            await self._encoder.aclose()


def _headers(plan: _Plan, utterance: Utterance) -> dict[str, str]:
    return {
        "Content-Disposition": f"attachment; filename=speech.{plan.format.extension}",
        "X-Queue-Time": f"{utterance.queue_time:.3f}",
        "X-Voice": plan.voice.preset.name,
        "X-Model": plan.voice.preset.model,
        "X-Seed": str(utterance.seed),
    }


def _timestamps_path(key: str) -> str:
    return f"/v1/audio/speech/{key}/timestamps"


async def _events(plan: _Plan, utterance: Utterance, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces as OpenAI's events.

    A failure midway is an event too, the last one; then the connection is broken off, because a client that ignores events that it does
    not know (LiveKit's) would take a proper end for a whole answer.
    """
    told = 0
    try:
        async for piece in pieces:
            yield audio_event(piece)
            if plan.request.timestamps:
                captions = captions_of(utterance.segments, utterance.timestamps, plan.request.speed)
                for caption in captions[told:]:
                    yield event("speech.audio.timestamps", **vars(caption))
                told = len(captions)
    except Exception as error:
        told_as = error if isinstance(error, TTSError) else InternalError("The stream failed. The server's log has the details.")
        yield event("speech.audio.error", **told_as.envelope())
        await asyncio.sleep(_TIME_TO_READ)
        raise
    spoken = round(utterance.audio_seconds * _CODEC_FRAMES_A_SECOND)
    characters = len(plan.request.input)
    yield event("speech.audio.done", usage={"input_tokens": characters, "output_tokens": spoken, "total_tokens": characters + spoken})


async def _next(pieces: AsyncIterator[bytes]) -> bytes:
    async for piece in pieces:
        return piece
    raise InternalError("The encoder gave no audio.")


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece
