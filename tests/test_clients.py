"""OpenAI's libraries, curl and Open WebUI's requests, with the configuration from docs/CLIENTS.md and the README."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import runpy
import shlex
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from client_programs import (
    CLIENTS,
    assert_says,
    busy,
    client_node,
    client_package,
    client_python,
    document_blocks,
    documented,
    last_json,
    run_program,
)
from conftest import PROJECT, RunningServer

SENTENCE = "Good morning! The coffee is ready, and the sun is shining."
DOCUMENTED_SENTENCE = "Hello! This is my own voice server."
FORMATS = ("mp3", "opus", "aac", "flac", "wav", "pcm")
SEED: Any = {"seed": 1}  # where many requests have the same text: the same sound is transcribed once


def client_of(server: RunningServer, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", **options)


@pytest.mark.parametrize("name", FORMATS)
def test_openai_for_python_speaks_every_format(server: RunningServer, name: Any) -> None:
    with client_of(server) as client:
        speech = client.audio.speech.create(model="gpt-4o-mini-tts", voice="coral", input=SENTENCE, response_format=name, extra_body=SEED)
    assert_says(speech.content, name, SENTENCE)


def test_openai_for_python_streams_into_a_file(server: RunningServer, tmp_path: Path) -> None:
    with (
        client_of(server) as client,
        client.audio.speech.with_streaming_response.create(model="m", voice={"id": "heart"}, input=SENTENCE, speed=1.1) as response,
    ):
        response.stream_to_file(tmp_path / "speech.mp3")
    assert_says((tmp_path / "speech.mp3").read_bytes(), "mp3", SENTENCE)


def test_openai_for_python_speaks_asynchronously(server: RunningServer) -> None:
    async def speak() -> list[bytes]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            create = client.audio.speech.create
            answers = await asyncio.gather(
                *(
                    create(model="m", voice="nova", input=text, response_format="wav", extra_body=SEED)
                    for text in (SENTENCE, DOCUMENTED_SENTENCE)
                )
            )
            pcm: Any = {"response_format": "pcm", "stream_format": "sse", "extra_body": SEED}
            async with client.audio.speech.with_streaming_response.create(model="m", voice="alloy", input=SENTENCE, **pcm) as response:
                events = [json.loads(line.removeprefix("data: ")) async for line in response.iter_lines() if line]
        assert events[-1]["type"] == "speech.audio.done"
        return [*(answer.content for answer in answers), b"".join(base64.b64decode(event["audio"]) for event in events[:-1])]

    first, second, streamed = asyncio.run(speak())
    assert_says(first, "wav", SENTENCE)
    assert_says(second, "wav", DOCUMENTED_SENTENCE)
    assert_says(streamed, "pcm", SENTENCE)


def test_openai_for_python_raises_the_right_errors(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(API_KEY="secret-1")
    with client_of(server) as stranger, pytest.raises(openai.AuthenticationError) as refused:
        stranger.models.list()
    assert refused.value.code == "invalid_api_key"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret-1", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.audio.speech.create(model="m", voice="alloy", input=SENTENCE, speed=9)
        assert (bad.value.code, bad.value.param) == ("invalid_speed", "speed")
        assert bad.value.request_id
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4")
        with pytest.raises(openai.InternalServerError) as unready:
            client.audio.speech.create(model="m", voice="conversational", input=SENTENCE)
        assert unready.value.code == "model_not_ready"
        assert "heart" in unready.value.message


def test_openai_for_node_does_the_same(server: RunningServer, tmp_path: Path) -> None:
    program = CLIENTS / "openai_essentials.mjs"
    variables: Any = {"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "any"}
    results = last_json(run_program([client_node(), program, SENTENCE, tmp_path], tmp_path, **variables).stdout)
    for name in FORMATS:
        assert_says((tmp_path / f"speech.{name}").read_bytes(), name, SENTENCE)
    assert_says((tmp_path / "by-id.mp3").read_bytes(), "mp3", SENTENCE)
    assert_says((tmp_path / "streamed.pcm").read_bytes(), "pcm", SENTENCE)
    assert results["deltas"] > 0
    assert results["usage"]["total_tokens"] > 0
    assert results["models"] == ["csm-1b", "hibari"]
    refusals = {name: (results[name]["class"], results[name]["code"]) for name in ("invalidVoice", "notReady", "unknownModel")}
    assert refusals == {
        "invalidVoice": ("BadRequestError", "invalid_voice"),
        "notReady": ("InternalServerError", "model_not_ready"),
        "unknownModel": ("NotFoundError", "model_not_found"),
    }
    assert results["invalidVoice"]["requestID"]


def speak_twice_with_python(server: RunningServer, folder: Path) -> None:
    async def speak() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            create = client.audio.speech.create
            answers = await asyncio.gather(
                *(create(model="m", voice="coral", input=DOCUMENTED_SENTENCE, extra_body=SEED) for _ in range(2))
            )
        for count, answer in enumerate(answers):
            answer.write_to_file(folder / f"{count}.mp3")

    asyncio.run(speak())


def speak_twice_with_node(server: RunningServer, folder: Path) -> None:
    variables: Any = {"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "any"}
    run_program([client_node(), CLIENTS / "openai_patience.mjs", DOCUMENTED_SENTENCE, folder], folder, **variables)


@pytest.mark.parametrize(
    ("status", "ahead", "settings"),
    [
        (429, 2, {"MAX_QUEUE": 1}),
        # The request in front lets others go first after half a second of work, so they have to give up sooner.
        (503, 1, {"QUEUE_TIMEOUT": 0.02}),
    ],
    ids=["queue-full", "queue-timeout"],
)
@pytest.mark.parametrize("speak_twice", [speak_twice_with_python, speak_twice_with_node])
def test_openais_libraries_retry_when_the_server_is_busy(
    make_server: Callable[..., RunningServer],
    tmp_path: Path,
    speak_twice: Callable[[RunningServer, Path], None],
    status: int,
    ahead: int,
    settings: dict[str, float],
) -> None:
    server = make_server(**settings)
    with ThreadPoolExecutor(1) as pool:
        with busy(server, ahead):
            spoken = pool.submit(speak_twice, server, tmp_path)
            server.wait_for(lambda _: f"status={status}" in server.log_text())
        spoken.result(timeout=120)
    for count in range(2):
        assert_says((tmp_path / f"{count}.mp3").read_bytes(), "mp3", DOCUMENTED_SENTENCE)


def test_the_documented_python_runs(server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which has imported the library already: that takes a second."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(documented("OpenAI's library for Python", server))
    runpy.run_path("program.py", run_name="__main__")
    assert_says((tmp_path / "hello.mp3").read_bytes(), "mp3", DOCUMENTED_SENTENCE)


def test_the_documented_node_runs(server: RunningServer, tmp_path: Path) -> None:
    node = client_node()
    (tmp_path / "node_modules").symlink_to(CLIENTS / "node_modules")
    (tmp_path / "program.mjs").write_text(documented("OpenAI's library for Node", server))
    run_program([node, "program.mjs"], tmp_path)
    assert_says((tmp_path / "hello.mp3").read_bytes(), "mp3", DOCUMENTED_SENTENCE)


def generated_blocks(server: RunningServer) -> list[str]:
    return [
        block.replace("localhost:8880", f"localhost:{server.port}") for block in document_blocks("docs/CLIENTS.md")["Generated clients"]
    ]


def test_a_client_generated_for_python_speaks(server: RunningServer, tmp_path: Path) -> None:
    settings, command, program, *_ = generated_blocks(server)
    python = client_python(".venv")
    generator, *arguments = shlex.split(command)
    (tmp_path / "client.yml").write_text(settings)
    tools = f"{python.parent}:{os.environ['PATH']}"  # it formats what it writes with ruff
    run_program([python.parent / generator, *arguments], tmp_path, PATH=tools)
    run_program([python, "-c", program], tmp_path)
    assert_says((tmp_path / "hello.mp3").read_bytes(), "mp3", DOCUMENTED_SENTENCE)


def test_a_client_generated_for_typescript_speaks_and_its_types_fit(server: RunningServer, tmp_path: Path) -> None:
    *_, command, program = generated_blocks(server)
    node, generator = client_node(), client_package("openapi-typescript") / "bin" / "cli.js"
    compiler = client_package("typescript") / "bin" / "tsc"
    client_package("openapi-fetch")
    (tmp_path / "node_modules").symlink_to(CLIENTS / "node_modules")
    (tmp_path / "speak.mts").write_text(program)
    run_program([node, generator, *shlex.split(command)[2:]], tmp_path)
    options = ("--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", "--target", "esnext", "--allowImportingTsExtensions")
    without_browser = ("--lib", "esnext")  # the types of the DOM, which Node does not have, are a fifth of the compiler's work
    run_program([node, compiler, *options, *without_browser, "speak.mts"], tmp_path)
    run_program([node, "speak.mts"], tmp_path)
    assert_says((tmp_path / "hello.mp3").read_bytes(), "mp3", DOCUMENTED_SENTENCE)


def test_the_documented_curl_runs(server: RunningServer, tmp_path: Path) -> None:
    subprocess.run(["bash", "-ec", documented("curl", server)], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    assert_says((tmp_path / "hello.mp3").read_bytes(), "mp3", DOCUMENTED_SENTENCE)


def test_the_readmes_curl_runs(server: RunningServer, tmp_path: Path) -> None:
    (block,) = (block for block in document_blocks("README.md")["Hear it"] if block.startswith("curl"))
    assert "localhost:8880" in block
    command = block.replace("localhost:8880", f"localhost:{server.port}")
    subprocess.run(["bash", "-ec", command], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    assert_says((tmp_path / "hello.mp3").read_bytes(), "mp3", DOCUMENTED_SENTENCE)


@pytest.mark.parametrize("host", ["localhost", "host.docker.internal"])
def test_open_webuis_requests(server: RunningServer, host: str) -> None:
    """Send the requests of Open WebUI 0.12.4's audio router, with its documented settings."""
    settings = dict(line.split("=", 1) for line in documented("Open WebUI", server).splitlines())
    assert settings["AUDIO_TTS_ENGINE"] == "openai"
    base = settings["AUDIO_TTS_OPENAI_API_BASE_URL"]
    headers = {"Host": f"{host}:{server.port}"}
    models = httpx.get(f"{base}/audio/models", headers=headers).json()
    assert settings["AUDIO_TTS_MODEL"] in [model["id"] for model in models["models"]]
    voices = httpx.get(f"{base}/audio/voices", headers=headers).json()
    assert {voice["id"]: voice["name"] for voice in voices["voices"]}["heart"] == "heart"
    body = {"input": SENTENCE, "voice": settings["AUDIO_TTS_VOICE"], "model": settings["AUDIO_TTS_MODEL"]}
    headers["Authorization"] = f"Bearer {settings['AUDIO_TTS_OPENAI_API_KEY']}"
    answer = httpx.post(f"{base}/audio/speech", json=body, headers=headers, timeout=120)
    assert answer.headers["content-type"] == "audio/mpeg"  # it stores the answer as an .mp3 file
    assert_says(answer.content, "mp3", SENTENCE)
    refused = httpx.post(f"{base}/audio/speech", json=body | {"voice": "nobody"}, headers=headers)
    assert "nobody" in refused.json()["error"]["message"]  # shown to the user


