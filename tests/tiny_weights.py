"""The weights of the tiny CSM checkpoint: random ones, scripted ones that end at a given frame, and Mimi's.

A *script* makes the network predictable without leaving it. Hidden dimensions are flags: a text or prompt frame sets the flag "choose",
every other frame the flag of the state it stands for. The blocks pass the flags through unchanged (their output projections are zero),
RMSNorm scales them, and `codebook0_head` is a table of what follows what: a Markov chain over codebook 0. One attention head looks for
capital letters, so that the text can choose among several beginnings. The other codebooks follow codebook 0 and are all 0 exactly
when it is: that is CSM's end of speech.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Script = Mapping[str, Sequence[str]]
"""What the model says: by capital letter in the text ("" when none of them is there) the outcomes, one of which is sampled.

An outcome is one letter a frame of 80 ms: `s` sound, `_` silence, `t` a tone (the same codes again), `n` NaN; it ends with `.` (the model
ends by itself) or `~` (it begins again, for ever). With top_k 1 or temperature 0 the first outcome is always taken.
"""

HIDDEN = 128
HEAD_DIM = 64
LAYERS = 2
CODEBOOKS = 32
SMALL_CODEBOOKS = 8  # of a checkpoint with a small codec: a frame then takes a third of the time
AUDIO_VOCABULARY = 2051
TEXT_VOCABULARY = 320
BOS, EOS = 256, 257

# Codebook 0's tokens by what Mimi's weights below make of them. A voice prompt's frames always get the last range.
_TOKENS = {"s": 1, "_": 512, "t": 768, "n": 896}
_PROMPT_TOKENS = 1024
_BINS = 2048
# The other codebooks' tokens for a silent and for a constant frame.
_SILENT_TOKEN, _TONE_TOKEN = 1, 2

# Which hidden dimension is which flag. Below _LETTER they are the script's states; 0 is the end.
_LETTER, _CHOOSE, _BOS_FLAG, _GROUP, _SILENT, _TONE = 100, 108, 109, 110, 118, 119
_GROUPS = 8
_AMPLITUDE, _WHISPER = 100.0, 0.1  # of codebook 0's and text's embeddings, and of the other codebooks', whose sum must not matter
_LOGIT = 20.0


def config(codebooks: int = CODEBOOKS) -> dict[str, Any]:
    """Return `config.json`: every field of mlx-audio's `SesameModelArgs` and `DepthDecoderConfig`, with CSM-1B's values except for the sizes."""
    rope = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    shared: dict[str, Any] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": 2 * HIDDEN,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "num_attention_heads": HIDDEN // HEAD_DIM,
        "num_codebooks": codebooks,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": rope,
        "rope_theta": 500000,
        "use_cache": True,
        "vocab_size": AUDIO_VOCABULARY,
    }
    decoder = {**shared, "model_type": "csm_depth_decoder_model", "backbone_hidden_size": HIDDEN, "num_hidden_layers": 1}
    return {
        **shared,
        "model_type": "csm",
        "backbone_flavor": "llama-1B",
        "decoder_flavor": "llama-100M",
        "text_vocab_size": TEXT_VOCABULARY,
        "audio_vocab_size": AUDIO_VOCABULARY,
        "audio_num_codebooks": codebooks,
        "audio_eos_token_id": 128003,
        "audio_token_id": 128002,
        "bos_token_id": 128000,
        "codebook_eos_token_id": 0,
        "codebook_pad_token_id": 2050,
        "depth_decoder_config": decoder,
        "pad_token_id": 128002,
        "tie_codebooks_embeddings": True,
        "tie_word_embeddings": False,
    }


def random_weights(codebooks: int = CODEBOOKS, seed: int = 0) -> dict[str, Array]:
    """Return random weights under the names in the file of `sesame/csm-1b`, float32."""
    random = np.random.default_rng(seed)
    weights: dict[str, Array] = {}
    for part, layers in (("backbone", LAYERS), ("decoder", 1)):
        for layer in range(layers):
            for name, (rows, columns) in _block_shapes().items():
                weights[f"{part}.layers.{layer}.{name}.weight"] = _normal(random, rows, columns, scale=columns**-0.5)
            for name in ("sa_norm", "mlp_norm"):
                weights[f"{part}.layers.{layer}.{name}.scale"] = np.ones(HIDDEN, np.float32)
        weights[f"{part}.norm.scale"] = np.ones(HIDDEN, np.float32)
    weights["text_embeddings.weight"] = _normal(random, TEXT_VOCABULARY, HIDDEN, scale=1.0)
    weights["audio_embeddings.weight"] = _normal(random, AUDIO_VOCABULARY * codebooks, HIDDEN, scale=0.2)
    weights["projection.weight"] = _normal(random, HIDDEN, HIDDEN, scale=HIDDEN**-0.5)
    weights["codebook0_head.weight"] = _normal(random, AUDIO_VOCABULARY, HIDDEN, scale=HIDDEN**-0.5)
    weights["audio_head"] = _normal(random, codebooks - 1, HIDDEN, AUDIO_VOCABULARY, scale=HIDDEN**-0.5)
    _only_what_mimi_can_say(weights)
    return weights


def scripted_weights(script: Script, codebooks: int = CODEBOOKS) -> dict[str, Array]:
    """Return weights that follow `script`, under the same names.

    Raises:
        ValueError: The script has too many letters or too many different frames for the hidden size.
    """
    letters = sorted(letter for letter in script if letter)
    if "" not in script or len(letters) > _CHOOSE - _LETTER:
        raise ValueError(f"a script needs the entry '' and at most {_CHOOSE - _LETTER} letters")
    weights = random_weights(codebooks)
    for name in weights:
        if name.endswith(("output_proj.weight", "w2.weight")):
            weights[name][:] = 0
    _write_letters(weights, letters)
    _write_chain(weights, script, letters)
    weights["projection.weight"] = np.eye(HIDDEN, dtype=np.float32)
    return weights


def _write_letters(weights: dict[str, Array], letters: Sequence[str]) -> None:
    """Write layer 0's first head: a choosing frame reads the letter's flag from any place in the text, all others read nothing.

    The directions are the pairs of the head's dimensions that rotary embedding rotates slowest (under 0.001 rad in 2048 positions).
    """
    text = weights["text_embeddings.weight"]
    text[:] = 0
    text[:BOS, _CHOOSE] = text[EOS:, _CHOOSE] = _AMPLITUDE
    text[BOS, _BOS_FLAG] = _AMPLITUDE
    by_letter, by_rest = HEAD_DIM - 2, HEAD_DIM - 4
    block = "backbone.layers.0.attn."
    query, key, value, output = (weights[f"{block}{name}.weight"] for name in ("q_proj", "k_proj", "v_proj", "output_proj"))
    query[:HEAD_DIM] = key[:] = value[:] = 0
    query[by_letter, _CHOOSE] = 5
    query[by_rest, :_LETTER] = 5
    key[by_letter, _BOS_FLAG], key[by_rest, _BOS_FLAG] = 2, 5
    for index, letter in enumerate(letters):
        flag = _LETTER + index
        text[byte_token(letter), flag] = _AMPLITUDE
        key[by_letter, flag] = 10
        value[index, flag] = 1
        output[flag, index] = 20 * _AMPLITUDE / np.sqrt(HIDDEN / 2)


def _write_chain(weights: dict[str, Array], script: Script, letters: Sequence[str]) -> None:
    states = _states(script)
    tokens = {state: _TOKENS[kind] + number for state, (number, kind) in states.items()}
    audio = weights["audio_embeddings.weight"].reshape(-1, AUDIO_VOCABULARY, HIDDEN)
    audio[:] = 0
    audio[0, :, _CHOOSE] = _AMPLITUDE
    head = weights["codebook0_head.weight"]
    head[:] = 0
    first_rest = np.zeros((HIDDEN, AUDIO_VOCABULARY), np.float32)  # what codebook 1 says after codebook 0
    step = np.float32(_LOGIT / np.sqrt(HIDDEN))

    def follow(flag: int, following: Sequence[int]) -> None:
        head[:, flag] = -step
        for place, token in enumerate(following):
            head[token, flag] = step * (1 - 0.01 * place)

    audio[0, 0] = 0
    audio[0, 0, 0] = _AMPLITUDE
    first_rest[0, 0] = step
    random = np.random.default_rng(1)
    for state, (number, kind) in states.items():
        audio[0, tokens[state]] = 0
        audio[0, tokens[state], number] = _AMPLITUDE
        follow(number, [tokens.get(_next(state), 0)])
        first_rest[number, {"_": _SILENT_TOKEN, "t": _TONE_TOKEN}.get(kind, int(random.integers(16, _BINS)))] = step
    for flag, letter in [(_CHOOSE, ""), *((_LETTER + index, letter) for index, letter in enumerate(letters))]:
        follow(flag, [tokens.get(_begin(outcome), 0) for outcome in script[letter]])
    _write_other_codebooks(audio, weights["audio_head"], first_rest, step)


def _write_other_codebooks(audio: Array, head: Array, first_rest: Array, step: np.float32) -> None:
    """Write all codebooks but the first: each follows the one before it; 0, silence and tone stay the same, sound goes through eight groups."""
    every = np.arange(AUDIO_VOCABULARY)
    flags = _GROUP + every % _GROUPS
    flags[0], flags[_SILENT_TOKEN], flags[_TONE_TOKEN] = 0, _SILENT, _TONE
    random = np.random.default_rng(2)
    for codebook in range(1, len(audio)):
        audio[codebook, every, flags] = _WHISPER
        table = first_rest if codebook == 1 else np.zeros_like(first_rest)
        if codebook > 1:
            table[0, 0] = table[_SILENT, _SILENT_TOKEN] = table[_TONE, _TONE_TOKEN] = step
            for group in range(_GROUPS):
                table[_GROUP + group, random.integers(16, _BINS)] = step
        head[codebook - 1] = np.where(table > 0, table, -step)


_State = tuple[str, int]


def _begin(outcome: str) -> _State:
    return (outcome, 0)


def _next(state: _State) -> _State:
    outcome, place = state
    return (outcome, 0) if outcome[place + 1] == "~" else (outcome, place + 1)


def _states(script: Script) -> dict[_State, tuple[int, str]]:
    """Return (flag, kind) of every frame of every outcome. Frames before the same rest of an ending outcome are one state."""
    states: dict[_State, tuple[int, str]] = {}
    flags: dict[object, int] = {}
    for outcome in sorted({outcome for outcomes in script.values() for outcome in outcomes}):
        if not outcome or outcome[-1] not in ".~" or set(outcome[:-1]) - set(_TOKENS) or outcome == "~":
            raise ValueError(f"{outcome!r} is no outcome: frames of s, _, t or n, then . or ~")
        for place, kind in enumerate(outcome[:-1]):
            same: object = outcome[place:] if outcome[-1] == "." else (outcome, place)
            states[outcome, place] = (flags.setdefault(same, len(flags) + 1), kind)
    if len(flags) >= _LETTER:
        raise ValueError(f"the script has {len(flags)} different frames; the tiny model can tell {_LETTER - 1} apart")
    return states


def byte_token(character: str) -> int:
    """Return the token id of an ASCII character in the tiny tokenizer's vocabulary."""
    return byte_alphabet().index(character)


