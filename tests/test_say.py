"""say.py: from wherever the text comes to wherever the sound goes, through a server and without one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_csm
from conftest import RunningServer
from listening import decode, duration, listen, word_error_rate
from saying import add_loudspeaker, at_terminal, captions_in, command, cues, environment, said, say, started, wait_until

TEXT = "The kettle is on, and the tea will be ready soon. Please bring the good cups from the kitchen."
MakeServer = Callable[..., RunningServer]
SENTENCES = ["The kettle is on, and the tea will be ready soon.", "Please bring the good cups from the kitchen."]


def heard(data: bytes, fmt: str) -> float:
    return word_error_rate(TEXT, listen(data, fmt))


def test_help_is_there_without_loading_anything_heavy(tmp_path: Path) -> None:
    asked = ["-X", "importtime", *command("--help")[1:]]
    ended = subprocess.run([command()[0], *asked], env=environment(tmp_path), capture_output=True, check=True)
    assert b"--captions" in ended.stdout
    loaded = set(re.findall(rb"\| +([\w.]+)$", ended.stderr, re.MULTILINE))
    assert not loaded & {b"numpy", b"pydantic", b"asyncio", b"mlx", b"hibari", b"tqdm"}


@pytest.mark.parametrize("fmt", ["mp3", "opus", "aac", "flac", "wav", "pcm"])
def test_every_format_by_its_ending(server: RunningServer, tmp_path: Path, fmt: str) -> None:
    said(tmp_path, TEXT, "-o", f"speech.{fmt}", "--server", server.url)
    data = (tmp_path / f"speech.{fmt}").read_bytes()
    samples, rate = decode(data, fmt)
    assert duration(data, fmt) == pytest.approx(samples.size / rate, abs=0.1)
    assert 4 < samples.size / rate < 8
    if fmt == "mp3":
        assert heard(data, fmt) == 0


def test_the_running_server_is_used_and_gives_its_very_samples(server: RunningServer, tmp_path: Path) -> None:
    said(tmp_path, TEXT, "-o", "speech.pcm", "--seed", 5, PORT=server.port, HOST="0.0.0.0")
    asked = {"model": "csm-1b", "input": TEXT, "voice": "heart", "response_format": "pcm", "seed": 5}
    with server.client() as client:
        assert client.post("/v1/audio/speech", json=asked).content == (tmp_path / "speech.pcm").read_bytes()
    assert "generation" in server.log_text()


def test_without_a_server_the_engine_speaks_the_same(server: RunningServer, tmp_path: Path) -> None:
    said(tmp_path, TEXT, "-o", "local.pcm", "--seed", 5, "--local", "--voice", "heart")
    said(tmp_path, TEXT, "-o", "alone.pcm", "--seed", 5)  # nobody listens on the settings' port
    said(tmp_path, TEXT, "-o", "served.pcm", "--seed", 5, "--server", f"{server.url}/v1/")
    local = (tmp_path / "local.pcm").read_bytes()
    assert local == (tmp_path / "alone.pcm").read_bytes() == (tmp_path / "served.pcm").read_bytes()
    assert heard(local, "pcm") == 0


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_standard_input(server: RunningServer, tmp_path: Path, arguments: list[str]) -> None:
    given = TEXT.encode("utf-8-sig" if arguments else "utf-8")
    said(tmp_path, *arguments, "-o", "speech.pcm", "--server", server.url, "--captions", "speech.json", stdin=given)
    assert [caption["text"] for caption in captions_in(tmp_path / "speech.json")] == SENTENCES


def test_a_file(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(TEXT.encode("utf-16"))
    said(tmp_path, "-f", "text.txt", "-o", "speech.wav", "--server", server.url)
    assert heard((tmp_path / "speech.wav").read_bytes(), "wav") == 0


def test_standard_output_gets_the_audio_and_nothing_else(server: RunningServer, tmp_path: Path) -> None:
    assert heard(said(tmp_path, TEXT, "-o", "-", "--format", "flac", "--server", server.url), "flac") == 0
    assert heard(said(tmp_path, TEXT, "-o", "-", "--local"), "mp3") == 0  # DEFAULT_FORMAT


def test_speed_keeps_the_words_and_the_captions_in_time(server: RunningServer, tmp_path: Path) -> None:
    said(tmp_path, TEXT, "-o", "slow.wav", "--server", server.url, "--seed", 1)
    said(tmp_path, TEXT, "-o", "fast.wav", "--server", server.url, "--seed", 1, "--speed", 1.5, "--captions", "fast.json")
    fast = (tmp_path / "fast.wav").read_bytes()
    assert duration(fast, "wav") == pytest.approx(duration(tmp_path / "slow.wav", "wav") / 1.5, rel=0.03)
    assert heard(fast, "wav") == 0
    assert captions_in(tmp_path / "fast.json")[-1]["end"] == pytest.approx(duration(fast, "wav"), abs=0.1)


def test_captions_in_every_form(server: RunningServer, tmp_path: Path) -> None:
    text = "Cats & dogs are 1 < 2. They sleep."
    for ending in ("vtt", "srt", "json"):
        said(tmp_path, text, "-o", "speech.wav", "--server", server.url, "--seed", 1, "--captions", f"speech.{ending}")
    total = duration(tmp_path / "speech.wav", "wav")
    told = captions_in(tmp_path / "speech.json")
    assert [caption["group"] for caption in told] == [0, 1]
    vtt, srt = (tmp_path / "speech.vtt").read_text(), (tmp_path / "speech.srt").read_text()
    assert vtt.startswith("WEBVTT\n\n")
    times = [pytest.approx((caption["start"], caption["end"]), abs=1e-6) for caption in told]
    assert [cue[:2] for cue in cues(vtt, ".")] == [cue[:2] for cue in cues(srt, ",")] == times
    assert [cue[2] for cue in cues(srt, ",")] == [c["text"] for c in told]
    assert cues(vtt, ".")[0][2] == told[0]["text"].replace("&", "&amp;").replace("<", "&lt;")
    assert told[0]["start"] == 0.0 < told[0]["end"] < told[1]["start"] < told[1]["end"]
    assert told[1]["end"] == pytest.approx(total, abs=0.002)


@pytest.mark.parametrize("where", ["server", "here"])
def test_words_with_their_times_and_places_in_the_text_as_given(server: RunningServer, tmp_path: Path, where: str) -> None:
    text = "# Cats & **dogs**\n\n- They have 2 beds. [pause:1s]\n- They sleep on Dec 2."
    place = ["--server", server.url] if where == "server" else ["--local", "--voice", "heart"]
    for ending in ("vtt", "srt", "json"):
        said(tmp_path, text, "-o", "speech.wav", "--speed", 1.5, "--seed", 1, "--captions", f"speech.{ending}", "--words", *place)
        if where == "here":
            break
    if where == "here":
        said(tmp_path, text, "-o", "speech.wav", "--speed", 1.5, "--seed", 1, "--captions", "speech.json", "--words", *place)
    words = json.loads((tmp_path / "speech.json").read_text())["words"]
    assert [word["text"] for word in words] == ["Cats", "dogs", "They", "have", "2", "beds", "They", "sleep", "on", "Dec 2"]
    assert [text[word["start_char"] : word["end_char"]] for word in words] == [word["text"] for word in words]
    assert [word["group"] for word in words] == [0] * 2 + [1] * 4 + [2] * 4
    assert words[6]["start"] - words[5]["end"] == pytest.approx(1.0, abs=0.05)
    assert words[-1]["end"] == pytest.approx(duration(tmp_path / "speech.wav", "wav"), abs=0.05)
    vtt = (tmp_path / "speech.vtt").read_text()
    assert [cue[2] for cue in cues(vtt, ".")] == [word["text"] for word in words]
    if where == "server":
        assert [cue[2] for cue in cues((tmp_path / "speech.srt").read_text(), ",")] == [word["text"] for word in words]


def test_misheard_words_are_listed(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("lighthouse\nquay\n\n  engineer \nlighthouse\n")
    listed = said(tmp_path, "--check-words", "words.txt", "--voice", "heart", "--server", server.url).decode()
    assert listed == "quay: heard 'key'\n1 of 3 words were misheard\n"
    presets = tmp_path / "presets"
    presets.mkdir()
    (presets / "pronunciations.json").write_text('{"quay": "key"}')
    listed = said(tmp_path, "--check-words", "words.txt", "--voice", "heart", "--server", server.url, PRESETS_DIR=presets).decode()
    assert listed == "0 of 3 words were misheard\n"


def test_a_file_is_replaced_as_a_whole_and_keeps_its_permissions_and_its_link(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "old.wav").write_bytes(b"old")
    (tmp_path / "old.wav").chmod(0o640)
    (tmp_path / "link.wav").symlink_to("old.wav")
    said(tmp_path, TEXT, "-o", "link.wav", "--server", server.url)
    assert (tmp_path / "link.wav").is_symlink()
    assert (tmp_path / "old.wav").stat().st_mode & 0o777 == 0o640
    assert heard((tmp_path / "old.wav").read_bytes(), "wav") == 0


def test_names_that_look_like_something_else(server: RunningServer, tmp_path: Path) -> None:
    for name in ("http:speech.wav", "-a %03d ü'\".wav"):
        said(tmp_path, "Hello.", f"--output={name}", "--server", server.url)
        assert duration(tmp_path / name, "wav") > 0.3


def test_what_is_no_regular_file_is_written_to(server: RunningServer, tmp_path: Path) -> None:
    assert heard(said(tmp_path, TEXT, "-o", "/dev/stdout", "--format", "wav", "--server", server.url), "wav") == 0
    os.mkfifo(tmp_path / "fifo.mp3")
    reader = subprocess.Popen(["/bin/cat", str(tmp_path / "fifo.mp3")], stdout=subprocess.PIPE)
    said(tmp_path, TEXT, "-o", "fifo.mp3", "--server", server.url)
    assert heard(reader.communicate(timeout=30)[0], "mp3") == 0


def test_the_file_says_that_a_machine_spoke(server: RunningServer, tmp_path: Path) -> None:
    said(tmp_path, "Hello.", "-o", "speech.flac", "--server", server.url)
    assert b"voice heart" in (tmp_path / "speech.flac").read_bytes()
    said(tmp_path, "Hello.", "-o", "speech.flac", "--local", SYNTHETIC_MARK="off")
    assert b"voice heart" not in (tmp_path / "speech.flac").read_bytes()


def test_the_voices_are_listed(server: RunningServer, tmp_path: Path) -> None:
    listed = say(tmp_path, "--list-voices", "--server", server.url)
    lines = listed.stdout.decode().splitlines()
    assert [line.split()[0] for line in lines] == ["conversational", "conversational_b", "emma", "fenrir", "heart", "hibari-fable", "kore"]
    assert re.match(r"heart +hibari +ready +Warm and natural.*built in \(also af_heart, OpenAI's names\)$", lines[4])
    assert "not ready" in lines[0]
    assert listed.stderr.decode().splitlines() == [
        "say.py: conversational, conversational_b: Model 'csm-1b' is switched off: CSM=off.",
        "say.py: emma, fenrir, hibari-fable, kore: not downloaded: HF_HUB_OFFLINE is set.",
    ]
    assert "ready" not in said(tmp_path, "--list-voices", "--local").decode().replace("ready at once", "")


def test_a_key_is_sent_and_never_shown(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server(API_KEY="open-sesame")
    said(tmp_path, TEXT, "-o", "speech.wav", "--server", server.url, API_KEY="open-sesame")
    assert heard((tmp_path / "speech.wav").read_bytes(), "wav") == 0
    said(tmp_path, "Hello.", "-o", "speech.wav", "--server", server.url, "--api-key", "open-sesame")
    ended = say(tmp_path, "Hello.", "-o", "speech.wav", "--server", server.url, "--api-key", "open-barley")
    assert ended.returncode == 1
    assert b"requires its API key: use --api-key" in ended.stderr
    assert b"open-" not in ended.stderr


def test_a_terminal_shows_how_far_it_is_and_a_pipe_nothing(server: RunningServer, tmp_path: Path) -> None:
    text = " ".join(SENTENCES * 4)
    status, shown = at_terminal(tmp_path, text, "-o", "speech.wav", "--server", server.url)
    seen = re.findall(r"(\d+)/8 sentences, (\d+) s of audio, (\S+) left", shown)
    assert status == 0
    assert int(seen[-1][0]) == 8
    assert int(seen[-1][1]) == pytest.approx(duration(tmp_path / "speech.wav", "wav"), abs=1)
    assert [int(count) for count, _, _ in seen] == sorted(int(count) for count, _, _ in seen)


def test_success_is_confirmed_in_one_line_on_a_terminal(server: RunningServer, tmp_path: Path) -> None:
    """A single sentence has no progress bar, so this line is all that is shown."""
    asked = ("Hello.", "-o", "speech.wav", "--speed", 2, "--captions", "speech.vtt", "--server", server.url)
    status, shown = at_terminal(tmp_path, *asked)
    seconds = duration(tmp_path / "speech.wav", "wav")
    assert (status, shown) == (0, f"Written to speech.wav, captions to speech.vtt: {seconds:.1f} s, voice heart\r\n")


def test_the_loudspeaker_is_confirmed_too(server: RunningServer, tmp_path: Path) -> None:
    add_loudspeaker(tmp_path)
    status, shown = at_terminal(tmp_path, "Hello.", "--server", server.url)
    assert (status, re.fullmatch(r"Spoken: \d\.\d s, voice heart\r\n", shown) is not None) == (0, True), shown


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """CSM on the tiny checkpoint, whose segments are two frames of audio; one voice, because each costs a warm-up."""
    (tmp_path / "presets").mkdir()
    for preset in ({"name": "tiny", "voice_key": "conversational_a"}, {"name": "heart", "model": "hibari", "voice_key": "heart"}):
        (tmp_path / "presets" / f"{preset['name']}.json").write_text(json.dumps(preset))
    cache = tiny_csm.build(script={"": [tiny_csm.ends_after(2)]}, small_codec=True)
    own = {"CSM": "on", "GUARD": "off", "MODEL_DTYPE": "float32", "DEFAULT_VOICE": "tiny", "PRESETS_DIR": str(tmp_path / "presets")}
    return own | tiny_csm.environment(cache)


def test_csm_is_loaded_here_with_its_progress_shown(tmp_path: Path, tiny: dict[str, Any]) -> None:
    status, shown = at_terminal(tmp_path, TEXT, "-o", "speech.wav", "--captions", "speech.json", "--local", **tiny)
    assert status == 0, shown
    assert "loading csm-1b: " in shown
    assert sum(len(caption["text"].split()) for caption in captions_in(tmp_path / "speech.json")) == len(TEXT.split())
    assert duration(tmp_path / "speech.wav", "wav") >= 0.1


def test_ctrl_c_while_a_model_loads_is_no_crash(tmp_path: Path, tiny: dict[str, Any]) -> None:
    with started(tmp_path, TEXT, "-o", "speech.wav", "--local", "--verbose", forked=False, **tiny) as process:
        assert process.stderr is not None
        while b"model csm-1b: loading" not in (line := process.stderr.readline()):
            assert line
        wait_until(lambda: any("libmlx" in item.path for item in psutil.Process(process.pid).memory_maps()), "native code runs")
        process.send_signal(signal.SIGINT)
        assert b"terminate" not in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert not (tmp_path / "speech.wav").exists()


def test_the_built_in_voice_needs_no_csm(tmp_path: Path, tiny: dict[str, Any]) -> None:
    broken = tiny | {"HF_HUB_CACHE": str(tmp_path / "empty")}
    said(tmp_path, TEXT, "-o", "speech.wav", "--local", "--voice", "heart", **broken)
    assert heard((tmp_path / "speech.wav").read_bytes(), "wav") == 0
    ended = say(tmp_path, TEXT, "-o", "no.wav", "--local", **broken)
    assert ended.returncode == 1
    assert b"csm-1b" in ended.stderr
    assert not (tmp_path / "no.wav").exists()


def test_a_server_that_is_still_loading_is_waited_for(make_server: MakeServer, tmp_path: Path, tiny: dict[str, Any]) -> None:
    server = make_server(wait=False, **tiny)
    server.wait_for(lambda health: health["status"] == "loading")
    said(tmp_path, TEXT, "-o", "speech.wav", "--server", server.url)
    assert duration(tmp_path / "speech.wav", "wav") >= 0.1


def test_another_voice_that_speaks_instead_is_named(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server(FALLBACK_VOICE="heart")
    ended = say(tmp_path, TEXT, "-o", "speech.wav", "--voice", "conversational", "--server", server.url)
    assert ended.returncode == 0
    assert ended.stderr.decode() == "say.py: voice 'conversational' is not ready; voice 'heart' speaks instead\n"
    assert say(tmp_path, "Hello.", "-o", "speech.wav", "--voice", "nova", "--server", server.url).stderr == b""
