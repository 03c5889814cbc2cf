"""Presets: the shipped ones, the faults a file can have, and changes while running."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT
from hypothesis import given
from hypothesis import strategies as st

from errors import InvalidVoiceError
from voice_presets import OPENAI_VOICES, VoicePresetManager

GOOD: dict[str, Any] = {"name": "mine", "model": "hibari", "voice_key": "heart"}


def write(folder: Path, file: str, content: object) -> None:
    (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))


def manager(folder: Path, default: str = "mine") -> VoicePresetManager:
    write(folder, "mine.json", GOOD)
    return VoicePresetManager(folder, default)


def test_the_shipped_presets_are_the_users_and_the_built_in_voice() -> None:
    presets = VoicePresetManager(PROJECT / "presets", "conversational")
    assert presets.refresh().names() == ["conversational", "conversational_b", "emma", "fenrir", "heart", "hibari-fable", "kore"]
    assert presets.catalog.skipped == ()
    first = presets.refresh().resolve("conversational").preset
    assert (first.voice_key, first.speaker_id, first.temperature, first.top_k, first.max_audio_length_ms) == ("conversational_a", 0, 0.9, 50, 90_000)  # fmt: skip
    assert presets.refresh().resolve("conversational_b").preset.speaker_id == 1
    assert presets.refresh().resolve("heart").preset.model == "hibari"


def test_openai_names_reach_the_default_voice_unless_a_preset_claims_them(tmp_path: Path) -> None:
    presets = manager(tmp_path)
    write(tmp_path, "other.json", GOOD | {"name": "other", "aliases": ["coral"]})
    voices = presets.refresh()
    assert voices.resolve("coral").preset.name == "other"
    assert {voices.resolve(name).preset.name for name in OPENAI_VOICES if name != "coral"} == {"mine"}
    assert voices.aliases_of(voices.resolve("other")) == ["coral"]
    assert "alloy" in voices.aliases_of(voices.resolve("mine"))
    assert "coral" not in voices.aliases_of(voices.resolve("mine"))


@pytest.mark.parametrize(("content", "reason"), [
    ("{", "broken JSON"),
    ("[]", "one JSON object"),
    ("[" * 100_000, "larger than"),
    ("[" * 50_000, "nested"),
    (GOOD | {"name": "mine"}, "already the name"),
    ({"voice_key": "conversational_a"}, "name is missing"),
    (GOOD | {"name": "../etc"}, "name: '../etc'"),
    (GOOD | {"name": "x", "tempreature": 1}, "tempreature: unknown key; known keys: name, display_name, model"),
    (GOOD | {"name": "x", "temperature": "warm"}, "temperature: 'warm'"),
    (GOOD | {"name": "x", "top_k": 0}, "top_k: 0"),
    (GOOD | {"name": "x", "model": "gpt"}, "known models: csm-1b, hibari"),
    (GOOD | {"name": "x", "aliases": ["mine"]}, "aliases: 'mine' is already the name of another preset"),
    ({"name": "x", "voice_key": "conversational_z"}, "known voices: conversational_a, conversational_b"),
    (GOOD | {"name": "x", "voice_key": "anna"}, "known voices: heart, emma, fable, fenrir, kore"),
    ({"name": "x", "ref_audio": "a.wav"}, "ref_text must hold the words"),
    ({"name": "x", "ref_audio": "a.wav", "ref_text": " \n"}, "ref_text must hold the words"),
    *(({"name": "x", "ref_audio": path, "ref_text": "Hi."}, "ref_audio must be a file in the preset's folder")
      for path in ("../a.wav", "/a.wav", "voices/../../a.wav", "", ".")),
    ({"name": "x", "ref_text": "Hello."}, "without ref_audio"),
    ({"name": "x", "voice_key": "conversational_a", "ref_audio": "a.wav", "ref_text": "Hi."}, "are mutually exclusive"),
    ({"name": "x", "voice_key": "conversational_a", "speaker_embedding_path": "x.pt"}, "speaker_embedding_path"),
])  # fmt: skip
def test_a_bad_file_is_skipped_with_its_reason_and_the_others_load(tmp_path: Path, content: object, reason: str) -> None:
    presets = manager(tmp_path)
    write(tmp_path, "zz-bad.json", content)
    assert presets.refresh().names() == ["mine"]
    (skipped,) = presets.catalog.skipped
    assert skipped.file == "zz-bad.json"
    assert reason in skipped.reason
    assert str(tmp_path) not in skipped.reason


def test_a_name_may_not_be_anothers_alias_whichever_file_comes_first(tmp_path: Path) -> None:
    presets = manager(tmp_path)
    write(tmp_path, "aa-first.json", GOOD | {"name": "first", "aliases": ["mine"]})
    assert presets.refresh().names() == ["first"]
    assert "already an alias of 'first'" in presets.catalog.skipped[0].reason


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "marked.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD | {"name": "marked"}).encode())
    assert manager(tmp_path).catalog.names() == ["marked", "mine"]


def test_files_that_cannot_be_read_as_text_are_skipped(tmp_path: Path) -> None:
    presets = manager(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.json").mkdir()
    assert presets.refresh().names() == ["mine"]
    assert {skipped.file for skipped in presets.catalog.skipped} == {"binary.json", "folder.json"}


def test_changes_in_the_folder_are_seen_at_once(tmp_path: Path) -> None:
    presets = manager(tmp_path)
    assert presets.refresh().names() == ["mine"]
    write(tmp_path, "new.json", GOOD | {"name": "new"})
    assert presets.refresh().names() == ["mine", "new"]
    write(tmp_path, "new.json", GOOD | {"name": "newer"})
    assert presets.refresh().names() == ["mine", "newer"]
    (tmp_path / "new.json").unlink()
    assert presets.refresh().names() == ["mine"]


def test_a_snapshot_stays_as_it_is_and_is_read_at_first_use(tmp_path: Path) -> None:
    presets = manager(tmp_path)
    first = presets.catalog
    assert first.names() == ["mine"]
    write(tmp_path, "new.json", GOOD | {"name": "new"})
    assert presets.changed()
    assert presets.catalog is first
    assert presets.refresh().names() == ["mine", "new"]
    assert first.names() == ["mine"]
    assert not first.knows("new")
    assert presets.refresh() is presets.catalog


def test_a_folder_that_goes_away_leaves_no_voice_and_no_crash(tmp_path: Path) -> None:
    folder = tmp_path / "presets"
    folder.mkdir()
    presets = manager(folder)
    assert presets.refresh().names() == ["mine"]
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(InvalidVoiceError, match="Available voices: none"):
        presets.refresh().resolve("mine")
    (tmp_path / "elsewhere").rename(folder)
    assert presets.refresh().resolve("mine").preset.name == "mine"


@given(content=st.binary(max_size=200) | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_no_content_of_a_file_breaks_the_others(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("presets")
    presets = manager(folder)
    (folder / "any.json").write_bytes(content)
    assert presets.refresh().names() == ["mine"]
    assert len(presets.catalog.skipped) == 1


def test_people_see_a_presets_display_name_or_one_made_from_its_name(tmp_path: Path) -> None:
    write(tmp_path, "a.json", GOOD | {"name": "my_voice-two"})
    write(tmp_path, "b.json", GOOD | {"name": "b", "display_name": "Grandmother"})
    catalog = VoicePresetManager(tmp_path, "b").catalog
    assert [voice.display_name for voice in catalog.voices] == ["Grandmother", "My voice two"]
