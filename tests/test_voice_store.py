"""Voices that people added, on the disk and among the presets; and the recordings that presets name."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import listening
import numpy as np
import pytest
import soundfile
from conftest import PROJECT

from errors import ConflictError, InvalidRequestError, InvalidVoiceError, NotFoundError, StorageError
from recordings import read_recording
from voice_presets import OPENAI_VOICES, VoicePresetManager
from voice_store import MAX_NAME, MAX_VOICES, VoiceStore, clean_name

RATE = 24_000
OTHER_PLACES = ("/dev/shm", tempfile.gettempdir(), PROJECT)  # noqa: S108 - one of them is on another file system than tmp_path
TONE = (0.3 * np.sin(2 * np.pi * 220 * np.arange(2 * RATE) / RATE)).astype(np.float32)

BUILT_IN = {"model": "hibari", "voice_key": "heart"}

ADD_FOR_EVER = """
import sys, itertools, numpy as np
from pathlib import Path
from voice_store import VoiceStore
store = VoiceStore(Path(sys.argv[1]))
for i in itertools.count():
    voice = store.add(f"{sys.argv[2]} {i}", np.full(500_000, 0.5, np.float32), "words", "true")
    print(voice.id, flush=True)
    if i % 2:
        store.delete(voice.id)
"""
ADD_ONE_NAME = """
import sys, numpy as np
from pathlib import Path
from errors import ConflictError
from voice_store import VoiceStore
store = VoiceStore(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read(1)
try:
    store.add("Anna", np.full(50_000, 0.5, np.float32), "words", "true")
    print("added")
except ConflictError:
    print("taken")
"""


def store(folder: Path) -> VoiceStore:
    return VoiceStore(folder / "voices")


def add(voices: VoiceStore, name: str = "Anna", seconds: float = 1.0) -> str:
    return voices.add(name, TONE[: int(seconds * RATE)], "These are the words.", "true").id


def left_in(folder: Path) -> list[str]:
    """Everything in the store's folder but the lock."""
    return sorted(str(path.relative_to(folder / "voices")) for path in (folder / "voices").rglob("*") if path.name != ".lock")


def names(voices: VoiceStore) -> list[str]:
    return [voice.description.name for voice in voices.voices()]


def manager(folder: Path, presets: dict[str, dict[str, Any]] | None = None, default: str = "mine") -> VoicePresetManager:
    (folder / "presets").mkdir(exist_ok=True)
    for name, fields in {"mine": BUILT_IN | {"aliases": ["Own"]}, **(presets or {})}.items():
        (folder / "presets" / f"{name}.json").write_text(json.dumps({"name": name} | fields))
    return VoicePresetManager(folder / "presets", default, store(folder))


def test_a_voice_outlives_the_server_as_24_khz_mono_16_bit(tmp_path: Path) -> None:
    before = time.time()
    voice_id = add(store(tmp_path), "José Ω", seconds=1.5)
    (voice,) = store(tmp_path).voices()
    about = voice.description
    assert (voice.id, about.name, about.ref_text, about.consent, about.seconds) == (voice_id, "José Ω", "These are the words.", "true", 1.5)
    assert before - 1 <= about.created_at <= time.time()
    assert about.consent_date.endswith("+00:00")
    info = soundfile.info(voice.folder / "recording.wav")
    assert (info.samplerate, info.channels, info.subtype, info.frames) == (RATE, 1, "PCM_16", 36_000)
    samples, _ = soundfile.read(voice.folder / "recording.wav", dtype="float32")
    assert np.abs(samples - TONE[:36_000]).max() < 1e-4


def test_ids_tell_nothing_and_other_users_of_the_machine_cannot_read_voices(tmp_path: Path) -> None:
    first, second = add(store(tmp_path), "Anna"), add(store(tmp_path), "Berta")
    assert first != second
    assert "anna" not in first.lower()
    for folder in (tmp_path / "voices", tmp_path / "voices" / first):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["Anna", "José", "Jose\u0301", "王小明", "Ольга", "O’Neill (old mic)", "Mary-Ann & Co. 2", "x" * MAX_NAME, "  Anna   B. ", "आरती", "7"])  # fmt: skip
def test_peoples_names_are_names(name: str) -> None:
    assert clean_name(name)
    assert clean_name(clean_name(name)) == clean_name(name)


