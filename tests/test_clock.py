"""A system clock that jumps by decades, forwards and backwards, while the server works. No timeout is affected."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import RunningServer, start_server
from saying import wait_until

# Changes the wall clock of one process, but not its monotonic clock, as setting the system clock does. Needs no privileges.
SOURCE = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static volatile long *ahead;
__attribute__((constructor)) static void start(void) {
    void *page = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, open(getenv("CLOCK_AHEAD"), O_RDONLY), 0);
    if (page != MAP_FAILED) ahead = page;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && clock == CLOCK_REALTIME && ahead) now->tv_sec += *ahead;
    return failed;
}
"""
YEAR = 31_557_600
BODY: dict[str, Any] = {"model": "m", "voice": "heart", "input": "It is never too late to say this. " * 5}

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="changing the clock of one process needs Linux and a C compiler"
)


class Clock:
    """The wall clock of one server."""

    def __init__(self, folder: Path) -> None:
        self._library, self._file = folder / "clock.so", folder / "ahead"
        subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", self._library], input=SOURCE, text=True, check=True)
        self._file.write_bytes(bytes(8))

    @property
    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self._library), "CLOCK_AHEAD": str(self._file)}

    def jump(self, years: float) -> None:
        """Set the clock to that many years from now."""
        with self._file.open("r+b") as file:
            file.write(struct.pack("l", round(years * YEAR)))


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


@pytest.fixture
def server(clock: Clock, tmp_path: Path) -> Iterator[RunningServer]:
    running = start_server(tmp_path, QUEUE_TIMEOUT=60, GENERATION_TIMEOUT=60, SHUTDOWN_TIMEOUT=60, **clock.environment)
    try:
        running.wait_for(lambda health: health["status"] == "ok")
        yield running
    finally:
        running.stop()


def speak(server: RunningServer, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/audio/speech", json=BODY | fields, timeout=60)


def wait_until_speaking(server: RunningServer) -> None:
    """Unlike the server's own `wait_for`, it asks often enough for a text of a tenth of a second."""
    with server.client() as client:
        wait_until(lambda: client.get("/health").json()["queue"]["active"] == 1, "a request is active")


def test_clock_jumps_affect_no_timeouts(clock: Clock, server: RunningServer) -> None:
    uptime, lengths, years = 0.0, set(), []
    with ThreadPoolExecutor(2) as pool:
        for jump in (10, -60, 70, 0):
            waiting = [pool.submit(speak, server, seed=1, timestamps=True, response_format=name) for name in ("wav", "flac")]
            wait_until_speaking(server)
            clock.jump(jump)
            answers = [answer.result() for answer in waiting]
            assert [answer.status_code for answer in answers] == [200, 200]
            lengths |= {answer.headers["x-audio-duration"] for answer in answers}
            assert all(0 <= float(answer.headers["x-generation-time"]) < 60 for answer in answers)
            assert httpx.get(server.url + answers[0].headers["x-timestamps"]).status_code == 200
            assert server.health()["uptime_seconds"] > uptime
            uptime = server.health()["uptime_seconds"]
            log = (server.cache_dir / "server.log").read_text().splitlines()
            years += [line[:4] for line in log if answers[-1].headers["x-request-id"] in line]
    assert len(lengths) == 1
    assert len(years) == len(set(years)) == 4, "the server saw each jump, and logged each answer"
    assert server.process.poll() is None
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(speak, server, stream=True, input=BODY["input"] * 4)
        wait_until_speaking(server)
        clock.jump(20)
        server.process.terminate()
        assert last.result().status_code == 200
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.log_text()
