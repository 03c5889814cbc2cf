"""Speech backends of the command line: a running server, or the engine in this process."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from audio_formats import SAMPLE_RATE, Samples
from captions import Caption, WordCaption, WordFinder, captions_of
from config import Settings
from errors import InputTooLongError, ModelNotReadyError, TTSError
from say_reading import Part
from speech_model import SpeechOptions

if TYPE_CHECKING:
    from audio_joiner import SegmentTimestamp
    from model_host import ModelHost
    from tts_engine import Utterance
    from voice_presets import VoicePresetManager

_CONNECT_SECONDS = 10.0
_PROBE_SECONDS = 2.0
_MAX_BUSY_SECONDS = 600.0  # of waiting for a server whose queue is full
_MAX_RETRY_SECONDS = 30.0
_SERVER_POLL_SECONDS = 1.0
_ENGINE_POLL_SECONDS = 0.2
_MAX_PORT = 65_535
_PCM_SCALE = np.float32(32767)  # the server's factor: the local encoder then writes exactly the server's samples


class RefusedError(TTSError):
    """An error answer of the server.

    Attributes:
        retry_after: Seconds after which to try again, if the server says so.
    """

    def __init__(self, status: int, envelope: dict[str, Any], retry_after: float | None = None) -> None:
        super().__init__(str(envelope.get("message")), param=envelope.get("param"), code=envelope.get("code"))
        self.status = status
        self.retry_after = retry_after


class UnreachableError(TTSError):
    """The server does not answer, or the connection was lost."""

    status = 503


class SpeechServer:
    """A client for the server at a URL. Each request has its own connection; proxies from the environment are not used.

    Attributes:
        url: As it was given.
        default_voice: Known after `health`, unless the server hides it from clients without its key.

    Args:
        url: Of the server, with or without `/v1`.
        key: Sent as a bearer token, if given.
        silence: Seconds without a byte after which a speech request counts as failed. A queued request is silent too.

    Raises:
        ValueError: `url` is no http or https URL, or `key` cannot be sent.
    """

    def __init__(self, url: str, key: str | None, silence: float) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            parsed = httpx.URL()
        if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) > _MAX_PORT:
            raise ValueError(f"{url!r} is not the URL of a server: it must look like http://localhost:8880")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ValueError("the API key cannot be sent: it must be printable ASCII")
        self.url = url.rstrip("/")
        self.default_voice: str | None = None
        path = parsed.path.rstrip("/").removesuffix("/v1")
        self._base = parsed.copy_with(userinfo=b"", path=path or "/", query=None, fragment=None)
        self._headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._silence = silence

    async def health(self, timeout: float = _CONNECT_SECONDS) -> dict[str, Any]:
        """Return the answer of `/health`. If the server has a key and none was given, it holds only `status`.

        Raises:
            UnreachableError: Nothing answers, or it is not this project's server.
        """
        answer = await self._get("/health", timeout)
        if not isinstance(answer.get("status"), str):
            raise self._unknown()
        self.default_voice = answer.get("default_voice")
        return answer

    async def voices(self) -> list[dict[str, Any]]:
        """Return the voices of `/v1/audio/voices`.

        Raises:
            RefusedError: The key is missing or wrong.
            UnreachableError: Nothing answers.
        """
        voices = (await self._get("/v1/audio/voices", _CONNECT_SECONDS)).get("voices")
        if not isinstance(voices, list):
            raise self._unknown()
        return voices

    @asynccontextmanager
    async def speech(self, body: dict[str, Any]) -> AsyncIterator[httpx.Response]:
        """Post to the speech endpoint and yield its answer, a stream of events. Leaving the context closes the connection.

        Raises:
            RefusedError: The server answers with an error.
            InputTooLongError: The text is longer than the server accepts.
            UnreachableError: Nothing answers, or the connection is lost.
        """
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        async with self._request("POST", "/v1/audio/speech", self._silence, headers, json.dumps(body).encode()) as response:
            if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
                raise self._unknown()
            yield response

    async def events(self, response: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the JSON objects of a stream of events.

        Raises:
            UnreachableError: The stream ended early, or is not JSON. The consumer stops at the event that ends the speech.
        """
        rest = b""
        async for data in response.aiter_bytes():
            *lines, rest = (rest + data).split(b"\n")  # not `aiter_lines`, which also splits at line separators inside the text
            for line in lines:
                if line.startswith(b"data:"):
                    yield self._event(line[5:])
        raise self._lost("the speech is incomplete")

    def _event(self, data: bytes) -> dict[str, Any]:
        try:
            return dict(json.loads(data))
        except (ValueError, TypeError):
            raise self._lost("an event is not JSON") from None

    async def _get(self, path: str, timeout: float) -> dict[str, Any]:
        async with self._request("GET", path, timeout) as response:
            try:
                answer = json.loads(await response.aread())
            except ValueError:
                answer = None
        if not isinstance(answer, dict):
            raise self._unknown()
        return answer

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, timeout: float, headers: dict[str, str] | None = None, content: bytes | None = None
    ) -> AsyncIterator[httpx.Response]:
        """Send a request and yield the answer if its status is 200; raise the error answer otherwise."""
        limits = httpx.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS))
        # The system's certificates, where httpx would use its own list.
        tls = ssl.create_default_context() if self._base.scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client = httpx.AsyncClient(base_url=self._base, headers=self._headers, timeout=limits, verify=tls, trust_env=False)
        with self._failures_reported():
            async with client, client.stream(method, path, headers=headers, content=content) as response:
                if response.status_code != httpx.codes.OK:
                    raise self._refusal(response, await response.aread())
                yield response

    @contextmanager
    def _failures_reported(self) -> Iterator[None]:
        """Translate errors of the network."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise UnreachableError(f"No server answers at {self.url}: {_reason(error)}.") from None
        except httpx.HTTPError as error:
            raise self._lost(_reason(error)) from None

    def _refusal(self, response: httpx.Response, body: bytes) -> TTSError:
        try:
            envelope = dict(json.loads(body)["error"])
        except (ValueError, KeyError, TypeError):
            return self._unknown()
        if envelope.get("code") == "invalid_api_key":
            envelope["message"] = f"The server at {self.url} requires its API key: use --api-key KEY, or set API_KEY in .env."
        if envelope.get("code") == InputTooLongError.code:
            return InputTooLongError(str(envelope.get("message")))
        retry_after = response.headers.get("Retry-After", "")
        return RefusedError(response.status_code, envelope, float(retry_after) if retry_after.isdigit() else None)

    def _lost(self, reason: str) -> UnreachableError:
        return UnreachableError(f"The connection to the server at {self.url} was lost: {reason}.")

    def _unknown(self) -> UnreachableError:
        return UnreachableError(f"The server at {self.url} is not a Sesame TTS server.")


def new_server(settings: Settings, url: str, key: str | None = None) -> SpeechServer:
    """Return a client for the server at `url`, with the settings' first key if none is given.

    Raises:
        ValueError: `url` is no http or https URL, or the key cannot be sent.
    """
    key = key or (settings.api_key[0].get_secret_value() if settings.api_key else None)
    return SpeechServer(url, key, settings.queue_timeout + settings.generation_timeout)


async def running_server(settings: Settings, key: str | None = None) -> SpeechServer | None:
    """Return a client for the server that runs on HOST and PORT of the settings; None if none does.

    Raises:
        ValueError: The key cannot be sent.
    """
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 - an address to connect to, not to bind
    server = new_server(settings, f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}", key)
    try:
        await server.health(_PROBE_SECONDS)
    except TTSError:
        return None
    return server


class ServerSpeaker:
    """Speaks with a server.

    Args:
        voice: A voice's name or alias.
        status: Called with a line that says what is being waited for, "" when the wait is over.
        warn: Called with a warning.
        normalize: Have the server read numbers, symbols and abbreviations out as words.
        words: Also get the times of the words.
    """

    sample_rate = SAMPLE_RATE

    def __init__(
        self,
        server: SpeechServer,
        voice: str,
        status: Callable[[str], None],
        warn: Callable[[str], None],
        *,
        normalize: bool,
        words: bool = False,
    ) -> None:
        self.voice = voice
        self.model = ""
        self._server = server
        self._requested = voice
        self._normalize = normalize
        self._timestamps = "word" if words else True
        self._status = status
        self._warn = warn

    async def speak(self, text: str, seed: int) -> AsyncGenerator[Part, None]:
        """Speak `text`; wait while the voice's model loads or the queue is full.

        Raises:
            TTSError: The server refused the request, failed or is gone.
        """
        # As events, because they carry errors and captions. At speed 1 and as raw samples, because speed and encoding are applied
        # once to all pieces together. Normalizing the text again does not change it.
        body = {"model": "csm-1b", "input": text, "voice": self._requested, "seed": seed, "normalize": self._normalize}
        body |= {"response_format": "pcm", "stream_format": "sse", "timestamps": self._timestamps}
        async with AsyncExitStack() as stack:
            response = await self._accepted(stack, body)
            self._read_headers(response.headers)
            events = await stack.enter_async_context(aclosing(self._server.events(response)))
            async for part in _parts(events):
                yield part

    async def _accepted(self, stack: AsyncExitStack, body: dict[str, Any]) -> httpx.Response:
        """Post until the server accepts the request."""
        patience = _MAX_BUSY_SECONDS
        while True:
            try:
                return await stack.enter_async_context(self._server.speech(body))
            except RefusedError as refused:
                patience -= await self._wait(refused, patience)

    async def _wait(self, refused: RefusedError, patience: float) -> float:
        """Wait before the next try and return the seconds spent on a full queue.

        Raises:
            RefusedError: Trying again is of no use.
        """
        if refused.code == ModelNotReadyError.code and await self._is_loading():
            await asyncio.sleep(_SERVER_POLL_SECONDS)
            return 0.0
        if refused.code not in ("rate_limit_exceeded", "queue_timeout") or patience <= 0:
            raise refused
        seconds = min(refused.retry_after or _SERVER_POLL_SECONDS, _MAX_RETRY_SECONDS)
        self._status("the server is busy: waiting for a place in its queue")
        await asyncio.sleep(seconds)
        return seconds

    async def _is_loading(self) -> bool:
        """Return whether the voice's model is loading, and show its progress."""
        owner = await self._owner()
        health = await self._server.health()
        model = health.get("models", {}).get(owner.get("model"), {})
        if model.get("state") != "loading":
            return bool(owner.get("ready"))  # it became ready after the refusal
        progress = model.get("progress") or {}
        fraction = progress.get("fraction")
        percent = f" {fraction:.0%}" if isinstance(fraction, float) else ""
        self._status(f"the server loads {owner.get('model')}: {progress.get('stage', 'starting')}{percent}")
        return True

    def _read_headers(self, headers: httpx.Headers) -> None:
        """Read which voice speaks, warn if it is a fallback, and request it from now on: the voice must not change within a text."""
        self._status("")
        self.voice, self.model = headers.get("X-Voice", self._requested), headers.get("X-Model", "")
        self._requested = self.voice
        if replaced := headers.get("X-Fallback-For"):
            self._warn(f"voice '{replaced}' is not ready; voice '{self.voice}' speaks instead")

    async def _owner(self) -> dict[str, Any]:
        """Return the voice that the requested name belongs to."""
        voices = await self._server.voices()
        return next((voice for voice in voices if self._requested in (voice.get("id"), *voice.get("aliases", ()))), {})


