"""A running server, as a client sees it: its health, its voices, its refusals, and a request for speech."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from typing import Any
from urllib.parse import urlsplit

from errors import InputTooLongError, TTSError

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
