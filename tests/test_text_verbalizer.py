"""Written forms become the words that a person would say, everything else stays, and each word leads back to what was written."""

from __future__ import annotations

import re
import time
from functools import cache
from pathlib import Path

import httpx
import pytest
from conftest import RunningServer
from hypothesis import given, settings
from hypothesis import strategies as st
from listening import listen, word_error_rate

from hibari_model import HibariModel, Pronunciation
from speech_model import SpeechOptions
from text_splitter import split_text
from text_verbalizer import SpokenSegments, foreign_words, mostly_foreign, verbalize
from voice_presets import Voice, VoicePreset

_LINES = Path(__file__).with_name("spoken_forms.tsv").read_text(encoding="utf-8").splitlines()
FORMS = [tuple(line.split("\t")) for line in _LINES if not line.startswith("#")]


def sounds(text: str) -> str:
    """The words of a text without case and punctuation."""
    return " ".join(re.sub(r"[^\w\s]|_", " ", text.lower()).split())


@pytest.mark.parametrize("kind", sorted({form[0] for form in FORMS}))
def test_written_forms_are_read_as_a_person_would(kind: str) -> None:
    wrong = [
        f"{written!r} as {said!r}, not {spoken!r}"
        for of_kind, written, spoken in FORMS
        if of_kind == kind and sounds(said := verbalize(written).text) != sounds(spoken)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_table_is_large_and_has_each_form_once() -> None:
    assert len(FORMS) >= 400
    assert len({form[1] for form in FORMS}) == len(FORMS)


@cache
def _pronunciation() -> Pronunciation:
    return Pronunciation(british=False)


@cache
def _hibari() -> HibariModel:
    model = HibariModel()
    model.load(lambda _: None)
    return model


def _phonemes(text: str, *, verbalized: bool) -> str:
    _pronunciation().verbalized = verbalized
    return re.sub(r"[^\w]|[ˈˌ]", "", _pronunciation()(text))


def test_the_built_in_voice_says_the_words_and_adds_none_of_its_own() -> None:
    """Its phonemes are those of the spoken words, and no sign is left for it to skip or to read its own way."""
    unlike = []
    for kind, written, spoken in FORMS:
        said = verbalize(written).text
        assert not re.search(r"[0-9$€£%@#=*\\]", said)
        if kind != "capitals" and _phonemes(said, verbalized=True) != _phonemes(spoken, verbalized=True):
            unlike.append((written, _phonemes(said, verbalized=True), _phonemes(spoken, verbalized=True)))
    assert not unlike, unlike


@pytest.mark.parametrize("verbalized", [True, False])
def test_no_at_the_end_of_a_sentence_is_not_a_number(verbalized: bool) -> None:
    model = _hibari()
    assert list(model.speak(["I said no."], _voice(), SpeechOptions(1, verbalize=verbalized), lambda: False))
    heart = model._voices["heart"]
    assert [ids for ids, _ in heart.sess.runs] == [heart.ids("ˌI sˈɛd nˈO.")]


def _voice() -> Voice:
    return Voice(preset=VoicePreset(name="heart", model="hibari", voice_key="heart"), folder=Path())


def test_accented_names_are_said() -> None:
    assert "hOzA" in _phonemes("José", verbalized=True)
    assert _phonemes("Zürich", verbalized=True) == _phonemes("Zurich", verbalized=True)
    assert "kæfA" in _phonemes("café", verbalized=True)


def test_plain_sentences_stay_and_keep_their_punctuation() -> None:
    text = 'Wait... "what?" she said; he - a friend - said: no! It\'s fine (really).'
    spoken = verbalize(text)
    assert spoken.text == text
    assert [(piece.start, piece.end) for piece in spoken.pieces] == [(0, len(text))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She lives on Elm St. It is quiet.", ["She lives on Elm St. ", "It is quiet."]),
        ("Dr. Smith met Mr. Lee at 3 p.m. They talked.", ["Dr. Smith met Mr. Lee at 3 p.m. ", "They talked."]),
        ("Cats vs. dogs, approx. 5 each.", ["Cats vs. dogs, approx. 5 each."]),
        ("See Fig. 3 and No. 5 on Jan. 5 again.", ["See Fig. 3 and No. 5 on Jan. 5 again."]),
    ],
)
def test_an_abbreviation_ends_no_sentence_and_a_sentence_keeps_its_end(text: str, expected: list[str]) -> None:
    segments = split_text(text, HibariModel.segment_lengths)
    assert segments == expected
    assert all(verbalize(segment).text.rstrip().endswith(".") for segment in segments)


