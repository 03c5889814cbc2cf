"""Generates CSM frames in batches and decodes them to samples: batch, codec."""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_audio.codec.models.mimi.mimi import Mimi
from mlx_audio.codec.models.mimi.modules.conv import Conv1d, ConvTranspose1d, NormConv1d, NormConvTranspose1d
from mlx_audio.tts.models.sesame import sesame
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from audio_formats import Samples
from csm_layers import FrameNetwork, KvCache
from errors import InsufficientMemoryError

CONTEXT = 2048  # positions in CSM's rotary table; one more is an assertion error in mlx-audio
# The most positions that a batch may hold in its caches, padding included: 512 MiB for CSM-1B in bfloat16 (docs/CSM.md has the formula).
BATCH_POSITIONS = 8 * CONTEXT
PREFIX_POSITIONS = 2 * CONTEXT  # of voice prompts that are kept: 128 MiB for CSM-1B in 16 bits
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
    """How the rows of a batch draw: mlx-audio's sampler (top-k, then temperature) with a random stream for each row instead of MLX's global one.

    A row draws what it would draw alone after `mx.random.seed(its seed)`. So it does not depend on the rest of the batch, on the thread, or
    on other users of MLX's random numbers.

    Args:
        seeds: One a row.
        temperature: 0 takes the likeliest token.
        top_k: Draw from this many of the likeliest tokens; 0, or the size of the vocabulary and more, means all.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_k: int) -> None:
        self.keys = mx.stack([mx.random.key(seed) for seed in seeds])  # shape (rows, 2); each frame takes them a step further
        self.scale = mx.array(1 / temperature if temperature else 1.0)
        self.top_k = top_k if temperature else 1

    def keep(self, rows: mx.array) -> None:
        """Drop all rows but these."""
        self.keys = self.keys[rows]


class FrameBatch:
    """Generates several rows at once.

    While the caller handles a frame, the next one is already computed: to build its graph takes Python time, too. The caller says when it
    is not needed yet.

    Args:
        network: CSM's network.
        prompts: One a row. With the frames that follow, each must stay within `CONTEXT` positions.
        sampler: Draws the tokens.
        prefix: The beginning that all prompts have in common, already read.
    """

    def __init__(
        self, network: FrameNetwork, prompts: Sequence[PromptTokens], sampler: RowSampler, prefix: Sequence[mx.array] | None = None
    ) -> None:
        self._network = network
        self._sampler = sampler
        known = prefix[0].shape[3] if prefix else 0
        self._tokens, self._mask, padding = _left_padded([(tokens[known:], mask[known:]) for tokens, mask in prompts])
        self._caches = network.new_caches(padding, prefix)
        self._last: mx.array | None = None  # the last frame's embedding
        self._ahead: mx.array | None = None

    def step(self, *, more: bool) -> NDArray[np.int32]:
        """Return the next frame of each row, shape (rows, codebooks).

        Args:
            more: Whether to start to compute the next step already.
        """
        frame = self._launch() if self._ahead is None else self._ahead
        self._ahead = self._launch() if more else None
        return np.asarray(np.array(frame), dtype=np.int32)

    def read_prompts(self) -> mx.array:
        """Read the prompts, which the first step does; return the network's output at their end, shape (rows, hidden)."""
        return _read_prompts(self._network, self._tokens, self._mask, self._caches)

    def all_finite(self, frames: int) -> bool:
        """Generate so many frames; return whether all their logits are finite numbers."""
        logits: list[mx.array] = []
        finite = mx.array(True)
        for _ in range(frames):
            self._launch(logits)
            finite = finite & mx.isfinite(mx.stack(logits)).all()
            mx.async_eval(finite)  # type: ignore[no-untyped-call]
            logits.clear()
        return bool(finite.item())

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and put them in this order."""
        indices = mx.array(list(rows))
        self._sampler.keep(indices)
        self._last = None if self._last is None else self._last[indices]
        self._ahead = None if self._ahead is None else self._ahead[indices]
        for cache in self._caches:
            cache.keep(indices)

    def _launch(self, seen: list[mx.array] | None = None) -> mx.array:
        """Start to compute the next frame, without waiting for it; `seen`: as in `draw_frame`."""
        hidden = self.read_prompts() if self._last is None else self._network.read(self._last, self._caches)
        sampler = self._sampler
        frame, self._last, sampler.keys = self._network.draw_frame(hidden, sampler.keys, sampler.scale, sampler.top_k, seen)
        mx.async_eval(frame, self._last, sampler.keys)  # type: ignore[no-untyped-call]
        return frame


class PrefixCache:
    """Keeps the keys and values of prompts that consist of segments: voice prompts (`voice_match: false`), and conversations after them.

    Each segment is read once: a conversation's next turn is appended to what was read before. The least recently used ones are dropped so that all together have at most `PREFIX_POSITIONS` positions.
    """

    def __init__(self, network: FrameNetwork) -> None:
        self._network = network
        self._states: OrderedDict[bytes, list[mx.array]] = OrderedDict()

    def get(self, *segments: PromptTokens) -> list[mx.array]:
        """Return the state of each layer's cache after the segments, shape (1, heads, 2, positions, head size)."""
        keys = _keys(segments)
        known = next((count for count in range(len(keys), 0, -1) if keys[count - 1] in self._states), 0)
        before = self._states[keys[known - 1]] if known else None
        key = keys[-1]
        if known < len(keys):
            self._states[key] = self._read(segments[known:], before)
            if known > 1:  # an earlier state of the same conversation; the voice's prompt alone is kept
                del self._states[keys[known - 1]]
        self._states.move_to_end(keys[0] if keys[0] in self._states else key)
        self._states.move_to_end(key)
        while len(self._states) > 1 and sum(state[0].shape[3] for state in self._states.values()) > PREFIX_POSITIONS:
            self._states.popitem(last=False)
        return self._states[key]

    def _read(self, segments: Sequence[PromptTokens], before: Sequence[mx.array] | None) -> list[mx.array]:
        caches = self._network.new_caches([0], before)
        tokens, mask = (mx.concat(list(parts), axis=0)[None] for parts in zip(*segments, strict=True))
        _read_prompts(self._network, tokens, mask, caches)
        states = [mx.contiguous(cache.state) for cache in caches]  # without the positions that a cache has in reserve
        mx.eval(states)
        return states


