"""A disk that is really full, or read-only: a small file system of the server's own, in which nobody else sees anything."""

from __future__ import annotations

import io
import subprocess
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import RunningServer, clean_environment, fork_server, free_port
from saying import wait_until

SENTENCE = "This is said whether there is room on the disk or not. "
BODY: dict[str, Any] = {"model": "m", "voice": "heart", "input": SENTENCE}
MEGABYTES = 8


def namespaces() -> bool:
    """Whether a process may have mounts of its own here: Linux, where the system lets it."""
    try:
        return subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not namespaces(), reason="no process may have mounts of its own here")


def start(folder: Path, *mounts: str) -> RunningServer:
    """A server whose CACHE_DIR and temporary folder are `folder`/disk, on which `mounts` are done first, seen by it alone."""
    port, log, disk = free_port(), folder / "stderr.log", folder / "disk"
    disk.mkdir()
    script = " && ".join(
        [f"mount -t tmpfs -o size={MEGABYTES}m tmpfs '{disk}'", f"mkdir -p '{disk}/temporary' '{disk}/cache'", *mounts, "echo", "cat"]
    )
    environment = clean_environment(disk / "cache", PORT=port, TMPDIR=disk / "temporary")
    with subprocess.Popen(["unshare", "-rm", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as mounted:
        assert mounted.stdin
        assert mounted.stdout
        assert mounted.stdout.readline() == b"\n", "all is mounted"
        process = fork_server(environment, log, mounts_of=mounted.pid)
        namespaces = [Path(f"/proc/{pid}/ns/mnt") for pid in (mounted.pid, process.pid)]
        wait_until(lambda: namespaces[0].readlink() == namespaces[1].readlink(), "the server has the mounts")
        mounted.stdin.close()
    return RunningServer(process, port, Path(f"/proc/{process.pid}/root{disk}/cache"), log)


@pytest.fixture
def ended(tmp_path: Path) -> Iterator[list[RunningServer]]:
    servers: list[RunningServer] = []
    yield servers
    for server in servers:
        server.stop()


def speak(server: RunningServer, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/audio/speech", json=BODY | fields, timeout=60)


def add_voice(server: RunningServer, name: str) -> httpx.Response:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, 24_000, 0, "NONE", "not compressed"))
        writer.writeframes((8000 * np.sin(np.arange(2 * 24_000) / 20)).astype("<i2").tobytes())
    form = {"name": name, "consent": "true", "ref_text": "A sound."}
    files = {"audio_sample": ("a.wav", file.getvalue())}
    return httpx.post(f"{server.url}/v1/audio/voices", data=form, files=files, timeout=60)


def refused(response: httpx.Response, code: str) -> None:
    assert (response.status_code, response.json()["error"]["code"]) == (500, code)
    assert "/" not in response.json()["error"]["message"]


def fill(file: Path) -> None:
    """Take all the room that is left."""
    with file.open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(4096))


def test_a_full_disk_spoils_what_needs_room_and_nothing_after(tmp_path: Path, ended: list[RunningServer]) -> None:
    server = start(tmp_path)
    ended.append(server)
    server.wait_for(lambda health: health["status"] == "ok")
    assert speak(server).status_code == 200
    log, filler = server.cache_dir / "server.log", server.cache_dir.parent / "filler"
    before = log.read_text()
    fill(filler)
    refused(speak(server, response_format="flac"), "conversion_failed")
    refused(add_voice(server, "Nobody"), "conversion_failed")  # a recording is a temporary file before it is a voice
    for fields in ({"stream": True}, {"response_format": "pcm"}, {"response_format": "wav"}, {"stream_format": "sse"}):
        assert speak(server, **fields).status_code == 200
    for _ in range(40):  # more lines than fit into what is left of the log's last block
        assert httpx.get(f"{server.url}/v1/models").status_code == 200
    kept = log.read_text()
    assert kept.startswith(before), "nothing that was written is lost"
    assert kept.count("path='/v1/models'") < 40
    assert server.log_text().count("the log file cannot be written") == 1
    assert "Traceback" not in server.log_text()
    filler.unlink()
    assert add_voice(server, "Somebody").status_code == 200
    answer = speak(server, response_format="flac")
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] in log.read_text().splitlines()[-1], "the log goes on, on a line of its own"
    assert list((server.cache_dir.parent / "temporary").iterdir()) == []
    assert len(list((server.cache_dir / "voices").glob("voice_*"))) == 1
    assert list((server.cache_dir / "voices").glob(".unfinished*")) == []


@pytest.mark.parametrize(
    ("mount", "told"),
    [
        ("! cat /dev/zero >'{disk}/filler' 2>/dev/null", "No space left on device"),
        ("mount -o remount,ro '{disk}'", "Read-only file system"),
    ],
    ids=["full", "read-only"],
)
def test_a_server_starts_and_speaks_where_nothing_can_be_written(tmp_path: Path, ended: list[RunningServer], mount: str, told: str) -> None:
    server = start(tmp_path, mount.format(disk=tmp_path / "disk"))
    ended.append(server)
    server.wait_for(lambda health: health["status"] == "ok")
    assert speak(server, stream=True).status_code == 200
    assert speak(server).status_code == 200, "a temporary folder elsewhere will do"
    refused(add_voice(server, "Nobody"), "storage_failed")
    assert f"no PID file: CACHE_DIR cannot be written ({told})" in server.log_text()
    assert not list(server.cache_dir.glob("server.pid*"))
    assert "Traceback" not in server.log_text()
    assert server.stop() == 0
