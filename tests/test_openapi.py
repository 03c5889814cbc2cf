"""Check the server against its OpenAPI document: schemathesis generates valid and invalid requests, single and in sequences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import PROJECT, RunningServer

# Half a minute is enough to find regressions; SCHEMATHESIS_SECONDS=1800 makes tens of thousands of cases.
SECONDS = int(os.environ.get("SCHEMATHESIS_SECONDS", "30"))
KEY = "an-openapi-key"


@pytest.mark.timeout(SECONDS + 240)
def test_every_answer_is_as_documented(make_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    server = make_server(API_KEY=KEY, FALLBACK_VOICE="heart")  # without it, CSM's voices would correctly answer 503
    command = [sys.executable, "-m", "schemathesis.cli", "--no-color", "--config-file", str(PROJECT / "tests" / "schemathesis.toml")]
    command += ["run", f"{server.url}/openapi.json", "--header", f"Authorization: Bearer {KEY}", "--checks", "all"]
    command += ["--max-time", str(SECONDS), "--continue-on-failure", "--suppress-health-check", "all"]
    command += ["--report", "json", "--report-json-path", str(tmp_path / "report.json")]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "openapi_cases", "PYTHONPATH": str(PROJECT / "tests")}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS + 200, check=False)
    report = json.loads((tmp_path / "report.json").read_text())
    assert ended.returncode == 0, ended.stdout.partition("= FAILURES =")[2][:20_000] + ended.stderr[-2_000:]
    assert report["errors"] == []
    assert {phase: told["status"] for phase, told in report["phases"].items()} == dict.fromkeys(
        ("examples", "coverage", "fuzzing", "stateful"), "success"
    )
    assert report["operations"]["tested"] == report["operations"]["total"] == 13
    assert report["test_cases"]["generated"] > 300
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
