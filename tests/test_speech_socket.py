"""WS /v1/audio/speech/stream: text that is spoken while it is written, over a real socket with the built-in voice."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import RunningServer
from listening import decode, transcribe, word_error_rate, words
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.sync.client import ClientConnection, connect

TEXT = (
    "The train left the station at nine. Nobody had expected it to be on time! Was that not a good sign? "
    "Outside, the fields were green, and the river was full after the rain."
)
# The recogniser takes a text that repeats itself for its own mistake and hears it again and again.
LONGER = (
    f"{TEXT} A boy with a large dog sat down beside the window. He asked me whether the sea was far away. "
    "I told him that we would see it in an hour, and he smiled. Then the dog fell asleep on my foot."
)
Event = dict[str, Any]


class Talk:
    """A client of the socket: the events it got, and the audio."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.events: list[Event] = []
        self.audio = b""

    def send(self, kind: str, **fields: object) -> None:
        self.connection.send(json.dumps({"type": kind, **fields}))

    def until(self, kind: str, seconds: float = 60) -> Event:
        """Receive up to the next event of this kind."""
        while True:
            message = self.connection.recv(seconds)
            if isinstance(message, bytes):
                self.audio += message
                continue
            self.events.append(json.loads(message))
            if self.events[-1]["type"] == kind:
                return self.events[-1]
            assert self.events[-1]["type"] != "error" or kind == "done", self.events[-1]

    def until_audio(self) -> None:
        """Receive up to the first audio."""
        while not self.audio:
            message = self.connection.recv(60)
            if isinstance(message, bytes):
                self.audio = message
            else:
                self.events.append(json.loads(message))

    def all_of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["type"] == kind]


def address(server: RunningServer) -> str:
    return f"ws://127.0.0.1:{server.port}/v1/audio/speech/stream"


@contextlib.contextmanager
def talk(server: RunningServer, start: bool = True, headers: dict[str, str] | None = None, **fields: object) -> Iterator[Talk]:
    with connect(address(server), additional_headers=headers, proxy=None, max_size=None) as connection:
        opened = Talk(connection)
        if start:
            opened.send("session.start", **({"model": "csm-1b", "voice": "heart", "seed": 11} | fields))
            opened.until("session.created")
        yield opened


def say(talking: Talk, text: str, step: int = 7) -> Event:
    """Send a text in small parts and wait for the end of its audio."""
    for start in range(0, len(text), step):
        talking.send("input_text.append", text=text[start : start + step])
    talking.send("input_text.done")
    return talking.until("done")


def test_a_text_in_parts_is_spoken_in_order(server: RunningServer) -> None:
    with talk(server, timestamps="word") as talking:
        done = say(talking, TEXT)
    assert (done["status"], done["characters"]) == ("completed", len(TEXT))
    assert word_error_rate(TEXT, transcribe(*decode(talking.audio, "pcm"))) == 0
    assert done["audio_seconds"] == pytest.approx(len(talking.audio) / 48_000, abs=0.002)
    starts = talking.all_of("segment.start")
    assert "".join(event["text"] for event in starts) == TEXT
    assert [(event["start_char"], event["end_char"]) for event in starts[:2]] == [(0, 36), (36, 74)]
    spoken = [word for event in talking.all_of("timestamps") for word in event["words"]]
    assert [TEXT[word["start_char"] : word["end_char"]] for word in spoken] == [word["text"] for word in spoken]
    assert [word["start"] for word in spoken] == sorted(word["start"] for word in spoken)


def test_events_come_beside_their_audio(server: RunningServer) -> None:
    with talk(server) as talking:
        for start in range(0, len(TEXT), 9):
            talking.send("input_text.append", text=TEXT[start : start + 9])
        talking.send("input_text.done")
        for number in range(3):
            begun = talking.until("segment.start")
            assert begun["segment"] == number
            assert begun["start"] == pytest.approx(len(talking.audio) / 48_000, abs=0.002)
            ended = talking.until("segment.done")
            assert ended["end"] == pytest.approx(len(talking.audio) / 48_000, abs=0.002)


def test_the_first_sentence_is_spoken_while_the_text_is_written(server: RunningServer) -> None:
    with talk(server) as talking:
        talking.send("input_text.append", text=TEXT[:45])
        talking.until_audio()
        talking.until("segment.done")
        assert talking.all_of("segment.start")[0]["text"] == TEXT[:36]
        talking.send("input_text.append", text=TEXT[45:])
        talking.send("input_text.done")
        talking.until("done")
    assert word_error_rate(TEXT, transcribe(*decode(talking.audio, "pcm"))) == 0


