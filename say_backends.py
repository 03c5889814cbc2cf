"""Speech backends of the command line: a running server, or the engine in this process."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import socket
import ssl
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from audio_formats import SAMPLE_RATE
from background_call import call_in_background, post
from captions import Caption, captions_of
from config import Settings
from errors import InputTooLongError, ModelNotReadyError, TTSError
from say_reading import Part
from speech_model import SpeechOptions

if TYPE_CHECKING:
    from model_host import ModelHost

_CONNECT_SECONDS = 10.0


class RefusedError(TTSError):
    """The server's own error, as its envelope tells it.

    Attributes:
        retry_after: In how many seconds to try again, where the server says so.
    """

    def __init__(self, status: int, envelope: dict[str, Any], retry_after: float | None = None) -> None:
        super().__init__(str(envelope.get("message")), param=envelope.get("param"), code=envelope.get("code"))
        self.status = status
        self.retry_after = retry_after


class UnreachableError(TTSError):
    """No server answers, or it broke off."""

    status = 503


class SpeechServer:
    """A server at a URL. Its methods block.

    Attributes:
        url: As it was given.
        default_voice: Known once `health` was asked, unless the server keeps it from those without a key.

    Args:
        url: Of the server, with or without `/v1`.
        key: Sent as a bearer token, if there is one.
        silence: Seconds without a byte after which a speaking server counts as gone; it may keep a request waiting for its turn.

    Raises:
        ValueError: `url` is no http or https URL, or `key` cannot be sent.
    """

    def __init__(self, url: str, key: str | None, silence: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not the address of a server: it must look like http://localhost:8880")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ValueError("the API key cannot be sent: it must be printable ASCII")
        self.url = url.rstrip("/")
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._silence = silence
        self.default_voice: str | None = None

    def health(self, timeout: float = _CONNECT_SECONDS) -> dict[str, Any]:
        """`/health`. With a key set and none given it holds only `status`.

        Raises:
            UnreachableError: Nothing answers, or something that is not this project's server.
        """
        found = self._get("/health", timeout)
        if not isinstance(found.get("status"), str):
            raise self._unknown()
        self.default_voice = found.get("default_voice")
        return found

    def voices(self) -> list[dict[str, Any]]:
        """`/v1/audio/voices`.

        Raises:
            RefusedError: The key is missing or wrong.
            UnreachableError: Nothing answers.
        """
        found = self._get("/v1/audio/voices", _CONNECT_SECONDS).get("voices")
        if not isinstance(found, list):
            raise self._unknown()
        return found

    def connect(self, timeout: float) -> http.client.HTTPConnection:
        """A new connection.

        Raises:
            UnreachableError: Nothing answers.
        """
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=min(timeout, _CONNECT_SECONDS))
        try:
            connection.connect()
        except (OSError, ValueError) as error:
            raise UnreachableError(f"No server answers at {self.url}: {_reason(error)}.") from None
        connection.sock.settimeout(timeout)
        return connection

    def post_speech(self, connection: http.client.HTTPConnection, body: dict[str, Any]) -> http.client.HTTPResponse:
        """The speech endpoint's answer, a stream of events.

        Raises:
            TTSError: The server's refusal.
        """
        headers = self._headers | {"Content-Type": "application/json", "Accept": "text/event-stream"}
        connection.request("POST", f"{self._path}/v1/audio/speech", json.dumps(body).encode(), headers)
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise self._refusal(response)
        if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
            raise self._unknown()
        return response

    @property
    def silence(self) -> float:
        """Seconds without a byte after which it counts as gone."""
        return self._silence

    def lost(self, error: Exception) -> UnreachableError:
        """The error for a connection that broke."""
        return UnreachableError(f"The server at {self.url} broke off: {_reason(error)}.")

    def _get(self, path: str, timeout: float) -> dict[str, Any]:
        connection = self.connect(timeout)
        try:
            connection.request("GET", self._path + path, headers=self._headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise self._refusal(response)
            found = json.loads(response.read())
        except (OSError, http.client.HTTPException) as error:
            raise self.lost(error) from None
        except ValueError:
            raise self._unknown() from None
        finally:
            connection.close()
        if not isinstance(found, dict):
            raise self._unknown()
        return found

    def _refusal(self, response: http.client.HTTPResponse) -> TTSError:
        try:
            envelope = json.loads(response.read())["error"]
            retry_after = response.headers.get("Retry-After", "")
            refused = RefusedError(response.status, dict(envelope), float(retry_after) if retry_after.isdigit() else None)
        except (ValueError, KeyError, TypeError):
            return self._unknown()
        if refused.code == "invalid_api_key":
            return RefusedError(
                refused.status,
                {"message": f"The server at {self.url} wants its API key: --api-key KEY, or API_KEY in .env.", "code": refused.code},
            )
        return InputTooLongError(refused.message) if refused.code == "input_too_long" else refused

    def _unknown(self) -> UnreachableError:
        return UnreachableError(f"What answers at {self.url} is not a Sesame TTS server.")


def _reason(error: Exception) -> str:
    """An error of the network, in words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, socket.gaierror):
        return "there is no host of this name"
    if isinstance(error, ssl.SSLError):
        return "the encrypted connection failed"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return "the answer ended too soon" if isinstance(error, http.client.IncompleteRead) else type(error).__name__


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


