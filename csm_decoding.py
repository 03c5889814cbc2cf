"""CSM frames: a batch of rows, the sampler, and the codec that turns frames into samples."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_audio.lm.models.base import create_causal_mask
from mlx_audio.lm.models.cache import KVCache, make_prompt_cache
from mlx_audio.lm.sample_utils import apply_top_k
from mlx_audio.tts.models.sesame import sesame
from mlx_audio.tts.models.sesame.sesame import SesameModel
from numpy.typing import NDArray

import cpu_convolution
from audio_formats import Samples
from errors import InsufficientMemoryError

_UINT64 = 2**64


def attempt_seed(seed: int, segment: int, attempt: int) -> int:
    """The seed of one attempt at one segment: the utterance's own for the first, far from it and from each other for all others."""
    if segment == attempt == 0:
        return seed % _UINT64
    return int.from_bytes(hashlib.sha256(f"{seed}/{segment}/{attempt}".encode()).digest()[:8], "big")


class RowSampler:
    """mlx-audio's sampler (top-k, then temperature) for a batch, without MLX's one global random stream.

    A row draws what it would draw alone after `mx.random.seed(its seed)`: MLX splits its global key in two at each draw, keeps the first
    half and draws with the second (measured on 0.32.4), and so does each row here. So a row does not depend on what else is in the
    batch, on the thread, or on anybody else who draws.

    Args:
        seeds: One a row.
        temperature: 0 takes the likeliest token.
        top_k: Only so many of the likeliest tokens can be drawn; 0, or the vocabulary's size and more, lets all.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_k: int) -> None:
        self._keys = mx.stack([mx.random.key(seed) for seed in seeds])
        self._temperature = temperature
        self._top_k = top_k
        self._split = mx.vmap(mx.random.split)
        self._uniform = mx.vmap(lambda key: mx.random.uniform(shape=(1,), key=key))

    def __call__(self, logits: mx.array) -> mx.array:
        """One token a row, shape (rows,), from `logits`, shape (rows, vocabulary)."""
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
        """Only these rows go on."""
        self._keys = self._keys[mx.array(list(rows))]

    def _draw(self, logits: mx.array, keys: mx.array) -> mx.array:
        """`mx.random.categorical` with a key a row, which it does not take: the same inversion of the same cumulated probabilities.

        Measured: the same token in 18,000 of 18,000 draws (float32, float16 and bfloat16, with top-k and without).
        """
        logits = logits.astype(mx.float32)
        cumulated = mx.cumsum(mx.exp(logits - logits.max(axis=-1, keepdims=True)), axis=-1)
        below = cumulated <= self._uniform(keys) * cumulated[:, -1:]
        return mx.minimum(below.sum(axis=-1), logits.shape[-1] - 1)


# Memory for a block's intermediate results grows by 10 MB a frame (measured: 64 frames, 0.65 GB).
_LONGEST_BLOCK = 32


def block_length(decoded: int) -> int:
    """How many frames the next block has when `decoded` are decoded already.

    Small at first, so that sound starts early, and then growing so slowly that a listener does not run dry while the next block is
    generated at 0.75 times real time (stock mlx-audio's pace on an M-series Mac): a block may be as long as a third of all before it
    plus the first one. Segments to which nobody listens are cut in the same way, so that their samples are the same.
    """
    return min(2 + decoded // 4, _LONGEST_BLOCK)


class CodecDecoder:
    """Mimi's streaming decoder, which mlx-audio never resets when it does not stream: begin each segment with `begin`.

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


CONTEXT = 2048  # positions in CSM's rotary table; one more is an assertion error in mlx-audio
# The most positions that a batch may hold in its caches, padding included: 512 MiB for CSM-1B in bfloat16 (docs/CSM.md has the formula).
BATCH_POSITIONS = 8 * CONTEXT
# The prompts of a batch are read in pieces of so many positions, because mlx-audio's embedding makes 33 vectors of each (135 KB in bfloat16).
_PREFILL_POSITIONS = 1024

_OUT_OF_MEMORY = re.compile(r"unable to allocate|attempting to allocate|insufficient memory|out of memory|OutOfMemory", re.IGNORECASE)

PromptTokens = tuple[mx.array, mx.array]
"""A prompt as the model reads it: int32 tokens and their bool mask, both of shape (positions, codebooks + 1)."""


class _LeftPaddedCache(KVCache):  # type: ignore[misc]  # mlx-audio has no types
    """A KV cache for rows that begin at different positions.

    mlx-audio's BatchKVCache keeps an offset for each row, which CSM's attention (an int, for its rotary table) does not take. One common
    offset is right as well: rotary embedding knows only distances.
    """

    def __init__(self, left_padding: mx.array) -> None:
        super().__init__()
        self.keys: mx.array
        self.values: mx.array
        self.left_padding = left_padding

    def make_mask(self, length: int, **_: object) -> mx.array:
        """Causal and without the padding, shape (rows, 1, length, offset + length). A padded position sees itself: no row of it is empty."""
        mask = create_causal_mask(length, offset=self.offset, left_padding=self.left_padding)
        own = mx.arange(self.offset, self.offset + length)[:, None] == mx.arange(self.offset + length)[None]
        hidden: mx.array = mask | own
        return hidden

    def keep(self, rows: mx.array) -> None:
        """Drop all rows but these. The padding stays where it is: keys are rotated for their positions already."""
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.left_padding = self.left_padding[rows]


class FrameBatch:
    """Rows that are generated side by side. The model serves one batch at a time: its caches are attributes of the model.

    While the caller looks at a frame, the next one is computed already: building its graph costs Python as much time as computing it
    costs a GPU. Where the caller knows that no further frame is wanted, it says so.

    Args:
        model: mlx_audio.tts.models.sesame.SesameModel.
        prompts: One a row. Together with the frames to come they must stay under `CONTEXT` positions.
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
        """The next frame of each row, shape (rows, codebooks).

        Args:
            more: Another step follows, if no row ends.
        """
        frame = self._compute() if self._ahead is None else self._ahead
        self._ahead = None
        if more:
            self._append(frame)
            self._ahead = self._compute()
            mx.async_eval(self._ahead)  # type: ignore[no-untyped-call]
        return np.asarray(np.array(frame), dtype=np.int32)

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on, in this order."""
        indices = mx.array(list(rows))
        self._sampler.keep(rows)
        if self._ahead is not None:
            self._ahead = self._ahead[indices]
        for cache in self._caches:
            cache.keep(indices)

    def _new_caches(self, padding: Sequence[int]) -> list[Any]:
        """A row alone gets mlx-audio's own caches: its computation is then the stock one's, bit for bit."""
        if len(padding) == 1:
            return list(make_prompt_cache(self._model.backbone))
        return [_LeftPaddedCache(mx.array(list(padding))) for _ in self._model.backbone.layers]

    def _compute(self) -> mx.array:
        """The next frame's graph, not computed yet, from the positions that the model has not seen."""
        if len(self._tokens) > 1:
            self._read_all_but_last_piece()
        positions = mx.arange(self._tokens.shape[1], dtype=mx.int32)[None]
        frame: mx.array = self._model.generate_frame(self._tokens, self._mask, positions, self._sampler)
        return frame

    def _append(self, frame: mx.array) -> None:
        """A frame becomes the next position: its codebooks, and no text."""
        text = mx.zeros((len(frame), 1), mx.int32)
        self._tokens = mx.concat([frame.astype(mx.int32), text], axis=1)[:, None]
        self._mask = mx.concat([mx.ones(frame.shape, mx.bool_), text.astype(mx.bool_)], axis=1)[:, None]

    def _read_all_but_last_piece(self) -> None:
        """Bound the memory of a long prompt's embedding: its beginning goes through the backbone piece by piece."""
        piece = max(1, _PREFILL_POSITIONS // len(self._tokens))
        while self._tokens.shape[1] > piece:
            # mlx-audio embeds inside generate_frame only, so the two lines before its backbone call are said here again.
            embedded = self._model._embed_tokens(self._tokens[:, :piece]) * self._mask[:, :piece, :, None]
            self._model.backbone(mx.sum(embedded, axis=2), cache=self._caches)
            mx.eval([cache.state for cache in self._caches])
            self._tokens, self._mask = self._tokens[:, piece:], self._mask[:, piece:]


def _left_padded(prompts: Sequence[PromptTokens]) -> tuple[mx.array, mx.array, list[int]]:
    """Prompts with empty positions before the shorter ones: tokens and mask of shape (rows, positions, codebooks + 1), and the padding."""
    longest = max(len(tokens) for tokens, _ in prompts)
    padding = [longest - len(tokens) for tokens, _ in prompts]
    tokens = mx.stack([mx.pad(tokens, [(pad, 0), (0, 0)]) for (tokens, _), pad in zip(prompts, padding, strict=True)])
    mask = mx.stack([mx.pad(mask, [(pad, 0), (0, 0)]) for (_, mask), pad in zip(prompts, padding, strict=True)])
    return tokens, mask, padding


@contextmanager
def memory_errors() -> Iterator[None]:
    """MLX's ways to say that memory ran out, as ours.

    Raises:
        InsufficientMemoryError: In place of a RuntimeError whose text is that of MLX's CPU, Metal or CUDA allocator.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        mx.clear_cache()
        raise InsufficientMemoryError(
            "The machine ran out of memory for this text. Try a shorter one, or ask the server's owner to lower MAX_BATCH."
        ) from error
