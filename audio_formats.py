"""The audio formats: the one table that validation, conversion, responses, documents and tests read."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Samples: TypeAlias = "NDArray[np.float32]"
"""Mono audio: float32, shape (samples,), nominally within [-1, 1]."""

SAMPLE_RATE = 24_000
"""The rate of all audio that the server sends, in Hz: CSM and the built-in voice produce it, and clients assume it for raw PCM."""


@dataclass(frozen=True)
class AudioFormat:
    """An output format; always mono, 24 kHz.

    Attributes:
        name: Its name in a request, and its file extension.
        content_type: The response's Content-Type.
        encoder: ffmpeg's output options.
        streaming: Further output options that make the bytes leave as soon as they exist.
        signatures: The byte strings that a file of this format can begin with; none for raw samples.
        tagged: The container can hold a title and a comment.
    """

    name: str
    content_type: str
    encoder: tuple[str, ...]
    streaming: tuple[str, ...] = ()
    signatures: tuple[bytes, ...] = ()
    tagged: bool = False

    def begins(self, data: bytes) -> bool:
        """Return whether a file of this format can begin with `data`."""
        return bool(data) and (not self.signatures or data.startswith(self.signatures))


# Bit rates and content types as required for the first version; aac and pcm follow OpenAI's API.
_TABLE = (
    AudioFormat(
        name="mp3",
        content_type="audio/mpeg",
        encoder=("-c:a", "libmp3lame", "-b:a", "64k", "-f", "mp3"),
        signatures=(b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2"),
        tagged=True,
    ),
    AudioFormat(
        name="opus",
        content_type="audio/opus",
        encoder=("-c:a", "libopus", "-b:a", "32k", "-frame_duration", "20", "-f", "opus"),
        # ffmpeg holds an Ogg page back until it is full: 1 s by default. One frame per page costs 1.4 kB/s.
        streaming=("-page_duration", "20000"),
        signatures=(b"OggS",),
        tagged=True,
    ),
    AudioFormat(
        name="aac",
        content_type="audio/aac",
        encoder=("-c:a", "aac", "-b:a", "64k", "-f", "adts"),
        signatures=(b"\xff\xf1", b"\xff\xf9"),
    ),
    AudioFormat(
        name="flac",
        content_type="audio/flac",
        encoder=("-c:a", "flac", "-f", "flac"),
        # Frames of 24 ms instead of 96 ms: the audio leaves sooner, for 2 % more bytes.
        streaming=("-frame_size", "576"),
        signatures=(b"fLaC",),
        tagged=True,
    ),
    AudioFormat(
        name="wav",
        content_type="audio/wav",
        encoder=("-c:a", "pcm_s16le", "-f", "wav"),
        signatures=(b"RIFF",),
        tagged=True,
    ),
    AudioFormat(
        name="pcm",
        content_type="audio/pcm",
        encoder=("-c:a", "pcm_s16le", "-f", "s16le"),
    ),
)

FORMATS: dict[str, AudioFormat] = {fmt.name: fmt for fmt in _TABLE}
"""All formats by name."""


@dataclass(frozen=True)
class SyntheticTag:
    """Metadata that says that a machine generated the speech. It contains nothing of the text.

    Attributes:
        model: The model's id.
        voice: The voice's name.
    """

    model: str
    voice: str


def tag_arguments(fmt: AudioFormat, tag: SyntheticTag | None) -> list[str]:
    """Return ffmpeg's output options that write `tag`; none if there is no tag or the container cannot hold one."""
    if tag is None or not fmt.tagged:
        return []
    return ["-metadata", f"title={_TITLE}", "-metadata", f"comment={_comment(tag)}"]


