"""Speak one text while it is still being written: pieces in, audio and events out."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from contextlib import suppress
from typing import Any

import anyio
import regex
from starlette.websockets import WebSocket

from audio_converter import Encoder, needs_ffmpeg, to_int16
from audio_formats import AudioFormat, Samples, SyntheticTag
from audio_joiner import SegmentTimestamp
from captions import WordFinder, captions_of
from conversation_routes import Turn as ConversationTurn
from errors import InputTooLongError, InternalError, NothingToSpeakError, ShuttingDownError, TTSError
from schemas import SessionStart
from speech_model import ContextPart
from speech_playback import Playback, Spoken
from speech_response import Unread
from speech_routes import SpeechService, choose_format, voice_in_time
from text_markup import last_voice
from text_splitter import Piece, TextStream
from tts_engine import Utterance, new_seed

logger = logging.getLogger(__name__)

_MAX_TURN_CHARACTERS = 100_000
_MAX_WAITING_EVENTS = 256  # that a client leaves unread before the server stops to read from it
_AUDIO_BYTES = 48_000  # in one message: a second of pcm
_SEEDS = 2**32
_ONLY_CODE = regex.compile(r"\s*(?:```|~~~).*(?:```|~~~)\s*", regex.DOTALL)

Event = dict[str, Any]


class Outbox:
    """Sends events and audio in the order in which they are put in.

    Args:
        websocket: The connection.
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


class _Sound:
    """Encodes a turn's samples and puts the bytes into the outbox; samples of `pcm` become bytes at once."""

    def __init__(self, start: SessionStart, audio_format: AudioFormat, rate: int, tag: SyntheticTag | None, outbox: Outbox) -> None:
        self._outbox = outbox
        self._encoder: Encoder | None = None
        self._sending: asyncio.Task[None] | None = None
        if needs_ffmpeg(audio_format, rate, start.speed, start.sample_rate):
            self._encoder = Encoder(audio_format, rate, streamed=True, speed=start.speed, tag=tag, output_rate=start.sample_rate)

    async def write(self, samples: Samples) -> None:
        """Encode samples.

        Raises:
            ConversionError: ffmpeg failed, or a sample is not a number.
            UnreadAudioError: The client does not read.
        """
        if self._encoder is None:
            self._outbox.put(to_int16(samples))
            return
        if self._sending is None:
            await self._encoder.__aenter__()
            self._sending = asyncio.create_task(self._send(self._encoder))
        await self._encoder.write(samples)

    async def finish(self) -> None:
        """Put the rest into the outbox; raise as `write` does."""
        if self._encoder is not None and self._sending is not None:
            await self._encoder.finish()
            await self._sending

    async def close(self) -> None:
        """Stop encoding."""
        if self._encoder is not None:
            await self._encoder.aclose()
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait({self._sending})
            if not self._sending.cancelled():
                self._sending.exception()  # retrieved, or asyncio would log it as lost

    async def _send(self, encoder: Encoder) -> None:
        async for piece in encoder:
            self._outbox.put(piece)


