"""Text is split where a reader would pause, and the segments joined are the text."""

from __future__ import annotations

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from speech_model import SegmentLengths
from text_splitter import split_text

ONE_SENTENCE = SegmentLengths(target=1, maximum=400, first=1)
CSM = SegmentLengths(target=320, maximum=400, first=120)

SEEDS = [
    "a",
    "Wort ",
    ". ",
    "! ",
    "?",
    "…",
    "。",
    "」",
    "「",
    "।",
    "؟ ",
    "\n",
    "\n\n",
    "\r\n",
    "- ",
    "1. ",
    "  ",
    "\u2028",
    "\x1c",
    "👨‍👩‍👧",
    "🇩🇪",
]
SEEDS += [
    "e\u0301",
    "שלום ",
    "नमस्ते ",
    ", ",
    "; ",
    "—",
    "(",
    ")",
    '"',
    "’",
    "https://a.b/c?d=e. ",
    "3.14",
    "Dr. ",
    "\x00",
    "\ud800",
    "\u200b",
    "x" * 50,
]
any_text = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=300),
    st.lists(st.sampled_from(SEEDS), max_size=120).map("".join),
)
segment_lengths = st.tuples(st.integers(1, 60), st.integers(1, 80), st.integers(1, 60)).map(lambda n: SegmentLengths(*n))


def sentences(text: str) -> list[str]:
    segments = split_text(text, ONE_SENTENCE)
    assert "".join(segments) == text
    return [segment.strip() for segment in segments]


@settings(max_examples=400, deadline=None)
@given(any_text, segment_lengths)
def test_segments_joined_are_the_text(text: str, segment_lengths: SegmentLengths) -> None:
    segments = split_text(text, segment_lengths)
    assert "".join(segments) == text
    if text.strip():
        assert all(segment.strip() for segment in segments)
    else:
        assert segments == ([text] if text else [])


@settings(max_examples=200, deadline=None)
@given(any_text, segment_lengths)
def test_no_segment_is_longer_than_the_maximum_unless_it_is_one_character(text: str, segment_lengths: SegmentLengths) -> None:
    for segment in split_text(text, segment_lengths):
        assert len(segment.strip()) <= max(segment_lengths.maximum, 1) or not text.strip()


@settings(max_examples=200, deadline=None)
@given(any_text, st.integers(1, 40))
def test_segments_are_halved_until_they_fit_the_model(text: str, tokens: int) -> None:
    def fits(segment: str) -> bool:
        return len(segment.strip().encode("utf-8", "surrogatepass")) <= tokens

    segments = split_text(text, CSM, fits)
    assert "".join(segments) == text
    assert all(fits(segment) or len(segment.strip()) == 1 for segment in segments)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["👨‍👩‍👧", "🇩🇪", "e\u0301", "क्षि", "字", "👍🏽", "ไทย"]), min_size=1, max_size=60).map("".join),
    st.integers(8, 30),
)
def test_a_text_without_spaces_is_cut_between_grapheme_clusters(text: str, maximum: int) -> None:
    segments = split_text(text, SegmentLengths(target=1, maximum=maximum, first=1))
    assert [cluster for segment in segments for cluster in regex.findall(r"\X", segment)] == regex.findall(r"\X", text)