def test_words_lead_back_to_what_was_written() -> None:
    text = "Dr. Smith paid $5 for 3 kg on Jan. 5."
    spoken = verbalize(text)
    for word, written in [("Smith", "Smith"), ("dollars", "$5"), ("kilograms", "3 kg"), ("fifth", "Jan. 5"), ("paid", "paid")]:
        at = spoken.text.index(word)
        start, end = spoken.source_span(at, at + len(word))
        assert text[start:end] == written


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="aA1 05.,-–/$€%:x²½'\"()@#=+*°éЖ\n", max_size=60))
def test_any_text_is_covered_without_gaps_and_reads_the_same_again(text: str) -> None:
    spoken = verbalize(text)
    position = 0
    for piece in spoken.pieces:
        assert piece.start == position <= piece.end
        position = piece.end
    assert position == len(text)
    assert not re.search(r"[0-9]", spoken.text)
    assert verbalize(text) == spoken


@pytest.mark.parametrize("part", ["a-1-", "a.b-", "1-", "$1-", "A1-b", "1x", "x+1", "I ", "Jan. 5, ", "1/2 ", "5' x "])
def test_a_long_run_of_parts_takes_linear_time(part: str) -> None:
    started = time.thread_time()
    verbalize(part * (1200 // len(part)))
    assert time.thread_time() - started < 1.5


def test_foreign_words_are_counted_and_transliterated() -> None:
    assert foreign_words("She said Привет to Αθήνα.") == 2
    assert foreign_words("José, 5 μm and 3 kΩ") == 0
    assert mostly_foreign("Привет, как дела? OK.")
    assert not mostly_foreign("She said Привет to all of us there.")


def test_other_languages_are_left_alone() -> None:
    assert verbalize("Ich habe 5 Katzen.", "de").text == "Ich habe 5 Katzen."
    assert list(SpokenSegments(["I have 5.", "And 6."], None)) == ["I have 5.", "And 6."]
    assert list(SpokenSegments(["I have 5.", "And 6."], "en")) == ["I have five.", "And six."]


SAMPLE = [
    "The bill was $1,234.56 on March 3rd, 2021.",
    "It is −5°C, about 23°F.",
    "Call (415) 555-2671 at 9:30 a.m.",
    "I said no.",
    "Dr. Smith drove 60 mph on Elm St. It was late.",
    "Henry VIII wrote Chapter IV in the 1990s.",
    "PLEASE DO NOT TOUCH IT.",
    "Add 2 1/2 cups, or 1-2% of it.",
]


def test_a_recognizer_hears_the_words(server: RunningServer) -> None:
    """One recording of all sentences: what is heard, in words, is what a person would have read."""
    expected = " ".join(verbalize(sentence).text for sentence in SAMPLE)
    heard = listen(_speech(server, " ".join(SAMPLE)).content, "wav")
    assert word_error_rate(expected, verbalize(heard).text) < 0.12, heard


def _speech(server: RunningServer, text: str, **fields: object) -> httpx.Response:
    with server.client() as client:
        body = {"model": "tts-1", "input": text, "voice": "heart", "response_format": "wav", "seed": 1, **fields}
        return client.post("/v1/audio/speech", json=body)


def test_a_few_foreign_words_are_spoken_and_reported(server: RunningServer) -> None:
    answer = _speech(server, "She said Привет to all of us in Αθήνα yesterday.")
    assert answer.status_code == 200
    assert answer.headers["X-Transliterated"] == "2"
    assert "X-Transliterated" not in _speech(server, "She said hello.").headers
    refused = _speech(server, "Привет, как дела сегодня?")
    assert refused.status_code == 400
    assert "Cyrillic" in refused.json()["error"]["message"]


def test_normalize_false_turns_it_off(server: RunningServer) -> None:
    assert _speech(server, "She said Привет to all of us there.", normalize=False).status_code == 400
    assert _speech(server, "It is 5 * 3.", normalize=False).content != _speech(server, "It is 5 * 3.").content


def test_captions_show_the_text_as_it_was_written(server: RunningServer) -> None:
    answer = _speech(server, "Dr. Smith paid $5. It was 3 kg.", timestamps=True)
    with server.client() as client:
        captions = client.get(answer.headers["X-Timestamps"]).json()["captions"]
    assert [caption["text"] for caption in captions] == ["Dr. Smith paid $5.", "It was 3 kg."]