class LocalSpeaker:
    """Speaks with the engine in this process. An async context manager, which loads the model.

    Args:
        voice: A voice's name or alias.
        status: Called with a line about the load, "" when it is over.
        streamed: The audio is consumed while it is generated.
        words: Also get the times of the words.

    Raises:
        InvalidVoiceError: There is no such voice; lists the voices.
    """

    def __init__(self, settings: Settings, voice: str, status: Callable[[str], None], *, streamed: bool, words: bool = False) -> None:
        # The engine takes seconds to import, and a running server needs none of it.
        from tts_engine import TTSEngine

        presets = _presets(settings)
        self._voice = presets.catalog.resolve(voice)
        self.voice = self._voice.id
        self.model: str = self._voice.preset.model
        if self.model == "hibari":
            settings = settings.model_copy(update={"csm": "off"})  # 6 GB that this voice does not need
        self._engine = TTSEngine(settings, presets)
        self._host: ModelHost = self._engine.host(self._voice)
        self.sample_rate = self._host.model.sample_rate
        self._status = status
        self._streamed = streamed
        self._words = words

    async def __aenter__(self) -> LocalSpeaker:
        """Load the voice's model.

        Raises:
            ModelNotReadyError: It cannot be loaded; says why.
        """
        try:
            await self._engine.start(self._voice)
            await self._loaded()
            self._engine.check_ready(self._voice)
        except BaseException:
            await self._engine.close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._engine.close()

    async def speak(self, text: str, seed: int) -> AsyncGenerator[Part, None]:
        """Speak `text`.

        Raises:
            TTSError: The engine failed.
        """
        utterance = self._engine.speak(text, self._voice, SpeechOptions(seed, streamed=self._streamed))
        yielded = 0  # captions
        try:
            async for samples in utterance:
                timestamps = list(utterance.timestamps)
                yield self._part(text, utterance, samples, timestamps[yielded:])
                yielded = len(timestamps)
            yield self._part(text, utterance, np.zeros(0, np.float32), utterance.timestamps[yielded:])
        finally:
            await utterance.aclose()

    def _part(self, text: str, utterance: Utterance, samples: Samples, ended: Sequence[SegmentTimestamp]) -> Part:
        captions = tuple(captions_of(utterance.segments, ended, 1.0))
        if not self._words or not ended:
            return Part(samples, captions)
        end = ended[-1].end if ended[-1].segment == len(utterance.segments) - 1 else None
        words = WordFinder(text, utterance.segments, utterance.spoken.reading).words(ended, 1.0, end)
        return Part(samples, captions, tuple(words))

    async def _loaded(self) -> None:
        """Wait until the voice has loaded or failed, and show the progress."""
        while self._engine.loading(self._voice):
            self._status(f"loading {self.model}: {self._host.progress or 'starting'}")
            await asyncio.sleep(_ENGINE_POLL_SECONDS)
        self._status("")


