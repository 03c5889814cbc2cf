"""say.py through the loudspeaker: a stand-in for PortAudio's module keeps what it is given to play."""

from __future__ import annotations

import os
import signal
import subprocess
from ctypes.util import find_library
from pathlib import Path

import pytest
from conftest import RunningServer, still_running
from listening import listen, word_error_rate
from saying import add_loudspeaker, command, environment, family, refused, said, started, wait_until

TEXT = "The kettle is on, and the tea will be ready soon. Please bring the good cups from the kitchen."
LONG = " ".join(f"This is sentence number {number} of a long story." for number in range(300))
TAIL = bytes(9600)  # 0.2 s of silence


def test_the_loudspeaker_gets_every_sample(server: RunningServer, tmp_path: Path) -> None:
    played = add_loudspeaker(tmp_path)
    said(tmp_path, TEXT, "--server", server.url, "--seed", 1)
    said(tmp_path, TEXT, "--server", server.url, "--seed", 1, "-o", "speech.pcm")
    assert played.read_bytes() == (tmp_path / "speech.pcm").read_bytes() + TAIL
    assert word_error_rate(TEXT, listen(played.read_bytes(), "pcm")) == 0


def test_another_speed_is_played(server: RunningServer, tmp_path: Path) -> None:
    played = add_loudspeaker(tmp_path)
    said(tmp_path, TEXT, "--server", server.url, "--speed", 1.25)
    assert word_error_rate(TEXT, listen(played.read_bytes(), "pcm")) == 0


def test_the_real_portaudio_plays_every_sample(server: RunningServer, tmp_path: Path) -> None:
    """Through ALSA's plug-in that writes into a file."""
    if not find_library("portaudio") or not find_library("asound"):
        pytest.skip("PortAudio with ALSA is not installed")
    (tmp_path / "asound.conf").write_text(
        f"pcm.none {{ type null }}\npcm.!default {{ type file slave.pcm none file {tmp_path}/played format raw }}\n"
    )
    own = environment(tmp_path) | {"PATH": os.environ["PATH"], "ALSA_CONFIG_PATH": str(tmp_path / "asound.conf"), "PYTHONPATH": ""}
    own |= {"LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}
    asked = command(TEXT, "--server", server.url, "--seed", 1)
    subprocess.run(asked, env=own, check=True, timeout=60)
    said(tmp_path, TEXT, "--server", server.url, "--seed", 1, "-o", "speech.pcm")
    assert (tmp_path / "played").read_bytes() == (tmp_path / "speech.pcm").read_bytes() + TAIL


def test_playing_starts_before_all_is_spoken_and_ctrl_c_silences_it(server: RunningServer, tmp_path: Path) -> None:
    played = add_loudspeaker(tmp_path, "stalls")
    with started(tmp_path, LONG, "--server", server.url) as process:
        wait_until(lambda: played.exists() and played.stat().st_size >= 48_000, "a second was played")
        children = family(process)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")
    assert not still_running(children)


def test_ctrl_c_while_the_last_samples_are_played(server: RunningServer, tmp_path: Path) -> None:
    played = add_loudspeaker(tmp_path, "never stops")
    with started(tmp_path, "Hello.", "--server", server.url) as process:
        wait_until(played.with_suffix(".stopping").exists, "the device is asked to stop")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (130, b"")


def test_a_loudspeaker_that_stalls_holds_up_no_other_request(server: RunningServer, tmp_path: Path) -> None:
    played = add_loudspeaker(tmp_path, "stalls")
    with started(tmp_path, LONG[:1500], "--server", server.url) as process:
        wait_until(played.exists, "the loudspeaker is open")
        server.wait_for(lambda health: health["queue"]["active"] == 0)
        with server.client() as client:
            asked = {"model": "x", "input": "Hello.", "voice": "heart"}
            assert client.post("/v1/audio/speech", json=asked).status_code == 200
        assert process.poll() is None


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        ("no library", "The PortAudio library is missing (on Debian: apt install libportaudio2)"),
        ("no device", "There is no loudspeaker on this machine (Error querying device -1). Write a file instead: -o speech.mp3"),
        ("busy", "The loudspeaker failed: Error opening RawOutputStream: Device unavailable"),
        ("unplugged", "The loudspeaker failed: Device unavailable"),
    ],
)
def test_a_loudspeaker_that_fails_is_explained(server: RunningServer, tmp_path: Path, rule: str, complaint: str) -> None:
    add_loudspeaker(tmp_path, rule)
    status, message = refused(tmp_path, LONG[:600], "--server", server.url)
    assert (status, message.startswith(f"say.py: {complaint}")) == (1, True), message
