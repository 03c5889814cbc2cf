"""Conversations: what was said before is the context of the next reply, as in stock mlx-audio, and nothing is kept longer than it may be."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import csm_loading
import httpx
import mlx.core as mx
import numpy as np
import openai
import pytest
import soundfile
import tiny_csm
from conftest import RunningServer, csm_server
from mlx_audio.lm.sample_utils import make_sampler
from mlx_audio.tts.models.sesame import Model
from mlx_audio.tts.models.sesame.sesame import Segment
from tiny_csm import NEVER, ends_after
from tiny_weights import SMALL_CODEBOOKS
from websockets.sync.client import ClientConnection, connect

from config import Settings
from conversation_routes import Conversations, Turn
from csm_decoding import CONTEXT
from errors import NotFoundError
from speech_model import Codes, ContextPart, SpeechOptions
from speech_turn import SpokenPart

Event = dict[str, Any]


def part(text: str, frames: int, speaker: int = 0) -> ContextPart:
    return ContextPart(text, speaker, np.full((frames, SMALL_CODEBOOKS), 7, np.int16))


def with_conversations(work: Callable[[Conversations], Coroutine[Any, Any, None]], **settings: Any) -> None:
    async def scenario() -> None:
        await work(Conversations(Settings(**settings)))

    asyncio.run(scenario())


# --- What is kept ---


def test_turns_are_kept_in_order_and_those_without_a_recording_are_no_context() -> None:
    async def work(kept: Conversations) -> None:
        assert kept.context("a") == ()
        kept.add("a", Turn("user", 1, [part("Hello?", 5, 1)]))
        kept.add("a", Turn("user", 2, [part("Nobody heard me.", 0, 2)]))
        kept.add("a", Turn("assistant", 0, [part("Hi.", 3), part("How are you?", 4)]))
        assert [each.text for each in kept.context("a")] == ["Hello?", "Hi.", "How are you?"]
        assert [(turn.text, round(turn.seconds, 2)) for turn in kept.turns("a")][-1] == ("Hi. How are you?", 0.56)
        assert kept.context("b") == ()
        kept.forget("a")
        with pytest.raises(NotFoundError):
            kept.turns("a")
        with pytest.raises(NotFoundError):
            kept.forget("a")

    with_conversations(work)


def test_conversations_turns_and_bytes_are_bounded() -> None:
    async def work(kept: Conversations) -> None:
        for number in range(9):
            kept.add("long", Turn("user", 1, [part(str(number), 1)]))
        assert [turn.text for turn in kept.turns("long")] == ["5", "6", "7", "8"]
        for key in "abc":
            kept.add(key, Turn("user", 1, [part("x", 1)]))
            kept.context("long")
        with pytest.raises(NotFoundError):
            kept.turns("a")
        assert kept.turns("long"), "the one that was not used for longest goes first"
        kept.add("c", Turn("user", 1, [part("large", 60_000)]))  # 0.96 MB
        kept.add("d", Turn("user", 1, [part("large", 60_000)]))
        assert kept.context("c") == kept.context("long") == ()
        assert len(kept.context("d")) == 1

    with_conversations(work, max_conversations=3, max_conversation_turns=4, max_conversations_mb=1)


def test_an_idle_conversation_is_forgotten_without_a_request() -> None:
    async def work(kept: Conversations) -> None:
        kept.add("a", Turn("user", 1, [part("x", 1)]))
        while kept._kept:
            await asyncio.sleep(0.01)
        with pytest.raises(NotFoundError):
            kept.turns("a")

    with_conversations(work, conversation_idle_seconds=0.05)


def test_a_part_is_cut_at_tokens_and_words() -> None:
    spoken = SpokenPart(part("one two three four", 20), start=1, end=2.6, complete=True)
    cut = spoken.heard(1.8, pace=15)
    assert cut is not None
    assert (cut.text, len(cut.codes)) == ("one two", 10)
    assert spoken.heard(1.01, pace=15) is None
    assert spoken.heard(9, pace=15) is spoken.part


def test_of_an_unfinished_part_the_text_is_cut_at_the_pace_and_the_tokens_at_the_time() -> None:
    spoken = SpokenPart(part("one two three four", 10), start=1, end=1.8, complete=False)
    for seconds, text, frames in ((1.41, "one", 5), (1.8, "one two", 10), (9, "one two", 10)):
        cut = spoken.heard(seconds, pace=10)
        assert cut is not None
        assert (cut.text, len(cut.codes)) == (text, frames)
    late = SpokenPart(part("one two", 40), start=0, end=3.2, complete=False).heard(1.6, pace=100)
    assert late is not None
    assert late.text == "one", "it takes longer than the pace would have it"


# --- What CSM hears ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def positions_read(model: Model) -> Iterator[list[int]]:
    """How many positions of prompts were read, by each reading."""
    original, lengths = model.model.embed, []

    def embed(tokens: mx.array, mask: mx.array) -> object:
        lengths.append(tokens.shape[1])
        return original(tokens, mask)

    model.model.embed = embed
    yield lengths
    del model.model.embed


def stock_codes(model: Model, segments: list[tuple[ContextPart, Codes]], text: str, seed: int, frames: int) -> Codes:
    """Return the tokens that mlx-audio's own `generate` draws after these segments.

    Its codec is replaced by a table: decoded and encoded again, a reply would not have the tokens that were generated.
    """
    drawn: list[mx.array] = []
    generate_frame = model.model.generate_frame
    table = [mx.array(codes.T.astype(np.int32))[None] for _, codes in segments]

    def listen(*arguments: object) -> mx.array:
        drawn.append(generate_frame(*arguments))
        return drawn[-1]

    model.model.generate_frame, model._audio_tokenizer.encode = listen, lambda audio: table[int(audio.item())]
    context = [Segment(speaker=said.speaker, text=said.text, audio=mx.array([number])) for number, (said, _) in enumerate(segments)]
    mx.random.seed(seed)
    try:
        sampler = make_sampler(temp=0.9, top_k=50)
        list(model.generate(text, context=context, sampler=sampler, voice_match=False, max_audio_length_ms=80 * frames))
    finally:
        model.model.generate_frame = generate_frame
        del model._audio_tokenizer.encode
    return np.concatenate([np.array(frame) for frame in drawn]).astype(np.int16)


def test_a_dialogue_of_ten_turns_has_stocks_tokens_and_reads_only_what_is_new(
    recordings: Path, model: Model, untouched: Model, folder: Path, positions_read: list[int]
) -> None:
    speaker = csm_loading.speaker(model, recordings, folder, guard="off")
    voice = csm_loading.voice(max_audio_length_ms=240, voice_match=True)
    prompt = ContextPart("hm, hm.", 0, speaker._prompts._codes(speaker._prompts._recording(voice)))
    said: list[ContextPart] = []
    for turn in range(5):
        noise = np.random.default_rng(turn).normal(0, 0.1, 4800).astype(np.float32)
        said.append(ContextPart(f"Question {turn}?", 1, speaker.encode(noise)))
        positions_read.clear()
        text = f"This is answer {turn}."
        (chunk,) = speaker.speak([text], voice, SpeechOptions(turn, context=tuple(said)), lambda: False)
        assert chunk.codes is not None
        theirs = stock_codes(untouched, [(each, each.codes) for each in [prompt, *said]], text, turn, 3)
        np.testing.assert_array_equal(chunk.codes, theirs)
        new = said[-2:] if turn else [prompt, *said]
        lengths = [len(speaker._prompts._text(each.text, each.speaker)[0]) + len(each.codes) + 1 for each in new]
        assert sum(positions_read) == sum(lengths) + len(speaker._prompts.text(voice, text)[0])
        said.append(ContextPart(text, 0, chunk.codes))
    (without,) = speaker.speak([text], voice, SpeechOptions(4, context=()), lambda: False)
    assert not np.array_equal(without.samples, chunk.samples), "the context makes a difference"


def test_stock_has_no_layout_for_a_turn_without_a_recording(untouched: Model) -> None:
    """So such a turn is not in our prompt either: CSM's own chat template refuses it, too."""
    with pytest.raises(TypeError):
        list(untouched.generate("Hi.", context=[Segment(speaker=1, text="Hello?", audio=None)], voice_match=False))


