"""Joins the segments' samples into one utterance: silence at the edges trimmed, a set pause between, no click at the joints."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from audio_formats import Samples
from speech_model import SegmentChunk

# The level is watched in hops, counted from the segment's first sample, so that chunk borders cannot matter.
_HOP_SECONDS = 0.005
# A hop is sound when its peak is above -60 dBFS and within 50 dB of the segment's loudest hop so far. Measured on the built-in voice
# (peaks at -9 to -13 dBFS): the final f, th, p and t of "cliff", "path", "map" and "cat" die away from -40 to -55 dBFS, its pauses lie
# under -80. The second limit keeps a noisy recording's pauses, up to 50 dB under its speech, from counting as sound.
_FLOOR = np.float32(10 ** (-60 / 20))
_BELOW_PEAK = np.float32(10 ** (-50 / 20))
# What is kept of the silence around the sound, so that onsets and endings softer than the limits stay whole.
_HEAD_SECONDS = 0.025
_TAIL_SECONDS = 0.070
_LEAST_HEAD_SECONDS = 0.010
_LEAST_TAIL_SECONDS = 0.020
_FADE_SECONDS = 0.005


@dataclass(frozen=True)
class SegmentTimestamp:
    """Where a segment is heard.

    Attributes:
        segment: The segment's index.
        start: Seconds from the beginning of the joined audio to the segment's first sample.
        end: Seconds to the end of its last one; the pause follows.
    """

    segment: int
    start: float
    end: float


class SegmentJoiner:
    """Takes a model's chunks in order and gives back the samples that may be played now.

    Of the silence around each segment up to 25 ms before and 70 ms behind the sound are kept; the pause counts what is kept, so the heard
    gap is `pause_ms` (for a pause below 95 ms less is kept, but never less than 10 and 20 ms, so that no soft ending is cut). It is put in front of a segment's first
    sound: none comes before the first segment or after the last, and a silent segment adds nothing. The first and last 5 ms of a segment are
    faded with a raised cosine to zero, where the pause's digital silence begins. All samples together do not depend on how the
    segments were cut into chunks. Held back are only the last 5 ms, an unfinished hop, and silence that may turn out to be the segment's end.

    Args:
        sample_rate: Of the samples, in Hz.
        pause_ms: The silence that is heard between two segments, in milliseconds.

    Attributes:
        timestamps: Of each finished segment that is heard, in order; exact to the sample.
    """

    def __init__(self, sample_rate: int, pause_ms: int) -> None:
        self._rate = sample_rate
        self._hop = max(1, round(sample_rate * _HOP_SECONDS))
        self._pause = round(sample_rate * pause_ms / 1000)
        self._fade_in = _raised_cosine(max(2, round(sample_rate * _FADE_SECONDS)))
        scale = min(1.0, pause_ms / 1000 / (_HEAD_SECONDS + _TAIL_SECONDS))
        self._head = int(sample_rate * max(_LEAST_HEAD_SECONDS, _HEAD_SECONDS * scale))
        self._tail = int(sample_rate * max(_LEAST_TAIL_SECONDS, _TAIL_SECONDS * scale))
        self._played = 0
        self._silence_kept = 0  # at the end of what was played last
        self._segment = _Segment()
        self.timestamps: list[SegmentTimestamp] = []

    @property
    def duration(self) -> float:
        """Seconds of audio given back so far."""
        return self._played / self._rate

    def push(self, chunk: SegmentChunk) -> Samples:
        """The samples that may be played after this chunk: float32, shape (n,), possibly empty."""
        segment = self._segment
        segment.take(np.asarray(chunk.samples, dtype=np.float32).reshape(-1))
        self._find_sound(segment, ended=chunk.last)
        if not segment.sound_end:
            segment.forget(segment.heard - self._head)
            ready = np.zeros(0, np.float32)
        elif segment.begun:
            ready = self._emit(segment, ended=chunk.last)
        else:
            ready = np.concatenate([self._begin(segment), self._emit(segment, ended=chunk.last)])
        self._played += len(ready)
        if chunk.last:
            self._finish(chunk.segment, segment)
        return ready

    def _find_sound(self, segment: _Segment, *, ended: bool) -> None:
        """Look at the hops that are complete (at the end: at the rest as well) and note where sound begins and ends."""
        count = (segment.received - segment.heard) // self._hop
        new = segment.pending[segment.heard - segment.base :]
        peaks = np.abs(new[: count * self._hop]).reshape(count, self._hop).max(axis=1)
        if ended and len(new) > count * self._hop:
            peaks = np.append(peaks, np.abs(new[count * self._hop :]).max())
        if not len(peaks):
            return
        loudest = np.maximum(np.maximum.accumulate(peaks), segment.peak)
        sounding = np.flatnonzero(peaks > np.maximum(_FLOOR, loudest * _BELOW_PEAK))
        if len(sounding):
            if not segment.sound_end:
                segment.sound_start = segment.heard + int(sounding[0]) * self._hop
            segment.sound_end = min(segment.heard + (int(sounding[-1]) + 1) * self._hop, segment.received)
        segment.peak = loudest[-1]
        segment.heard = min(segment.heard + len(peaks) * self._hop, segment.received)

    def _begin(self, segment: _Segment) -> Samples:
        """The pause in front of a segment whose first sound has come; leading silence is dropped."""
        segment.begun = True
        segment.start = segment.sent = max(segment.base, segment.sound_start - self._head)
        segment.forget(segment.start)
        pause = 0 if not self.timestamps else max(0, self._pause - self._silence_kept - (segment.sound_start - segment.start))
        segment.position = self._played + pause
        return np.zeros(pause, np.float32)

    def _emit(self, segment: _Segment, *, ended: bool) -> Samples:
        """What is certain to be heard: all but the silence that may be the end, and the samples that may have to be faded out."""
        fade = len(self._fade_in)
        end = min(segment.sound_end + self._tail, segment.received)
        until = end if ended else max(segment.sent, end - fade)
        ready = segment.pending[segment.sent - segment.base : until - segment.base].copy()
        offset = segment.sent - segment.start
        if offset < fade:
            ready[: fade - offset] *= self._fade_in[offset : offset + len(ready)]
        if ended:
            # `fade` samples were held back, unless the whole segment is shorter than that.
            length = min(fade, len(ready))
            if length:
                ready[-length:] *= self._fade_in[:length][::-1]
            self._silence_kept = end - segment.sound_end
        segment.sent = until
        segment.forget(until)
        return ready

    def _finish(self, index: int, segment: _Segment) -> None:
        if segment.begun:
            self.timestamps.append(SegmentTimestamp(index, segment.position / self._rate, self._played / self._rate))
        self._segment = _Segment()


class _Segment:
    """The segment that is being received. All offsets count samples from its first one."""

    def __init__(self) -> None:
        self.pending: NDArray[np.float32] = np.zeros(0, np.float32)  # received and not sent, from `base` on
        self.base = 0
        self.heard = 0  # looked at so far
        self.peak = np.float32(0)
        self.sound_start = 0
        self.sound_end = 0  # 0 while nothing has sounded
        self.begun = False  # something was played
        self.start = 0  # the first sample that is played
        self.sent = 0
        self.position = 0  # of `start` in the joined audio

    @property
    def received(self) -> int:
        return self.base + len(self.pending)

    def take(self, samples: Samples) -> None:
        self.pending = np.concatenate([self.pending, samples])

    def forget(self, until: int) -> None:
        """Drop what lies before the sample `until`."""
        if until > self.base:
            self.pending = self.pending[until - self.base :]
            self.base = until


def _raised_cosine(length: int) -> NDArray[np.float32]:
    """A rise from 0 towards 1: sin² over a quarter turn, shape (length,)."""
    return (np.sin(np.linspace(0, np.pi / 2, length, endpoint=False)) ** 2).astype(np.float32)
