"""Replacements for the tools of macOS and systemd, so that install.sh can be tested for both systems on any machine.

Each call is recorded. `launchctl` and `systemctl` really run the service, with `supervisor.py`.
Usage: `python tests/system_tools.py TOOL ARGUMENTS…`; the variable STAND_IN_STATE names the folder of their state.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from supervisor import State

THROTTLE_SCALE = "0.1"  # a throttle interval of one second

# Exit statuses of launchctl
_NO_SUCH_SERVICE = 113  # print: the service is not loaded
_NOT_LOADED = 3  # bootout: the service is not loaded
_IN_PROGRESS = 36  # bootout: the service has not ended yet
_INPUT_OUTPUT_ERROR = 5  # bootstrap: the service is loaded already, or switched off
_NO_SUCH_DOMAIN = 125  # print and bootstrap: "Domain does not support specified action", as after a login by ssh alone


def _state_dir() -> Path:
    return Path(os.environ["STAND_IN_STATE"])


def _answer(name: str, default: str) -> str:
    """Return the output that a test has chosen for a tool: the content of a file in the state folder."""
    file = _state_dir() / name
    return file.read_text().strip() if file.exists() else default


def _service() -> State | None:
    """Return the state file of the running supervisor, or None if none is running."""
    try:
        state: State = json.loads((_state_dir() / "service.json").read_text())
        os.kill(state["supervisor"], 0)
    except (OSError, ValueError):
        return None
    return state


def supervisor_command(file: str, state: Path, *, forks: bool) -> list[str]:
    """Return the command that supervises the job of a service file; `forks`: the job's process is forked from the supervisor's, without an exec."""
    here = Path(__file__)
    python = [sys.executable, "-I", "-S", str(here.with_name("forked_program.py"))] if forks else [sys.executable]
    return [*python, str(here.with_name("supervisor.py")), file, str(state / "service.json"), "--throttle-scale", THROTTLE_SCALE]


def _supervise(file: str) -> None:
    import subprocess  # only here: install.sh calls these tools up to twenty times

    (_state_dir() / "service.json").unlink(missing_ok=True)
    output = (_state_dir() / "supervisor.log").open("ab")
    command = supervisor_command(file, _state_dir(), forks=_answer("server", "forked") == "forked")
    subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    while not _service():
        time.sleep(0.02)


def _signal(state: State, number: signal.Signals) -> None:
    os.kill(state["supervisor"], number)


def _launchctl(arguments: list[str]) -> int:
    state = _service()
    command = arguments[0]
    is_logged_in, is_disabled = _answer("screen", "logged in") == "logged in", _answer("login_item", "on") == "off"
    if command == "print" and "/" not in arguments[1].removeprefix("gui/"):
        return 0 if is_logged_in else _NO_SUCH_DOMAIN
    if command == "print":
        if not state:
            return _NO_SUCH_SERVICE
        print(f"{arguments[1]} = {{\n\tstate = running\n\truns = {len(state['starts'])}\n\tpid = {state['pid']}\n}}")
    elif command == "bootstrap":
        if not is_logged_in:
            return _NO_SUCH_DOMAIN
        if state or is_disabled or _answer("bootstrap", "works") == "fails":
            print("Bootstrap failed: 5: Input/output error", file=sys.stderr)
            return _INPUT_OUTPUT_ERROR
        _supervise(arguments[2])
    elif command == "print-disabled":
        print(f'\tdisabled services = {{\n\t\t"com.burkestudio.sesame-tts" => {"disabled" if is_disabled else "enabled"}\n\t}}')
    elif command == "bootout":
        if not state:
            return _NOT_LOADED
        _signal(state, signal.SIGTERM)
        return _IN_PROGRESS
    else:
        assert command == "enable"
    return 0


def _systemctl(arguments: list[str]) -> int:
    assert arguments[0] == "--user"
    if _answer("systemd", "running") != "running":
        print("Failed to connect to bus: No medium found", file=sys.stderr)
        return 1
    words = [argument for argument in arguments[1:] if not argument.startswith("--")]
    state = _service()
    unit = Path(os.environ["HOME"]) / ".config" / "systemd" / "user" / words[-1]
    if words[0] == "restart" and state:
        _signal(state, signal.SIGHUP)
    elif words[0] == "restart":
        _supervise(str(unit))
    elif words[0] == "disable" and state:
        _signal(state, signal.SIGTERM)
        while _service():
            time.sleep(0.02)
    elif words[0] in ("is-active", "status"):
        return 0 if state else 3
    return 0


PROGRAMS: dict[str, Callable[[list[str]], int]] = {"launchctl": _launchctl, "systemctl": _systemctl}

# Tools with a fixed output: the file in the state folder that overrides it, and the default.
ANSWERS = {
    "sw_vers": ("macos", "26.3"),
    "sysctl": ("rosetta", "0"),
    "xcode-select": ("xcode", "/Library/Developer/CommandLineTools"),
    "loginctl": ("linger", "no"),
    "afplay": ("player", ""),
    "journalctl": ("journal", ""),
    # The test's environment exists already, so `make setup` has nothing to do.
    "make": ("make", ""),
    "uname -s": ("system", "Darwin"),
    "uname -m": ("processor", "arm64"),
    "id -u": ("user", "501"),
    "id -un": ("name", "burke"),
}
# Records its options and runs the command, as the real one does.
_CAFFEINATE = 'echo "caffeinate $1" >> "$STAND_IN_STATE/calls"\nshift\nexec "$@"\n'


def install_tools(folder: Path) -> None:
    """Write an executable for each tool into `folder`."""
    folder.mkdir()
    scripts = {name: f'exec "{sys.executable}" -I -S "{__file__}" {name} "$@"\n' for name in PROGRAMS} | {"caffeinate": _CAFFEINATE}
    for words, (file, default) in ANSWERS.items():
        name, _, option = words.partition(" ")
        answer = f'cat "$STAND_IN_STATE/{file}" 2>/dev/null || echo "{default}"\n'
        start = scripts.setdefault(name, f'echo "{name} $*" >> "$STAND_IN_STATE/calls"\n')
        scripts[name] = start + (f'if [ "$1" = {option} ]; then {answer}fi\n' if option else answer)
    for name, text in scripts.items():
        script = folder / name
        script.write_text("#!/bin/sh\n" + text)
        script.chmod(0o755)


def calls(state: Path) -> list[str]:
    """Return all calls of the tools, in order."""
    file = state / "calls"
    return file.read_text().splitlines() if file.exists() else []


def main() -> int:
    """Run the tool that the first argument names."""
    name, arguments = sys.argv[1], sys.argv[2:]
    with (_state_dir() / "calls").open("a") as file:
        file.write(" ".join([name, *arguments]) + "\n")
    return PROGRAMS[name](arguments)


if __name__ == "__main__":
    sys.exit(main())
