"""Compare this server with mlx-audio's own server over HTTP: the same tiny checkpoint of CSM with full-size Mimi, on a CPU.

    python benchmarks/compare.py                three minutes on two cores
    python benchmarks/compare.py --frames 8     longer sentences
    python benchmarks/compare.py --prompt 4     a voice prompt of 4 s; the voices of CSM-1B have prompts of 10 s and more

mlx-audio's server is the installed one, without webrtcvad, which only its speech recognition needs. It asks for a stream of the GPU even where
there is none, so it gets one of the CPU in its place.
Each server runs alone. Times are of the clock; on a busy machine compare the processor time, which is the server's.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

import tiny_csm  # noqa: E402 - the project's folders come first

SENTENCE = "The harbour was quiet that morning."
ENDLESS = "Nobody on the pier spoke a word."  # the checkpoint does not end a segment that begins with an N
VOICE = "conversational_a"
AFTER_SECONDS = 8.0
READY_SECONDS = 300.0
STOCK = """
import sys, types, mlx.core as mx, uvicorn
sys.modules["webrtcvad"] = types.ModuleType("webrtcvad")  # speech recognition only
new_stream = mx.new_stream
mx.new_stream = lambda device: new_stream(mx.cpu)
from mlx_audio.server import app
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
"""


@dataclass
class Server:
    """A server under measurement.

    Attributes:
        fields: What each request says beside its text.
        measured: Seconds of the clock and of the processor, by measurement.
    """

    name: str
    process: subprocess.Popen[bytes]
    port: int
    fields: dict[str, object]
    measured: dict[str, tuple[float, float]] = field(default_factory=dict)

    def connect(self, text: str, **fields: object) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        body = json.dumps(self.fields | {"input": text, "response_format": "wav"} | fields)
        connection.request("POST", "/v1/audio/speech", body, {"Content-Type": "application/json"})
        return connection

    def speak(self, text: str = SENTENCE, **fields: object) -> bytes:
        response = self.connect(text, **fields).getresponse()
        data = response.read()
        if response.status != 200 or not data:
            raise RuntimeError(f"{self.name}: {response.status} {data[:500]!r}")
        return data

    def processor(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system + times.children_user + times.children_system)

    def measure(self, name: str, work: Callable[[], object]) -> None:
        clock, processor = time.perf_counter(), self.processor()
        work()
        self.measured[name] = time.perf_counter() - clock, self.processor() - processor

    def wait(self, path: str) -> None:
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            with suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", path)
                if connection.getresponse().status == 200:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError(f"{self.name} did not start")


@contextmanager
def running(name: str, command: list[str], port: int, fields: dict[str, object], ready: str, **settings: str) -> Iterator[Server]:
    """Start a server, and end it."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"HOST": "127.0.0.1", "PORT": str(port), "CACHE_DIR": folder, "LOG_STDERR": "false"} | settings
        process = subprocess.Popen([sys.executable, *command], cwd=PROJECT, env=environment)
        try:
            server = Server(name, process, port, fields)
            server.wait(ready)
            yield server
        finally:
            process.kill()  # mlx-audio's server would generate to the end for the client that has left
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def first_byte_of_stream(server: Server, **fields: object) -> None:
    """Measure the time to the first byte of a stream; its processor time includes the rest of the answer."""
    started, processor = time.perf_counter(), server.processor()
    connection = server.connect(SENTENCE, stream=True, **fields)
    response = connection.getresponse()
    response.read(1)
    clock = time.perf_counter() - started
    response.read()
    server.measured["streamed: first byte (processor: all of it)"] = clock, server.processor() - processor


def after_a_client_left(server: Server) -> None:
    """Measure the processor time in some seconds after a client has left in the middle of its answer."""
    connection = server.connect(ENDLESS)
    time.sleep(2)
    connection.close()
    time.sleep(0.5)
    server.measure(f"{AFTER_SECONDS:.0f} s after a client left", lambda: time.sleep(AFTER_SECONDS))


def measure(server: Server, **stream: object) -> bool:
    """Measure everything; return whether one seed gives the same bytes twice."""
    server.measure("first request (mlx_audio.server loads the model in it)", server.speak)
    for _ in range(8):
        server.speak()
    server.measure("tenth request", server.speak)
    first_byte_of_stream(server, **stream)
    with ThreadPoolExecutor(4) as clients:
        server.measure("4 clients at once", lambda: list(clients.map(lambda _: server.speak(), range(4))))
    same = server.speak(seed=7) == server.speak(seed=7)
    after_a_client_left(server)
    return same


def show(stock: Server, ours: Server, same: tuple[bool, bool]) -> None:
    print("| | mlx_audio.server | here | ratio | processor: mlx_audio.server | here | ratio |\n|---|---|---|---|---|---|---|")
    for name in stock.measured:
        (clock, processor), (our_clock, our_processor) = stock.measured[name], ours.measured[name]
        times = f"{clock:.2f} s | {our_clock:.2f} s | {clock / our_clock:.1f}"
        print(f"| {name} | {times} | {processor:.2f} s | {our_processor:.2f} s | {processor / max(our_processor, 0.01):.1f} |")
    print(f"| the same seed gives the same bytes | {' | '.join('yes' if each else 'no' for each in same)} | | | | |")


def compare(environment: dict[str, str]) -> None:
    """Measure both servers, one after the other."""
    fields: dict[str, object] = {"model": tiny_csm.SESAME, "voice": VOICE}
    port = free_port()
    with running("mlx_audio.server", ["-c", STOCK, str(port)], port, fields, "/v1/models", **environment) as stock:
        stock_same = measure(stock, streaming_interval=0.08)
    settings = {"CSM": "on", "DEFAULT_VOICE": "conversational", "MODEL_DTYPE": "float32", "GUARD": "off"} | environment
    ours_fields: dict[str, object] = {"model": "csm-1b", "voice": "conversational"}
    port = free_port()
    with running("sesame-tts", ["server.py"], port, ours_fields, "/health/ready", **settings) as ours:
        same = measure(ours)
    show(stock, ours, (stock_same, same))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=3, help="frames of 80 ms that each sentence has")
    parser.add_argument("--prompt", type=float, default=tiny_csm.PROMPT_SECONDS[VOICE], help="seconds of the voice prompt")
    options = parser.parse_args()
    tiny_csm.PROMPT_SECONDS[VOICE] = options.prompt
    script = {"": [tiny_csm.ends_after(options.frames)], "N": [tiny_csm.NEVER]}
    with tempfile.TemporaryDirectory() as root:
        compare(tiny_csm.environment(tiny_csm.build(Path(root), script=script)))


if __name__ == "__main__":
    main()
