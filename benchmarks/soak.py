"""Run a server under mixed load and watch what grows, what is left over and what fails.

    make soak                                       10,000 requests or an hour, whichever comes first
    make soak ARGS="--seconds 120"
    make soak ARGS="--requests 3000 --out somewhere"

Loopback only. It writes soak.csv, one line per second, and soak.png. The exit status is 1 if a request ended unexpectedly, if a thread, a
child process or a descriptor was left over, or if memory grew by more than 5 % after the first thousand requests.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import httpx
import psutil

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from audio_formats import FORMATS  # noqa: E402 - the project's folder comes first

SETTLED_AFTER = 1000  # requests: by then caches are full and the allocator has seen all sizes
MOST_GROWTH = 0.05
SENTENCES = (
    "Yes.",
    "The kettle is on, and the train leaves at a quarter past seven.",
    "Nobody had expected it to be on time! Was that not a good sign? They looked at each other and began to laugh.",
    "Outside, the fields were green, and the river was full after the rain. By noon they had reached the coast. " * 3,
)


@dataclass
class Sample:
    """The state of the server at one moment; latencies, in seconds, are those of the requests since the previous sample."""

    seconds: float
    requests: int
    unexpected: int
    rss_mb: float
    threads: int
    descriptors: int
    children: int
    connections: int
    median_latency: float
    p95_latency: float


@dataclass
class Tally:
    """The counters that the workers share."""

    requests: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, seconds: float, fault: str | None) -> None:
        """Record one request."""
        with self.lock:
            self.requests += 1
            self.kinds[kind] += 1
            self.latencies.append(seconds)
            if fault:
                self.unexpected.append(f"{kind}: {fault}")

    def take_latencies(self) -> list[float]:
        """Return the latencies since the last call."""
        with self.lock:
            taken, self.latencies = self.latencies, []
        return taken


class Load:
    """Makes requests of all kinds. Each method makes one and returns its fault, or None."""

    def __init__(self, client: httpx.Client, generator: random.Random, recording: bytes) -> None:
        self._client = client
        self._random = generator
        self._recording = recording
        self.kinds: list[tuple[int, Callable[[], str | None]]] = [
            (30, self.complete),
            (20, self.streamed),
            (8, self.events),
            (10, self.refused),
            (10, self.cancelled),
            (4, self.abandoned),
            (12, self.other_path),
            (1, self.voice),
        ]

    def one(self) -> tuple[str, str | None]:
        """Make a request of a random kind; return its name and its fault."""
        weights = [weight for weight, _ in self.kinds]
        work = self._random.choices([work for _, work in self.kinds], weights)[0]
        try:
            return work.__name__, work()
        except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
            return work.__name__, f"{type(error).__name__}: {error}"

    def complete(self) -> str | None:
        """Request a complete file in a random format and speed, and its timestamps."""
        response = self._post(response_format=self._format(), speed=self._random.choice([1.0, 1.0, 1.5]), timestamps=True)
        if response.status_code == 200 and "x-timestamps" in response.headers:
            captions = self._client.get(response.headers["x-timestamps"], params={"format": self._random.choice(["json", "vtt", "srt"])})
            return _wrong(captions, 200)
        return _wrong(response, 200)

    def streamed(self) -> str | None:
        """Read a byte stream to its end."""
        return _wrong(self._post(response_format=self._format(), stream=True), 200)

    def events(self) -> str | None:
        """Read an event stream to its end."""
        response = self._post(stream_format="sse", response_format=self._format())
        if response.status_code == 200 and '"speech.audio.done"' not in response.text:
            return "the final event is missing"
        return _wrong(response, 200)

    def refused(self) -> str | None:
        """Make a request that must be refused."""
        wrong: list[tuple[int, dict[str, Any]]] = [
            (400, {"voice": "nobody"}),
            (400, {"input": "!!!"}),
            (400, {"speed": 9}),
            (400, {"response_format": "ogg"}),
            (400, {"input": "a" * 5000}),
            (503, {"voice": "conversational"}),
        ]
        status, changed = self._random.choice(wrong)
        return _wrong(self._post(**changed), status)

    def cancelled(self) -> str | None:
        """Disconnect in the middle of a stream."""
        body = self._body(input=SENTENCES[3] * 4, response_format=self._format(), stream=True)
        with self._client.stream("POST", "/v1/audio/speech", json=body) as response:
            for _ in zip(response.iter_raw(), range(self._random.randint(1, 3)), strict=False):
                pass
            return f"status {response.status_code}" if response.status_code != 200 else None

    def abandoned(self) -> str | None:
        """Disconnect while waiting for a file."""
        with contextlib.suppress(httpx.ReadTimeout):
            self._client.post("/v1/audio/speech", json=self._body(input=SENTENCES[3] * 4), timeout=self._random.uniform(0.01, 0.2))
        return None

    def other_path(self) -> str | None:
        """Request something other than speech."""
        path = self._random.choice(
            ["/health", "/health/ready", "/metrics", "/v1/audio/voices", "/v1/models", "/docs", "/openapi.json", "/"]
        )
        return _wrong(self._client.get(path), 200)

    def voice(self) -> str | None:
        """Add a voice and delete it."""
        form = {"name": f"Soak {self._random.getrandbits(60):x}", "consent": "true", "ref_text": SENTENCES[1]}
        added = self._client.post("/v1/audio/voices", data=form, files={"audio_sample": ("a.wav", self._recording)})
        if added.status_code != 200:
            return _wrong(added, 200)
        return _wrong(self._client.delete(f"/v1/audio/voices/{added.json()['id']}"), 200)

    def _format(self) -> str:
        return self._random.choice(list(FORMATS))

    def _body(self, **changed: object) -> dict[str, Any]:
        return {"model": "soak", "voice": "heart", "input": self._random.choice(SENTENCES), "response_format": "mp3"} | changed

    def _post(self, **changed: object) -> httpx.Response:
        return self._client.post("/v1/audio/speech", json=self._body(**changed))


def _wrong(response: httpx.Response, status: int) -> str | None:
    if response.status_code != status:
        return f"status {response.status_code} instead of {status}: {response.text[:200]}"
    return None if response.content else "an empty response"


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[tuple[psutil.Process, str]]:
    """Run a server with the built-in voice and shut it down at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = {"HOST": "127.0.0.1", "PORT": str(port), "CACHE_DIR": str(folder), "CSM": "off", "LOG_STDERR": "false", "API_KEY": ""}
    process = subprocess.Popen([sys.executable, str(PROJECT / "server.py")], env=os.environ | settings, stdin=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while not _ready(url):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not start; its log is in {folder}")
            time.sleep(0.1)
        yield psutil.Process(process.pid), url
    finally:
        process.terminate()
        process.wait(60)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def take_sample(process: psutil.Process, tally: Tally, started: float) -> Sample:
    """Return the current state."""
    latencies = sorted(tally.take_latencies()) or [0.0]
    return Sample(
        seconds=round(time.monotonic() - started, 1),
        requests=tally.requests,
        unexpected=len(tally.unexpected),
        rss_mb=round(process.memory_info().rss / 1e6, 1),
        threads=process.num_threads(),
        descriptors=process.num_fds(),
        children=len(process.children(recursive=True)),
        connections=len(process.net_connections()),
        median_latency=round(statistics.median(latencies), 4),
        p95_latency=round(latencies[int(len(latencies) * 0.95)], 4),
    )


def drive(url: str, tally: Tally, stop: threading.Event, limit: int, seed: int, recording: bytes) -> None:
    """Run one worker: make requests one after another until there are enough."""
    with httpx.Client(base_url=url, timeout=120) as client:
        load = Load(client, random.Random(seed), recording)  # noqa: S311 - variety, not secrecy
        while not stop.is_set() and tally.requests < limit:
            started = time.monotonic()
            kind, fault = load.one()
            tally.add(kind, time.monotonic() - started, fault)


def soak(options: argparse.Namespace, folder: Path) -> tuple[list[Sample], Tally]:
    """Run the whole test. The first sample shows the fresh server, the last one the server after all clients have disconnected."""
    tally, stop, samples = Tally(), threading.Event(), []
    with running_server(folder) as (process, url):
        recording = httpx.post(f"{url}/v1/audio/speech", json={"model": "m", "voice": "heart", "input": SENTENCES[1], "response_format": "wav"}, timeout=60).content  # fmt: skip
        started = time.monotonic()
        samples.append(take_sample(process, tally, started))
        workers = [
            threading.Thread(target=drive, args=(url, tally, stop, options.requests, options.seed + n, recording))
            for n in range(options.workers)
        ]
        for worker in workers:
            worker.start()
        try:
            while any(worker.is_alive() for worker in workers) and time.monotonic() - started < options.seconds:
                time.sleep(1)
                samples.append(take_sample(process, tally, started))
        finally:
            stop.set()
            for worker in workers:
                worker.join()
        samples.append(_settled(process, tally, started))
    return samples, tally


def _settled(process: psutil.Process, tally: Tally, started: float) -> Sample:
    """Return a sample as soon as nothing is in progress, at the latest after ten seconds."""
    for _ in range(100):
        last = take_sample(process, tally, started)
        if last.children == 0 and last.connections <= 1:
            break
        time.sleep(0.1)
    return last


def growth(samples: list[Sample]) -> float | None:
    """Return the relative memory growth after the first thousand requests, first tenth to last tenth; None if the run is too short."""
    settled = [sample.rss_mb for sample in samples if sample.requests >= SETTLED_AFTER]
    if len(settled) < 20:
        return None
    size = len(settled) // 10
    return statistics.median(settled[-size:]) / statistics.median(settled[:size]) - 1


def faults(samples: list[Sample], tally: Tally) -> list[str]:
    """Return all faults of the run."""
    first, last = samples[0], samples[-1]
    found = [f"{len(tally.unexpected)} requests ended unexpectedly, the first: {tally.unexpected[0]}"] if tally.unexpected else []
    if last.children:
        found.append(f"{last.children} child processes are left")
    # Worker threads (server.py) start with the first requests and stay; serving the page's files adds one or two.
    if last.threads > first.threads + 5:
        found.append(f"{last.threads} threads, {first.threads} at the start")
    if last.descriptors > first.descriptors + 5:
        found.append(f"{last.descriptors} descriptors are open, {first.descriptors} at the start")
    grown = growth(samples)
    if grown is not None and grown > MOST_GROWTH:
        found.append(f"memory grew by {grown:.1%}")
    return found


def draw(samples: list[Sample], file: Path) -> None:
    """Draw the run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(4, 1, figsize=(9, 10), sharex=True, layout="constrained")
    minutes = [sample.seconds / 60 for sample in samples]
    panels = [
        ("memory, MB", ["rss_mb"]),
        ("latency, s", ["median_latency", "p95_latency"]),
        ("count", ["threads", "descriptors", "children"]),
        ("requests", ["requests", "unexpected"]),
    ]
    for axis, (label, names) in zip(axes, panels, strict=True):
        for name in names:
            axis.plot(minutes, [getattr(sample, name) for sample in samples], label=name.replace("_", " "), linewidth=1)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.legend(loc="lower right", fontsize=8)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("minutes")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write(samples: list[Sample], file: Path) -> None:
    """Write the samples as CSV."""
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, [column.name for column in fields(Sample)])
        writer.writeheader()
        writer.writerows(asdict(sample) for sample in samples)


def main() -> int:
    """Run the test, write its files, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="maximum number of requests (10000)")
    parser.add_argument("--seconds", type=float, default=3600, help="maximum duration (3600)")
    parser.add_argument("--workers", type=int, default=4, help="concurrent clients (4)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the random requests (1)")
    parser.add_argument("--out", type=Path, default=PROJECT / "test-results", help="folder for soak.csv and soak.png (test-results)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        samples, tally = soak(options, Path(folder))
    write(samples, options.out / "soak.csv")
    draw(samples, options.out / "soak.png")
    grown, found, last = growth(samples), faults(samples, tally), samples[-1]
    change = "the run was too short to tell" if grown is None else f"{grown:+.1%}"
    print(f"{last.requests} requests in {last.seconds:.0f} s: {json.dumps(tally.kinds)}")
    print(
        f"memory {samples[0].rss_mb:.0f} MB at the start, {last.rss_mb:.0f} MB at the end; after the first {SETTLED_AFTER} requests: {change}"
    )
    print(
        f"left over: {last.children} children, {last.threads} threads ({samples[0].threads}), {last.descriptors} descriptors ({samples[0].descriptors})"
    )
    for fault in found:
        print(f"FAULT: {fault}")
    print("FAILED" if found else "passed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
