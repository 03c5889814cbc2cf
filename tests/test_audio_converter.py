"""Files and streams are read by independent libraries and a recogniser, and ffmpeg is made to fail on purpose."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hibari
import listening
import mutagen
import numpy as np
import psutil
import pytest
import soundfile
from mutagen.aac import AAC

from audio_converter import Converted, Encoder, encoder_arguments, to_int16
from audio_formats import FORMATS, AudioFormat, LengthMeter, SyntheticTag, tag_arguments
from errors import ConversionError
from ffmpeg import clean_temporary_files, ffmpeg_version, find_ffmpeg, muxer_name, watch_children_without_threads

RATE = 24_000
SENTENCE = "She opened the window and looked at the quiet garden."
TAG = SyntheticTag("csm-1b", "heart")
# Seconds of padding that a stream cannot declare: AAC in ADTS, and MP3 through a pipe.
STREAM_PADDING = {"mp3": 0.08, "aac": 0.15}

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
encoded_format = pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS.values() if fmt.name != "pcm"], ids=lambda fmt: fmt.name)


@cache
def speech() -> listening.Samples:
    return np.asarray(hibari.Hibari()(SENTENCE), dtype=np.float32)


def tone(seconds: float, pitch: float = 220.0) -> listening.Samples:
    """Return a tone with overtones, as a voice has them."""
    phase = 2 * np.pi * pitch * np.arange(round(seconds * RATE)) / RATE
    return (0.2 * np.sin(phase) + 0.1 * np.sin(2 * phase) + 0.07 * np.sin(3 * phase)).astype(np.float32)


async def convert(samples: listening.Samples, rate: int, fmt: AudioFormat, step: int = 24_000, **options: Any) -> Converted:
    async with Encoder(fmt, rate, streamed=False, **options) as encoder:
        for start in range(0, len(samples), step):
            await encoder.write(samples[start : start + step])
        return await encoder.file()


async def stream(samples: listening.Samples, fmt: AudioFormat, step: int = 2400, **options: Any) -> bytes:
    async with Encoder(fmt, RATE, streamed=True, **options) as encoder:

        async def feed() -> None:
            for start in range(0, len(samples), step):
                await encoder.write(samples[start : start + step])
            await encoder.finish()

        feeding = asyncio.ensure_future(feed())
        try:
            return b"".join([piece async for piece in encoder])
        finally:
            await asyncio.wait({feeding})
            feeding.result()


def children() -> list[psutil.Process]:
    """Return the processes that the tests here have started."""
    return list(psutil.Process().children(recursive=True))


def left_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def playable(data: bytes, fmt: AudioFormat) -> float:
    """Return the seconds of audio that can be decoded from the beginning of a file."""
    try:
        samples, rate = listening.decode(data, fmt.name)
    except AssertionError:
        return 0.0
    return len(samples) / rate


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give each test its own temporary folder, and check that no folder and no process is left at its end."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    before = {child.pid for child in children()}
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.glob("sesame-tts-*"))
    assert not [child for child in children() if child.pid not in before]


@pytest.fixture
def fake_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that puts a shell script named ffmpeg first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def install(script: str) -> None:
        (folder / "ffmpeg").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "ffmpeg").chmod(0o755)

    return install


# Files


@every_format
def test_a_complete_file_says_exactly_how_long_it_is(fmt: AudioFormat) -> None:
    samples = speech()
    converted = asyncio.run(convert(samples, RATE, fmt, tag=TAG))
    assert converted.duration == len(samples) / RATE
    padding = 0.15 if fmt.name == "aac" else 0.0
    assert len(samples) / RATE <= listening.duration(converted.data, fmt.name) <= len(samples) / RATE + padding
    decoded, rate = listening.decode(converted.data, fmt.name)
    assert len(samples) / RATE <= len(decoded) / rate <= len(samples) / RATE + padding


@encoded_format
def test_a_file_is_24_khz_mono(fmt: AudioFormat) -> None:
    data = asyncio.run(convert(tone(1), RATE, fmt)).data
    info: Any = AAC(io.BytesIO(data)).info if fmt.name == "aac" else mutagen.File(io.BytesIO(data)).info  # type: ignore[no-untyped-call]
    assert info.channels == 1
    assert fmt.name == "opus" or info.sample_rate == RATE  # Opus always plays at 48 kHz


@pytest.mark.parametrize("name", ["wav", "flac", "pcm"])
def test_a_lossless_format_holds_exactly_the_samples(name: str) -> None:
    samples = speech()
    for data in (asyncio.run(convert(samples, RATE, FORMATS[name])).data, asyncio.run(stream(samples, FORMATS[name]))):
        decoded, rate = listening.decode(data, name)
        assert rate == RATE
        assert np.rint(decoded * 32768).astype("<i2").tobytes() == to_int16(samples)


@every_format
def test_a_stream_holds_all_samples(fmt: AudioFormat) -> None:
    decoded, rate = listening.decode(asyncio.run(stream(speech(), fmt)), fmt.name)
    assert len(speech()) / RATE <= len(decoded) / rate <= len(speech()) / RATE + STREAM_PADDING.get(fmt.name, 0.0)


@every_format
def test_files_and_streams_are_transcribed_without_an_error(fmt: AudioFormat) -> None:
    for data in (asyncio.run(convert(speech(), RATE, fmt)).data, asyncio.run(stream(speech(), fmt))):
        assert listening.word_error_rate(SENTENCE, listening.transcribe(*listening.decode(data, fmt.name), beam=1)) == 0


@every_format
def test_the_first_bytes_are_sent_while_generation_goes_on(fmt: AudioFormat) -> None:
    async def first() -> bytes:
        async with Encoder(fmt, RATE, streamed=True, tag=TAG) as encoder:
            pieces, data = aiter_of(encoder), b""
            await encoder.write(tone(0.24))
            while playable(data, fmt) < 0.08:
                data += await asyncio.wait_for(pieces.__anext__(), 20)
            return data

    assert fmt.begins(asyncio.run(first()))


def aiter_of(encoder: Encoder) -> Any:
    return encoder.__aiter__()


def run_ffmpeg(arguments: list[str], data: bytes, folder: Path) -> bytes:
    command = [listening.ffmpeg(), "-v", "error", "-y", *arguments]
    return subprocess.run(command, cwd=folder, input=data, capture_output=True, check=True, timeout=60).stdout


@pytest.fixture
def known_ffmpeg() -> None:
    """ffmpeg has told its version, as it has soon after the start of a server."""
    end = time.monotonic() + 30
    while not ffmpeg_version():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.usefixtures("known_ffmpeg")
@pytest.mark.parametrize("tag", [None, TAG, SyntheticTag("m", "even")], ids=["untagged", "tagged", "another length"])
@pytest.mark.parametrize("speed", [1.0, 0.8, 1.5])
@pytest.mark.parametrize("name", ["mp3", "flac", "wav"])
def test_a_file_is_what_ffmpeg_makes_of_all_samples_at_once(name: str, speed: float, tag: SyntheticTag | None, tmp_path: Path) -> None:
    pcm = to_int16(speech())
    if speed != 1.0:
        changed = ["-af", f"atempo={speed}", "-f", "s16le", "pipe:1"]
        pcm = run_ffmpeg(["-f", "s16le", "-ar", "24000", "-ac", "1", "-i", "pipe:0", *changed], pcm, tmp_path)
    raw = ["-f", "s16le", "-ar", "6000", "-ac", "1", "-i", "pipe:0", "-af", "asetrate=24000", "-ar", "24000", "-ac", "1"]
    run_ffmpeg([*raw, *FORMATS[name].encoder, *tag_arguments(FORMATS[name], tag), f"expected.{name}"], pcm, tmp_path)
    converted = asyncio.run(convert(speech(), RATE, FORMATS[name], step=5000, speed=speed, tag=tag))
    assert converted.data == (tmp_path / f"expected.{name}").read_bytes()
    assert converted.duration == len(pcm) / 2 / RATE


@pytest.mark.usefixtures("known_ffmpeg")
@pytest.mark.parametrize("tag", [None, TAG], ids=["untagged", "tagged"])
def test_a_wav_stream_is_ffmpegs_without_ffmpeg(tag: SyntheticTag | None, tmp_path: Path) -> None:
    async def encode() -> bytes:
        async with Encoder(FORMATS["wav"], RATE, streamed=True, tag=tag) as encoder:
            await encoder.write(speech())
            await encoder.finish()
            assert not children()
            return b"".join([piece async for piece in encoder])

    arguments = encoder_arguments(FORMATS["wav"], RATE, 1.0, tag, "pipe:1", streamed=True)
    assert asyncio.run(encode()) == run_ffmpeg(arguments, to_int16(speech()), tmp_path)


def test_wav_needs_ffmpeg_as_long_as_its_name_is_unknown(fake_ffmpeg: Callable[[str], None]) -> None:
    fake_ffmpeg("exit 1")
    assert muxer_name() is None
    with pytest.raises(ConversionError):
        asyncio.run(convert(tone(0.2), RATE, FORMATS["wav"]))


@pytest.mark.parametrize("speed", [1.0, 1.5])
def test_a_file_is_encoded_while_its_samples_arrive(speed: float, scratch: Path) -> None:
    def written() -> int:
        return sum(file.stat().st_size for file in scratch.glob("*/*"))

    async def encode() -> Converted:
        async with Encoder(FORMATS["mp3"], RATE, streamed=False, speed=speed) as encoder:
            await encoder.write(tone(80))
            end = time.monotonic() + 30
            while not written():  # ffmpeg writes 256 KiB at once, 33 s of mp3
                assert time.monotonic() < end, "nothing is encoded before the input ends"
                await asyncio.sleep(0.01)
            return await encoder.file()

    assert asyncio.run(encode()).duration == pytest.approx(80 / speed, rel=0.01)


def test_another_sample_rate_becomes_24_khz() -> None:
    samples = tone(1)[::2]
    for name in ("pcm", "wav"):
        for data in (asyncio.run(convert(samples, 12_000, FORMATS[name])).data, asyncio.run(_stream_at(samples, 12_000, FORMATS[name]))):
            assert abs(listening.decode(data, name)[0].size - RATE) < 200


async def _stream_at(samples: listening.Samples, rate: int, fmt: AudioFormat) -> bytes:
    async with Encoder(fmt, rate, streamed=True) as encoder:
        await encoder.write(samples)
        await encoder.finish()
        return b"".join([piece async for piece in encoder])


@pytest.mark.parametrize("speed", [0.25, 0.5, 1.3, 2.0, 4.0])
def test_speed_changes_the_length_and_keeps_the_pitch(speed: float) -> None:
    converted = asyncio.run(convert(tone(3), RATE, FORMATS["flac"], speed=speed))
    streamed = asyncio.run(stream(tone(3), FORMATS["flac"], speed=speed))
    assert listening.duration(converted.data, "flac") == converted.duration
    assert converted.duration == pytest.approx(3 / speed, rel=0.03)
    decoded = listening.decode(converted.data, "flac")[0]
    assert len(listening.decode(streamed, "flac")[0]) == len(decoded)
    assert pitch(decoded) == pytest.approx(220, rel=0.01)


def pitch(samples: listening.Samples) -> float:
    """Return the pitch of the middle half second: the highest peak of its autocorrelation between 80 and 400 Hz."""
    middle = samples[len(samples) // 2 - 6000 : len(samples) // 2 + 6000]
    correlation = np.correlate(middle, middle, "full")[len(middle) - 1 :]
    return RATE / float(RATE // 400 + np.argmax(correlation[RATE // 400 : RATE // 80]))


@pytest.mark.parametrize("speed", [0.24, 4.01, float("nan"), float("inf"), -1.0, 0.0])
def test_a_speed_out_of_range_never_reaches_ffmpeg(speed: float) -> None:
    with pytest.raises(ValueError, match=r"0\.25 to 4"):
        asyncio.run(convert(tone(0.1), RATE, FORMATS["mp3"], speed=speed))
    with pytest.raises(ValueError, match=r"0\.25 to 4"):
        Encoder(FORMATS["mp3"], RATE, streamed=True, speed=speed)


def test_loud_samples_are_clipped_and_quiet_ones_rounded() -> None:
    values = np.frombuffer(to_int16(np.array([-3, -1, -0.6 / 32767, 0, 0.4 / 32767, 1, 1.0001], np.float32)), "<i2")
    assert values.tolist() == [-32767, -32767, -1, 0, 0, 32767, 32767]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_numbers_are_refused(bad: float) -> None:
    samples = np.array([0, bad, 0], np.float32)
    with pytest.raises(ConversionError, match="not numbers"):
        asyncio.run(convert(samples, RATE, FORMATS["wav"]))
    with pytest.raises(ConversionError, match="not numbers"):
        asyncio.run(stream(samples, FORMATS["pcm"]))


@every_format
def test_no_samples_are_an_error(fmt: AudioFormat) -> None:
    nothing = np.zeros(0, np.float32)
    for work in (convert(nothing, RATE, fmt), stream(nothing, fmt)):
        with pytest.raises(ConversionError):
            asyncio.run(work)


# Synthetic tags


def metadata(data: bytes) -> str:
    command = [listening.ffmpeg(), "-v", "error", "-i", "pipe:0", "-f", "ffmetadata", "pipe:1"]
    return subprocess.run(command, input=data, capture_output=True, check=True, timeout=60).stdout.decode()


@pytest.mark.parametrize("streamed", [False, True], ids=["complete", "streamed"])
@pytest.mark.parametrize("name", ["mp3", "opus", "flac", "wav"])
def test_a_file_says_that_its_speech_is_synthetic(name: str, streamed: bool) -> None:
    fmt = FORMATS[name]
    data = asyncio.run(stream(tone(1), fmt, tag=TAG)) if streamed else asyncio.run(convert(tone(1), RATE, fmt, tag=TAG)).data
    found = metadata(data) if name != "opus" else repr(mutagen.File(io.BytesIO(data)).tags)
    assert "Synthetic speech" in found
    assert "model csm-1b, voice heart" in found
    if name in {"mp3", "flac"}:
        assert "Synthetic speech" in str(mutagen.File(io.BytesIO(data)).tags.pprint())


@every_format
def test_without_a_tag_the_metadata_says_nothing(fmt: AudioFormat) -> None:
    assert b"Synthetic" not in asyncio.run(convert(tone(0.2), RATE, fmt)).data


def test_a_strange_voice_name_cannot_break_the_tag() -> None:
    data = asyncio.run(convert(tone(0.2), RATE, FORMATS["flac"], tag=SyntheticTag("hibari", "-y\0\n;=日本" + "x" * 5000))).data
    comment = mutagen.File(io.BytesIO(data)).tags["description"][0]
    assert "voice -y;=日本xxx" in comment
    assert len(comment) < 200


# Faults


@every_format
def test_twenty_streams_at_once_do_not_disturb_one_another(fmt: AudioFormat) -> None:
    async def all_at_once() -> list[bytes]:
        return await asyncio.gather(*(stream(tone(0.5, 150 + 10 * k), fmt) for k in range(20)))

    results = asyncio.run(all_at_once())
    assert len(set(results)) == 20
    for k in (0, 19):
        assert pitch(_at_24_khz(*listening.decode(results[k], fmt.name))) == pytest.approx(150 + 10 * k, rel=0.02)


def _at_24_khz(samples: listening.Samples, rate: int) -> listening.Samples:
    return samples[:: rate // RATE]


async def _broken_midway(harm: Callable[[psutil.Process], None], seconds: float, fmt: AudioFormat = FORMATS["mp3"]) -> None:
    async with Encoder(fmt, RATE, streamed=True, stall_timeout=0.5) as encoder:
        await encoder.write(tone(0.5))
        (child,) = [child for child in children() if child.status() != psutil.STATUS_ZOMBIE]
        harm(child)
        await encoder.write(tone(seconds))
        await encoder.finish()
        async for _ in encoder:
            pass


@pytest.mark.parametrize("fmt", [FORMATS[name] for name in ("mp3", "opus", "aac", "flac")], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("seconds", [0.1, 60.0])
def test_an_ffmpeg_killed_midway_breaks_the_stream(fmt: AudioFormat, seconds: float) -> None:
    with pytest.raises(ConversionError, match="killed by signal 9"):
        asyncio.run(_broken_midway(lambda child: child.kill(), seconds, fmt))


@pytest.mark.parametrize(("seconds", "message"), [(0.1, "made no progress"), (60.0, "accepted no input")])
def test_an_ffmpeg_that_hangs_is_killed(seconds: float, message: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConversionError, match=message):
        asyncio.run(_broken_midway(lambda child: child.suspend(), seconds))
    assert message in caplog.text


SCRIPTS = {
    "fails at once": "echo 'a complaint about /some/where' >&2; exit 1",
    "fails at the end": "cat >/dev/null; exit 3",
    "prints garbage": "cat >/dev/null; echo garbage",
    "writes garbage": 'cat >/dev/null; for last; do :; done; case $last in pipe:*) ;; *) echo garbage >"$last";; esac',
    "writes nothing": "cat >/dev/null",
    "succeeds too early": "exit 0",
    "closes its input": "exec 0<&-; sleep 600",
    "hangs with a child": "sleep 600 & wait",
    "kills itself": "kill -9 $$",
    "floods stderr": "cat >/dev/null; yes complaint | head -c 3000000 >&2; exit 1",
    "is no program": "",
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("fmt", [FORMATS["mp3"], FORMATS["wav"]], ids=lambda fmt: fmt.name)
def test_a_faulty_ffmpeg_is_an_error_and_never_a_file(
    script: str, fmt: AudioFormat, fake_ffmpeg: Callable[[str], None], scratch: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake_ffmpeg(SCRIPTS[script])
    if script == "is no program":
        Path(find_ffmpeg() or "").write_bytes(b"\x7fELF nothing")
    for work in (convert(tone(8), RATE, fmt, stall_timeout=0.5), stream(tone(8), fmt, stall_timeout=0.5)):
        with pytest.raises(ConversionError) as caught:
            asyncio.run(work)
        assert "/" not in caught.value.message
    assert str(scratch) not in caplog.text
    assert all(len(record.getMessage()) < 700 for record in caplog.records)


def test_an_ffmpeg_that_vanishes_is_replaced_by_the_next_one(fake_ffmpeg: Callable[[str], None], tmp_path: Path) -> None:
    fake_ffmpeg("exit 1")
    assert find_ffmpeg() == str(tmp_path / "bin" / "ffmpeg")
    (tmp_path / "bin" / "ffmpeg").unlink()
    assert find_ffmpeg() != str(tmp_path / "bin" / "ffmpeg")
    assert asyncio.run(convert(tone(0.2), RATE, FORMATS["mp3"])).data


def test_without_any_ffmpeg_only_pcm_is_there_until_one_is_installed(tmp_path: Path) -> None:
    script = f"""
