"""Generates CSM frames in batches and decodes them to samples: sampler, batch, codec."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_audio.codec.models.mimi.mimi import Mimi
from mlx_audio.codec.models.mimi.modules.conv import Conv1d, ConvTranspose1d, NormConv1d, NormConvTranspose1d
from mlx_audio.lm.models.base import create_causal_mask
from mlx_audio.lm.models.cache import KVCache, make_prompt_cache
from mlx_audio.lm.sample_utils import apply_top_k
from mlx_audio.tts.models.sesame import sesame
from mlx_audio.tts.models.sesame.sesame import SesameModel
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from audio_formats import Samples
from errors import InsufficientMemoryError

CONTEXT = 2048  # positions in CSM's rotary table; one more is an assertion error in mlx-audio
# The most positions that a batch may hold in its caches, padding included: 512 MiB for CSM-1B in bfloat16 (docs/CSM.md has the formula).
BATCH_POSITIONS = 8 * CONTEXT
# A batch's prompts are read in pieces of this many positions, because mlx-audio's embedding makes 33 vectors of each (135 KB in bfloat16).
_PREFILL_POSITIONS = 1024
# The memory for decoding a block grows by 10 MB a frame (measured: 64 frames, 0.65 GB).
_LONGEST_BLOCK = 32
_UINT64 = 2**64
_OUT_OF_MEMORY = re.compile(r"unable to allocate|attempting to allocate|insufficient memory|out of memory|OutOfMemory", re.IGNORECASE)

PromptTokens = tuple[mx.array, mx.array]
"""A prompt as the model reads it: int32 tokens and their bool mask, both of shape (positions, codebooks + 1)."""


def attempt_seed(seed: int, segment: int, attempt: int) -> int:
    """Return the seed of one attempt at one segment: the request's own for the first, one derived by a hash for all others."""
    if segment == attempt == 0:
        return seed % _UINT64
    return int.from_bytes(hashlib.sha256(f"{seed}/{segment}/{attempt}".encode()).digest()[:8], "big")


