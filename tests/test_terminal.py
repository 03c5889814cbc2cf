"""The server on a pseudo-terminal: banner, requests, a download's live line. Its log file stays as it is without a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import as_mac
import httpx
import pytest
import tiny_csm
from conftest import PROJECT, START_SECONDS, clean_environment, free_port
from forking import ForkedProcess, server_forker
from saying import wait_until
from small_hub import SmallHub, write_presets

from monitoring import DownloadSpeed, on_terminal

SECRET = "The walrus hid seven pearls."


@dataclass
class Screen:
    """A server on a terminal, and what it has shown there."""

    process: subprocess.Popen[bytes] | ForkedProcess
    url: str
    log: Path
    shown: str = ""

    def wait_for(self, pattern: str) -> re.Match[str]:
        wait_until(lambda: self.process.poll() is not None or re.search(pattern, self.shown), pattern)
        found = re.search(pattern, self.shown)
        assert found, self.shown
        return found

    def speak(self, **fields: str) -> httpx.Response:
        asked = {"model": "x", "input": SECRET, "voice": "alloy"} | fields
        return httpx.post(f"{self.url}/v1/audio/speech", json=asked, timeout=START_SECONDS)


@contextmanager
def on_screen(folder: Path, columns: int = 100, *, forked: bool = True, **settings: object) -> Iterator[Screen]:
    """Run a server on a terminal in a time zone of its own; Ctrl-C is typed at the end. Unless `forked`, the real program starts."""
    port, home = free_port(), folder / "home"
    cache = home / ".cache" / "sesame"
    own = clean_environment(cache, PORT=port, HOME=home, TERM="xterm", TZ="XXX-05:30", **settings)
    control, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    process: subprocess.Popen[bytes] | ForkedProcess
    if forked:
        process = server_forker(own).start(["server.py"], own, PROJECT, (terminal, terminal, terminal))
    else:
        command = [*as_mac.python(), str(PROJECT / "server.py")]
        process = subprocess.Popen(command, cwd=PROJECT, env=own, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    screen = Screen(process, f"http://127.0.0.1:{port}", cache / "server.log")

    def read() -> None:
        with suppress(OSError):  # Linux reports EIO once nobody has the terminal open
            while data := os.read(control, 4096):
                screen.shown += data.decode(errors="replace")

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    try:
        yield screen
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        reading.join(10)
    finally:
        process.kill()
        process.wait(10)
        os.close(control)


def plain(shown: str) -> list[str]:
    """Return what stays on the screen, line by line: without colours, and without what was rewritten."""
    text = re.sub("\033\\[[0-9]+m", "", shown).replace("\r\n", "\n")
    return [line.rpartition("\r\033[K")[2] for line in text.split("\n")]


def test_the_banner_and_one_line_for_each_request(tmp_path: Path) -> None:
    with on_screen(tmp_path, 200, forked=False) as screen:
        screen.wait_for("Stop .*Ctrl-C")
        banner = plain(screen.shown)
        screen.speak()
        screen.speak(voice="bob")
        for path in ("/health", "/playground/index.html", "/", "/no%1b%5b31m"):
            httpx.get(f"{screen.url}{path}")
        screen.wait_for("GET /no.*")
    lines = [line for line in plain(screen.shown) if re.match(r"\d\d:\d\d:\d\d  ", line)]
    assert banner[1:9] == [
        "  Sesame TTS 1.0.0 is ready",
        "",
        f"  Open     http://localhost:{screen.url.rpartition(':')[2]}/",
        f"  Clients  http://localhost:{screen.url.rpartition(':')[2]}/v1, any API key",
        "  Voice    heart",
        "  CSM-1B   off: CSM=off.",
        "  Log      ~/.cache/sesame/server.log",
        "  Stop     Ctrl-C",
    ]
    assert [re.sub(r"\d+\.\d+ s", "N s", line[10:]) for line in lines] == [
        "200  POST /v1/audio/speech  heart, mp3, N s of speech in N s",
        "400  POST /v1/audio/speech  invalid_voice: Voice 'bob' not found. Available voices: " + lines[1].rpartition("voices: ")[2],
        "200  GET /  N s",
        r"404  GET /no\x1b[31m  not_found: Path '/no\x1b[31m' not found. /docs lists all paths.",
        "stopping: requests in progress are completed, new ones are refused",
    ]
    east = time.gmtime(screen.log.stat().st_mtime + 5.5 * 3600)
    assert abs(int(lines[0][3:5]) - east.tm_min) % 59 <= 1, "local time, half an hour beside UTC"
    assert "\033[32m200\033[0m" in screen.shown
    assert "\033[33m400\033[0m" in screen.shown
    log = screen.log.read_text()
    assert re.search(
        r"^\S+Z INFO sesame_tts.request id=\w+ method=POST path='/v1/audio/speech' status=400 code=invalid_voice seconds=", log, re.M
    )
    for word in SECRET.strip(".").split()[1:]:
        assert word not in screen.shown + log
    for absent in ("uvicorn", "/playground/", "/health"):
        assert absent not in screen.shown


def test_long_lines_are_broken_between_words_and_indented(tmp_path: Path) -> None:
    with on_screen(tmp_path, 64, CSM="on", HF_HUB_OFFLINE=0, HF_ENDPOINT="http://127.0.0.1:9", DEFAULT_VOICE="heart") as screen:
        screen.wait_for("Stop .*Ctrl-C")
        screen.wait_for("voices emma, fenrir,")
        screen.speak(voice="bob")
        screen.wait_for("kore\\.")
    lines = plain(screen.shown)
    assert max(map(len, lines)) < 64
    refused = next(index for index, line in enumerate(lines) if "  400  POST" in line)
    whole = " ".join(line.strip() for line in lines[refused : refused + 4])
    assert "invalid_voice: Voice 'bob' not found. Available voices: conversational, conversational_b, emma," in whole
    assert lines[refused + 1].startswith(" " * 10)
    assert screen.shown.count("\033[33m400\033[0m  POST") == 1
    text = " ".join(" ".join(lines).split())
    assert text.count("fenrir, fable, kore: the hub cannot be reached (ConnectError): check") == 1, "one warning for all voices"


def test_a_download_is_a_live_line_and_csms_voice_is_announced(tmp_path: Path) -> None:
    """Without colours; a line that is longer than the terminal is cut, because a line that wraps cannot be rewritten."""
    cache = tiny_csm.build(script={"": [tiny_csm.ends_after(3)]}, small_codec=True)
    repositories = {repo: tiny_csm.snapshot_of(cache, repo) for repo in (tiny_csm.SESAME, tiny_csm.MIMI, tiny_csm.TOKENIZER)}
    own: dict[str, Any] = {"CSM": "on", "GUARD": "off", "DEFAULT_VOICE": "conversational", "MODEL_DTYPE": "float32", "NO_COLOR": 1}
    with SmallHub(repositories, bytes_a_second=6_000_000) as hub:
        own |= tiny_csm.environment(cache) | {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": 0,
            "HF_HUB_CACHE": tmp_path / "hub",
            "HF_HOME": tmp_path / "hf",
            "PRESETS_DIR": write_presets(tmp_path, "conversational", frames=4),
        }
        with on_screen(tmp_path, 70, **own) as screen:
            screen.wait_for("Stop .*Ctrl-C")
            assert "Voice    heart, until conversational is ready" in screen.shown
            assert "CSM-1B   loading; the last line shows how far it is" in screen.shown
            screen.wait_for(r"csm-1b: \d+% of \d+ MB, \d+\.\d MB/s, \d+ s left, downloading ")
            screen.wait_for("Voice conversational is ready: it speaks for OpenAI's names from now on.")
    assert set(re.findall("\033\\[[0-9]*[A-Za-z]", screen.shown)) == {"\033[K"}
    live = [part for line in screen.shown.split("\n") for part in line.split("\r\033[K") if part.startswith("csm-1b")]
    assert max(map(len, live)) == 69
    assert not [line for line in plain(screen.shown) if line.startswith("csm-1b")], "nothing of it stays"


def test_a_speed_and_the_time_left_come_with_the_second_sample() -> None:
    speed = DownloadSpeed()
    progress = {"stage": "downloading model.safetensors", "done": 100_000_000, "total": 3_100_000_000}
    assert speed.describe(progress, 10.0) == "3% of 3100 MB"
    assert speed.describe(progress | {"done": 400_000_000}, 20.0) == "12% of 3100 MB, 30.0 MB/s, 2 min left"
    assert speed.describe(progress | {"done": 400_000_000}, 60.0) == "12% of 3100 MB", "samples older than 30 s do not count"
    assert speed.describe({"stage": "reading weights", "done": None, "total": None}, 61.0) == ""


@pytest.mark.parametrize("kind", ["dumb", ""])
def test_a_terminal_that_cannot_rewrite_a_line_gets_the_plain_log(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    control, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        monkeypatch.setenv("TERM", "xterm")
        assert on_terminal()
        monkeypatch.setenv("TERM", kind)
        assert not on_terminal()
    os.close(control)
