"""POST /v1/audio/speech and related routes: complete files, byte streams, event streams, timestamps, models."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
import re
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from audio_converter import Converted, Encoder
from audio_formats import FORMATS, SAMPLE_RATE, AudioFormat, SyntheticTag
from audio_joiner import SegmentTimestamp
from captions import AnswerCaptions, CaptionStore, WordCaption, WordFinder, captions_of, new_key, to_json, to_srt, to_webvtt
from config import Settings
from conversation_routes import Conversations, Turn
from errors import DeadlineError, InternalError, InvalidInputError, InvalidRequestError, NotFoundError, TTSError, shorten
from http_middleware import UnreadAudio, client_address, run_until_gone
from monitoring import Metrics
from schemas import (
    CAPTION_FILES,
    SPEECH_ANSWER,
    SPEECH_EXAMPLES,
    AudioModelList,
    Captions,
    Model,
    ModelList,
    SpeechFields,
    SpeechRequest,
    refusals,
)
from speech_model import CODEC_FRAMES_PER_SECOND, ContextPart, SpeechOptions
from tts_engine import TTSEngine, Utterance, new_seed
from voice_presets import Voice, VoicePresetManager

logger = logging.getLogger(__name__)

_EVENT_BYTES = 45_000  # of audio in one event: 60 kB in Base64
# Pause between an error event and the end of its connection: when a connection breaks, fetch() drops data that it has not delivered yet.
_ERROR_EVENT_SECONDS = 0.2

_MODELS = {
    "csm-1b": {"id": "csm-1b", "object": "model", "created": 1740000000, "owned_by": "sesame"},
    "hibari": {"id": "hibari", "object": "model", "created": 1760000000, "owned_by": "hibari"},
}
_RESAMPLED_FORMATS = ("pcm", "wav")
# OpenAI's models, with or without a date, and the one of Kokoro's clients.
_FOREIGN_MODEL = re.compile(r"(?:tts-1(?:-hd)?|gpt-4o-mini-tts)(?:-\d[\d-]{3,9})?|kokoro")


@dataclass(frozen=True)
class _Plan:
    """A validated request: everything that can be refused has been checked."""

    request: SpeechRequest
    text: str
    voice: Voice
    replaced: Voice | None
    """The requested voice, if it is not ready and `voice` speaks instead."""
    format: AudioFormat
    options: SpeechOptions
    tag: SyntheticTag | None


@dataclass(frozen=True)
class AnswerForm:
    """Another form of an answer with word times than audio or events.

    Attributes:
        media_type: Its type.
        complete: Returns the body for an audio file and its words.
        lines: Yields the body for the parts of a streamed file, each with the words that have become known.
    """

    media_type: str
    complete: Callable[[bytes, Sequence[WordCaption]], bytes]
    lines: Callable[[AsyncIterator[tuple[bytes, Sequence[WordCaption]]]], AsyncIterator[bytes]]


@dataclass
class _Run:
    """A request in progress: what the log and the metrics need at its end."""

    plan: _Plan | None = None
    utterance: Utterance | None = None
    streaming: bool = False
    """The status 200 has been decided, and the body is sent while it is generated."""

    def outcome(self, error: BaseException) -> str:
        """Return the `outcome` label of the metrics after `error`."""
        if isinstance(error, ClientDisconnect):
            return "cancelled"
        if self.streaming:
            return "broken"
        return str(error.status) if isinstance(error, TTSError) else "500"


class SpeechEndpoint:
    """Answers speech requests."""

    def __init__(
        self, settings: Settings, presets: VoicePresetManager, engine: TTSEngine, metrics: Metrics, conversations: Conversations
    ) -> None:
        self._conversations = conversations
        self._settings = settings
        self._presets = presets
        self._engine = engine
        self._metrics = metrics
        self.unread = UnreadAudio(settings)
        self.captions = CaptionStore()

    def knows(self, voice: str) -> bool:
        """Return whether there is a voice of this name."""
        return self._presets.catalog.knows(voice)

    def can_speak(self, voice: str) -> bool:
        """Return whether there is a voice of this name, and it can speak now."""
        return self.knows(voice) and self._engine.ready(self._presets.catalog.resolve(voice))

    async def answer(self, body: SpeechRequest, request: Request, form: AnswerForm | None = None) -> Response:
        """Return the response to a speech request.

        Args:
            body: The request.
            request: The HTTP request.
            form: Another form than audio or events.

        Raises:
            TTSError: The request is refused, or failed before the first byte.
            ClientDisconnect: The client disconnected before the first byte.
        """
        async with AsyncExitStack() as stack:
            run = await stack.enter_async_context(self._recorded(request))
            run.plan = plan = await self._plan(body, request, always_streamed=() if form else ("pcm",))
            run.utterance = utterance = self._speak(plan)
            utterance.on_complete = lambda: self._remember(plan, utterance)
            if not plan.options.streamed:
                return await self._complete(plan, utterance, request, form)
            encoded = _EncodedUtterance(plan, utterance, Unread(self.unread, client_address(request)))
            stack.push_async_callback(encoded.close)
            pieces = encoded.pieces()
            # The response starts after its first bytes exist: a failure before that still gets a status of its own.
            first = await run_until_gone(_first(pieces), request.receive)
            run.streaming = True
            return self._stream(plan, utterance, _chain(first, pieces), stack.pop_all(), form)

    @asynccontextmanager
    async def _recorded(self, request: Request) -> AsyncIterator[_Run]:
        """Free the queue slot and record the outcome in log and metrics when the request ends, for whatever reason."""
        run = _Run()
        outcome = "200"
        try:
            yield run
        except BaseException as error:
            outcome = run.outcome(error)
            raise
        finally:
            if run.plan is not None and run.utterance is not None:
                await run.utterance.aclose()
                self._observe(run.plan, run.utterance, outcome)
                request.state.log_fields.update(_log_fields(run.utterance, outcome))
            else:
                self._metrics.observe(model="-", format_name="-", outcome=outcome)

    async def _plan(self, body: SpeechRequest, request: Request, always_streamed: Collection[str]) -> _Plan:
        """Check everything that can be refused before any speech is generated.

        Raises:
            TTSError: The request is refused.
            ClientDisconnect: The client disconnected while its text was normalized.
        """
        self.unread.check(client_address(request))
        body.check_length(self._settings.max_input_length)
        voice, replaced = self._engine.choose_voice(body.voice_name)
        text = await run_until_gone(self._engine.prepared(body.input, normalize=body.normalize), request.receive)
        chosen = voice_in_time(self._engine, voice, len(text), _deadline_ms(body, request), body.on_deadline)
        voice, replaced = chosen, replaced if chosen is voice else replaced or voice
        audio_format = choose_format(body, self._settings.default_format)
        streamed = body.stream or body.stream_format is not None or audio_format.name in always_streamed
        seed = new_seed() if body.seed is None else body.seed
        options = SpeechOptions(
            seed,
            body.temperature,
            body.top_k,
            streamed,
            verbalize=body.normalize,
            speed=body.speed,
            context=self._context(body, voice),
            word_times=body.timestamps == "word",
        )
        tag = SyntheticTag(voice.preset.model, voice.preset.name) if self._settings.synthetic_mark else None
        fields = {"characters": len(body.input), "voice": voice.preset.name, "model": voice.preset.model}
        request.state.log_fields.update(fields, format=audio_format.name, speed=f"{body.speed:g}", streamed="yes" if streamed else "no")
        if replaced is not None:
            request.state.log_fields["fallback_for"] = replaced.id
        return _Plan(body, text, voice, replaced, audio_format, options, tag)

    def _context(self, body: SpeechRequest, voice: Voice) -> tuple[ContextPart, ...] | None:
        """Return what was said before in the request's conversation; None without one, or if the voice's model takes no context."""
        if body.conversation is None or not self._engine.takes_context(voice):
            return None
        return self._conversations.context(body.conversation)

    def _remember(self, plan: _Plan, utterance: Utterance) -> None:
        if plan.options.context is not None and plan.request.conversation is not None and utterance.said:
            turn = Turn("assistant", plan.voice.preset.speaker_id, list(utterance.said.values()))
            self._conversations.add(plan.request.conversation, turn)

    def _speak(self, plan: _Plan) -> Utterance:
        """Start the utterance.

        Raises:
            ModelNotReadyError: Another voice speaks for the requested one, and cannot speak this text: the client can try again later.
            InvalidInputError: The voice cannot speak this text.
            InvalidVoiceError: The text names a voice that cannot speak it.
            InputTooLongError: It would become too much audio.
        """
        try:
            return self._engine.speak(plan.text, plan.voice, plan.options)
        except InvalidInputError:
            if plan.replaced is not None:
                self._engine.check_ready(plan.replaced)
            raise

    async def _complete(self, plan: _Plan, utterance: Utterance, request: Request, form: AnswerForm | None) -> Response:
        file = await run_until_gone(_encoded_file(plan, utterance), request.receive)
        headers = _headers(plan, utterance) | {
            "X-Generation-Time": f"{utterance.generation_time:.3f}",
            "X-Audio-Duration": f"{file.duration:.3f}",
            "X-Retries": str(utterance.retries),
        }
        if utterance.word_error_rate is not None:
            headers["X-Word-Error-Rate"] = f"{utterance.word_error_rate:.3f}"
        data, media_type = file.data, plan.format.content_type
        if plan.request.timestamps:
            # The measured speed: ffmpeg's atempo filter meets the requested speed to one percent only.
            captions = _captions(plan, utterance, utterance.audio_seconds / file.duration)
            key = new_key()
            self.captions.keep(key, captions)
            headers["X-Timestamps"] = _timestamps_path(key)
            if form is not None:
                data, media_type = form.complete(data, captions.words or ()), form.media_type
        unread = Unread(self.unread, client_address(request))
        unread.check(len(data))
        return SpeechFile(data, unread, headers=headers, media_type=media_type)

    def _stream(
        self, plan: _Plan, utterance: Utterance, body: AsyncIterator[bytes], ending: AsyncExitStack, form: AnswerForm | None
    ) -> SpeechStream:
        headers = _headers(plan, utterance)
        media_type = plan.format.content_type
        if form is not None:
            body, media_type = form.lines(_with_words(plan, utterance, body)), form.media_type
            headers["Cache-Control"] = "no-cache"
        elif plan.request.stream_format == "sse":
            body = _events(plan, utterance, body)
            del headers["Content-Disposition"]
            headers["Cache-Control"] = "no-cache"
            media_type = "text/event-stream"
        elif plan.request.timestamps:
            key = new_key()
            body = self._then_captions(key, plan, utterance, body)
            headers["X-Timestamps"] = _timestamps_path(key)
        return SpeechStream(body, ending, headers=headers, media_type=media_type)

    async def _then_captions(self, key: str, plan: _Plan, utterance: Utterance, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the pieces, then keep their captions: they exist before the client sees the end of the body."""
        async for piece in pieces:
            yield piece
        speed = plan.request.speed
        self.captions.keep(key, _captions(plan, utterance, speed))

    def _observe(self, plan: _Plan, utterance: Utterance, outcome: str) -> None:
        self._metrics.observe(
            model=plan.voice.preset.model,
            format_name=plan.format.name,
            outcome=outcome,
            **utterance.measured,
        )


