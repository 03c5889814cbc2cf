"""A loaded tiny CSM, without the server around it: mlx-audio's own classes on the checkpoint of `tiny_csm`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import huggingface_hub.constants
import mlx.core as mx
import tiny_csm
from mlx_audio.tts.models.sesame import Model, sesame

from config import Settings
from csm_generation import CsmSpeaker
from csm_prompts import PromptStore
from voice_presets import Voice, VoicePreset


@contextmanager
def hub_at(cache: Path) -> Iterator[None]:
    """The hub's client reads `cache` and nothing else; it was imported before, so the environment would come too late."""
    hub = huggingface_hub.constants
    tokenizer = str(tiny_csm.snapshot_of(cache, tiny_csm.TOKENIZER))
    with (
        patch.object(hub, "HF_HUB_CACHE", str(cache)),
        patch.object(hub, "HF_HUB_OFFLINE", True),
        patch.object(sesame, "TOKENIZER_REPO", tokenizer),
    ):
        yield


def load(cache: Path, repo: str = tiny_csm.SESAME) -> Model:
    """The model in a cache of `tiny_csm.build`, as stock mlx-audio makes it."""
    snapshot = tiny_csm.snapshot_of(cache, repo)
    with hub_at(cache):
        model = Model(json.loads((snapshot / "config.json").read_text()))
    weights = model.sanitize(mx.load(str(snapshot / "model.safetensors")))
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    model.eval()
    return model


def prompt_folder(cache: Path) -> Path:
    """Where the built-in voice prompts of a cache lie."""
    return tiny_csm.snapshot_of(cache, tiny_csm.SESAME) / "prompts"


def settings(folder: Path, **values: object) -> Settings:
    """Settings with the cache in `folder` and nothing from the environment's `.env`."""
    return Settings(cache_dir=folder, **values)  # type: ignore[arg-type]


def voice(folder: Path = Path(), **fields: object) -> Voice:
    """A CSM voice: `conversational_a` unless told otherwise."""
    values = {"name": "test", "voice_key": None if "ref_audio" in fields else "conversational_a", **fields}
    return Voice(VoicePreset.model_validate(values), folder)


def speaker(model: Model, cache: Path, folder: Path, **values: object) -> CsmSpeaker:
    """What speaks with a model, under these settings."""
    chosen = settings(folder, **values)
    return CsmSpeaker(model, PromptStore(model, chosen, prompt_folder(cache)), chosen)