class Turn:
    """One text, from its first character to the end of its audio.

    Args:
        service: The objects that all connections share.
        start: How to speak.
        number: The turn's number in its connection.
        outbox: Gets events and audio.
    """

    def __init__(self, service: SpeechService, start: SessionStart, number: int, outbox: Outbox) -> None:
        self._service = service
        self._start = start
        self._number = number
        self._outbox = outbox
        self.voice, self._replaced = service.engine.choose_voice(start.voice_name)
        model = service.engine.host(self.voice).model
        self.text = TextStream(model.segment_lengths)
        self.format = choose_format(start, "pcm")
        self.seed = new_seed() if start.seed is None else start.seed
        self._sound = _Sound(start, self.format, model.sample_rate, service.tag(self.voice), outbox)
        self._joiner = service.engine.new_joiner(model.sample_rate)
        self._playback = Playback(start.speed)
        self._voice_tag = ""  # the latest in the text: it counts for the next pieces, too
        self._taken = ""  # the text of all pieces, also of those with nothing to speak
        self._changed = asyncio.Event()
        self._utterance: Utterance | None = None
        self._memory: ConversationTurn | None = None  # this turn in the conversation
        self.ended = False
        self._stopping = False
        self._task = asyncio.create_task(self._run())

    @property
    def finished(self) -> bool:
        """Whether `done` has been put into the outbox."""
        return self._task.done()

    @property
    def speaking(self) -> bool:
        """Whether a piece is being spoken, or waits for its turn."""
        return self._utterance is not None

    @property
    def seconds(self) -> float:
        """The length of the audio so far."""
        return self._joiner.duration / self._start.speed

    def append(self, text: str) -> None:
        """Add text.

        Raises:
            InputTooLongError: There is too much text.
        """
        self.text.append(text)
        limit = self._service.settings.max_input_length
        if self.text.pending > limit or self.text.length > _MAX_TURN_CHARACTERS:
            raise InputTooLongError(
                f"{self.text.pending} characters wait to be spoken, of {self.text.length} in this turn; at most {limit} may wait (MAX_INPUT_LENGTH), "
                f"and a turn may have {_MAX_TURN_CHARACTERS}."
            )
        self._changed.set()

    def flush(self, *, end: bool = False) -> None:
        """Speak everything so far; `end`: no more text comes."""
        self.ended |= end
        self.text.flush()
        self._changed.set()

    def heard(self, seconds: float) -> str:
        """Return the beginning of the text that was heard, if so many seconds of its audio were played."""
        return self._taken[: self._playback.heard(seconds)].rstrip()

    def keep_heard(self, seconds: float) -> None:
        """Let the conversation keep only what was heard, if so many seconds of the audio were played."""
        self._remember(self._playback.parts(seconds))

    async def complete(self) -> None:
        """Speak what is there at the server's shutdown, without an incomplete word at its end."""
        self._stopping = True
        self._changed.set()
        await asyncio.wait({self._task})

    async def stop(self) -> None:
        """Stop the work at once, and drop what has not been sent."""
        if not self.finished:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._outbox.drop_audio()

    async def _run(self) -> None:
        status = "cancelled"
        try:
            while (piece := await self._next_piece()) is not None:
                self._taken += piece.text
                await self._speak(piece)
            await self._sound.finish()
            if not self.ended:
                raise ShuttingDownError
            status = "completed"
        except Exception as error:
            status = "failed"
            self._fail(error)
        finally:
            await self._sound.close()
            self._put("done", status=status, characters=self.text.length, audio_seconds=round(self.seconds, 3))

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, TTSError):
            logger.error("a turn of a WebSocket failed unexpectedly", exc_info=error)
            error = InternalError("Unexpected server error. The server's log has the details.")
        self._put("error", **error.envelope())

    async def _next_piece(self) -> Piece | None:
        """Wait for the next piece of the text; None after the last one, or if the server stops and nothing is left to speak."""
        while True:
            piece = self.text.take(paused=self._stopping)
            if piece is None and not self.ended and not self._stopping:
                seconds = self._service.settings.socket_pause_ms / 1000
                with anyio.move_on_after(seconds if self.text.pending else None) as pause:
                    await self._changed.wait()
                piece = self.text.take(paused=pause.cancelled_caught)
                if piece is None and pause.cancelled_caught:
                    await self._changed.wait()  # what is left cannot be spoken yet
                self._changed.clear()
            if piece is not None or self._stopping or (self.ended and not self.text.pending):
                return piece

    async def _speak(self, piece: Piece) -> None:
        text = await self._prepared(piece.text)
        if not text:
            return
        start = self._start
        voice = voice_in_time(self._service.engine, self.voice, len(text), start.deadline_ms, start.on_deadline)
        if voice is not self.voice:  # for the rest of the turn
            self._replaced, self.voice = self.voice, voice
        options = self._service.options(start, self.voice, (self.seed + len(self._playback)) % _SEEDS, streamed=True)
        first = len(self._joiner.timestamps)
        self._utterance = utterance = self._service.engine.speak(text, self.voice, options, self._joiner)
        spoken: Spoken | None = None
        outcome = "cancelled"
        try:
            await utterance.begun()
            spoken = self._begin(piece)
            async for samples in utterance:
                await self._sound.write(samples)
            outcome = "200"
        except TTSError as error:
            outcome = str(error.status)
            raise
        finally:
            await utterance.aclose()
            self._utterance = None
            if spoken is not None:
                self._note(spoken, utterance, self._joiner.timestamps[first:], complete=outcome == "200")
            self._service.observe(self.voice, self.format, utterance, outcome)
        self._finish(spoken, utterance, self._joiner.timestamps[first:])

    def _remember(self, parts: list[ContextPart]) -> None:
        """Let the conversation have these parts of this turn, if there is a conversation."""
        conversation, kept = self._start.conversation, self._service.conversations
        if conversation is None or not (parts or self._memory):
            return
        if self._memory is None:
            self._memory = ConversationTurn("assistant", self.voice.preset.speaker_id, parts)
            kept.add(conversation, self._memory)
        self._memory.parts = parts
        if not parts:
            kept.remove(conversation, self._memory)
        kept.shrink()

    async def _prepared(self, text: str) -> str:
        """Return the text as it will be spoken; empty if there is nothing to speak: the engine would read a block of code that stands alone."""
        normalize = self._service.settings.normalize_text if self._start.normalize is None else self._start.normalize
        tag = self._voice_tag
        self._voice_tag = last_voice(text) or tag
        if normalize and _ONLY_CODE.fullmatch(text):
            return ""
        with suppress(NothingToSpeakError):
            return await self._service.engine.prepared(tag + text, normalize=normalize)
        return ""

    def _begin(self, piece: Piece) -> Spoken:
        """Say that a piece is spoken now."""
        number, start = len(self._playback), self.seconds
        fields: Event = {"start_char": piece.start, "end_char": piece.end, "voice": self.voice.name, "start": round(start, 3)}
        if self._replaced:
            fields["fallback_for"] = self._replaced.id
        self._put("segment.start", segment=number, text=piece.text, **fields)
        return self._playback.begin(piece, start)

    def _note(self, spoken: Spoken, utterance: Utterance, finished: list[SegmentTimestamp], *, complete: bool) -> None:
        """Note when the piece was spoken, or so much of it as there is."""
        finder = WordFinder(spoken.piece.text, utterance.segments, utterance.spoken.reading)
        spoken.words = finder.words(finished, self._start.speed)
        spoken.note(finished, self._joiner.unfinished, utterance.said, self._start.speed)
        spoken.complete = complete or (bool(finished) and finished[-1].segment == len(utterance.segments) - 1)

    def _finish(self, spoken: Spoken, utterance: Utterance, timestamps: list[SegmentTimestamp]) -> None:
        """Keep the piece for the conversation, and say when it was spoken."""
        speed, piece, number = self._start.speed, spoken.piece, len(self._playback) - 1
        self._remember(self._playback.parts())
        if self._start.timestamps:
            fields: Event = {"captions": [vars(caption) for caption in captions_of(utterance.segments, timestamps, speed)]}
            if self._start.timestamps == "word":
                places = ({"start_char": piece.start + word.start_char, "end_char": piece.start + word.end_char} for word in spoken.words)
                fields["words"] = [vars(word) | place for word, place in zip(spoken.words, places, strict=True)]
            self._put("timestamps", segment=number, **fields)
        times = {"queue_time": utterance.queue_time, "generation_time": utterance.generation_time}
        ends = {"start": spoken.start, "end": spoken.end}
        self._put("segment.done", segment=number, **{name: round(value, 3) for name, value in (ends | times).items()})

    def _put(self, kind: str, **fields: Any) -> None:  # noqa: ANN401 - whatever the event has
        self._outbox.put({"type": kind, "turn": self._number, **fields})
