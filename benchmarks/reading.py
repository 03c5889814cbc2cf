"""Measure how much of written text is heard as a person would read it, with and without verbalizing, and the time to the first audio.

    make bench-reading                              what a recogniser hears, 6 minutes
    python benchmarks/reading.py --first-audio      what verbalizing adds to the first audio of a stream, a minute
    python benchmarks/reading.py --nemo FOLDER      NeMo's English cases, from tests/nemo_text_processing/en/data_text_normalization in
                                                    github.com/NVIDIA/NeMo-text-processing

Each text of reading.tsv is spoken by the built-in voice and transcribed by Whisper tiny.en. It counts as right when the words heard are those of
the third column: no case and punctuation, numbers in words, spaces ignored. The recogniser's own mistakes count against both.
"""

from __future__ import annotations

import argparse
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
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests"), str(PROJECT / "benchmarks")]

from listening import transcribe, words  # noqa: E402 - the project's folder comes first
from speech import running_server  # noqa: E402 - the project's folder comes first

from audio_formats import SAMPLE_RATE, Samples  # noqa: E402 - the project's folder comes first
from hibari_model import HibariModel  # noqa: E402 - the project's folder comes first
from speech_model import SpeechOptions  # noqa: E402 - the project's folder comes first
from text_verbalizer import SpokenSegments, verbalize  # noqa: E402 - the project's folder comes first
from voice_presets import Voice, VoicePreset  # noqa: E402 - the project's folder comes first

VOICE = Voice(VoicePreset(name="heart", model="hibari", voice_key="heart"), PROJECT)
RUNS = 15
FRESH_SERVERS = 3


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
    parser = argparse.ArgumentParser()
    parser.add_argument("--first-audio", action="store_true")
    parser.add_argument("--nemo", type=Path)
    chosen = parser.parse_args()
    if chosen.nemo:
        measure_nemo(chosen.nemo)
    elif chosen.first_audio:
        measure_first_audio()
    else:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TEST_RUN_FOLDER"] = folder  # where `listening` keeps its transcripts
            measure()


def reading_texts() -> list[list[str]]:
    lines = Path(__file__).with_name("reading.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines if not line.startswith("#")]


def measure_nemo(folder: Path) -> None:
    """Compare word by word, without case, punctuation and spaces. Cases with several right answers are left out."""
    total, right = 0, 0
    for path in sorted(folder.glob("test_cases_*.txt")):
        if path.stem.endswith("normalize_with_audio"):
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            written, separator, expected = line.partition("~")
            said = verbalize(written).text
            same = plain(said) == plain(expected)
            total, right = total + bool(separator), right + (bool(separator) and same)
            if separator and not same:
                print(f"{path.stem}: {written!r} as {said!r}, not {expected!r}")
    print(f"NeMo's English cases: {right} of {total} ({right / total:.1%})")


def plain(text: str) -> str:
    return re.sub(r"[\W_]", "", text.lower())


def measure_first_audio() -> None:
    """Stream each text once with verbalizing and once without, from servers that never saw it; compare the waits for the first audio."""
    texts = [written for _, written, _ in reading_texts() if re.search(r"[0-9]", written)]
    waits: dict[tuple[str, bool], list[float]] = {}
    for run in range(FRESH_SERVERS):
        with running_server() as server:
            server.speak(input="Hello there, all of you.")
            time.sleep(1)  # the grammar is loaded in the background
            for number, text in enumerate(texts):
                for on in (True, False) if (number + run) % 2 else (False, True):
                    started = time.perf_counter()
                    answer = server.post(input=f"{text} This is the second sentence.", response_format="pcm", stream=True, normalize=on)
                    answer.read(480)
                    waits.setdefault((text, on), []).append((time.perf_counter() - started) * 1000)
                    answer.read()
    middle = {on: [statistics.median(waits[text, on]) for text in texts] for on in (False, True)}
    later = sorted((after - before, text) for before, after, text in zip(middle[False], middle[True], texts, strict=True))
    print(f"{len(texts)} texts whose first sentence has a number, {FRESH_SERVERS} fresh servers, first audio of a pcm stream in ms:")
    for name, times in (("as written", middle[False]), ("verbalized", middle[True]), ("later by", [wait for wait, _ in later])):
        times = sorted(times)
        print(f"{name}: median {statistics.median(times):.0f}, 95 % {times[len(times) * 95 // 100]:.0f}, longest {times[-1]:.0f}")
    for wait, text in later[-5:]:
        print(f"    {wait:.0f} ms later: {text}")


def measure() -> None:
    model = HibariModel()
    model.load(lambda _: None)
    model.warm_up([VOICE])
    verbalize("a1b2c3")
    texts = reading_texts()
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
