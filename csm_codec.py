"""Codec frames to samples: one group at a time, from a clean codec, in blocks."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx_audio.tts.models.sesame import sesame
from numpy.typing import NDArray

import cpu_convolution
from speech_model import Samples

# Memory for a block's intermediate results grows by 10 MB a frame (measured: 64 frames, 0.65 GB).
_LONGEST_BLOCK = 32


def block_length(decoded: int) -> int:
    """How many frames the next block has when `decoded` are decoded already.

    Small at first, so that sound starts early, and then growing so slowly that a listener does not run dry while the next block is
    generated at 0.75 times real time (stock mlx-audio's pace on an M-series Mac): a block may be as long as a third of all before it
    plus the first one. Groups to which nobody listens are cut in the same way, so that their samples are the same.
    """
    return min(2 + decoded // 4, _LONGEST_BLOCK)


class CodecDecoder:
    """Mimi's streaming decoder, which mlx-audio never resets when it does not stream: begin each group with `begin`.

    Args:
        model: mlx_audio.tts.models.sesame.Model.
    """

    def __init__(self, model: sesame.Model) -> None:
        self._model = model
        self._mimi = model._audio_tokenizer
        cpu_convolution.speed_up(self._mimi)
        self._highest_token = self._mimi.cfg.quantizer_bins - 1
        self._decoded = 0
        self._waiting: list[NDArray[np.int32]] = []

    def begin(self) -> None:
        """Forget everything: the codec's state is that of a fresh one."""
        self._model._streaming_decoder.reset()
        self._decoded = 0
        self._waiting = []

    def push(self, frame: NDArray[np.int32]) -> Samples:
        """Take a frame, shape (codebooks,); the samples of a block, shape (1920 x frames,), once there are enough for one, else none."""
        self._waiting.append(frame)
        return self._decode() if len(self._waiting) >= block_length(self._decoded) else np.empty(0, np.float32)

    def finish(self) -> Samples:
        """The samples of the frames that still wait, and a clean codec."""
        rest = self._decode() if self._waiting else np.empty(0, np.float32)
        self.begin()
        return rest

    def watermarked(self, samples: Samples) -> Samples:
        """`samples` with mlx-audio's watermark where silentcipher, which it needs, is installed; else as they are."""
        if self._model._watermarker is None or self._model._watermark_key is None or not len(samples):
            return samples
        marked = sesame.watermark(self._model._watermarker, mx.array(samples), self._model.sample_rate, self._model._watermark_key)
        return np.asarray(np.array(marked), dtype=np.float32)

    def _decode(self) -> Samples:
        # The model has three tokens more than the codec has sounds; MLX would read past the codec's table.
        tokens = np.minimum(np.stack(self._waiting, axis=1), self._highest_token)
        self._decoded += len(self._waiting)
        self._waiting = []
        audio = self._mimi.decode_step(mx.array(tokens)[None])
        return np.asarray(np.array(audio.astype(mx.float32)), dtype=np.float32).reshape(-1)
