"""The work for a text is bounded by its length, whatever it consists of: a search for the slowest texts, with a fixed seed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from conftest import RunningServer, start_server

from config import Settings
from hibari_model import _FRAME_SECONDS, HibariModel
from speech_model import SegmentLengths, SpeechOptions
from text_normalizer import has_speech, normalize_text
from text_splitter import split_text
from text_verbalizer import SpokenSegments, expected_seconds, spoken_length
from voice_presets import VoicePresetManager

# fmt: off
UNITS = [
    "a", "A", "1", "7", "word ", "two words. ", "- ", "1. ", "# ", "> ", "* ", "|", "|a|b|\n", "|-|-|\n", "=", "-", "--", "—", "+", "*", "**", "_",
    "~~", "`", "```\n", "```text\n", "\\", "\n", "\n\n", "  \n", " ", "\t", "[", "]", "[a](", "](b)", "[^1]", "[a]: ", "- [ ] ", "(", ")", "{", "<",
    "<a>", "<a b='", "</a>", "<!--", "<?", "<script>", "&", "&amp;", "http://", "http://a.b/", "www.", "a.b", "a@b.c ", "://", "%", "№", "¼", "1/",
    "1,", "1.", "$1", "°", "²", "√", "⁰", "€", "§", "→", "👍", "👩‍👩‍👧", "🇩🇪", "🇩", "🏽", "1\u20e3", "\u0301", "\u0301\u0316", "\u200d", "\ufe0f",
    "\U000e0061", "\u00ad", "\ue000", "。", "、", "中", "あ", "「", "」", "«", "”", '"', "'", "’", "A'", ".", "...", "…", "!", "?", ",", ";", ":", "é",
    "я", "α", "ا", "नि", "ไ", "한", "•", "■ ", "\r", "\u2028", "\x85", "\u3000", "Mr. ", "A. ", "IV ", "NASA ", "10:30 ", "1990s ",
]
# fmt: on

# Each of them took quadratic time once, or was too deep for the parser.
FOUND: list[Callable[[int], str]] = [
    lambda length: "- " + "。" * length + "a",
    lambda length: "🇩🇪" * (length // 2),
    lambda length: "a" + "\u0301\u0316" * (length // 2),
    lambda length: "```text\n" * (length // 8),
    lambda length: "|a" * (length // 6) + "\n" + "|-" * (length // 6) + "\n" + "a\n" * (length // 6),
]


def clean(text: str) -> None:
    normalize_text(text)


def split_for_hibari(text: str) -> None:
    split_text(text, SegmentLengths(target=1, maximum=320, first=1), lambda part: spoken_length(part) <= 320)


def split_for_csm(text: str) -> None:
    split_text(text, SegmentLengths(target=320, maximum=400, first=120), lambda part: spoken_length(part) <= 400)


def processor_seconds(work: Callable[[str], None], text: str) -> float:
    started = time.thread_time()
    work(text)
    return time.thread_time() - started


def growth(work: Callable[[str], None], make: Callable[[int], str], length: int) -> float:
    """How much more processor time four times the text takes: 4 if it is linear, 16 if it is quadratic."""
    return min(processor_seconds(work, make(4 * length)) / processor_seconds(work, make(length)) for _ in range(2))


def random_text(generator: random.Random) -> Callable[[int], str]:
    """A text of any length: a beginning, one or two repeated parts, an end."""
    beginning, first, second, end = ("".join(generator.choices(UNITS, k=generator.randint(low, 3))) for low in (0, 1, 1, 0))
    second = second if generator.random() < 0.3 else first
    return lambda length: beginning + first * (length // 2 // len(first)) + second * (length // 2 // len(second)) + end


@pytest.mark.parametrize("work", [clean, split_for_hibari, split_for_csm])
@pytest.mark.parametrize("make", FOUND, ids=["cjk", "flags", "marks", "fences", "table"])
def test_texts_that_took_quadratic_time(work: Callable[[str], None], make: Callable[[int], str]) -> None:
    assert growth(work, make, 8000) < 9


def test_no_random_text_takes_more_than_linear_time() -> None:
    generator = random.Random(16)
    for number in range(30):
        make = random_text(generator)
        for work in (clean, split_for_hibari):
            assert growth(work, make, 1500) < 9 or growth(work, make, 6000) < 9, (number, make(60))


# --- The built-in voice ---

# Texts that became long, or took long, for their number of characters.
SLOW = ["%W" * 40, "1/" * 50, "¼" * 100, "№%" * 40, "W" * 120, "aAaB" * 30, "FBI " * 60, "3'4\" " * 20, "xq " * 60]


@pytest.fixture(scope="module")
def hibari() -> HibariModel:
    model = HibariModel()
    model.load(lambda _: None)
    return model


def spoken(model: HibariModel, text: str, *, verbalize: bool) -> tuple[list[float], int]:
    """The seconds of each block that the voice's network computed at once, and how often the model asked whether to go on."""
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return False

    settings = Settings(csm="off")
    heart = VoicePresetManager(settings.presets_dir, "heart").catalog.resolve("heart")
    segments = split_text(text, model.segment_lengths, lambda part: spoken_length(part) <= model.segment_lengths.maximum)
    words = SpokenSegments(segments, "en" if verbalize else None)
    network = model._voices["heart"].sess
    blocks: dict[tuple[int, int], float] = {}
    for chunk in model.speak(words, heart, SpeechOptions(seed=1, verbalize=verbalize), cancelled):
        if network.runs:
            blocks[chunk.segment, len(network.runs)] = sum(network.runs[-1][1]) * _FRAME_SECONDS
    return list(blocks.values()), asked


