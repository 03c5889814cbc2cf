"""The Makefile: set-up, repair of a broken environment, and the Python of a Mac; with GNU make 3.81 and bash 3.2 too, if they are installed."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

OLD_BASH = shutil.which("bash-3.2") or "/bin/bash"
"""The bash of macOS, if a program of that name is on PATH; on a Mac, /bin/bash is one."""

MAKES = [name for name in ("make", "make-3.81") if shutil.which(name)]
MAKEFILE = (PROJECT / "Makefile").read_text()
PYPROJECT = """
[project]
name = "empty"
version = "0"
requires-python = ">=3.10"
[dependency-groups]
dev = []
[tool.uv]
package = false
"""
RECORDER = '#!/bin/sh\necho "$UV_PYTHON $UV_MANAGED_PYTHON $*" >> uv-calls\nmkdir -p .venv/bin\nln -sf "$REAL_PYTHON" .venv/bin/python\n'

every_make = pytest.mark.parametrize("make", MAKES)


def new_project(folder: Path) -> Path:
    """A project with our Makefile and no packages."""
    (folder / "Makefile").write_text(MAKEFILE)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    return folder


def recording_tools(folder: Path, system: str = "Linux") -> dict[str, str]:
    """An environment in which uv only records how it was called, and `uname` prints `system`."""
    tools = folder / "tools"
    tools.mkdir()
    for name, script in (("uv", RECORDER), ("uname", f"#!/bin/sh\necho {system}\n")):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    return kept | {"PATH": f"{tools}:{os.environ['PATH']}", "REAL_PYTHON": sys.executable}


def run_make(make: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [make, "setup", f"SHELL={OLD_BASH}"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


def uv_calls(folder: Path) -> list[str]:
    return (folder / "uv-calls").read_text().splitlines()


def test_make_help_lists_every_target() -> None:
    targets = next(line for line in MAKEFILE.splitlines() if line.startswith(".PHONY:")).split()[1:]
    listed = subprocess.run(["make", "help"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[1] for line in listed] == targets
    assert all(len(line.split()) > 2 for line in listed)


@every_make
def test_an_environment_whose_python_was_removed_is_installed_again(make: str, tmp_path: Path) -> None:
    """With a real uv, as after an upgrade of Homebrew."""
    uv = shutil.which("uv") or str(PROJECT / ".uv" / "bin" / "uv")
    folder = new_project(tmp_path)
    environment = os.environ | {"PATH": f"{Path(uv).parent}:{os.environ['PATH']}", "UV_OFFLINE": "1"}
    python = folder / ".venv" / "bin" / "python"
    assert run_make(make, folder, environment).returncode == 0
    python.unlink()
    python.symlink_to("/opt/homebrew/opt/python@3.12/bin/python3.12")
    repaired = run_make(make, folder, environment)
    assert (repaired.returncode, ".venv/bin/python does not run" in repaired.stderr) == (0, True), repaired.stderr
    assert subprocess.run([python, "-c", ""], check=False).returncode == 0
    again = run_make(make, folder, environment)
    assert "sync" not in again.stdout, "an environment that works is left alone"


@every_make
def test_on_a_mac_uv_installs_one_version_of_python(make: str, tmp_path: Path) -> None:
    folder = new_project(tmp_path)
    environment = recording_tools(folder, "Darwin")
    assert run_make(make, folder, environment).returncode == 0
    assert uv_calls(folder) == ["3.11 1 sync --quiet --inexact"]


def test_on_linux_uv_uses_the_python_that_is_there(tmp_path: Path) -> None:
    folder = new_project(tmp_path)
    assert run_make("make", folder, recording_tools(folder)).returncode == 0
    assert uv_calls(folder) == ["  sync --quiet --inexact"]


def test_ci_and_the_container_use_the_python_of_the_mac() -> None:
    (version,) = [line.split()[2] for line in MAKEFILE.splitlines() if line.startswith("MAC_PYTHON :=")]
    assert f"FROM python:{version}-slim" in (PROJECT / "deploy" / "Dockerfile").read_text()
    (lookup,) = [line for line in (PROJECT / ".ci" / "run").read_text().splitlines() if line.startswith("UV_PYTHON=")]
    shown = subprocess.run(["bash", "-c", f'{lookup}; echo "$UV_PYTHON"'], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == version


def test_the_first_set_up_shows_uvs_progress_on_a_terminal(tmp_path: Path) -> None:
    folder = new_project(tmp_path)
    master, terminal = pty.openpty()
    try:
        subprocess.run(["make", "setup"], cwd=folder, env=recording_tools(folder), stdout=terminal, stderr=terminal, check=True, timeout=60)
    finally:
        os.close(terminal)
        os.close(master)
    assert uv_calls(folder) == ["  sync --inexact"]
