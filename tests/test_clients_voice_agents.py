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

from client_programs import CLIENTS, assert_says, client_python, documented, last_json, run_program
from conftest import RunningServer, free_port

SENTENCE = "Good morning! The coffee is ready, and the sun is shining."
REPLY = f"{SENTENCE} We could have breakfast outside. The bread is from the bakery at the corner, and the jam is from last summer."
IN_ONE_PROCESS = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def speak(server: RunningServer, library: str, headings: tuple[str, str], folder: Path) -> dict[str, Any]:
    """Run our two client programs of a library in one process, which imports it once, each with the `tts` from the document.

    The first one speaks a complete text, the second one a text that is still being written. Return what the first one prints.
    """
    for name, heading in zip(("complete", "written"), headings, strict=True):
        (folder / f"{name}.py").write_text(documented(heading, server))
    programs = [
        [str(CLIENTS / f"{library}_speech.py"), "complete.py", SENTENCE, "complete.pcm"],
        [str(CLIENTS / f"{library}_stream.py"), "written.py", REPLY, "written.pcm", "8"],
    ]
    ended = run_program([client_python(".venv"), "-c", IN_ONE_PROCESS, json.dumps(programs)], folder)
    for name, text in (("complete", SENTENCE), ("written", REPLY)):
        assert_says((folder / f"{name}.pcm").read_bytes(), "pcm", text)
    complete, written = (json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{"))
    assert 0 < written["share_at_first_audio"] < 1 / 3
    assert written.get("errors", []) == []
    return dict(complete)


def test_livekit_agents_speaks_and_the_first_audio_comes_while_the_text_is_written(server: RunningServer, tmp_path: Path) -> None:
    results = speak(server, "livekit", ("LiveKit Agents", "LiveKit Agents, while the reply is being written"), tmp_path)
    assert (results["rate"], results["channels"]) == (24_000, 1)
    assert results["frames"] > 1


def test_pipecat_speaks_and_the_first_audio_comes_while_the_text_is_written(server: RunningServer, tmp_path: Path) -> None:
    results = speak(server, "pipecat", ("Pipecat", "Pipecat, while the reply is being written"), tmp_path)
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