def byte_alphabet() -> list[str]:
    """Return the 256 characters that stand for bytes in byte-level tokenizers, sorted."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _block_shapes() -> dict[str, tuple[int, int]]:
    return {
        "attn.q_proj": (HIDDEN, HIDDEN),
        "attn.k_proj": (HEAD_DIM, HIDDEN),
        "attn.v_proj": (HEAD_DIM, HIDDEN),
        "attn.output_proj": (HIDDEN, HIDDEN),
        "mlp.w1": (2 * HIDDEN, HIDDEN),
        "mlp.w2": (HIDDEN, 2 * HIDDEN),
        "mlp.w3": (2 * HIDDEN, HIDDEN),
    }


def _only_what_mimi_can_say(weights: dict[str, Array]) -> None:
    """Make tokens unlikely that are not speech.

    For those from 2048 on Mimi has no sound (the real model never says them), MLX would read past the table; some others are a script's
    silence, tone and NaN.
    """
    weights["codebook0_head.weight"][_BINS:] = 0
    weights["codebook0_head.weight"][_TOKENS["_"] : _PROMPT_TOKENS] = 0
    weights["audio_head"][:, :, _BINS:] = 0


def _normal(random: np.random.Generator, *shape: int, scale: float) -> Array:
    return random.standard_normal(shape, dtype=np.float32) * np.float32(scale)


def small_mimi_config(codebooks: int = SMALL_CODEBOOKS) -> Any:
    """Return the configuration of a Mimi with narrow layers; scripts' tokens sound as they do with the full-size one."""
    from mlx_audio.codec.models.mimi.mimi import mimi_202407

    config = mimi_202407(codebooks)
    config.seanet.nfilters = 4
    config.seanet.dimension = config.transformer.d_model = 64
    config.transformer.num_layers = 1
    config.transformer.dim_feedforward = 64
    config.quantizer_dim = 16
    return config