def test_a_cut_turn_reads_again_only_what_follows_the_cut(recordings: Path, model: Model, folder: Path, positions_read: list[int]) -> None:
    speaker = csm_loading.speaker(model, recordings, folder, guard="off")
    voice = csm_loading.voice(max_audio_length_ms=80)
    first, cut = part("One.", 2, 1), part("Two,", 2)
    for context in ((first,), (first, cut)):  # between them the reply "Two, three." was cut
        positions_read.clear()
        list(speaker.speak(["Go on."], voice, SpeechOptions(1, context=context), lambda: False))
    assert positions_read == [len(speaker._prompts.segments(voice, [cut])[1][0]), len(speaker._prompts.text(voice, "Go on.")[0])]


def test_the_latest_turns_that_fit_are_read(recordings: Path, model: Model, folder: Path) -> None:
    speaker = csm_loading.speaker(model, recordings, folder, guard="off")
    voice = csm_loading.voice(max_audio_length_ms=80)
    context = [part(f"Number {number}.", 300, 1) for number in range(9)]
    fitting = speaker._fitting(context, ["A new text."], voice)
    assert [each.text for each in fitting] == [f"Number {number}." for number in range(9)][-len(fitting) :]
    length = len(speaker._prompt("A new text.", voice, fitting)[0][0])
    assert CONTEXT - 350 < length < CONTEXT
    assert speaker._fitting(context, ["A new text."] * 2, voice) == fitting
    assert speaker._fitting([part("x", 2100)], ["A new text."], voice) == []


