"""Measure which failures of speech the quality checks of CSM's segments find, and how often they doubt good readings.

    make bench-guard                                           everything: 740 transcripts, 1.3 s of processor time each
    python benchmarks/guard.py --only music babble             some failures
    python benchmarks/guard.py --no-recognizer                 without transcripts
    python benchmarks/guard.py --hear-all --only "good readings"   transcribe all good readings: 400 transcripts

The texts of guard.tsv are read by two voices: the built-in heart, and, because no other voice is in the package, heart four semitones lower by
resampling. Failures are made from 40 good readings, half of each voice. Good readings are 50 texts x 4 speeds x 2 voices. The guard knows the pace
of the voice at normal speed, from a reading of another text. With a recogniser, all failures and a quarter of the good readings are transcribed.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from hibari import Hibari  # noqa: E402 - the project's folder comes first

from audio_formats import SAMPLE_RATE, Samples  # noqa: E402 - the project's folder comes first
from csm_quality import Fault, Pace, judge  # noqa: E402 - the project's folder comes first
from hibari_model import Pronunciation  # noqa: E402 - the project's folder comes first
from text_verbalizer import verbalize  # noqa: E402 - the project's folder comes first
from transcription import Recognizer  # noqa: E402 - the project's folder comes first

VOICES = ("heart", "heart, four semitones lower")
LOWER = 2 ** (4 / 12)
SPEEDS = (0.8, 1.0, 1.1, 1.25)
TEXTS_OF_A_STYLE = 8  # of 10, for the failures
PROMPT = (
    "The harbour was quiet at noon, and nobody on the long pier was in a hurry. Even the gulls were late. There is a small shop at the corner, "
    "where you can buy bread, milk and stamps. Its owner knows everyone in the street by name, and she never forgets a birthday."
)


@dataclass(frozen=True)
class Reading:
    """A good reading of a text."""

    style: str
    text: str
    voice: str
    samples: Samples


class Reader:
    """The two voices."""

    def __init__(self) -> None:
        pronunciation = Pronunciation(british=False)
        pronunciation.verbalized = True
        self._heart = Hibari("heart", g2p=pronunciation)

    def read(self, text: str, voice: str, speed: float = 1.0) -> Samples:
        """Return `text` at a speed of the voice's."""
        if voice == VOICES[0]:
            return np.asarray(self._heart(text, speed=speed, seed=1), np.float32)
        return lower(np.asarray(self._heart(text, speed=speed * LOWER, seed=2), np.float32))


