"""WS /v1/audio/speech/stream: the messages of a client that is still writing its text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import anyio
from fastapi import APIRouter
from pydantic import ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from errors import InputTooLongError, InvalidRequestError, ShuttingDownError, TTSError
from http_middleware import client_address
from schemas import SessionStart, explain
from speech_response import Event, Outbox, Unread
from speech_routes import SpeechService, choose_format
from speech_turn import WORD, Turn

_GOING_AWAY = 1001
_RESTARTING = 1012
_CLOSING_SECONDS = 0.5  # of SHUTDOWN_TIMEOUT, for the last messages of a turn that takes longer


class Session:
    """One connection: reads its messages until the client disconnects or is idle for too long."""

    def __init__(self, service: SpeechService, websocket: WebSocket) -> None:
        self._service = service
        self._websocket = websocket
        self._outbox = Outbox(websocket, Unread(service.unread, client_address(websocket)))
        self._start: SessionStart | None = None
        self._turn: Turn | None = None
        self._turns = 0
        self._handlers: dict[str, Callable[[Event], Any]] = {
            "session.start": self._on_start,
            "input_text.append": self._on_append,
            "input_text.flush": lambda _: self._flush(end=False),
            "input_text.done": lambda _: self._flush(end=True),
            "cancel": lambda _: self._stop(),
            "playback.interrupted": self._on_interrupted,
        }

    async def run(self) -> None:
        """Serve until the end of the connection; nothing is left running."""
        tasks = {asyncio.create_task(work) for work in (self._receive(), self._outbox.run(), self._close_at_shutdown())}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await self._stop()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            self._log()
        for task in tasks:
            if not task.cancelled() and (error := task.exception()) and not isinstance(error, WebSocketDisconnect):
                raise error

    async def _receive(self) -> None:
        while (text := await self._next_message()) is not None:
            try:
                await self._handle(text)
            except TTSError as error:
                self._outbox.put({"type": "error", **error.envelope()})
            await self._outbox.room()
        await self._websocket.close(_GOING_AWAY, "idle")

    async def _close_at_shutdown(self) -> None:
        """Wait for the shutdown; complete the turn that has begun, for SHUTDOWN_TIMEOUT at most, and close the connection."""
        await self._service.stopping.wait()
        with anyio.move_on_after(max(0.0, int(self._service.settings.shutdown_timeout) - _CLOSING_SECONDS)):
            if self._turn:
                await self._turn.complete()
        await self._stop()
        await self._outbox.sent()
        await self._websocket.close(_RESTARTING, "the server is shutting down")

    async def _next_message(self) -> str | None:
        """Return the next message; None if the client has sent nothing for SOCKET_IDLE_TIMEOUT and waits for nothing."""
        receiving = asyncio.ensure_future(self._websocket.receive())
        try:
            while not receiving.done():
                done, _ = await asyncio.wait({receiving}, timeout=self._service.settings.socket_idle_timeout)
                if not done and self._outbox.empty and not (self._turn and self._turn.speaking):
                    return None
            message = receiving.result()
        finally:
            receiving.cancel()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code") or 1005)
        return str(message.get("text") or "")

    async def _handle(self, text: str) -> None:
        event = _parsed(text)
        handler = self._handlers.get(str(event.get("type")))
        if handler is None:
            raise InvalidRequestError(f"'type' must be one of {', '.join(self._handlers)}.", param="type", code="invalid_event")
        result = handler(event)
        if result is not None:
            await result

    async def _on_start(self, event: Event) -> None:
        service = self._service
        if self._turn and not self._turn.finished:
            raise _too_early("session.start")
        if service.presets.changed():
            await asyncio.to_thread(service.presets.refresh)
        try:
            start = SessionStart.model_validate(event)
        except ValidationError as error:
            fault: Any = error.errors()[0]
            raise explain(fault, service.presets.catalog.names()) from None
        audio_format = choose_format(start, "pcm")
        voice, replaced = service.engine.choose_voice(start.voice_name)
        self._start, self._turn = start, None
        said: Event = {"type": "session.created", "voice": voice.name, "model": voice.preset.model}
        said |= {"response_format": audio_format.name, "sample_rate": start.sample_rate}
        if start.conversation is not None:
            said["conversation"] = "used" if service.engine.takes_context(voice) else "ignored"
        self._outbox.put(said | ({"fallback_for": replaced.id} if replaced else {}))

    async def _on_append(self, event: Event) -> None:
        text = event.get("text")
        if not isinstance(text, str):
            raise InvalidRequestError("'text' must be a string.", param="text", code="invalid_text")
        turn = self._open_turn()
        if self._service.stopping.is_set():
            raise ShuttingDownError
        if turn.ended:
            raise _too_early("input_text.append")
        try:
            turn.append(text)
        except InputTooLongError:
            await self._stop()
            raise

    def _open_turn(self) -> Turn:
        """Return the turn in progress, or a new one."""
        if self._start is None:
            raise InvalidRequestError("Send 'session.start' first.", param="type", code="invalid_event")
        if self._turn is None or self._turn.finished:
            if self._service.stopping.is_set():
                raise ShuttingDownError
            self._service.unread.check(client_address(self._websocket))
            self._turn = Turn(self._service, self._start, self._turns, self._outbox)
            self._turns += 1
        return self._turn

    def _flush(self, *, end: bool) -> None:
        self._open_turn().flush(end=end)

    async def _on_interrupted(self, event: Event) -> None:
        played = event.get("played_ms")
        if isinstance(played, bool) or not isinstance(played, int | float) or not played >= 0:
            raise InvalidRequestError(
                "'played_ms' must be a number of milliseconds, 0 or more.", param="played_ms", code="invalid_played_ms"
            )
        await self._stop()
        if self._turn is None:
            raise InvalidRequestError("Nothing has been spoken yet.", param="type", code="invalid_event")
        text = self._turn.heard(played / 1000)
        self._turn.keep_heard(played / 1000)
        answer: Event = {"type": "playback.truncated", "turn": self._turns - 1, "audio_end_ms": played, "text": text}
        self._outbox.put(answer | {"end_char": len(text), "end_word": len(WORD.findall(text))})

    async def _stop(self) -> None:
        if self._turn:
            await self._turn.stop()

    def _log(self) -> None:
        fields = self._websocket.state.log_fields
        fields["turns"] = self._turns
        if self._turn:
            fields |= {"voice": self._turn.voice.preset.name, "model": self._turn.voice.preset.model, "format": self._turn.format.name}


def _parsed(text: str) -> Event:
    try:
        event = json.loads(text)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise InvalidRequestError("Each message must be one JSON object, as text.", code="invalid_json")
    return event


def _too_early(kind: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"'{kind}' is possible after the turn's 'done'. Wait for it, or send 'cancel'.", param="type", code="invalid_event"
    )


router = APIRouter()


@router.websocket("/audio/speech/stream")
async def stream_speech(websocket: WebSocket) -> None:
    """Speak a text while it is being written. docs/API.md lists the messages."""
    await websocket.accept()
    await Session(websocket.app.state.server.speech, websocket).run()