def test_each_segment_can_hear_the_one_before_it(recordings: Path, model: Model, folder: Path) -> None:
    texts = ["One here.", "  ", "Two here.", "Three here."]
    voice = csm_loading.voice(max_audio_length_ms=160)
    ordered = csm_loading.speaker(model, recordings, folder, guard="off", context_segments=1)
    chunks = list(ordered.speak(texts, voice, SpeechOptions(5), lambda: False))
    assert [(chunk.segment, chunk.last) for chunk in chunks] == [(0, True), (1, True), (2, True), (3, True)]
    assert chunks[2].codes is not None
    alone = csm_loading.speaker(model, recordings, folder, guard="off")
    heard = ContextPart("Two here.", 0, chunks[2].codes)
    (third,) = alone._speak(["Three here."], voice, SpeechOptions(5, context=(heard,)), lambda: None, 3)
    np.testing.assert_array_equal(chunks[3].samples, third.samples)
    (deaf,) = alone._speak(["Three here."], voice, SpeechOptions(5, context=()), lambda: None, 3)
    assert not np.array_equal(third.samples, deaf.samples)


def test_a_segment_that_was_streamed_is_heard_once(recordings: Path, model: Model, folder: Path) -> None:
    """Not again for each of its blocks: the segment after it is the same as without streaming."""
    voice = csm_loading.voice(max_audio_length_ms=480)
    ordered = csm_loading.speaker(model, recordings, folder, guard="off", context_segments=2)
    streamed, whole = (
        list(ordered.speak(["One here.", "Two here."], voice, SpeechOptions(5, streamed=streamed), lambda: False))
        for streamed in (True, False)
    )
    assert sum(chunk.segment == 0 for chunk in streamed) > 2
    np.testing.assert_array_equal(streamed[-1].samples, whole[-1].samples)


# --- Over HTTP ---


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    cache = tiny_csm.build(script={"": [ends_after(5)], "L": [NEVER], "D": [ends_after(30)]}, small_codec=True)
    with csm_server(tmp_path_factory.mktemp("talking"), cache, {"tiny": 100}, MAX_RETRIES=0) as running:
        yield running


def ask(server: RunningServer, text: str, **fields: Any) -> httpx.Response:
    body = {"model": "m", "voice": "tiny", "input": text, "response_format": "pcm", "seed": 1} | fields
    return httpx.post(f"{server.url}/v1/audio/speech", json=body, timeout=240)


def turns(server: RunningServer, key: str, **query: Any) -> list[dict[str, Any]]:
    answer = httpx.get(f"{server.url}/v1/audio/conversations/{key}/turns", params=query)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["turns"])


def files_of(server: RunningServer) -> list[tuple[str, int]]:
    """Return the server's files and their sizes, without its log."""
    files = (path for path in server.cache_dir.rglob("*") if path.is_file() and not path.name.startswith("server.log"))
    return sorted((str(path), path.stat().st_size) for path in files)


