"""Speak through a Pipecat pipeline while a fake language model still writes.

Usage: python pipecat_stream.py USERS_FILE TEXT FILE WORDS_A_SECOND; prints as JSON which share of the text existed at the first audio.
"""

from __future__ import annotations

import asyncio
import json
import runpy
import sys
from pathlib import Path
from typing import Any

from pipecat.frames.frames import (  # type: ignore[import-not-found]
    ErrorFrame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    TTSAudioRawFrame,
)
from pipecat.pipeline.worker import PipelineParams  # type: ignore[import-not-found]
from pipecat.tests.utils import SleepFrame, run_test  # type: ignore[import-not-found]

RATE = 24_000
START_SECONDS = 60  # Pipecat's default of one second is too short on a busy machine


async def speak(users_file: str, text: str, rate: float) -> tuple[bytes, dict[str, Any]]:
    """Write the text word by word; return the samples and the values to print."""
    tts = runpy.run_path(users_file)["tts"]
    written, at_first = 0, 0
    run_tts, append = tts.run_tts, tts.append_to_audio_context

    async def count_written(part: str, context_id: str) -> Any:
        nonlocal written
        written += len(part)
        async for frame in run_tts(part, context_id):
            yield frame

    async def note_first(context_id: str, frame: Any) -> None:
        nonlocal at_first
        at_first = at_first or (written if isinstance(frame, TTSAudioRawFrame) else 0)
        await append(context_id, frame)

    tts.run_tts, tts.append_to_audio_context = count_written, note_first
    words = [each for word in text.split(" ") for each in (LLMTextFrame(word + " "), SleepFrame(1 / rate))]
    down, up = await run_test(
        tts,
        frames_to_send=[LLMFullResponseStartFrame(), *words, LLMFullResponseEndFrame(), SleepFrame(3)],
        pipeline_params=PipelineParams(audio_out_sample_rate=RATE),
        start_timeout=START_SECONDS,
    )
    sound = [frame for frame in down if isinstance(frame, TTSAudioRawFrame)]
    errors = [frame.error for frame in [*up, *down] if isinstance(frame, ErrorFrame)]
    return b"".join(frame.audio for frame in sound), {"share_at_first_audio": at_first / len(text), "errors": errors}


if __name__ == "__main__":
    samples, results = asyncio.run(speak(sys.argv[1], sys.argv[2], float(sys.argv[4])))
    Path(sys.argv[3]).write_bytes(samples)
    print(json.dumps(results))
