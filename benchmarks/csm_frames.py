"""Count the kernels of one frame of CSM and the time to build it: stock mlx-audio and here, 1, 2 and 8 rows. Part of `make bench-csm`.

Counted from MLX's graph: every primitive that is not a view is one kernel. The network has CSM-1B's layers and codebooks (16 + 4, 32) with
small sizes, and is never computed. RMSNorm, rotary embedding and attention are one primitive each, as on Metal; MLX's CPU backend builds them
of several, so they are replaced by stand-ins for the count. Some primitives are more than one launch on Metal (a concatenation copies each
input; a sort of over 2,048 values takes several passes), in stock and here alike.

The time to build is that of Python and MLX on one thread. The caches of the prompt are made once, as in a batch, which keeps them from frame to
frame: 40 MB of new ones before each build would throw Python's and MLX's own data out of the processor's cache, and cost up to 2 ms a frame.
"""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

import mlx.core as mx  # noqa: E402 - the project's folders come first
import tiny_weights  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_audio.lm.sample_utils import make_sampler  # noqa: E402
from mlx_audio.tts.models.sesame.sesame import SesameModel  # noqa: E402

from csm_decoding import FrameBatch, PrefixCache, RowSampler  # noqa: E402
from csm_layers import FrameNetwork  # noqa: E402

ROWS = (1, 2, 8)
HIDDEN = 128
PROMPT = 300  # positions before the frame
VIEWS = {"AsStrided", "Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unflatten"}

Build = Callable[[], Sequence[mx.array]]
Prepare = Callable[[], Build]
"""Prepares the caches of a frame, and returns the function that builds it."""

# Reported for stock mlx-audio's kernels on fast Macs (ms a frame), and the memory that a frame reads (4.55 G parameters) at 819 GB/s.
REPORTED_MS = (40.0, 52.0)
MEMORY_MS = 4.55e9 * 2 / 819e9 * 1000
FRAME_MS = 80


def main() -> None:
    stock, plain, compiled = networks()
    stock_kernels = 0
    print("\n| one frame | rows | primitives | kernels | time to build | stock / here |\n|---|---:|---:|---:|---:|---:|")
    with one_kernel_each():
        for rows in ROWS:
            frames = {
                "stock mlx-audio": stock_frame(stock, rows),
                "here": our_frame(plain, rows),
                "here, compiled": our_frame(compiled, rows),
            }
            times = build_ms(frames)
            for name, frame in frames.items():
                primitives, kernels = count(frame()())
                stock_kernels = stock_kernels or kernels
                print(
                    f"| {name} | {rows} | {primitives:,} | {kernels:,} | {times[name]:.1f} ms | {times['stock mlx-audio'] / times[name]:.1f} |"
                )
    predict(kernels, stock_kernels)
    read_prompts(plain)


def read_prompts(network: FrameNetwork) -> None:
    """Print the time to read a prompt of 30 s that is a segment of its own, and 1 or 8 texts of 25 tokens: each time, and with the cache."""
    known, new = 480, 25
    tokens, mask = mx.ones((known + new, 33), mx.int32), mx.ones((known + new, 33), mx.bool_)
    prefix = PrefixCache(network).get((tokens[:known], mask[:known]))
    print("\n| before the first frame, rows | prompt read | prompt kept | share |\n|---|---:|---:|---:|")
    for rows in (1, 8):
        spent = []
        for kept in (None, prefix):
            start = time.process_time()
            FrameBatch(network, [(tokens, mask)] * rows, RowSampler(range(rows), 0.9, 50), kept).read_prompts()
            spent.append((time.process_time() - start) * 1000)
        print(f"| {rows} | {spent[0]:.0f} ms | {spent[1]:.0f} ms | {spent[1] / spent[0]:.1%} |")


def predict(kernels: int, stock_kernels: int) -> None:
    """Print what to expect on an M3 Ultra, where nobody has measured it."""
    low, high = (max(MEMORY_MS, kernels * reported / stock_kernels) for reported in REPORTED_MS)
    print(
        f"\nPrediction, not a measurement, for an M3 Ultra in 16 bits: {low:.0f} to {high:.0f} ms a frame, real-time factor "
        f"{low / FRAME_MS:.2f} to {high / FRAME_MS:.2f} (stock: {REPORTED_MS[0]:.0f} to {REPORTED_MS[1]:.0f} ms reported on fast Macs, "
        f"scaled by the kernels; the memory alone needs {MEMORY_MS:.0f} ms)."
    )


