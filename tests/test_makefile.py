"""The Makefile: set-up, repair of a broken environment, and the Python of a Mac; with GNU make 3.81 and bash 3.2 too, if they are installed."""

from __future__ import annotations

import os
import pty
import re
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
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
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
    assert "Installing" in repaired.stderr
    assert "Installing" not in again.stderr, "an environment that works is left alone"


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


NEWER_BASH = {
    "bash 4's associative arrays, name references and upper or lower case variables": r"\b(?:declare|local|typeset)\s+-[a-zA-Z]*[Anlugc]",
    "bash 4's mapfile, readarray and coproc": r"\b(?:mapfile|readarray|coproc)\b",
    "bash 4's case conversion": r"\$\{\w+(?:\[[^]]*\])?(?:\^|,)",
    "bash 4.4's and 5's transformations": r"\$\{\w+(?:\[[^]]*\])?@[A-Za-z]\}",
    "bash 4's redirections": r"&>>|\|&|\{\w+\}[<>]",
    "bash 4's fall-through": r";;?&",
    "bash 4.2's test of a variable and negative indexes": r"\[\[?\s+-v\s|\$\{\w+\[-\d|\$\{\w+(?:\[[^]]*\])?:\d+:\s*-",
    "bash 4.2's time format": r"printf\s+['\"]?%\(",
    "bash 4's recursive patterns and 5's variables": r"\bglobstar\b|\$\{?(?:EPOCHSECONDS|EPOCHREALTIME|SRANDOM|BASHPID)\b",
    "bash 4's fractions of a second and text for read": r"\bread\b[^\n|;]*\s-(?:i|N|t\s*\d*\.\d)",
    "bash 4.3's and 5.1's wait": r"\bwait\s+-[np]",
}
NEWER_MAKE = {
    "make 3.82's .ONESHELL": r"^\.ONESHELL",
    "make 4's functions": r"\$[({](?:file|guile|let|intcmp)\b",
    "make 4's assignments": r"[:]{2,3}=|!=",
    "make 3.82's undefine and private": r"^(?:override\s+)?(?:undefine|private)\b",
    "make 4.3's grouped targets": r"&:",
    "make 4's options": r"--output-sync|-O(?:target|line|recurse)?\b|--shuffle",
    "make 4.2's exit status of the shell function": r"\.SHELLSTATUS|\.EXTRA_PREREQS|\.NOTINTERMEDIATE|\.WAIT\b",
}


def newer(text: str, constructs: dict[str, str]) -> list[str]:
    """Return the lines with a construct that the old version lacks. Comments do not count."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [f"{what}: {line}" for line in lines for what, pattern in constructs.items() if re.search(pattern, line)]


def test_the_scripts_use_nothing_newer_than_bash_3_2_and_make_3_81() -> None:
    assert newer((PROJECT / "install.sh").read_text() + (PROJECT / "sesame").read_text(), NEWER_BASH) == []
    recipes = [line for line in MAKEFILE.splitlines() if line.startswith("\t")]
    assert newer("\n".join(recipes), NEWER_BASH) == []
    assert newer("\n".join(line for line in MAKEFILE.splitlines() if not line.startswith("\t")), NEWER_MAKE) == []


@pytest.mark.parametrize("line", [
    "declare -A ages", "local -n name=$1", "mapfile -t lines", "echo ${name^^}", "echo ${name,}", "echo ${name@Q}", "run &>> log",
    "run |& tee log", "exec {file}< name", "case a in a) echo ;;& esac", "[ -v name ]", "echo ${list[-1]}", "printf '%(%F)T'", "read -t 0.5 line", "wait -n",
])  # fmt: skip
def test_a_newer_construct_of_bash_is_found(line: str) -> None:
    assert newer(line, NEWER_BASH) != []
    if Path(OLD_BASH).name == "bash-3.2":
        script = f"list=(a b); name=a; run() {{ :; }}; {line}"
        ended = subprocess.run([OLD_BASH, "-c", script], input="", capture_output=True, text=True, check=False)
        assert ended.stderr != ""


@pytest.mark.parametrize("line", [".ONESHELL:", "$(file >list,$(FILES))", "A ::= b", "A != ls", "undefine A", "a b &: c"])
def test_a_newer_construct_of_make_is_found(line: str) -> None:
    assert newer(line, NEWER_MAKE) != []
