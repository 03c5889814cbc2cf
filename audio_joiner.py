"""Join segments into one utterance: trim the silence at their edges, put a fixed pause between them, fade against clicks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from audio_formats import Samples
from speech_model import SegmentChunk, SpokenWord

# The level is measured in hops counted from the segment's first sample, so the result does not depend on the chunk boundaries.
_HOP_SECONDS = 0.005
# A hop is sound when its peak is above -60 dBFS and within 50 dB of the segment's loudest hop so far. Measured on the built-in voice
# (peaks at -9 to -13 dBFS): the final f, th, p and t of "cliff", "path", "map" and "cat" fade at -40 to -55 dBFS; its pauses are
# below -80. The second limit treats noise at least 50 dB below the speech as silence.
_FLOOR = np.float32(10 ** (-60 / 20))
_BELOW_PEAK = np.float32(10 ** (-50 / 20))
# Silence that is kept around the sound, so that onsets and endings softer than the limits are not cut.
_HEAD_SECONDS = 0.025
_TAIL_SECONDS = 0.070
_LEAST_HEAD_SECONDS = 0.010
_LEAST_TAIL_SECONDS = 0.020
_FADE_SECONDS = 0.005


@dataclass(frozen=True)
class SegmentTimestamp:
    """Where a segment is in the joined audio.

    Attributes:
        segment: The segment's index.
        start: Seconds from the start of the audio to the segment's first sample.
        end: Seconds from the start of the audio to the end of the segment's last sample; the pause follows.
        words: The segment's words, if the model knows when they are heard; seconds from the start of the audio.
    """

    segment: int
    start: float
    end: float
    words: tuple[SpokenWord, ...] = ()


class SegmentJoiner:
    """Takes a model's chunks in order and returns the samples that can be played so far.

    - Silence: up to 25 ms before and 70 ms after a segment's sound are kept. The pause includes them, so the gap between two sounds is
      `pause_ms`. A pause below 95 ms keeps less, but at least 10 and 20 ms, so that no soft ending is cut.
    - Pauses: only between two segments with sound. A silent segment adds nothing. A requested pause is as long as requested, also at the
      start and at the end.
    - Fades: the first and last 5 ms of a segment follow a raised cosine from and to zero.
    - Chunks: their boundaries do not affect the result.
    - Delay: only the last 5 ms, an incomplete hop, and silence that may be the segment's end are held back.

    Args:
        sample_rate: In Hz.
        pause_ms: The silence between two segments, in milliseconds.

    Attributes:
        timestamps: One for each finished segment with sound, in order; exact to the sample.
    """

    def __init__(self, sample_rate: int, pause_ms: int) -> None:
        self._rate = sample_rate
        self._requested: dict[int, float] = {}
        self._hop = max(1, round(sample_rate * _HOP_SECONDS))
        self._pause = round(sample_rate * pause_ms / 1000)
        self._fade_in = _raised_cosine(max(2, round(sample_rate * _FADE_SECONDS)))
        self._due: int | None = None  # of the requested silence before the next sound
        self._length = 0
        self._silence_kept = 0  # at the end of the previous segment
        self._segment = _Segment()
        self.timestamps: list[SegmentTimestamp] = []

    @property
    def duration(self) -> float:
        """Seconds of audio returned so far."""
        return self._length / self._rate

    @property
    def unfinished(self) -> SegmentTimestamp | None:
        """The segment that is being received, up to the last sample returned; None if nothing of it has been returned."""
        segment = self._segment
        return SegmentTimestamp(segment.index, segment.position / self._rate, self.duration) if segment.begun else None

    def push(self, chunk: SegmentChunk) -> Samples:
        """Return the samples that can be played after this chunk: float32, shape (n,), possibly empty."""
        segment = self._segment
        segment.index = chunk.segment
        if (pause := self._requested.pop(chunk.segment, None)) is not None:
            self._due = (self._due or 0) + round(pause * self._rate)
        segment.append(np.asarray(chunk.samples, dtype=np.float32).reshape(-1))
        self._find_sound(segment, ended=chunk.last)
        if not segment.sound_end:
            segment.forget(segment.measured - self._head(None))
            ready = np.zeros(0, np.float32)
        elif segment.begun:
            ready = self._take_final(segment, chunk)
        else:
            ready = np.concatenate([self._begin(segment), self._take_final(segment, chunk)])
        self._length += len(ready)
        if chunk.last:
            self._finish(chunk, segment)
        return ready

    def request(self, pauses: Mapping[int, float]) -> None:
        """Take the pauses that the next text asks for.

        Args:
            pauses: Seconds of silence, by the index of the segment they come before; after the last segment, by the number of segments.
        """
        self._requested = dict(pauses)

    def finish(self) -> Samples:
        """Return the silence that the text asks for at its end: float32, shape (n,), possibly empty. Called after the last segment."""
        due = (self._due or 0) + round(sum(self._requested.values()) * self._rate)
        silence = np.zeros(max(0, due - self._silence_kept), np.float32)
        self._requested, self._due = {}, None
        self._length += len(silence)
        self._silence_kept += len(silence)
        return silence

    def _head(self, gap: int | None) -> int:
        """Return how many silent samples at most to keep before the sound of a segment; `gap`: to the sound before, if it was requested."""
        return self._kept(_HEAD_SECONDS, _LEAST_HEAD_SECONDS, gap)

    def _kept(self, most: float, least: float, gap: int | None) -> int:
        scale = min(1.0, (self._pause if gap is None else gap) / self._rate / (_HEAD_SECONDS + _TAIL_SECONDS))
        return int(self._rate * max(least, most * scale))

    def _find_sound(self, segment: _Segment, *, ended: bool) -> None:
        """Measure the complete hops (at the end also the incomplete one) and note where the sound begins and ends."""
        count = (segment.received - segment.measured) // self._hop
        new = segment.pending[segment.measured - segment.base :]
        peaks = np.abs(new[: count * self._hop]).reshape(count, self._hop).max(axis=1)
        if ended and len(new) > count * self._hop:
            peaks = np.append(peaks, np.abs(new[count * self._hop :]).max())
        if not len(peaks):
            return
        loudest = np.maximum(np.maximum.accumulate(peaks), segment.peak)
        sounding = np.flatnonzero(peaks > np.maximum(_FLOOR, loudest * _BELOW_PEAK))
        if len(sounding):
            if not segment.sound_end:
                segment.sound_start = segment.measured + int(sounding[0]) * self._hop
            segment.sound_end = min(segment.measured + (int(sounding[-1]) + 1) * self._hop, segment.received)
        segment.peak = loudest[-1]
        segment.measured = min(segment.measured + len(peaks) * self._hop, segment.received)

    def _begin(self, segment: _Segment) -> Samples:
        """Drop the segment's leading silence and return the pause before it. Called at its first sound."""
        segment.begun = True
        segment.start = segment.returned = max(segment.base, segment.sound_start - self._head(self._due))
        segment.forget(segment.start)
        wanted = self._due if self._due is not None else self._pause if self.timestamps else 0
        pause = max(0, wanted - self._silence_kept - (segment.sound_start - segment.start))
        self._due = None
        segment.position = self._length + pause
        return np.zeros(pause, np.float32)

    def _take_final(self, segment: _Segment, chunk: SegmentChunk) -> Samples:
        """Return what is final: all except silence that may be the end, and the samples that may have to be faded out."""
        fade, ended = len(self._fade_in), chunk.last
        gap = self._requested.get(chunk.segment + 1)
        tail = self._kept(_TAIL_SECONDS, _LEAST_TAIL_SECONDS, None if gap is None else round(gap * self._rate))
        end = min(segment.sound_end + tail, segment.received)
        until = end if ended else max(segment.returned, end - fade)
        ready = segment.pending[segment.returned - segment.base : until - segment.base].copy()
        offset = segment.returned - segment.start
        if offset < fade:
            ready[: fade - offset] *= self._fade_in[offset : offset + len(ready)]
        if ended:
            # `fade` samples were held back, or fewer if the segment is shorter.
            length = min(fade, len(ready))
            if length:
                ready[-length:] *= self._fade_in[:length][::-1]
            self._silence_kept = end - segment.sound_end
        segment.returned = until
        segment.forget(until)
        return ready

    def _finish(self, chunk: SegmentChunk, segment: _Segment) -> None:
        if segment.begun:
            start, end = segment.position / self._rate, self._length / self._rate
            offset = (segment.position - segment.start) / self._rate
            sound = (offset + segment.sound_start / self._rate, end - self._silence_kept / self._rate)
            self.timestamps.append(SegmentTimestamp(chunk.segment, start, end, _moved(chunk.words, offset, *sound)))
        self._segment = _Segment()


