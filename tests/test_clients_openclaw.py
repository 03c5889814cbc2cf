"""OpenClaw, headless, with a running server: its requests, its output, the errors it shows, and its timeouts."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import as_mac
import httpx
import pytest
import tiny_csm
from client_programs import CLIENTS, LONG, RUN_SECONDS, assert_says, busy, client_node, document_blocks, documented, last_json, run_program
from conftest import RunningServer, csm_server
from small_hub import SmallHub, write_small_repositories

SENTENCE = "Good morning! The coffee is ready, and the sun is shining."
OPENCLAW = CLIENTS / "node_modules" / "openclaw" / "openclaw.mjs"


def state_variables(folder: Path) -> dict[str, Any]:
    """Return the variables that keep all of OpenClaw's files in `folder`. Its state is new: with an earlier one it takes twice as long."""
    return {
        "OPENCLAW_STATE_DIR": tempfile.mkdtemp(prefix="state-", dir=folder),
        "OPENCLAW_CONFIG_PATH": str(folder / "openclaw.json"),
        "OPENCLAW_NO_AUTO_UPDATE": "1",
    }


def openclaw(folder: Path, *arguments: str, ok: bool = True, **variables: str) -> CompletedProcess[str]:
    """Run OpenClaw with all of its files in `folder`."""
    return run_program([client_node(), OPENCLAW, *arguments], folder, ok=ok, **(state_variables(folder) | variables))


def convert(folder: Path, text: str, *, ok: bool = True, **variables: str) -> CompletedProcess[str]:
    return openclaw(folder, "infer", "tts", "convert", "--text", text, "--output", "speech", "--json", ok=ok, **variables)


def written(ended: CompletedProcess[str]) -> tuple[bytes, str]:
    """Return the content of the file that OpenClaw wrote, and the format that it reports."""
    (output,) = json.loads(ended.stdout)["outputs"]
    return Path(output["path"]).read_bytes(), output["format"]


def configure(folder: Path, provider: dict[str, Any], **tts: Any) -> None:
    config = {"tts": {"provider": "openai", "providers": {"openai": provider}} | tts}
    (folder / "openclaw.json").write_text(json.dumps(config))


def test_it_speaks_as_documented(server: RunningServer, tmp_path: Path) -> None:
    config = documented("OpenClaw", server)
    (readme,) = (block for block in document_blocks("README.md")["Connect a client"] if "timeoutMs" in block)
    assert json.loads(readme) == json.loads(documented("OpenClaw"))
    (tmp_path / "openclaw.json").write_text(config)
    data, fmt = written(convert(tmp_path, SENTENCE))
    assert fmt == "mp3"
    assert_says(data, "mp3", SENTENCE)


def test_it_speaks_by_environment_variables_alone(server: RunningServer, tmp_path: Path) -> None:
    lines = documented("OpenClaw, by environment variables alone", server).splitlines()
    variables: Any = dict(line.removeprefix("export ").split("=", 1) for line in lines)
    data, _ = written(convert(tmp_path, SENTENCE, **variables))
    assert_says(data, "mp3", SENTENCE)


