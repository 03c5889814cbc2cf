"""Runs say.py as a person's shell does: a process with an environment of its own, in a pipe or at a terminal.

It is forked from one that has imported it, as the tests' servers are (`server_forker.py`). `command` is the real program.
"""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import as_mac
import psutil
from conftest import PROJECT, clean_environment, free_port
from forking import ForkedProcess, server_forker

SECONDS = 240

Process = subprocess.Popen[bytes] | ForkedProcess


# Takes sounddevice's place: `RULE` says how the device behaves, and what it plays is kept in a file.
_SOUNDDEVICE = """
import pathlib, time

PLAYED, RULE = pathlib.Path({played!r}), {rule!r}


class PortAudioError(Exception):
    pass


if RULE == "no library":
    raise OSError("PortAudio library not found")


def check_output_settings(**settings):
    if RULE == "no device":
        raise PortAudioError("Error querying device -1", -1)
    assert settings == dict(samplerate=24000, channels=1, dtype="int16")


class RawOutputStream:
    latency = 1.0
    room = 5000

    def __init__(self, *, latency, **settings):
        check_output_settings(**settings)
        if RULE == "busy":
            raise PortAudioError("Error opening RawOutputStream: Device unavailable [PaErrorCode -9985]", -9985)

    def start(self):
        PLAYED.write_bytes(b"")

    @property
    def write_available(self):
        if RULE == "stalls" and PLAYED.stat().st_size >= 48000:
            return 0
        return self.room

    def write(self, data):
        assert 0 < len(data) <= 2 * self.room
        assert len(data) % 2 == 0
        if RULE == "unplugged" and PLAYED.stat().st_size:
            raise PortAudioError("Device unavailable", -9985)
        with PLAYED.open("ab") as file:
            file.write(data)

    def stop(self):
        if RULE == "never stops":
            PLAYED.with_suffix(".stopping").touch()
            time.sleep(1000)

    def close(self):
        pass
"""


