"""Makes CSM's frames with few kernels: equivalents of mlx-audio's layers that take the same weights, and a frame's tokens in one call.

A frame of one row takes a GPU longer to start than to compute: 140 layer calls of small kernels each. docs/CSM.md has the counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_audio.lm.models.activations import swiglu
from mlx_audio.lm.models.base import create_causal_mask
from mlx_audio.lm.models.llama import MLP, LlamaModel
from mlx_audio.tts.models.sesame.attention import Attention, Llama3ScaledRoPE
from mlx_audio.tts.models.sesame.sesame import SesameModel

_COMPILED_SAMPLERS = 8  # compiled frames that are kept, one for each top-k
_GROWTH = 256  # positions by which a backbone's cache grows, as in mlx-audio

Draw = tuple[mx.array, mx.array, mx.array]
"""A frame's tokens, shape (rows, codebooks); their embedding, shape (rows, hidden); the rows' next random keys, shape (rows, 2)."""


class KvCache:
    """One layer's keys and values for rows that begin at different positions.

    One common offset is correct: rotary embedding depends on distances only. A head's values follow its keys in one array, so that a step
    is one update, and keys and values are one slice each that Metal's attention reads without a copy.

    Args:
        padding: Positions that each row ignores after `prefix`, shape (rows,); None for no padding.
        growth: Positions by which it grows.
        prefix: What it holds already: the `state` of another one.
    """

    def __init__(self, padding: mx.array | None = None, growth: int = _GROWTH, prefix: mx.array | None = None) -> None:
        state = mx.zeros((0, 0, 2, 0, 0)) if prefix is None else prefix
        self.offset = self._first = self._room = state.shape[3]
        self._buffer = state.flatten(2, 3)
        self.padding = padding
        self._growth = growth

    @property
    def state(self) -> mx.array:
        """The positions that are in use, shape (rows, heads, 2, offset, head size): keys and values."""
        return mx.unflatten(self._buffer, 2, (2, self._room))[:, :, :, : self.offset]

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add positions, shape (rows, heads, positions, head size) each; return all keys and values."""
        begin, end = self._make_room(keys, keys.shape[2])
        self._buffer[:, :, begin:end] = keys
        self._buffer[:, :, self._room + begin : self._room + end] = values
        return self._in_use()

    def append_one(self, pairs: mx.array) -> tuple[mx.array, mx.array]:
        """Add one position: each head's key and value, shape (rows, heads, 2, head size); return all keys and values."""
        begin, _ = self._make_room(pairs, 1)
        self._buffer[:, :, begin :: self._room] = pairs
        return self._in_use()

    def make_mask(self, length: int, **_: object) -> mx.array | str | None:
        """Return what mlx-audio's attention takes as mask; a padded position sees itself, so that no line is empty."""
        if self.padding is None:
            return "causal" if length > 1 else None
        positions = mx.arange(self.offset + length)
        visible = positions >= self._first + self.padding[:, None, None, None]
        if self._first:
            visible = visible | (positions < self._first)
        if length == 1:
            return visible
        own = mx.arange(self.offset, self.offset + length)[:, None] == positions
        mask: mx.array = (visible & create_causal_mask(length, offset=self.offset)) | own
        return mask

    def keep(self, rows: mx.array) -> None:
        """Drop all rows but these. The padding stays: the keys are rotated for their positions already."""
        self._buffer = self._buffer[rows]
        if self.padding is not None:
            self.padding = self.padding[rows]

    def _make_room(self, like: mx.array, length: int) -> tuple[int, int]:
        """Make room for so many more positions; return where they begin and end."""
        begin, end = self.offset, self.offset + length
        if end > self._room:
            room = -(-end // self._growth) * self._growth
            rows, heads, _, size = like.shape
            empty = mx.zeros((rows, heads, 2, room - begin, size), like.dtype)
            self._buffer = (mx.concatenate([self.state, empty], axis=3) if begin else empty).flatten(2, 3)
            self._room = room
        self.offset = end
        return begin, end

    def _in_use(self) -> tuple[mx.array, mx.array]:
        return self._buffer[:, :, : self.offset], self._buffer[:, :, self._room : self._room + self.offset]


class JoinedAttention(nn.Module):  # type: ignore[misc, name-defined]  # mlx has no types for nn.Module
    """mlx-audio's attention with one product for queries, keys and values, and one rotary kernel.

    The product's result is all queries, then the key and the value of each head in turn, as `KvCache` keeps them.
    """

    def __init__(self, original: Attention) -> None:
        super().__init__()
        heads = [slice(start, start + original.head_dim) for start in range(0, original.n_kv_heads * original.head_dim, original.head_dim)]
        pairs = [(layer, head) for head in heads for layer in (1, 2)]
        self.qkv_proj = join([original.q_proj, original.k_proj, original.v_proj], [(0, slice(None)), *pairs])
        self.o_proj = original.o_proj
        self._qkv, self._output = product(self.qkv_proj), product(self.o_proj)
        self._heads, self._kv_heads = original.n_heads, original.n_kv_heads
        self._size, self._scale = original.head_dim, original.scale
        self._frequencies = _frequencies(original.rope)

    def __call__(self, x: mx.array, mask: mx.array | str | None, cache: KvCache) -> mx.array:
        """Map shape (rows, positions, hidden), or (rows, hidden) for one position, to the same; `cache` gets the positions."""
        queries, keys, values = (self._one if x.ndim == 2 else self._several)(self._qkv(x), cache)
        output = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self._scale, mask=mask)
        return self._output((output if x.ndim == 2 else output.swapaxes(1, 2)).reshape(*x.shape[:-1], -1))

    def _one(self, joined: mx.array, cache: KvCache) -> tuple[mx.array, mx.array, mx.array]:
        """Rotate all heads of one position in one kernel: the values' at position 0, which leaves them as they are."""
        rows, heads, size = len(joined), self._heads + 2 * self._kv_heads, self._size
        offsets = _offsets(rows, self._heads, self._kv_heads, cache.offset)
        rotated = self._rotate(joined.reshape(rows * heads, 1, 1, size), offsets).reshape(rows, heads, 1, size)
        queries, pairs = mx.split(rotated, [self._heads], axis=1)
        return queries, *cache.append_one(pairs.reshape(rows, self._kv_heads, 2, size))

    def _several(self, joined: mx.array, cache: KvCache) -> tuple[mx.array, mx.array, mx.array]:
        joined = joined.reshape(*joined.shape[:2], -1, self._size).swapaxes(1, 2)
        queries = self._rotate(joined[:, : self._heads], cache.offset)
        keys = self._rotate(joined[:, self._heads :: 2], cache.offset)
        return queries, *cache.append(keys, joined[:, self._heads + 1 :: 2])

    def shifted(self, state: mx.array, by: Sequence[int]) -> mx.array:
        """Return a row's keys and values for several rows, as if each row had read them so many positions later.

        Args:
            state: Of the row's cache.
            by: Positions, one a row.
        """
        keys, values = (mx.repeat(state[:, :, part], len(by), axis=0) for part in (0, 1))
        if any(by):
            keys = self._rotate(keys.reshape(len(by), -1, 1, self._size), mx.array(list(by))).reshape(keys.shape)
        return mx.stack([keys, values], axis=2)

    def _rotate(self, heads: mx.array, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(heads, self._size, traditional=True, base=None, scale=1.0, offset=offset, freqs=self._frequencies)


class JoinedMlp(nn.Module):  # type: ignore[misc, name-defined]
    """mlx-audio's MLP with one product for gate and up."""

    def __init__(self, original: MLP) -> None:
        super().__init__()
        self.gate_up_proj = join([original.gate_proj, original.up_proj])
        self.down_proj = original.down_proj
        self._gate_up, self._down = product(self.gate_up_proj), product(self.down_proj)

    def __call__(self, x: mx.array) -> mx.array:
        """Map shape (…, hidden) to the same."""
        gate, up = mx.split(self._gate_up(x), 2, axis=-1)
        return self._down(swiglu(gate, up))


def join(
    layers: Sequence[nn.Linear | nn.QuantizedLinear],  # type: ignore[name-defined]
    pieces: Sequence[tuple[int, slice]] | None = None,
) -> nn.Linear | nn.QuantizedLinear:  # type: ignore[name-defined]
    """Return one linear layer whose output is that of `layers`, one after the other. The layers must not be used any more.

    Args:
        layers: With equal inputs.
        pieces: What the output consists of instead: layers, by their index, and parts of their outputs.

    Raises:
        ValueError: The layers are quantized differently.
    """
    first = layers[0]
    if len({(type(layer), getattr(layer, "bits", 0), getattr(layer, "group_size", 0)) for layer in layers}) > 1:
        raise ValueError("layers that are quantized differently cannot be joined")
    pieces = [(index, slice(None)) for index in range(len(layers))] if pieces is None else pieces
    for name in first.parameters():
        first[name] = mx.concatenate([layers[index][name][part] for index, part in pieces], axis=0)
    mx.eval(first.parameters())
    return first


def product(layer: nn.Linear | nn.QuantizedLinear) -> Callable[[mx.array], mx.array]:  # type: ignore[name-defined]
    """Return what `layer` computes. A plain layer's weights are transposed once, as a view, not in each frame."""
    if hasattr(layer, "bits") or "bias" in layer:
        call: Callable[[mx.array], mx.array] = layer
        return call
    transposed: mx.array = layer.weight.T
    mx.eval(transposed)
    return lambda x: x @ transposed


class FrameNetwork(SesameModel):  # type: ignore[misc]  # mlx-audio has no types
    """mlx-audio's network, which makes frames with few kernels after `join_layers`.

    Args:
        config: As in `config.json`.
        compiled: Whether a frame's tokens are drawn by a compiled function. That pays on a GPU only: MLX compiles for CPUs with g++.
    """

    def __init__(self, config: dict[str, Any], *, compiled: bool = False) -> None:
        super().__init__(config)
        self._compiled = compiled
        self._heads: list[mx.array] = []
        self._draw_compiled = lru_cache(_COMPILED_SAMPLERS)(lambda top_k: mx.compile(partial(self._draw_frame, top_k)))

    def join_layers(self) -> None:
        """Replace the layers, one by one, so that no second copy of the weights is kept. Call it once, with the weights loaded."""
        for layer in (*self.backbone.layers, *self.decoder.layers):
            layer.self_attn = JoinedAttention(layer.self_attn)
            layer.mlp = JoinedMlp(layer.mlp)
            mx.clear_cache()
        # Views of the codebooks' heads. An index inside the frame would copy each head in each frame.
        self._heads = [head.squeeze(0) for head in mx.split(self.audio_head, len(self.audio_head))]
        mx.eval(self._heads)

    def new_caches(self, padding: Sequence[int], prefix: Sequence[mx.array] | None = None) -> list[KvCache]:
        """Return caches for the backbone.

        Args:
            padding: As in `KvCache`, one a row.
            prefix: What all rows begin with: the state of each cache of one row that has read it.
        """
        hidden = mx.array(list(padding)) if any(padding) else None
        if prefix is None:
            return [KvCache(hidden) for _ in self.backbone.layers]
        layers = zip(self.backbone.layers, prefix, strict=True)
        return [KvCache(hidden, prefix=layer.self_attn.shifted(state, padding)) for layer, state in layers]

    def embed(self, tokens: mx.array, mask: mx.array) -> mx.array:
        """Return the sum of each position's embeddings, shape (rows, positions, hidden), of prompt tokens (rows, positions, codebooks + 1)."""
        return mx.sum(self._embed_tokens(tokens) * mask[..., None], axis=2)

    def read(self, embedded: mx.array, caches: Sequence[KvCache]) -> mx.array:
        """Run the backbone on positions, (rows, positions, hidden), or on one, (rows, hidden); return its last output, (rows, hidden)."""
        return _last(_run(self.backbone, embedded, caches))

    def draw_frame(self, hidden: mx.array, keys: mx.array, scale: mx.array, top_k: int, seen: list[mx.array] | None = None) -> Draw:
        """Draw the 32 tokens of the next frame.

        Args:
            hidden: The backbone's output at the last position, shape (rows, hidden).
            keys: Random keys, shape (rows, 2).
            scale: 1 / temperature, a scalar; not used with a top-k of 1.
            top_k: Draw from this many of the likeliest tokens; 0 for all, 1 for the likeliest.
            seen: Gets the logits of each codebook, shape (rows, vocabulary). The frame is not compiled then.
        """
        if self._compiled and seen is None:
            draw: Callable[..., Draw] = self._draw_compiled(top_k)
            return draw(hidden, keys, scale)
        return self._draw_frame(top_k, hidden, keys, scale, seen)

    def _draw_frame(self, top_k: int, hidden: mx.array, keys: mx.array, scale: mx.array, seen: list[mx.array] | None = None) -> Draw:
        """Return the next frame, as mlx-audio's `generate_frame` after its backbone. The logits are added to `seen`."""
        count = self.args.audio_num_codebooks
        uniform, keys = (None, keys) if top_k == 1 else uniform_numbers(keys, count)
        caches = [KvCache(growth=count + 1) for _ in self.decoder.layers]
        # Computed in the graph: a constant would become part of a compiled kernel, one for each codebook.
        offsets = mx.arange(count, dtype=mx.int32) * self.args.audio_vocab_size
        first = mx.split(offsets, count)
        logits: mx.array = self.codebook0_head(hidden)
        tokens: list[mx.array] = []  # as rows of the table of embeddings, which has all codebooks one after the other
        for codebook in range(count):
            if codebook:
                embedded = self.audio_embeddings(tokens[-1])
                # The depth decoder's first input is two positions: the backbone's output, and the first token.
                read = embedded if codebook > 1 else mx.stack([hidden, embedded], axis=1)
                logits = _last(_run(self.decoder, self.projection(read), caches)) @ self._heads[codebook - 1]
            tokens.append(draw(logits, None if uniform is None else uniform[codebook], scale, top_k) + first[codebook])
            if seen is not None:
                seen.append(logits)
        frame = mx.concatenate(tokens).reshape(count, -1).T
        return frame - offsets, self.audio_embeddings(frame).sum(axis=1), keys


def draw(logits: mx.array, uniform: mx.array | None, scale: mx.array, top_k: int) -> mx.array:
    """Return one int32 token a row, shape (rows,), from `logits`, shape (rows, vocabulary): mlx-audio's top-k, then temperature.

    With uniform numbers it does what `mx.random.categorical` does, for a batch of rows with a key each: the same inversion of the same
    cumulated probabilities. Measured: the same token in 18,000 of 18,000 draws (float32, float16, bfloat16; with top-k and without).

    Args:
        logits: Not yet scaled.
        uniform: One number in [0, 1) a row, shape (rows, 1); None takes the likeliest token.
        scale: 1 / temperature, a scalar.
        top_k: As in `FrameNetwork.draw_frame`.
    """
    if uniform is None:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    highest = logits.max(axis=-1, keepdims=True)
    if 0 < top_k < logits.shape[-1]:
        unlikely = mx.argpartition(-logits, kth=top_k - 1, axis=-1)[..., top_k:]
        logits = mx.put_along_axis(logits, unlikely, mx.array(-float("inf"), logits.dtype), axis=-1)
    scale = scale.astype(logits.dtype)
    scaled, highest = (logits * scale).astype(mx.float32), (highest * scale).astype(mx.float32)
    cumulated = mx.cumsum(mx.exp(scaled - highest), axis=-1)
    below = (cumulated <= uniform * cumulated[:, -1:]).sum(axis=-1)
    return mx.minimum(below, logits.shape[-1] - 1).astype(mx.int32)


def _run(transformer: LlamaModel, x: mx.array, caches: Sequence[KvCache]) -> mx.array:
    """Run one of the library's two transformers; shapes as in `JoinedAttention`. Its own loop takes only three dimensions."""
    mask = caches[0].make_mask(1 if x.ndim == 2 else x.shape[1])
    for layer, cache in zip(transformer.layers, caches, strict=True):
        x = layer(x, mask, cache)
    result: mx.array = transformer.norm(x)
    return result


def _last(x: mx.array) -> mx.array:
    """Return the last position, shape (rows, hidden)."""
    return x if x.ndim == 2 else x[:, -1]


def uniform_numbers(keys: mx.array, count: int) -> tuple[list[mx.array], mx.array]:
    """Return `count` uniform numbers a row, `count` arrays of shape (rows, 1), and the next keys, shape (rows, 2).

    MLX splits its global key in two at each draw, keeps the first half and draws with the second (measured on 0.32.4); so does each row.
    """
    split = mx.vmap(mx.random.split)
    pairs: list[mx.array] = []
    for _ in range(count):
        pairs.append(split(keys))
        keys = pairs[-1][:, 0]
    numbers = mx.vmap(mx.vmap(lambda key: mx.random.uniform(shape=(1,), key=key)))(mx.concatenate(pairs, axis=1)[:, 1::2])
    return list(mx.split(numbers[..., 0], count, axis=1)), keys


def _frequencies(rope: Llama3ScaledRoPE) -> mx.array:
    """Return the library's scaled frequencies as `mx.fast.rope` takes them: their inverses, shape (head size / 2,)."""
    plain = 1.0 / (rope.base ** (mx.arange(0, rope.dim, 2, dtype=mx.float32) / rope.dim))
    inverse: mx.array = 1.0 / rope._apply_scaling(plain)
    mx.eval(inverse)
    return inverse


@lru_cache(256)
def _offsets(rows: int, queries: int, pairs: int, position: int) -> mx.array:
    """Return the position of each head of each row, shape (rows x heads,): `position`, and 0 for the values' heads."""
    row = [position] * queries + [position, 0] * pairs
    return mx.array(row * rows, mx.int32)
