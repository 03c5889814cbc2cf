"""The longest text that a request may contain is spoken completely, once and in order; every format holds the same, complete and streamed."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from conftest import RunningServer
from listening import Samples, decode, transcribe, word_error_rate, words

_OPENINGS = (
    "On Monday",
    "Near the old mill",
    "After a while",
    "In the old library",
    "Without a sound",
    "Early in spring",
    "Across the valley",
)
_PEOPLE = ("the captain", "my cousin", "a young teacher", "the gardener", "her brother", "an engineer")
_DEEDS = ("repaired the wooden bridge", "found a silver coin", "closed the heavy window", "wrote a long letter", "counted every boat", "sang an old song", "watched the evening train", "planted three small trees")  # fmt: skip
_ENDINGS = (
    "and nobody was surprised.",
    "while the children slept.",
    "before the rain began.",
    "because it had to be done.",
    "which took until evening.",
)


def sentences() -> list[str]:
    """Return different sentences, together almost 4,000 characters."""
    made: list[str] = []
    while sum(map(len, made)) + len(made) < 3900:
        n = len(made)
        made.append(f"{_OPENINGS[n % 7]}, {_PEOPLE[n % 6]} {_DEEDS[(n + n // 8) % 8]} {_ENDINGS[n % 5]}")
    return made


SENTENCES = sentences()
TEXT = " ".join(SENTENCES)
FEWER = " ".join(SENTENCES[:10])  # enough to compare formats
BODY: dict[str, Any] = {"model": "m", "input": TEXT, "voice": "heart", "seed": 1}


@cache
def spoken(server_url: str, name: str, streamed: bool, text: str = TEXT) -> Samples:
    import httpx

    body = BODY | {"input": text, "response_format": name, "stream": streamed}
    response = httpx.post(f"{server_url}/v1/audio/speech", json=body, timeout=300)
    assert response.status_code == 200
    samples, rate = decode(response.content, name)
    return samples[:: rate // 24_000]


def test_the_text_is_as_long_as_a_request_may_be() -> None:
    assert 3900 <= len(TEXT) <= 4096
    assert len(set(SENTENCES)) == len(SENTENCES)


def test_the_whole_text_is_understood(server: RunningServer) -> None:
    """Transcribe one format; the tests below compare the others with it. With a beam of 1 the recogniser may repeat a sentence."""
    heard = transcribe(spoken(server.url, "wav", False), 24_000, beam=2)
    assert word_error_rate(TEXT, heard) <= 0.02
    assert abs(len(words(heard)) - len(words(TEXT))) <= 0.02 * len(words(TEXT))  # no sentence is missing, none is there twice


@pytest.mark.parametrize(("name", "streamed"), [("wav", True), ("flac", False), ("flac", True), ("pcm", True)])
def test_lossless_formats_hold_the_same_samples(server: RunningServer, name: str, streamed: bool) -> None:
    text = TEXT if name == "wav" else FEWER
    assert np.array_equal(spoken(server.url, name, streamed, text), spoken(server.url, "wav", False, text))


@pytest.mark.parametrize("name", ["mp3", "opus", "aac"])
def test_lossy_formats_sound_alike_complete_and_streamed(server: RunningServer, name: str) -> None:
    """Compare the loudness in steps of 50 ms with the lossless file: nothing is missing, doubled or shifted."""
    reference = _loudness(spoken(server.url, "wav", False, FEWER))
    for streamed in (False, True):
        loudness = _loudness(spoken(server.url, name, streamed, FEWER))
        assert abs(len(loudness) - len(reference)) <= 3
        length = min(len(loudness), len(reference)) - 2
        best = max(float(np.corrcoef(loudness[shift : shift + length], reference[:length])[0, 1]) for shift in range(3))
        assert best > 0.97


def test_no_gap_is_longer_than_the_set_pause(server: RunningServer) -> None:
    samples = spoken(server.url, "wav", False)
    sounding = np.flatnonzero(np.abs(samples) > 10 ** (-60 / 20))
    gaps = np.diff(sounding) / 24_000
    assert gaps.max() <= 0.31  # the pause, plus the joiner's hop of 5 ms on either side
    assert np.count_nonzero(gaps > 0.29) == len(SENTENCES) - 1


def test_joints_are_continuous(server: RunningServer) -> None:
    """Check that the step between digital silence and sound is no larger than the steps within speech."""
    samples = spoken(server.url, "wav", False)
    edges = np.flatnonzero(np.diff((samples != 0).astype(np.int8)))
    long_silences = [(a, b) for a, b in pairwise(edges) if b - a > 2400 and not samples[a + 1]]
    assert len(long_silences) >= len(SENTENCES) - 1
    for start, end in long_silences:
        assert abs(float(samples[start] - samples[start + 1])) < 0.002
        assert abs(float(samples[end + 1] - samples[end])) < 0.002


def _loudness(samples: Samples) -> Samples:
    frames = samples[: len(samples) // 1200 * 1200].reshape(-1, 1200)
    return np.asarray(np.sqrt(np.mean(frames**2, axis=1)), np.float32)
