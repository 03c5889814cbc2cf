"""A text that arrives in parts is cut where the complete text would be, and never inside a word, a number or markup."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speech_model import SegmentLengths
from text_normalizer import normalize_text
from text_splitter import TextStream, sentences

SENTENCES = SegmentLengths(target=1, maximum=400, first=1)
TEXTS = [
    'Dr. Smith met Mr. Jones at 5 p.m. on Jan. 5. He paid $3.50 for it. Really? Yes! "I said no." Then he left... And came back.',
    "**Bold one. Bold two.** Then [a link. With dot](https://ex.com/a.b). And <b title='x. Y'>a tag</b>. *It is. Italic.* Fine. `a.b. C` ok.",
    "# Title\n\n- item one. More here\n- item two\n\n1. First. 2nd\n2. Second\n\nText:\n```py\na = 1. B\n\nprint()\n```\nAfter. The end.",
    "| a. B | c |\n|---|---|\n| 1. X | 2 |\n\nAfter the table. The end.",
    "今日は。元気ですか。はい。",
    "Version 3.14 is out. It has 1,000.5 things. U.S. officials, e.g. him, said so. No. 5 is alive. See www.example.com. Bye.",
    "She said (quietly!) that it was over. \u201cIs it?\u201d he asked. It was\u2026 Wasn't it?",
]


def pieces(text: str, sizes: list[int], lengths: SegmentLengths = SENTENCES) -> list[str]:
    stream, taken, place = TextStream(lengths), [], 0
    for size in [*sizes, len(text)]:
        stream.append(text[place : place + size])
        place += size
        while piece := stream.take():
            taken.append(piece.text)
    stream.flush()
    while piece := stream.take():
        taken.append(piece.text)
    assert stream.pending == 0
    return taken


def spoken(text: str) -> str:
    return "".join(normalize_text(text).split())


@pytest.mark.parametrize("text", TEXTS)
def test_character_by_character_the_cuts_are_those_of_the_whole_text(text: str) -> None:
    taken = pieces(text, [1] * len(text))
    assert "".join(taken) == text
    assert set(accumulate(map(len, taken))) <= set(accumulate(len(sentence) for sentence, _ in sentences(text)))
    assert len(taken) > 1


@pytest.mark.parametrize("text", [text for text in TEXTS if "```" not in text])
def test_the_pieces_are_normalized_to_the_words_of_the_whole_text(text: str) -> None:
    assert "".join(map(spoken, pieces(text, [1] * len(text)))) == spoken(text)


@given(st.sampled_from(TEXTS), st.lists(st.integers(1, 40), max_size=30))
def test_the_borders_of_the_messages_do_not_matter(text: str, sizes: list[int]) -> None:
    taken = pieces(text, sizes)
    assert taken == pieces(text, [1] * len(text))


@given(st.text(alphabet="ab .!?*_`[](<>|1$\n\U0001f389\u3002", max_size=300), st.lists(st.integers(1, 9), max_size=60))
def test_every_text_comes_out_whole(text: str, sizes: list[int]) -> None:
    assert "".join(pieces(text, sizes, SegmentLengths(target=40, maximum=60, first=20))) == text


@pytest.mark.parametrize(
    ("sentence", "next_word"),
    [
        ("Hello there. ", "And "),
        ("It is 5 p.m. ", "Now "),
        ("He paid $3.50. ", "It "),
        ("(Is it?) ", "Yes, "),
        ("That was it.\n\n", "- "),
    ],
)
def test_a_sentence_is_taken_as_soon_as_the_next_word_is_complete(sentence: str, next_word: str) -> None:
    stream = TextStream(SENTENCES)
    for character in (sentence + next_word)[:-1]:
        stream.append(character)
        assert stream.take() is None
    stream.append(next_word[-1])
    piece = stream.take()
    assert piece is not None
    assert piece.text == sentence


def test_what_is_certain_at_once_is_put_together() -> None:
    text = "One is here. " * 30
    taken = pieces(text, [len(text)], SegmentLengths(target=120, maximum=400, first=40))
    assert [len(piece) for piece in taken[:3]] == [39, 117, 117]


def test_a_sentence_that_does_not_end_is_cut_between_words() -> None:
    text = "and so on " * 100
    stream = TextStream(SegmentLengths(target=100, maximum=200, first=50))
    for start in range(0, len(text), 3):
        stream.append(text[start : start + 3])
        if piece := stream.take():
            assert len(piece.text) <= 200
            assert piece.text.endswith(" ")
    assert stream.pending < 250


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("I have 3", "I have "),
        ("I have 3 ", "I have "),
        ("call 555 12", "call "),
        ("It costs $", "It costs "),
        ("Hello there.", "Hello there."),
        ("Hello the", "Hello "),
        ("It is 5.", "It is "),
        ("Hi **bold", None),
        ("See <b", None),
        ("Yes", None),
        ("Good day! ", "Good day! "),
    ],
)
def test_after_a_pause_complete_words_are_taken(text: str, complete: str | None) -> None:
    stream = TextStream(SENTENCES)
    stream.append(text)
    assert stream.take() is None
    piece = stream.take(paused=True)
    assert (piece.text if piece else None) == complete