def _deadline_ms(body: SpeechRequest, request: Request) -> int | None:
    """Return the deadline of the body, else of the header X-Deadline-Ms.

    Raises:
        InvalidRequestError: The header is not a number of milliseconds.
    """
    given = request.headers.get("x-deadline-ms")
    if body.deadline_ms is not None or given is None:
        return body.deadline_ms
    if not re.fullmatch(r"[1-9][0-9]{0,6}", given.strip()):
        raise InvalidRequestError(
            f"X-Deadline-Ms={shorten(given)} is not a number of milliseconds.", param="deadline_ms", code="invalid_deadline_ms"
        )
    return int(given)


def voice_in_time(
    engine: TTSEngine, voice: Voice, characters: int, deadline: int | None, on_deadline: Literal["error", "fallback"]
) -> Voice:
    """Return the voice that can speak so many characters before the deadline, in milliseconds from now: `voice`, or else the built-in one.

    Raises:
        DeadlineError: Neither can, or no other voice may speak.
    """
    needed = None if deadline is None else engine.expected_seconds(voice, characters)
    if deadline is None or needed is None or needed * 1000 <= deadline:
        return voice
    fallback = engine.built_in_voice() if on_deadline == "fallback" else None
    if fallback is not None and fallback.id != voice.id and (engine.expected_seconds(fallback, characters) or 0) * 1000 <= deadline:
        return fallback
    raise DeadlineError(
        f"The speech would be complete in about {needed:.1f} s, not within 'deadline_ms'={deadline}. Allow more time, or send 'on_deadline': 'fallback'.",
        param="deadline_ms",
        headers={"X-Needed-Ms": str(math.ceil(needed * 1000)), "X-Should-Retry": "false"},
    )


