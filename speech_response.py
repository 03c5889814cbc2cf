"""Answers to speech requests: complete files, byte streams, event streams and their captions; and the messages of a WebSocket."""

from __future__ import annotations

import asyncio
import base64
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from audio_converter import Converted, Encoder
from audio_formats import FORMATS, AudioFormat, SyntheticTag
from audio_joiner import SegmentTimestamp
from captions import AnswerCaptions, WordCaption, WordFinder, captions_of
from errors import InternalError, TTSError
from http_middleware import UnreadAudio, run_until_gone
from schemas import Document, SpeechRequest
from speech_model import CODEC_FRAMES_PER_SECOND, SpeechOptions
from tts_engine import Utterance
from voice_presets import Voice

_EVENT_BYTES = 45_000  # of audio in one event: 60 kB in Base64
# Pause between an error event and the end of its connection: when a connection breaks, fetch() drops data that it has not delivered yet.
_ERROR_EVENT_SECONDS = 0.2

_MAX_WAITING_EVENTS = 256  # that a client leaves unread before the server stops to read from its WebSocket
_AUDIO_BYTES = 48_000  # in one message: a second of pcm

Event = dict[str, Any]

_BINARY: Document = {"schema": {"type": "string", "format": "binary"}}
_EVENT_KINDS = [f"speech.audio.{kind}" for kind in ("delta", "timestamps", "done", "error")]
# FastAPI too describes an event of a stream by `itemSchema`, which OpenAPI has since 3.2.
_EVENTS: Document = {
    "itemSchema": {
        "type": "object",
        "properties": {
            "data": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": {"type": "object", "properties": {"type": {"enum": _EVENT_KINDS}}, "required": ["type"]},
            }
        },
        "required": ["data"],
    }
}
_SPEECH_HEADERS = {
    "X-Voice": "The voice that speaks.",
    "X-Fallback-For": "The requested voice, if it is not ready and X-Voice speaks instead.",
    "X-Model": "The model of this voice.",
    "X-Transliterated": "How many words in foreign scripts are spoken in Latin letters; absent if none.",
    "X-Seed": "Send it as `seed` to get the same samples again for the same text and voice.",
    "X-Queue-Time": "Seconds spent in the queue.",
    "X-Generation-Time": "Seconds that the model needed; complete files only.",
    "X-Audio-Duration": "Seconds of speech; complete files only.",
    "X-Retries": "How many segments were generated again; complete files only.",
    "X-Word-Error-Rate": "The worst segment's word error rate; complete files only, with VERIFY.",
    "X-Timestamps": "The path of the timestamps, if they were requested.",
    "X-Conversation": "With `conversation`: `used`, or `ignored` because the voice's model takes no context.",
}
SPEECH_ANSWER: Document = {
    "description": "The speech",
    "content": {form.content_type: _BINARY for form in FORMATS.values()} | {"text/event-stream": _EVENTS},
    "headers": {name: {"description": text, "schema": {"type": "string"}} for name, text in _SPEECH_HEADERS.items()},
}


@dataclass(frozen=True)
class Plan:
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


class Unread:
    """The generated but unread audio of one answer."""

    def __init__(self, total: UnreadAudio, address: str) -> None:
        self._total = total
        self._address = address
        self._count = 0

    def check(self, more: int = 0) -> None:
        """Raise UnreadAudioError if there is no room for `more` bytes."""
        self._total.check(self._address, more)

    def set(self, count: int) -> None:
        """Set the size of what is unread; 0 at the end."""
        self._total.add(self._address, count - self._count)
        self._count = count