def test_it_speaks_with_base_url_and_key_only_and_without_v1_while_csm_is_downloaded(
    make_server: Callable[..., RunningServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Mac, in the minutes after the installation. It requests OpenAI's model and voice; `opus` is set by the user."""
    monkeypatch.setattr("config.system_and_processor", as_mac.system_and_processor)
    with SmallHub(write_small_repositories(tmp_path / "repositories"), silent_after=1_000_000) as hub:
        network = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": 0, "HF_HUB_CACHE": tmp_path / "hub", "HF_HOME": tmp_path / "hf"}
        server = make_server(CSM="auto", wait=False, **network)
        server.wait_for(lambda health: health["fallback"] is not None and "progress" in health["models"]["csm-1b"])
        configure(tmp_path, {"apiKey": "local", "baseUrl": server.url, "responseFormat": "opus"})
        data, fmt = written(convert(tmp_path, SENTENCE))
        assert fmt == "opus"
        assert data.startswith(b"OggS")
        assert_says(data, "opus", SENTENCE)
        assert "fallback_for=conversational" in server.log_text()
        assert server.health()["models"]["csm-1b"]["state"] == "loading"


def test_its_extra_body_carries_the_conversation_and_the_deadline(tmp_path: Path) -> None:
    cache = tiny_csm.build(script={"": [tiny_csm.ends_after(5)]}, small_codec=True)
    with csm_server(tmp_path, cache, {"tiny": 100}, MAX_RETRIES=0) as server:
        configs: list[Path] = []
        for body in ({"conversation": "kitchen"}, {"deadline_ms": 1, "on_deadline": "fallback"}):
            configure(tmp_path, {"apiKey": "local", "baseUrl": server.url, "speakerVoice": "tiny", "extraBody": body})
            configs.append((tmp_path / "openclaw.json").rename(tmp_path / f"{len(configs)}.json"))
        program: list[str | Path] = [client_node(), CLIENTS / "openclaw_speech.mjs", "hello there.", *configs]
        results = [json.loads(line) for line in run_program(program, tmp_path, **state_variables(tmp_path)).stdout.splitlines()]
        assert [(result["success"], result["provider"]) for result in results] == [(True, "openai")] * 2
        (turn,) = httpx.get(f"{server.url}/v1/audio/conversations/kitchen/turns").json()["turns"]
        assert turn["role"] == "assistant"
        assert "fallback_for=tiny" in server.log_text()


def test_it_speaks_in_telephone_calls_voice_notes_and_talk(server: RunningServer, tmp_path: Path) -> None:
    config = json.loads(documented("OpenClaw", server)) | json.loads(documented("OpenClaw Talk", server))
    file = tmp_path / "openclaw.json"
    file.write_text(json.dumps(config))
    assert "Config valid" in openclaw(tmp_path, "config", "validate").stdout
    program: list[str | Path] = [client_node(), CLIENTS / "openclaw_channels.mjs", file, SENTENCE, tmp_path]
    results = last_json(run_program(program, tmp_path, **state_variables(tmp_path)).stdout)
    assert (results["telephony.pcm"]["outputFormat"], results["telephony.pcm"]["sampleRate"]) == ("pcm", 24_000)
    assert (results["voice-note.opus"]["outputFormat"], results["voice-note.opus"]["voiceCompatible"]) == ("opus", True)
    assert results["talk.mp3"]["outputFormat"] == "mp3"
    for name in results:
        assert_says((tmp_path / name).read_bytes(), name.rsplit(".", 1)[1], SENTENCE)


def test_it_shows_the_servers_error_to_the_user(server: RunningServer, tmp_path: Path) -> None:
    configure(tmp_path, {"apiKey": "local", "baseUrl": f"{server.url}/v1", "speakerVoice": "nobody"})
    ended = convert(tmp_path, SENTENCE, ok=False)
    assert ended.returncode != 0
    shown = ended.stdout + ended.stderr
    assert "invalid_voice" in shown
    assert "heart" in shown  # the list of voices
    logged = [line for line in log_lines(server) if "status=400" in line][-1]
    assert re.findall(r" id=(\w{32}) ", logged)[0] in shown


def test_it_tries_no_other_provider_where_that_is_switched_off(tmp_path: Path) -> None:
    (tmp_path / "openclaw.json").write_text(documented("OpenClaw without other providers").replace("localhost:8880", "127.0.0.1:9"))
    ended = convert(tmp_path, SENTENCE, ok=False)
    assert ended.returncode != 0
    assert "openai: fetch failed; microsoft: not configured" in ended.stdout


@contextmanager
def asleep_until_called(server: RunningServer) -> Iterator[int]:
    """Stop the server's process until a client connects to the port that this returns, so that it does not work while the client starts."""
    with socket.create_server(("127.0.0.1", 0)) as door, ThreadPoolExecutor(3) as pool:
        door.settimeout(RUN_SECONDS)

        def answer() -> None:
            connection, _ = door.accept()
            os.kill(server.process.pid, signal.SIGCONT)
            upstream = socket.create_connection(("127.0.0.1", server.port))
            pool.submit(pump, connection, upstream)
            pool.submit(pump, upstream, connection)

        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            pool.submit(answer)
            yield int(door.getsockname()[1])
        finally:
            os.kill(server.process.pid, signal.SIGCONT)


def pump(source: socket.socket, target: socket.socket) -> None:
    """Pass on what arrives until one side closes, then close both."""
    with source, target, suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
        for each in (source, target):
            each.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("ahead", [0, 3])
def test_a_timeout_in_openclaw_cancels_the_request(make_server: Callable[..., RunningServer], tmp_path: Path, ahead: int) -> None:
    """The request is either being spoken (0 ahead) or waits in the queue."""
    server = make_server()
    text = LONG[:3990]
    with busy(server, ahead):
        with asleep_until_called(server) as port:
            configure(tmp_path, {"apiKey": "local", "baseUrl": f"http://127.0.0.1:{port}/v1"}, timeoutMs=1000)
            ended = convert(tmp_path, text, ok=False)
        assert ended.returncode != 0
        server.wait_for(lambda _: any("cancelled" in line and f"characters={len(text.strip())}" in line for line in log_lines(server)))
    server.wait_for(lambda health: health["queue"]["active"] == health["queue"]["waiting"] == 0)
    with server.client() as client:
        assert client.post("/v1/audio/speech", json={"model": "m", "input": "Hi.", "voice": "heart"}).status_code == 200


def log_lines(server: RunningServer) -> list[str]:
    return server.log_text().splitlines()


def test_its_doctor_converts_older_configurations_to_the_documented_one(tmp_path: Path) -> None:
    client_node()
    headings = ("OpenClaw 2026.3.28 to 2026.7", "OpenClaw 2026.3.7 to 2026.3.22")

    def migrated(heading: str) -> Any:
        folder = tmp_path / heading.replace(" ", "-")
        folder.mkdir()
        (folder / "openclaw.json").write_text(documented(heading))
        asked = ("doctor", "--fix", "--non-interactive", "--no-workspace-suggestions")
        openclaw(folder, *asked, OPENCLAW_DISABLE_BUNDLED_PLUGINS="1")  # it reads them all, which takes half of its time
        return json.loads((folder / "openclaw.json").read_text())["tts"]

    with ThreadPoolExecutor(len(headings)) as pool:
        results = list(pool.map(migrated, headings))
    assert results == [json.loads(documented("OpenClaw"))["tts"]] * 2