def choose_format(fields: SpeechFields, default: str) -> AudioFormat:
    """Return the requested format, or the default.

    Raises:
        InvalidRequestError: The format cannot have the requested sample rate.
    """
    audio_format = FORMATS[fields.response_format or default]
    if fields.sample_rate != SAMPLE_RATE and audio_format.name not in _RESAMPLED_FORMATS:
        raise InvalidRequestError(
            f"'sample_rate'={fields.sample_rate} is possible for {' and '.join(_RESAMPLED_FORMATS)} only. Leave it out, or change 'response_format'.",
            param="sample_rate",
            code="invalid_sample_rate",
        )
    return audio_format


class Unread:
    """The generated but unread audio of one answer; counted until `close`."""

    def __init__(self, total: UnreadAudio, address: str) -> None:
        self._total = total
        self._address = address
        self._count = 0

    def check(self, more: int = 0) -> None:
        """Raise UnreadAudioError if there is no room for `more` bytes."""
        self._total.check(self._address, more)

    def set(self, count: int) -> None:
        """Set the size of what is unread."""
        self._total.add(self._address, count - self._count)
        self._count = count


class SpeechFile(Response):
    """Sends a complete file, which counts as unread until its end."""

    def __init__(self, data: bytes, unread: Unread, *, headers: dict[str, str], media_type: str) -> None:
        super().__init__(data, headers=headers, media_type=media_type)
        self._unread = unread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        self._unread.set(len(self.body))
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._unread.set(0)


