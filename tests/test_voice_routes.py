"""Adding, using and deleting voices over HTTP; everything that is refused leaves nothing behind."""

from __future__ import annotations

import asyncio
import io
import resource
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hibari
import httpx
import listening
import numpy as np
import pytest
import soundfile
import tiny_csm
from conftest import RunningServer, start_server

from config import Settings
from server import create_app

WORDS = "The train leaves the station at noon."
RATE = 24_000
MIB = 1 << 20


@cache
def speech() -> bytes:
    """The words as a WAV of 48 kHz, stereo: 490 kB."""
    samples = np.repeat(np.asarray(hibari.Hibari()(WORDS), np.float32), 2)
    return wav(np.stack([samples, samples], axis=1), 2 * RATE)


def wav(samples: np.ndarray, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return file.getvalue()


def ffmpeg(source: bytes, *options: str) -> bytes:
    command = [listening.ffmpeg(), "-v", "error", "-i", "pipe:0", *options, "pipe:1"]
    return subprocess.run(command, input=source, capture_output=True, check=True, timeout=120).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("voices")
    (made / "tmp").mkdir()
    return made


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[RunningServer]:
    started = start_server(folder, TMPDIR=folder / "tmp")
    try:
        started.wait_for(lambda health: health["status"] == "ok")
        yield started
    finally:
        started.stop()


def add(server: RunningServer, name: str = "Anna", sample: object = None, **fields: Any) -> httpx.Response:
    """POST /v1/audio/voices as a client would; a field of None is left out."""
    data = {name: value for name, value in ({"name": name, "consent": "true", "ref_text": WORDS} | fields).items() if value is not None}
    files = {"audio_sample": ("my voice.wav", speech() if sample is None else sample)}
    return httpx.post(f"{server.url}/v1/audio/voices", data=data, files=files, timeout=120)  # type: ignore[arg-type]


def refusal(response: httpx.Response, status: int, code: str, param: str | None) -> str:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), error
    assert "/tmp" not in response.text  # noqa: S108 - no path is ever told
    return str(error["message"])


def left_behind(server: RunningServer) -> list[str]:
    """Whatever lies in the folders of voices and temporary files, but the lock."""
    folders = (server.cache_dir / "voices", server.cache_dir.parent / "tmp")
    return [path.name for folder in folders for path in folder.rglob("*") if path.name != ".lock"]


def test_a_voice_is_added_listed_used_by_three_names_and_deleted_and_outlives_a_restart(running: RunningServer) -> None:
    added = add(running, "José", consent="cons_1234")
    assert added.status_code == 200, added.text
    voice = added.json()
    assert (voice["object"], voice["name"], voice["ref_text"], voice["model"]) == ("audio.voice", "José", WORDS, "csm-1b")
    assert "/" not in added.text
    running.stop()
    again = start_server(running.cache_dir.parent, TMPDIR=running.cache_dir.parent / "tmp", PORT=running.port)
    running.process = again.process
    running.wait_for(lambda health: health["status"] == "ok")
    with running.client() as client:
        (listed,) = [each for each in client.get("/v1/audio/voices").json()["voices"] if each["uploaded"]]
        assert listed["id"] == voice["id"] != "José"
        assert (listed["name"], listed["model"], listed["ready"], listed["aliases"]) == ("José", "csm-1b", False, [])
        assert listed["display_name"] == "José"
        told = client.get(f"/v1/audio/voices/{voice['id']}").json()
        assert (told["object"], told["id"], told["created_at"]) == ("audio.voice", voice["id"], voice["created_at"])
        for name in (voice["id"], {"id": voice["id"]}, "José"):
            spoken = client.post("/v1/audio/speech", json={"model": "csm-1b", "input": "Hi.", "voice": name})
            refusal(spoken, 503, "model_not_ready", "voice")  # found; CSM is off in this server
        assert "José" in refusal(
            client.post("/v1/audio/speech", json={"model": "m", "input": "Hi.", "voice": "x"}), 400, "invalid_voice", "voice"
        )
        deleted = client.delete(f"/audio/voices/{voice['id']}")
        assert (deleted.status_code, deleted.json()) == (200, {"id": voice["id"], "object": "audio.voice", "deleted": True})
        refusal(client.delete(f"/v1/audio/voices/{voice['id']}"), 404, "not_found", None)
        refusal(client.get(f"/v1/audio/voices/{voice['id']}"), 404, "not_found", None)
    assert left_behind(running) == []
    assert "José" not in running.log_text()


