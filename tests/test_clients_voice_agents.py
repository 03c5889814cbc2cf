"""Home Assistant's Wyoming bridge, LiveKit Agents and Pipecat, with streamed samples from a running server."""

from __future__ import annotations

import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from client_programs import CLIENTS, assert_says, client_python, documented, last_json, run_program
from conftest import RunningServer, free_port

SENTENCE = "Good morning! The coffee is ready, and the sun is shining."


def speak(server: RunningServer, program: str, heading: str, folder: Path) -> dict[str, Any]:
    """Run one of our client programs with the `tts` from the document; it writes speech.pcm."""
    (folder / "users.py").write_text(documented(heading, server))
    ended = run_program([client_python(".venv"), CLIENTS / program, "users.py", SENTENCE, "speech.pcm"], folder)
    assert_says((folder / "speech.pcm").read_bytes(), "pcm", SENTENCE)
    return last_json(ended.stdout)


def test_livekit_agents_speaks(server: RunningServer, tmp_path: Path) -> None:
    results = speak(server, "livekit_speech.py", "LiveKit Agents", tmp_path)
    assert (results["rate"], results["channels"]) == (24_000, 1)
    assert results["frames"] > 1


def test_pipecat_speaks(server: RunningServer, tmp_path: Path) -> None:
    results = speak(server, "pipecat_speech.py", "Pipecat", tmp_path)
    assert (results["rates"], results["channels"], results["errors"]) == ([24_000], [1], [])
    assert results["frames"] > 1


@pytest.mark.parametrize(
    ("program", "heading"),
    [
        ("livekit_stream.py", "LiveKit Agents, while the reply is being written"),
        ("pipecat_stream.py", "Pipecat, while the reply is being written"),
    ],
)
def test_the_first_audio_comes_while_the_text_is_written(server: RunningServer, tmp_path: Path, program: str, heading: str) -> None:
    (tmp_path / "users.py").write_text(documented(heading, server))
    text = f"{SENTENCE} We could have breakfast outside. The bread is from the bakery at the corner, and the jam is from last summer."
    ended = run_program([client_python(".venv"), CLIENTS / program, "users.py", text, "speech.pcm", "8"], tmp_path)
    assert_says((tmp_path / "speech.pcm").read_bytes(), "pcm", text)
    results = last_json(ended.stdout)
    assert 0 < results["share_at_first_audio"] < 1 / 3
    assert results.get("errors", []) == []


@contextmanager
def bridge(server: RunningServer, folder: Path) -> Iterator[str]:
    """Start the bridge as documented for Home Assistant, but on another port and loopback only; return its URI."""
    port = free_port()
    block = documented("Home Assistant", server).replace("0.0.0.0:10300", f"127.0.0.1:{port}")
    _, *arguments = shlex.split(block.replace("\\\n", " "))
    with (folder / "bridge.log").open("wb") as log:
        running = subprocess.Popen(
            [client_python(".venv-wyoming"), *arguments], cwd=folder, env={"HOME": str(folder)}, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            assert running.poll() is None, (folder / "bridge.log").read_text()
            assert time.monotonic() < deadline, (folder / "bridge.log").read_text()
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"tcp://127.0.0.1:{port}"
    finally:
        running.terminate()
        running.wait(30)


def test_home_assistants_bridge_speaks(server: RunningServer, tmp_path: Path) -> None:
    with bridge(server, tmp_path) as uri:
        command: list[str | Path] = [client_python(".venv-wyoming"), CLIENTS / "wyoming_speech.py", uri, SENTENCE, "alloy"]
        results = last_json(run_program([*command, "speech.pcm"], tmp_path).stdout)
    assert results["voices"] == ["alloy"]
    assert (results["rate"], results["width"], results["channels"]) == (24_000, 2, 1)
    assert results["chunks"] > 1
    assert_says((tmp_path / "speech.pcm").read_bytes(), "pcm", SENTENCE)
    assert "format=pcm speed=1 streamed=yes" in server.log_text().splitlines()[-1]
