"""Speaks through a Wyoming server as Home Assistant does: asks what it offers, then for a text in a voice; writes the sound.

Usage: python wyoming_speech.py URI TEXT VOICE FILE; prints the offer and the audio's format as JSON. FILE gets the samples as they come.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from wyoming.audio import AudioChunk, AudioStart, AudioStop  # type: ignore[import-not-found]
from wyoming.client import AsyncClient  # type: ignore[import-not-found]
from wyoming.info import Describe, Info  # type: ignore[import-not-found]
from wyoming.tts import Synthesize, SynthesizeVoice  # type: ignore[import-not-found]


async def speak(uri: str, text: str, voice: str) -> tuple[bytes, dict[str, Any]]:
    """One offer, one utterance: its samples, and what is printed."""
    async with AsyncClient.from_uri(uri) as client:
        await client.write_event(Describe().event())
        info = None
        while info is None:
            event = await client.read_event()
            if Info.is_type(event.type):
                info = Info.from_event(event)
        await client.write_event(Synthesize(text=text, voice=SynthesizeVoice(name=voice)).event())
        told: dict[str, Any] = {"voices": [each.name for program in info.tts for each in program.voices]}
        chunks: list[bytes] = []
        while True:
            event = await client.read_event()
            if event is None:
                raise ConnectionError("the bridge hung up")
            if AudioStart.is_type(event.type):
                start = AudioStart.from_event(event)
                told |= {"rate": start.rate, "width": start.width, "channels": start.channels}
            elif AudioChunk.is_type(event.type):
                chunks.append(AudioChunk.from_event(event).audio)
            elif AudioStop.is_type(event.type):
                break
    return b"".join(chunks), told | {"chunks": len(chunks)}


if __name__ == "__main__":
    samples, told = asyncio.run(speak(sys.argv[1], sys.argv[2], sys.argv[3]))
    Path(sys.argv[4]).write_bytes(samples)
    print(json.dumps(told))
