"""Loads a tiny CSM without a server: mlx-audio's own classes on the checkpoint of `tiny_csm`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import huggingface_hub.constants
import mlx.core as mx
import tiny_csm
import tiny_weights
from mlx_audio.codec.models.mimi import mimi
from mlx_audio.tts.models.sesame import Model, sesame

from config import Settings
from csm_generation import CsmSpeaker
from csm_layers import FrameNetwork
from csm_prompts import PromptStore
from voice_presets import Voice, VoicePreset


@contextmanager
def hub_at(cache: Path) -> Iterator[None]:
    """Make the hub's client read only `cache`; it is imported already, so environment variables would have no effect."""
    hub = huggingface_hub.constants
    tokenizer = str(tiny_csm.snapshot_of(cache, tiny_csm.TOKENIZER))
    with (
        patch.object(hub, "HF_HUB_CACHE", str(cache)),
        patch.object(hub, "HF_HUB_OFFLINE", True),
        patch.object(sesame, "TOKENIZER_REPO", tokenizer),
    ):
        yield


def load(cache: Path, repo: str = tiny_csm.SESAME, *, stock: bool = False, dtype: mx.Dtype = mx.float32) -> Model:
    """Return the model in a cache of `tiny_csm.build`, as stock mlx-audio builds it, with this project's network unless `stock`."""
    snapshot = tiny_csm.snapshot_of(cache, repo)
    config = json.loads((snapshot / "config.json").read_text())
    small = tiny_weights.small_mimi_config(config["audio_num_codebooks"])
    codec = patch.object(mimi, "mimi_202407", lambda _: small) if tiny_csm.has_small_codec(cache) else nullcontext()
    with hub_at(cache), codec:
        model = Model(config)
    if not stock:
        model.model = FrameNetwork(config)
    weights = model.sanitize(mx.load(str(snapshot / "model.safetensors")))
    model.load_weights([(name, value.astype(dtype)) for name, value in weights.items()])
    mx.eval(model.parameters())
    if not stock:
        model.model.join_layers()
    model.eval()
    return model


def prompt_folder(cache: Path) -> Path:
    """Return the folder of the built-in voice prompts in a cache."""
    return tiny_csm.snapshot_of(cache, tiny_csm.SESAME) / "prompts"


def settings(folder: Path, **values: object) -> Settings:
    """Return settings with `folder` as the cache, and without a recogniser, which takes seconds to load, unless `values` say otherwise."""
    return Settings(**({"cache_dir": folder, "verify": "off"} | values))  # type: ignore[arg-type]


def voice(folder: Path = Path(), **fields: object) -> Voice:
    """Return a CSM voice: `conversational_a` unless `fields` say otherwise."""
    values = {"name": "test", "voice_key": None if "ref_audio" in fields else "conversational_a", **fields}
    return Voice(VoicePreset.model_validate(values), folder)


def speaker(model: Model, prompts: Path, folder: Path, faults: Counter[str] | None = None, **values: object) -> CsmSpeaker:
    """Return a speaker for a model, with the built-in voice prompts in `prompts`, its cache in `folder`, and these settings."""
    chosen = settings(folder, **values)
    return CsmSpeaker(model, PromptStore(model, chosen, prompts), chosen, faults)
