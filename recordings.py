"""Reads and checks recordings that become voices."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from audio_formats import SAMPLE_RATE, Samples
from errors import ConversionError, InvalidAudioError
from ffmpeg import FfmpegFailedError, run_ffmpeg, temporary_folder

MIN_SECONDS, MAX_SECONDS = 1.0, 60.0

_NAME = "recording"
_DECODE_SECONDS = 30.0  # 61 s of sound take some tenths of a second; nothing honest takes this long

# ffmpeg also reads playlists and scripts that name other files and addresses (hls, concat, dash, sdp, lavfi …). A recording comes from
# anybody, so only formats that hold their own sound are opened, by their demuxers' names.
_DEMUXERS = (
    "wav,w64,aiff,au,caf,flac,mp3,ogg,aac,ac3,eac3,amr,amrnb,amrwb,ape,asf,avi,dts,flv,loas,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mpc,mpc8,"
    "mpeg,mpegts,opus,tta,voc,wv,gsm,sox"
)

_USUAL = "Send a recording of speech as WAV, MP3, M4A, FLAC, Ogg, Opus or WebM."
_SILENT_PEAK = 0.003  # -50 dB of full scale: below a quiet room
_CLIPPED_SHARE = 0.05  # loud speech with its peaks cut has well under 1 % of its samples at full scale
_FULL_SCALE = 0.999


def read_recording(path: Path) -> Samples:
    """The recording at `path` as float32 samples of shape (n,), mono, 24 kHz, within [-1, 1]. Blocks; for worker threads.

    A file of hours costs no more than one of a minute: decoding stops there.

    Raises:
        InvalidAudioError: It is not sound, or shorter than 1 s, longer than 60 s, silent, or clipped beyond use.
        ConversionError: ffmpeg or room for a temporary file is missing.
    """
    if not path.is_file():  # a pipe or a device could be waited for endlessly
        raise InvalidAudioError(f"The recording is not there, or not a file. {_USUAL}")
    with temporary_folder() as folder:
        # By a name of ours: its own may hold anything, and would appear in ffmpeg's messages.
        (folder / _NAME).symlink_to(path.absolute())
        return _checked(_decode(folder))


def read_recording_bytes(data: bytes) -> Samples:
    """`read_recording` for a recording that was sent.

    It goes through a file, because some formats (M4A) have their index at the end and cannot be read from a pipe.
    """
    with temporary_folder() as folder:
        try:
            (folder / _NAME).write_bytes(data)
        except OSError as error:
            logger.error("a recording cannot be kept for reading: %s", error.strerror)  # noqa: TRY400 - the cause is all there is to know
            raise ConversionError("The server has no room for a temporary file.") from None
        return _checked(_decode(folder))


def _decode(folder: Path) -> Samples:
    limit = ["-t", f"{MAX_SECONDS + 1:g}"]
    source = ["-protocol_whitelist", "file", "-format_whitelist", _DEMUXERS, *limit, "-i", f"file:{_NAME}"]
    result = ["-map", "0:a:0", *limit, "-ac", "1", "-ar", str(SAMPLE_RATE), "-f", "f32le", "pipe:1"]
    try:
        data = run_ffmpeg([*source, *result], folder=folder, timeout=_DECODE_SECONDS)
    except FfmpegFailedError:
        raise InvalidAudioError(f"The recording cannot be read as sound. {_USUAL}") from None
    return np.frombuffer(data[: len(data) // 4 * 4], "<f4").astype(np.float32)


def _checked(samples: Samples) -> Samples:
    """`samples`, if they can serve as a voice."""
    seconds = len(samples) / SAMPLE_RATE
    allowed = f"It must last from {MIN_SECONDS:g} to {MAX_SECONDS:g} s."
    if seconds > MAX_SECONDS:
        raise InvalidAudioError(f"The recording lasts more than {MAX_SECONDS:g} s. {allowed}")
    if seconds < MIN_SECONDS:
        raise InvalidAudioError(f"The recording lasts {seconds:.2f} s. {allowed}")
    if not np.isfinite(samples).all():
        raise InvalidAudioError(f"The recording holds samples that are not numbers. {_USUAL}")
    loudness = np.abs(samples)
    if float(loudness.max()) < _SILENT_PEAK:
        raise InvalidAudioError("The recording is silent (mixed to mono). It must hold speech.")
    if float(np.mean(loudness >= _FULL_SCALE)) > _CLIPPED_SHARE:
        raise InvalidAudioError("The recording is clipped: too much of it is at full scale. Record it again at a lower level.")
    return np.clip(samples, -1.0, 1.0)


logger = logging.getLogger(__name__)

_Identity = tuple[int, int, int] | None


class RecordingVerdicts:
    """What was found about recordings, as long as they stay what they are. One thread at a time."""

    def __init__(self) -> None:
        self._verdicts: dict[Path, tuple[_Identity, str | None]] = {}

    def fault(self, path: Path) -> str | None:
        """Why the recording at `path` cannot be used, or None. Decodes it unless that was done before: a tenth of a second for 30 s of sound."""
        identity = _identity(path)
        known = self._verdicts.get(path)
        if known is None or known[0] != identity:
            known = (identity, _fault(path))
            self._verdicts[path] = known
        return known[1]

    def keep(self, paths: Iterable[Path]) -> None:
        """Forget all recordings but these."""
        wanted = set(paths)
        self._verdicts = {path: verdict for path, verdict in self._verdicts.items() if path in wanted}

    def signature(self) -> object:
        """What the recordings were when they were judged."""
        return [identity for identity, _ in self._verdicts.values()]

    def signature_now(self) -> object:
        """What the recordings are: differs from `signature` once one of them has changed."""
        return [_identity(path) for path in self._verdicts]


def _fault(path: Path) -> str | None:
    try:
        read_recording(path)
    except InvalidAudioError as error:
        return error.message
    except ConversionError as error:  # no fault of the recording: the model will look at it again
        logger.warning("a preset's recording could not be checked: %s", error.message)
    return None


def _identity(path: Path) -> _Identity:
    """What changes when a file does; None when there is none, or its name is impossible."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