def test_replies_and_added_turns_make_a_conversation_that_can_be_forgotten(talking: RunningServer) -> None:
    url = f"{talking.url}/v1/audio/conversations/kitchen/turns"
    assert httpx.get(url).json()["error"]["code"] == "not_found"
    ask(talking, "hello.")
    files = files_of(talking)
    first = ask(talking, "hello there.", conversation="kitchen")
    assert first.headers["X-Conversation"] == "used"
    recording = io.BytesIO()
    soundfile.write(recording, np.random.default_rng(1).normal(0, 0.1, 24_000), 24_000, format="WAV")
    added = httpx.post(
        url, data={"text": "what is new?", "speaker": "3"}, files={"audio_sample": ("a.wav", recording.getvalue())}, timeout=120
    )
    assert added.json() == {"role": "user", "speaker": 3, "seconds": 1.04, "characters": 12, "in_prompt": True, "text": "what is new?"}
    unheard = httpx.post(url, data={"text": "only words."}, files={"x": b""}).json()
    assert (unheard["seconds"], unheard["in_prompt"]) == (0, False)
    assert ask(talking, "nothing at all.", conversation="kitchen", response_format="mp3").status_code == 200
    shown = turns(talking, "kitchen")
    assert [(turn["role"], turn["speaker"]) for turn in shown] == [("assistant", 0), ("user", 3), ("user", 1), ("assistant", 0)]
    assert [turn["in_prompt"] for turn in shown] == [True, True, False, True]
    assert all("text" not in turn for turn in shown)
    assert [turn["text"] for turn in turns(talking, "kitchen", text=True)][::3] == ["hello there.", "nothing at all."]
    assert shown[0]["seconds"] == pytest.approx(len(first.content) / 48_000)
    assert "X-Conversation" not in ask(talking, "hello.").headers
    assert len(turns(talking, "kitchen")) == 4, "nothing is kept unless a request asks for it"
    assert files_of(talking) == files, "nothing is written"
    assert httpx.delete(url).json() == {"id": "kitchen", "deleted": True}
    assert httpx.get(url).status_code == 404
    log = talking.log_text()
    assert "nothing at all" not in log
    assert "what is new" not in log


