"""The quality checks, on the built-in voice's real speech and on the output of a failing model."""

from __future__ import annotations

import numpy as np
import pytest

from audio_formats import SAMPLE_RATE, Samples
from csm_quality import (
    FRAME_MS,
    Attempt,
    Fault,
    Pace,
    PauseLimiter,
    best,
    frame_budget,
    judge,
    repaired,
    silent,
)
from transcription import Hearing

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
    assert Pace().shortest(text) < len(speech[text]) / SAMPLE_RATE < Pace().longest(text)


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


@pytest.mark.parametrize("missing", [0.2, 0.3, 0.5])
def test_speech_that_stops_in_a_word_is_cut_off(speech: dict[str, Samples], missing: float) -> None:
    end = int(np.flatnonzero(np.abs(speech[LONG]) > 0.01)[-1])
    assert judge(LONG, speech[LONG][: end - round(missing * SAMPLE_RATE)], ended=True) == (Fault.CUT_OFF,)


def notes(seconds: float, *frequencies: float) -> Samples:
    """Plucked chords, each of `frequencies` times the next step of a scale, two a second, and the last one fades out."""
    time = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
    fade = np.exp(-3 * time) * np.minimum(1, time / 0.01)
    steps = (1, 1.122, 1.26, 1.335, 1.498)
    chords = [
        sum(
            np.sin(2 * np.pi * frequency * steps[number % 5] * partial * time) / partial
            for frequency in frequencies
            for partial in (1, 2, 3)
        )
        * fade
        for number in range(round(2 * seconds))
    ]
    samples = 0.1 * np.concatenate(chords)
    samples[-4800:] *= np.linspace(1, 0, 4800) ** 2
    return samples.astype(np.float32)


@pytest.mark.parametrize("frequencies", [(220.0,), (130.0, 164.0, 196.0)])
def test_music_is_not_speech(frequencies: tuple[float, ...]) -> None:
    assert judge(LONG, notes(7, *frequencies), ended=True) == (Fault.NOT_SPEECH,)


def test_a_second_text_behind_the_first_is_too_long(speech: dict[str, Samples]) -> None:
    assert judge(LONG, np.concatenate([speech[LONG], quiet(0.3), speech[LONG]]), ended=True) == (Fault.TOO_LONG,)


def test_the_pace_of_the_prompt_decides_what_is_too_short(speech: dict[str, Samples]) -> None:
    """The same reading is right for a voice that speaks as fast, and doubtful for one that speaks slowly."""
    seconds = len(speech[LONG]) / SAMPLE_RATE
    text = f"{LONG} And then it left again."
    slow = Pace(LONG, 1.45 * seconds)
    assert Pace().shortest(text) < slow.shortest(text) < slow.longest(text)
    assert not Pace().doubtful(LONG, speech[LONG])
    assert slow.doubtful(LONG, speech[LONG])
    for _ in range(4):
        slow.learn(LONG, speech[LONG])
    assert not slow.doubtful(LONG, speech[LONG])


@pytest.mark.parametrize("seconds", [0.0, 0.24, 90.0])
def test_a_prompt_whose_length_does_not_fit_its_words_says_nothing_about_the_pace(seconds: float) -> None:
    assert Pace(LONG, seconds).shortest(LONG) == Pace().shortest(LONG)


def test_a_long_gap_inside_is_dead_but_silence_at_the_edges_is_not(speech: dict[str, Samples]) -> None:
    samples = speech[LONG]
    assert Fault.DEAD in judge(LONG, np.concatenate([samples, quiet(3), samples]), ended=True)
    assert judge(LONG, np.concatenate([quiet(3), samples, quiet(3)]), ended=True) == ()


@pytest.mark.parametrize("sound", [tone, noise])
def test_a_sound_that_does_not_change_is_stuck_and_is_cut_off(speech: dict[str, Samples], sound: object) -> None:
    tail: Samples = sound(2.5)  # type: ignore[operator]
    samples = np.concatenate([speech[LONG], tail])
    faults = judge(LONG, samples, ended=True)
    assert faults == (Fault.CUT_OFF, Fault.STUCK)
    kept = repaired(LONG, Attempt(samples, True, faults))
    assert abs(len(kept) - len(speech[LONG])) < 0.2 * SAMPLE_RATE


