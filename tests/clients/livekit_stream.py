"""Speak through LiveKit Agents' streaming interface while a fake language model still writes.

Usage: python livekit_stream.py USERS_FILE TEXT FILE WORDS_A_SECOND; prints as JSON which share of the text existed at the first audio.
"""

from __future__ import annotations

import asyncio
import json
import runpy
import sys
from pathlib import Path


async def speak(users_file: str, text: str, rate: float) -> tuple[bytes, dict[str, float]]:
    """Write the text word by word; return the samples and the values to print."""
    tts = runpy.run_path(users_file)["tts"]
    written, at_first = 0, 0
    samples = b""

    async def write() -> None:
        nonlocal written
        for word in text.split(" "):
            stream.push_text(word + " ")
            written += len(word) + 1
            await asyncio.sleep(1 / rate)
        stream.end_input()

    async with tts.stream() as stream:
        writing = asyncio.create_task(write())
        async for spoken in stream:
            at_first = at_first or written
            samples += bytes(spoken.frame.data)
        await writing
    await tts.aclose()
    return samples, {"share_at_first_audio": at_first / len(text)}


if __name__ == "__main__":
    samples, results = asyncio.run(speak(sys.argv[1], sys.argv[2], float(sys.argv[4])))
    Path(sys.argv[3]).write_bytes(samples)
    print(json.dumps(results))
