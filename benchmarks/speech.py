"""Measure what the server adds to its parts: the built-in voice alone and ffmpeg alone, on the same machine in the same run.

    make bench                              everything, some minutes
    python benchmarks/speech.py --quick     fewer repetitions, no memory run

Absolute times depend on the machine; compare the ratios, which are measured side by side.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from hibari import Hibari

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from audio_converter import Encoder, to_int16  # noqa: E402 - the project's folder comes first
from audio_formats import FORMATS, Samples  # noqa: E402 - the project's folder comes first
from ffmpeg import find_ffmpeg  # noqa: E402 - the project's folder comes first
from hibari_model import HibariModel  # noqa: E402 - the project's folder comes first
from speech_model import SpeechOptions  # noqa: E402 - the project's folder comes first
from voice_presets import Voice, VoicePreset  # noqa: E402 - the project's folder comes first

SENTENCE = "The quick brown fox jumps over the lazy dog, and nobody minds at all."
TEN = " ".join(
    f"{SENTENCE[:-1]} for the {word} time."
    for word in ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
)
LONG = " ".join([TEN, TEN])[:1500]
BYTES_A_SECOND = 48_000  # pcm
HEART = Voice(VoicePreset(name="heart", model="hibari", voice_key="heart"), Path())


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def median_time(work: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


class Server:
    """A server process with the built-in voice."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        environment = os.environ | {"HOST": "127.0.0.1", "PORT": str(self.port), "CACHE_DIR": str(folder), "CSM": "off", "LOG_STDERR": "false", "MAX_QUEUE": "100"}  # fmt: skip
        started = time.perf_counter()
        self.process = subprocess.Popen([sys.executable, str(PROJECT / "server.py")], env=environment)
        while not self._ready():
            time.sleep(0.01)
        self.start_seconds = time.perf_counter() - started

    def _ready(self) -> bool:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.request("GET", "/health/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False

    def post(self, **fields: object) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        body = json.dumps({"model": "csm-1b", "voice": "heart"} | fields)
        connection.request("POST", "/v1/audio/speech", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {response.read()!r}")
        return response

    def speak(self, **fields: object) -> bytes:
        return self.post(**fields).read()

    def memory(self) -> float:
        """Return the resident memory in MB."""
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@contextmanager
def running_server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            yield server
        finally:
            server.stop()


def encode_bare(pcm: bytes, name: str = "mp3") -> None:
    """Run the same ffmpeg with the same options, without the server."""
    source = ["-v", "error", "-f", "s16le", "-ar", "24000", "-ac", "1", "-i", "pipe:0"]
    command = [str(find_ffmpeg()), *source, *FORMATS[name].encoder, "pipe:1"]
    subprocess.run(command, input=pcm, stdout=subprocess.DEVNULL, check=True)


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"\n### {title}\n")
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def one_sentence(server: Server, voice: Hibari, runs: int) -> None:
    """Measure server, bare voice and bare ffmpeg alternately, so that changes in the machine's load affect all three."""
    pcm = to_int16(voice(SENTENCE, seed=1))
    whole, speech, encode = [], [], []
    for _ in range(runs):
        whole.append(median_time(lambda: server.speak(input=SENTENCE, response_format="mp3"), 1))
        speech.append(median_time(lambda: voice(SENTENCE, seed=1), 1))
        encode.append(median_time(lambda: encode_bare(pcm), 1))
    own = statistics.median(w - s - e for w, s, e in zip(whole, speech, encode, strict=True))
    table(
        f"One sentence ({len(pcm) / BYTES_A_SECOND:.1f} s of speech) to a complete mp3, median of {runs}",
        ["whole request", "bare voice", "bare ffmpeg process", "the server's own share"],
        [[milliseconds(statistics.median(times)) for times in (whole, speech, encode)] + [milliseconds(own)]],
    )


def complete_files(server: Server, runs: int) -> None:
    """Measure complete answers of 1,500 characters against pcm, which needs no encoder, alternately."""
    model = HibariModel()
    model.load(lambda _: None)
    model.warm_up([HEART])
    whole: dict[str, list[float]] = {name: [] for name in FORMATS}
    after: dict[str, list[float]] = {name: [] for name in FORMATS}
    for _ in range(runs):
        for name in FORMATS:
            started = time.perf_counter()
            response = server.post(input=LONG, response_format=name, seed=1)
            response.read()
            whole[name].append(time.perf_counter() - started)
            spoken = float(response.headers["X-Queue-Time"]) + float(response.headers["X-Generation-Time"] or 0)
            after[name].append(whole[name][-1] - spoken)
    pcm = statistics.median(whole["pcm"])
    rows = []
    for name in FORMATS:
        complete = statistics.median(whole[name])
        outside = milliseconds(statistics.median(after[name])) if name != "pcm" else ""
        last = milliseconds(statistics.median(asyncio.run(after_last_sample(model, name)) for _ in range(runs))) if name != "pcm" else ""
        rows.append([name, milliseconds(complete), f"{complete / pcm:.2f}", outside, last])
    head = ["format", "complete", "ratio to pcm", "of it outside the generation: request, encoder's start, last samples, sending"]
    head += ["of that after the last sample, with the encoder alone"]
    table(f"Complete answers of 1,500 characters, median of {runs}", head, rows)


async def after_last_sample(model: HibariModel, name: str) -> float:
    """Return how long the encoder takes to give the complete file after the last samples; it encodes while the voice speaks in its own thread."""
    loop = asyncio.get_running_loop()
    spoken: asyncio.Queue[Samples] = asyncio.Queue()

    def speak() -> float:
        for chunk in model.speak(Hibari.split_sentences(LONG), HEART, SpeechOptions(seed=1), lambda: False):
            if chunk.samples.size:
                last = time.perf_counter()
                loop.call_soon_threadsafe(spoken.put_nowait, chunk.samples)
        loop.call_soon_threadsafe(spoken.put_nowait, np.zeros(0, np.float32))
        return last

    async with Encoder(FORMATS[name], 24_000, streamed=False) as encoder:
        speaking = loop.run_in_executor(None, speak)
        while (samples := await spoken.get()).size:
            await encoder.write(samples)
        await encoder.file()
        return time.perf_counter() - await speaking


def probe(server: Server, path: str, count: int) -> list[float]:
    """Return the times of requests to `path` on one connection, without a timeout: with one, the client asks the system before each read."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        connection.request("GET", path)
        connection.getresponse().read()
        times.append(time.perf_counter() - started)
    return times


def probes(server: Server) -> None:
    """Measure the status requests: alone, and readiness while 16 clients speak."""
    alone = [f"{statistics.median(probe(server, path, 300)) * 1000:.2f} ms" for path in ("/health", "/health/ready")]
    stop = threading.Event()
    with ThreadPoolExecutor(17) as pool:

        def speak_on() -> None:
            while not stop.is_set():
                server.speak(input=SENTENCE)

        for _ in range(16):
            pool.submit(speak_on)
        times = sorted(probe(server, "/health/ready", 300))
        stop.set()
    busy = [f"{times[len(times) // 2] * 1000:.1f} ms", f"{times[len(times) * 95 // 100] * 1000:.1f} ms"]
    head = ["/health", "/health/ready", "/health/ready beside 16 speaking clients", "95th percentile"]
    table("Status requests, median of 300", head, [alone + busy])


def first_byte(server: Server, **fields: object) -> float:
    started = time.perf_counter()
    response = server.post(stream=True, **fields)
    response.read(1)
    seconds = time.perf_counter() - started
    response.read()
    return seconds


def streaming(server: Server, voice: Hibari, runs: int) -> None:
    rows = []
    for name in FORMATS:
        row = [name]
        for text in (SENTENCE, TEN):
            early = statistics.median(first_byte(server, input=text, response_format=name) for _ in range(runs))
            complete = median_time(lambda: server.speak(input=text, response_format=name), runs)  # noqa: B023 - called within the loop
            row += [milliseconds(early), milliseconds(complete), f"{complete / early:.1f}"]
        rows.append(row)
    head = ["format", "1 sentence: first byte", "complete", "ratio", "10 sentences: first byte", "complete", "ratio"]
    table(f"First audio byte, streamed, against the complete answer, median of {runs}", head, rows)
    first = next(iter(voice.stream(TEN, seed=1)))
    sentence = median_time(lambda: next(iter(voice.stream(TEN, seed=1))), runs)
    process = median_time(lambda: encode_bare(to_int16(first[:480])), runs)
    print(
        f"\nBare voice's first sentence {milliseconds(sentence)} + one ffmpeg start {milliseconds(process)} = {milliseconds(sentence + process)}."
    )
    print(f"Longest gap for a listener who plays the ten sentences as they arrive: {milliseconds(longest_gap(server))}.")


def longest_gap(server: Server) -> float:
    """Return the longest time in seconds that a player that starts at the first byte would have nothing to play."""
    response = server.post(input=TEN, response_format="pcm")
    response.read(1)
    started, received, worst = time.perf_counter(), 1, 0.0
    while piece := response.read1(65536):
        played_until = started + received / BYTES_A_SECOND
        worst = max(worst, time.perf_counter() - played_until)
        received += len(piece)
    return worst


def bare_throughput(voice: Hibari, count: int) -> float:
    """Return the requests per second of the bare parts: the voice on one core, ffmpeg processes on the other."""
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as encoders:
        for number in range(count):
            encoders.submit(encode_bare, to_int16(voice(SENTENCE, seed=number)))
    return count / (time.perf_counter() - started)


def throughput(server: Server, voice: Hibari, count: int) -> None:
    rows = []
    for clients in (1, 4, 16):
        ratios, absolute = [], []
        for _ in range(3):
            bare = bare_throughput(voice, count)
            started = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(lambda number: server.speak(input=SENTENCE, seed=number), range(count)))
            absolute.append(count / (time.perf_counter() - started))
            ratios.append(absolute[-1] / bare)
        rows.append([str(clients), f"{statistics.median(absolute):.1f}", f"{statistics.median(ratios):.0%}"])
    table(
        f"Throughput, mp3, one sentence per request, median of 3 × {count}",
        ["clients", "requests per second", "share of the bare parts' throughput"],
        rows,
    )


def memory(server: Server) -> None:
    formats = list(FORMATS)
    after: dict[int, float] = {}
    lock = threading.Lock()
    done = 0

    def one(number: int) -> None:
        nonlocal done
        server.speak(input=SENTENCE, response_format=formats[number % len(formats)], stream=number % 2 == 0)
        with lock:
            done += 1
            if done in (100, 1000):
                after[done] = server.memory()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(1000)))
    table(
        "Memory of the server",
        ["after 100 requests", "after 1,000", "ratio"],
        [[f"{after[100]:.0f} MB", f"{after[1000]:.0f} MB", f"{after[1000] / after[100]:.3f}"]],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    runs = 5 if quick else 20
    starts = []
    for _ in range(2 if quick else 5):
        with running_server() as server:
            starts.append(server.start_seconds)
    print(f"From process start to voice ready: {statistics.median(starts):.2f} s (median of {len(starts)}).")
    voice = Hibari()
    with running_server() as server:
        print(f"Memory once ready: {server.memory():.0f} MB.")
        for _ in range(5):
            server.speak(input=SENTENCE)
            voice(SENTENCE)
        one_sentence(server, voice, runs)
        complete_files(server, 3 if quick else 7)
        streaming(server, voice, runs)
        probes(server)
        throughput(server, voice, 20 if quick else 80)
        if not quick:
            memory(server)


if __name__ == "__main__":
    main()
