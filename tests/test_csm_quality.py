"""The quality checks, on the built-in voice's real speech and on the output of a failing model."""

from __future__ import annotations

import numpy as np
import pytest

from audio_formats import SAMPLE_RATE, Samples
from csm_quality import (
    FRAME_MS,
    Attempt,
    Fault,
    PauseLimiter,
    best,
    frame_budget,
    judge,
    repaired,
    shortest_seconds,
    silent,
)

LONG = (
    "The harbour was quiet that morning, and nobody spoke. Then a boat came in, slowly, with all its lamps lit, as if it were still night."
)
TEXTS = [
    "Hello.",
    "Yes.",
    "The quick brown fox jumps over the lazy dog, and then it sleeps.",
    "In 1984, about 77,000 people paid $12.50 each; NATO said WWW stands for World Wide Web.",
    "Ahhh. Oh no! Mmmm. Zzzzzz.",
    LONG,
]


@pytest.fixture(scope="module")
def speech() -> dict[str, Samples]:
    """Each text, said by the built-in voice."""
    from hibari import Hibari

    voice = Hibari()
    return {text: np.asarray(voice(text, seed=1), np.float32).reshape(-1) for text in TEXTS}


def quiet(seconds: float) -> Samples:
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


def tone(seconds: float) -> Samples:
    return (0.2 * np.sin(2 * np.pi * 220 * np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE)).astype(np.float32)


def noise(seconds: float) -> Samples:
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * SAMPLE_RATE)).astype(np.float32)


@pytest.mark.parametrize("text", TEXTS)
def test_real_speech_has_no_fault_and_fits_its_budget(speech: dict[str, Samples], text: str) -> None:
    assert judge(text, speech[text], ended=True) == ()
    assert len(speech[text]) / SAMPLE_RATE * 1000 < frame_budget(text, 90_000) * FRAME_MS
    assert shortest_seconds(text) < len(speech[text]) / SAMPLE_RATE


def test_the_budget_follows_the_text_and_never_exceeds_the_presets_limit() -> None:
    assert frame_budget("Hi.", 90_000) < frame_budget("Hi there, how are you?", 90_000) < frame_budget(LONG, 90_000)
    assert frame_budget("In 1984, 77,000.", 90_000) > frame_budget("In then, about.", 90_000)
    assert frame_budget("我们今天早上去了港口", 90_000) > frame_budget("port now ok", 90_000)
    assert frame_budget(LONG, 800) == 10
    assert frame_budget("Hi.", 80) == 1


def test_nothing_at_all_is_empty() -> None:
    assert judge("Hello.", quiet(0), ended=True) == (Fault.EMPTY,)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_single_sample_that_is_no_number_spoils_a_segment(speech: dict[str, Samples], value: float) -> None:
    samples = speech[LONG].copy()
    samples[7] = value
    assert judge(LONG, samples, ended=True) == (Fault.NOT_FINITE,)


def test_silence_is_no_speech() -> None:
    assert judge("Hello.", quiet(1), ended=True) == (Fault.SILENT,)
    assert judge("Hello.", noise(1) * 0.001, ended=True) == (Fault.SILENT,)
    assert silent(quiet(0))
    assert silent(quiet(1))
    assert not silent(tone(0.1))


