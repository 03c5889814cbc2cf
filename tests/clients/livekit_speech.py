"""Speak through LiveKit Agents with the `tts` from a user's file and write the samples.

Usage: python livekit_speech.py USERS_FILE TEXT FILE; prints rate, channels and the number of frames as JSON.
"""

from __future__ import annotations

import asyncio
import json
import runpy
import sys
from pathlib import Path


async def speak(users_file: str, text: str) -> tuple[bytes, dict[str, int]]:
    """Generate one utterance frame by frame, as an agent does; return the samples and the values to print."""
    tts = runpy.run_path(users_file)["tts"]
    frames = []
    async with tts.synthesize(text) as stream:
        async for spoken in stream:
            frames.append(spoken.frame)
    await tts.aclose()
    results = {"rate": frames[0].sample_rate, "channels": frames[0].num_channels, "frames": len(frames)}
    return b"".join(bytes(frame.data) for frame in frames), results


if __name__ == "__main__":
    samples, results = asyncio.run(speak(sys.argv[1], sys.argv[2]))
    Path(sys.argv[3]).write_bytes(samples)
    print(json.dumps(results))