def lower(samples: Samples) -> Samples:
    """Resample, so that everything is `LOWER` times longer and lower."""
    length = round(len(samples) * LOWER)
    spectrum = np.fft.rfft(samples)
    padded = np.concatenate([spectrum, np.zeros(length // 2 + 1 - len(spectrum))])
    return np.asarray(np.fft.irfft(padded, length) * LOWER, np.float32)


@dataclass(frozen=True)
class Source:
    """What a failure is made from.

    Attributes:
        number: The place of the text.
        whole: The good reading.
        start: The first sample of its sound.
        end: The sample after its last sound.
        slow: The same text, 1.6 times slower.
        fast: The same text, twice as fast.
        others: Good readings of other texts by the same voice.
        random: Numbers.
    """

    number: int
    whole: Samples
    start: int
    end: int
    slow: Samples
    fast: Samples
    others: Sequence[Samples]
    random: np.random.Generator

    def other(self) -> Samples:
        """Return a reading of some other text."""
        return self.others[int(self.random.integers(len(self.others)))]

    def at(self, share: float) -> int:
        """Return the sample after this share of the sound."""
        return self.start + round(share * (self.end - self.start))


def joined(*parts: Samples) -> Samples:
    """Join with crossfades of 5 ms."""
    result, fade = parts[0], np.linspace(0, 1, 120, dtype=np.float32)
    for part in parts[1:]:
        if min(len(result), len(part)) < len(fade):
            result = np.concatenate([result, part])
        else:
            middle = result[-len(fade) :] * (1 - fade) + part[: len(fade)] * fade
            result = np.concatenate([result[: -len(fade)], middle, part[len(fade) :]])
    return result


def silence(seconds: float) -> Samples:
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


def endless(source: Source) -> Samples:
    return joined(source.whole[: source.end], *[source.whole[source.at(0.7) : source.end]] * 12)[: 3 * len(source.whole)]


def tail(source: Source) -> Samples:
    time = np.arange(round(2.5 * SAMPLE_RATE)) / SAMPLE_RATE
    hum = 0.1 * (np.sin(2 * np.pi * 120 * time) + np.sin(2 * np.pi * 240 * time) / 2)
    noise = source.random.normal(0, 0.05, len(time))
    return np.concatenate([source.whole, (noise if source.number // 2 % 2 else hum).astype(np.float32)])


def held(source: Source) -> Samples:
    steps = range(source.at(0.2), source.at(0.8), 480)
    start = max(steps, key=lambda place: float(np.abs(source.whole[place : place + 960]).sum()))
    return joined(source.whole[: start + 960], *[source.whole[start : start + 960]] * 60, source.whole[start:])


def babble(source: Source) -> Samples:
    length = source.end - source.start
    pieces: list[Samples] = []
    while sum(len(piece) for piece in pieces) < 1.1 * length:
        other = source.other()
        size = round(source.random.uniform(0.15, 0.3) * SAMPLE_RATE)
        start = int(source.random.integers(max(1, len(other) - size)))
        pieces.append(other[start : start + size])
    return np.concatenate([faded(joined(*pieces)[:length]), silence(0.1)])


def faded(samples: Samples) -> Samples:
    """Fade out over 0.2 s."""
    count = min(len(samples), SAMPLE_RATE // 5)
    return np.concatenate([samples[:-count], samples[-count:] * np.linspace(1, 0, count, dtype=np.float32) ** 3])


def music(source: Source) -> Samples:
    """Return chords, a melody, bass and drums, or bowed notes with vibrato, of the same length."""
    kind, random = source.number // 2 % 4, source.random
    length = source.end - source.start
    sound = np.zeros(length + 2 * SAMPLE_RATE)
    base, beat = random.uniform(110, 330), random.uniform(0.22, 0.5)
    place = 0
    while place < length:
        seconds = beat * float(random.choice([0.5, 1, 1, 2]))
        step = int(random.integers(8))
        chord = {0: (step, step + 2, step + 4), 1: (step + 7,), 2: (step, 0), 3: (step,)}[kind]
        for degree in chord:
            tone = note(
                base * 2 ** ((0, 2, 4, 5, 7, 9, 11)[degree % 7] / 12 + degree // 7), 1.3 * seconds, (1.5, 3, 4, 0.5)[kind], kind == 3
            )
            sound[place : place + len(tone)] += tone
        if kind == 2:
            sound[place : place + 2400] += random.normal(0, 1.5, 2400) * np.exp(-np.arange(2400) / 600)
        place += round(seconds * SAMPLE_RATE)
    return faded((0.3 * sound / np.abs(sound).max()).astype(np.float32)[:length])


def note(frequency: float, seconds: float, decay: float, vibrato: bool) -> Samples:
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    phase = 2 * np.pi * frequency * time + vibrato * 0.0015 * frequency * np.sin(2 * np.pi * 5.5 * time)
    tone = sum(np.sin(partial * phase) / partial for partial in range(1, 7))
    return np.asarray(tone * np.exp(-decay * time) * np.minimum(1, time / 0.01), np.float32)


def stutter(source: Source) -> Samples:
    start = source.at(float(source.random.uniform(0.2, 0.7)))
    end = start + SAMPLE_RATE // 5
    return joined(source.whole[:end], *[source.whole[start:end]] * 3, source.whole[end:])


FAILURES: dict[str, Callable[[Source], Samples]] = {
    "last words for ever": endless,
    "noise or hum at the end": tail,
    "3 s of silence inside": lambda s: np.concatenate([s.whole[: s.at(0.5)], silence(3), s.whole[s.at(0.5) :]]),
    "held vowel": held,
    "truncated at 60 %": lambda s: s.whole[: s.at(0.6)],
    "last 200 ms missing": lambda s: s.whole[: s.end - SAMPLE_RATE // 5],
    "a quarter missing in the middle": lambda s: joined(s.whole[: s.at(0.38)], s.whole[s.at(0.63) :]),
    "last words repeated": lambda s: joined(s.whole[: s.end], s.whole[s.at(0.7) : s.end], s.whole[s.end :]),
    "wrong text of about the same length": lambda s: min(s.others, key=lambda other: abs(len(other) - len(s.whole))),
    "babble": babble,
    "music": music,
    "second sentence added": lambda s: np.concatenate([s.whole, silence(0.2), s.other()]),
    "1.6 times slower": lambda s: s.slow,
    "twice as fast": lambda s: s.fast,
    "stutter": stutter,
    "clipped": lambda s: np.clip(10 * s.whole / np.abs(s.whole).max(), -1, 1),
}


def texts() -> list[tuple[str, str]]:
    """Return (style, text in words) of guard.tsv."""
    lines = Path(__file__).with_suffix(".tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return [(style, verbalize(text).text) for style, text in rows]


def failures(reader: Reader, names: Sequence[str]) -> Iterator[tuple[str, Reading]]:
    """Yield each failure of 40 readings."""
    rows = texts()
    chosen = [row for place, row in enumerate(rows) if place % 10 < TEXTS_OF_A_STYLE]
    normal = {voice: {text: reader.read(text, voice) for _, text in rows} for voice in VOICES}
    for number, (style, text) in enumerate(chosen):
        voice = VOICES[number % 2]
        whole = normal[voice][text]
        sound = np.flatnonzero(np.abs(whole) > np.abs(whole).max() * 10 ** (-45 / 20))
        others = [samples for other, samples in normal[voice].items() if other != text]
        slow, fast = reader.read(text, voice, 1 / 1.6), reader.read(text, voice, 2)
        source = Source(number, whole, int(sound[0]), int(sound[-1]) + 1, slow, fast, others, np.random.default_rng(number))
        for name in names:
            fresh = replace(source, random=np.random.default_rng(number))  # the same with and without --only
            yield name, Reading(style, text, voice, FAILURES[name](fresh).astype(np.float32))


def good_readings(reader: Reader) -> Iterator[Reading]:
    for style, text in texts():
        for voice in VOICES:
            for speed in SPEEDS:
                yield Reading(style, text, voice, reader.read(text, voice, speed))


class Judges:
    """The guard for each voice, alone and with a recogniser."""

    def __init__(self, reader: Reader, recognizer: Recognizer | None) -> None:
        self._recognizer = recognizer
        self._paces = {voice: Pace(PROMPT, len(reader.read(PROMPT, voice)) / SAMPLE_RATE) for voice in VOICES}

    def faults(self, reading: Reading, *, ended: bool) -> tuple[Fault, ...]:
        """Return what the guard alone finds."""
        return judge(reading.text, reading.samples, ended, self._paces[reading.voice])

    def doubtful(self, reading: Reading) -> bool:
        """Return whether VERIFY=auto transcribes it although it has no fault."""
        return self._paces[reading.voice].doubtful(reading.text, reading.samples)

    def misheard(self, reading: Reading) -> bool:
        """Return whether a recogniser hears wrong words."""
        hearing = self._recognizer.hear(reading.text, reading.samples) if self._recognizer else None
        return hearing is not None and hearing.wrong


def measure_failures(judges: Judges, reader: Reader, names: Sequence[str]) -> None:
    table: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for name, reading in failures(reader, names):
        found = bool(judges.faults(reading, ended=name != "last words for ever"))
        misheard = judges.misheard(reading)
        table[name].update(
            {"all": 1, "alone": found, "doubted": found or judges.doubtful(reading), "misheard": misheard, "both": found or misheard}
            | {"auto": found or (misheard and judges.doubtful(reading))}
        )
    print("\n| failure | of | guard alone | VERIFY=auto | VERIFY=whisper | transcript alone |\n|---|---|---|---|---|---|")
    for name, row in table.items():
        print(f"| {name} | {row['all']} | {row['alone']} | {row['auto']} | {row['both']} | {row['misheard']} |")


def measure_good(judges: Judges, reader: Reader, *, hear_all: bool) -> None:
    counts: Counter[str] = Counter()
    for number, reading in enumerate(good_readings(reader)):
        faults = judges.faults(reading, ended=True)
        counts.update({"all": 1, "false": bool(faults), "doubted": judges.doubtful(reading)})
        if faults:
            print(f"false alarm: {reading.voice}, {', '.join(fault.label for fault in faults)}: {reading.text}")
        if hear_all or number % 4 == (number // 8 + number // 4 * 2) % 4:  # one speed of each text and voice
            misheard = judges.misheard(reading)
            counts.update({"heard": 1, "misheard": misheard})
            if misheard:
                print(f"misheard: {reading.voice}: {reading.text}")
    print(f"\nfalse alarms: {counts['false']} of {counts['all']} good readings; {counts['doubted']} would be transcribed with VERIFY=auto")
    print(f"misheard: {counts['misheard']} of {counts['heard']} good readings")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*FAILURES, "good readings"], help="measure these only")
    parser.add_argument("--no-recognizer", action="store_true", help="without transcripts")
    parser.add_argument("--hear-all", action="store_true", help="transcribe all good readings, not one speed of each")
    options = parser.parse_args()
    reader = Reader()
    judges = Judges(reader, None if options.no_recognizer else Recognizer())
    chosen = options.only or [*FAILURES, "good readings"]
    if "good readings" in chosen:
        measure_good(judges, reader, hear_all=options.hear_all)
    if names := [name for name in FAILURES if name in chosen]:
        measure_failures(judges, reader, names)


if __name__ == "__main__":
    main()