@pytest.mark.parametrize(
    "expected",
    [
        ["Dr. Smith met Mrs. Jones at 5 p.m. in the U.S. Army base.", "They left."],
        ["It costs 3.14 dollars, e.g. at noon, i.e. now.", "Fine."],
        ["J. R. R. Tolkien wrote it.", "He did."],
        ["He was born in the U.S.", "Then he moved."],
        ["It weighs approx. 5 kilos.", "That is est. 3 more."],
        ["Wait... what?", "Really?!", "Yes…", "No!!!"],
        ["“Why?” she asked.", "“Because,” he said.", "‘Stop.’", "“Go.”", "Then they left."],
        ["(First.)", "(Second!)", "[Third?]", "Fourth."],
        ["Go to https://example.com/a.b?c=d!e.", "Or www.example.org/x.y.", "Then stop."],
        ["Write to j.doe@example.com.", "Use Node.js and .NET.", "Is it version 1.2.3?", "Yes."],
        ["1. First thing.", "2. Second thing.", "A. Third."],
        ["Yahoo! Inc. is a company.", "Is it?"],
        ["That is it.", "i write like this.", "ok?"],
        ['"Hello.', "A quote that never closes.", "Goes on."],
    ],
)
def test_english_sentences_are_found(expected: list[str]) -> None:
    assert sentences(" ".join(expected)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("你好。你好吗？很好！再见", ["你好。", "你好吗？", "很好！", "再见"]),
        ("「はい。」「いいえ。」「はい。」と言った。次", ["「はい。」", "「いいえ。」", "「はい。」と言った。", "次"]),
        ("什么？！真的。。。好", ["什么？！", "真的。。。", "好"]),
        ("नमस्ते। आप कैसे हैं॥ ठीक।", ["नमस्ते।", "आप कैसे हैं॥", "ठीक।"]),
        ("هل أنت بخير؟ نعم. جيد", ["هل أنت بخير؟", "نعم.", "جيد"]),
        ("سلام۔ کیا حال ہے؟", ["سلام۔", "کیا حال ہے؟"]),
        ("Բարեւ։ Ինչպես ես։", ["Բարեւ։", "Ինչպես ես։"]),
        ("ሰላም። እንዴት ነህ፧ ደህና።", ["ሰላም።", "እንዴት ነህ፧", "ደህና።"]),
        ("Τι κάνεις; Καλά.", ["Τι κάνεις;", "Καλά."]),
        ("မင်္ဂလာပါ။ နေကောင်းလား။", ["မင်္ဂလာပါ။", "နေကောင်းလား။"]),
        ("ជំរាបសួរ។ សុខ", ["ជំរាបសួរ។", "សុខ"]),
        ("Привет! Как дела? Хорошо.", ["Привет!", "Как дела?", "Хорошо."]),
    ],
)
def test_other_scripts_end_their_sentences_too(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_blank_lines_and_list_items_end_a_sentence_and_wrapped_lines_do_not() -> None:
    text = "A title\n\nA line that\nis wrapped\r\ntwice\n- one\n* two\n1. three\n2) four\n\u2029last"
    assert sentences(text) == ["A title", "A line that\nis wrapped\r\ntwice", "- one", "* two", "1. three", "2) four", "last"]


def test_whitespace_stays_with_the_segment_before_it() -> None:
    assert split_text("  Hi. \n\n You. ", ONE_SENTENCE) == ["  Hi. \n\n ", "You. "]
    assert split_text(" \n ", ONE_SENTENCE) == [" \n "]
    assert split_text("", ONE_SENTENCE) == []


def test_sentences_are_packed_to_the_target_and_the_first_segment_is_shorter() -> None:
    text = "This sentence has forty characters in it. " * 30
    segments = split_text(text, CSM)
    assert [len(segment.strip()) for segment in segments[:2]] == [83, 293]
    assert all(len(segment.strip()) <= CSM.target for segment in segments)
    assert all(segment.strip().endswith(".") for segment in segments)


def test_a_paragraph_ends_its_segment_when_the_segment_is_half_full_and_short_ones_are_packed() -> None:
    long = "This sentence has forty characters in it. " * 5
    text = f"{long}\n\n{long}\n\n- One.\n- Two.\n- Three.\n- Four is the last one of the list, and somewhat longer than the others, to be a segment."
    segments = split_text(text, SegmentLengths(target=320, maximum=400, first=320))
    assert [segment.split()[0] for segment in segments] == ["This", "This", "-"]


def test_a_few_last_words_join_the_segment_before() -> None:
    text = "This sentence has forty characters in it. " * 7 + "This sentence has forty characters in it. " * 7 + "Good bye then."
    assert split_text(text, SegmentLengths(target=294, maximum=400, first=294))[-1].strip().endswith("Good bye then.")
    middle = "This sentence has forty characters in it. " * 21 + "Good bye then."
    segments = split_text(middle, SegmentLengths(target=294, maximum=400, first=294))
    assert len(segments) == 3
    assert segments[-1].endswith("it. Good bye then.")


def test_a_long_sentence_is_cut_at_its_clauses() -> None:
    text = "when the rain had stopped at last, " * 20 + "we went home."
    segments = split_text(text, CSM)
    assert all(segment.strip().endswith((",", "home.")) for segment in segments)
    assert all(len(segment) <= CSM.maximum for segment in segments)


def test_numbers_and_times_are_not_cut() -> None:
    text = "we counted 1,234,567 of them at 10:30 and " * 20
    assert all("1,234,567" in part or "," not in part for part in split_text(text, CSM))
    assert not any(segment.strip().endswith((",", ":")) for segment in split_text(text, CSM))


def test_a_long_sentence_without_clauses_is_cut_between_words() -> None:
    words = [f"word{number}" for number in range(300)]
    segments = split_text(" ".join(words), CSM)
    assert [word for segment in segments for word in segment.split()] == words


def test_a_long_quotation_is_cut_at_the_sentences_inside() -> None:
    text = "He said: “" + "This is one of many sentences in the quotation. " * 20 + "End.” And left."
    assert all(regex.search(r"[.][”]?$", segment.strip()) for segment in split_text(text, CSM))


def test_chinese_without_spaces_is_cut_at_its_commas_and_keeps_latin_words_whole() -> None:
    commas = "我们今天去北京看朋友，" * 60
    assert all(segment.endswith("，") for segment in split_text(commas, CSM))
    mixed = "我喜欢Python编程" * 60
    assert all(segment.count("Python") * len("Python") == len(regex.findall("[A-Za-z]", segment)) for segment in split_text(mixed, CSM))


def test_one_endless_word_is_cut_into_even_parts() -> None:
    segments = split_text("a" * 4000, CSM)
    assert {len(segment) for segment in segments} == {250}


@pytest.mark.parametrize(
    "unit", ["Hello there, my friend. ", "a", "…", ",", "。」", '"a. ', "(a. ", "- a\n", "\n\na", "a.", "a://", "字", "!)", " "]
)
def test_a_hundred_thousand_characters_come_back_whole(unit: str) -> None:
    # Quadratic time on these would exceed the time limit: a run of "…" once took seven minutes.
    text = (unit * 100_000)[:100_000]
    assert "".join(split_text(text, CSM)) == text
