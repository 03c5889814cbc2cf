"""Speak one text while it is still being written: pieces in, audio and events out; and tell what of it was heard."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
import regex

from audio_converter import Encoder, needs_ffmpeg, to_int16
from audio_formats import AudioFormat, Samples, SyntheticTag
from audio_joiner import SegmentTimestamp
from captions import WordCaption, WordFinder, captions_of
from conversation_routes import Turn as ConversationTurn
from errors import InputTooLongError, InternalError, NothingToSpeakError, ShuttingDownError, TTSError
from schemas import SessionStart
from speech_model import ContextPart
from speech_response import Event, Outbox
from speech_routes import SpeechService, choose_format, voice_in_time
from text_markup import last_voice
from text_splitter import Piece, TextStream
from tts_engine import Utterance, new_seed

logger = logging.getLogger(__name__)

WORD = regex.compile(r"\S*[\p{L}\p{N}]\S*")
"""A word as people count them, with its punctuation."""

_MAX_TURN_CHARACTERS = 100_000
_SEEDS = 2**32
_CHARACTERS_PER_SECOND = 15.0  # of speech, until a piece has been measured
_ONLY_CODE = regex.compile(r"\s*(?:```|~~~).*(?:```|~~~)\s*", regex.DOTALL)


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


# --- What was heard ---


@dataclass(frozen=True)
class SpokenPart:
    """A segment as the conversation keeps it, or the beginning of one.

    Attributes:
        part: Its whole text, and its codec tokens so far.
        start: Where its audio begins, in seconds of the turn's audio.
        end: Where the audio of its tokens ends.
        complete: Whether that is the whole segment.
    """

    part: ContextPart
    start: float
    end: float
    complete: bool

    def heard(self, seconds: float, pace: float) -> ContextPart | None:
        """Return what was heard of it at `seconds`, tokens and text; None if not even a word was.

        Args:
            seconds: Of the turn's audio.
            pace: Characters a second, for a segment that is not complete.
        """
        if self.complete and seconds >= self.end:
            return self.part
        seconds = min(seconds, self.end)
        part, text_end = self.part, _text_end(self.part.text, self.start, self.end, None if self.complete else pace)
        text = part.text[: _whole_words(part.text, _share(seconds, self.start, text_end))].rstrip()
        frames = int(len(part.codes) * _share(seconds, self.start, self.end))
        return ContextPart(text, part.speaker, part.codes[:frames]) if frames and text else None


@dataclass
class Spoken:
    """A piece of the text that is being spoken or was.

    Attributes:
        piece: The text, as the client wrote it.
        start: Where its audio begins, in seconds of the turn's audio.
        end: Where its audio ends, so far.
        complete: Whether all of it has been spoken.
        words: When each word is heard, if the voice knows that.
        parts: Its segments that have codec tokens.
    """

    piece: Piece
    start: float
    end: float
    complete: bool = False
    words: list[WordCaption] = field(default_factory=list)
    parts: list[SpokenPart] = field(default_factory=list)

    def note(
        self, finished: Sequence[SegmentTimestamp], unfinished: SegmentTimestamp | None, said: Mapping[int, ContextPart], speed: float
    ) -> None:
        """Note when it was spoken.

        Args:
            finished: Its segments that are complete, at normal speed.
            unfinished: The one of which only the beginning is there, if there is one.
            said: The segments that have codec tokens, by number.
            speed: Of the turn's audio.
        """
        times = [*finished, unfinished] if unfinished else finished
        if times:
            self.start, self.end = times[0].start / speed, times[-1].end / speed
        self.parts = [
            SpokenPart(said[each.segment], each.start / speed, each.end / speed, each is not unfinished)
            for each in times
            if each.segment in said
        ]

    def heard(self, seconds: float, pace: float) -> int:
        """Return how many characters of the piece were heard at `seconds`: whole words; arguments as for `SpokenPart.heard`."""
        text = self.piece.text
        if self.complete and seconds >= self.end:
            return len(text)
        if self.words:
            return max((word.end_char for word in self.words if word.end <= seconds), default=0)
        seconds = min(seconds, self.end)
        return _whole_words(text, _share(seconds, self.start, _text_end(text, self.start, self.end, None if self.complete else pace)))


class Playback:
    """The pieces that a turn has spoken, in order.

    Args:
        speed: Of the turn's audio.
    """

    def __init__(self, speed: float) -> None:
        self._speed = speed
        self._pieces: list[Spoken] = []

    def __len__(self) -> int:
        """Return how many pieces there are."""
        return len(self._pieces)

    def begin(self, piece: Piece, start: float) -> Spoken:
        """Add a piece whose audio begins at `start` seconds of the turn's audio."""
        self._pieces.append(Spoken(piece, start, start))
        return self._pieces[-1]

    def heard(self, seconds: float) -> int:
        """Return the offset in the turn's text after the last word that was heard, if so many seconds of the audio were played."""
        reached, pace = 0, self._pace()
        for spoken in self._pieces:
            if seconds > spoken.start and (count := spoken.heard(seconds, pace)):
                reached = spoken.piece.start + count
        return reached

    def parts(self, seconds: float = math.inf) -> list[ContextPart]:
        """Return the segments that were heard; the last one may be the beginning of one."""
        pace = self._pace()
        heard = (part.heard(seconds, pace) for spoken in self._pieces for part in spoken.parts)
        return [part for part in heard if part is not None]

    def _pace(self) -> float:
        """Return the characters a second of the complete pieces."""
        complete = [spoken for spoken in self._pieces if spoken.complete]
        seconds = sum(spoken.end - spoken.start for spoken in complete)
        return sum(len(spoken.piece.text) for spoken in complete) / seconds if seconds else _CHARACTERS_PER_SECOND * self._speed


def _text_end(text: str, start: float, end: float, pace: float | None) -> float:
    """Return where all of `text` is spoken: at `end`, or if only its beginning was, where it would be at this pace."""
    return end if pace is None else max(end, start + len(text) / pace)


def _share(seconds: float, start: float, end: float) -> float:
    """Return which share of the time from `start` to `end` has passed at `seconds`, from 0 to 1."""
    return min(1.0, max(0.0, seconds - start) / (end - start)) if end > start else 0.0


def _whole_words(text: str, share: float) -> int:
    """Return the offset after the words that end within `share` of the text."""
    return max((word.end() for word in WORD.finditer(text) if word.end() <= len(text) * share), default=0)