def _keys(segments: Sequence[PromptTokens]) -> list[bytes]:
    """Return a digest for each beginning of the segments."""
    digest = hashlib.sha256()
    keys = []
    for tokens, _ in segments:
        digest.update(np.array(tokens).tobytes())
        digest.update(b"|")
        keys.append(digest.digest())
    return keys


def _read_prompts(network: FrameNetwork, tokens: mx.array, mask: mx.array, caches: Sequence[KvCache]) -> mx.array:
    """Read the prompts piece by piece, to limit the memory of their embedding; return the network's output at their end."""
    piece = max(1, _PREFILL_POSITIONS // len(tokens))
    for begin in range(0, tokens.shape[1], piece):
        part = slice(begin, begin + piece)
        hidden = network.read(network.embed(tokens[:, part], mask[:, part]), caches)
        mx.eval([cache.state for cache in caches])
    return hidden


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

    @property
    def at_block_end(self) -> bool:
        """Return whether the next frame completes a block."""
        return len(self._waiting) + 1 >= block_length(self._decoded)

    def push(self, frame: NDArray[np.int32]) -> Samples:
        """Add a frame, shape (codebooks,). Return a block's samples, shape (1920 x frames,), when it is complete, else none."""
        complete = self.at_block_end
        self._waiting.append(frame)
        return self._decode() if complete else np.empty(0, np.float32)

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