def wav_header(rate: int, tag: SyntheticTag | None, writer: str, size: int | None) -> bytes:
    """Return what ffmpeg writes before the samples of a mono 16-bit WAV file.

    Args:
        rate: The sample rate, in Hz.
        tag: Written as title and comment.
        writer: ffmpeg's name for its writer of files, such as "Lavf63.1.102".
        size: Of the samples, in bytes; None for a stream, which ends when it ends.
    """
    fields = {b"ICMT": _comment(tag), b"INAM": _TITLE} if tag else {}
    info = b"".join(_riff_chunk(name, value.encode() + b"\0") for name, value in (fields | {b"ISFT": writer}).items())
    form = struct.pack("<HHIIHH", 1, 1, rate, 2 * rate, 2, 16)  # integer samples, mono
    head = b"WAVE" + _riff_chunk(b"fmt ", form) + _riff_chunk(b"LIST", b"INFO" + info) + b"data"
    sizes = [0xFFFF_FFFF] * 2 if size is None else [len(head) + 4 + size, size]
    return b"RIFF" + struct.pack("<I", sizes[0]) + head + struct.pack("<I", sizes[1])


def _riff_chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


_TITLE = "Synthetic speech"


def _comment(tag: SyntheticTag) -> str:
    return f"No person said this: generated by Sesame TTS (model {_plain(tag.model)}, voice {_plain(tag.voice)})."


def _plain(name: str) -> str:
    """Return `name` fit for an argument: users choose the names of uploaded voices, and an argument cannot contain NUL."""
    return "".join(character for character in name if character.isprintable())[:64]


class LengthMeter:
    """Measures how much audio a file holds, from its frames, while it is written: an encoder that swallows its input ends with status 0.

    Args:
        fmt: The file's format.
        rate: The sample rate of raw PCM; files say their own.
    """

    def __init__(self, fmt: AudioFormat, rate: int) -> None:
        self._name = fmt.name
        self._rate = rate
        self._size = 0
        self._head = b""  # the first bytes, for the rate and the size of the header
        self._rest = b""  # not measured yet; of FLAC the last bytes
        self._seconds = 0.0

    def feed(self, data: bytes) -> None:
        """Measure more bytes."""
        self._size += len(data)
        if len(self._head) < _HEAD_BYTES:
            self._head += data[:_HEAD_BYTES]
        if self._name in _FRAMES:
            self._rest += data
            self._walk(_FRAMES[self._name])
        elif self._name == "flac":
            self._rest = (self._rest + data)[-_FLAC_TAIL_BYTES:]

    def seconds(self) -> float:
        """Return the length of the audio so far, in seconds. Incomplete frames do not count."""
        if self._name == "pcm":
            return self._size / 2 / self._rate
        if self._name == "wav":
            start = self._head.find(b"data") + 8
            return (self._size - start) / 2 / int.from_bytes(self._head[24:28], "little") if start >= 44 else 0.0
        return _flac_seconds(self._head, self._rest) if self._name == "flac" else self._seconds

    def _walk(self, frame: Callable[[bytes, int], tuple[int, float]]) -> None:
        """Add up the complete frames; stop for good at what is not a frame."""
        position = 0
        while len(self._rest) - position >= _FRAME_HEAD_BYTES:
            size, seconds = frame(self._rest, position)
            if not 0 < size <= len(self._rest) - position:
                break
            position += size
            self._seconds += seconds
        self._rest = self._rest[position:]


_HEAD_BYTES = 4096
_FRAME_HEAD_BYTES = 28  # more than any header's fixed part; the shortest frame of mp3 at 64 kbit/s has 96 bytes
_FLAC_TAIL_BYTES = 64 * 1024  # more than two frames of 4608 samples
_MP3_KBITS = ((32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320), (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160))
_MP3_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_AAC_RATES = (96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000, 7_350)


def _mp3_frame(data: bytes, at: int) -> tuple[int, float]:
    """Return the size and the seconds of the frame at `at`, or of an ID3 tag; (0, 0) if there is none."""
    head = data[at : at + 3]
    if head == b"ID3":
        return 10 + sum(byte << 7 * (3 - index) for index, byte in enumerate(data[at + 6 : at + 10])), 0.0
    return _mp3_head(head)


@lru_cache(maxsize=64)  # a file has two or three different heads, and 42 frames a second
def _mp3_head(head: bytes) -> tuple[int, float]:
    """Return the size and the seconds of a frame by its first three bytes (ISO 11172-3, 2.4.2.3); (0, 0) if they begin none."""
    version, kbits, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if head[0] != 0xFF or head[1] & 0xE6 != 0xE2 or version == 1 or kbits in (0, 15) or rate == 3:
        return 0, 0.0
    samples, hertz = (1152 if version == 3 else 576), _MP3_RATES[version][rate]
    return samples * 125 * _MP3_KBITS[version != 3][kbits - 1] // hertz + (head[2] >> 1 & 1), samples / hertz