def _moved(words: Sequence[SpokenWord], offset: float, first: float, last: float) -> tuple[SpokenWord, ...]:
    """Return `words` later by `offset` seconds, each starting at or after the end of the one before.

    The first one starts at `first` and the last one ends at `last`, where the sound does. Measured on the built-in voice: its network places
    the first and last phoneme of a sentence 50 to 100 ms later than they sound, those between them within 10 ms (median).
    """
    moved: list[SpokenWord] = []
    for number, word in enumerate(words):
        start = min(max(word.start + offset, moved[-1].end), last) if moved else first
        end = last if number == len(words) - 1 else min(max(word.end + offset, start), last)
        moved.append(SpokenWord(word.start_char, word.end_char, start, end))
    return tuple(moved)


class _Segment:
    """The segment that is being received. All offsets count samples from its first sample."""

    def __init__(self) -> None:
        self.pending: NDArray[np.float32] = np.zeros(0, np.float32)  # received and not yet returned; starts at offset `base`
        self.base = 0
        self.index = 0  # in the text
        self.measured = 0
        self.peak = np.float32(0)
        self.sound_start = 0
        self.sound_end = 0  # 0 until there is sound
        self.begun = False  # whether some of it was returned
        self.start = 0  # the first sample after the trimmed silence
        self.returned = 0
        self.position = 0  # where `start` is in the joined audio

    @property
    def received(self) -> int:
        return self.base + len(self.pending)

    def append(self, samples: Samples) -> None:
        self.pending = np.concatenate([self.pending, samples])

    def forget(self, until: int) -> None:
        """Drop the samples before offset `until`."""
        if until > self.base:
            self.pending = self.pending[until - self.base :]
            self.base = until


def _raised_cosine(length: int) -> NDArray[np.float32]:
    """Return a rise from 0 towards 1: sin² over a quarter period, shape (length,)."""
    return (np.sin(np.linspace(0, np.pi / 2, length, endpoint=False)) ** 2).astype(np.float32)
