"""say.py reads a book: nothing lost, nothing doubled, one file, however the text is cut on its way."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import RunningServer
from listening import decode, duration, transcribe, word_error_rate
from saying import captions_in, said, sentences_of, started, wait_until

from say_reading import clean_text, sentences, split_pieces

MakeServer = Callable[..., RunningServer]
_WHO = ("The old sailor", "A quiet teacher", "My neighbour", "The young painter", "Our captain", "The tall gardener")
_DID = ("carried", "found", "painted", "followed", "remembered", "repaired")
_WHAT = ("the broken lantern", "a silver spoon", "the garden gate", "seven letters", "a wooden boat", "the morning train")
_WHEN = ("before the rain came", "near the river", "without a word", "on a cold morning", "beside the station", "after the long winter")


def a_book(characters: int) -> str:
    """Paragraphs of six sentences each, no two alike."""
    chosen = random.Random(5)
    seen: set[str] = set()
    paragraphs: list[str] = []
    while sum(map(len, paragraphs)) < characters:
        paragraph: list[str] = []
        while len(paragraph) < 6:
            sentence = " ".join(chosen.choice(part) for part in (_WHO, _DID, _WHAT, _WHEN)) + "."
            if sentence not in seen:
                seen.add(sentence)
                paragraph.append(sentence)
        paragraphs.append(" ".join(paragraph))
    return "\n\n".join(paragraphs) + "\n"


def check_book(told: list[dict[str, Any]], text: str, wav: Path) -> None:
    """Every sentence has its place in the sound, in the text's order, and the sound is as long as they are together."""
    assert " ".join(caption["text"] for caption in told) == sentences_of(text)
    assert [caption["group"] for caption in told] == list(range(len(told)))
    for before, after in pairwise(told):
        assert 0.1 < after["start"] - before["end"] < 0.5
    assert told[-1]["end"] == pytest.approx(duration(wav, "wav"), abs=0.01)


def check_seams(told: list[dict[str, Any]], pieces: list[str], wav: Path) -> None:
    """The sentences on both sides of a cut are heard, whole and once, each where its caption says."""
    samples, rate = decode(wav.read_bytes(), "wav")
    last = -1
    for piece in pieces[:-1]:
        last += len(sentences([piece]))
        start, end = told[last - 1]["start"], told[last + 2]["end"]
        heard = transcribe(samples[int(start * rate) : int(end * rate)], rate)
        assert word_error_rate(" ".join(caption["text"] for caption in told[last - 1 : last + 3]), heard) < 0.15, heard


def test_a_book_of_five_pieces_in_one_file(make_server: MakeServer, tmp_path: Path) -> None:
    text = a_book(2500)
    server = make_server(MAX_INPUT_LENGTH=512)
    (tmp_path / "book.txt").write_text(text)
    asked = ("-f", "book.txt", "-o", "book.wav", "--captions", "book.json", "--server", server.url, "--seed", 3)
    said(tmp_path, *asked, MAX_INPUT_LENGTH=512)
    told = captions_in(tmp_path / "book.json")
    check_book(told, text, tmp_path / "book.wav")
    pieces = split_pieces(clean_text(text, normalize=True), 512)
    assert len(pieces) >= 5
    check_seams(told, pieces[:4], tmp_path / "book.wav")
    assert len(re.findall("POST", server.log_text())) == len(pieces)


def test_pieces_sound_the_same_here_and_through_a_server(make_server: MakeServer, tmp_path: Path) -> None:
    text = a_book(800)
    server = make_server(MAX_INPUT_LENGTH=250)
    limit: dict[str, Any] = {"MAX_INPUT_LENGTH": 250}
    said(tmp_path, text, "-o", "served.wav", "--captions", "served.json", "--server", server.url, "--seed", 3, **limit)
    said(tmp_path, text, "-o", "local.wav", "--captions", "local.json", "--local", "--seed", 3, **limit)
    told = captions_in(tmp_path / "served.json")
    assert told == captions_in(tmp_path / "local.json")
    assert (tmp_path / "served.wav").read_bytes() == (tmp_path / "local.wav").read_bytes()
    check_book(told, text, tmp_path / "served.wav")
    check_seams(told, split_pieces(clean_text(text, normalize=True), 250), tmp_path / "served.wav")
    assert len(re.findall("POST", server.log_text())) >= 4


def test_a_server_that_takes_less_than_expected_gets_smaller_pieces(make_server: MakeServer, tmp_path: Path) -> None:
    text = a_book(900)
    server = make_server(MAX_INPUT_LENGTH=300)
    said(tmp_path, text, "-o", "book.wav", "--captions", "book.json", "--server", server.url)
    check_book(captions_in(tmp_path / "book.json"), text, tmp_path / "book.wav")


def test_a_full_queue_is_waited_for(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server(MAX_QUEUE=1)
    text = a_book(1500)
    others = [started(tmp_path, text, "-o", f"{number}.wav", "--captions", f"{number}.json", "--server", server.url) for number in range(3)]
    with others[0] as first, others[1] as second, others[2] as third:
        runs = (first, second, third)
        wait_until(lambda: all(run.poll() is not None for run in runs), "all are done")
        assert [run.returncode for run in runs] == [0, 0, 0]
    assert "status=429" in server.log_text()
    for number in range(3):
        check_book(captions_in(tmp_path / f"{number}.json"), text, tmp_path / f"{number}.wav")


def test_a_document_is_cleaned_up_before_it_is_cut() -> None:
    table = "| city | year |\n|---|---|\n" + "\n".join(f"| Town {row} | {1900 + row} |" for row in range(60))
    text = f"# A list\n\n{table}\n\n***\n\nThe *end*."
    pieces = split_pieces(clean_text(text, normalize=True), 300)
    assert len(pieces) > 3
    assert "".join(pieces) == clean_text(text, normalize=True)
    assert not re.search(r"[|*#]|--", "".join(pieces))
    assert split_pieces(clean_text("One.\n\n***\n\nTwo.", normalize=False), 6) == ["One.\n\n", "Two."]
