"""What may serve as a voice: recordings in every usual format, and what is refused, with words that help."""

from __future__ import annotations

import io
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import hibari
import listening
import numpy as np
import pytest
import soundfile

from errors import ConversionError, InvalidAudioError
from recordings import read_recording, read_recording_bytes

SENTENCE = "The train leaves the station at noon."
RATE = 24_000


@cache
def speech() -> listening.Samples:
    return np.asarray(hibari.Hibari()(SENTENCE), dtype=np.float32)


def wav(samples: np.ndarray, rate: int = RATE, subtype: str = "PCM_16", container: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


def tone(seconds: float, level: float = 0.3) -> np.ndarray:
    return (level * np.sin(2 * np.pi * 220 * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def ffmpeg_file(folder: Path, name: str, *options: str) -> Path:
    (folder / "source.wav").write_bytes(wav(speech()))
    target = folder / name
    subprocess.run([listening.ffmpeg(), "-v", "error", "-i", folder / "source.wav", *options, target], check=True, timeout=60)
    return target


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of this test alone, so that what is left behind shows."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("voice.mp3", ["-ar", "44100", "-ac", "2"]),
        ("voice.m4a", ["-ar", "48000", "-ac", "2"]),
        ("voice.ogg", ["-c:a", "libvorbis"]),
        ("voice.opus", ["-c:a", "libopus"]),
        ("voice.webm", ["-c:a", "libopus"]),
        ("voice.flac", ["-ar", "96000"]),
        ("voice.aiff", ["-ar", "8000"]),
        ("voice.wav", ["-ac", "6", "-ar", "11025", "-c:a", "pcm_f32le"]),
        ("voice of 'mine' %d; -i.caf", []),
    ],
)
def test_a_recording_in_any_usual_format_becomes_24_khz_mono_speech(name: str, options: list[str], tmp_path: Path, scratch: Path) -> None:
    samples = read_recording(ffmpeg_file(tmp_path, name, *options))
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert abs(len(samples) / RATE - len(speech()) / RATE) < 0.1
    assert abs(np.std(samples) / np.std(speech()) - 1) < 0.15
    assert not list(scratch.iterdir())


def test_the_words_of_a_recording_survive(tmp_path: Path) -> None:
    samples = read_recording(ffmpeg_file(tmp_path, "voice.m4a", "-ar", "44100", "-ac", "2"))
    assert listening.word_error_rate(SENTENCE, listening.transcribe(samples, RATE)) == 0


def test_an_m4a_that_was_sent_is_read_although_its_index_is_at_the_end(tmp_path: Path) -> None:
    data = ffmpeg_file(tmp_path, "voice.m4a").read_bytes()
    assert data.find(b"moov") > data.find(b"mdat")
    assert len(read_recording_bytes(data)) > RATE


def test_a_recording_through_a_lossless_file_stays_the_same() -> None:
    np.testing.assert_array_equal(read_recording_bytes(wav(speech(), subtype="FLOAT")), speech())


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "cannot be read as sound"),
        (b"not sound at all" * 1000, "cannot be read as sound"),
        (wav(tone(1))[:44], "cannot be read as sound|lasts 0.00 s"),
        (wav(tone(0.9)), "lasts 0.90 s"),
        (wav(tone(60.5)), "more than 60 s"),
        (wav(np.zeros(2 * RATE, np.float32)), "silent"),
        (wav(np.stack([tone(2), -tone(2)], axis=1)), "silent"),
        (wav(np.sign(tone(2))), "clipped"),
        (wav(np.full(2 * RATE, np.nan, np.float32), subtype="FLOAT"), "not numbers"),
    ],
    ids=["empty", "not sound", "only a header", "too short", "too long", "silent", "silent in mono", "clipped", "not numbers"],
)
def test_what_cannot_be_a_voice_is_refused_with_the_reason(data: bytes, fault: str, scratch: Path) -> None:
    with pytest.raises(InvalidAudioError, match=fault) as caught:
        read_recording_bytes(data)
    assert str(scratch) not in caught.value.message
    assert not list(scratch.iterdir())


def test_exactly_one_second_and_exactly_a_minute_are_accepted() -> None:
    assert len(read_recording_bytes(wav(tone(1)))) == RATE
    assert len(read_recording_bytes(wav(tone(60)))) == 60 * RATE


def test_hours_in_a_small_file_are_not_decoded(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.flac"
    hours = ["-f", "lavfi", "-i", "anullsrc=sample_rate=8000:channel_layout=mono", "-t", "3600"]
    subprocess.run([listening.ffmpeg(), "-v", "error", *hours, bomb], check=True, timeout=120)
    assert bomb.stat().st_size < 10 * 2**20
    with pytest.raises(InvalidAudioError, match="more than 60 s"):
        read_recording_bytes(bomb.read_bytes())


@pytest.mark.parametrize(
    "playlist", ["#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{path}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile '{path}'\n"]
)
def test_a_playlist_opens_no_other_file(playlist: str, tmp_path: Path) -> None:
    other = ffmpeg_file(tmp_path, "other.wav")
    with pytest.raises(InvalidAudioError, match="cannot be read as sound"):
        read_recording_bytes(playlist.format(path=other).encode())


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.wav", Path("/dev/zero")):
        with pytest.raises(InvalidAudioError, match="not a file"):
            read_recording(path)


def test_a_missing_temporary_folder_is_the_servers_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ConversionError, match="temporary file"):
        read_recording_bytes(wav(tone(2)))


def test_a_decoder_that_fails_or_cannot_be_started_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "ffmpeg"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(InvalidAudioError, match="cannot be read as sound"):
        read_recording_bytes(wav(tone(2)))
    program.write_text("#!/does/not/exist\n")
    with pytest.raises(ConversionError, match="cannot be started"):
        read_recording_bytes(wav(tone(2)))
