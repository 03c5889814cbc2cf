"""OpenClaw, headless, with a running server: its requests, its output, the errors it shows, and its timeouts."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen
from typing import Any

import as_mac
import httpx
import pytest
import tiny_csm
from client_programs import CLIENTS, LONG, assert_says, busy, client_node, document_blocks, documented, program_environment, run_program
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


def convert(folder: Path, text: str, *options: str, ok: bool = True, **variables: str) -> CompletedProcess[str]:
    return openclaw(folder, "infer", "tts", "convert", "--text", text, "--output", "speech", "--json", *options, ok=ok, **variables)


def written(ended: CompletedProcess[str]) -> tuple[bytes, str]:
    """Return the content of the file that OpenClaw wrote, and the format that it reports."""
    (output,) = json.loads(ended.stdout)["outputs"]
    return Path(output["path"]).read_bytes(), output["format"]


def configured(provider: dict[str, Any], **tts: Any) -> dict[str, Any]:
    return {"tts": {"provider": "openai", "providers": {"openai": provider}} | tts}


class OpenClaw:
    """OpenClaw's functions in one process (`clients/openclaw_functions.mjs`)."""

    def __init__(self, process: Popen[str]) -> None:
        self._process = process

    def run(self, function: str, cfg: dict[str, Any], **arguments: Any) -> dict[str, Any]:
        """Run a function with a configuration and return its result."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(arguments | {"function": function, "cfg": cfg}) + "\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline()))


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenClaw]:
    """OpenClaw without its command line, for all tests of the file: only the first call has to wait until it has started."""
    folder = tmp_path_factory.mktemp("openclaw")
    command = [client_node(), CLIENTS / "openclaw_functions.mjs"]
    environment = program_environment(folder, **state_variables(folder))
    with Popen(command, cwd=folder, env=environment, stdin=PIPE, stdout=PIPE, text=True) as process:
        yield OpenClaw(process)
        process.terminate()


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
    make_server: Callable[..., RunningServer], functions: OpenClaw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Mac, in the minutes after the installation. It requests OpenAI's model and voice; `opus` is set by the user."""
    monkeypatch.setattr("config.system_and_processor", as_mac.system_and_processor)
    with SmallHub(write_small_repositories(tmp_path / "repositories"), silent_after=1_000_000) as hub:
        network = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": 0, "HF_HUB_CACHE": tmp_path / "hub", "HF_HOME": tmp_path / "hf"}
        server = make_server(CSM="auto", wait=False, **network)
        server.wait_for(lambda health: health["fallback"] is not None and "progress" in health["models"]["csm-1b"])
        provider = {"apiKey": "local", "baseUrl": server.url, "responseFormat": "opus"}
        result = functions.run("speech", configured(provider), text=SENTENCE)
        assert result["outputFormat"] == "opus"
        data = Path(result["audioPath"]).read_bytes()
        assert data.startswith(b"OggS")
        assert_says(data, "opus", SENTENCE)
        assert "fallback_for=conversational" in server.log_text()
        assert server.health()["models"]["csm-1b"]["state"] == "loading"


def test_its_extra_body_carries_the_conversation_and_the_deadline(functions: OpenClaw, tmp_path: Path) -> None:
    cache = tiny_csm.build(script={"": [tiny_csm.ends_after(5)]}, small_codec=True)
    with csm_server(tmp_path, cache, {"tiny": 100}, MAX_RETRIES=0) as server:
        for body in ({"conversation": "kitchen"}, {"deadline_ms": 1, "on_deadline": "fallback"}):
            provider = {"apiKey": "local", "baseUrl": server.url, "speakerVoice": "tiny", "extraBody": body}
            result = functions.run("speech", configured(provider), text="hello there.")
            assert (result["success"], result["provider"]) == (True, "openai")
        (turn,) = httpx.get(f"{server.url}/v1/audio/conversations/kitchen/turns").json()["turns"]
        assert turn["role"] == "assistant"
        assert "fallback_for=tiny" in server.log_text()