def test_every_block_of_the_document_is_run_by_a_test() -> None:
    names = ("test_clients*.py", "test_sesame.py")
    tests = "".join(path.read_text() for name in names for path in Path(__file__).parent.glob(name))
    headings = document_blocks("docs/CLIENTS.md")
    assert len(headings) == 17
    for heading, blocks in headings.items():
        assert len(blocks) == (5 if heading == "Generated clients" else 1), heading
        assert f'"{heading}"' in tests, heading


def test_the_document_names_the_versions_that_are_installed() -> None:
    text = (PROJECT / "docs" / "CLIENTS.md").read_text()
    packages = json.loads((CLIENTS / "package.json").read_text())
    assert f"| OpenClaw | {packages['dependencies']['openclaw']} |" in text
    assert f"| `openai` for Node | {packages['dependencies']['openai']} |" in text
    assert set(packages["optionalDependencies"].values()) == {"26.10.0"}
    assert "Node 26.10.0" in text
    assert f"| `openai` for Python | {openai.__version__} |" in text
    for file in ("requirements.txt", "requirements-wyoming.txt"):
        for line in (CLIENTS / file).read_text().splitlines():
            if not line.startswith("#"):
                name, version = line.split("==")
                assert f"| `{name}`" in text
                assert f"| {version} |" in text