def _aac_frame(data: bytes, at: int) -> tuple[int, float]:
    """Return the size and the seconds of the ADTS frame at `at` (ISO 13818-7, 6.2); (0, 0) if there is none."""
    rate = data[at + 2] >> 2 & 15
    if data[at] != 0xFF or data[at + 1] & 0xF6 != 0xF0 or rate >= len(_AAC_RATES):
        return 0, 0.0
    return (data[at + 3] & 3) << 11 | data[at + 4] << 3 | data[at + 5] >> 5, 1024 / _AAC_RATES[rate]


def _opus_page(data: bytes, at: int) -> tuple[int, float]:
    """Return the size and the seconds of the Ogg page at `at` (RFC 3533): 20 ms for each packet, the only length that we encode."""
    segments = data[at + 27 : at + 27 + data[at + 26]]
    if data[at : at + 4] != b"OggS" or len(segments) < data[at + 26]:
        return 0, 0.0
    packets = sum(length < 255 for length in segments)
    is_header = data[at + 6 : at + 14] == bytes(8)  # the granule position of both header pages is 0
    return 27 + len(segments) + sum(segments), 0.0 if is_header else packets * 0.02


_FRAMES: dict[str, Callable[[bytes, int], tuple[int, float]]] = {"mp3": _mp3_frame, "aac": _aac_frame, "opus": _opus_page}


def _flac_seconds(head: bytes, tail: bytes) -> float:
    """Return where the last frame of a FLAC file ends, in seconds; 0 if the file does not end with a complete frame (RFC 9639)."""
    rate, block = int.from_bytes(head[18:21], "big") >> 4, int.from_bytes(head[8:10], "big")
    at = tail.rfind(b"\xff\xf8")
    while at >= 0:
        number, samples = _flac_frame(tail[at : at + 16])
        if samples and rate:  # a frame's head, and so the last one
            return 0.0 if _crc(_CRC16, 16, tail[at:]) else (number * block + samples) / rate
        at = tail.rfind(b"\xff\xf8", 0, at)
    return 0.0


def _flac_frame(head: bytes) -> tuple[int, int]:
    """Return the number and the samples of the frame that begins with `head`; (0, 0) if it is none, as its checksum shows."""
    number, length = _coded_number(head[4:11])
    size, rate = (head[2] >> 4, head[2] & 15) if len(head) > 2 else (0, 0)
    at = 4 + length
    end = at + {6: 1, 7: 2}.get(size, 0) + {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if not length or not size or end >= len(head) or _crc(_CRC8, 8, head[: end + 1]):
        return 0, 0
    sizes = {1: 192, 6: head[at] + 1, 7: int.from_bytes(head[at : at + 2], "big") + 1}
    return number, sizes.get(size) or (576 << size - 2 if size <= 5 else 256 << size - 8)


def _coded_number(data: bytes) -> tuple[int, int]:
    """Return a frame number, coded like UTF-8, and its length in bytes; (0, 0) if it is none."""
    if not data or data[0] < 0x80:
        return (data[0], 1) if data else (0, 0)
    length = 8 - (data[0] ^ 0xFF).bit_length()
    if not 2 <= length <= len(data):
        return 0, 0
    number = data[0] & (0x7F >> length)
    for byte in data[1:length]:
        number = number << 6 | byte & 0x3F
    return number, length


def _crc(table: tuple[int, ...], bits: int, data: bytes) -> int:
    """Return the checksum of `data`; 0 if it ends with its own."""
    crc, mask = 0, (1 << bits) - 1
    for byte in data:
        crc = crc << 8 & mask ^ table[crc >> bits - 8 ^ byte]
    return crc


def _crc_table(polynomial: int, bits: int) -> tuple[int, ...]:
    def entry(value: int) -> int:
        value <<= bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> bits - 1 else 0)
            value &= (1 << bits) - 1
        return value

    return tuple(entry(byte) for byte in range(256))


_CRC8, _CRC16 = _crc_table(0x07, 8), _crc_table(0x8005, 16)
