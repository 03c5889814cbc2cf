"""Builds a tiny CSM-1B checkpoint in the layout of a Hugging Face cache; mlx-audio runs the same code on it as on the real one.

The shapes are CSM's with small hidden sizes; Mimi has its full size, because its configuration is fixed in the library, unless a server is
forked with `small_codec`. It makes noise, not speech. Each variant is built once and kept under `.tiny-csm/`; use it with `environment(build(...))`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiny_weights
from tiny_weights import Script

SESAME = "sesame/csm-1b"
MLX_COMMUNITY = "mlx-community/csm-1b"
QUANTIZED = "mlx-community/csm-1b-8bit"
MIMI = "kyutai/moshiko-pytorch-bf16"
MIMI_FILE = "tokenizer-e351c8d8-checkpoint125.safetensors"
TOKENIZER = "unsloth/Llama-3.2-1B"

SMALL_CODEC = "TEST_SMALL_CODEC"  # an environment variable that server_forker.py reads
_SMALL_CODEC_BYTES = 50_000_000

DEFAULT_ROOT = Path(__file__).resolve().parent.parent / ".tiny-csm"
PROMPT_SECONDS = {"conversational_a": 0.24, "conversational_b": 0.4}
SAMPLE_RATE = 24_000

# Outcomes for a script (see tiny_weights.Script).
AT_ONCE = "."
NEVER = "ssssssss~"
SILENCE = "_~"
TONE = "t~"
NOT_A_NUMBER = "ssn~"


def ends_after(frames: int) -> str:
    """Return an outcome: `frames` frames of sound, one in which it fades out as speech does, then the end."""
    return "s" * frames + "_."


def build(
    root: Path = DEFAULT_ROOT,
    *,
    repo: str = SESAME,
    script: Script | None = None,
    dtype: str = "float32",
    extra_files: bool = False,
    truncated: bool = False,
    quantized: bool = False,
    small_codec: bool = False,
    codebooks: int | None = None,
) -> Path:
    """Return a folder for HF_HUB_CACHE; build it if it does not exist (about 10 s the first time, 1 s for each further variant).

    Args:
        root: The folder of all variants.
        repo: The repository's name in the cache. Under `sesame/…` the weights have the original names, else mlx-audio's.
        script: What the model says and when it ends; None for random weights, which never end by themselves.
        dtype: The type of the weights in the file, by MLX's name.
        extra_files: Add two files of weights with other names beside `model.safetensors`, as in `sesame/csm-1b`.
        truncated: Cut off the second half of `model.safetensors`.
        quantized: Convert it with mlx-audio's own convert, 8 bits.
        small_codec: Mimi's weights are those of `tiny_weights.small_mimi_config`: for `csm_loading.load` and for servers, which
            `environment(...)` tells so. A full-size one takes a second for each frame on a CPU. The voice prompts have short transcripts:
            each of the real ones has 500 tokens of the tiny tokenizer, which every warm-up reads nine times.
        codebooks: How many a frame has; None: eight with a small codec, else 32.
    """
    if codebooks is None:
        codebooks = tiny_weights.SMALL_CODEBOOKS if small_codec else tiny_weights.CODEBOOKS
    variant = json.dumps([repo, script, dtype, extra_files, truncated, quantized, small_codec, codebooks], sort_keys=True, default=list)
    cache = root / f"{_source_key()}-{hashlib.sha256(variant.encode()).hexdigest()[:12]}"
    if cache.is_dir():
        return cache
    with _made_at_once(cache) as folder:
        _link_tree(_shared(root, codebooks if small_codec else None), folder)
        snapshot = _snapshot(folder, repo)
        if quantized:
            _quantize(build(root, repo=repo, script=script, dtype=dtype), repo, snapshot)
        else:
            _write_model(snapshot, repo, script, dtype, codebooks)
        _write_prompts(snapshot, short=small_codec)
        if extra_files:
            _write_extra_files(snapshot)
        if truncated:
            weights = snapshot / "model.safetensors"
            os.truncate(weights, weights.stat().st_size // 2)
    return cache


def environment(cache: Path) -> dict[str, str]:
    """Return the environment variables with which Hugging Face's libraries read only `cache`; if its Mimi is small, a server knows that."""
    return {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"} | ({SMALL_CODEC: "1"} if has_small_codec(cache) else {})


def has_small_codec(cache: Path) -> bool:
    """Return whether the cache's Mimi is one that `build` has made with `small_codec`; a cache without CSM has none."""
    codecs = cache.glob(f"models--{MIMI.replace('/', '--')}/snapshots/*/{MIMI_FILE}")
    return any(file.stat().st_size < _SMALL_CODEC_BYTES for file in codecs)


def use_small_codec() -> None:
    """Make this process build its network with a Mimi of a fortieth of its size, as in a checkpoint with `small_codec`."""
    from mlx_audio.codec.models.mimi import mimi

    small = tiny_weights.small_mimi_config()
    mimi.mimi_202407 = lambda _: small


@contextlib.contextmanager
def activated(cache: Path) -> Iterator[Path]:
    """Apply `environment(cache)` to this process, even if huggingface_hub has read its settings already."""
    from huggingface_hub import constants

    before = (constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE)
    variables = {name: os.environ.get(name) for name in environment(cache)}
    os.environ.update(environment(cache))
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = str(cache), True
    try:
        yield cache
    finally:
        constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = before
        for name, value in variables.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def snapshot_of(cache: Path, repo: str) -> Path:
    """Return the folder of `repo`'s files in a cache."""
    (folder,) = (cache / f"models--{repo.replace('/', '--')}" / "snapshots").iterdir()
    return folder


def _source_key() -> str:
    sources = Path(__file__).read_bytes() + Path(tiny_weights.__file__).read_bytes()
    return hashlib.sha256(sources).hexdigest()[:12]


@contextlib.contextmanager
def _made_at_once(target: Path) -> Iterator[Path]:
    """Provide a temporary folder that becomes `target` at the end, unless another process was first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    try:
        yield folder
        with contextlib.suppress(OSError):
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _link_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=os.link, dirs_exist_ok=True)


def _snapshot(cache: Path, repo: str) -> Path:
    """Create an empty snapshot of `repo` that is its `main`."""
    home = cache / f"models--{repo.replace('/', '--')}"
    revision = hashlib.sha1(repo.encode()).hexdigest()  # noqa: S324 - looks like a commit
    snapshot = home / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    return snapshot


def _shared(root: Path, small_codebooks: int | None) -> Path:
    """Return the folder with Mimi (small with that many codebooks, or full-size) and the tokenizer, to which all variants have hard links."""
    shared = root / f"{_source_key()}-shared-{small_codebooks or 'full'}"
    if not shared.is_dir():
        with _made_at_once(shared) as folder:
            config = tiny_weights.small_mimi_config(small_codebooks) if small_codebooks else None
            _save(_snapshot(folder, MIMI) / MIMI_FILE, tiny_weights.mimi_weights(config), "float32")
            _write_tokenizer(_snapshot(folder, TOKENIZER))
    return shared


def _save(path: Path, weights: dict[str, tiny_weights.Array], dtype: str) -> None:
    import mlx.core as mx

    mx.save_safetensors(str(path), {name: mx.array(value).astype(getattr(mx, dtype)) for name, value in weights.items()}, {"format": "pt"})


def _write_model(snapshot: Path, repo: str, script: Script | None, dtype: str, codebooks: int) -> None:
    weights = tiny_weights.random_weights(codebooks) if script is None else tiny_weights.scripted_weights(script, codebooks)
    if repo != SESAME:
        weights = {_mlx_name(name): value for name, value in weights.items()}
    (snapshot / "config.json").write_text(json.dumps(tiny_weights.config(codebooks), indent=2))
    _save(snapshot / "model.safetensors", weights, dtype)


def _mlx_name(name: str) -> str:
    """Return a parameter's name in a checkpoint converted for mlx-audio."""
    for old, new in (
        ("attn.output_proj", "attn.o_proj"),
        (".attn.", ".self_attn."),
        (".w1.", ".gate_proj."),
        (".w2.", ".down_proj."),
        (".w3.", ".up_proj."),
        ("sa_norm.scale", "input_layernorm.weight"),
        ("mlp_norm.scale", "post_attention_layernorm.weight"),
        ("norm.scale", "norm.weight"),
    ):
        name = name.replace(old, new)
    return f"model.{name}"


def _write_prompts(snapshot: Path, *, short: bool) -> None:
    """Write the voice prompts: two quiet hums, 24 kHz mono; `short`: with transcripts that take the place of those in the code."""
    folder = snapshot / "prompts"
    folder.mkdir()
    for place, (name, seconds) in enumerate(PROMPT_SECONDS.items()):
        time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
        samples = 0.2 * np.sin(2 * np.pi * (150 + 60 * place) * time) * (1 + 0.5 * np.sin(2 * np.pi * 5 * time))
        with wave.open(str(folder / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", "not compressed"))
            file.writeframes((samples * 32767).astype("<i2").tobytes())
        if short:
            (folder / f"{name}.txt").write_text("hm, hm.")


def _write_extra_files(snapshot: Path) -> None:
    """Write what `transformers` reads from the same repository: other names, which mlx-audio does not know."""
    for part in (1, 2):
        weights = {f"backbone_model.layers.{part}.self_attn.q_proj.weight": np.zeros((8, 8), np.float32)}
        _save(snapshot / f"transformers-0000{part}-of-00002.safetensors", weights, "float32")
    (snapshot / "transformers.safetensors.index.json").write_text("{}")


def _write_tokenizer(snapshot: Path) -> None:
    """Write a tokenizer of single bytes with Llama's two special tokens, in the files that `AutoTokenizer` reads."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: place for place, character in enumerate(tiny_weights.byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|begin_of_text|>", special=True), AddedToken("<|end_of_text|>", special=True)])
    tokenizer.save(str(snapshot / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    (snapshot / "tokenizer_config.json").write_text(json.dumps(settings))
    (snapshot / "special_tokens_map.json").write_text(json.dumps({key: settings[key] for key in ("bos_token", "eos_token")}))
    (snapshot / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": tiny_weights.TEXT_VOCABULARY}))


def _quantize(cache: Path, repo: str, snapshot: Path) -> None:
    """Run mlx-audio's own convert in a subprocess: it reads the hub's settings only when it is imported."""
    plain = snapshot_of(cache, repo)
    script = "import sys; from mlx_audio.convert import convert; "
    script += "convert(sys.argv[1], sys.argv[2], quantize=True, q_bits=8, q_group_size=64, model_domain='tts')"
    with tempfile.TemporaryDirectory(dir=snapshot) as source:
        os.link(plain / "model.safetensors", Path(source) / "model.safetensors")
        # mlx-audio 0.6.2's convert does not know "csm", unlike its loader, and treats the checkpoint as another model.
        config = json.loads((plain / "config.json").read_text()) | {"model_type": "sesame"}
        (Path(source) / "config.json").write_text(json.dumps(config))
        command = [sys.executable, "-c", script, source, str(snapshot)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment(cache)}, timeout=120)


def main() -> None:
    """Run a program with a small codec: `python tests/tiny_csm.py PROGRAM.py ARGUMENTS…`."""
    sys.argv = sys.argv[1:]
    program = Path(sys.argv[0]).resolve()
    sys.path.insert(0, str(program.parent))
    os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as csm_model sets them before it imports MLX
    use_small_codec()
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    main()
