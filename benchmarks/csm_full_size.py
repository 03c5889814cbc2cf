"""Load a checkpoint of CSM-1B's real size (random weights, float32, 6.2 GB on disk), and print the time and memory that it takes.

`uv run --group dev python benchmarks/csm_full_size.py`: needs 7 GB of disk in TMPDIR and 5 GB of memory, and removes its files.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

BLOCK = 1 << 24  # floats, written repeatedly: random numbers for 6.2 GB take longer than the load
LIMIT_SECONDS = 900


def main() -> None:
    if len(sys.argv) > 1:
        measure_load(Path(sys.argv[1]), sys.argv[2])
        return
    folder = Path(tempfile.mkdtemp(prefix="csm-full-size-"))
    try:
        write_checkpoint(folder)
        print(
            f"{'in memory as':>12} {'file GB':>8} {'load s':>7} {'peak RSS GB':>12} {'MLX peak GB':>12} {'steady MLX GB':>14} {'steady RSS GB':>14}"
        )
        for dtype in ("bfloat16", "auto"):
            command = [sys.executable, __file__, str(folder), dtype]
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT_SECONDS, env=environment())
            print(done.stdout.strip().splitlines()[-1])
    finally:
        shutil.rmtree(folder)


def environment() -> dict[str, str]:
    """Return the environment that takes the tokenizer and the full-size Mimi from the tests' tiny checkpoint."""
    import tiny_csm

    return {**os.environ, **tiny_csm.environment(tiny_csm.build())}


def write_checkpoint(folder: Path) -> None:
    """Write config.json, the prompts and model.safetensors with CSM-1B's shapes."""
    import tiny_csm

    tiny = tiny_csm.snapshot_of(tiny_csm.build(), tiny_csm.SESAME)
    shutil.copytree(tiny / "prompts", folder / "prompts")
    config = full_config(json.loads((tiny / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    shapes = full_shapes(config)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + 4 * math.prod(shape)]}
        end += 4 * math.prod(shape)
    text = json.dumps(header).encode()
    block = np.random.default_rng(0).standard_normal(BLOCK, dtype=np.float32) * np.float32(0.02)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = math.prod(shape)
            while left:
                block[: min(left, BLOCK)].tofile(file)
                left -= min(left, BLOCK)


def full_config(tiny: dict[str, Any]) -> dict[str, Any]:
    """Return `tiny` with CSM-1B's sizes: a Llama of 1B with 16 layers, and one of 100M with 4 for the depth (mlx-audio's `llama-1B`, `llama-100M`)."""
    decoder = tiny["depth_decoder_config"] | {
        "backbone_hidden_size": 2048,
        "hidden_size": 1024,
        "head_dim": 128,
        "intermediate_size": 8192,
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
    }
    return tiny | {
        "hidden_size": 2048,
        "head_dim": 64,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "text_vocab_size": 128_256,
        "depth_decoder_config": decoder,
    }


def full_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return every tensor's shape, from mlx-audio's own network, which is not evaluated."""
    from mlx.utils import tree_flatten
    from mlx_audio.tts.models.sesame.sesame import SesameModel

    parameters: list[tuple[str, Any]] = tree_flatten(SesameModel(config).parameters())  # type: ignore[assignment]
    return {f"model.{name}": tuple(value.shape) for name, value in parameters}


def measure_load(folder: Path, dtype: str) -> None:
    """Load in this process, and print a line of the table."""
    import psutil

    from config import Settings
    from csm_model import CsmModel

    settings = Settings.model_validate({"model_id": str(folder), "model_dtype": dtype, "cache_dir": folder / "cache"})
    model = CsmModel(settings)
    start = time.monotonic()
    model.load(lambda _: None)
    seconds = time.monotonic() - start
    info = model.info()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    steady = psutil.Process().memory_info().rss / 1e9
    size = (folder / "model.safetensors").stat().st_size / 1e9
    print(
        f"{info['dtype']:>12} {size:8.2f} {seconds:7.1f} {peak:12.2f} {info['peak_memory_gb']:12.2f}"
        f" {info['memory_gb']:14.2f} {steady:14.2f}   {info['parameters'] / 1e9:.3f} G parameters"
    )


if __name__ == "__main__":
    main()
