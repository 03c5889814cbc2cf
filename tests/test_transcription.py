"""Recognisers: faster-whisper on real speech, and mlx-audio's Whisper, which Macs use, on a checkpoint with one fixed transcript."""

from __future__ import annotations

import importlib.util
import socket
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import tiny_csm
import tiny_whisper

from speech_model import ModelLoadError
from transcription import Recognizer

HEARD = "the rain has stopped"


@pytest.fixture
def no_faster_whisper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an installation without the extra `verify`."""
    original = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "faster_whisper" else original(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


@pytest.fixture
def mac(no_faster_whisper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `sys.platform` that of a Mac; the libraries, which read it too, are imported before."""
    import mlx_audio.stt.models.whisper
    from transformers import WhisperProcessor

    assert mlx_audio.stt.models.whisper.Model
    assert WhisperProcessor
    monkeypatch.setattr("sys.platform", "darwin")


def test_the_word_error_rate_of_real_speech() -> None:
    from hibari import Hibari

    text = "In 1984, seventy-seven thousand people came; the harbour wasn't ready."
    samples = np.asarray(Hibari()(text, seed=1), np.float32).reshape(-1)
    check = Recognizer()
    right, wrong = check.word_error_rate(text, samples), check.word_error_rate("Something that nobody has said at all today.", samples)
    assert right is not None
    assert right <= 0.2
    assert wrong is not None
    assert wrong > 0.8
    assert check.word_error_rate("我们今天早上去了港口。", samples) is None
    assert check.word_error_rate("…", samples) is None


def test_on_a_mac_mlx_audios_own_whisper_listens(
    mac: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    noise = np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32)
    with tiny_csm.activated(tiny_whisper.build(tmp_path, HEARD)):
        check = Recognizer()
        assert check.transcribe(noise) == HEARD
        assert check.word_error_rate("The rain has stopped.", noise) == 0
        assert check.word_error_rate("The rain had not stopped.", noise) == 2 / 5
    assert asked == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore:Could not load WhisperProcessor")
def test_a_whisper_that_cannot_write_words_is_refused_when_it_is_loaded(mac: None, tmp_path: Path) -> None:
    checkpoint = tiny_whisper.build(tmp_path, HEARD, processor=False)
    with tiny_csm.activated(checkpoint), pytest.raises(ModelLoadError, match="VERIFY=off") as caught:
        Recognizer()
    assert "Processor not found" in str(caught.value.__cause__)


def test_without_any_recogniser_it_is_said_how_to_get_one(no_faster_whisper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(ModelLoadError, match="--extra verify"):
        Recognizer()