def test_words_that_were_not_sent_are_heard(running: RunningServer) -> None:
    added = add(running, ref_text=None)
    assert added.status_code == 200, added.text
    assert listening.word_error_rate(WORDS, added.json()["ref_text"]) == 0
    httpx.delete(f"{running.url}/v1/audio/voices/{added.json()['id']}", timeout=30)


def test_presets_can_be_asked_for_but_not_deleted(running: RunningServer) -> None:
    with running.client() as client:
        assert client.get("/v1/audio/voices/heart").json()["ready"] is True
        refusal(client.delete("/v1/audio/voices/heart"), 403, "forbidden", None)
        assert "heart" in running.health()["voices"]


@pytest.mark.parametrize(("fields", "status", "code", "param"), [
    ({"name": None}, 400, "invalid_name", "name"),
    ({"name": ""}, 400, "invalid_name", "name"),
    ({"name": "../../etc/passwd"}, 400, "invalid_name", "name"),
    ({"name": "a\x00b"}, 400, "invalid_name", "name"),
    ({"name": "x" * 65}, 400, "invalid_name", "name"),
    ({"name": ["Anna", "Berta"]}, 400, "invalid_name", "name"),
    ({"name": "heart"}, 409, "already_exists", "name"),
    ({"name": "Alloy"}, 409, "already_exists", "name"),
    ({"consent": None}, 400, "invalid_consent", "consent"),
    ({"consent": " "}, 400, "invalid_consent", "consent"),
    ({"consent": "False"}, 400, "invalid_consent", "consent"),
    ({"consent": "no"}, 400, "invalid_consent", "consent"),
    ({"consent": "0"}, 400, "invalid_consent", "consent"),
    ({"consent": "x" * 201}, 400, "invalid_consent", "consent"),
    ({"ref_text": "x" * 2001}, 400, "invalid_ref_text", "ref_text"),
    ({"ref_text": "word " * 200}, 400, "invalid_ref_text", "ref_text"),
])  # fmt: skip
def test_fields_that_will_not_do_are_named(running: RunningServer, fields: dict[str, Any], status: int, code: str, param: str) -> None:
    refusal(add(running, **fields), status, code, param)
    assert left_behind(running) == []


def test_words_that_cannot_be_those_of_the_recording_are_refused(running: RunningServer) -> None:
    words = (
        "Every evening the old ferry crosses the bay, and I like to watch it from the window. Some people wave, a dog barks at the gulls, and then "
        "it is quiet again. Why does such a small thing make the whole day feel finished?"
    )
    sample = wav(0.3 * np.sin(np.arange(int(3.6 * RATE)) / 20))
    assert "44 words, too many for a recording of 3.6 s" in refusal(
        add(running, sample=sample, ref_text=words), 400, "invalid_ref_text", "ref_text"
    )
    assert left_behind(running) == []


