"""Attack a server in all known ways at once, and measure how long its event loop stalls and how long an honest client waits.

    make bench-attacks                                   two minutes
    make bench-attacks ARGS="--seconds 600"
    make bench-attacks ARGS="--search 500"               instead: the slowest of 500 random texts of 4,096 characters

Loopback only, with a key that most attackers do not have. The attacks are those of docs/SECURITY.md except the pool's and the lack of address
space, which need a process of their own (`tests/test_pool.py`, `tests/test_faults.py`). A second process sleeps as the event loop does, so that
stalls of a busy machine can be told from those of the server. The exit status is 1 if the server stalled for more than 100 ms where the other
process did not, or if an honest request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from starlette.types import Receive, Scope, Send

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

KEY = "bench"
TICK_SECONDS = 0.005
MOST_STALL_SECONDS = 0.1
SENTENCE = "This is said in spite of it all."
SLOW_TEXTS = ["¼" * 4096, "№%" * 2048, "%W" * 500, "1/" * 2048, "- " + "。" * 4093 + "a", "🇩🇪" * 2048, "a" + "\u0301\u0316" * 2047]
SLOW_TEXTS += ["```text\n" * 512, "|a" * 680 + "\n" + "|-" * 680 + "\n" + "a\n" * 680, "7" * 36 + "'7", "*_" * 2048 + "a", "aAaB" * 1024]


async def ticks(file: Path) -> None:
    """Write how late each tick is, in seconds, with the time at which it came."""
    with file.open("w") as out:
        while True:
            before = time.monotonic()
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            if now - before > 4 * TICK_SECONDS:
                print(now, now - before - TICK_SECONDS, file=out, flush=True)


def serve(file: Path) -> None:
    """Run the server, with a task in its event loop that measures the stalls."""
    import server
    from config import load_settings
    from monitoring import configure_logging
    from server_process import listen, serve

    settings = load_settings()
    configure_logging(settings.log_level, settings.cache_dir, to_stderr=settings.log_stderr)
    app = server.create_app(settings)
    tasks = []

    async def measured(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            tasks.append(asyncio.create_task(ticks(file)))
        await app(scope, receive, send)

    serve(measured, settings, listen(settings), app.state.server.drain)


class Attacks:
    """The attackers: each method makes one attack, which takes a few seconds at most."""

    def __init__(self, port: int, folder: Path) -> None:
        self._port = port
        self._folder = folder
        self._held: list[socket.socket] = []  # unread answers
        self._url = f"http://127.0.0.1:{port}"
        self.counts: Counter[str] = Counter()
        self.over = threading.Event()

    def all(self) -> list[Callable[[random.Random], None]]:
        """Return the attacks."""
        network = [self.tiny_chunks, self.long_heads, self.pipelined, self.unfinished_body, self.unread_scripts, self.unread_answer]
        return [*network, self.slow_text, self.leaves, self.paused_events, self.forged_address, self.bad_encoder, self.bad_files]

    def run(self, attack: Callable[[random.Random], None]) -> None:
        """Repeat an attack until the end."""
        generator = random.Random(attack.__name__)  # noqa: S311 - chooses attacks
        while not self.over.is_set():
            with contextlib.suppress(OSError, httpx.HTTPError):
                attack(generator)
            self.counts[attack.__name__] += 1
            self.over.wait(0.05)

    def tiny_chunks(self, _: random.Random) -> None:
        """Send a body of one-byte chunks, without a key."""
        head = b"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self._flood(head + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n" * 10_000)

    def long_heads(self, _: random.Random) -> None:
        """Send heads of 12,000 lines, without a key."""
        self._flood(b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a:\r\n" * 12_000 + b"\r\n")

    def pipelined(self, _: random.Random) -> None:
        """Send requests without waiting for answers, without a key."""
        self._flood(b"", b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)

    def _flood(self, first: bytes, again: bytes) -> None:
        with socket.create_connection(("127.0.0.1", self._port), timeout=5) as opened:
            opened.sendall(first)
            for _ in range(30):
                opened.sendall(again[:65536])
                time.sleep(0.03)  # 2 MB/s

    def unfinished_body(self, _: random.Random) -> None:
        """Stop after 20,000 of 24,000 bytes."""
        with socket.create_connection(("127.0.0.1", self._port), timeout=5) as opened:
            opened.sendall(self._request({}, length=24_000)[:20_000])
            self.over.wait(2)

    def unread_scripts(self, _: random.Random) -> None:
        """Request the documentation's script six times and read nothing, without a key."""
        self._hold(b"GET /docs-files/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 6)

    def unread_answer(self, generator: random.Random) -> None:
        """Request speech in one of three ways and read nothing."""
        fields = generator.choice(
            [{"response_format": "wav"}, {"response_format": "pcm"}, {"stream_format": "sse", "response_format": "wav"}]
        )
        self._hold(self._request({"input": SENTENCE * 60, **fields}))

    def _hold(self, request: bytes) -> None:
        opened = socket.create_connection(("127.0.0.1", self._port), timeout=5)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        opened.sendall(request)
        self._held.append(opened)
        if len(self._held) > 40:
            self._held.pop(0).close()
        self.over.wait(1)

    def slow_text(self, generator: random.Random) -> None:
        """Request a text that once took long."""
        body = {"input": generator.choice(SLOW_TEXTS), "speed": generator.choice([0.25, 1.0]), "response_format": "wav"}
        self._post(body, timeout=20)

    def leaves(self, generator: random.Random) -> None:
        """Disconnect during such a text."""
        self._post({"input": generator.choice(SLOW_TEXTS)}, timeout=generator.uniform(0.05, 2))

    def paused_events(self, _: random.Random) -> None:
        """Read a stream of events after a pause."""
        with socket.create_connection(("127.0.0.1", self._port), timeout=60) as opened:
            opened.sendall(self._request({"input": SENTENCE * 60, "stream_format": "sse", "response_format": "wav"}))
            self.over.wait(5)
            while opened.recv(1 << 16):
                pass

    def forged_address(self, _: random.Random) -> None:
        """Claim to be another client, and ask for what only the owner may do."""
        httpx.post(f"{self._url}/admin/reload", headers={"X-Forwarded-For": "127.0.0.1"}, timeout=5)

    def bad_encoder(self, generator: random.Random) -> None:
        """Let ffmpeg drop its input, fail, or hang when it is asked for its version."""
        faults = [
            'case "$*" in *-version*) ;; *) cat >/dev/null; exit 0 ;; esac',
            "exit 1",
            'case "$*" in *-version*) sleep 20 ;; esac',
            "",
        ]
        (self._folder / "fault").write_text(generator.choice(faults))
        self._post({"input": SENTENCE, "response_format": "mp3"}, timeout=30)
        httpx.get(f"{self._url}/health", headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
        (self._folder / "fault").write_text("")
        self.over.wait(1)

    def bad_files(self, generator: random.Random) -> None:
        """Make a preset unreadable and readable again, put a pipe among the presets, damage the PID file."""
        preset = self._folder / "presets" / "heart-copy.json"
        preset.chmod(generator.choice([0o000, 0o644]))
        pipe = preset.with_name("pipe.json")
        pipe.unlink() if pipe.exists() else os.mkfifo(pipe)
        (self._folder / "cache" / "server.pid").write_text(generator.choice(["1", "-5", "[" * 5000, "9" * 5000]))
        self.over.wait(1)

    def _post(self, fields: dict[str, Any], timeout: float) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        httpx.post(f"{self._url}/v1/audio/speech", json={"model": "m", "voice": "heart"} | fields, headers=headers, timeout=timeout)

    def _request(self, fields: dict[str, Any], length: int = 0) -> bytes:
        body = json.dumps({"model": "m", "voice": "heart", "input": SENTENCE} | fields).encode()
        head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        return head.encode() + b"Content-Length: %d\r\n\r\n" % (length or len(body)) + body.ljust(length)


@contextlib.contextmanager
def attacked_server(folder: Path) -> Iterator[int]:
    """Run a server whose ffmpeg and presets can be spoiled, and the process that ticks beside it. End it with SIGHUP."""
    import listening

    (folder / "ffmpeg").write_text(f'#!/bin/sh\neval "$(cat {folder}/fault)"\nexec {listening.ffmpeg()} "$@"\n')
    (folder / "ffmpeg").chmod(0o755)
    (folder / "fault").write_text("")
    shutil.copytree(PROJECT / "presets", folder / "presets")
    copied = json.loads((folder / "presets" / "heart.json").read_text()) | {"name": "heart-copy", "aliases": []}
    (folder / "presets" / "heart-copy.json").write_text(json.dumps(copied))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = {"HOST": "127.0.0.1", "PORT": str(port), "CACHE_DIR": str(folder / "cache"), "PRESETS_DIR": str(folder / "presets")}
    settings |= {"CSM": "off", "LOG_STDERR": "false", "API_KEY": KEY, "HF_HUB_OFFLINE": "1", "CLIENT_TIMEOUT": "20"}
    settings["PATH"] = f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin"
    command = [sys.executable, str(Path(__file__))]
    process = subprocess.Popen([*command, "--serve", str(folder / "loop")], env=os.environ | settings, stdin=subprocess.DEVNULL)
    beside = subprocess.Popen([*command, "--tick", str(folder / "beside")], stdin=subprocess.DEVNULL)
    try:
        _wait_until_ready(port, process)
        yield port
    finally:
        process.send_signal(signal.SIGHUP)
        print(f"exit status after SIGHUP: {process.wait(90)}")
        beside.terminate()
        beside.wait(10)


def _wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health/ready", timeout=10).status_code == 200:
                return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit("the server did not start")


def honest(port: int, seconds: float) -> tuple[list[float], list[str]]:
    """Request a sentence every half second; return how long each took, and the faults."""
    taken: list[float] = []
    faults: list[str] = []
    headers = {"Authorization": f"Bearer {KEY}", "X-Forwarded-For": "192.0.2.9"}
    body = {"model": "m", "voice": "heart", "input": SENTENCE, "response_format": "pcm"}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        started = time.monotonic()
        try:
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/audio/speech", json=body, headers=headers, timeout=120)
            faults += [] if answer.status_code == 200 else [f"{answer.status_code}: {answer.text[:150]}"]
        except httpx.HTTPError as error:
            faults.append(repr(error))
        taken.append(time.monotonic() - started)
        time.sleep(0.5)
    return taken, faults


def late(file: Path, since: float, until: float) -> list[float]:
    """Return the ticks of a file in a span of time, in seconds late."""
    pairs = [tuple(map(float, line.split())) for line in file.read_text().splitlines()]
    return [seconds for when, seconds in pairs if since <= when <= until]


def attack(seconds: float) -> int:
    """Attack a server for a time, print what happened, and return the exit status."""
    with tempfile.TemporaryDirectory() as name, attacked_server(Path(name)) as port:
        attacks = Attacks(port, Path(name))
        threads = [threading.Thread(target=attacks.run, args=(each,), daemon=True) for each in attacks.all()]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        taken, faults = honest(port, seconds)
        ended = time.monotonic()
        attacks.over.set()
        loop, beside = late(Path(name, "loop"), started, ended), late(Path(name, "beside"), started, ended)
    print(f"attacks: {dict(attacks.counts)}")
    print(
        f"honest requests: {len(taken)}, median {statistics.median(taken):.2f} s, longest {max(taken):.2f} s, failed {len(faults)} {faults[:3]}"
    )
    for title, ticks_late in (("event loop", loop), ("process beside it", beside)):
        over = sum(each > MOST_STALL_SECONDS for each in ticks_late)
        print(f"{title}: longest stall {1000 * max(ticks_late, default=0):.0f} ms, {over} over {1000 * MOST_STALL_SECONDS:.0f} ms")
    return int(bool(faults) or max(loop, default=0) > max(MOST_STALL_SECONDS, max(beside, default=0)))


def search(count: int) -> int:
    """Print the texts of 4,096 characters that take the longest to clean up, to split, and to speak for a second of sound."""
    from test_work_limits import clean, processor_seconds, random_text, split_for_hibari, spoken

    from hibari_model import HibariModel

    model = HibariModel()
    model.load(lambda _: None)
    found: dict[str, list[tuple[float, str]]] = {"clean-up, s": [], "splitting, s": [], "voice, s for a second of sound": []}

    def speak(text: str) -> None:
        sounds.append(sum(spoken(model, text, verbalize=True)[0]))

    for number in range(count):
        text = random_text(random.Random(number))(4096)  # noqa: S311 - chooses texts
        sounds: list[float] = []
        found["clean-up, s"].append((processor_seconds(clean, text), text))
        found["splitting, s"].append((processor_seconds(split_for_hibari, text), text))
        taken = processor_seconds(speak, text[:100])
        found["voice, s for a second of sound"].append((taken / max(1.0, sounds[0]), text))
    for title, pairs in found.items():
        print(title)
        for value, text in sorted(pairs, reverse=True)[:5]:
            print(f"  {value:.3f}  {text[:60]!r}")
    return 0


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--search", type=int, metavar="TEXTS")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tick", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return 0
    if options.tick:
        asyncio.run(ticks(options.tick))
    return search(options.search) if options.search else attack(options.seconds)


if __name__ == "__main__":
    sys.exit(main())
