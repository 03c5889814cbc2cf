"""Home Assistant's Wyoming bridge, LiveKit Agents and Pipecat, with streamed samples from a running server."""

from __future__ import annotations

import json
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
REPLY = f"{SENTENCE} We could have breakfast outside. The bread is from the bakery at the corner, and the jam is from last summer."
HEADINGS = {
    "livekit": ("LiveKit Agents", "LiveKit Agents, while the reply is being written"),
    "pipecat": ("Pipecat", "Pipecat, while the reply is being written"),
}
# Garbage collections are a fifth of the processor time of so many imports.
IN_ONE_PROCESS = """
import gc, json, runpy, sys
gc.disable()
for sys.argv in json.loads(sys.argv[1]):
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run our two client programs of each library in one process, because both libraries import OpenAI's; return the folder with their output.

    The first one speaks a complete text, the second one a text that is still being written, each with the `tts` from the document.
    """
    folder = tmp_path_factory.mktemp("agents")
    programs: list[list[str]] = []
    for library, headings in HEADINGS.items():
        files = [f"{library}-complete", f"{library}-written"]
        for file, heading in zip(files, headings, strict=True):
            (folder / f"{file}.py").write_text(documented(heading, server))
        complete, written = ([f"{file}.py", text, f"{file}.pcm"] for file, text in zip(files, (SENTENCE, REPLY), strict=True))
        programs += [[str(CLIENTS / f"{library}_speech.py"), *complete], [str(CLIENTS / f"{library}_stream.py"), *written, "8"]]
    ended = run_program([client_python(".venv"), "-c", IN_ONE_PROCESS, json.dumps(programs)], folder)
    results = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    for (_, _, _, file, *_), line in zip(programs, results, strict=True):
        (folder / file).with_suffix(".json").write_text(line)
    return folder


def spoken(folder: Path, library: str) -> dict[str, Any]:
    """Check what the library's programs have spoken; return what the first one has printed."""
    for name, text in (("complete", SENTENCE), ("written", REPLY)):
        assert_says((folder / f"{library}-{name}.pcm").read_bytes(), "pcm", text)
    complete, written = (json.loads((folder / f"{library}-{name}.json").read_text()) for name in ("complete", "written"))
    assert 0 < written["share_at_first_audio"] < 1 / 3
    assert written.get("errors", []) == []
    return dict(complete)


def test_livekit_agents_speaks_and_the_first_audio_comes_while_the_text_is_written(folder: Path) -> None:
    results = spoken(folder, "livekit")
    assert (results["rate"], results["channels"]) == (24_000, 1)
    assert results["frames"] > 1


def test_pipecat_speaks_and_the_first_audio_comes_while_the_text_is_written(folder: Path) -> None:
    results = spoken(folder, "pipecat")
    assert (results["rates"], results["channels"], results["errors"]) == ([24_000], [1], [])
    assert results["frames"] > 1


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
