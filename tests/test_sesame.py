"""The script `sesame`: called from other folders and through links, with and without an environment, in front of each program."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from client_programs import document_blocks
from conftest import PROJECT, RunningServer, clean_environment, free_port
from saying import wait_until
from test_makefile import OLD_BASH

import config

# Installs an environment: a Python that has this one's packages.
_UV = """#!/bin/sh
echo "$*" >> uv-calls
[ -e offline ] && { echo "no network" >&2; exit 2; }
mkdir -p .venv/bin
printf '#!/bin/sh\\nexec "%s" "$@"\\n' "$REAL_PYTHON" > .venv/bin/python
chmod +x .venv/bin/python
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project without an environment, in a folder with an unusual name."""
    folder = tmp_path / "Burke's project & co"
    folder.mkdir()
    for file in [*PROJECT.glob("*.py"), PROJECT / "sesame", PROJECT / "Makefile", PROJECT / "pyproject.toml"]:
        shutil.copy2(file, folder)
    for name in ("presets", "__pycache__"):  # with the compiled modules, or every test would compile them all
        if (PROJECT / name).exists():
            shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("*.pyc.*"))  # those that are being written
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "uv").write_text(_UV)
    (tmp_path / "tools" / "uv").chmod(0o755)
    return folder


def environment(project: Path, **settings: object) -> dict[str, str]:
    own = clean_environment(project.parent / "cache", **({"PORT": free_port()} | settings))
    kept = {name: value for name, value in own.items() if name != "MAKEFLAGS"}
    return kept | {"PATH": f"{project.parent / 'tools'}:{os.environ['PATH']}", "REAL_PYTHON": sys.executable}


def call(project: Path, *arguments: object, script: Path | None = None, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the script from another folder, with the shell of macOS if it is installed."""
    command = [OLD_BASH, str(script or project / "sesame"), *map(str, arguments)]
    return subprocess.run(command, cwd=project.parent, env=environment(project), input=stdin, capture_output=True, timeout=120, check=False)


def test_it_speaks_from_any_folder_through_links_and_installs_once(project: Path, server: RunningServer) -> None:
    folder = project.parent
    (folder / "bin").mkdir()
    (folder / "absolute").symlink_to(project / "sesame")
    (folder / "bin" / "sesame").symlink_to("../absolute")
    spoken = call(project, "Hello.", "-o", "speech.wav", "--server", server.url, script=folder / "bin" / "sesame")
    assert spoken.returncode == 0, spoken.stderr
    assert (folder / "speech.wav").stat().st_size > 10_000, "the file is in the caller's folder"
    piped = call(project, "-o", "-", "--format", "wav", "--server", server.url, stdin=b"Hello.")
    assert (piped.returncode, piped.stdout[:4], piped.stderr) == (0, b"RIFF", b"")
    assert (project / "uv-calls").read_text() == "sync --quiet --inexact\n"


def test_its_commands(project: Path, server: RunningServer) -> None:
    assert call(project, "--version").stdout.decode() == f"sesame {config.VERSION}\n"
    assert b"heart" in call(project, "voices", "--server", server.url).stdout
    assert b"usage: sesame [-h]" in call(project, "say", "--help").stdout
    assert b"sesame serve " in call(project, "--help").stdout
    said = call(project, "say", "voices", "-o", "voices.wav", "--server", server.url)
    assert (said.returncode, (project.parent / "voices.wav").exists()) == (0, True)
    refused = call(project, "Hello.", "-o", "speech.doc")
    assert (refused.returncode, refused.stderr[:8]) == (2, b"sesame: ")
    refused = call(project, "serve", "--port", 1)
    assert (refused.returncode, b"serve takes no options" in refused.stderr) == (2, True)


def test_serve_runs_the_server_in_its_own_process(project: Path) -> None:
    port = free_port()
    process = subprocess.Popen([project / "sesame", "serve"], cwd="/", env=environment(project, PORT=port, PLAYGROUND=False))

    def answers() -> bool:
        assert process.poll() is None
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(answers, "the server answers")
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    assert status == 0


def test_mcp_installs_its_own_packages_and_ends_with_its_input(project: Path) -> None:
    (block,) = document_blocks("docs/CLIENTS.md")["Assistants (MCP)"]
    documented = json.loads(block)["mcpServers"]["sesame"]
    assert documented["command"].endswith("/sesame")
    ended = call(project, *documented["args"])
    assert (ended.returncode, ended.stdout) == (0, b""), ended.stderr
    assert (project / "uv-calls").read_text() == "sync --quiet --inexact --group mcp\n"


def test_acceptance_installs_the_tests_tools_and_passes_its_options_on(project: Path) -> None:
    (project / "benchmarks").symlink_to(PROJECT / "benchmarks")
    helped = call(project, "acceptance", "--help")
    assert (helped.returncode, b"--no-kill" in helped.stdout) == (0, True), helped.stderr
    assert (project / "uv-calls").read_text() == "sync --quiet --inexact --group dev\n"


def test_an_environment_that_cannot_be_installed_is_explained(project: Path) -> None:
    (project / "offline").touch()
    failed = call(project, "Hello.")
    assert (failed.returncode, failed.stdout) == (1, b"")
    assert b"no network" in failed.stderr
    assert f"sesame: the Python environment in {project} could not be installed" in failed.stderr.decode()


def test_without_make_it_says_how_to_install_it(project: Path) -> None:
    tools = project.parent / "tools"
    for name in ("dirname", "bash"):
        (tools / name).symlink_to(Path("/usr/bin") / name)
    command = [OLD_BASH, str(project / "sesame"), "Hello."]
    failed = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True, timeout=60, check=False)
    assert (failed.returncode, failed.stderr.startswith("sesame: make is not installed. On a Mac run: xcode-select")) == (1, True)


def test_a_call_without_a_text_on_a_terminal_shows_the_usage(project: Path) -> None:
    control, terminal = os.openpty()
    ended = subprocess.run(
        [project / "sesame"], env=environment(project), stdin=terminal, capture_output=True, text=True, timeout=60, check=False
    )
    os.close(control)
    os.close(terminal)
    assert (ended.returncode, ended.stderr.startswith("Usage: sesame")) == (2, True)
