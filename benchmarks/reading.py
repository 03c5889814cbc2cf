"""Measure how much of written text is heard as a person would read it, with and without verbalizing, and the time to the first audio.

    make bench-reading

Each text of reading.tsv is spoken by the built-in voice and transcribed by Whisper tiny.en. It counts as right when the words heard are those of
the third column: no case and punctuation, numbers in words, spaces ignored. The recogniser's own mistakes count against both.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

from listening import transcribe, words  # noqa: E402 - the project's folder comes first

from audio_formats import SAMPLE_RATE, Samples  # noqa: E402 - the project's folder comes first
from hibari_model import HibariModel  # noqa: E402 - the project's folder comes first
from speech_model import SpeechOptions  # noqa: E402 - the project's folder comes first
from text_verbalizer import SpokenSegments, verbalize  # noqa: E402 - the project's folder comes first
from voice_presets import Voice, VoicePreset  # noqa: E402 - the project's folder comes first

VOICE = Voice(VoicePreset(name="heart", model="hibari", voice_key="heart"), PROJECT)
RUNS = 15


def spoken(model: HibariModel, text: str, *, verbalized: bool) -> tuple[Samples, float]:
    """The samples, and the seconds to the first of them."""
    started = time.perf_counter()
    segments = SpokenSegments([text], "en" if verbalized else None)
    chunks, first = [], 0.0
    for chunk in model.speak(segments, VOICE, SpeechOptions(1, verbalize=verbalized), lambda: False):
        first = first or time.perf_counter() - started
        chunks.append(chunk.samples)
    return np.concatenate(chunks), first


def letters(text: str) -> str:
    """The words of a text in one form: "12" and "twelve", "A M" and "AM" are the same."""
    return re.sub(r"[^a-z0-9]", "", " ".join(words(verbalize(text).text)).lower())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TEST_RUN_FOLDER"] = folder  # where `listening` keeps its transcripts
        measure()


def measure() -> None:
    model = HibariModel()
    model.load(lambda _: None)
    model.warm_up([VOICE])
    verbalize("a1b2c3")
    lines = Path(__file__).with_name("reading.tsv").read_text(encoding="utf-8").splitlines()
    texts = [line.split("\t") for line in lines if not line.startswith("#")]
    measure_verbalizer([text[1] for text in texts])
    total: Counter[str] = Counter()
    right: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    for kind, written, expected in texts:
        total[kind] += 1
        for verbalized in (False, True):
            heard = transcribe(spoken(model, written, verbalized=verbalized)[0], SAMPLE_RATE)
            same = letters(heard) == letters(expected)
            right[verbalized][kind] += same
            if verbalized and not same:
                print(f"misheard: {written!r} as {heard!r}")
    print("\n| class | texts | before | after |\n|---|---|---|---|")
    for kind, count in total.items():
        print(f"| {kind} | {count} | {right[False][kind]} | {right[True][kind]} |")
    print(f"| all | {total.total()} | {right[False].total()} | {right[True].total()} |")
    for name, chosen in (("all texts", texts), ("a plain sentence", [("", "The quick brown fox jumps over the lazy dog.", "")])):
        times = {
            on: statistics.median(spoken(model, text[1], verbalized=on)[1] for _ in range(RUNS // 3) for text in chosen)
            for on in (False, True)
        }
        print(f"first audio, median, {name}: {times[False] * 1000:.1f} ms before, {times[True] * 1000:.1f} ms after")


def measure_verbalizer(texts: list[str]) -> None:
    """Processor time of a text that was never read before, which is what the first audio waits for."""
    lines = (PROJECT / "tests" / "spoken_forms.tsv").read_text(encoding="utf-8").splitlines()
    texts = texts + [line.split("\t")[1] for line in lines if line.count("\t") > 1 and not line.startswith("#")]
    times = []
    for text in texts:
        started = time.process_time()
        verbalize(text)
        times.append((time.process_time() - started) * 1000)
    middle, most = statistics.median(times), max(times)
    print(
        f"verbalizing {len(texts)} texts, processor time: median {middle:.1f} ms, 95 % {sorted(times)[len(times) * 95 // 100]:.1f} ms, most {most:.0f} ms"
    )


if __name__ == "__main__":
    main()