def mimi_weights(config: Any = None) -> dict[str, Array]:
    """Return random weights for Mimi, under the names and with the axes of the PyTorch file, float32.

    What the first codebook's tokens sound like is set for the scripts: `_TOKENS`. The decoder has no biases, so silence is exact.

    Args:
        config: A MimiConfig with narrower layers than the one that the library has; None for the latter.
    """
    from mlx.utils import tree_flatten
    from mlx_audio.codec.models.mimi.mimi import Mimi, mimi_202407

    random = np.random.default_rng(3)
    parameters: list[tuple[str, Any]] = tree_flatten(Mimi(config or mimi_202407(CODEBOOKS)).parameters())  # type: ignore[assignment]
    weights = {pytorch_name(name): _mimi_weight(random, name, tuple(value.shape)) for name, value in parameters}
    _write_codebooks(weights, random)
    return weights


def pytorch_name(name: str) -> str:
    """Return mlx-audio's name of a Mimi parameter as the PyTorch file has it (the inverse of `Mimi.load_pytorch_weights`)."""
    for side, sampler, first, shift in (("encoder", "downsample", 1, 2), ("decoder", "upsample", 2, 0)):
        for layer in range(4):
            index = first + 3 * layer
            name = name.replace(f"{side}.layers.{layer}.{sampler}.", f"{side}.model.{index + shift}.")
            name = name.replace(f"{side}.layers.{layer}.residuals.0.", f"{side}.model.{index + 1 - shift // 2}.")
        name = name.replace(f"{side}.init_conv1d.", f"{side}.model.0.").replace(f"{side}.final_conv1d.", f"{side}.model.14.")
    name = name.replace(".block.1.", ".block.3.").replace(".block.0.", ".block.1.")
    name = name.replace(".in_proj.weight", ".in_proj_weight").replace(".gating.linear", ".linear")
    return name.replace(".codebook.initialized", "._codebook._initialized").replace(".codebook.", "._codebook.")


