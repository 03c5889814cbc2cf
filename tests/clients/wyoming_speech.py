"""Speak through a Wyoming server as Home Assistant does: ask for its voices, then for a text, and write the samples.

Usage: python wyoming_speech.py URI TEXT VOICE FILE; prints the voices and the audio format as JSON. FILE gets the raw samples.
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
    """Get the voices and generate one utterance; return the samples and the values to print."""
    async with AsyncClient.from_uri(uri) as client:
        await client.write_event(Describe().event())
        info = None
        while info is None:
            event = await client.read_event()
            if Info.is_type(event.type):
                info = Info.from_event(event)
        await client.write_event(Synthesize(text=text, voice=SynthesizeVoice(name=voice)).event())
        results: dict[str, Any] = {"voices": [each.name for program in info.tts for each in program.voices]}
        chunks: list[bytes] = []
        while True:
            event = await client.read_event()
            if event is None:
                raise ConnectionError("the bridge closed the connection")
            if AudioStart.is_type(event.type):
                start = AudioStart.from_event(event)
                results |= {"rate": start.rate, "width": start.width, "channels": start.channels}
            elif AudioChunk.is_type(event.type):
                chunks.append(AudioChunk.from_event(event).audio)
            elif AudioStop.is_type(event.type):
                break
    return b"".join(chunks), results | {"chunks": len(chunks)}


if __name__ == "__main__":
    samples, results = asyncio.run(speak(sys.argv[1], sys.argv[2], sys.argv[3]))
    Path(sys.argv[4]).write_bytes(samples)
    print(json.dumps(results))