def environment(tmp_path: Path, **settings: object) -> dict[str, str]:
    """No server on the settings' port, no server's files, no programs on PATH, no key; no loudspeaker unless `add_loudspeaker` made one."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    if not (tmp_path / "modules").exists():
        add_loudspeaker(tmp_path, "no library")
    own = clean_environment(tmp_path / "say-cache", **({"PORT": free_port()} | settings))
    return own | {"PATH": str(tmp_path / "bin"), "TMPDIR": str(tmp_path), "PYTHONPATH": str(tmp_path / "modules")}


def command(*arguments: object) -> list[str]:
    return [*as_mac.python(), str(PROJECT / "say.py"), *map(str, arguments)]


def _forked(tmp_path: Path, arguments: tuple[object, ...], settings: dict[str, Any], streams: tuple[int, int, int]) -> ForkedProcess:
    own = environment(tmp_path, **settings)
    return server_forker(own).start(["say.py", *map(str, arguments)], own, tmp_path, streams)


def _piped(tmp_path: Path, arguments: tuple[object, ...], settings: dict[str, Any], stdin: int) -> ForkedProcess:
    """Start it with pipes for its output and errors."""
    (output, its_output), (errors, its_errors) = os.pipe(), os.pipe()
    process = _forked(tmp_path, arguments, settings, (stdin, its_output, its_errors))
    process.stdout, process.stderr = os.fdopen(output, "rb"), os.fdopen(errors, "rb")
    os.close(its_output)
    os.close(its_errors)
    return process


def say(tmp_path: Path, *arguments: object, stdin: bytes = b"", **settings: object) -> subprocess.CompletedProcess[bytes]:
    """Run it to its end; whatever happens, nobody is shown a traceback."""
    its_input, given = os.pipe()
    os.set_blocking(given, False)
    assert os.write(given, stdin or b"") == len(stdin), "longer than a pipe's buffer"
    os.close(given)
    process = _piped(tmp_path, arguments, settings, its_input)
    os.close(its_input)
    output, errors = process.communicate(SECONDS)
    assert b"Traceback" not in errors, errors.decode()
    return subprocess.CompletedProcess(list(map(str, arguments)), process.wait(), output, errors)


def said(tmp_path: Path, *arguments: object, stdin: bytes = b"", **settings: object) -> bytes:
    """Its standard output; it must end well and quietly."""
    ended = say(tmp_path, *arguments, stdin=stdin, **settings)
    assert (ended.returncode, ended.stderr.decode()) == (0, "")
    return ended.stdout


def refused(tmp_path: Path, *arguments: object, stdin: bytes = b"", **settings: object) -> tuple[int, str]:
    """Its exit status and its one line of complaint."""
    ended = say(tmp_path, *arguments, stdin=stdin, **settings)
    assert ended.stdout == b""
    message = ended.stderr.decode()
    assert message.startswith("say.py: ")
    assert message.count("\n") == 1
    return ended.returncode, message


@contextmanager
def started(tmp_path: Path, *arguments: object, forked: bool = True, **settings: object) -> Iterator[Process]:
    """Start it; it, and what it leaves behind, is killed at the end. Unless `forked`, the real program starts, and loads all that it needs."""
    if forked:
        with Path(os.devnull).open() as stdin:
            process: Process = _piped(tmp_path, arguments, settings, stdin.fileno())
    else:
        process = subprocess.Popen(
            command(*arguments),
            cwd=tmp_path,
            env=environment(tmp_path, **settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    try:
        yield process
    finally:
        for each in (*family(process), process):
            if each.is_running() if isinstance(each, psutil.Process) else each.poll() is None:
                each.kill()
        process.communicate(timeout=30)


def family(process: Process) -> list[psutil.Process]:
    """All that a process has started, directly or not."""
    try:
        return list(psutil.Process(process.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def at_terminal(tmp_path: Path, *arguments: object, **settings: object) -> tuple[int, str]:
    """Run it with a terminal of 100 columns for input and errors; its exit status and all that it showed there."""
    control, terminal = pty.openpty()
    with Path(os.devnull).open("w") as nowhere:
        streams = (terminal, nowhere.fileno(), terminal)
        process = _forked(tmp_path, arguments, settings | {"COLUMNS": "100", "TERM": "xterm"}, streams)
    os.close(terminal)
    shown = b""
    try:
        while True:
            try:
                data = os.read(control, 4096)
            except OSError:  # Linux says EIO once nobody has the terminal open any more
                break
            if not data:
                break
            shown += data
    finally:
        os.close(control)
        status = process.wait(SECONDS)
    return status, shown.decode()


def add_loudspeaker(tmp_path: Path, rule: str = "plays") -> Path:
    """A stand-in for the loudspeaker; returns the file with the samples that it has played."""
    played = tmp_path / "modules" / "played.pcm"
    played.parent.mkdir(exist_ok=True)
    (played.parent / "sounddevice.py").write_text(_SOUNDDEVICE.format(played=str(played), rule=rule))
    return played


def sentences_of(text: str) -> str:
    """A text without its line breaks."""
    return " ".join(text.split())


def captions_in(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text())["captions"])


def cues(text: str, separator: str) -> list[tuple[float, float, str]]:
    """The cues of a WebVTT ('.') or SubRip (',') file: start and end in seconds, and the text."""
    clock = rf"(\d+):(\d\d):(\d\d){re.escape(separator)}(\d\d\d)"
    found = re.findall(rf"^{clock} --> {clock}\n(.+(?:\n.+)*)$", text, re.MULTILINE)
    return [(_seconds(cue[:4]), _seconds(cue[4:8]), cue[8]) for cue in found]


def _seconds(clock: tuple[str, ...]) -> float:
    hours, minutes, seconds, thousandths = map(int, clock)
    return hours * 3600 + minutes * 60 + seconds + thousandths / 1000
