"""A streamed answer stops its work when the client disconnects, at any moment; deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from starlette.types import Message, Scope

from config import Settings
from errors import DeadlineError
from speech_response import SpeechStream
from speech_routes import voice_in_time
from tts_engine import TTSEngine, Utterance
from voice_presets import VoicePresetManager

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


def test_a_deadline_is_compared_with_the_pace_of_the_model_and_the_texts_before(tmp_path: Path) -> None:
    async def scenario() -> None:
        settings = Settings(csm="on", cache_dir=tmp_path)
        presets = VoicePresetManager(settings.presets_dir, settings.default_voice)
        engine = TTSEngine(settings, presets)
        slow, heart = presets.catalog.resolve("conversational"), presets.catalog.resolve("heart")
        assert voice_in_time(engine, slow, 100, 1, "error") is slow, "the pace is not known yet"
        for characters in (50, 150):
            engine.host(slow).pace.observe(characters, characters * 0.08, 1 + characters * 0.02)
        assert voice_in_time(engine, slow, 100, None, "error") is slow
        assert voice_in_time(engine, slow, 100, 3001, "error") is slow
        with pytest.raises(DeadlineError) as refused:
            voice_in_time(engine, slow, 100, 2999, "error")
        assert int(refused.value.headers["X-Needed-Ms"]) == pytest.approx(3000, abs=1)
        with pytest.raises(DeadlineError):
            voice_in_time(engine, slow, 100, 2999, "fallback")  # the built-in voice is not ready
        engine.hosts["hibari"].state = "ready"
        engine.hosts["hibari"].pace.observe(100, 8.0, 0.5)
        assert voice_in_time(engine, slow, 100, 2999, "fallback") is heart
        with pytest.raises(DeadlineError):
            voice_in_time(engine, slow, 100, 400, "fallback")
        before = Utterance(slow, 24_000, 1)
        before.characters = 100
        engine._running.add(before)
        assert voice_in_time(engine, slow, 100, 6001, "error") is slow
        with pytest.raises(DeadlineError):
            voice_in_time(engine, slow, 100, 5999, "error")
        engine._running.clear()
        await engine.close()

    asyncio.run(scenario())
