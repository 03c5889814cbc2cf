"""say.py through the loudspeaker: stand-ins for the system's players keep what they are given to play."""

from __future__ import annotations

import signal
import wave
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import RunningServer
from listening import ffmpeg, listen, transcribe, word_error_rate
from saying import add_player, family, refused, said, started, wait_until

from say_output import last_pause

TEXT = "The kettle is on, and the tea will be ready soon. Please bring the good cups from the kitchen."
LONG = " ".join(f"This is sentence number {number} of a long story." for number in range(300))
KEEP = "exec /bin/cat > $PLAYED"


@pytest.mark.parametrize(
    ("name", "script", "options"),
    [
        ("aplay", KEEP, "-t raw -f S16_LE -r 24000 -c 1 -"),
        ("ffplay", KEEP, "-nodisp -autoexit -loglevel error -f s16le -sample_rate 24000 -i pipe:0"),
        ("pw-play", KEEP, "--rate 24000 --channels 1 --format s16 -"),
        (
            "pw-play",
            f'test "$1" = --help && echo "  -a, --raw   RAW mode" && exit; {KEEP}',
            "--raw --rate 24000 --channels 1 --format s16 -",
        ),
    ],
)
def test_a_player_that_reads_a_pipe_gets_the_samples(server: RunningServer, tmp_path: Path, name: str, script: str, options: str) -> None:
    played = add_player(tmp_path, name, script)
    said(tmp_path, TEXT, "--server", server.url, "--seed", 1)
    assert options in Path(f"{played}.arguments").read_text()
    assert word_error_rate(TEXT, listen(played.read_bytes(), "pcm")) == 0


def test_the_arguments_for_ffplay_are_what_ffmpegs_own_demuxer_takes(server: RunningServer, tmp_path: Path) -> None:
    converting = f'while [ "$1" != -f ]; do shift; done; exec {ffmpeg()} -v error "$@" -f wav $PLAYED'
    played = add_player(tmp_path, "ffplay", converting)
    said(tmp_path, TEXT, "--server", server.url, "--speed", 1.25)
    assert word_error_rate(TEXT, listen(played.read_bytes(), "wav")) == 0


def test_a_player_that_reads_files_gets_one_after_another(server: RunningServer, tmp_path: Path) -> None:
    played = add_player(tmp_path, "afplay", '/bin/cp "$1" "$PLAYED.$(/bin/date +%s%N).wav"')
    said(tmp_path, LONG[:2000], "--server", server.url, "--seed", 1)
    parts = [read_wave(path) for path in sorted(tmp_path.glob(f"{played.name}.*.wav"))]
    assert len(parts) > 1
    whole = add_player(tmp_path, "aplay", KEEP)
    said(tmp_path, LONG[:2000], "--server", server.url, "--seed", 1)
    assert b"".join(part.tobytes() for part in parts) == whole.read_bytes()
    for part in parts[:-1]:
        assert not part[-240:].any()  # cut where nothing is heard
    assert "number 0" in transcribe((parts[0] / 32768).astype(np.float32), 24_000).replace("zero", "0")
    assert not list(tmp_path.glob("sesame-tts-*"))


def test_playing_starts_before_all_is_spoken_and_ctrl_c_silences_it(server: RunningServer, tmp_path: Path) -> None:
    played = add_player(tmp_path, "aplay", "/usr/bin/head -c 48000 > $PLAYED\nexec /bin/sleep 1000")
    with started(tmp_path, LONG, "--server", server.url) as process:
        wait_until(lambda: played.exists() and played.stat().st_size == 48_000, "a second was played")
        children = family(process)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")
    assert children
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_a_player_that_stands_still_holds_no_one_elses_turn(server: RunningServer, tmp_path: Path) -> None:
    played = add_player(tmp_path, "aplay", "echo > $PLAYED; exec /bin/sleep 1000")
    with started(tmp_path, LONG, "--server", server.url) as process:
        wait_until(played.exists, "the player runs")
        server.wait_for(lambda health: health["queue"]["active"] == 0)
        with server.client() as client:
            asked = {"model": "x", "input": "Hello.", "voice": "heart"}
            assert client.post("/v1/audio/speech", json=asked).status_code == 200
        assert process.poll() is None


@pytest.mark.parametrize(
    "script", ["echo 'audio open error: No such device' >&2; exit 1", "/usr/bin/head -c 100 >/dev/null; echo 'No such device' >&2; exit 1"]
)
@pytest.mark.parametrize("name", ["aplay", "afplay"])
def test_a_player_that_fails_is_quoted(server: RunningServer, tmp_path: Path, name: str, script: str) -> None:
    add_player(tmp_path, name, script)
    status, message = refused(tmp_path, LONG[:600], "--server", server.url)
    assert (status, message.startswith(f"say.py: The player {name} failed: "), "No such device" in message) == (1, True, True)


def read_wave(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24_000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def test_the_last_pause_is_found() -> None:
    loud, pause = np.full(2400, 1000, "<i2"), np.zeros(2400, "<i2")
    assert last_pause(loud.tobytes()) == 0
    assert last_pause(np.concatenate([loud, pause]).tobytes()) == 0  # it may go on
    twice = np.concatenate([loud, pause, loud, pause, loud, pause[:100], loud])
    assert last_pause(twice.tobytes()) == 2 * (2400 * 3 + 1200)