class RowSampler:
    """mlx-audio's sampler (top-k, then temperature) for a batch, with a random stream for each row instead of MLX's global one.

    A row draws what it would draw alone after `mx.random.seed(its seed)`: MLX splits its global key in two at each draw, keeps the first
    half and draws with the second (measured on 0.32.4), and so does each row here. So a row does not depend on the rest of the batch, on
    the thread, or on other users of MLX's random numbers.

    Args:
        seeds: One a row.
        temperature: 0 takes the likeliest token.
        top_k: Draw from this many of the likeliest tokens; 0, or the size of the vocabulary and more, means all.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_k: int) -> None:
        self._keys = mx.stack([mx.random.key(seed) for seed in seeds])
        self._temperature = temperature
        self._top_k = top_k
        self._split = mx.vmap(mx.random.split)
        self._uniform = mx.vmap(lambda key: mx.random.uniform(shape=(1,), key=key))

    def __call__(self, logits: mx.array) -> mx.array:
        """Return one token a row, shape (rows,), from `logits`, shape (rows, vocabulary)."""
        if self._temperature == 0:
            return mx.argmax(logits, axis=-1)
        halves = self._split(self._keys)
        self._keys = halves[:, 0]
        if 0 < self._top_k < logits.shape[-1]:
            logits = apply_top_k(logits, self._top_k)
        scaled = logits * (1 / self._temperature)
        if len(halves) == 1:
            return mx.random.categorical(scaled, key=halves[0, 1])
        return self._draw(scaled, halves[:, 1])

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self._keys = self._keys[mx.array(list(rows))]

    def _draw(self, logits: mx.array, keys: mx.array) -> mx.array:
        """Do as `mx.random.categorical`, but with one key a row: the same inversion of the same cumulated probabilities.

        Measured: it draws the same token in 18,000 of 18,000 draws (float32, float16 and bfloat16, with top-k and without).
        """
        logits = logits.astype(mx.float32)
        cumulated = mx.cumsum(mx.exp(logits - logits.max(axis=-1, keepdims=True)), axis=-1)
        below = cumulated <= self._uniform(keys) * cumulated[:, -1:]
        return mx.minimum(below.sum(axis=-1), logits.shape[-1] - 1)


class _LeftPaddedCache(KVCache):  # type: ignore[misc]  # mlx-audio has no types
    """A KV cache for rows that begin at different positions.

    mlx-audio's BatchKVCache keeps one offset a row, but CSM's attention needs an int for its rotary table. One common offset is correct:
    rotary embedding depends on distances only.
    """

    def __init__(self, left_padding: mx.array) -> None:
        super().__init__()
        self.keys: mx.array
        self.values: mx.array
        self.left_padding = left_padding

    def make_mask(self, length: int, **_: object) -> mx.array:
        """Return a causal mask that hides the padding, shape (rows, 1, length, offset + length). A padded position sees itself, so no line is empty."""
        mask = create_causal_mask(length, offset=self.offset, left_padding=self.left_padding)
        own = mx.arange(self.offset, self.offset + length)[:, None] == mx.arange(self.offset + length)[None]
        hidden: mx.array = mask | own
        return hidden

    def keep(self, rows: mx.array) -> None:
        """Drop all rows but these. The padding stays: the keys are rotated for their positions already."""
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.left_padding = self.left_padding[rows]


class FrameBatch:
    """Generates several rows at once. The model serves one batch at a time: its caches are attributes of the model.

    While the caller handles a frame, the next one is already computed: to build its graph takes Python as long as to compute it takes
    a GPU. The caller says when no further frame is needed.

    Args:
        model: CSM's network.
        prompts: One a row. With the frames that follow, each must stay within `CONTEXT` positions.
        sampler: Draws the tokens.
    """

    def __init__(self, model: SesameModel, prompts: Sequence[PromptTokens], sampler: RowSampler) -> None:
        self._model = model
        self._sampler = sampler
        self._tokens, self._mask, padding = _left_padded(prompts)
        self._caches = self._new_caches(padding)
        self._model.backbone_cache = self._caches
        self._ahead: mx.array | None = None

    def step(self, *, more: bool) -> NDArray[np.int32]:
        """Return the next frame of each row, shape (rows, codebooks).

        Args:
            more: Whether another step follows if no row ends.
        """
        frame = self._compute() if self._ahead is None else self._ahead
        self._ahead = None
        if more:
            self._append(frame)
            self._ahead = self._compute()
            mx.async_eval(self._ahead)  # type: ignore[no-untyped-call]
        return np.asarray(np.array(frame), dtype=np.int32)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and put them in this order."""
        indices = mx.array(list(rows))
        self._sampler.keep(rows)
        if self._ahead is not None:
            self._ahead = self._ahead[indices]
        for cache in self._caches:
            cache.keep(indices)

    def _new_caches(self, padding: Sequence[int]) -> list[Any]:
        """Return the caches; a single row gets mlx-audio's own, so that it is computed exactly as in stock mlx-audio."""
        if len(padding) == 1:
            return list(make_prompt_cache(self._model.backbone))
        return [_LeftPaddedCache(mx.array(list(padding))) for _ in self._model.backbone.layers]

    def _compute(self) -> mx.array:
        """Return the next frame as a graph, not yet computed, from the positions that the model has not read."""
        if len(self._tokens) > 1:
            self._read_all_but_last_piece()
        positions = mx.arange(self._tokens.shape[1], dtype=mx.int32)[None]
        frame: mx.array = self._model.generate_frame(self._tokens, self._mask, positions, self._sampler)
        return frame

    def _append(self, frame: mx.array) -> None:
        """Make the frame the next position: its codebooks, and no text."""
        text = mx.zeros((len(frame), 1), mx.int32)
        self._tokens = mx.concat([frame.astype(mx.int32), text], axis=1)[:, None]
        self._mask = mx.concat([mx.ones(frame.shape, mx.bool_), text.astype(mx.bool_)], axis=1)[:, None]

    def _read_all_but_last_piece(self) -> None:
        """Read the beginning of a long prompt piece by piece, to limit the memory of its embedding."""
        piece = max(1, _PREFILL_POSITIONS // len(self._tokens))
        while self._tokens.shape[1] > piece:
            # Repeats two lines of mlx-audio's generate_frame, the only place where it embeds.
            embedded = self._model._embed_tokens(self._tokens[:, :piece]) * self._mask[:, :piece, :, None]
            self._model.backbone(mx.sum(embedded, axis=2), cache=self._caches)
            mx.eval([cache.state for cache in self._caches])
            self._tokens, self._mask = self._tokens[:, piece:], self._mask[:, piece:]


def _left_padded(prompts: Sequence[PromptTokens]) -> tuple[mx.array, mx.array, list[int]]:
    """Pad the shorter prompts at the left; return tokens and mask, shape (rows, positions, codebooks + 1), and the padding of each row."""
    longest = max(len(tokens) for tokens, _ in prompts)
    padding = [longest - len(tokens) for tokens, _ in prompts]
    tokens = mx.stack([mx.pad(tokens, [(pad, 0), (0, 0)]) for (tokens, _), pad in zip(prompts, padding, strict=True)])
    mask = mx.stack([mx.pad(mask, [(pad, 0), (0, 0)]) for (_, mask), pad in zip(prompts, padding, strict=True)])
    return tokens, mask, padding


def block_length(decoded: int) -> int:
    """Return how many frames the next block has after `decoded` frames.

    The first blocks are short, so that playback starts early. They grow slowly enough that playback does not stall while the next one is
    generated at 0.75 times real time (stock mlx-audio's speed on an M-series Mac): a block may have a third of all frames before it, plus
    the first block's. Segments that are not streamed use the same blocks, so that their samples are the same.
    """
    return min(2 + decoded // 4, _LONGEST_BLOCK)


class CodecDecoder:
    """Decodes frames with Mimi's streaming decoder. mlx-audio resets it only when it streams: call `begin` before each segment."""

    def __init__(self, model: sesame.Model) -> None:
        self._model = model
        self._mimi = model._audio_tokenizer
        use_numpy_convolutions(self._mimi)
        self._highest_token = self._mimi.cfg.quantizer_bins - 1
        self._decoded = 0
        self._waiting: list[NDArray[np.int32]] = []

    def begin(self) -> None:
        """Reset the codec and drop the waiting frames."""
        self._model._streaming_decoder.reset()
        self._decoded = 0
        self._waiting = []

    def push(self, frame: NDArray[np.int32]) -> Samples:
        """Add a frame, shape (codebooks,). Return a block's samples, shape (1920 x frames,), when it is complete, else none."""
        self._waiting.append(frame)
        return self._decode() if len(self._waiting) >= block_length(self._decoded) else np.empty(0, np.float32)

    def finish(self) -> Samples:
        """Return the samples of the waiting frames, and reset the codec."""
        rest = self._decode() if self._waiting else np.empty(0, np.float32)
        self.begin()
        return rest

    def watermarked(self, samples: Samples) -> Samples:
        """Return `samples` with mlx-audio's watermark if silentcipher, which it needs, is installed; else unchanged."""
        if self._model._watermarker is None or self._model._watermark_key is None or not len(samples):
            return samples
        marked = sesame.watermark(self._model._watermarker, mx.array(samples), self._model.sample_rate, self._model._watermark_key)
        return np.asarray(np.array(marked), dtype=np.float32)

    def _decode(self) -> Samples:
        # The model has three more tokens than the codec's table, and MLX does not check the bounds.
        tokens = np.minimum(np.stack(self._waiting, axis=1), self._highest_token)
        self._decoded += len(self._waiting)
        self._waiting = []
        audio = self._mimi.decode_step(mx.array(tokens)[None])
        return np.asarray(np.array(audio.astype(mx.float32)), dtype=np.float32).reshape(-1)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise InsufficientMemoryError in place of the errors of MLX's CPU, Metal and CUDA allocators."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        mx.clear_cache()
        raise InsufficientMemoryError(
            "The machine ran out of memory for this text. Try a shorter one, or ask the server's owner to lower MAX_BATCH."
        ) from error


def use_numpy_convolutions(mimi: Mimi) -> None:
    """Replace the decoder's convolutions by numpy's where MLX computes on a CPU; elsewhere do nothing.

    numpy has a fast BLAS. MLX 0.32.4 for Linux is linked with netlib's reference BLAS, and computes a transposed convolution as a plain one
    over an input filled with zeros: one 80 ms frame takes about a second (docs/PERFORMANCE.md). The results are the same within float
    error. The encoder stays: its tokens must be exactly those of stock mlx-audio, and each voice prompt is encoded once.
    """
    if mx.default_device() != mx.Device(mx.cpu):
        return
    for module in mimi.decoder.modules():
        if isinstance(module, NormConv1d) and _replaceable(module.conv, Conv1d):
            module.conv = _NumpyConv1d(module.conv)
        elif isinstance(module, NormConvTranspose1d) and _replaceable(module.convtr, ConvTranspose1d):
            module.convtr = _NumpyConvTranspose1d(module.convtr)


def _replaceable(module: object, kind: type[Conv1d] | type[ConvTranspose1d]) -> bool:
    return isinstance(module, kind) and module.weight.dtype == mx.float32


class _NumpyConvolution(nn.Module):  # type: ignore[misc, name-defined]  # mlx has no types for nn.Module
    """The weights and settings of one of mlx-audio's convolutions, which has neither groups nor padding in Mimi's decoder."""

    def __init__(self, original: Conv1d | ConvTranspose1d) -> None:
        super().__init__()
        self.weight = original.weight
        self.bias = original.bias
        self._stride = original._stride
        self._dilation = getattr(original, "_dilation", 1)

    def _with_bias(self, sums: NDArray[np.float32]) -> mx.array:
        return mx.array(sums if self.bias is None else sums + np.asarray(self.bias)[:, None])


class _NumpyConv1d(_NumpyConvolution):
    def __call__(self, xs: mx.array) -> mx.array:
        """Map shape (batch, channels, samples) to (batch, channels out, samples out)."""
        weight = np.asarray(self.weight)
        channels_out, kernel, channels = weight.shape
        span = self._dilation * (kernel - 1) + 1
        windows = sliding_window_view(np.asarray(xs), span, axis=2)[:, :, :: self._stride, :: self._dilation]
        batch, _, length, _ = windows.shape
        columns = windows.transpose(0, 3, 1, 2).reshape(batch, kernel * channels, length)
        return self._with_bias(weight.reshape(channels_out, -1) @ columns)


class _NumpyConvTranspose1d(_NumpyConvolution):
    def __call__(self, xs: mx.array) -> mx.array:
        """Map shape (batch, channels, samples) to (batch, channels out, samples out)."""
        weight = np.asarray(self.weight)
        channels_out, kernel, channels = weight.shape
        batch, _, length = xs.shape
        added = (weight.reshape(-1, channels) @ np.asarray(xs)).reshape(batch, channels_out, kernel, length)
        reach = (length - 1) * self._stride + 1
        sums = np.zeros((batch, channels_out, reach + kernel - 1), np.float32)
        for tap in range(kernel):
            sums[:, :, tap : tap + reach : self._stride] += added[:, :, tap]
        return self._with_bias(sums)
