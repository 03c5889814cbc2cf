"""The network with joined layers: the tokens of stock mlx-audio, compiled and not, and no second copy of the weights."""

from __future__ import annotations

import csm_loading
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_csm
import tiny_weights
from mlx.utils import tree_flatten
from mlx_audio.lm.sample_utils import make_sampler
from mlx_audio.tts.models.sesame.sesame import SesameModel
from numpy.typing import NDArray

from csm_decoding import FrameBatch, RowSampler
from csm_layers import FrameNetwork, KvCache, join

FRAMES = 8
NEAR_TIE = 1e-4  # the distance of two logits within which the order of sums may decide

Frames = NDArray[np.int32]


@pytest.fixture(scope="module")
def stock() -> SesameModel:
    return csm_loading.load(tiny_csm.build(), stock=True).model


def network(stock: SesameModel, *, compiled: bool = False) -> FrameNetwork:
    """Return our network with the weights of `stock`."""
    ours = FrameNetwork(tiny_weights.config(), compiled=compiled)
    ours.load_weights(tree_flatten(stock.parameters()))
    ours.join_layers()
    return ours


def prompt(positions: int, seed: int) -> tuple[mx.array, mx.array]:
    """Return text tokens as a prompt, shape (positions, codebooks + 1)."""
    random = np.random.default_rng(seed)
    tokens = np.zeros((positions, tiny_weights.CODEBOOKS + 1), np.int32)
    tokens[:, -1] = random.integers(0, 250, positions)
    return mx.array(tokens), mx.array(np.arange(tokens.shape[1]) == tiny_weights.CODEBOOKS) & mx.ones(tokens.shape, mx.bool_)


def stock_frames(stock: SesameModel, row: tuple[mx.array, mx.array], seed: int, temperature: float) -> Frames:
    """Run the loop of mlx-audio's `generate`."""
    stock.setup_caches(1)
    mx.random.seed(seed)
    sampler = make_sampler(temp=temperature, top_k=50)
    tokens, mask = row[0][None], row[1][None]
    frames = []
    for _ in range(FRAMES):
        frame = stock.generate_frame(tokens, mask, None, sampler)
        frames.append(np.array(frame)[0])
        tokens = mx.concatenate([frame.astype(mx.int32), mx.zeros((1, 1), mx.int32)], axis=1)[:, None]
        mask = mx.arange(tokens.shape[2]) < tiny_weights.CODEBOOKS
        mask = mx.broadcast_to(mask, tokens.shape)
    return np.stack(frames)


def our_frames(ours: FrameNetwork, rows: list[tuple[mx.array, mx.array]], seeds: list[int], temperature: float) -> list[Frames]:
    batch = FrameBatch(ours, rows, RowSampler(seeds, temperature, 50))
    return list(np.stack([batch.step(more=left > 0) for left in reversed(range(FRAMES))], axis=1))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_in_float32_every_row_has_the_tokens_of_stock(stock: SesameModel, temperature: float) -> None:
    rows = [prompt(positions, positions) for positions in (9, 40, 23, 40)]
    seeds = [5, 6, 7, 8]
    wanted = [stock_frames(stock, row, seed, temperature) for row, seed in zip(rows, seeds, strict=True)]
    ours = network(stock)
    np.testing.assert_array_equal(our_frames(ours, rows[:1], seeds[:1], temperature)[0], wanted[0])
    for row, expected in zip(our_frames(ours, rows, seeds, temperature), wanted, strict=True):
        np.testing.assert_array_equal(row, expected)


def test_a_compiled_frame_has_the_same_tokens(stock: SesameModel) -> None:
    rows = [prompt(positions, positions) for positions in (9, 40)]
    plain, compiled = (our_frames(network(stock, compiled=switch), rows, [5, 6], 0.9) for switch in (False, True))
    np.testing.assert_array_equal(plain, compiled)


def test_joining_keeps_no_second_copy_of_the_weights() -> None:
    ours = FrameNetwork(tiny_weights.config())
    mx.eval(ours.parameters())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    ours.join_layers()
    parameters: list[tuple[str, mx.array]] = tree_flatten(ours.parameters())  # type: ignore[assignment]
    largest = max(value.nbytes for name, value in parameters if ".layers." in name)
    assert mx.get_active_memory() - before < largest  # even less: the rotary tables of the replaced layers are freed
    assert mx.get_peak_memory() - before < 3 * largest


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_layers_are_joined(bits: int) -> None:
    linear = nn.Linear  # type: ignore[attr-defined]  # mlx's stubs lack it
    layers = [linear(64, width, bias=False).to_quantized(64, bits) for width in (96, 32, 32)]
    x = mx.random.normal((3, 64), key=mx.random.key(1))
    apart = mx.concatenate([layer(x) for layer in layers], axis=-1)
    assert mx.allclose(join(layers)(x), apart, atol=1e-6)


def test_layers_that_are_quantized_differently_are_refused() -> None:
    linear = nn.Linear  # type: ignore[attr-defined]  # mlx's stubs lack it
    layers = [linear(64, 64, bias=False).to_quantized(64, bits) for bits in (4, 8)]
    with pytest.raises(ValueError, match="quantized differently"):
        join(layers)


def test_a_cache_grows_and_keeps_what_it_holds() -> None:
    cache = KvCache(growth=4)
    steps = mx.arange(3 * 2 * 2 * 9 * 4, dtype=mx.float32).reshape(3, 2, 2, 9, 4)
    cache.append(steps[:, :, 0, :2], steps[:, :, 1, :2])
    for position in range(2, 9):
        keys, values = cache.append_one(steps[:, :, :, position])
    assert mx.array_equal(mx.stack([keys, values], axis=2), steps)
    cache.keep(mx.array([2, 0]))
    assert mx.array_equal(cache.state, steps[mx.array([2, 0])])
    longer = KvCache(prefix=cache.state)
    keys, values = longer.append_one(steps[:2, :, :, 0])
    assert mx.array_equal(mx.stack([keys, values], axis=2)[:, :, :, :9], cache.state)
