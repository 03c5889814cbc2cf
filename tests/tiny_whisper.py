"""A Whisper checkpoint with eight hidden dimensions, in the layout of a Hugging Face cache: its transcript is always the same.

Everything that mlx-audio's loader and transformers' processor want is there, with the vocabulary's size and order of the multilingual
originals. The decoder's blocks add nothing; the embedding of each position points at the token that comes next.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny_weights
from tiny_weights import Array

REPO = "mlx-community/whisper-tiny-asr-fp16"

_LANGUAGES = 99
_WORDS_END = 50_257  # where the special tokens begin
_SPECIAL = ("<|endoftext|>", "<|startoftranscript|>")
_TASKS = ("<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>")
_TIMES = 1501
_PROMPT = 3  # tokens before the first that is written: begin, language, task
_HIDDEN, _HEADS, _MELS, _POSITIONS, _HEARD = 8, 2, 80, 16, 1500


def build(folder: Path, words: str, *, processor: bool = True) -> Path:
    """Build it, and return the folder for HF_HUB_CACHE.

    Args:
        folder: An empty one.
        words: At most four, each of which becomes a token.
        processor: With the tokenizer's and the feature extractor's files, which many conversions on the hub lack.
    """
    home = folder / f"models--{REPO.replace('/', '--')}"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(snapshot.name)
    (snapshot / "config.json").write_text(json.dumps(_config()))
    _save(snapshot / "model.safetensors", words.split())
    if processor:
        _write_processor(snapshot, words.split())
    return folder


def _languages() -> list[str]:
    from mlx_audio.stt.models.whisper.tokenizer import LANGUAGES

    return [f"<|{code}|>" for code in list(LANGUAGES)[:_LANGUAGES]]


def _special_tokens() -> list[str]:
    return [*_SPECIAL, *_languages(), *_TASKS, *(f"<|{place * 0.02:.2f}|>" for place in range(_TIMES))]


def _config() -> dict[str, Any]:
    size = _WORDS_END + len(_special_tokens())
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": _HEADS, "decoder_attention_heads": _HEADS}
    places = {"num_mel_bins": _MELS, "max_source_positions": _HEARD, "max_target_positions": _POSITIONS}
    return {"model_type": "whisper", "d_model": _HIDDEN, "vocab_size": size, **layers, **places}


def _token(word: int) -> int:
    return 256 + word


def _save(path: Path, words: list[str]) -> None:
    """Return random weights under mlx-audio's names; the last step of the decoder depends on the position only."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_audio.stt.models.whisper import Model, ModelConfig

    random = np.random.default_rng(0)
    parameters: list[tuple[str, mx.array]] = tree_flatten(Model(ModelConfig.from_dict(_config())).parameters())  # type: ignore[assignment]
    weights: dict[str, Array] = {name: random.normal(0, 0.1, value.shape).astype(np.float32) for name, value in parameters}
    for name, value in weights.items():
        if name.startswith("decoder.blocks") and (".out." in name or ".mlp2." in name):
            value[:] = 0
    _write_words(weights, words)
    mx.save_safetensors(str(path), {name: mx.array(value).astype(mx.float16) for name, value in weights.items()}, {"format": "mlx"})


def _write_words(weights: dict[str, Array], words: list[str]) -> None:
    """Make each position's embedding point at its token: a first timestamp, the words, another timestamp, the end."""
    first_time = _WORDS_END + len(_special_tokens()) - _TIMES
    written = [first_time, *(_token(place) for place in range(len(words))), first_time + 50, _WORDS_END]
    directions = np.linalg.qr(np.random.default_rng(1).normal(size=(_HIDDEN, _HIDDEN)))[0][: len(written)]
    directions -= directions.mean(axis=1, keepdims=True)  # so that the last normalization only scales them
    tokens, positions = weights["decoder.token_embedding.weight"], weights["decoder.positional_embedding"]
    tokens[:] = positions[:] = 0
    for place, (token, direction) in enumerate(zip(written, directions, strict=True), _PROMPT - 1):
        tokens[token] = 10 * direction
        positions[place] = 100 * direction
    weights["decoder.ln.weight"][:] = 1
    weights["decoder.ln.bias"][:] = 0


def _write_processor(snapshot: Path, words: list[str]) -> None:
    """Write single bytes, the words and the rest of the vocabulary in the files that `WhisperProcessor` reads."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: place for place, character in enumerate(tiny_weights.byte_alphabet())}
    vocabulary |= {f"Ġ{word}": _token(place) for place, word in enumerate(words)}
    vocabulary |= {f"unused{place}": place for place in range(len(vocabulary), _WORDS_END)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _special_tokens()])
    tokenizer.save(str(snapshot / "tokenizer.json"))
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), _SPECIAL[0])
    (snapshot / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "WhisperTokenizer", **ends}))
    (snapshot / "vocab.json").write_text(json.dumps(vocabulary))
    (snapshot / "merges.txt").write_text("#version: 0.2\n")
    settings = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": _MELS, "sampling_rate": 16_000}
    more = {"hop_length": 160, "chunk_length": 30, "n_fft": 400, "processor_class": "WhisperProcessor"}
    (snapshot / "preprocessor_config.json").write_text(json.dumps(settings | more))
