"""A streamed answer stops its work when the client disconnects, at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from starlette.types import Message, Scope

from speech_routes import SpeechStream

PIECES = 2000


async def _pieces_made_for_a_client_that_disconnects_after(taken: int) -> int:
    made = 0
    gone = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        nonlocal made
        for _ in range(PIECES):
            made += 1
            if made == taken:
                gone.set()
            yield b"x"
            await asyncio.sleep(0)

    async def send(_: Message) -> None:
        await asyncio.sleep(0)

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    scope: Scope = {"type": "http", "state": {"log_fields": {}}}
    await SpeechStream(body(), AsyncExitStack(), headers={}, media_type="audio/pcm")(scope, receive, send)
    return made


def test_a_disconnected_client_stops_the_work_at_once() -> None:
    for taken in range(1, 40):
        assert asyncio.run(_pieces_made_for_a_client_that_disconnects_after(taken)) < taken + 20