class SpeechStream(Response):
    """Sends a body while it is generated.

    Args:
        body: Encoded audio or events. If it raises, the connection is closed before the end of the body, so that the client sees an
            error and never mistakes partial audio for a complete answer.
        ending: Entered before the body is sent and left after it, with the exception if one was raised; stops the work behind the body.
        headers: Response headers.
        media_type: Response content type.
    """

    def __init__(self, body: AsyncIterator[bytes], ending: AsyncExitStack, *, headers: dict[str, str], media_type: str) -> None:
        super().__init__(None, headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._body = body
        self._ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; return when it is complete or the client has disconnected."""
        with suppress(ClientDisconnect):
            async with self._ending:
                await run_until_gone(self._send(send), receive)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self._body:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)  # other requests get their turn even if this client reads as fast as we send
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _EncodedUtterance:
    """Encodes an utterance while it is generated."""

    def __init__(self, plan: _Plan, utterance: Utterance, unread: Unread) -> None:
        self._utterance = utterance
        self._unread = unread
        self._encoder = _encoder(plan, utterance)
        self._error: BaseException | None = None
        self._feeding: asyncio.Task[None] | None = None

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the encoded bytes. A failure of the model or the encoder is raised after the bytes that came before it."""
        await self._utterance.begun()  # a request that waits in the queue needs no ffmpeg process yet
        async with self._encoder:
            self._feeding = asyncio.create_task(self._feed())
            try:
                async for piece in self._encoder:
                    self._unread.set(self._encoder.unread + len(piece))
                    yield piece
            except TTSError as error:
                self._error = self._error or error
        if self._error:
            raise self._error

    async def close(self) -> None:
        """Stop feeding the encoder, and end its process."""
        if self._feeding:
            self._feeding.cancel()
            await asyncio.wait({self._feeding})
        await self._encoder.aclose()
        self._unread.set(0)

    async def _feed(self) -> None:
        """Write samples as fast as the model generates them, because a slow client must not slow the model down, up to MAX_UNREAD_MB."""
        try:
            async for samples in self._utterance:
                await self._encoder.write(samples)
                self._unread.set(self._encoder.unread)
                self._unread.check()
            await self._encoder.finish()
        except Exception as error:
            self._error = error
            await self._encoder.aclose()


def _encoder(plan: _Plan, utterance: Utterance) -> Encoder:
    return Encoder(
        plan.format,
        utterance.sample_rate,
        streamed=plan.options.streamed,
        speed=plan.request.speed,
        tag=plan.tag,
        output_rate=plan.request.sample_rate,
    )


async def _encoded_file(plan: _Plan, utterance: Utterance) -> Converted:
    """Encode an utterance while it is generated, and return the complete file."""
    await utterance.begun()  # a request that waits in the queue needs no ffmpeg process yet
    async with _encoder(plan, utterance) as encoder:
        async for samples in utterance:
            await encoder.write(samples)
        return await encoder.file()


def _headers(plan: _Plan, utterance: Utterance) -> dict[str, str]:
    transliterated = {"X-Transliterated": str(utterance.transliterated)} if utterance.transliterated else {}
    fallback = {"X-Fallback-For": plan.replaced.id} if plan.replaced else {}
    if plan.request.conversation is not None:
        fallback["X-Conversation"] = "ignored" if plan.options.context is None else "used"
    return (
        transliterated
        | fallback
        | {
            "Content-Disposition": f"attachment; filename=speech.{plan.format.name}",
            "X-Queue-Time": f"{utterance.queue_time:.3f}",
            "X-Voice": plan.voice.preset.name,
            "X-Model": plan.voice.preset.model,
            "X-Seed": str(utterance.seed),
        }
    )


def _log_fields(utterance: Utterance, outcome: str) -> dict[str, Any]:
    audio = utterance.audio_seconds
    fields: dict[str, Any] = {"queue": f"{utterance.queue_time:.3f}", "generation": f"{utterance.generation_time:.3f}"}
    fields["audio"] = f"{audio:.3f}"
    fields["rtf"] = f"{utterance.generation_time / audio:.3f}" if audio else "-"
    if utterance.first_audio_time is not None:
        fields["first_audio"] = f"{utterance.first_audio_time:.3f}"
    if utterance.retries:
        fields["retries"] = utterance.retries
    if utterance.word_error_rate is not None:
        fields["wer"] = f"{utterance.word_error_rate:.3f}"
    if outcome != "200":
        fields["outcome"] = outcome
    return fields


def _timestamps_path(key: str) -> str:
    return f"/v1/audio/speech/{key}/timestamps"


async def _events(plan: _Plan, utterance: Utterance, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the pieces as OpenAI's server-sent events.

    After a failure the last event is an error, and the connection is closed before the end of the body: a client that ignores unknown
    events (LiveKit's does) would otherwise take the answer for complete.
    """
    sent = 0
    try:
        async for piece in pieces:
            for start in range(0, len(piece), _EVENT_BYTES):
                yield _event("speech.audio.delta", audio=base64.b64encode(piece[start : start + _EVENT_BYTES]).decode())
            for event in _timestamp_events(plan, utterance, sent):
                yield event
                sent += 1
    except Exception as error:
        shown = error if isinstance(error, TTSError) else InternalError("The stream failed. The server's log has the details.")
        yield _event("speech.audio.error", **shown.envelope())
        await asyncio.sleep(_ERROR_EVENT_SECONDS)
        raise
    frames = round(utterance.audio_seconds * CODEC_FRAMES_PER_SECOND)  # the output tokens, as of a codec model
    characters = len(plan.request.input)
    yield _event("speech.audio.done", usage={"input_tokens": characters, "output_tokens": frames, "total_tokens": characters + frames})


def _timestamp_events(plan: _Plan, utterance: Utterance, sent: int) -> Iterator[bytes]:
    """Yield an event for each finished segment after the first `sent`, if the request asks for timestamps."""
    for timestamp in list(utterance.timestamps)[sent:] if plan.request.timestamps else ():
        (caption,) = captions_of(utterance.segments, [timestamp], plan.request.speed)
        fields: dict[str, object] = dict(vars(caption))
        if plan.request.timestamps == "word":
            fields["words"] = [vars(word) for word in _words(plan, utterance, timestamp)]
        yield _event("speech.audio.timestamps", **fields)


def _words(plan: _Plan, utterance: Utterance, timestamp: SegmentTimestamp) -> list[WordCaption]:
    """Return the words of a finished segment of a stream."""
    end = timestamp.end / plan.request.speed if timestamp.segment == len(utterance.segments) - 1 else None
    return _finder(plan, utterance).words([timestamp], plan.request.speed, end)


async def _with_words(
    plan: _Plan, utterance: Utterance, pieces: AsyncIterator[bytes]
) -> AsyncIterator[tuple[bytes, Sequence[WordCaption]]]:
    """Yield each piece with the words of the segments that have ended since the one before."""
    sent = 0
    async for piece in pieces:
        ended = utterance.timestamps[sent:]
        sent += len(ended)
        yield piece, [word for timestamp in ended for word in _words(plan, utterance, timestamp)]
    if left := utterance.timestamps[sent:]:
        yield b"", [word for timestamp in left for word in _words(plan, utterance, timestamp)]


def _captions(plan: _Plan, utterance: Utterance, speed: float) -> AnswerCaptions:
    """Return the captions of a complete answer."""
    captions = captions_of(utterance.segments, utterance.timestamps, speed)
    if plan.request.timestamps != "word":
        return AnswerCaptions(captions)
    end = utterance.timestamps[-1].end / speed if utterance.timestamps else None
    return AnswerCaptions(captions, _finder(plan, utterance).words(utterance.timestamps, speed, end))


def _finder(plan: _Plan, utterance: Utterance) -> WordFinder:
    return WordFinder(plan.request.input, utterance.segments, utterance.spoken.reading)


def _event(kind: str, **fields: object) -> bytes:
    """Return one server-sent event as OpenAI's clients read it: a `data` line with one JSON object that has a `type`."""
    return b"data: " + json.dumps({"type": kind, **fields}, ensure_ascii=False).encode() + b"\n\n"


async def _first(pieces: AsyncIterator[bytes]) -> bytes:
    async for piece in pieces:
        return piece
    raise InternalError("The encoder gave no audio.")


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


async def _endpoint(request: Request) -> SpeechEndpoint:
    endpoint: SpeechEndpoint = request.app.state.server.speech
    return endpoint


Endpoint = Annotated[SpeechEndpoint, Depends(_endpoint)]

router = APIRouter(tags=["speech"])


@router.post(
    "/audio/speech",
    operation_id="createSpeech",
    summary="Create speech",
    response_class=Response,
    responses={200: SPEECH_ANSWER, **refusals(429)},
)
async def create_speech(
    body: Annotated[SpeechRequest, Body(openapi_examples=SPEECH_EXAMPLES)], request: Request, endpoint: Endpoint
) -> Response:
    """Speak a text. The answer is a complete audio file, or a stream of bytes or events if the request asks for one."""
    return await endpoint.answer(body, request)


@router.get(
    "/audio/speech/{answer}/timestamps",
    operation_id="getTimestamps",
    summary="Get timestamps",
    response_model=Captions,
    response_model_exclude_unset=True,
    responses={200: CAPTION_FILES, **refusals(404)},
)
async def get_timestamps(answer: str, endpoint: Endpoint, format: Literal["json", "vtt", "srt"] = "json") -> Response:
    """Return the start and end of each segment of an answer that was requested with `timestamps: true`, and of each word with `"word"`.

    The answer's `X-Timestamps` header holds this path. Timestamps of a streamed answer exist after its end.
    """
    found = endpoint.captions.get(answer)
    if found is None:
        raise NotFoundError(
            "There are no timestamps under this id. They exist once an answer is complete, and are kept for the last 64 answers that asked for them."
        )
    if format == "vtt":
        return Response(to_webvtt(found.finest), media_type="text/vtt")
    if format == "srt":
        return Response(to_srt(found.finest), media_type="application/x-subrip")
    return JSONResponse(to_json(found.captions, found.words))


@router.get("/audio/models", operation_id="listAudioModels", summary="List models for Open WebUI", response_model=AudioModelList)
async def list_audio_models() -> dict[str, Any]:
    """Return the models in the form that Open WebUI reads."""
    return {"models": [{"id": name} for name in _MODELS]}


@router.get("/models", operation_id="listModels", summary="List models", response_model=ModelList)
async def list_models() -> dict[str, Any]:
    """Return the models in OpenAI's form."""
    return {"object": "list", "data": list(_MODELS.values())}


@router.get("/models/{model}", operation_id="getModel", summary="Get a model", response_model=Model, responses=refusals(404))
async def get_model(model: str) -> dict[str, Any]:
    """Return one model in OpenAI's form. The names of OpenAI's and Kokoro's models are accepted too, as in speech requests: some clients look them up first."""
    if _FOREIGN_MODEL.fullmatch(model):
        return _MODELS["csm-1b"] | {"id": model}
    if model not in _MODELS:
        raise NotFoundError(f"Model {shorten(model)} not found. Models: {', '.join(_MODELS)}.", param="model", code="model_not_found")
    return _MODELS[model]