def test_a_stuck_sound_in_the_middle_takes_nothing_that_follows_with_it(speech: dict[str, Samples]) -> None:
    samples = np.concatenate([speech[LONG], tone(2.5), speech[LONG]])
    assert len(repaired(LONG, Attempt(samples, True, (Fault.STUCK,)))) == len(samples)


def test_a_runaway_ends_at_the_first_pause_after_its_words(speech: dict[str, Samples]) -> None:
    said = speech[LONG]
    samples = np.concatenate([said, quiet(0.4), noise(0.7), quiet(0.4), noise(0.7)])
    kept = repaired(LONG, Attempt(samples, False, (Fault.UNENDED,)))
    assert len(said) - 0.5 * SAMPLE_RATE < len(kept) < len(said) + 0.2 * SAMPLE_RATE
    np.testing.assert_array_equal(kept, samples[: len(kept)])


def test_a_runaway_whose_words_were_heard_ends_after_the_last_right_one(speech: dict[str, Samples]) -> None:
    said = speech[LONG]
    end = int(np.flatnonzero(np.abs(said) > 0.01)[-1])
    samples = np.concatenate([said[:end], noise(3)])
    kept = repaired(LONG, Attempt(samples, False, (Fault.UNENDED,), Hearing(0.5, wrong=True, end=end / SAMPLE_RATE)))
    assert abs(len(kept) - end) <= 0.2 * SAMPLE_RATE


def test_a_runaway_without_a_pause_stays_whole() -> None:
    samples = noise(1)
    assert len(repaired("Ah.", Attempt(samples, False, (Fault.UNENDED,)))) == len(samples)


def test_the_best_attempt_is_the_one_with_the_least_wrong() -> None:
    attempts = [Attempt(quiet(1), True, faults) for faults in ((Fault.NOT_FINITE,), (Fault.TOO_SHORT,), (Fault.UNENDED,), (Fault.UNENDED,))]
    assert best(attempts) is attempts[2]
    assert not attempts[0].usable
    heard = [Attempt(quiet(1), True, (), Hearing(rate, wrong=False)) for rate in (0.3, 0.1)]
    assert best(heard) is heard[1]


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


@pytest.mark.parametrize("gap", [0.0, 0.3, 2.0])
@pytest.mark.parametrize(("text", "longest_ms"), [(TEXTS[2], 300), (LONG, 1000)])
def test_quiet_speech_behind_a_loud_burst_is_kept(speech: dict[str, Samples], text: str, longest_ms: int, gap: float) -> None:
    limiter = PauseLimiter(longest_ms)
    burst = np.sign(noise(0.2))
    whispered = speech[text] * np.float32(0.03 / np.abs(speech[text]).max())  # its loudest block is 40 dB below the burst
    kept = np.concatenate([limiter.feed(np.concatenate([burst, quiet(gap), whispered])), limiter.flush()])
    heard, wanted = (samples[np.abs(samples) > 0.005] for samples in (kept[len(burst) :], whispered))
    np.testing.assert_array_equal(heard, wanted)


def test_a_shortened_pause_has_no_click() -> None:
    hum = noise(3) * 0.001
    hum += 0.0005 * np.sin(2 * np.pi * 50 * np.arange(len(hum)) / SAMPLE_RATE).astype(np.float32)
    limiter = PauseLimiter(300)
    kept = np.concatenate([limiter.feed(np.concatenate([tone(0.5), hum, tone(0.5)])), limiter.flush()])
    joint = kept[round(0.55 * SAMPLE_RATE) : -round(0.55 * SAMPLE_RATE)]
    assert len(joint) < 0.3 * SAMPLE_RATE
    assert np.abs(np.diff(joint)).max() <= np.abs(np.diff(hum)).max()
