"""Speaks through a running server: a text goes out as a request, its sound and captions come back as events."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from audio_formats import SAMPLE_RATE
from background_call import call_in_background, post
from captions import Caption
from errors import ModelNotReadyError, TTSError
from reading import Part
from speech_server import RefusedError, SpeechServer, UnreachableError

_PIECE_BYTES = 1 << 16
_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 600.0  # with a server whose queue is full
_LONGEST_WAIT_SECONDS = 30.0


class ServerSpeaker:
    """Speaks through a server.

    Args:
        server: The server.
        voice: A voice's name or alias.
        tell: Takes a line about what is being waited for, "" when the wait is over.
        warn: Takes a line that is to be read in any case.
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, server: SpeechServer, voice: str, tell: Callable[[str], None], warn: Callable[[str], None]) -> None:
        self.voice = voice
        self.model = ""
        self._server = server
        self._asked = voice
        self._tell = tell
        self._warn = warn
        self._warned = False

    async def speak(self, text: str, seed: int) -> AsyncGenerator[Part, None]:
        """Say `text`; waits while the voice's model loads or the queue is full.

        Raises:
            TTSError: The server's refusal or failure; or it is gone.
        """
        # As events, because only they tell of a failure midway in words, and bring the captions along. At speed 1 and as samples:
        # speed and encoding are done once, for all pieces together. The text is cleaned up already.
        body = {"model": "csm-1b", "input": text, "voice": self._asked, "seed": seed, "normalize": False}
        body |= {"response_format": "pcm", "stream_format": "sse", "timestamps": True}
        patience = _PATIENCE_SECONDS
        while True:
            events = _Events(self._server, body)
            try:
                headers = await events.headers()
                break
            except RefusedError as refused:
                patience -= await self._wait(refused, patience)
            except BaseException:
                events.close()
                raise
        try:
            await self._learn(headers)
            async for part in events.parts():
                yield part
        finally:
            events.close()

    async def _wait(self, refused: RefusedError, patience: float) -> float:
        """Wait as long as the refusal says, if it is one that passes; returns for how many seconds that counts.

        Raises:
            RefusedError: It does not pass.
        """
        if refused.code == ModelNotReadyError.code and await self._is_loading():
            await asyncio.sleep(_POLL_SECONDS)
            return 0.0
        if refused.code not in ("rate_limit_exceeded", "queue_timeout") or patience <= 0:
            raise refused
        seconds = min(refused.retry_after or _POLL_SECONDS, _LONGEST_WAIT_SECONDS)
        self._tell("the server is busy: waiting for a place in its queue")
        await asyncio.sleep(seconds)
        return seconds

    async def _is_loading(self) -> bool:
        """Whether the voice's model is on its way; tells how far it is."""
        owner = await self._owner()
        health = await call_in_background(self._server.health)
        model = health.get("models", {}).get(owner.get("model"), {})
        if model.get("state") != "loading":
            return bool(owner.get("ready"))  # it became ready between the refusal and the question
        progress = model.get("progress") or {}
        fraction = progress.get("fraction")
        share = f" {fraction:.0%}" if isinstance(fraction, float) else ""
        self._tell(f"the server loads {owner.get('model')}: {progress.get('stage', 'starting')}{share}")
        return True

    async def _learn(self, headers: http.client.HTTPMessage) -> None:
        """Who speaks, and say so if it is somebody else than was asked for."""
        self._tell("")
        self.voice, self.model = headers.get("X-Voice", self._asked), headers.get("X-Model", "")
        if self.voice == self._asked or self._warned:
            return
        self._warned = True
        owner = (await self._owner()).get("id", self.voice)
        if owner != self.voice:
            self._warn(f"voice '{owner}' is not ready; the server's FALLBACK_VOICE '{self.voice}' speaks instead")

    async def _owner(self) -> dict[str, Any]:
        """The voice that the asked name belongs to."""
        voices = await call_in_background(self._server.voices)
        return next((voice for voice in voices if self._asked in (voice.get("id"), *voice.get("aliases", ()))), {})


class _Events:
    """One request for speech, sent and read on a thread of its own."""

    def __init__(self, server: SpeechServer, body: dict[str, Any]) -> None:
        self._server = server
        self._body = body
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._closed = False
        threading.Thread(target=self._run, daemon=True).start()

    async def headers(self) -> http.client.HTTPMessage:
        """The answer's headers.

        Raises:
            TTSError: The request was refused, or nobody answers.
        """
        headers: http.client.HTTPMessage = await self._next()
        return headers

    async def parts(self) -> AsyncGenerator[Part, None]:
        """The speech.

        Raises:
            TTSError: The server failed, or broke off.
        """
        odd = b""
        while True:
            event = await self._next()
            kind = event.get("type")
            if kind == "speech.audio.delta":
                data = odd + base64.b64decode(event["audio"])
                odd = data[len(data) & ~1 :]
                # 32767 is what the server multiplies with: its very samples come out of our encoder.
                yield Part(np.frombuffer(data[: len(data) & ~1], "<i2").astype(np.float32) / np.float32(32767))
            elif kind == "speech.audio.timestamps":
                caption = Caption(event["group"], event["text"], event["start"], event["end"])
                yield Part(np.zeros(0, np.float32), (caption,))
            elif kind == "speech.audio.error":
                raise RefusedError(500, event["error"])
            elif kind == "speech.audio.done":
                return

    def close(self) -> None:
        """Break the connection off, so that the server stops; may be called at any time."""
        self._closed = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    async def _next(self) -> Any:  # noqa: ANN401 - headers first, then JSON objects
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def _run(self) -> None:
        try:
            connection = self._server.connect(self._server.silence)
            self._socket = connection.sock
            try:
                if not self._closed:
                    self._read(self._server.post_speech(connection, self._body))
            finally:
                connection.close()
        except TTSError as error:
            self._put(error)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._put(self._server.lost(error))

    def _read(self, response: http.client.HTTPResponse) -> None:
        with response:
            self._put(response.headers)
            for event in _events(response):
                self._put(event)
        raise UnreachableError(f"The server at {self._server.url} broke off: the speech ended too soon.")

    def _put(self, item: object) -> None:
        post(self._loop, lambda: self._queue.put_nowait(item))


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of events, each as soon as it is complete."""
    rest = b""
    while data := response.read1(_PIECE_BYTES):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield json.loads(line[5:])