def _mimi_weight(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    """Return one parameter of Mimi; `shape` is mlx-audio's, the result has PyTorch's axes."""
    if name.endswith((".initialized", ".cluster_usage", "norm1.weight", "norm2.weight")):
        return np.ones(shape, np.float32)
    if name.endswith(".scale"):
        return np.full(shape, 1e-4 if name.startswith("decoder") else 0.01, np.float32)
    if name.endswith(".bias"):
        return _normal(random, *shape, scale=0.01 if name.startswith("encoder.") else 0.0)
    fan_in = int(np.prod(shape[1:]))
    weight = _normal(random, *shape, scale=fan_in**-0.5)
    # Numbers of about 1e38 overflow between these two, which is what the NaN tokens need; ordinary ones come out at a speaking level.
    if name == "decoder.init_conv1d.conv.conv.weight":
        weight *= 1000
        weight[:, :-1] = 0  # no memory of earlier frames: silence after sound is silence at once
    if name == "decoder.final_conv1d.conv.conv.weight":
        weight *= 0.1
    if name == "upsample.convtr.convtr.convtr.weight":
        weight[:, weight.shape[1] // 2 :] = 0
    if name.endswith(".convtr.weight"):
        return weight.transpose(0, 2, 1) if shape[2] == 1 else weight.transpose(2, 0, 1)
    return weight.swapaxes(-1, -2) if name.endswith((".conv.weight", "put_proj.weight")) and len(shape) == 3 else weight


def _write_codebooks(weights: dict[str, Array], random: np.random.Generator) -> None:
    """Return sounds for the tokens of `_TOKENS`; a recording, whose vectors are short, is always nearest to one of the short prompt tokens."""
    first = weights["quantizer.rvq_first.vq.layers.0._codebook.embedding_sum"]
    scale = first.shape[1] ** -0.5
    first[:] = _normal(random, *first.shape, scale=scale)
    weights["quantizer.rvq_first.input_proj.weight"] *= 0.01
    first[_PROMPT_TOKENS:] *= 0.1
    silent = first[_TOKENS["_"]].copy()
    first[_TOKENS["_"] : _TOKENS["t"]] = silent
    first[_TOKENS["t"] : _TOKENS["n"]] = first[_TOKENS["t"]].copy()
    first[_TOKENS["n"] : _PROMPT_TOKENS] = 3e38
    # The first codebook and the others cancel each other out in a silent frame.
    weights["quantizer.rvq_rest.output_proj.weight"] = weights["quantizer.rvq_first.output_proj.weight"].copy()
    rest = [name for name in weights if re.fullmatch(r"quantizer\.rvq_rest\.vq\.layers\.\d+\._codebook\.embedding_sum", name)]
    for codebook in range(len(rest)):
        rows = weights[f"quantizer.rvq_rest.vq.layers.{codebook}._codebook.embedding_sum"]
        rows[:] = _normal(random, *rows.shape, scale=0.3 * scale)
        rows[_SILENT_TOKEN] = -silent if codebook == 0 else 0
