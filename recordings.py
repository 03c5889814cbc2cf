"""Read and check recordings that become voices."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from audio_formats import SAMPLE_RATE, Samples
from errors import ConversionError, InvalidAudioError
from ffmpeg import FfmpegFailedError, run_ffmpeg, temporary_folder
from files import FileSignature, file_signature

logger = logging.getLogger(__name__)

MIN_SECONDS, MAX_SECONDS = 1.0, 60.0

_NAME = "recording"
_DECODE_SECONDS = 30.0  # timeout: 61 s of audio take some tenths of a second

# ffmpeg also reads playlists and scripts that refer to other files and addresses (hls, concat, dash, sdp, lavfi …). Recordings are
# untrusted, so only formats that contain their own audio are allowed, by their demuxers' names.
_DEMUXERS = (
    "wav,w64,aiff,au,caf,flac,mp3,ogg,aac,ac3,eac3,amr,amrnb,amrwb,ape,asf,avi,dts,flv,loas,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mpc,mpc8,"
    "mpeg,mpegts,opus,tta,voc,wv,gsm,sox"
)

_USUAL = "Send a recording of speech as WAV, MP3, M4A, FLAC, Ogg, Opus or WebM."
_SILENT_PEAK = 0.003  # -50 dB of full scale: below a quiet room
_CLIPPED_SHARE = 0.05  # loud speech with its peaks cut has well under 1 % of its samples at full scale
_FULL_SCALE = 0.999

# Recordings that were decoded to check them, until `read_recording` takes them to encode them: at most 5.8 MB each. The oldest goes first.
_decoded: OrderedDict[tuple[Path, FileSignature | None], Samples] = OrderedDict()
_MOST_DECODED = 4


class RecordingVerdicts:
    """Remembers which recordings can be used, until they change. For one thread at a time."""

    def __init__(self) -> None:
        self._verdicts: dict[Path, tuple[FileSignature | None, str | None]] = {}

    def fault(self, path: Path) -> str | None:
        """Return why the recording at `path` cannot be used, or None. Decodes it if it is new or changed: 0.1 s for 30 s of audio."""
        signature = file_signature(path)
        known = self._verdicts.get(path)
        if known is None or known[0] != signature:
            known = (signature, _fault(path))
            self._verdicts[path] = known
        return known[1]

    def keep(self, paths: Iterable[Path]) -> None:
        """Forget all recordings but these."""
        wanted = set(paths)
        self._verdicts = {path: verdict for path, verdict in self._verdicts.items() if path in wanted}

    def signature(self) -> object:
        """Return the signatures of the recordings when they were checked."""
        return [signature for signature, _ in self._verdicts.values()]

    def signature_now(self) -> object:
        """Return the signatures of the recordings now: differs from `signature` once one has changed."""
        return [file_signature(path) for path in self._verdicts]


def read_recording(path: Path) -> Samples:
    """Return the recording at `path` as float32 samples of shape (n,), mono, 24 kHz, within [-1, 1]. Blocks: for worker threads.

    Samples that `RecordingVerdicts` has just decoded are returned once, without decoding again. Of a file of hours, 61 s are decoded.

    Raises:
        InvalidAudioError: It is not audio, shorter than 1 s, longer than 60 s, silent, or too heavily clipped.
        ConversionError: ffmpeg or room for a temporary file is missing.
    """
    decoded = _decoded.pop((path, file_signature(path)), None)
    return _read(path) if decoded is None else decoded


def read_recording_bytes(data: bytes) -> Samples:
    """Return the recording in a form's field `audio_sample`; raise as `read_recording` does.

    It goes through a file, because some formats (M4A) have their index at the end and cannot be read from a pipe.
    """
    with temporary_folder() as folder:
        try:
            (folder / _NAME).write_bytes(data)
        except OSError as error:
            logger.error("a recording cannot be written to a temporary file: %s", error.strerror)  # noqa: TRY400 - the cause is enough
            raise ConversionError("The server has no room for a temporary file.") from None
        try:
            return _checked(_decode(folder))
        except InvalidAudioError as error:
            error.param = "audio_sample"
            raise


def _fault(path: Path) -> str | None:
    signature = file_signature(path)
    try:
        samples = _read(path)
    except InvalidAudioError as error:
        return error.message
    except ConversionError as error:  # not the recording's fault: the model reads it again later
        logger.warning("a preset's recording could not be checked: %s", error.message)
        return None
    _decoded[path, signature] = samples
    while len(_decoded) > _MOST_DECODED:
        _decoded.popitem(last=False)
    return None


def _read(path: Path) -> Samples:
    if not path.is_file():  # reading a pipe or a device might never end
        raise InvalidAudioError(f"The recording is not there, or not a file. {_USUAL}")
    with temporary_folder() as folder:
        # Under a fixed name: its own may hold any characters, and would appear in ffmpeg's messages.
        (folder / _NAME).symlink_to(path.absolute())
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
    """Return `samples` clipped to [-1, 1], or raise InvalidAudioError if they cannot be used as a voice."""
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
