"""A small service manager that runs the job of our launchd plist or systemd unit; it replaces both in tests.

    python tests/supervisor.py FILE STATE [--throttle-scale 0.1]

SIGTERM stops the job gracefully and then the supervisor; SIGHUP restarts the job. STATE is a JSON file with the job's state.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import plistlib
import resource
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypedDict

_TICK_SECONDS = 0.05

Become = Callable[[list[str], dict[str, str]], NoReturn]
"""Takes the place of a program in the process that was made for it: arguments and environment."""


class State(TypedDict):
    """The content of the state file: the PIDs of supervisor and job, the start times, and the exit status of each run."""

    supervisor: int
    pid: int | None
    starts: list[float]
    statuses: list[int]


@dataclass(frozen=True)
class Job:
    """The content of the service file, with launchd's names (launchd.plist(5)); times in seconds."""

    arguments: list[str]
    directory: str
    environment: dict[str, str]
    keep_alive: bool
    throttle: float
    exit_timeout: float
    output: str | None
    umask: int
    descriptors: int
    final_statuses: frozenset[int] = frozenset()

    @classmethod
    def read(cls, file: Path) -> Job:
        """Read a plist or a unit, by the ending of its name."""
        return cls._from_plist(file) if file.suffix == ".plist" else cls._from_unit(file)

    @classmethod
    def _from_plist(cls, file: Path) -> Job:
        plist = plistlib.loads(file.read_bytes())
        assert plist["RunAtLoad"] is True, "the supervisor starts its job at once"
        assert plist["StandardOutPath"] == plist["StandardErrorPath"]
        assert plist["KeepAlive"] == {"SuccessfulExit": False}, "restarted unless it exits with 0"
        return cls(
            arguments=plist["ProgramArguments"],
            directory=plist["WorkingDirectory"],
            environment=plist["EnvironmentVariables"],
            keep_alive=True,
            throttle=plist["ThrottleInterval"],
            exit_timeout=plist["ExitTimeOut"],
            output=plist["StandardErrorPath"],
            umask=plist["Umask"],
            descriptors=plist["SoftResourceLimits"]["NumberOfFiles"],
            final_statuses=frozenset({0}),
        )

    @classmethod
    def _from_unit(cls, file: Path) -> Job:
        lines = [line.partition("=") for line in file.read_text("utf-8").splitlines() if "=" in line and not line.startswith("#")]
        found = {name: value for name, _, value in lines}
        words = [word for name, _, value in lines if name == "Environment" for word in shlex.split(value)]
        return cls(
            arguments=[word.replace("$$", "$").replace("%%", "%") for word in shlex.split(found["ExecStart"])],
            directory=found["WorkingDirectory"].replace("%%", "%"),
            environment={name: value.replace("%%", "%") for name, _, value in (word.partition("=") for word in words)},
            keep_alive=found["Restart"] == "always",
            throttle=float(found["RestartSec"]),
            exit_timeout=float(found["TimeoutStopSec"]),
            output=None,
            umask=int(found["UMask"], 8),
            descriptors=int(found["LimitNOFILE"]),
            final_statuses=frozenset({int(found["RestartPreventExitStatus"])}),
        )


@dataclass
class Supervisor:
    """Keep one job running.

    Attributes:
        starts: Start times, on the monotonic clock.
        statuses: Exit statuses, in order; negative for a signal.
        become: Called in the job's process in place of an exec.
    """

    job: Job
    state_file: Path
    throttle_scale: float = 1.0
    starts: list[float] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    become: Become | None = None
    _process: subprocess.Popen[bytes] | None = None
    _wanted: str = "run"

    def run(self) -> None:
        """Run until SIGTERM."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGHUP, self._on_signal)
        while self._wanted != "stop":
            if self._wanted == "restart":
                self._wanted = "run"
                self._stop()
                self._start()
            elif self._process is None and self._due():
                self._start()
            self._reap()
            time.sleep(_TICK_SECONDS)
        self._stop()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._wanted = "stop" if number == signal.SIGTERM else "restart"

    def _due(self) -> bool:
        """Return whether to start the job. launchd counts ThrottleInterval from start to start."""
        if not self.starts:
            return True
        if not self.job.keep_alive or self.statuses[-1] in self.job.final_statuses:
            return False
        return time.monotonic() - self.starts[-1] >= self.job.throttle * self.throttle_scale

    def _start(self) -> None:
        # A service inherits no environment from a shell, only HOME and the variables in its file.
        environment = {"HOME": os.environ["HOME"], **self.job.environment}
        output = Path(self.job.output).open("ab") if self.job.output else self.state_file.with_suffix(".journal").open("ab")  # noqa: SIM115
        self.starts.append(time.monotonic())
        with output:
            self._process = subprocess.Popen(
                self.job.arguments,
                cwd=self.job.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                umask=self.job.umask,
                preexec_fn=lambda: self._before_exec(environment),
            )
        self._write_state()

    def _before_exec(self, environment: dict[str, str]) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(self.job.descriptors, hard), hard))
        if self.become:
            self.become(self.job.arguments, environment)

    def _reap(self) -> None:
        process = self._process
        if process is None or process.poll() is None:
            return
        self.statuses.append(process.returncode)
        with contextlib.suppress(ProcessLookupError):  # launchd kills what remains of a job's process group
            os.killpg(process.pid, signal.SIGKILL)
        self._process = None
        self._write_state()

    def _stop(self) -> None:
        """Send SIGTERM, and SIGKILL after ExitTimeOut."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(self.job.exit_timeout)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._reap()

    def _write_state(self) -> None:
        state: State = {
            "supervisor": os.getpid(),
            "pid": self._process.pid if self._process else None,
            "starts": self.starts,
            "statuses": self.statuses,
        }
        draft = self.state_file.with_suffix(".new")
        draft.write_text(json.dumps(state))
        draft.replace(self.state_file)


def main(become: Become | None = None) -> None:
    """Run the supervisor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("state", type=Path)
    parser.add_argument("--throttle-scale", type=float, default=1.0)
    arguments = parser.parse_args()
    Supervisor(Job.read(arguments.file), arguments.state, arguments.throttle_scale, become=become).run()


if __name__ == "__main__":
    main()