import asyncio, os, time, numpy as np
from audio_converter import Encoder
from audio_formats import FORMATS
from ffmpeg import ffmpeg_version, find_ffmpeg
from errors import ConversionError
sound = np.ones(2400, np.float32) / 2
async def encode(name):
    async with Encoder(FORMATS[name], 24000, streamed=False) as encoder:
        await encoder.write(sound)
        return (await encoder.file()).data
assert find_ffmpeg() is None and ffmpeg_version() is None
assert len(asyncio.run(encode("pcm"))) == 4800
try:
    asyncio.run(encode("mp3"))
except ConversionError as error:
    print(error.message)
os.symlink({listening.ffmpeg()!r}, {str(tmp_path / "ffmpeg")!r})
end = time.monotonic() + 30
while not ffmpeg_version():
    assert time.monotonic() < end
assert asyncio.run(encode("mp3"))
"""
    environment = {"PATH": str(tmp_path), "IMAGEIO_FFMPEG_EXE": "/nowhere/ffmpeg", "PYTHONPATH": str(Path(__file__).parent.parent)}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "ffmpeg is missing" in ran.stdout


def test_a_full_disk_is_an_error() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ConversionError):
            asyncio.run(convert(tone(10), RATE, FORMATS["flac"]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_missing_temporary_folder_is_an_error_that_names_no_path(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at/all")
    with pytest.raises(ConversionError, match="temporary file"):
        asyncio.run(convert(tone(0.2), RATE, FORMATS["mp3"]))
    assert "/nowhere" not in caplog.text


def test_cancelled_at_any_moment_nothing_is_left(scratch: Path) -> None:
    chance = random.Random(7)

    async def cancel_many() -> None:
        for round_ in range(24):
            fmt = chance.choice([FORMATS["mp3"], FORMATS["flac"], FORMATS["opus"]])
            work = convert(tone(4), RATE, fmt, speed=chance.choice([1.0, 2.0])) if round_ % 2 else stream(tone(4), fmt)
            task = asyncio.ensure_future(work)
            await asyncio.sleep(chance.uniform(0, 0.12))
            task.cancel()
            await asyncio.wait({task})
            assert not children()
            assert not left_in(scratch)

    asyncio.run(cancel_many())


def test_a_stream_closed_by_another_task_gives_the_reader_an_error() -> None:
    async def close_midway(fmt: AudioFormat) -> None:
        async with Encoder(fmt, RATE, streamed=True) as encoder:

            async def read() -> None:
                async for _ in encoder:
                    pass

            reading = asyncio.ensure_future(read())
            await encoder.write(tone(0.5))
            await encoder.aclose()
            await encoder.aclose()
            await reading

    for name in ("mp3", "pcm"):
        with pytest.raises(ConversionError, match="was cancelled"):
            asyncio.run(close_midway(FORMATS[name]))


def test_an_encoder_that_was_never_entered_can_be_closed() -> None:
    asyncio.run(Encoder(FORMATS["mp3"], RATE, streamed=True).aclose())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has pidfds")
def test_no_thread_waits_for_an_encoder() -> None:
    async def threads() -> list[str]:
        watch_children_without_threads()
        async with Encoder(FORMATS["mp3"], RATE, streamed=False) as encoder:
            await encoder.write(tone(1))
            running = [thread.name for thread in threading.enumerate()]
            await encoder.file()
            return running

    try:
        assert not [name for name in asyncio.run(threads()) if "waitpid" in name]
    finally:
        if sys.version_info < (3, 12):
            asyncio.set_child_watcher(asyncio.ThreadedChildWatcher())


def test_a_slow_reader_does_not_block_the_writer() -> None:
    async def write_all() -> None:
        async with Encoder(FORMATS["wav"], RATE, streamed=True) as encoder:
            await encoder.write(tone(30))  # 1.4 MB, far more than any pipe holds
            await encoder.finish()
            while children():  # psutil's own wait would reap the process, and asyncio would lose its exit status
                await asyncio.sleep(0.01)
            data = b"".join([piece async for piece in encoder])
        assert len(listening.decode(data, "wav")[0]) == 30 * RATE

    asyncio.run(asyncio.wait_for(write_all(), 60))


def test_folders_of_killed_servers_are_removed_and_those_in_use_are_kept(scratch: Path) -> None:
    script = (
        "import os, signal, ffmpeg as t\nwith t.temporary_folder() as f:\n (f / 'speech.mp3').write_bytes(b'x'); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent.parent, env={"TMPDIR": str(scratch)}, timeout=60, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    used, foreign = scratch / f"sesame-tts-{os.getpid()}-x", scratch / "sesame-tts-notes"
    used.mkdir()
    foreign.mkdir()
    assert len(list(scratch.iterdir())) == 3
    assert clean_temporary_files() == 1
    assert sorted(scratch.iterdir()) == sorted([used, foreign])
    used.rmdir()
    foreign.rmdir()


def test_a_failure_is_logged_with_ffmpegs_message(fake_ffmpeg: Callable[[str], None], caplog: pytest.LogCaptureFixture) -> None:
    fake_ffmpeg("cat >/dev/null; echo 'no such encoder' >&2; exit 8")
    with caplog.at_level(logging.ERROR), pytest.raises(ConversionError, match="status 8"):
        asyncio.run(convert(tone(0.2), RATE, FORMATS["mp3"]))
    assert "no such encoder" in caplog.text


def test_a_flac_stream_is_read_by_libsndfile() -> None:
    assert soundfile.read(io.BytesIO(asyncio.run(convert(tone(1), RATE, FORMATS["flac"])).data))[0].shape == (RATE,)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("rate", [8_000, 24_000, 48_000])
@pytest.mark.parametrize("seconds", [0.3, 20.0])
def test_the_length_of_a_file_is_measured_whole_and_cut(fmt: AudioFormat, rate: int, seconds: float) -> None:
    data = asyncio.run(convert(tone(seconds), RATE, fmt, output_rate=rate)).data
    assert seconds - 0.02 <= measured(fmt, rate, data) <= seconds + 0.4
    half = measured(fmt, rate, data[: len(data) // 2])
    assert half < seconds * 0.7 or seconds < 1
    if fmt.name != "flac":  # FLAC is measured at its end, which is missing here
        assert half > seconds * 0.3 or seconds < 1


def measured(fmt: AudioFormat, rate: int, data: bytes) -> float:
    meter = LengthMeter(fmt, rate)
    for start in range(0, len(data), 1000):
        meter.feed(data[start : start + 1000])
    return meter.seconds()


SWALLOWS = 'case "$*" in *version*) exec {ffmpeg} "$@";; esac; {{ head -c 96000; cat > /dev/null; }} | {ffmpeg} "$@"'


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("speed", [1.0, 1.5])
def test_an_encoder_that_swallows_its_input_and_succeeds_is_noticed(
    fmt: AudioFormat, speed: float, fake_ffmpeg: Callable[[str], None]
) -> None:
    fake_ffmpeg(SWALLOWS.format(ffmpeg=listening.ffmpeg()))

    async def stream() -> None:
        async with Encoder(fmt, RATE, streamed=True, speed=speed) as encoder:
            await encoder.write(tone(3.0))
            await encoder.finish()
            async for _ in encoder:
                pass

    for work in (convert(tone(3.0), RATE, fmt, speed=speed), stream()):
        if fmt.name == "pcm" and speed == 1.0:
            asyncio.run(work)  # no encoder takes part
            continue
        with pytest.raises(ConversionError, match=r"ffmpeg encoded [12]\.|not the same speech"):
            asyncio.run(work)