def local_voices(settings: Settings) -> list[dict[str, Any]]:
    """Return the voices of this machine's settings, as `/v1/audio/voices` lists them, but without knowing whether they are ready."""
    catalog = _presets(settings).catalog
    return [
        {
            "id": voice.id,
            "name": voice.name,
            "model": voice.preset.model,
            "description": voice.preset.description,
            "aliases": catalog.aliases_of(voice),
        }
        for voice in catalog.voices
    ]


def _presets(settings: Settings) -> VoicePresetManager:
    from voice_presets import VoicePresetManager
    from voice_store import VoiceStore

    return VoicePresetManager(settings.presets_dir, settings.default_voice, VoiceStore(*settings.voice_folders))


async def _parts(events: AsyncIterator[dict[str, Any]]) -> AsyncGenerator[Part, None]:
    """Yield the speech of a stream of events.

    Raises:
        RefusedError: The server reports a failure.
    """
    odd = b""
    async for event in events:
        kind = event.get("type")
        if kind == "speech.audio.delta":
            data = odd + base64.b64decode(event["audio"])
            whole = len(data) & ~1
            odd = data[whole:]
            yield Part(np.frombuffer(data[:whole], "<i2").astype(np.float32) / _PCM_SCALE)
        elif kind == "speech.audio.timestamps":
            caption = Caption(event["group"], event["text"], event["start"], event["end"])
            words = tuple(_word(word) for word in event.get("words") or ())
            yield Part(np.zeros(0, np.float32), (caption,), words)
        elif kind == "speech.audio.error":
            raise RefusedError(500, event["error"])
        elif kind == "speech.audio.done":
            return


def _word(word: dict[str, Any]) -> WordCaption:
    return WordCaption(word["group"], word["text"], word["start"], word["end"], word["start_char"], word["end_char"])


def _reason(error: BaseException) -> str:
    """Return the cause of a network error in words."""
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    if isinstance(error, httpx.RemoteProtocolError):
        return "the answer is incomplete or not HTTP"
    while inner := error.__cause__ or error.__context__ or next(iter(getattr(error, "exceptions", ())), None):
        error = inner  # the operating system's error is the innermost
    if isinstance(error, socket.gaierror):
        return "there is no host of this name"
    if isinstance(error, ssl.SSLError):
        return "the encrypted connection failed"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return type(error).__name__