@pytest.mark.parametrize("name", ["", "   ", "x" * (MAX_NAME + 1), "../etc", "a/b", "a\\b", "..", ".hidden", "a\nb", "a\x00b", "a\tb", "\u202eanna", "an\u200bna", "<b>", '"', "🎉", "-o", "voice_" + "0" * 24, "a;b", "\u0301", "\ud800"])  # fmt: skip
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        clean_name(name)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_name", "name")


def test_a_name_that_people_would_take_for_another_is_taken(tmp_path: Path) -> None:
    voices = store(tmp_path)
    add(voices, clean_name("José"))
    for name in ("José", "JOSÉ", "jose\u0301"):
        with pytest.raises(ConflictError, match="taken"):
            add(voices, clean_name(name))
    assert len(voices.voices()) == 1


def test_there_is_a_limit(tmp_path: Path) -> None:
    voices = store(tmp_path)
    for number in range(MAX_VOICES):
        add(voices, f"voice {number}", seconds=0.01)
    with pytest.raises(ConflictError) as caught:
        add(voices, "one more")
    assert caught.value.code == "too_many_voices"
    voices.delete(voices.voices()[0].id)
    add(voices, "one more")


def test_a_damaged_voice_is_left_out_with_a_warning_and_the_others_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    voices = store(tmp_path)
    ids = [add(voices, f"voice {number}") for number in range(6)]
    folders = [tmp_path / "voices" / each for each in ids]
    (folders[0] / "voice.json").write_bytes(b"{")
    (folders[1] / "voice.json").unlink()
    (folders[2] / "recording.wav").write_bytes((folders[2] / "recording.wav").read_bytes()[:1000])
    (folders[3] / "recording.wav").write_bytes(b"")
    shutil.rmtree(folders[4])
    folders[4].mkdir()
    with caplog.at_level(logging.WARNING):
        assert names(store(tmp_path)) == ["voice 5"]
    assert len(caplog.records) == 5
    assert str(tmp_path) not in caplog.text
    add(voices, "another")
    voices.delete(ids[0])
    assert set(names(voices)) == {"voice 5", "another"}


@pytest.mark.parametrize("attempt", range(3))
def test_a_process_that_is_killed_leaves_nothing_half_done(tmp_path: Path, attempt: int) -> None:
    command = [sys.executable, "-c", ADD_FOR_EVER, str(tmp_path / "voices"), f"killed {attempt}"]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.01 + 0.017 * attempt)
        process.kill()
    (tmp_path / "voices" / ".unfinished-left").mkdir()  # so that there is a leftover whatever the moment was
    voices = store(tmp_path)
    assert len(voices.voices()) == len([path for path in left_in(tmp_path) if path.endswith("voice.json") and not path.startswith(".")])
    voices.clean()
    assert not [path for path in left_in(tmp_path) if path.startswith(".unfinished")]
    add(voices, "after")
    assert "after" in names(voices)


def test_of_two_that_want_one_name_at_once_one_gets_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ADD_ONE_NAME, str(tmp_path / "voices")]
    with (
        subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first,
        subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as second,
    ):
        for process in (first, second):
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        for process in (first, second):
            assert process.stdin is not None
            process.stdin.write(b"go")
            process.stdin.flush()
        answers = [process.stdout.read().decode().strip() for process in (first, second) if process.stdout]
    assert sorted(answers) == ["added", "taken"]


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    voices = store(tmp_path)
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, kept[1]))  # a file of 48 kB fails while it is written, as on a full disk
    try:
        with pytest.raises(StorageError, match="cannot change its folder of voices: File too large") as caught:
            add(voices)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert (caught.value.status, caught.value.code) == (500, "storage_failed")
    assert str(tmp_path) not in caught.value.message
    assert left_in(tmp_path) == []
    add(voices)


def test_a_folder_that_cannot_be_made_is_told_and_hinders_no_start(tmp_path: Path) -> None:
    (tmp_path / "voices").write_text("a file is in the way")
    voices = store(tmp_path)
    voices.clean()
    assert voices.voices() == []
    with pytest.raises(StorageError):
        add(voices)


def test_deleting_takes_all_that_was_made_from_the_recording_with_it(tmp_path: Path) -> None:
    voices = store(tmp_path)
    voice_id = add(voices)
    folder = tmp_path / "voices" / voice_id
    (folder / "0123.codes").write_bytes(b"made from the recording")
    with (folder / "recording.wav").open("rb") as reading:
        voices.delete(voice_id)
        assert len(reading.read()) > 48_000  # who is reading it, reads on
    assert left_in(tmp_path) == []
    with pytest.raises(NotFoundError):
        voices.delete(voice_id)


