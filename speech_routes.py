"""POST /v1/audio/speech: check a request, choose its voice, speak; the timestamps of an answer."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from audio_formats import FORMATS, SAMPLE_RATE, AudioFormat, SyntheticTag
from captions import CaptionStore, new_key, to_json, to_srt, to_webvtt
from config import Settings
from conversation_routes import Conversations, Turn
from errors import DeadlineError, InternalError, InvalidInputError, InvalidRequestError, NotFoundError, TTSError, shorten
from http_middleware import UnreadAudio, client_address, run_until_gone
from monitoring import Metrics
from schemas import SPEECH_EXAMPLE, Document, ResponseModel, SpeechFields, SpeechRequest, refusals
from speech_model import SpeechOptions
from speech_response import SPEECH_ANSWER, Answer, AnswerForm, Plan, SpeechFile, SpeechStream, Unread
from tts_engine import TTSEngine, Utterance, new_seed
from voice_presets import Voice, VoicePresetManager

_RESAMPLED_FORMATS = ("pcm", "wav")
_EXAMPLES: Document = {
    "mp3": {"summary": "MP3, a complete file", "value": SPEECH_EXAMPLE},
    "opus": {"summary": "Opus in Ogg", "value": SPEECH_EXAMPLE | {"response_format": "opus"}},
    "aac": {"summary": "AAC", "value": SPEECH_EXAMPLE | {"response_format": "aac"}},
    "flac": {"summary": "FLAC, lossless", "value": SPEECH_EXAMPLE | {"response_format": "flac"}},
    "wav": {"summary": "WAV at 8 kHz, as telephones use it", "value": SPEECH_EXAMPLE | {"response_format": "wav", "sample_rate": 8000}},
    "pcm": {"summary": "PCM: raw samples, as a stream", "value": SPEECH_EXAMPLE | {"response_format": "pcm"}},
    "stream": {"summary": "MP3, as a stream", "value": SPEECH_EXAMPLE | {"stream": True}},
    "events": {
        "summary": "Server-sent events with the times of words",
        "value": SPEECH_EXAMPLE | {"stream_format": "sse", "timestamps": "word", "voice": "heart"},
    },
    "repeatable": {
        "summary": "The same samples each time: a voice, a speed and a seed",
        "value": SPEECH_EXAMPLE | {"voice": "heart", "speed": 1.25, "seed": 7},
    },
}
"""Requests for `/docs`, one for each format and for what else a request can ask for."""

_TEXT: Document = {"schema": {"type": "string"}}
_CAPTION_FILES: Document = {"content": {"text/vtt": _TEXT, "application/x-subrip": _TEXT}}


class SpokenCaption(ResponseModel):
    """A segment of the text, with its start and end in seconds."""

    group: int
    text: str
    start: float
    end: float


class SpokenWordCaption(SpokenCaption):
    """A word, with its start and end in seconds and its place in the request's `input`."""

    start_char: int
    end_char: int


class Captions(ResponseModel):
    """The timestamps of an answer. `words` is present if they were requested; empty if the voice does not know them."""

    captions: list[SpokenCaption]
    words: list[SpokenWordCaption] | None = None


@dataclass
class _Run:
    """A request in progress: what the log and the metrics need at its end."""

    plan: Plan | None = None
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


