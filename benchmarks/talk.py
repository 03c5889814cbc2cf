"""Measure conversations and text that is spoken while it is written.

Prints a dialogue of ten turns on the tiny random CSM (the prompt's length, the positions that were read, and the time until the first frame
can be computed), and the first audio of the built-in voice for a text that is written at 15 words a second: over the WebSocket, and over
HTTP, which has to wait for its end. Usage: python benchmarks/talk.py
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import csm_loading
import tiny_csm
import tiny_weights
from conftest import start_server
from forking import end_server_forkers
from websockets.sync.client import connect

from speech_model import ContextPart, SpeechOptions

WORDS_A_SECOND = 15
TEXT = (
    "The train left the station at nine. Nobody had expected it to be on time! Was that not a good sign? "
    "Outside, the fields were green, and the river was full after the rain. By noon they had reached the coast. "
    "The sea was calm, and a few boats were coming in. They had lunch at a small place near the harbour, and stayed until four."
)


def dialogue(folder: Path) -> None:
    """Print one line for each of ten turns: five questions with recordings, five replies."""
    cache = tiny_csm.build(small_codec=True, codebooks=tiny_weights.CODEBOOKS)
    prompts = folder / "prompts"
    shutil.copytree(csm_loading.prompt_folder(cache), prompts)
    model = csm_loading.load(cache)
    speaker = csm_loading.speaker(model, prompts, folder, guard="off")
    voice = csm_loading.voice(max_audio_length_ms=2000)
    said: list[ContextPart] = []
    print("| turn | prompt (positions) | of these read before | preparation (ms) | without a cache (ms) |\n|---|---:|---:|---:|---:|")
    for turn in range(5):
        noise = np.random.default_rng(turn).normal(0, 0.1, 48_000).astype(np.float32)
        said.append(ContextPart(f"This is question number {turn + 1}, is it not?", 1, speaker.encode(noise)))
        text = f"This is the answer to question number {turn + 1}."
        fresh = csm_loading.speaker(model, prompts, folder, guard="off")
        fresh._prompts = speaker._prompts
        times = []
        for each in (fresh, speaker):
            started = time.perf_counter()
            prompt, prefix = each._prompt(text, voice, said)
            times.append(1000 * (time.perf_counter() - started))
        read = sum(len(tokens) for tokens, _ in speaker._prompts.segments(voice, said[-2:] if turn else said)[bool(turn) :])
        known = (prefix[0].shape[3] if prefix else 0) - read
        print(f"| {2 * turn + 2} | {len(prompt[0])} | {known} | {times[1]:.0f} | {times[0]:.0f} |")
        (chunk,) = speaker.speak([text], voice, SpeechOptions(turn, context=tuple(said)), lambda: False)
        assert chunk.codes is not None
        said.append(ContextPart(text, 0, chunk.codes))


def over_socket(url: str) -> float:
    """Return the seconds from the first word to the first audio."""
    with connect(url.replace("http", "ws") + "/v1/audio/speech/stream", proxy=None) as connection:
        connection.send(json.dumps({"type": "session.start", "voice": "heart"}))
        started = time.perf_counter()

        def write() -> None:
            for word in TEXT.split(" "):
                connection.send(json.dumps({"type": "input_text.append", "text": word + " "}))
                time.sleep(1 / WORDS_A_SECOND)
            connection.send(json.dumps({"type": "input_text.done"}))

        writer = threading.Thread(target=write)
        writer.start()
        while isinstance(connection.recv(), str):
            pass
        first = time.perf_counter() - started
        while '"done"' not in str(connection.recv()):
            pass
        writer.join()
    return first


def over_http(url: str) -> float:
    """Return the seconds from the first word to the first audio of a stream that is requested once the text is complete."""
    started = time.perf_counter()
    time.sleep(len(TEXT.split(" ")) / WORDS_A_SECOND)
    body = {"model": "tts-1", "voice": "heart", "input": TEXT, "response_format": "pcm"}
    with httpx.stream("POST", f"{url}/v1/audio/speech", json=body, timeout=60) as answer:
        next(answer.iter_raw())
        return time.perf_counter() - started


def main() -> None:
    """Run both measurements."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TEST_RUN_FOLDER"] = name  # where the tests' forker of servers has its socket
        dialogue(folder)
        server = start_server(folder)
        try:
            server.wait_for(lambda health: health["status"] == "ok")
            over_http(server.url)
            socket, http = ([measure(server.url) for _ in range(3)] for measure in (over_socket, over_http))
            print(f"\nfirst audio of {len(TEXT.split())} words at {WORDS_A_SECOND} words a second, median of 3:")
            print(
                f"  WebSocket {sorted(socket)[1]:.2f} s after the first word, HTTP {sorted(http)[1]:.2f} s; load {os.getloadavg()[0]:.1f}"
            )
        finally:
            server.stop()
            end_server_forkers()


if __name__ == "__main__":
    main()
