"""The owner's pronunciations: which words they apply to, the faults of their file, and that they are heard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hibari
import httpx
import pytest
from conftest import PROJECT, RunningServer
from listening import decode, transcribe

from pronunciations import FILE, PHONEMES, read_pronunciations
from text_verbalizer import SpokenSegments, verbalize
from voice_presets import VoicePresetManager

ENTRIES: dict[str, Any] = {
    "Nguyen": "win",
    "New York": "the big apple",
    "york": "pork",
    "SQL": {"say": "sequel", "case_sensitive": True},
    "hibari": {"say": "hee bah ree", "ipa": "hɪˈbɑri"},
    "route": "/raʊt/",
    "C++": "see plus plus",
    "$5": "a fiver",
}


def written(folder: Path, content: object) -> Path:
    path = folder / FILE
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("text", "phonetic", "other"),
    [
        ("Mrs. Nguyen's NGUYEN.", "Misses win's win.", None),
        ("New York, york, Yorkshire and new yorkers.", "the big apple, pork, Yorkshire and new yorkers.", None),
        ("SQL and sql and MySQL.", "sequel and sql and MySQL.", None),
        ("A hibari on Route 5.", "A [hibari](/hɪˈbɑɹi/) on [Route](/ɹWt/) five.", "A hee bah ree on Route five."),
        ("I paid $5 for C++!", "I paid a fiver for see plus plus!", None),
    ],
)
def test_whole_words_are_replaced_before_all_rules(tmp_path: Path, text: str, phonetic: str, other: str | None) -> None:
    known = read_pronunciations(written(tmp_path, ENTRIES))
    assert verbalize(text, "en", known.pronounce(phonemes=True)).text == phonetic
    spoken = verbalize(text, "en", known.pronounce(phonemes=False))
    assert spoken.text == (other or phonetic)
    assert "".join(text[piece.start : piece.end] for piece in spoken.pieces) == text
    assert SpokenSegments([text], None, known.pronounce(phonemes=True))[0] == text


def test_the_signs_are_those_of_the_voices() -> None:
    vocabulary = json.loads(Path(hibari.__file__).with_name("assets").joinpath("vocab.json").read_text())
    assert set(PHONEMES) == {sign for sign in vocabulary if sign not in ' ;:,.!?—…"()“”'}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "broken JSON"),
        ('["a"]', "one JSON object"),
        ({"a": 5}, "'a' must be a respelling"),
        ({"a": {"say": "b", "cased": True}}, "'a' must be a respelling"),
        ({"a": {}}, "neither say nor ipa"),
        ({"a": ""}, "neither say nor ipa"),
        ({"a": "b" * 201}, "at most 200"),
        ({"A": "x", "a": "y"}, "twice"),
        ({" ": "x"}, "one of them a letter or digit"),
        ({"x" * 101: "x"}, "1 to 100"),
        ({"a": "/h%/"}, "the sign '%'"),
        (b"\xff".decode("latin-1") * 300_000, "larger than"),
    ],
)
def test_a_fault_is_reported_as_that_of_a_preset(tmp_path: Path, content: object, reason: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=reason):
        read_pronunciations(path)
    shutil.copy(PROJECT / "presets" / "heart.json", tmp_path)
    catalog = VoicePresetManager(tmp_path, "heart").refresh()
    assert [(skipped.file, reason in skipped.reason) for skipped in catalog.skipped] == [(FILE, True)]
    assert catalog.names() == ["heart"]


def test_they_are_heard_at_once_and_words_stay_in_place(make_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    presets = tmp_path / "presets"
    shutil.copytree(PROJECT / "presets", presets)
    server = make_server(PRESETS_DIR=presets)
    text = "We met Mr. Szczepan in the route office."

    def heard(**fields: Any) -> str:
        body = {"model": "m", "voice": "heart", "input": text, "response_format": "wav", "seed": 1, "timestamps": "word"} | fields
        answer = httpx.post(f"{server.url}/v1/audio/speech", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        words = httpx.get(f"{server.url}{answer.headers['X-Timestamps']}").json()["words"]
        assert [text[word["start_char"] : word["end_char"]] for word in words] == [word["text"] for word in words]
        assert "".join(word["text"] for word in words) == "WemetMrSzczepanintherouteoffice" or words[-1]["text"] == "the route office"
        return transcribe(*decode(answer.content, "wav")).lower()

    assert "banana" not in heard()
    written(presets, {"szczepan": "banana", "the route office": {"say": "the root office", "ipa": "ðə ˈwɪndoʊ"}})
    now = heard()
    assert "banana in the window" in now
    assert "banana" not in heard(normalize=False)
    written(presets, "{")
    assert "banana" not in heard()
    assert [skipped["file"] for skipped in server.health()["skipped_presets"]] == [FILE]