def test_a_library_sends_the_conversation_in_its_extra_body(talking: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{talking.url}/v1", api_key="any", timeout=120) as client:
        client.audio.speech.create(model="m", voice="tiny", input="hello there.", extra_body={"conversation": "library"})
    assert [turn["text"] for turn in turns(talking, "library", text=True)] == ["hello there."]


def test_invalid_turns_are_refused(talking: RunningServer) -> None:
    url = f"{talking.url}/v1/audio/conversations/refused/turns"
    cases: list[tuple[dict[str, str], bytes, str]] = [
        ({"text": " "}, b"", "invalid_text"),
        ({"text": "x", "speaker": "10"}, b"", "invalid_speaker"),
        ({"text": "x"}, b"no sound", "invalid_audio"),
    ]
    for fields, data, code in cases:
        files = {"audio_sample": ("a.wav", data)} if data else {"none": b""}
        answer = httpx.post(url, data=fields, files=files, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert httpx.get(url).status_code == 404


def test_other_models_ignore_the_conversation_and_say_so(talking: RunningServer) -> None:
    assert ask(talking, "Hello.", voice="heart", conversation="elsewhere").headers["X-Conversation"] == "ignored"
    assert httpx.get(f"{talking.url}/v1/audio/conversations/elsewhere/turns").status_code == 404


class Talk:
    """A client of the WebSocket, with one conversation."""

    def __init__(self, connection: ClientConnection, conversation: str, **fields: Any) -> None:
        self._connection = connection
        self.audio = b""
        self.send("session.start", **({"voice": "tiny", "conversation": conversation, "seed": 1} | fields))
        assert self.until("session.created")["conversation"] == "used"

    def send(self, kind: str, **fields: Any) -> None:
        self._connection.send(json.dumps({"type": kind, **fields}))

    def until(self, kind: str) -> Event:
        while True:
            message = self._connection.recv(120)
            if isinstance(message, bytes):
                self.audio += message
            elif (event := json.loads(message))["type"] == kind:
                return dict(event)

    def say(self, text: str) -> None:
        self.send("input_text.append", text=text)
        self.send("input_text.flush")
        self.until("segment.done")

    def until_audio(self, seconds: float) -> None:
        while len(self.audio) < 48_000 * seconds:
            message = self._connection.recv(120)
            self.audio += message if isinstance(message, bytes) else b""


@contextmanager
def talk(server: RunningServer, conversation: str, **fields: Any) -> Iterator[Talk]:
    with connect(f"ws://127.0.0.1:{server.port}/v1/audio/speech/stream", proxy=None) as connection:
        yield Talk(connection, conversation, **fields)


def test_an_interruption_cuts_the_last_turn(talking: RunningServer) -> None:
    with talk(talking, "cut") as client:
        client.say("one two three four. ")
        client.send("input_text.append", text="five six seven eight.")
        client.send("input_text.done")
        second = client.until("segment.done")
        client.until("done")
        (whole,) = turns(talking, "cut", text=True)
        assert whole["text"] == "one two three four. five six seven eight."
        middle = (second["start"] + second["end"]) / 2
        client.send("playback.interrupted", played_ms=middle * 1000)
        answer = client.until("playback.truncated")
        assert answer["text"] == "one two three four. five six"
        (turn,) = turns(talking, "cut", text=True)
        assert turn["text"] == answer["text"]
        assert turn["seconds"] == pytest.approx(0.75 * whole["seconds"], abs=0.08)
        client.send("playback.interrupted", played_ms=0)
        assert client.until("playback.truncated")["text"] == ""
        assert turns(talking, "cut") == []


@pytest.mark.parametrize("before", ["", "one two three four. "])
def test_an_interruption_inside_an_unfinished_sentence_keeps_what_was_heard_of_it(talking: RunningServer, before: str) -> None:
    long = "Long ago there was a house in the hills, and in it lived a man who had never seen the sea or the towns by the sea"
    key = f"early {len(before)}"
    with talk(talking, key) as client:
        if before:
            client.say(before)
        client.send("input_text.append", text=long)
        client.send("input_text.done")
        start = client.until("segment.start")["start"]
        client.until_audio(start + 0.8)
        played = start + 0.6
        client.send("playback.interrupted", played_ms=1000 * played)
        assert client.until("done")["status"] == "cancelled"
        answer = client.until("playback.truncated")
    (turn,) = turns(talking, key, text=True)
    assert turn["text"] == answer["text"]
    assert (before + long).startswith(answer["text"])
    assert len(before) + 1 < answer["end_char"] < len(before) + len(long) / 2
    pause = 0.3 if before else 0  # between the sentences: no tokens
    assert turn["seconds"] == pytest.approx(played - pause, abs=0.15)
    assert talking.health()["models"]["csm-1b"]["active"] == 0


def test_a_sentence_that_is_cancelled_leaves_the_conversation_as_it_was(talking: RunningServer) -> None:
    with talk(talking, "cancelled") as client:
        client.say("one two three four. ")
        client.send("input_text.append", text="Long ago there was a house in the hills, and in it lived a man. ")
        client.until("segment.start")
        client.until_audio(0.9)
        client.send("cancel")
        client.until("done")
    assert [turn["text"] for turn in turns(talking, "cancelled", text=True)] == ["one two three four."]


def test_a_deadline_counts_for_each_sentence(talking: RunningServer) -> None:
    ask(talking, "hello.")  # before the first one the pace is unknown
    sentences = "Do one two three four. Do five six seven eight. "
    for _ in range(2):  # of the other voice, too
        ask(talking, sentences, voice="heart")
    with talk(talking, "late", deadline_ms=600_000) as client:
        client.send("input_text.append", text=sentences)
        client.send("input_text.done")
        begun = client.until("segment.start")
        assert (begun["voice"], begun.get("fallback_for")) == ("tiny", None)
        assert client.until("done")["status"] == "completed"
    with talk(talking, "late", deadline_ms=1) as client:
        client.send("input_text.append", text=sentences)
        error = client.until("error")["error"]
        assert (error["code"], error["param"]) == ("deadline_unreachable", "deadline_ms")
        assert client.until("done")["status"] == "failed"
    pace = talking.health()["models"]["csm-1b"]["pace"]
    half = 500 * (pace["start_seconds"] + pace["seconds_per_character"] * len("Do one two three four."))
    with talk(talking, "late", deadline_ms=int(half), on_deadline="fallback", seed=2) as client:
        client.send("input_text.append", text=sentences + "Do the rest.")
        client.send("input_text.done")
        for _ in range(2):
            begun = client.until("segment.start")
            assert (begun["voice"], begun["fallback_for"]) == ("heart", "tiny")
        assert client.until("done")["status"] == "completed"
    assert len(turns(talking, "late")) == 1, "only what CSM has spoken"