class SpeechService:
    """Answers speech requests, and has what they share with the texts that arrive through a WebSocket.

    Args:
        metrics: Gets one observation for each request, and for each piece of a WebSocket's text.
        conversations: What was said before.

    Attributes:
        unread: Counts the audio that clients have not read.
        captions: Those of the latest answers.
        stopping: Set when the shutdown begins.
    """

    def __init__(
        self, settings: Settings, presets: VoicePresetManager, engine: TTSEngine, metrics: Metrics, conversations: Conversations
    ) -> None:
        self.settings = settings
        self.presets = presets
        self.engine = engine
        self.conversations = conversations
        self.unread = UnreadAudio(settings)
        self.captions = CaptionStore()
        self.stopping = asyncio.Event()
        self._metrics = metrics

    def drain(self) -> None:
        """Let all WebSockets complete what they have begun, and close."""
        self.stopping.set()

    def knows(self, voice: str) -> bool:
        """Return whether there is a voice of this name."""
        return self.presets.catalog.knows(voice)

    def can_speak(self, voice: str) -> bool:
        """Return whether there is a voice of this name, and it can speak now."""
        return self.knows(voice) and self.engine.ready(self.presets.catalog.resolve(voice))

    def tag(self, voice: Voice) -> SyntheticTag | None:
        """Return what marks the voice's audio as synthetic, if SYNTHETIC_MARK is set."""
        return SyntheticTag(voice.preset.model, voice.preset.name) if self.settings.synthetic_mark else None

    def options(self, fields: SpeechFields, voice: Voice, seed: int, *, streamed: bool) -> SpeechOptions:
        """Return the options of an utterance, with what was said before in its conversation if the voice's model takes that."""
        context = None
        if fields.conversation is not None and self.engine.takes_context(voice):
            context = self.conversations.context(fields.conversation)
        return SpeechOptions(
            seed,
            fields.temperature,
            fields.top_k,
            streamed,
            verbalize=fields.normalize,
            speed=fields.speed,
            context=context,
            word_times=fields.timestamps == "word",
        )

    def observe(self, voice: Voice, audio_format: AudioFormat, utterance: Utterance, outcome: str) -> None:
        """Record an utterance in the metrics."""
        self._metrics.observe(voice.preset.model, audio_format.name, outcome, utterance.measured)

    async def answer(self, body: SpeechRequest, request: Request, form: AnswerForm | None = None) -> Response:
        """Return the response to a speech request.

        Args:
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
            answer = Answer(plan, utterance, Unread(self.unread, client_address(request)))
            if not plan.options.streamed:
                return await self._complete(answer, request, form)
            stack.push_async_callback(answer.close)
            pieces = answer.pieces()
            # The response starts after its first bytes exist: a failure before that still gets a status of its own.
            first = await run_until_gone(_first(pieces), request.receive)
            run.streaming = True
            return self._stream(answer, _chain(first, pieces), stack.pop_all(), form)

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
                self.observe(run.plan.voice, run.plan.format, run.utterance, outcome)
                request.state.log_fields.update(_log_fields(run.utterance, outcome))
            else:
                self._metrics.observe("-", "-", outcome, {})

    async def _plan(self, body: SpeechRequest, request: Request, always_streamed: Collection[str]) -> Plan:
        """Check everything that can be refused before any speech is generated.

        Raises:
            TTSError: The request is refused.
            ClientDisconnect: The client disconnected while its text was normalized.
        """
        self.unread.check(client_address(request))
        body.check_length(self.settings.max_input_length)
        voice, replaced = self.engine.choose_voice(body.voice_name)
        text = await run_until_gone(self.engine.prepared(body.input, normalize=body.normalize), request.receive)
        chosen = voice_in_time(self.engine, voice, len(text), _deadline_ms(body, request), body.on_deadline)
        voice, replaced = chosen, replaced if chosen is voice else replaced or voice
        audio_format = choose_format(body, self.settings.default_format)
        streamed = body.stream or body.stream_format is not None or audio_format.name in always_streamed
        seed = new_seed() if body.seed is None else body.seed
        options = self.options(body, voice, seed, streamed=streamed)
        fields = {"characters": len(body.input), "voice": voice.preset.name, "model": voice.preset.model}
        request.state.log_fields.update(fields, format=audio_format.name, speed=f"{body.speed:g}", streamed="yes" if streamed else "no")
        if replaced is not None:
            request.state.log_fields["fallback_for"] = replaced.id
        return Plan(body, text, voice, replaced, audio_format, options, self.tag(voice))

    def _remember(self, plan: Plan, utterance: Utterance) -> None:
        if plan.options.context is not None and plan.request.conversation is not None and utterance.said:
            turn = Turn("assistant", plan.voice.preset.speaker_id, list(utterance.said.values()))
            self.conversations.add(plan.request.conversation, turn)

    def _speak(self, plan: Plan) -> Utterance:
        """Start the utterance.

        Raises:
            ModelNotReadyError: Another voice speaks for the requested one, and cannot speak this text: the client can try again later.
            InvalidInputError: The voice cannot speak this text.
            InvalidVoiceError: The text names a voice that cannot speak it.
            InputTooLongError: It would become too much audio.
        """
        try:
            return self.engine.speak(plan.text, plan.voice, plan.options)
        except InvalidInputError:
            if plan.replaced is not None:
                self.engine.check_ready(plan.replaced)
            raise

    async def _complete(self, answer: Answer, request: Request, form: AnswerForm | None) -> Response:
        plan, utterance = answer.plan, answer.utterance
        file = await run_until_gone(answer.file(), request.receive)
        headers = answer.headers() | {
            "X-Generation-Time": f"{utterance.generation_time:.3f}",
            "X-Audio-Duration": f"{file.duration:.3f}",
            "X-Retries": str(utterance.retries),
        }
        if utterance.word_error_rate is not None:
            headers["X-Word-Error-Rate"] = f"{utterance.word_error_rate:.3f}"
        data, media_type = file.data, plan.format.content_type
        if plan.request.timestamps:
            # The measured speed: ffmpeg's atempo filter meets the requested speed to one percent only.
            captions = answer.captions(utterance.audio_seconds / file.duration)
            key = new_key()
            self.captions.keep(key, captions)
            headers["X-Timestamps"] = _timestamps_path(key)
            if form is not None:
                data, media_type = form.complete(data, captions.words or ()), form.media_type
        answer.unread.check(len(data))
        return SpeechFile(data, answer.unread, headers=headers, media_type=media_type)

    def _stream(self, answer: Answer, body: AsyncIterator[bytes], ending: AsyncExitStack, form: AnswerForm | None) -> SpeechStream:
        request, headers = answer.plan.request, answer.headers()
        media_type = answer.plan.format.content_type
        if form is not None:
            body, media_type = form.lines(answer.with_words(body)), form.media_type
            headers["Cache-Control"] = "no-cache"
        elif request.stream_format == "sse":
            body = answer.events(body)
            del headers["Content-Disposition"]
            headers["Cache-Control"] = "no-cache"
            media_type = "text/event-stream"
        elif request.timestamps:
            key = new_key()
            body = self._then_captions(key, answer, body)
            headers["X-Timestamps"] = _timestamps_path(key)
        return SpeechStream(body, ending, headers=headers, media_type=media_type)

    async def _then_captions(self, key: str, answer: Answer, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the pieces, then keep their captions: they exist before the client sees the end of the body."""
        async for piece in pieces:
            yield piece
        self.captions.keep(key, answer.captions(answer.plan.request.speed))


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