@pytest.mark.parametrize("voice_id", ["", "..", ".", "../presets", ".lock", "voice_0", "voice_" + "0" * 24, "voice_" + "0" * 24 + "\n", "/etc", "a\x00b"])  # fmt: skip
def test_no_other_folder_can_be_deleted(tmp_path: Path, voice_id: str) -> None:
    voices = store(tmp_path)
    add(voices)
    (tmp_path / "presets").mkdir()
    with pytest.raises(NotFoundError):
        voices.delete(voice_id)
    assert (tmp_path / "presets").is_dir()
    assert len(voices.voices()) == 1


def test_added_voices_are_reached_by_id_and_by_name(tmp_path: Path) -> None:
    presets = manager(tmp_path)
    assert presets.refresh().names() == ["mine"]
    voice_id = add(store(tmp_path), "José")  # another store on the same folder, as another process has it
    assert presets.refresh().names() == ["mine", "José"]
    for name in (voice_id, "José", "josé", "Jose\u0301"):
        voice = presets.refresh().resolve(name)
        assert (voice.id, voice.name, voice.uploaded, voice.preset.model) == (voice_id, "José", True, "csm-1b")
    assert (voice.folder / (voice.preset.ref_audio or "")).is_file()
    assert voice.preset.ref_text == "These are the words."
    assert presets.catalog.aliases_of(presets.catalog.resolve(voice_id)) == []
    store(tmp_path).delete(voice_id)
    assert presets.refresh().names() == ["mine"]
    with pytest.raises(InvalidVoiceError):
        presets.refresh().resolve("José")


def test_added_voices_never_take_the_place_of_a_preset(tmp_path: Path) -> None:
    presets = manager(tmp_path)
    for name in ("mine", "MINE", "own", *OPENAI_VOICES, "Alloy"):
        with pytest.raises(ConflictError):
            presets.catalog.check_new_name(name)
    presets.catalog.check_new_name("Anna")
    voice_id = add(store(tmp_path), "Anna")
    manager(tmp_path, {"Anna": BUILT_IN})  # the owner takes the name later
    assert not presets.refresh().resolve("Anna").uploaded
    assert presets.refresh().resolve(voice_id).uploaded


def test_an_added_voice_can_be_the_default(tmp_path: Path) -> None:
    presets = manager(tmp_path, default="Anna")
    with pytest.raises(InvalidVoiceError):
        presets.refresh().resolve("alloy")
    presets.catalog.check_new_name("Anna")
    voice_id = add(store(tmp_path), "Anna")
    assert presets.refresh().resolve("alloy").id == voice_id
    assert presets.catalog.aliases_of(presets.catalog.resolve(voice_id)) == sorted(OPENAI_VOICES)


def ref(path: str) -> dict[str, Any]:
    return {"ref_audio": path, "ref_text": "These are the words."}


def write_tone(path: Path, seconds: float = 1.5, level: float = 1.0) -> None:
    soundfile.write(path, np.resize(TONE * level, int(seconds * RATE)), RATE)


def test_presets_with_a_recording_that_will_not_do_are_skipped_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "presets"
    folder.mkdir()
    write_tone(folder / "silent.wav", level=0.0)
    write_tone(folder / "long.wav", seconds=61)
    write_tone(folder / "short.wav", seconds=0.5)
    (folder / "text.wav").write_text("no sound")
    write_tone(folder / "good.wav")
    files = ["silent", "long", "short", "text", "missing", "good", "no\x00name"]
    presets = manager(tmp_path, {file.replace("\x00", ""): ref(f"{file}.wav") for file in files})
    assert presets.refresh().names() == ["good", "mine"]
    reasons = {skipped.file: skipped.reason for skipped in presets.catalog.skipped}
    expected = {"silent": "silent", "long": "more than 60 s", "short": "0.50 s", "text": "cannot be read as sound", "missing": "is not there", "noname": "is not there"}  # fmt: skip
    assert set(reasons) == {f"{name}.json" for name in expected}
    for name, reason in expected.items():
        assert reasons[f"{name}.json"].startswith("ref_audio: the recording")
        assert reason in reasons[f"{name}.json"]
        assert str(tmp_path) not in reasons[f"{name}.json"]


