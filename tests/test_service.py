"""The service: its files, install.sh from end to end, and the server under a service manager."""

from __future__ import annotations

import contextlib
import json
import os
import plistlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import acceptance
import as_mac
import forked_program
import httpx
import pytest
import system_tools
import tiny_csm
from conftest import PROJECT, START_SECONDS, free_port
from forking import ServerForker
from small_hub import SmallHub, write_presets, write_small_repositories
from supervisor import State
from test_makefile import OLD_BASH

LABEL = "com.burkestudio.sesame-tts"
SECONDS = 90


def until(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.05)


@dataclass
class Machine:
    """A Mac: a home folder, a copy of the project in a folder with an unusual name, and replacements for the system's tools.

    Our code believes that it runs on Apple Silicon, in the tests for Linux too: CSM is off unless a test switches it on.

    Its Python forks our programs from a process that has imported them (`server_forker.py`): `install.sh` starts up to ten. The supervisor
    forks the server, its child as with an exec, unless a test calls `starts_real_programs`.
    """

    home: Path
    project: Path
    state: Path
    port: int
    forker: Path
    supervisor: subprocess.Popen[bytes] | None = None

    @property
    def cache_dir(self) -> Path:
        return self.home / "cache of voices"

    @property
    def plist(self) -> Path:
        return self.home / "Library" / "LaunchAgents" / f"{LABEL}.plist"

    @property
    def unit(self) -> Path:
        return self.home / ".config" / "systemd" / "user" / "sesame-tts.service"

    @property
    def environment(self) -> dict[str, str]:
        stand_in = {"STAND_IN_STATE": str(self.state), "STAND_IN_FORKER": str(self.forker)}
        return {"HOME": str(self.home), "PATH": f"{self.home / 'tools'}:/usr/bin:/bin", "XDG_RUNTIME_DIR": str(self.home)} | stand_in

    def configure(self, **settings: object) -> None:
        lines = {"HOST": "127.0.0.1", "PORT": self.port, "CSM": "off", "CACHE_DIR": self.cache_dir, "SHUTDOWN_TIMEOUT": 20} | settings
        (self.project / ".env").write_text("".join(f'{name}="{value}"\n' for name, value in lines.items()))

    def says(self, **answers: str) -> None:
        """Set the output of the system's tools."""
        for name, answer in answers.items():
            (self.state / name).write_text(answer)

    def starts_real_programs(self, names: str = "*") -> None:
        """Start the server as launchd and systemd do, and our other programs too; `names`: a pattern for those that are not forked."""
        self.says(server="real")
        write_interpreter(self.project, f'case "$1" in */{names}.py) exec "{sys.executable}" "{as_mac.__file__}" "$@";; esac\n')

    def install(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [OLD_BASH, str(self.project / "install.sh"), *arguments],
            env=self.environment | environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    def install_at_terminal(self, *arguments: str, answer: str) -> tuple[int, str]:
        """Run it on a terminal on which somebody types `answer`; return its exit status and all that is shown."""
        control, terminal = os.openpty()
        os.write(control, answer.encode())
        command = [OLD_BASH, str(self.project / "install.sh"), *arguments]
        process = subprocess.Popen(command, env=self.environment, cwd="/", stdin=terminal, stdout=terminal, stderr=terminal)
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # Linux reports EIO once nobody has the terminal open
            while data := os.read(control, 4096):
                shown += data
        os.close(control)
        return process.wait(200), shown.decode()

    def calls(self, tool: str) -> list[str]:
        return [call for call in system_tools.calls(self.state) if call.startswith(tool)]

    def manager(self) -> State:
        """Return the service manager's state."""
        state: State = json.loads((self.state / "service.json").read_text())
        return state

    def answers(self, path: str = "/health") -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def log(self) -> str:
        return "".join(file.read_text(errors="replace") for file in sorted(self.cache_dir.glob("*.log")))

    def end(self) -> None:
        """Stop the supervisor and the server."""
        if (self.state / "service.json").exists():
            pid = self.manager()["supervisor"]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            if self.supervisor:
                self.supervisor.wait(SECONDS)
            until(lambda: not _alive(pid))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def write_interpreter(project: Path, first: str = "") -> None:
    """Write the Python of a copy of the project, which forks programs; `first`: lines of shell that may start one."""
    interpreter = project / ".venv" / "bin" / "python"
    interpreter.write_text(f'#!/bin/sh\n{first}exec "{sys.executable}" -I -S "{forked_program.__file__}" "$@"\n')
    interpreter.chmod(0o755)


def copy_project(project: Path) -> Path:
    """Copy the project with its compiled modules, or every program would compile them all."""
    project.mkdir()
    for file in [*PROJECT.glob("*.py"), *PROJECT.glob("*.plist"), PROJECT / "install.sh", PROJECT / "Makefile"]:
        shutil.copy2(file, project)
    for name in ("presets", "playground", "deploy", "__pycache__"):
        if (PROJECT / name).exists():
            shutil.copytree(PROJECT / name, project / name, ignore=shutil.ignore_patterns("*.pyc.*"))  # those that are being written
    (project / ".venv" / "bin").mkdir(parents=True)
    write_interpreter(project)
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One copy for all tests that change nothing in it but `.env`."""
    return copy_project(tmp_path_factory.mktemp("service") / "100% Burke's $peech & co")


@pytest.fixture(scope="module")
def forker(project: Path) -> Iterator[Path]:
    """The address of a forker with the modules of the copy."""
    forking = ServerForker(project=project)
    yield forking.address
    forking.close()


@pytest.fixture
def machine(tmp_path: Path, project: Path, forker: Path) -> Iterator[Machine]:
    home, state = tmp_path / "home", tmp_path / "state"
    for folder in (home, state):
        folder.mkdir()
    write_interpreter(project)
    system_tools.install_tools(home / "tools")
    made = Machine(home, project, state, free_port(), forker)
    made.configure()
    yield made
    made.end()


def rendered(machine: Machine, **environment: str) -> tuple[dict[str, object], str]:
    result = machine.install("--render", str(machine.home / "out"), **environment)
    assert result.returncode == 0, result.stderr
    return plistlib.loads((machine.home / "out" / f"{LABEL}.plist").read_bytes()), (machine.home / "out" / "sesame-tts.service").read_text()


@pytest.mark.parametrize("script", ["install.sh", "sesame"])
def test_the_scripts_are_clean_for_bash_and_shellcheck(script: str) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    assert subprocess.run([OLD_BASH, "-n", script], cwd=PROJECT, check=False).returncode == 0
    found = subprocess.run([shellcheck, script], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_the_plist_is_a_valid_template_that_names_only_what_is_replaced() -> None:
    text = (PROJECT / f"{LABEL}.plist").read_text()
    plist = plistlib.loads(text.encode())
    assert plist["Label"] == LABEL
    assert {word for word in text.split("@") if word.isupper()} == {"PROJECT", "CACHE_DIR"}


def test_every_key_of_the_rendered_plist(machine: Machine) -> None:
    plist, _ = rendered(machine)
    log = str(machine.cache_dir / "launchd.log")
    assert plist == {
        "Label": LABEL,
        "ProgramArguments": [f"{machine.project}/.venv/bin/python", f"{machine.project}/deploy/start.py"],
        "WorkingDirectory": str(machine.project),
        "EnvironmentVariables": {
            "PATH": "/opt/homebrew/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "LOG_STDERR": "false",
            "SETTING_ERROR_STATUS": "0",
        },
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 10,
        "ExitTimeOut": 35,  # SHUTDOWN_TIMEOUT is 20 here
        "ProcessType": "Interactive",
        "SoftResourceLimits": {"NumberOfFiles": 8192},
        "Umask": 0o077,
        "StandardOutPath": log,
        "StandardErrorPath": log,
    }
    assert machine.cache_dir.is_dir(), "launchd does not create the folder of its log"


def test_the_service_gets_the_model_folders_but_no_secrets(machine: Machine) -> None:
    plist, unit = rendered(machine, HF_HOME="/Volumes/big disk/hf", HF_TOKEN="hf_secret", PORT="1")
    environment = plist["EnvironmentVariables"]
    assert isinstance(environment, dict)
    assert environment["HF_HOME"] == "/Volumes/big disk/hf"
    assert 'Environment="HF_HOME=/Volumes/big disk/hf"' in unit
    assert "hf_secret" not in str(plist) + unit
    assert "PORT" not in environment


def test_a_note_names_shell_variables_that_the_service_does_not_see(machine: Machine) -> None:
    result = machine.install("--render", str(machine.home / "out"), PORT="1")
    assert "the service does not see PORT from this shell" in result.stderr


def test_the_systemd_unit_passes_systemds_own_check(machine: Machine) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    _, unit = rendered(machine)
    for line in ("Restart=always", "RestartSec=10", "TimeoutStopSec=35", "KillMode=mixed", "RestartPreventExitStatus=2", "UMask=0077"):
        assert line in unit.splitlines()
    assert "@" not in unit.replace("between @", "")
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--user", machine.home / "out" / "sesame-tts.service"],
        env=os.environ | {"XDG_RUNTIME_DIR": str(machine.home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_mac_install_upgrade_restart_and_uninstall(machine: Machine) -> None:
    machine.starts_real_programs("start")
    installed = machine.install()
    assert installed.returncode == 0, installed.stdout + installed.stderr + machine.log()
    assert machine.calls("launchctl bootstrap") == [f"launchctl bootstrap gui/501 {machine.plist}"]
    assert machine.calls("make") == [f"make -C {machine.project} setup"]
    assert f"runs at http://127.0.0.1:{machine.port}" in installed.stdout
    sample = machine.cache_dir / "installed.wav"
    assert machine.calls("afplay") == [f"afplay {sample}"]
    with wave.open(str(sample)) as spoken:
        assert spoken.getframerate() == 24000
        assert spoken.getnframes() > 24000
    assert sample.stat().st_mode & 0o077 == 0o044 or sample.stat().st_mode & 0o077 == 0
    assert (machine.cache_dir / "server.log").stat().st_mode & 0o077 == 0, "only the owner can read the service's files"
    first = machine.manager()["pid"]

    upgraded = machine.install()
    assert upgraded.returncode == 0, upgraded.stdout + upgraded.stderr + machine.log()
    assert len(machine.calls("launchctl bootout")) == 1
    assert len(machine.calls("launchctl bootstrap")) == 2
    second = machine.manager()
    assert second["pid"] != first
    assert second["statuses"] == []
    assert len(second["starts"]) == 1

    restarted = machine.install("--restart")
    assert restarted.returncode == 0, restarted.stdout + restarted.stderr
    assert len(machine.calls("launchctl bootout")) == 2
    assert machine.manager()["pid"] != second["pid"]
    stopped = [line for line in (machine.cache_dir / "server.log").read_text().splitlines() if line.endswith(" stopped")]
    assert len(stopped) == 2, "the server was shut down gracefully both times"

    while not machine.answers("/health/ready"):
        time.sleep(0.1)
    status = machine.install("--status")
    assert status.returncode == 0, status.stdout + status.stderr
    assert f"pid = {machine.manager()['pid']}" in status.stdout
    assert f"The server answers at 127.0.0.1:{machine.port}: ok" in status.stdout
    logs = machine.install("--logs")
    assert logs.returncode == 0
    assert "listens on" in logs.stdout

    removed = machine.install("--uninstall")
    assert removed.returncode == 0, removed.stderr
    assert not machine.plist.exists()
    assert not machine.answers()
    assert machine.cache_dir.is_dir(), "voices and logs are kept"
    again = machine.install("--uninstall")
    assert (again.returncode, "not installed" in again.stdout) == (0, True)
    assert machine.install("--status").returncode == 1


def test_linux_install_restart_and_uninstall(machine: Machine) -> None:
    machine.starts_real_programs()
    machine.says(system="Linux", processor="x86_64")
    machine.configure(API_KEY="it's a secret")
    link = machine.home / ".local" / "bin" / "sesame"
    status, shown = machine.install_at_terminal("--no-download", answer="y\n")
    assert status == 0, shown + machine.log()
    assert "loginctl enable-linger burke" in shown
    assert link.readlink() == machine.project / "sesame"
    assert "systemctl --user enable --quiet sesame-tts.service" in machine.calls("systemctl")
    assert (machine.cache_dir / "installed.wav").stat().st_size > 48000
    assert "secret" not in shown + machine.unit.read_text() + machine.log()
    machine.starts_real_programs("start")
    assert machine.install("--status").returncode == 0
    assert machine.install("--restart").returncode == 0
    assert machine.manager()["statuses"] == [0]
    assert machine.install("--uninstall").returncode == 0
    assert not machine.unit.exists()
    assert not link.is_symlink()
    assert not machine.answers()


def test_the_command_is_linked_once_and_nothing_is_overwritten(machine: Machine) -> None:
    link = machine.home / ".local" / "bin" / "sesame"
    linked = machine.install("--link")
    assert (linked.returncode, link.readlink()) == (0, machine.project / "sesame")
    assert "does not search ~/.local/bin" in linked.stdout
    again = machine.install("--link", PATH=f"{link.parent}:{machine.environment['PATH']}")
    assert (again.returncode, "does not search" in again.stdout) == (0, False)
    assert machine.install("--uninstall").returncode == 0
    assert not link.is_symlink()
    link.write_text("somebody else's program")
    refused = machine.install("--link")
    assert (refused.returncode, "exists and is not a link to this folder" in refused.stderr) == (1, True)
    assert machine.install("--uninstall").returncode == 0
    assert link.read_text() == "somebody else's program"


def test_the_quick_action_sends_the_selected_text_to_sesame(machine: Machine) -> None:
    machine.project = copy_project(machine.home / "Burke's $peech")
    stand_in = machine.project / "sesame"
    stand_in.write_text('#!/bin/sh\necho "$@" > "$HOME/arguments"\ncat > "$HOME/selection"\n')
    stand_in.chmod(0o755)
    installed = machine.install("--quick-action")
    assert (installed.returncode, "Services > Speak with Sesame" in installed.stdout) == (0, True), installed.stderr
    workflow = machine.home / "Library" / "Services" / "Speak with Sesame.workflow"
    (service,) = plistlib.loads((workflow / "Contents" / "Info.plist").read_bytes())["NSServices"]
    assert service["NSMenuItem"] == {"default": "Speak with Sesame"}
    assert (service["NSMessage"], service["NSSendTypes"]) == ("runWorkflowAsService", ["public.utf8-plain-text"])
    document = plistlib.loads((workflow / "Contents" / "document.wflow").read_bytes())
    assert document["workflowMetaData"]["serviceInputTypeIdentifier"] == "com.apple.Automator.text"
    (action,) = [each["action"] for each in document["actions"]]
    assert action["ActionBundlePath"].endswith("/Run Shell Script.action")
    parameters = action["ActionParameters"]
    assert parameters["inputMethod"] == 0, "the text comes on standard input"
    selected = 'Dr. Smith\'s "notes" cost $5.\nSecond line: naïve.'
    own = {"HOME": str(machine.home), "PATH": "/usr/bin:/bin"}
    subprocess.run([parameters["shell"], "-c", parameters["COMMAND_STRING"]], input=selected.encode(), env=own, check=True)
    assert (machine.home / "selection").read_text() == selected
    assert (machine.home / "arguments").read_text() == "-\n"
    assert machine.install("--uninstall").returncode == 0
    assert not workflow.exists()
    machine.says(system="Linux")
    refused = machine.install("--quick-action")
    assert (refused.returncode, "on a Mac only" in refused.stderr) == (1, True)


def test_linux_without_systemd_for_users_gets_advice(machine: Machine) -> None:
    machine.says(system="Linux", systemd="absent")
    result = machine.install()
    assert result.returncode == 3
    assert "make run" in result.stderr
    assert machine.calls("make") == []


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"processor": "x86_64"}, "needs Apple Silicon"),
        ({"processor": "x86_64", "rosetta": "1"}, "Rosetta"),
        ({"macos": "13.6.1"}, "macOS 14 or newer"),
        ({"user": "0"}, "without sudo"),
    ],
)
def test_an_unsuitable_machine_is_refused_before_any_change(machine: Machine, answers: dict[str, str], message: str) -> None:
    machine.says(**answers)
    result = machine.install()
    assert result.returncode == 1
    assert message in result.stderr
    assert machine.calls("make") == []
    assert not machine.plist.exists()


def test_it_speaks_at_once_then_shows_the_services_download_then_speaks_with_csm(machine: Machine, tmp_path: Path) -> None:
    cache = tiny_csm.build(script={"": [tiny_csm.ends_after(3)]}, small_codec=True)
    presets = write_presets(tmp_path, "conversational", frames=10)
    machine.configure(CSM="on", GUARD="off", DEFAULT_VOICE="conversational", MODEL_DTYPE="float32", PRESETS_DIR=presets)
    repositories = {repo: tiny_csm.snapshot_of(cache, repo) for repo in (tiny_csm.SESAME, tiny_csm.MIMI, tiny_csm.TOKENIZER)}
    with SmallHub(repositories, bytes_a_second=6_000_000) as hub:
        result = machine.install(
            HF_ENDPOINT=hub.url, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HOME=str(tmp_path / "hf"), **{tiny_csm.SMALL_CODEC: "1"}
        )
    assert result.returncode == 0, result.stdout + result.stderr + machine.log()
    assert machine.calls("caffeinate") == ["caffeinate -i"]
    steps = result.stdout[result.stdout.index("==> Test sentence") :]
    assert steps.index("Spoken with the voice heart") < steps.index("downloading ")
    assert steps.index("CSM-1B is ready (sesame/csm-1b).") < steps.index("Spoken with the voice conversational")
    assert re.search(r"^downloading .*, \d+% of \d+ MB, \d+\.\d MB/s, \d+ s left$", steps, re.MULTILINE), steps
    assert [call.rsplit("/")[-1] for call in machine.calls("afplay")] == ["installed.wav", "installed-csm.wav"]
    with wave.open(str(machine.cache_dir / "installed-csm.wav")) as spoken:
        assert 0 < spoken.getnframes() < 24000


def test_without_csm_the_service_stays_with_the_built_in_voice(machine: Machine) -> None:
    machine.configure(CSM="on", HF_HUB_OFFLINE=1)
    result = machine.install(HF_HUB_CACHE=str(machine.home / "hub"))
    assert result.returncode == 1
    assert "CSM-1B could not be loaded: " in result.stderr
    assert "the service runs with the built-in voice" in result.stderr
    assert machine.calls("afplay") == [f"afplay {machine.cache_dir / 'installed.wav'}"]
    assert "csm-1b: failed" in machine.install("--status").stdout


def test_ctrl_c_ends_the_watching_and_not_the_download(machine: Machine, tmp_path: Path) -> None:
    machine.configure(CSM="on", MODEL_ID=tiny_csm.MLX_COMMUNITY)
    with SmallHub(write_small_repositories(tmp_path / "repositories"), bytes_a_second=300_000) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HOME": str(tmp_path / "hf")}
        assert machine.install("--no-download", **environment).returncode == 0
        assert machine.calls("caffeinate") == []
        helper = [sys.executable, as_mac.__file__, str(machine.project / "deploy" / "service.py"), "watch", "60"]
        with subprocess.Popen(helper, env=machine.environment | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout
            assert any(line.startswith("downloading ") for line in watching.stdout), "after what is checked first"
            watching.send_signal(signal.SIGINT)
            assert "The service continues" in watching.stdout.read()
        assert watching.returncode == 4
        assert "csm-1b: loading. downloading" in machine.install("--status").stdout


@pytest.mark.parametrize(("place", "name"), [("Documents", "Documents"), ("Library/Mobile Documents/com~apple~CloudDocs", "iCloud Drive")])
def test_a_folder_that_macos_protects_is_refused(machine: Machine, place: str, name: str) -> None:
    (machine.home / place).mkdir(parents=True)
    machine.project = copy_project(machine.home / place / "sesame")
    result = machine.install()
    assert result.returncode == 1
    assert f"this folder is in {name} (" in result.stderr
    assert "Move it and run install.sh again" in result.stderr
    assert machine.calls("make") == []


def test_protected_folders_of_the_data_are_named(machine: Machine) -> None:
    machine.configure(CSM="on", HF_HUB_OFFLINE=1, DATA_DIR=machine.home / "Desktop" / "voices", SHUTDOWN_TIMEOUT="x")
    assert machine.install().returncode == 2
    machine.configure(CSM="on", HF_HUB_OFFLINE=1, DATA_DIR=machine.home / "Desktop" / "voices")
    machine.says(screen="nobody")
    result = machine.install(HF_HOME=str(machine.home / "Downloads" / "hf"))
    assert f"DATA_DIR is in Desktop ({machine.home}/Desktop/voices)" in result.stderr
    assert f"HF_HOME is in Downloads ({machine.home}/Downloads/hf/hub)" in result.stderr
    assert "CACHE_DIR is in" not in result.stderr


@pytest.mark.parametrize(
    ("answers", "cause"),
    [
        ({"screen": "nobody"}, "an ssh login alone does not create one"),
        ({"login_item": "off"}, "switch it on in System Settings > General > Login Items"),
        ({"bootstrap": "fails"}, "- A service with this name is still loaded"),
    ],
)
def test_a_failed_bootstrap_names_its_causes(machine: Machine, answers: dict[str, str], cause: str) -> None:
    machine.says(**answers)
    result = machine.install()
    assert result.returncode == 1
    assert cause in result.stderr
    assert not machine.answers()


def test_exit_status_of_wrong_arguments(machine: Machine) -> None:
    assert machine.install("--instal").returncode == 2
    assert machine.install("--render").returncode == 2
    assert machine.install("--help").returncode == 0


def test_a_port_in_use_is_reported_and_nothing_is_started(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", machine.port)):
        result = machine.install()
    assert result.returncode == 2
    assert f"PORT={machine.port} is in use" in result.stderr
    assert machine.calls("launchctl bootstrap") == []


def test_a_mistake_in_env_does_not_stop_the_running_service(machine: Machine) -> None:
    assert machine.install().returncode == 0
    machine.configure(DEFAULT_FORMAT="ogg")
    result = machine.install()
    assert result.returncode == 2
    assert "DEFAULT_FORMAT=" in result.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        machine.configure(PORT=taken.getsockname()[1])
        assert machine.install().returncode == 2
    assert machine.calls("launchctl bootout") == []
    assert machine.answers()


def supervise(machine: Machine) -> None:
    """Start the job of the rendered plist."""
    forks = not (machine.state / "server").exists()
    command = system_tools.supervisor_command(str(machine.home / "out" / f"{LABEL}.plist"), machine.state, forks=forks)
    machine.supervisor = subprocess.Popen(command, env=machine.environment, start_new_session=True)
    until(lambda: (machine.state / "service.json").exists())


def test_a_killed_server_is_restarted_after_the_throttle_interval(machine: Machine) -> None:
    machine.starts_real_programs()
    rendered(machine)
    supervise(machine)
    until(machine.answers, START_SECONDS)
    for _ in range(2):
        assert acceptance.seconds_to_recover(machine.cache_dir) is not None, "as `make acceptance` sees it"
    starts, statuses = machine.manager()["starts"], machine.manager()["statuses"]
    assert statuses == [-signal.SIGKILL, -signal.SIGKILL]
    assert all(later - earlier >= 1.0 for earlier, later in pairwise(starts))
    pid = json.loads((machine.cache_dir / "server.pid").read_text())["pid"]
    assert pid == machine.manager()["pid"], "the killed server's PID file is replaced"


def test_sigterm_lets_a_request_finish_and_exits_with_0(machine: Machine) -> None:
    rendered(machine)
    supervise(machine)
    until(lambda: machine.answers("/health/ready"), START_SECONDS)
    request = {
        "model": "tts-1",
        "input": "This sentence is spoken to its very end. " * 15,
        "voice": "heart",
        "response_format": "wav",
        "stream": True,
    }
    url = f"http://127.0.0.1:{machine.port}/v1/audio/speech"
    supervisor = machine.manager()["supervisor"]
    with httpx.stream("POST", url, json=request, timeout=SECONDS) as answer:
        assert answer.status_code == 200
        chunks = answer.iter_raw()
        size = len(next(chunks))
        os.kill(supervisor, signal.SIGTERM)
        size += sum(len(chunk) for chunk in chunks)
    assert size > 15 * 24000 * 2, "fifteen sentences of a second and more"
    until(lambda: machine.manager()["statuses"])
    assert machine.manager()["statuses"] == [0]
    assert not (machine.cache_dir / "server.pid").exists()


def test_an_invalid_setting_is_logged_once_and_not_restarted(machine: Machine) -> None:
    rendered(machine)
    machine.configure(MAX_QUEUE="many")
    supervise(machine)
    until(lambda: machine.manager()["statuses"])
    time.sleep(1.5)  # longer than the throttle interval of these tests
    assert machine.manager()["statuses"] == [0]
    assert len(machine.manager()["starts"]) == 1
    assert (machine.cache_dir / "launchd.log").read_text().count("MAX_QUEUE=") == 1


def test_a_package_that_cannot_be_imported_is_logged_in_one_line_and_not_restarted(machine: Machine, tmp_path: Path) -> None:
    machine.project = copy_project(tmp_path / "project")
    machine.configure()
    machine.starts_real_programs()
    rendered(machine)
    with (machine.project / "hibari_model.py").open("a") as module:
        module.write("import a_package_that_was_removed\n")
    (machine.cache_dir / "launchd.log").write_text("Traceback\n" * 200_000)
    supervise(machine)
    until(lambda: machine.manager()["statuses"])
    time.sleep(1.5)  # longer than the throttle interval of these tests
    assert (machine.manager()["statuses"], len(machine.manager()["starts"])) == ([0], 1)
    (line,) = (machine.cache_dir / "launchd.log").read_text().splitlines()
    assert "No module named 'a_package_that_was_removed'" in line
    assert "install.sh" in line


def test_a_port_that_was_taken_before_a_login_is_shown_by_the_status(machine: Machine) -> None:
    rendered(machine)
    machine.plist.parent.mkdir(parents=True)
    machine.plist.write_bytes((machine.home / "out" / f"{LABEL}.plist").read_bytes())
    with socket.create_server(("127.0.0.1", machine.port)):
        supervise(machine)
        until(lambda: machine.manager()["statuses"])
    shown = machine.install("--status")
    assert shown.returncode == 1
    assert f"PORT={machine.port} is in use" in shown.stdout
    assert "./install.sh --restart" in shown.stdout


def test_a_real_systemd_runs_the_unit(machine: Machine) -> None:
    """Use a separate unit name and a runtime link, so that an installed service is not affected."""
    systemctl = ["systemctl", "--user", "--quiet"]
    if not shutil.which("systemctl") or subprocess.run([*systemctl, "show-environment"], capture_output=True, check=False).returncode:
        pytest.skip("no systemd runs services for this user")
    rendered(machine)
    name = f"sesame-tts-test-{os.getpid()}.service"
    unit = machine.home / "out" / name
    (machine.home / "out" / "sesame-tts.service").rename(unit)
    subprocess.run([*systemctl, "--runtime", "link", str(unit)], check=True)
    try:
        subprocess.run([*systemctl, "start", name], check=True)
        until(machine.answers, START_SECONDS)
        subprocess.run([*systemctl, "kill", "--kill-whom=main", "--signal=SIGKILL", name], check=True)
        until(lambda: not machine.answers())
        until(machine.answers, START_SECONDS)
    finally:
        subprocess.run([*systemctl, "stop", name], check=False)
        subprocess.run([*systemctl, "--runtime", "disable", name], check=False)
    assert not machine.answers()