def test_half_a_text_is_too_short_even_when_silence_fills_it_up(speech: dict[str, Samples]) -> None:
    half = speech[LONG][: len(speech[LONG]) // 3]
    assert Fault.TOO_SHORT in judge(LONG, half, ended=True)
    assert Fault.TOO_SHORT in judge(LONG, np.concatenate([half, quiet(8)]), ended=True)


def test_what_the_budget_ended_did_not_end() -> None:
    assert judge("Ah.", np.concatenate([tone(0.3), noise(0.3)]), ended=False) == (Fault.UNENDED,)


def test_a_long_gap_inside_is_dead_but_silence_at_the_edges_is_not(speech: dict[str, Samples]) -> None:
    samples = speech[LONG]
    assert Fault.DEAD in judge(LONG, np.concatenate([samples, quiet(3), samples]), ended=True)
    assert judge(LONG, np.concatenate([quiet(3), samples, quiet(3)]), ended=True) == ()


@pytest.mark.parametrize("sound", [tone, noise])
def test_a_sound_that_does_not_change_is_stuck_and_is_cut_off(speech: dict[str, Samples], sound: object) -> None:
    tail: Samples = sound(2.5)  # type: ignore[operator]
    samples = np.concatenate([speech[LONG], tail])
    faults = judge(LONG, samples, ended=True)
    assert faults == (Fault.STUCK,)
    kept = repaired(LONG, Attempt(samples, True, faults))
    assert abs(len(kept) - len(speech[LONG])) < 0.2 * SAMPLE_RATE


def test_a_stuck_sound_in_the_middle_takes_nothing_that_follows_with_it(speech: dict[str, Samples]) -> None:
    samples = np.concatenate([speech[LONG], tone(2.5), speech[LONG]])
    assert len(repaired(LONG, Attempt(samples, True, (Fault.STUCK,)))) == len(samples)


def test_a_runaway_goes_back_to_its_last_pause(speech: dict[str, Samples]) -> None:
    said = speech[LONG]
    samples = np.concatenate([said, quiet(0.4), noise(0.7)])
    kept = repaired(LONG, Attempt(samples, False, (Fault.UNENDED,)))
    assert len(said) - 0.5 * SAMPLE_RATE < len(kept) < len(said) + 0.2 * SAMPLE_RATE
    np.testing.assert_array_equal(kept, samples[: len(kept)])


def test_a_runaway_without_a_pause_stays_whole() -> None:
    samples = noise(1)
    assert len(repaired("Ah.", Attempt(samples, False, (Fault.UNENDED,)))) == len(samples)


def test_the_best_attempt_is_the_one_with_the_least_wrong() -> None:
    attempts = [Attempt(quiet(1), True, faults) for faults in ((Fault.NOT_FINITE,), (Fault.TOO_SHORT,), (Fault.UNENDED,), (Fault.UNENDED,))]
    assert best(attempts) is attempts[2]
    assert not attempts[0].usable
    assert best([Attempt(quiet(1), True, (), 0.3), better := Attempt(quiet(1), True, (), 0.1)]) is better


@pytest.mark.parametrize("pieces", [1, 7, 50])
def test_pauses_are_shortened_to_the_setting_however_the_samples_arrive(speech: dict[str, Samples], pieces: int) -> None:
    said = speech["Hello."]
    loud = said[np.flatnonzero(np.abs(said) > 0.01)[0] : np.flatnonzero(np.abs(said) > 0.01)[-1]]
    whole = np.concatenate([loud, quiet(3), loud])
    limiter = PauseLimiter(500)
    kept = np.concatenate([*(limiter.feed(part) for part in np.array_split(whole, pieces)), limiter.flush()])
    assert len(kept) == pytest.approx(2 * len(loud) + 0.5 * SAMPLE_RATE, abs=0.12 * SAMPLE_RATE)
    np.testing.assert_array_equal(kept[: len(loud)], loud)
    np.testing.assert_array_equal(kept[-len(loud) :], loud)
    limiter = PauseLimiter(500)
    np.testing.assert_array_equal(kept, np.concatenate([limiter.feed(whole), limiter.flush()]))


def test_pauses_within_the_setting_are_left_alone(speech: dict[str, Samples]) -> None:
    limiter = PauseLimiter(1000)
    np.testing.assert_array_equal(np.concatenate([limiter.feed(speech[LONG]), limiter.flush()]), speech[LONG])


def test_a_shortened_pause_has_no_click() -> None:
    hum = noise(3) * 0.001
    hum += 0.0005 * np.sin(2 * np.pi * 50 * np.arange(len(hum)) / SAMPLE_RATE).astype(np.float32)
    limiter = PauseLimiter(300)
    kept = np.concatenate([limiter.feed(np.concatenate([tone(0.5), hum, tone(0.5)])), limiter.flush()])
    joint = kept[round(0.55 * SAMPLE_RATE) : -round(0.55 * SAMPLE_RATE)]
    assert len(joint) < 0.3 * SAMPLE_RATE
    assert np.abs(np.diff(joint)).max() <= np.abs(np.diff(hum)).max()
