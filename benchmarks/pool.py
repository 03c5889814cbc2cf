"""Measure what a second machine gains: texts per second through HAProxy with one server and with two, all on this machine.

    .venv/bin/python benchmarks/pool.py [--requests 24] [--clients 4] [--sentences 4]

Two servers on one machine share its cores, so the figure for two servers is a lower bound for two machines.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_PROJECT), str(_PROJECT / "tests")]

from haproxy_pool import NAMES, Pool  # noqa: E402 - the same pool as the tests

SENTENCE = "One machine of the pool says this sentence, and another one says the next. "
_SMALL_REQUESTS = 300


def speak(url: str, sentences: int) -> float:
    """Return the seconds until one complete mp3 has arrived."""
    import httpx

    started = time.perf_counter()
    body = {"model": "tts-1", "voice": "heart", "input": SENTENCE * sentences, "seed": 1}
    httpx.post(f"{url}/v1/audio/speech", json=body, timeout=300).raise_for_status()
    return time.perf_counter() - started


def measure(name: str, url: str, arguments: argparse.Namespace) -> None:
    """Print one row: texts per second, and how long a client waits for its text."""
    speak(url, arguments.sentences)  # warm-up
    started = time.perf_counter()
    with ThreadPoolExecutor(arguments.clients) as executor:
        seconds = sorted(executor.map(lambda _: speak(url, arguments.sentences), range(arguments.requests)))
    rate = arguments.requests / (time.perf_counter() - started)
    print(f"| {name:28} | {rate:16.2f} | {statistics.median(seconds):10.2f} | {seconds[-1]:11.2f} |", flush=True)


def hop(url: str) -> float:
    """Return the median milliseconds of one small request on a persistent connection."""
    import httpx

    seconds = []
    with httpx.Client(base_url=url) as client:
        for _ in range(_SMALL_REQUESTS):
            started = time.perf_counter()
            client.get("/health/ready").raise_for_status()
            seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def main() -> None:
    """Measure one server directly, one behind HAProxy, and two behind HAProxy, in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--sentences", type=int, default=4)
    arguments = parser.parse_args()
    print(
        f"{arguments.requests} texts of {arguments.sentences} sentences, {arguments.clients} clients, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n"
    )
    print(f"| {'':28} | texts per second | median (s) | longest (s) |\n|{'-' * 30}|{'-' * 17}:|{'-' * 11}:|{'-' * 12}:|")
    with tempfile.TemporaryDirectory() as folder:
        # One thread per server, as far as its libraries can be limited: two machines do not share cores either.
        pool = Pool(Path(folder), DEFAULT_VOICE="heart", OMP_NUM_THREADS=1, OPENBLAS_NUM_THREADS=1)
        try:
            pool.start()
            measure("one server, directly", pool.servers["one"].url, arguments)
            pool.tell("set server speech/two state maint")
            measure("one server behind HAProxy", pool.url, arguments)
            pool.tell("set maxconn server speech/one 2")
            measure("the same with maxconn 2", pool.url, arguments)
            pool.tell("set maxconn server speech/one 1")
            pool.tell("set server speech/two state ready")
            for name in NAMES:
                pool.wait_until_up(name)
            measure("two servers behind HAProxy", pool.url, arguments)
            print(
                f"\na small request: {hop(pool.servers['one'].url):.1f} ms directly, {hop(pool.url):.1f} ms through HAProxy (medians of {_SMALL_REQUESTS})"
            )
        finally:
            pool.stop()


if __name__ == "__main__":
    main()