def test_it_speaks_in_telephone_calls_voice_notes_and_talk(server: RunningServer, functions: OpenClaw, tmp_path: Path) -> None:
    config = json.loads(documented("OpenClaw", server)) | json.loads(documented("OpenClaw Talk", server))
    assert functions.run("validation", config)["ok"] is True
    assert functions.run("validation", config | {"talk": {"voice": "alloy"}})["ok"] is False
    files = {"call": "pcm", "voiceNote": "opus", "talk": "mp3"}
    results = {name: functions.run(name, config, text=SENTENCE, file=str(tmp_path / name)) for name in files}
    assert (results["call"]["outputFormat"], results["call"]["sampleRate"]) == ("pcm", 24_000)
    assert (results["voiceNote"]["outputFormat"], results["voiceNote"]["voiceCompatible"]) == ("opus", True)
    assert results["talk"]["outputFormat"] == "mp3"
    for name, fmt in files.items():
        assert_says((tmp_path / name).read_bytes(), fmt, SENTENCE)


def test_it_shows_the_servers_error_to_the_user(server: RunningServer, tmp_path: Path) -> None:
    """Without a configuration file, which it would record in a database: that takes a second of processor time."""
    variables = {"OPENAI_TTS_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "local"}
    ended = convert(tmp_path, SENTENCE, "--voice", "nobody", ok=False, **variables)
    assert ended.returncode != 0
    shown = ended.stdout + ended.stderr
    assert "invalid_voice" in shown
    assert "heart" in shown  # the list of voices
    logged = [line for line in log_lines(server) if "status=400" in line][-1]
    assert re.findall(r" id=(\w{32}) ", logged)[0] in shown


def test_it_tries_no_other_provider_where_that_is_switched_off(functions: OpenClaw) -> None:
    config = documented("OpenClaw without other providers").replace("localhost:8880", "127.0.0.1:9")
    result = functions.run("speech", json.loads(config), text=SENTENCE)
    assert result["success"] is False
    assert "openai: fetch failed; microsoft: not configured" in result["error"]


@pytest.mark.parametrize("ahead", [0, 3])
def test_a_timeout_in_openclaw_cancels_the_request(make_server: Callable[..., RunningServer], functions: OpenClaw, ahead: int) -> None:
    """The request is either being spoken (0 ahead) or waits in the queue."""
    server = make_server()
    text = LONG[:3990]
    config = configured({"apiKey": "local", "baseUrl": f"{server.url}/v1"}, timeoutMs=500)
    with busy(server, ahead):
        result = functions.run("speech", config, text=text)
        assert result["success"] is False
        assert "request timed out" in result["error"]
        server.wait_for(lambda _: any("cancelled" in line and f"characters={len(text.strip())}" in line for line in log_lines(server)))
    server.wait_for(lambda health: health["queue"]["active"] == health["queue"]["waiting"] == 0)
    with server.client() as client:
        assert client.post("/v1/audio/speech", json={"model": "m", "input": "Hi.", "voice": "heart"}).status_code == 200


def log_lines(server: RunningServer) -> list[str]:
    return server.log_text().splitlines()


def test_its_doctor_converts_older_configurations_to_the_documented_one(functions: OpenClaw, tmp_path: Path) -> None:
    """The older form with the command, the other one with the function that it calls: the command takes eight seconds of processor time."""
    current = json.loads(documented("OpenClaw"))["tts"]
    converted = functions.run("migration", json.loads(documented("OpenClaw 2026.3.28 to 2026.7")))["sourceConfig"]
    assert converted["tts"] == current
    (tmp_path / "openclaw.json").write_text(documented("OpenClaw 2026.3.7 to 2026.3.22"))
    asked = ("doctor", "--fix", "--non-interactive", "--no-workspace-suggestions")
    openclaw(tmp_path, *asked, OPENCLAW_DISABLE_BUNDLED_PLUGINS="1")  # it reads them all, which takes half of its time
    assert json.loads((tmp_path / "openclaw.json").read_text())["tts"] == current
