"""Check the server against its OpenAPI document: schemathesis generates valid and invalid requests, single and in sequences."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from browsing import running_chromium, visit
from conftest import PROJECT, RunningServer
from listening import decode
from playwright.sync_api import expect

from audio_formats import FORMATS

# The 520 cases of the document's limits and three random ones an operation find regressions; SCHEMATHESIS_SECONDS=1800 makes tens of thousands.
SECONDS = int(os.environ.get("SCHEMATHESIS_SECONDS", "0"))
KEY = "an-openapi-key"


@pytest.mark.timeout(SECONDS + 240)
def test_every_answer_is_as_documented(make_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    server = make_server(API_KEY=KEY, FALLBACK_VOICE="heart")  # without it, CSM's voices would correctly answer 503
    command = [sys.executable, "-m", "schemathesis.cli", "--no-color", "--config-file", str(PROJECT / "tests" / "schemathesis.toml")]
    command += ["run", f"{server.url}/openapi.json", "--header", f"Authorization: Bearer {KEY}", "--checks", "all"]
    command += ["--max-time", str(SECONDS)] if SECONDS else ["--max-examples", "3"]
    command += ["--continue-on-failure", "--suppress-health-check", "all"]
    command += ["--report", "json", "--report-json-path", str(tmp_path / "report.json")]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "openapi_cases", "PYTHONPATH": str(PROJECT / "tests")}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS + 200, check=False)
    report = json.loads((tmp_path / "report.json").read_text())
    assert ended.returncode == 0, ended.stdout.partition("= FAILURES =")[2][:20_000] + ended.stderr[-2_000:]
    assert report["errors"] == []
    assert {phase: told["status"] for phase, told in report["phases"].items()} == dict.fromkeys(
        ("examples", "coverage", "fuzzing", "stateful"), "success"
    )
    assert report["operations"]["tested"] == report["operations"]["total"] == 17
    assert report["test_cases"]["generated"] > (100 if SECONDS else 500)
    log = server.log_text()
    assert "Traceback" not in log
    assert "status=500" not in log
    assert " status=200 " in "\n".join(line for line in log.splitlines() if "method=POST path='/v1/audio/voices'" in line)


def document(server: RunningServer) -> dict[str, Any]:
    return dict(httpx.get(f"{server.url}/openapi.json").json())


def test_the_document_has_exactly_the_schemas_that_it_refers_to(server: RunningServer) -> None:
    text = json.dumps(document(server))
    schemas = document(server)["components"]["schemas"]
    referred = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert referred == set(schemas)
    assert "422" not in text


def test_the_document_asks_for_a_key_only_where_one_is_set(server: RunningServer) -> None:
    for operations in document(server)["paths"].values():
        for operation in operations.values():
            assert {} in operation["security"]
            assert "401" not in operation["responses"]


def test_every_operation_has_an_id_and_a_summary(server: RunningServer) -> None:
    operations = [each for methods in document(server)["paths"].values() for each in methods.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[a-z]+[A-Za-z]+", each) for each in ids)
    assert all(operation["summary"] for operation in operations)


def test_the_examples_of_the_docs_cover_each_format_and_work(server: RunningServer) -> None:
    content = document(server)["paths"]["/v1/audio/speech"]["post"]["requestBody"]["content"]["application/json"]
    formats = set()
    for example in content["examples"].values():
        asked = example["value"]
        answer = httpx.post(f"{server.url}/v1/audio/speech", json=asked, timeout=60)
        assert answer.status_code == 200, (asked, answer.text)
        if asked.get("stream_format") == "sse":
            assert '"speech.audio.done"' in answer.text
            assert '"words"' in answer.text
        else:
            formats.add(asked.get("response_format", "mp3"))
            assert answer.headers["content-type"].split(";")[0] == FORMATS[asked.get("response_format", "mp3")].content_type
            assert len(answer.content) > 5_000
    assert formats == set(FORMATS)


def test_each_example_works_at_a_press_on_the_page_docs(server: RunningServer, tmp_path: Path) -> None:
    with running_chromium() as browser, visit(browser, f"{server.url}/docs", "docs") as seen:
        seen.page.goto(seen.url)
        operation = seen.page.locator("#operations-speech-createSpeech")
        operation.locator(".opblock-summary").click()
        examples, answer = operation.locator("select.examples-select-element"), operation.locator(".live-responses-table")
        examples.wait_for()
        seen.page.add_style_tag(content="* { transition: none !important; animation: none !important; }")  # a third of the time
        names = examples.locator("option").all_inner_texts()
        for name in names:
            examples.select_option(label=name)
            asked = json.loads(operation.locator("textarea").input_value())
            operation.locator("button", has_text="Execute").click()
            expect(answer.locator(".response-col_status").last).to_contain_text("200")
            if asked.get("stream_format") == "sse":
                expect(answer).to_contain_text("speech.audio.done")
            else:
                with seen.page.expect_download() as waiting:
                    answer.locator("a", has_text="Download file").click()
                kind = asked.get("response_format", "mp3")
                assert waiting.value.suggested_filename == f"speech.{kind}"
                waiting.value.save_as(tmp_path / "saved")
                samples, rate = decode((tmp_path / "saved").read_bytes(), kind)
                assert rate == asked.get("sample_rate", 48_000 if kind == "opus" else 24_000)
                assert len(samples) > 1.5 * rate
                assert float(np.abs(samples).max()) > 0.1
            operation.locator("button", has_text="Clear").click()
            expect(answer).to_have_count(0)
        assert len(names) == 9


def caused(server: RunningServer) -> Iterator[httpx.Response]:
    """Errors that a request can cause by itself, at the routes whose document has their sample."""
    speech, body = f"{server.url}/v1/audio/speech", {"model": "x", "input": "Hi.", "voice": "alloy"}
    yield httpx.post(speech, json=body | {"response_format": "ogg"})
    yield httpx.get(f"{server.url}/v1/audio/voices/{{voice_id}}")
    yield httpx.get(f"{server.url}/v1/audio/speech/{{answer}}/timestamps")
    yield httpx.get(f"{server.url}/v1/models/gpt-9")
    yield httpx.post(speech, content=b" " * (1 << 20) + b"{}")
    yield httpx.post(speech, json=body, headers={"Content-Encoding": "gzip"})
    yield httpx.post(speech, json=body, headers={"Host": "tts.example.com"})
    yield httpx.post(speech, json=body | {"voice": "conversational"})


def test_the_samples_of_errors_are_what_the_server_answers(server: RunningServer) -> None:
    paths = document(server)["paths"]
    for answer in caused(server):
        path = answer.request.url.path.replace("gpt-9", "{model}")
        documented = paths[path][answer.request.method.lower()]["responses"][str(answer.status_code)]
        assert documented["content"]["application/json"]["example"] == answer.json()


def test_every_error_of_the_document_has_a_sample_in_openais_form(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(API_KEY=KEY)
    for methods in document(server)["paths"].values():
        for operation in methods.values():
            for status, answer in operation["responses"].items():
                content = answer.get("content", {}).get("application/json", {})
                if content.get("schema") == {"$ref": "#/components/schemas/Error"}:
                    assert content["example"]["error"].keys() == {"message", "type", "param", "code"}, status
    missing = httpx.get(f"{server.url}/v1/audio/voices")
    documented = document(server)["paths"]["/v1/audio/voices"]["get"]["responses"]["401"]
    assert missing.json() == documented["content"]["application/json"]["example"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/audio/voices", "GET, HEAD, POST"),
        ("/audio/voices", "GET, HEAD, POST"),
        ("/v1/audio/voices/x", "DELETE, GET, HEAD"),
        ("/health", "GET, HEAD"),
    ],
)
def test_405_names_all_methods_of_the_path(server: RunningServer, path: str, allowed: str) -> None:
    response = httpx.request("PATCH", f"{server.url}{path}")
    assert (response.status_code, response.headers["allow"]) == (405, allowed)
    assert allowed in response.json()["error"]["message"]
