"""A streamed answer: bytes that leave as they come, and end the work when the client goes."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

# A client that takes nothing at all for so long is gone, whatever its socket says.
_STALLED_SECONDS = 120.0


class SpeechStream(Response):
    """Sends a body piece by piece.

    Args:
        body: The pieces. An exception out of it breaks the connection off, so that the client sees a broken body and never a short one
            that looks whole.
        close: Called once, however it ends; stops the work behind the body.
        headers: Of the response.
        media_type: Of the response.
    """

    def __init__(
        self, body: AsyncIterator[bytes], close: Callable[[], Awaitable[None]], *, headers: dict[str, str], media_type: str
    ) -> None:
        super().__init__(None, headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._body = body
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            sending = self._send(send)
            await run_until_gone(sending, receive)
        except ClientDisconnect:
            scope["state"]["facts"]["cancelled"] = "yes"
        finally:
            await self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self._body:
            await _in_time(send({"type": "http.response.body", "body": piece, "more_body": True}))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _in_time(sending: Awaitable[None]) -> None:
    """Wait until a piece is taken.

    Not `asyncio.wait_for`: before Python 3.12 it swallows a cancellation that comes at the moment the piece is taken, and the whole of a
    text was then spoken to nobody (4 of 12 clients that went away, measured on two busy cores).

    Raises:
        ClientDisconnect: Nothing was taken for too long.
    """
    task = asyncio.ensure_future(sending)
    try:
        await asyncio.wait({task}, timeout=_STALLED_SECONDS)
        if not task.done():
            raise ClientDisconnect
        await task
    finally:
        task.cancel()


async def run_until_gone(work: Awaitable[T], receive: Receive) -> T:
    """What `work` gives; when the client goes first, `work` is cancelled.

    Raises:
        ClientDisconnect: The client went.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait({working, leaving})
        for task in (working, leaving):
            if not task.cancelled():
                task.exception()  # seen, or asyncio would report it as lost


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(kind: str, **fields: object) -> bytes:
    """One server-sent event in the form that OpenAI's clients read: only `data`, one JSON object with its `type`."""
    return b"data: " + json.dumps({"type": kind, **fields}, ensure_ascii=False).encode() + b"\n\n"


def audio_event(data: bytes) -> bytes:
    """Some encoded audio as `speech.audio.delta`."""
    return event("speech.audio.delta", audio=base64.b64encode(data).decode())