def count_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Put an ffmpeg that counts on PATH; the function returned says how often it was started."""
    counter = tmp_path / "runs"
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "ffmpeg"
    program.write_text(f'#!/bin/sh\necho run >> "{counter}"\nexec "{listening.ffmpeg()}" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def runs() -> int:
        return len(counter.read_text().splitlines())

    return runs


def test_a_recording_is_decoded_again_only_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_runs(tmp_path, monkeypatch)
    folder = tmp_path / "presets"
    (folder / "below").mkdir(parents=True)
    write_tone(folder / "a.wav")
    write_tone(folder / "below" / "b.wav", level=0.0)
    presets = manager(tmp_path, {"a": ref("a.wav"), "b": ref("below/b.wav"), "c": ref("a.wav")})
    assert presets.refresh().names() == ["a", "c", "mine"]
    assert runs() == 2
    manager(tmp_path, {"other": BUILT_IN})
    add(store(tmp_path), "Anna")
    assert presets.refresh().names() == ["a", "c", "mine", "other", "Anna"]
    assert runs() == 2
    write_tone(folder / "below" / "b.wav", seconds=1.7)
    assert presets.changed()
    presets.refresh()
    assert not presets.changed()
    assert presets.refresh().names() == ["a", "b", "c", "mine", "other", "Anna"]
    assert runs() == 3
    (folder / "a.wav").unlink()
    assert presets.refresh().names() == ["b", "mine", "other", "Anna"]
    assert runs() == 3


def test_a_recording_that_was_decoded_to_check_it_is_not_decoded_again_to_encode_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = count_runs(tmp_path, monkeypatch)
    folder = tmp_path / "presets"
    folder.mkdir()
    write_tone(folder / "a.wav")
    voice = manager(tmp_path, {"a": ref("a.wav")}).catalog.resolve("a")
    assert runs() == 1
    samples = read_recording(voice.folder / "a.wav")
    assert (len(samples), runs()) == (1.5 * RATE, 1)
    np.testing.assert_array_equal(read_recording(voice.folder / "a.wav"), samples)
    assert runs() == 2, "it is kept for one reader only"
    write_tone(folder / "a.wav", seconds=2.0)
    assert len(read_recording(folder / "a.wav")) == 2 * RATE


def test_decoded_recordings_are_bounded_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_runs(tmp_path, monkeypatch)
    folder = tmp_path / "presets"
    folder.mkdir()
    for name in "abcdef":
        write_tone(folder / f"{name}.wav")
    manager(tmp_path, {name: ref(f"{name}.wav") for name in "abcdef"}).refresh()
    for name in "abcdef":
        read_recording(folder / f"{name}.wav")
    assert runs() == 6 + 2


def test_voices_of_the_older_folder_are_moved_and_nothing_is_lost(tmp_path: Path) -> None:
    older = VoiceStore(tmp_path / "cache" / "voices")
    anna, berta = add(older, "Anna"), add(older, "Berta")
    both = VoiceStore(tmp_path / "data" / "voices", tmp_path / "cache" / "voices")
    assert [voice.id for voice in both.voices()] == sorted([anna, berta])
    signature = both.signature()
    both.clean()
    assert both.signature() == signature
    assert {voice.folder.parent for voice in both.voices()} == {tmp_path / "data" / "voices"}
    assert older.voices() == []
    late = add(older, "Carla")  # by a server of an earlier version
    assert late in [voice.id for voice in both.voices()]
    both.delete(late)
    both.delete(anna)
    assert [voice.id for voice in both.voices()] == [berta]


def test_voices_are_moved_to_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_system = next((Path(place) for place in OTHER_PLACES if _is_another_system(Path(place), tmp_path)), None)
    if other_system is None:
        pytest.skip("this machine has one file system")
    folder = Path(tempfile.mkdtemp(dir=other_system))
    try:
        anna = add(VoiceStore(folder / "voices"), "Anna")
        both = VoiceStore(tmp_path / "voices", folder / "voices")
        both.clean()
        assert [voice.folder for voice in both.voices()] == [tmp_path / "voices" / anna]
        assert list((tmp_path / "voices").glob(".unfinished*")) == []
    finally:
        shutil.rmtree(folder)


def _is_another_system(place: Path, folder: Path) -> bool:
    return os.access(place, os.W_OK) and place.stat().st_dev != folder.stat().st_dev


def test_voices_that_cannot_be_moved_are_used_where_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    anna = add(VoiceStore(tmp_path / "cache"), "Anna")
    (tmp_path / "data").write_text("a file where the folder should be")
    both = VoiceStore(tmp_path / "data", tmp_path / "cache")
    both.clean()
    assert "cannot change its folder of voices" in caplog.text
    assert [voice.id for voice in both.voices()] == [anna]