@pytest.mark.parametrize(("sample", "reason"), [
    (b"", "is empty"),
    (b"This is a text and no sound at all. " * 100, "cannot be read as sound"),
    (b"\x89PNG\r\n\x1a\n" + bytes(5000), "cannot be read as sound"),
    (b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n", "cannot be read as sound"),
    (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "cannot be read as sound"),
    (wav(np.zeros(3 * RATE)), "silent"),
    (wav(0.3 * np.sin(np.arange(RATE // 2) / 20)), "0.50 s"),
    (wav(0.3 * np.sin(np.arange(61 * RATE) / 20)), "more than 60 s"),
], ids=["empty", "text", "picture", "playlist", "script", "silent", "short", "long"])  # fmt: skip
def test_files_that_are_no_voice_are_refused(running: RunningServer, sample: bytes, reason: str) -> None:
    assert reason in refusal(add(running, sample=sample), 400, "invalid_audio", "audio_sample")
    assert left_behind(running) == []


def test_a_small_file_that_holds_hours_is_refused(running: RunningServer) -> None:
    few_seconds = ffmpeg(speech(), "-ar", "8000", "-ac", "1", "-b:a", "8k", "-write_xing", "0", "-id3v2_version", "0", "-f", "mp3")
    bomb = few_seconds * (9 * MIB // len(few_seconds))  # MP3 frames follow one another: 2.5 hours, nearly a GB as 24 kHz samples
    assert "more than 60 s" in refusal(add(running, sample=bomb), 400, "invalid_audio", "audio_sample")
    assert left_behind(running) == []


def test_a_recording_over_10_mib_is_refused(running: RunningServer) -> None:
    message = refusal(add(running, sample=bytes(10 * MIB + 1)), 413, "body_too_large", "audio_sample")
    assert "10 MiB" in message
    assert left_behind(running) == []


def test_a_body_over_the_limit_is_refused_before_it_is_read(running: RunningServer) -> None:
    head = f"POST /v1/audio/voices HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: {20 * MIB}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert left_behind(running) == []


def test_a_chunked_body_is_refused_once_it_is_over_the_limit(running: RunningServer) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="audio_sample"; filename="a"\r\n\r\n'
        for _ in range(14):
            yield bytes(MIB)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    try:
        refusal(httpx.post(f"{running.url}/v1/audio/voices", content=chunks(), headers=headers, timeout=60), 413, "body_too_large", None)
    except httpx.TransportError:  # the server hung up while the body was still being sent: a refusal as well
        assert "status=413" in running.log_text()
    assert left_behind(running) == []


def form(*parts: tuple[str, bytes], end: bytes = b"--x--\r\n") -> bytes:
    """A form by hand: each part is what follows `form-data; ` and its content."""
    return b"".join(b"--x\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + data + b"\r\n" for head, data in parts) + end


NAME, CONSENT = ('name="name"', b"Anna"), ('name="consent"', b"true")
FILE = ('name="audio_sample"; filename="a.wav"', b"RIFF")
MULTIPART = "multipart/form-data; boundary=x"


@pytest.mark.parametrize(("body", "content_type", "code", "param"), [
    (b'{"name": "Anna"}', "application/json", "invalid_form", None),
    (b"name=Anna&consent=true&audio_sample=x", "application/x-www-form-urlencoded", "invalid_form", None),
    (form(NAME, CONSENT, FILE), "multipart/form-data", "invalid_form", None),
    (form(NAME, CONSENT, FILE), "multipart/form-data; boundary=y", "invalid_form", None),
    (b"", MULTIPART, "invalid_name", "name"),
    (b"--x--\r\n", MULTIPART, "invalid_name", "name"),
    (form(NAME, CONSENT, FILE, end=b"")[:-6], MULTIPART, "invalid_audio_sample", "audio_sample"),
    (form(NAME, CONSENT), MULTIPART, "invalid_audio_sample", "audio_sample"),
    (form(NAME, CONSENT, ('name="audio_sample"', b"RIFF")), MULTIPART, "invalid_audio_sample", "audio_sample"),
    (form(NAME, CONSENT, FILE, FILE), MULTIPART, "invalid_audio_sample", "audio_sample"),
    (form(NAME, CONSENT, FILE, FILE, FILE), MULTIPART, "invalid_form", None),
    (form(('name="name"; filename="x"', b"Anna"), CONSENT, FILE), MULTIPART, "invalid_name", "name"),
    (form(('no="name"', b"Anna")), MULTIPART, "invalid_form", None),
    (form(('name="ref_text"', bytes(2 * MIB))), MULTIPART, "invalid_form", None),
    (form(*[(f'name="n{number}"', b"x") for number in range(50)]), MULTIPART, "invalid_form", None),
    (form(('name="name"; filename="../../../../etc/cron.d/x"', b"\xff\xfe")), MULTIPART, "invalid_name", "name"),
], ids=range(16))  # fmt: skip
def test_broken_forms_are_refused(running: RunningServer, body: bytes, content_type: str, code: str, param: str | None) -> None:
    response = httpx.post(f"{running.url}/v1/audio/voices", content=body, headers={"Content-Type": content_type}, timeout=30)
    refusal(response, 400, code, param)
    assert left_behind(running) == []


def test_a_client_that_goes_away_midway_leaves_nothing(running: RunningServer) -> None:
    head = f"POST /v1/audio/voices HTTP/1.1\r\nHost: localhost\r\nContent-Type: {MULTIPART}\r\nContent-Length: {5 * MIB}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
        connection.sendall(head.encode() + form(NAME, CONSENT, (FILE[0], bytes(3 * MIB)), end=b""))
    running.wait_for(lambda _: "status=499" in running.log_text(), seconds=20)
    assert left_behind(running) == []
    assert "Traceback" not in running.log_text()


def test_recordings_that_nobody_waits_for_hold_nobody_up(running: RunningServer) -> None:
    """Each would be listened to for seconds: one is, eight wait, more are refused, and none goes on once its client has gone."""
    long = ffmpeg(wav(np.tile(soundfile.read(io.BytesIO(speech()))[0][:, 0], 25)[: 110 * RATE], 2 * RATE), "-c:a", "libopus", "-f", "ogg")
    body = form(NAME, CONSENT, ('name="audio_sample"; filename="a.ogg"', long))
    head = f"POST /v1/audio/voices HTTP/1.1\r\nHost: localhost\r\nContent-Type: {MULTIPART}\r\nContent-Length: {len(body)}\r\n\r\n"
    before = running.log_text().count("status=499")
    clients = [socket.create_connection(("127.0.0.1", running.port), timeout=60) for _ in range(12)]
    for client in clients:
        client.sendall(head.encode() + body)
    refused, *_ = select.select(clients, [], [], 60)
    assert b" 429 " in refused[0].recv(65_536)
    for client in clients:
        client.close()
    running.wait_for(lambda _: running.log_text().count("status=499") - before >= 8, seconds=60)
    added = add(running)
    assert added.status_code == 200, added.text
    httpx.delete(f"{running.url}/v1/audio/voices/{added.json()['id']}", timeout=30)
    running.wait_for(lambda _: left_behind(running) == [], seconds=60)
    assert "Traceback" not in running.log_text()


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="a running process's limits can be set only on Linux")
def test_a_disk_that_fills_up_is_told_and_nothing_is_left(running: RunningServer) -> None:
    kept = resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE)
    small = ffmpeg(speech(), "-c:a", "libopus", "-f", "ogg")  # smaller than the limit, and larger once it is 24 kHz PCM
    large = wav(0.3 * np.sin(np.arange(59 * RATE) / 20))  # too large for the memory that a form is read into
    size = running.log.stat().st_size
    try:
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (max(100_000, size + 20_000), kept[1]))
        assert "File too large" in refusal(add(running, sample=small), 500, "storage_failed", None)
        assert "no room" in refusal(add(running), 500, "conversion_failed", None)
        assert "no room" in refusal(add(running, sample=large), 500, "storage_failed", None)
        assert left_behind(running) == []
    finally:
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, kept)
    added = add(running, sample=small)
    assert added.status_code == 200
    httpx.delete(f"{running.url}/v1/audio/voices/{added.json()['id']}", timeout=30)


def settings(folder: Path, **values: object) -> Settings:
    return Settings(cache_dir=folder, **values)  # type: ignore[arg-type]


def asked(chosen: Settings, client: str, *calls: Callable[[httpx.AsyncClient], Any]) -> list[httpx.Response]:
    """What the application answers to a client at this address."""

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=create_app(chosen), client=(client, 50_000))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8880") as http:
            return [await call(http) for call in calls]

    return asyncio.run(ask())


def post(headers: dict[str, str] | None = None, **fields: str) -> Callable[[httpx.AsyncClient], Any]:
    data = {"name": "Anna", "consent": "true", "ref_text": WORDS} | fields
    return lambda http: http.post(
        "/v1/audio/voices",
        data={key: value for key, value in data.items() if value},
        files={"audio_sample": ("a.wav", speech())},
        headers=headers,
    )


def test_from_another_machine_voices_change_only_with_the_key(tmp_path: Path) -> None:
    here, elsewhere, key = "127.0.0.1", "192.0.2.7", {"Authorization": "Bearer secret"}
    delete = lambda http: http.delete("/v1/audio/voices/voice_" + "0" * 24)  # noqa: E731
    for response in asked(settings(tmp_path), elsewhere, post(), delete):
        assert "API_KEY" in refusal(response, 403, "forbidden", None)
    with_key = settings(tmp_path, api_key="secret")
    refusal(asked(with_key, elsewhere, post())[0], 401, "invalid_api_key", None)
    assert not (tmp_path / "voices").exists()
    assert asked(with_key, elsewhere, post(key))[0].status_code == 200
    assert asked(settings(tmp_path), here, post(name="Berta"))[0].status_code == 200
    foreign = asked(settings(tmp_path), here, post({"Origin": "http://evil.example"}, name="Carla"))[0]
    assert "evil.example" in refusal(foreign, 403, "forbidden", None)


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has mlx-audio's recogniser")
def test_without_a_recogniser_the_words_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_whisper", None)  # as where it is not installed
    (response,) = asked(settings(tmp_path), "127.0.0.1", post(ref_text=""))
    assert "exactly as spoken" in refusal(response, 400, "invalid_ref_text", "ref_text")
    assert not (tmp_path / "voices").exists()


def test_csm_speaks_with_an_added_voice_and_to_the_end_although_it_is_deleted_meanwhile(make_server: Callable[..., RunningServer]) -> None:
    csm = tiny_csm.environment(tiny_csm.build(script={"": [tiny_csm.ends_after(3)]}, small_codec=True))
    server = make_server(CSM="on", MODEL_DTYPE="float32", MAX_BATCH=1, GUARD="off", GROUP_CHARACTERS=80, **csm)
    sample = wav(soundfile.read(io.BytesIO(speech()))[0][: 2 * RATE + 2000], 2 * RATE)  # a good second: Mimi takes long on a CPU
    voice = add(server, sample=sample).json()["id"]
    folder = server.cache_dir / "voices" / voice
    speak = {"model": "csm-1b", "voice": {"id": voice}, "seed": 1, "temperature": 0}
    with server.client() as client:
        spoken = client.post("/v1/audio/speech", json=speak | {"input": "Good morning.", "response_format": "wav"})
        assert (spoken.status_code, spoken.headers["x-voice"], spoken.headers["x-model"]) == (200, voice, "csm-1b"), spoken.text
        samples, rate = soundfile.read(io.BytesIO(spoken.content))
        assert rate == RATE
        assert np.abs(samples).max() > 0.01
        assert [path.suffix for path in folder.iterdir() if path.suffix not in {".wav", ".json"}] == [".codes"]
        codes = sorted((server.cache_dir / "prompts").iterdir())
        text = " ".join(f"This is sentence number {number}, and it is long enough to be a segment." for number in range(3))
        with client.stream("POST", "/v1/audio/speech", json=speak | {"input": text, "response_format": "pcm"}) as streamed:
            pieces = streamed.iter_raw()
            received = len(next(pieces))
            assert httpx.delete(f"{server.url}/v1/audio/voices/{voice}", timeout=60).json()["deleted"] is True
            assert not folder.exists()
            received += sum(len(piece) for piece in pieces)
        assert received >= 2 * int(3 * 3 * 0.08 * RATE)  # three segments of three frames, 16 bit
        refusal(client.post("/v1/audio/speech", json=speak | {"input": "Hi."}), 400, "invalid_voice", "voice")
    assert sorted((server.cache_dir / "prompts").iterdir()) == codes
    assert not list((server.cache_dir / "voices").glob("*voice*"))