_POLL_SECONDS = 0.2


class LocalSpeaker:
    """Speaks with the engine. An async context manager: the model is loaded inside it.

    Args:
        settings: The settings.
        voice: A voice's name or alias.
        tell: Takes a line about the load, "" when it is over.
        streamed: Somebody listens while the sound is made.

    Raises:
        InvalidVoiceError: Lists the voices there are.
    """

    def __init__(self, settings: Settings, voice: str, tell: Callable[[str], None], *, streamed: bool) -> None:
        # The engine takes seconds to import, and a running server needs none of it.
        from tts_engine import TTSEngine
        from voice_presets import VoicePresetManager
        from voice_store import VoiceStore

        presets = VoicePresetManager(settings.presets_dir, settings.default_voice, VoiceStore(*settings.voice_folders))
        self._voice = presets.catalog.resolve(voice)
        self.voice = self._voice.id
        self.model: str = self._voice.preset.model
        if self.model == "hibari":
            settings = settings.model_copy(update={"csm": "off"})  # 6 GB that nobody asked for stay where they are
        self._engine = TTSEngine(settings, presets)
        self._host: ModelHost = self._engine.host(self._voice)
        self.sample_rate = self._host.model.sample_rate
        self._tell = tell
        self._streamed = streamed

    async def __aenter__(self) -> LocalSpeaker:
        """Load the voice's model.

        Raises:
            ModelNotReadyError: It cannot be loaded; says why.
        """
        try:
            await self._engine.start()
            await self._loaded()
            self._engine.check_ready(self._voice)
        except BaseException:
            await self._engine.close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._engine.close()

    async def speak(self, text: str, seed: int) -> AsyncGenerator[Part, None]:
        """Say `text`.

        Raises:
            TTSError: The engine failed.
        """
        utterance = self._engine.speak(text, self._voice, SpeechOptions(seed, streamed=self._streamed))
        told = 0
        try:
            async for samples in utterance:
                timestamps = list(utterance.timestamps)
                yield Part(samples, tuple(captions_of(utterance.segments, timestamps[told:], 1.0)))
                told = len(timestamps)
            yield Part(np.zeros(0, np.float32), tuple(captions_of(utterance.segments, utterance.timestamps[told:], 1.0)))
        finally:
            await utterance.aclose()

    async def _loaded(self) -> None:
        """Wait until it is known whether the model can speak, telling how far the load is."""
        while self._host.state == "loading":
            progress = self._host.progress
            stage = progress.stage if progress else "starting"
            share = f" {progress.done / progress.total:.0%}" if progress and progress.done is not None and progress.total else ""
            self._tell(f"loading {self.model}: {stage}{share}")
            await asyncio.sleep(_POLL_SECONDS)
        self._tell("")
