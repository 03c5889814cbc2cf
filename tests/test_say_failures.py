"""say.py when something is wrong or somebody ends it: its exit status, its one line of complaint, and what it leaves behind (nothing)."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import RunningServer, free_port, still_running
from saying import Process, at_terminal, command, environment, family, refused, said, say, started, wait_until

from audio_formats import FORMATS

MakeServer = Callable[..., RunningServer]
LONG = " ".join(f"This is sentence number {number} of a long story." for number in range(400))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--loud", "Hello"], "--loud"),
        (["Hello", "-o", "speech.xyz"], ", ".join(f".{name}" for name in FORMATS)),
        (["Hello", "-o", "speech"], "is not a known format"),
        (["Hello", "--format", "mp3"], "-o"),
        (["Hello", "-o", "no/such/folder.mp3"], "folder does not exist"),
        (["Hello", "-o", "bin.mp3"], "is a folder"),
        (["Hello", "-o", "a.mp3", "--captions", "a.txt"], ".vtt, .srt, .json"),
        (["Hello", "-o", "a.mp3", "--speed", "5"], "'5' is not a number from 0.25 to 4"),
        (["Hello", "-o", "a.mp3", "--speed", "nan"], "--speed"),
        (["Hello", "-o", "a.mp3", "--seed", "-1"], "--seed"),
        (["Hello", "-f", "a.txt", "-o", "a.mp3"], "not both"),
        (["-f", "missing.txt", "-o", "a.mp3"], "no such file"),
        (["-f", "latin.txt", "-o", "a.mp3"], "not UTF-8 text (invalid byte at position 2"),
        (["***", "-o", "a.mp3"], "nothing to say"),
        (["-o", "a.mp3"], "nothing to say"),
        (["Hello", "-o", "a.mp3", "--server", "localhost:8880"], "http://localhost:8880"),
        (["Hello", "-o", "a.mp3", "--server", "http://localhost", "--local"], "mutually exclusive"),
        (
            ["Hello", "-o", "a.mp3", "--local", "--voice", "nobody"],
            "Available voices: conversational, conversational_b, emma, fenrir, heart",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_with_status_2(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    (tmp_path / "bin.mp3").mkdir()
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    status, message = refused(tmp_path, *arguments)
    assert status == 2
    assert complaint in message
    assert not list(tmp_path.glob("a.*"))


def test_a_setting_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    status, message = refused(tmp_path, "Hello", "-o", "a.mp3", PAUSE_MS="long")
    assert (status, "PAUSE_MS='long'" in message) == (2, True)


def test_a_voice_the_server_does_not_have(server: RunningServer, tmp_path: Path) -> None:
    status, message = refused(tmp_path, "Hello", "-o", "a.mp3", "--server", server.url, "--voice", "nobody")
    assert (status, "Available voices" in message) == (2, True)


def test_nothing_to_say_at_a_terminal_says_how_to_give_a_text(tmp_path: Path) -> None:
    status, shown = at_terminal(tmp_path, "-o", "a.mp3")
    assert (status, "-f FILE" in shown) == (2, True)


def test_audio_is_not_sent_to_a_terminal(tmp_path: Path) -> None:
    control, terminal = os.openpty()
    ended = subprocess.run(command("Hello", "-o", "-"), env=environment(tmp_path), stdout=terminal, stderr=subprocess.PIPE, check=False)
    os.close(control)
    os.close(terminal)
    assert (ended.returncode, b"terminal" in ended.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["Hello"], "The PortAudio library is missing"),
        (["Hello", "-o", "a.mp3", "--server", "http://127.0.0.1:9"], "No server answers at http://127.0.0.1:9: connection refused."),
        (["Hello", "-o", "a.mp3", "--server", "http://nowhere.invalid"], "no host of this name"),
        (["Hello", "-o", "a.mp3", "--local", "--voice", "conversational"], "Model 'csm-1b' is switched off"),
    ],
)
def test_what_fails_ends_with_status_1(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    status, message = refused(tmp_path, *arguments)
    assert (status, complaint in message) == (1, True), message


def test_something_else_that_answers_is_no_server(tmp_path: Path) -> None:
    port = free_port()
    other = subprocess.Popen([command()[0], "-m", "http.server", "--bind", "127.0.0.1", str(port)], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: psutil.Process(other.pid).net_connections(), "the other server listens")
        status, message = refused(tmp_path, "Hello", "-o", "a.mp3", "--server", f"http://127.0.0.1:{port}")
        assert (status, "is not a Sesame TTS server" in message) == (1, True)
        said(tmp_path, "Hello", "-o", "a.wav", PORT=port)  # nobody named it, so it is left alone
    finally:
        other.kill()
        other.wait()


def test_a_server_that_dies_leaves_no_half_file(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server()
    (tmp_path / "old.mp3").write_bytes(b"old")
    with started(tmp_path, LONG, "-o", "old.mp3", "--captions", "old.vtt", "--server", server.url) as process:
        wait_until(lambda: half_written(tmp_path), "half a file")
        server.process.kill()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith(f"say.py: The connection to the server at {server.url} was lost: ".encode())
    assert (tmp_path / "old.mp3").read_bytes() == b"old"
    assert files(tmp_path) == {"old.mp3"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_half_file_and_no_child(server: RunningServer, tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "old.mp3").write_bytes(b"old")
    with started(tmp_path, LONG, "-o", "old.mp3", "--captions", "old.vtt", "--server", server.url) as process:
        wait_until(lambda: half_written(tmp_path), "half a file")
        children = family(process)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (128 + number, b"", b"")
    assert children
    assert not still_running(children)
    assert (tmp_path / "old.mp3").read_bytes() == b"old"
    assert files(tmp_path) == {"old.mp3"}
    server.wait_for(lambda health: health["queue"]["active"] == 0)


def test_ctrl_c_ends_the_engine_in_this_process_too(tmp_path: Path) -> None:
    with started(tmp_path, LONG, "-o", "speech.wav", "--local") as process:
        wait_until(lambda: half_written(tmp_path), "half a file")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")
    assert files(tmp_path) == set()


def test_ctrl_c_while_it_starts(tmp_path: Path) -> None:
    with started(tmp_path, LONG, "-o", "speech.wav", "--local", forked=False) as process:
        wait_until(lambda: any("config.py" in name or "libmlx" in name or "numpy" in name for name in mapped(process)), "it imports")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, b"Traceback" in errors) == (130, False)
    assert files(tmp_path) == set()


def test_a_reader_that_goes_away_ends_it_quietly(server: RunningServer, tmp_path: Path) -> None:
    with started(tmp_path, LONG, "-o", "-", "--format", "wav", "--server", server.url) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(4) == b"RIFF"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141
    listing = subprocess.Popen(
        command("--list-voices", "--local"), env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert listing.stdout is not None
    listing.stdout.close()
    assert (listing.communicate()[1], listing.returncode) == (b"", 141)


def test_closed_descriptors_harm_nobody(server: RunningServer, tmp_path: Path) -> None:
    shell = ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command("Hello.", "-o", "a.pcm", "--seed", 1, "--server", server.url)]
    assert subprocess.run(shell, cwd=tmp_path, env=environment(tmp_path), check=False).returncode == 0
    said(tmp_path, "Hello.", "-o", "b.pcm", "--seed", 1, "--server", server.url)
    assert (tmp_path / "a.pcm").read_bytes() == (tmp_path / "b.pcm").read_bytes()


def test_a_disk_that_takes_no_more(server: RunningServer, tmp_path: Path) -> None:
    limited = ["/bin/sh", "-c", 'ulimit -f 40; exec "$@"', "sh", *command(LONG, "-o", "a.wav", "--server", server.url)]
    ended = subprocess.run(limited, cwd=tmp_path, env=environment(tmp_path), capture_output=True, check=False)
    assert (ended.returncode, ended.stderr.count(b"\n")) == (1, 1)
    assert files(tmp_path) == set()


def test_a_standard_output_that_takes_no_more(tmp_path: Path) -> None:
    """A file that must not grow stands for a full disk: /dev/full exists on Linux only."""
    limited = ["/bin/sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *command("--list-voices", "--local")]
    with (tmp_path / "list").open("wb") as full:
        ended = subprocess.run(limited, env=environment(tmp_path), stdout=full, stderr=subprocess.PIPE, check=False)
    assert (ended.returncode, ended.stderr.count(b"\n"), b"File too large" in ended.stderr) == (1, 1, True), ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_device_that_takes_no_more(server: RunningServer, tmp_path: Path) -> None:
    status, message = refused(tmp_path, "Hello.", "-o", "/dev/full", "--format", "pcm", "--server", server.url)
    assert (status, "No space left" in message) == (1, True)


def test_the_log_is_shown_when_asked_for_and_holds_no_text(tmp_path: Path) -> None:
    ended = say(tmp_path, "Marmalade.", "-o", "a.wav", "--local", "--verbose")
    assert ended.returncode == 0
    assert b"model hibari: ready" in ended.stderr
    assert b"Marmalade" not in ended.stderr


def half_written(folder: Path) -> bool:
    """Whether there is an unfinished file with some sound in it."""
    return any(path.stat().st_size > 4096 for path in folder.glob(".*.part"))


def files(folder: Path) -> set[str]:
    """All files, hidden ones too, that are no part of the tests' own."""
    return {path.name for path in folder.iterdir() if path.is_file()}


def mapped(process: Process) -> list[str]:
    """The libraries a process has loaded."""
    try:
        return [item.path for item in psutil.Process(process.pid).memory_maps()]
    except psutil.Error:
        return []