async def _first(pieces: AsyncIterator[bytes]) -> bytes:
    async for piece in pieces:
        return piece
    raise InternalError("The encoder gave no audio.")


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


async def _service(request: Request) -> SpeechService:
    service: SpeechService = request.app.state.server.speech
    return service


Service = Annotated[SpeechService, Depends(_service)]

router = APIRouter(tags=["speech"])


@router.post(
    "/audio/speech",
    operation_id="createSpeech",
    summary="Create speech",
    response_class=Response,
    responses={200: SPEECH_ANSWER, **refusals(429)},
)
async def create_speech(body: Annotated[SpeechRequest, Body(openapi_examples=_EXAMPLES)], request: Request, service: Service) -> Response:
    """Speak a text. The answer is a complete audio file, or a stream of bytes or events if the request asks for one."""
    return await service.answer(body, request)


@router.get(
    "/audio/speech/{answer}/timestamps",
    operation_id="getTimestamps",
    summary="Get timestamps",
    response_model=Captions,
    response_model_exclude_unset=True,
    responses={200: _CAPTION_FILES, **refusals(404)},
)
async def get_timestamps(answer: str, service: Service, format: Literal["json", "vtt", "srt"] = "json") -> Response:
    """Return the start and end of each segment of an answer that was requested with `timestamps: true`, and of each word with `"word"`.

    The answer's `X-Timestamps` header holds this path. Timestamps of a streamed answer exist after its end.
    """
    found = service.captions.get(answer)
    if found is None:
        raise NotFoundError(
            "There are no timestamps under this id. They exist once an answer is complete, and are kept for the last 64 answers that asked for them."
        )
    if format == "vtt":
        return Response(to_webvtt(found.finest), media_type="text/vtt")
    if format == "srt":
        return Response(to_srt(found.finest), media_type="application/x-subrip")
    return JSONResponse(to_json(found.captions, found.words))
