"""Speak through a Pipecat pipeline with the `tts` from a user's file and write the samples.

Usage: python pipecat_speech.py USERS_FILE TEXT FILE; prints rate, channels, the number of frames and any errors as JSON.
"""

from __future__ import annotations

import asyncio
import json
import runpy
import sys
from pathlib import Path
from typing import Any

from pipecat.frames.frames import ErrorFrame, TTSAudioRawFrame, TTSSpeakFrame  # type: ignore[import-not-found]
from pipecat.pipeline.worker import PipelineParams  # type: ignore[import-not-found]
from pipecat.tests.utils import run_test  # type: ignore[import-not-found]

RATE = 24_000
START_SECONDS = 60  # Pipecat's default of one second is too short on a busy machine


async def speak(users_file: str, text: str) -> tuple[bytes, dict[str, Any]]:
    """Generate one utterance in a pipeline with only the speech service; return the samples and the values to print."""
    tts = runpy.run_path(users_file)["tts"]
    down, up = await run_test(
        tts,
        frames_to_send=[TTSSpeakFrame(text)],
        pipeline_params=PipelineParams(audio_out_sample_rate=RATE),
        start_timeout=START_SECONDS,
    )
    sound = [frame for frame in down if isinstance(frame, TTSAudioRawFrame)]
    results = {
        "rates": sorted({frame.sample_rate for frame in sound}),
        "channels": sorted({frame.num_channels for frame in sound}),
        "frames": len(sound),
        "errors": [frame.error for frame in up if isinstance(frame, ErrorFrame)],
    }
    return b"".join(frame.audio for frame in sound), results


if __name__ == "__main__":
    samples, results = asyncio.run(speak(sys.argv[1], sys.argv[2]))
    Path(sys.argv[3]).write_bytes(samples)
    print(json.dumps(results))
