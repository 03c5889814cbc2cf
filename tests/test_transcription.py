"""Recognisers: faster-whisper on real speech, and mlx-audio's Whisper, which Macs use, on a checkpoint with one fixed transcript."""

from __future__ import annotations

import importlib.util
import socket
from importlib.machinery import ModuleSpec
from pathlib import Path

import as_mac
import numpy as np
import pytest
import tiny_csm
import tiny_whisper

from hibari_model import HibariModel
from speech_model import ModelLoadError, SpeechOptions
from transcription import HeardWord, Recognizer, compare, installed_recognizer
from voice_presets import Voice, VoicePreset

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
    monkeypatch.setattr("config.system_and_processor", as_mac.system_and_processor)


@pytest.fixture(scope="module")
def recognizer() -> Recognizer:
    """Loading it takes a second."""
    return Recognizer()


def test_the_word_error_rate_of_real_speech(recognizer: Recognizer) -> None:
    from hibari import Hibari

    text = "In 1984, seventy-seven thousand people came; the harbour wasn't ready."
    samples = np.asarray(Hibari()(text, seed=1), np.float32).reshape(-1)
    right, wrong = recognizer.hear(text, samples), recognizer.hear("Something that nobody has said at all today.", samples)
    assert right is not None
    assert right.word_error_rate <= 0.2
    assert not right.wrong
    assert wrong is not None
    assert wrong.word_error_rate > 0.8
    assert wrong.wrong
    for unchecked in ("我们今天早上去了港口。", "…", "Hello there."):
        assert recognizer.hear(unchecked, samples) is None


def test_an_endless_reading_ends_after_its_last_right_word_and_its_words_have_times(recognizer: Recognizer) -> None:
    from hibari import Hibari

    text = "The rain has stopped, and the harbour is quiet again."
    voice = Hibari()
    said, more = (np.asarray(voice(words, seed=1), np.float32) for words in (text, "is quiet again, is quiet again, is quiet"))
    hearing = recognizer.hear(text, np.concatenate([said, more]), times=True)
    assert hearing is not None
    assert hearing.wrong
    assert hearing.end == pytest.approx(len(said) / 24_000, abs=0.4)
    assert [text[word.start_char : word.end_char] for word in hearing.words] == text.replace(",", "").rstrip(".").split()
    times = [moment for word in hearing.words for moment in (word.start, word.end)]
    assert times == sorted(times)
    assert times[-1] == hearing.end


def test_the_times_of_words_are_those_of_the_voice(recognizer: Recognizer) -> None:
    """The built-in voice knows when it speaks each word."""
    text = "In 1984, the harbour wasn't ready: nobody had asked for ten thousand boats."
    model = HibariModel()
    model.load(lambda _: None)
    voice = Voice(VoicePreset(name="heart", model="hibari", voice_key="heart"), Path())
    chunks = list(model.speak([text], voice, SpeechOptions(1), lambda: False))
    heard = recognizer.word_times(text, np.concatenate([chunk.samples for chunk in chunks]))
    starts = {word.start_char: word.start for word in heard}
    spoken = [word for word in chunks[-1].words if word.start_char in starts]
    assert len(spoken) >= len(text.split()) - 1
    assert np.median([abs(starts[word.start_char] - word.start) for word in spoken]) < 0.15
    assert max(word.end for word in heard) <= sum(len(chunk.samples) for chunk in chunks) / 24_000 + 0.1


def test_noise_has_no_words_and_no_times(recognizer: Recognizer) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32)
    assert recognizer.word_times("The rain has stopped again.", noise) == ()
    assert recognizer.word_times("我们今天早上去了港口。", noise) == ()


LONG = "One morning the boy went down to the river to look for his friend but found nobody there"


@pytest.mark.parametrize(
    ("heard", "wrong"),
    [
        (LONG, False),
        (LONG.replace("river", "liver").replace("boy", "buoy"), False),  # a recogniser's own errors
        (LONG.replace("to look for his friend ", ""), True),  # a part is missing
        (LONG.replace("nobody there", ""), False),
        (LONG.replace("but found nobody there", ""), True),
        (f"{LONG} but found nobody there", True),
        (LONG.replace("the boy went", "the the the the boy went"), True),
        ("Something else that nobody has ever asked for in this place on any day", True),
        ("", True),
    ],
)
def test_missing_repeated_and_other_words_are_wrong_and_a_recognisers_own_errors_are_not(heard: str, wrong: bool) -> None:
    assert compare(LONG, [HeardWord(heard)]).wrong == wrong


def test_written_forms_equal_their_words() -> None:
    text = "In nineteen eighty four, seventy-seven thousand and five people paid twelve dollars and fifty cents, or twenty percent more."
    hearing = compare(text, [HeardWord(" In 1984, 77,005 people paid $12.50, or 20% more.")])
    assert hearing.word_error_rate <= 0.1
    assert not hearing.wrong


def test_words_that_were_not_heard_are_between_their_neighbours() -> None:
    hearing = compare("A cat sleeps here", [HeardWord(" A", 0.1, 0.4), HeardWord(" here.", 1.0, 1.5)], times=True)
    assert [(round(word.start, 2), round(word.end, 2)) for word in hearing.words] == [(0.1, 0.4), (0.4, 0.7), (0.7, 1.0), (1.0, 1.5)]


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
        right, wrong = check.hear("The rain has stopped.", noise), check.hear("The rain had not stopped.", noise)
        assert right is not None
        assert right.word_error_rate == 0
        assert wrong is not None
        assert wrong.word_error_rate == 2 / 5
        timed = check.hear("The rain has stopped.", noise, times=True)
        assert timed is not None
        assert (timed.word_error_rate, timed.wrong, timed.end) == (0, False, None)
        assert check.word_times("The rain has stopped.", noise) == ()  # random weights place all words at 0
        assert installed_recognizer() is not None
    assert asked == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore:Could not load WhisperProcessor")
def test_a_whisper_that_cannot_write_words_is_refused_when_it_is_loaded(mac: None, tmp_path: Path) -> None:
    checkpoint = tiny_whisper.build(tmp_path, HEARD, processor=False)
    with tiny_csm.activated(checkpoint), pytest.raises(ModelLoadError, match="VERIFY=off") as caught:
        Recognizer()
    assert "Processor not found" in str(caught.value.__cause__)


def test_without_any_recogniser_it_is_said_how_to_get_one(no_faster_whisper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("config.system_and_processor", lambda: ("linux", "x86_64"))
    with pytest.raises(ModelLoadError, match="--extra verify"):
        Recognizer()
    assert installed_recognizer() is None


def test_where_the_weights_are_missing_nothing_is_downloaded(mac: None, tmp_path: Path) -> None:
    with tiny_csm.activated(tmp_path):
        assert installed_recognizer() is None