class Answer:
    """An utterance on its way to the client, encoded while it is generated.

    Args:
        plan: What is answered.
        utterance: Speaks.
        unread: Counts the audio that the client has not read.
    """

    def __init__(self, plan: Plan, utterance: Utterance, unread: Unread) -> None:
        self.plan = plan
        self.utterance = utterance
        self.unread = unread
        self._encoder = Encoder(
            plan.format,
            utterance.sample_rate,
            streamed=plan.options.streamed,
            speed=plan.request.speed,
            tag=plan.tag,
            output_rate=plan.request.sample_rate,
        )
        self._error: BaseException | None = None
        self._feeding: asyncio.Task[None] | None = None

    async def file(self) -> Converted:
        """Return the complete file.

        Raises:
            TTSError: The model or the encoder failed.
        """
        await self.utterance.begun()  # a request that waits in the queue needs no ffmpeg process yet
        async with self._encoder as encoder:
            async for samples in self.utterance:
                await encoder.write(samples)
            return await encoder.file()

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the encoded bytes. A failure of the model or the encoder is raised after the bytes that came before it."""
        await self.utterance.begun()
        async with self._encoder:
            self._feeding = asyncio.create_task(self._feed())
            try:
                async for piece in self._encoder:
                    self.unread.set(self._encoder.unread + len(piece))
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
        self.unread.set(0)

    def headers(self) -> dict[str, str]:
        """Return the headers of every answer."""
        plan, utterance = self.plan, self.utterance
        headers = {"X-Transliterated": str(utterance.transliterated)} if utterance.transliterated else {}
        if plan.replaced:
            headers["X-Fallback-For"] = plan.replaced.id
        if plan.request.conversation is not None:
            headers["X-Conversation"] = "ignored" if plan.options.context is None else "used"
        return headers | {
            "Content-Disposition": f"attachment; filename=speech.{plan.format.name}",
            "X-Queue-Time": f"{utterance.queue_time:.3f}",
            "X-Voice": plan.voice.preset.name,
            "X-Model": plan.voice.preset.model,
            "X-Seed": str(utterance.seed),
        }

    def captions(self, speed: float) -> AnswerCaptions:
        """Return the captions of a complete answer."""
        captions = captions_of(self.utterance.segments, self.utterance.timestamps, speed)
        if self.plan.request.timestamps != "word":
            return AnswerCaptions(captions)
        end = self.utterance.timestamps[-1].end / speed if self.utterance.timestamps else None
        return AnswerCaptions(captions, self._finder.words(self.utterance.timestamps, speed, end))

    async def events(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the pieces as OpenAI's server-sent events.

        After a failure the last event is an error, and the connection is closed before the end of the body: a client that ignores unknown
        events (LiveKit's does) would otherwise take the answer for complete.
        """
        sent = 0
        try:
            async for piece in pieces:
                for start in range(0, len(piece), _EVENT_BYTES):
                    yield _event("speech.audio.delta", audio=base64.b64encode(piece[start : start + _EVENT_BYTES]).decode())
                for event in self._timestamp_events(sent):
                    yield event
                    sent += 1
        except Exception as error:
            shown = error if isinstance(error, TTSError) else InternalError("The stream failed. The server's log has the details.")
            yield _event("speech.audio.error", **shown.envelope())
            await asyncio.sleep(_ERROR_EVENT_SECONDS)
            raise
        frames = round(self.utterance.audio_seconds * CODEC_FRAMES_PER_SECOND)  # the output tokens, as of a codec model
        characters = len(self.plan.request.input)
        yield _event("speech.audio.done", usage={"input_tokens": characters, "output_tokens": frames, "total_tokens": characters + frames})

    async def with_words(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[tuple[bytes, Sequence[WordCaption]]]:
        """Yield each piece with the words of the segments that have ended since the one before."""
        sent = 0
        async for piece in pieces:
            ended = self.utterance.timestamps[sent:]
            sent += len(ended)
            yield piece, [word for timestamp in ended for word in self._words(timestamp)]
        if left := self.utterance.timestamps[sent:]:
            yield b"", [word for timestamp in left for word in self._words(timestamp)]

    def _timestamp_events(self, sent: int) -> Iterator[bytes]:
        """Yield an event for each finished segment after the first `sent`, if the request asks for timestamps."""
        for timestamp in list(self.utterance.timestamps)[sent:] if self.plan.request.timestamps else ():
            (caption,) = captions_of(self.utterance.segments, [timestamp], self.plan.request.speed)
            fields: dict[str, object] = dict(vars(caption))
            if self.plan.request.timestamps == "word":
                fields["words"] = [vars(word) for word in self._words(timestamp)]
            yield _event("speech.audio.timestamps", **fields)

    def _words(self, timestamp: SegmentTimestamp) -> list[WordCaption]:
        """Return the words of a finished segment of a stream."""
        speed = self.plan.request.speed
        end = timestamp.end / speed if timestamp.segment == len(self.utterance.segments) - 1 else None
        return self._finder.words([timestamp], speed, end)

    @cached_property
    def _finder(self) -> WordFinder:
        return WordFinder(self.plan.request.input, self.utterance.segments, self.utterance.spoken.reading)

    async def _feed(self) -> None:
        """Write samples as fast as the model generates them, because a slow client must not slow the model down, up to MAX_UNREAD_MB."""
        try:
            async for samples in self.utterance:
                await self._encoder.write(samples)
                self.unread.set(self._encoder.unread)
                self.unread.check()
            await self._encoder.finish()
        except Exception as error:
            self._error = error
            await self._encoder.aclose()


def _event(kind: str, **fields: object) -> bytes:
    """Return one server-sent event as OpenAI's clients read it: a `data` line with one JSON object that has a `type`."""
    return b"data: " + json.dumps({"type": kind, **fields}, ensure_ascii=False).encode() + b"\n\n"


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


class Outbox:
    """Sends events and audio in the order in which they are put in.

    Args:
        unread: Counts the audio that has not been sent.
    """

    def __init__(self, websocket: WebSocket, unread: Unread) -> None:
        self._websocket = websocket
        self._unread = unread
        self._items: deque[Event | bytes] = deque()
        self._filled = asyncio.Event()
        self._roomy = asyncio.Event()
        self._roomy.set()
        self._sent = asyncio.Event()
        self._sent.set()
        self._bytes = 0

    @property
    def empty(self) -> bool:
        """Whether everything has been sent."""
        return self._sent.is_set()

    async def sent(self) -> None:
        """Wait until everything has been sent."""
        await self._sent.wait()

    def put(self, item: Event | bytes) -> None:
        """Add an event, or audio.

        Raises:
            UnreadAudioError: The client has left too much audio unread.
        """
        if isinstance(item, bytes):
            self._count(len(item))
            self._unread.check()
        self._items.append(item)
        self._filled.set()
        self._sent.clear()
        if len(self._items) > _MAX_WAITING_EVENTS:
            self._roomy.clear()

    def drop_audio(self) -> None:
        """Remove the audio that has not been sent."""
        self._items = deque(item for item in self._items if not isinstance(item, bytes))
        self._count(-self._bytes)

    async def room(self) -> None:
        """Wait until the client has read its events."""
        await self._roomy.wait()

    async def run(self) -> None:
        """Send until the client disconnects."""
        try:
            while True:
                await self._filled.wait()
                while self._items:
                    await self._send(self._items.popleft())
                    if len(self._items) <= _MAX_WAITING_EVENTS:
                        self._roomy.set()
                self._filled.clear()
                self._sent.set()
        finally:
            self.drop_audio()
            self._unread.set(0)

    async def _send(self, item: Event | bytes) -> None:
        if isinstance(item, dict):
            await self._websocket.send_text(json.dumps(item, ensure_ascii=False))
            return
        for start in range(0, len(item), _AUDIO_BYTES):
            await self._websocket.send_bytes(item[start : start + _AUDIO_BYTES])
            await asyncio.sleep(0)  # other requests get their turn even if this client reads as fast as we send
        self._count(-min(len(item), self._bytes))

    def _count(self, more: int) -> None:
        self._bytes += more
        self._unread.set(self._bytes)