@pytest.mark.parametrize(
    ("text", "verbalize"), [(text, True) for text in SLOW] + [(text, False) for text in SLOW[3:7]], ids=lambda value: str(value)[:5]
)
def test_no_part_of_a_slow_text_is_long(hibari: HibariModel, text: str, verbalize: bool) -> None:
    """A part is what nothing can interrupt. The voice takes about 0.016 s of processor time for a second of it."""
    seconds, asked = spoken(hibari, text, verbalize=verbalize)
    assert asked >= len(seconds)
    assert max(seconds) < 30
    assert sum(seconds) < 3 * expected_seconds(text)


def test_no_part_of_a_random_text_is_long(hibari: HibariModel) -> None:
    generator = random.Random(15)
    for number in range(20):
        text = normalize_text(random_text(generator)(100))
        seconds, asked = spoken(hibari, text, verbalize=True) if has_speech(text) else ([], 0)
        assert asked >= len(seconds)
        assert max(seconds, default=0) < 30, (number, text)


# --- The length of the audio ---


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = start_server(tmp_path_factory.mktemp("limited"), MAX_AUDIO_SECONDS=20)
    try:
        running.wait_for(lambda health: health["status"] == "ok")
        yield running
    finally:
        running.stop()


def speak(server: RunningServer, text: str, **fields: object) -> httpx.Response:
    body = {"model": "m", "voice": "heart", "input": text, "response_format": "wav"} | fields
    return httpx.post(f"{server.url}/v1/audio/speech", json=body, timeout=60)


def too_long(response: httpx.Response) -> str:
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("input_too_long", "input")
    assert "MAX_AUDIO_SECONDS" in error["message"]
    return str(error["message"])


@pytest.mark.parametrize(("text", "speed"), [("¼" * 4096, 0.25), ("№%" * 2048, 0.5), ("1/" * 2048, 0.25)], ids=["¼", "№%", "1/"])
def test_too_much_audio_is_refused_before_the_work_starts(server: RunningServer, text: str, speed: float) -> None:
    for streamed in (False, True):
        assert "about" in too_long(speak(server, text, speed=speed, stream=streamed))
    assert server.health()["queue"]["active"] == 0


def test_the_speed_counts(limited: RunningServer) -> None:
    text = "It takes more than ten seconds to read this sentence out. " * 4
    assert speak(limited, text).status_code == 200
    assert "about 5" in too_long(speak(limited, text, speed=0.25))


def test_audio_that_becomes_longer_than_expected_is_no_complete_answer(limited: RunningServer) -> None:
    text = "FBI " * 60
    assert expected_seconds(text) < 20
    assert "more than 2" in too_long(speak(limited, text))
    with pytest.raises(httpx.RemoteProtocolError):
        speak(limited, text, stream=True)
    assert speak(limited, "Good.").status_code == 200


def test_a_client_that_leaves_during_a_slow_text_does_not_cost_the_model(server: RunningServer) -> None:
    for text in ("№%" * 400, "¼" * 800):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/audio/speech", json={"model": "m", "voice": "heart", "input": text}, timeout=0.5)
        assert speak(server, "Good.").status_code == 200
    assert "it hangs" not in server.log_text()
