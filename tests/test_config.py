"""Settings: sources, validation messages, documentation."""

from __future__ import annotations

import os
import re
from pathlib import Path

import as_mac
import pytest
from conftest import PROJECT
from hypothesis import example, given
from hypothesis import strategies as st

from config import Settings, SettingsError, load_settings

NONE = Path("/nonexistent/.env")


@pytest.fixture(autouse=True, params=["this machine", "mac"])
def _clean(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.param == "mac":
        monkeypatch.setattr("config.system_and_processor", as_mac.system_and_processor)
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_the_defaults_are_the_users_table() -> None:
    settings = load_settings(NONE)
    assert (settings.host, settings.port, settings.log_level) == ("0.0.0.0", 8880, "info")
    assert (settings.model_id, settings.default_format, settings.max_input_length) == ("sesame/csm-1b", "mp3", 4096)
    assert settings.cache_dir == Path.home() / ".cache" / "sesame-tts"
    assert settings.presets_dir == PROJECT / "presets"
    assert settings.default_voice == ("conversational" if settings.csm_enabled else "heart")


@pytest.mark.parametrize(("system", "processor", "csm", "voice"), [
    ("darwin", "arm64", "auto", "conversational"),
    ("darwin", "arm64", "on", "conversational"),
    ("darwin", "arm64", "off", "heart"),
    ("darwin", "x86_64", "auto", "heart"),
    ("linux", "aarch64", "on", "conversational"),
    ("linux", "x86_64", "off", "heart"),
])  # fmt: skip
def test_the_default_voice_follows_the_machine_and_csm(
    monkeypatch: pytest.MonkeyPatch, system: str, processor: str, csm: str, voice: str
) -> None:
    monkeypatch.setattr("config.system_and_processor", lambda: (system, processor))
    monkeypatch.setenv("CSM", csm)
    settings = load_settings(NONE)
    assert (settings.default_voice, settings.csm_enabled) == (voice, voice == "conversational")
    monkeypatch.setenv("DEFAULT_VOICE", "nobody")
    assert load_settings(NONE).default_voice == "nobody"


def test_the_environment_overrides_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / ".env"
    file.write_text("PORT=1234\nDEFAULT_VOICE=heart\nAPI_KEY=one, two\nHF_TOKEN=\n")
    monkeypatch.setenv("PORT", "4321")
    settings = load_settings(file)
    assert (settings.port, settings.default_voice) == (4321, "heart")
    assert [key.get_secret_value() for key in settings.api_key] == ["one", "two"]


def test_an_empty_value_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFAULT_VOICE", "")
    monkeypatch.setenv("PORT", "")
    assert load_settings(NONE).port == 8880


def test_paths_are_made_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIR", "~/somewhere")
    monkeypatch.setenv("PRESETS_DIR", "./voices")
    settings = load_settings(NONE)
    assert settings.cache_dir == Path.home() / "somewhere"
    assert settings.presets_dir == PROJECT / "voices"


def test_hugging_faces_variables_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "")
    monkeypatch.delenv("HF_ENDPOINT")
    file = tmp_path / ".env"
    file.write_text("HF_ENDPOINT=http://127.0.0.1:9\n")
    load_settings(file)
    assert os.environ["HF_ENDPOINT"] == "http://127.0.0.1:9"


@pytest.mark.parametrize(("name", "value", "allowed"), [
    ("PORT", "70000", "less than or equal to 65535"),
    ("MAX_BATCH", "0", "greater than or equal to 1"),
    ("GUARD", "perhaps", "'on' or 'off'"),
    ("MODEL_DTYPE", "int3", "'bfloat16'"),
    ("QUEUE_TIMEOUT", "soon", "number"),
])  # fmt: skip
def test_a_bad_value_names_variable_value_and_what_is_allowed(monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings(NONE)
    message = str(caught.value)
    assert message.startswith(f"{name}='{value}' cannot be used: ")
    assert allowed in message
    assert "\n" not in message


def test_a_misspelled_name_in_the_file_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("DEFUALT_VOICE=heart\n")
    with pytest.raises(SettingsError, match="Did you mean DEFAULT_VOICE"):
        load_settings(file)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_bytes(b"PORT=\xff\xfe")
    with pytest.raises(SettingsError, match="UTF-8"):
        load_settings(file)


@example("cache_dir", "~nobody-of-this-name")
@given(
    name=st.sampled_from(sorted(Settings.model_fields)),
    value=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40),
)
def test_any_value_gives_settings_or_one_clear_line(name: str, value: str) -> None:
    os.environ[name.upper()] = value
    try:
        load_settings(NONE)
    except SettingsError as error:
        assert str(error).startswith(f"{name.upper()}=")  # noqa: PT017 - both outcomes are valid
    finally:
        del os.environ[name.upper()]


def test_a_key_is_never_shown() -> None:
    settings = Settings(api_key="topsecret")
    assert "topsecret" not in repr(settings)


@pytest.mark.parametrize("document", [".env.example", "README.md"])
def test_every_setting_is_documented(document: str) -> None:
    text = (PROJECT / document).read_text()
    missing = [name.upper() for name in Settings.model_fields if not re.search(rf"\b{name.upper()}\b", text)]
    assert missing == []


def test_the_example_holds_exactly_the_settings_with_their_defaults(tmp_path: Path) -> None:
    example = PROJECT / ".env.example"
    names = re.findall(r"^([A-Z_]+)=", example.read_text(), re.M)
    assert sorted(names) == sorted(name.upper() for name in Settings.model_fields)
    assert load_settings(example) == load_settings(NONE)


def test_added_voices_are_in_the_platforms_data_folder_unless_cache_dir_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    home, old = Path.home(), Path.home() / ".cache" / "sesame-tts" / "voices"
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr("config.on_mac", lambda: False)
    assert load_settings(NONE).voice_folders == (home / ".local" / "share" / "sesame-tts" / "voices", old)
    monkeypatch.setattr("config.on_mac", lambda: True)
    assert load_settings(NONE).voice_folders == (home / "Library" / "Application Support" / "sesame-tts" / "voices", old)
    monkeypatch.setenv("CACHE_DIR", "/data")
    assert load_settings(NONE).voice_folders == (Path("/data/voices"), Path("/data/voices"))
    monkeypatch.setenv("DATA_DIR", "~/my voices")
    assert load_settings(NONE).voice_folders == (home / "my voices" / "voices", Path("/data/voices"))