def test_other_formats_are_one_stream(server: RunningServer) -> None:
    with talk(server, response_format="mp3", speed=1.25) as talking:
        done = say(talking, TEXT[:74])
    samples, rate = decode(talking.audio, "mp3")
    assert samples.size / rate == pytest.approx(done["audio_seconds"], rel=0.05)
    assert word_error_rate(TEXT[:74], transcribe(samples, rate)) == 0


def test_a_pause_in_the_writing_speaks_complete_words(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(SOCKET_PAUSE_MS=100)
    with talk(server) as talking:
        talking.send("input_text.append", text="It costs about three dol")
        assert talking.until("segment.start")["text"] == "It costs about three "
        talking.send("input_text.append", text="lars and 4")
        assert talking.until("segment.start")["text"] == "dollars and "
        talking.until("segment.done")
        talking.send("input_text.append", text="0 cents")
        talking.send("input_text.done")
        assert talking.until("segment.start")["text"] == "40 cents"
        assert talking.until("done")["status"] == "completed"


def test_a_flush_speaks_everything_and_the_turn_goes_on(server: RunningServer) -> None:
    with talk(server) as talking:
        talking.send("input_text.append", text="Hold on")
        talking.send("input_text.flush")
        assert talking.until("segment.start")["text"] == "Hold on"
        talking.until("segment.done")
        assert say(talking, ", here it is.")["status"] == "completed"


def test_markup_across_messages_is_not_spoken(server: RunningServer) -> None:
    text = "**This is bold. All of it.** See [the page. Now](https://example.com/a.b).\n\n```py\nprint('x. Y')\n```\n\nThat was 🎉 all."
    with talk(server) as talking:
        say(talking, text, step=1)
    assert "".join(event["text"] for event in talking.all_of("segment.start")).count("**") == 2
    heard = transcribe(*decode(talking.audio, "pcm"))
    assert word_error_rate("This is bold. All of it. See the page. Now. That was all.", heard) <= 0.1


def test_pauses_are_spoken_and_a_refused_one_is_an_error(server: RunningServer) -> None:
    seconds = []
    for text in ("One. Two.", "One. [pause:2s] Two."):
        with talk(server) as talking:
            seconds.append(say(talking, text)["audio_seconds"])
    assert seconds[1] - seconds[0] == pytest.approx(2, abs=0.4)
    with talk(server) as talking:
        assert say(talking, "One. [pause:99s] Two.")["status"] == "failed"
        (error,) = (event["error"] for event in talking.all_of("error"))
        assert error["code"] == "invalid_input"
        assert "at most 10 s" in error["message"]


def test_emoji_cut_in_two_by_javascript_do_no_harm(server: RunningServer) -> None:
    with talk(server) as talking:
        talking.connection.send('{"type": "input_text.append", "text": "Good \\ud83c"}')
        talking.connection.send('{"type": "input_text.append", "text": "\\udf89 morning."}')
        talking.send("input_text.done")
        assert talking.until("done")["characters"] == len("Good 🎉 morning.")


def test_several_turns_use_one_connection(server: RunningServer) -> None:
    with talk(server) as talking:
        assert [say(talking, f"This is reply number {number}.")["turn"] for number in ("one", "two")] == [0, 1]
        talking.send("session.start", voice="heart", response_format="wav")
        assert talking.until("session.created")["response_format"] == "wav"
        talking.audio = b""
        assert say(talking, "Now as a file.")["turn"] == 2
    assert talking.audio.startswith(b"RIFF")


def test_a_cancel_stops_the_work_and_the_next_turn_works(server: RunningServer) -> None:
    with talk(server) as talking:
        talking.send("input_text.append", text=TEXT * 20)
        talking.until_audio()
        talking.send("cancel")
        assert talking.until("done")["status"] == "cancelled"
        assert server.health()["models"]["hibari"]["active"] == 0
        talking.audio = b""
        assert say(talking, "All is well again.")["status"] == "completed"
    assert words(transcribe(*decode(talking.audio, "pcm"))) == words("All is well again.")


def test_a_client_that_goes_away_stops_the_work(server: RunningServer) -> None:
    with talk(server) as talking:
        talking.send("input_text.append", text=TEXT * 20)
        talking.until_audio()
    server.wait_for(lambda health: health["queue"] == {"active": 0, "waiting": 0, "limit": 32}, seconds=10)
    assert "path='/v1/audio/speech/stream' status=101" in server.log_text()
    assert "The train left" not in server.log_text()


def test_a_slow_writer_holds_nobody_up(server: RunningServer) -> None:
    with talk(server) as talking, server.client() as client:
        talking.send("input_text.append", text=TEXT[:45])
        talking.until("segment.done")
        body = {"model": "tts-1", "voice": "heart", "input": "Meanwhile.", "response_format": "pcm"}
        assert float(client.post("/v1/audio/speech", json=body).headers["X-Queue-Time"]) < 0.5
        talking.send("input_text.done")
        talking.until("done")


def test_an_interruption_says_which_words_were_heard(server: RunningServer) -> None:
    with talk(server) as talking:
        say(talking, TEXT)
        samples, rate = decode(talking.audio, "pcm")
        ends = [event["end"] for event in talking.all_of("segment.done")]
        cases = [
            (0.0, 0, 0),
            (1.0, 4, 1),
            (ends[0], 7, 0),
            (ends[1], 15, 0),
            (60.0, 34, 0),
        ]  # the recogniser may guess a word that is cut off
        for seconds, count, tolerance in cases:
            talking.send("playback.interrupted", played_ms=seconds * 1000)
            answer = talking.until("playback.truncated")
            assert answer["text"] == TEXT[: answer["end_char"]]
            assert answer["end_word"] == len(answer["text"].split()) == pytest.approx(count, abs=tolerance)
            if 0 < seconds < 60:
                heard = words(transcribe(samples[: round(seconds * rate)], rate))
                assert len(heard) == pytest.approx(answer["end_word"], abs=tolerance)


def test_an_interruption_during_the_speech_stops_it(server: RunningServer) -> None:
    with talk(server) as talking:
        talking.send("input_text.append", text=TEXT * 10)
        talking.until("segment.done")
        talking.send("playback.interrupted", played_ms=1500)
        answer = talking.until("playback.truncated")
    assert talking.all_of("done")[-1]["status"] == "cancelled"
    assert TEXT.startswith(answer["text"])
    assert 2 <= answer["end_word"] <= 6


REFUSED = {
    "no json": ("{", "invalid_json"),
    "a list": ("[]", "invalid_json"),
    "unknown": ('{"type": "response.create"}', "invalid_event"),
    "no text": ('{"type": "input_text.append"}', "invalid_text"),
    "voice": ('{"type": "session.start", "voice": "nobody"}', "invalid_voice"),
    "speed": ('{"type": "session.start", "voice": "heart", "speed": 9}', "invalid_speed"),
    "rate": ('{"type": "session.start", "voice": "heart", "response_format": "mp3", "sample_rate": 8000}', "invalid_sample_rate"),
    "played": ('{"type": "playback.interrupted", "played_ms": "x"}', "invalid_played_ms"),
    "too early": ('{"type": "playback.interrupted", "played_ms": 1}', "invalid_event"),
    "too long": (json.dumps({"type": "input_text.append", "text": "word " * 1000}), "input_too_long"),
}


def test_refused_messages_leave_the_connection_open(server: RunningServer) -> None:
    with talk(server) as talking:
        for message, code in REFUSED.values():
            talking.connection.send(message)
            assert json.loads(talking.connection.recv(30))["error"]["code"] == code, message
            if code == "input_too_long":
                break
    with talk(server, start=False) as early:
        early.send("input_text.append", text="Hello.")
        assert json.loads(early.connection.recv(30))["error"]["code"] == "invalid_event"


def test_a_message_that_is_too_large_closes_the_connection(server: RunningServer) -> None:
    with talk(server) as talking:
        talking.send("input_text.append", text="x" * 70_000)
        with pytest.raises(ConnectionClosed) as closed:
            talking.until("done")
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009


def test_key_host_and_origin_are_checked_at_the_handshake(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(API_KEY="secret", CORS_ORIGINS="https://chat.example.com")
    key = {"Authorization": "Bearer secret"}
    refused: list[tuple[dict[str, str], int, str]] = [
        ({}, 401, "invalid_api_key"),
        ({"X-Api-Key": "wrong"}, 401, "invalid_api_key"),
        (key | {"Origin": "https://evil.example.com"}, 403, "forbidden"),
        (key | {"Origin": "null"}, 403, "forbidden"),
    ]
    for headers, status, code in refused:
        with pytest.raises(InvalidStatus) as answer, talk(server, headers=headers):
            pass
        assert answer.value.response.status_code == status
        assert json.loads(answer.value.response.body or b"")["error"]["code"] == code
    with pytest.raises(InvalidStatus) as answer, foreign_host(server, key):
        pass
    assert answer.value.response.status_code == 421
    for origin in ({}, {"Origin": "https://chat.example.com"}, {"Origin": server.url}):
        with talk(server, headers=key | origin) as talking:
            assert say(talking, "Hello.")["status"] == "completed"


def foreign_host(server: RunningServer, headers: dict[str, str]) -> ClientConnection:
    opened = socket.create_connection(("127.0.0.1", server.port))
    return connect("ws://rebound.example.com/v1/audio/speech/stream", sock=opened, additional_headers=headers, proxy=None)


def test_an_idle_connection_is_closed(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(SOCKET_IDLE_TIMEOUT=0.3, API_KEY="")
    with talk(server) as talking:
        assert say(talking, "Hello.")["status"] == "completed"
        with pytest.raises(ConnectionClosed) as closed:
            talking.connection.recv(30)
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1001, "idle")


def test_a_client_that_reads_nothing_is_disconnected(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(CLIENT_TIMEOUT=1, MAX_CLIENT_UNREAD_MB=16)
    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    opened.connect(("127.0.0.1", server.port))
    head = "GET /v1/audio/speech/stream HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    opened.sendall((head + "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n").encode())
    assert opened.recv(12) == b"HTTP/1.1 101"
    opened.sendall(masked({"type": "session.start", "voice": "heart", "sample_rate": 48_000}))
    for _ in range(20):
        opened.sendall(masked({"type": "input_text.append", "text": TEXT}))
    opened.sendall(masked({"type": "input_text.done"}))
    deadline = time.monotonic() + 60
    while "whose client read nothing" not in server.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    server.wait_for(lambda health: health["queue"]["active"] == 0)
    opened.close()


def masked(event: Event) -> bytes:
    data = json.dumps(event).encode()
    return b"\x81" + bytes([0x80 | 126]) + len(data).to_bytes(2, "big") + b"\0\0\0\0" + data


def test_connections_count_and_are_freed(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(MAX_CLIENT_CONNECTIONS=6)
    for _ in range(12):
        with talk(server):
            pass
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(talk(server))
        with ThreadPoolExecutor(3) as executor:
            refusals = [executor.submit(refused_connection, server) for _ in range(3)]
            assert any(refusal.result() for refusal in refusals)
    assert server.health()["status"] == "ok"


def refused_connection(server: RunningServer) -> bool:
    try:
        with talk(server) as talking:
            say(talking, TEXT)
    except InvalidStatus as error:
        return error.response.status_code == 503
    except (ConnectionClosed, InvalidMessage):  # the newest of several that had not sent their request yet took its place
        return True
    return False


def until_closed(talking: Talk) -> tuple[int, str]:
    """Receive up to the end of the connection; return the code of its end and the types of the last two events."""
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            talking.until("done")
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code, " ".join(event["type"] for event in talking.events[-2:])


def test_a_shutdown_completes_a_text_that_has_begun(make_server: Callable[..., RunningServer]) -> None:
    server = make_server()
    with talk(server) as talking, talk(server) as idle:
        talking.send("input_text.append", text=LONGER)
        talking.send("input_text.done")
        talking.until_audio()
        server.process.terminate()
        assert until_closed(idle)[0] == 1012
        assert until_closed(talking) == (1012, "segment.done done")
    assert talking.events[-1]["status"] == "completed"
    assert "".join(event["text"] for event in talking.all_of("segment.start")) == LONGER
    assert word_error_rate(LONGER, transcribe(*decode(talking.audio, "pcm"))) <= 0.05
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()


def test_a_shutdown_speaks_what_was_written_of_a_text_and_says_that_it_is_not_all(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(SOCKET_PAUSE_MS=60_000)
    with talk(server, response_format="mp3") as talking:
        talking.send("input_text.append", text=TEXT[:36] + "Nobody had exp")
        talking.until("segment.start")
        server.process.terminate()
        assert until_closed(talking) == (1012, "error done")
    assert (talking.events[-2]["error"]["code"], talking.events[-1]["status"]) == ("shutting_down", "failed")
    assert words(transcribe(*decode(talking.audio, "mp3"))) == words(TEXT[:36] + "Nobody had")
    assert server.process.wait(30) == 0


def test_a_shutdown_waits_no_longer_than_its_limit(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(SHUTDOWN_TIMEOUT=1, MAX_INPUT_LENGTH=100_000)
    with talk(server) as talking:
        for _ in range(20):
            talking.send("input_text.append", text=TEXT * 20)
        talking.until_audio()
        began = time.monotonic()
        server.process.terminate()
        assert until_closed(talking)[0] == 1012
        assert time.monotonic() - began < 10  # all of it takes 20 s and more
    assert talking.events[-1]["status"] == "cancelled"
    assert server.process.wait(30) == 0


def test_the_samples_are_those_of_a_request(server: RunningServer) -> None:
    with talk(server, seed=5) as talking:
        say(talking, "Only one sentence.")
    with server.client() as client:
        body = {"model": "tts-1", "voice": "heart", "input": "Only one sentence.", "response_format": "pcm", "seed": 5}
        answer = client.post("/v1/audio/speech", json=body).content
    assert np.array_equal(decode(talking.audio, "pcm")[0], decode(answer, "pcm")[0])