def networks() -> tuple[SesameModel, FrameNetwork, FrameNetwork]:
    """Return three networks with the same random weights: stock, ours, ours compiled."""
    config = layered_config()
    stock, plain, compiled = SesameModel(config), FrameNetwork(config), FrameNetwork(config, compiled=True)
    weights = random_weights(stock)
    for network in (stock, plain, compiled):
        network.load_weights(weights)
        mx.eval(network.parameters())
    plain.join_layers()
    compiled.join_layers()
    return stock, plain, compiled


def layered_config() -> dict[str, Any]:
    """Return the configuration of CSM-1B with small sizes."""
    config = tiny_weights.config()
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2}
    decoder = config["depth_decoder_config"] | sizes | {"num_hidden_layers": 4}
    return config | sizes | {"num_hidden_layers": 16, "depth_decoder_config": decoder}


def random_weights(network: SesameModel) -> list[tuple[str, mx.array]]:
    """Return random weights of a scale at which the layers matter."""
    mx.random.seed(0)
    flat: list[tuple[str, mx.array]] = tree_flatten(network.parameters())  # type: ignore[assignment]
    weights = [
        (name, mx.ones(value.shape) if value.ndim == 1 else mx.random.normal(value.shape) * value.shape[-1] ** -0.5) for name, value in flat
    ]
    mx.eval(weights, mx.random.state)
    return [(name, value * 3 if "embeddings" in name else value) for name, value in weights]


def stock_frame(network: SesameModel, rows: int) -> Prepare:
    """Prepare a frame as stock `generate_frame` makes it."""
    tokens, mask = mx.ones((rows, 1, 33), mx.int32), mx.ones((rows, 1, 33), mx.bool_)
    sampler = make_sampler(temp=0.9, top_k=50)
    states = [mx.zeros((rows, 2, PROMPT + 1, 64)) for _ in network.backbone.layers]
    mx.eval(states, tokens, mask)

    def prepare() -> Build:
        network.setup_caches(rows)
        for cache, state in zip(network.backbone_cache, states, strict=True):
            cache.keys, cache.values = copy(state), copy(state)
            cache.offset = PROMPT
        mx.eval(mx.random.state)
        return lambda: [network.generate_frame(tokens, mask, None, sampler)]

    return prepare


def our_frame(network: FrameNetwork, rows: int) -> Prepare:
    """Prepare a frame as `FrameBatch` makes it after the first one; the rows have different padding."""
    last = mx.zeros((rows, HIDDEN))
    sampler = RowSampler(range(rows), 0.9, 50)
    begun = network.new_caches(list(range(rows)))
    for cache in begun:
        cache.append(*[mx.zeros((rows, 2, PROMPT, 64))] * 2)
    mx.eval(last, sampler.keys, sampler.scale, [cache.state for cache in begun])

    def prepare() -> Build:
        caches = deepcopy(begun)
        return lambda: network.draw_frame(network.read(last, caches), sampler.keys, sampler.scale, sampler.top_k)

    return prepare


def count(frame: Sequence[mx.array]) -> tuple[int, int]:
    """Return the numbers of primitives and of kernels in a graph."""
    text = io.StringIO()
    mx.export_to_dot(text, *frame)
    names = re.findall(r'label ="([^"]*)", shape=rectangle', text.getvalue())
    return len(names), sum(name not in VIEWS for name in names)


def build_ms(frames: dict[str, Prepare], times: int = 30) -> dict[str, float]:
    """Return the least processor time of this thread to build each frame, in ms, without the time to prepare it.

    The builds alternate. The least of many, because other work on the machine makes each one slower, never faster.
    """
    spent: dict[str, list[float]] = {name: [] for name in frames}
    for _ in range(times):
        for name, prepare in frames.items():
            build = prepare()
            start = time.thread_time()
            frame = build()
            spent[name].append(time.thread_time() - start)
            del frame
    return {name: min(values) * 1000 for name, values in spent.items()}


@contextmanager
def one_kernel_each() -> Iterator[None]:
    """Let RMSNorm, rotary embedding and attention be one primitive each, with the right shapes and dependencies."""

    def same_shape(x: mx.array, *_: Any, **__: Any) -> mx.array:  # noqa: ANN401 - the signatures differ
        return mx.cumsum(x, axis=-1)

    def attention(queries: mx.array, keys: mx.array, values: mx.array, *, mask: Any = None, **_: Any) -> mx.array:  # noqa: ANN401
        others = [keys, values] + ([mask] if isinstance(mask, mx.array) else [])
        result: mx.array = mx.depends([queries], others)[0]
        return result

    with patch.multiple(mx.fast, rms_norm=same_shape, rope=same_shape, scaled_dot_product_attention=attention):
        yield


if __name__ == "__main__":
    main()
