"""Builds mlx-audio's CSM network from local files: without a request to the hub, without a second copy of the weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_audio.codec.models.mimi import MimiStreamingDecoder
from mlx_audio.codec.models.mimi.mimi import Mimi, mimi_202407
from mlx_audio.tts.models.sesame import sesame
from mlx_audio.utils import apply_quantization

from csm_files import MIMI_REPO, TOKENIZER_REPO, ModelFiles
from csm_layers import FrameNetwork
from speech_model import LoadProgress, ModelLoadError

logger = logging.getLogger(__name__)

_CODEBOOKS = 32
_MOST_CACHE = 1 << 30  # bytes of freed buffers that MLX keeps during a request
_WIRED_BESIDES = 1 << 30  # bytes besides the weights: the caches of a batch, the codec's blocks
_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


class LocalCsm(sesame.Model):  # type: ignore[misc]  # mlx-audio has no types
    """mlx-audio's model with a constructor that makes no request to the hub.

    The stock constructor (mlx-audio 0.6.2) asks the hub for the codec and the tokenizer even if both are in the cache. Everything else is
    inherited.
    """

    def __init__(self, files: ModelFiles, *, compiled: bool) -> None:
        nn.Module.__init__(self)  # type: ignore[attr-defined]  # mlx's stubs lack it
        self.model = FrameNetwork(files.config, compiled=compiled)
        self._frame_size = self.model.args.audio_num_codebooks + 1
        self._speaker_prefix_space = bool(files.config.get("speaker_prefix_space", False))
        self._watermark_key = files.config.get("watermark_key", sesame.CSM_1B_GH_WATERMARK)
        self._use_default_voice_prompt = True
        self._default_voice_match = True
        self.tokenizer_repo = None
        self._text_tokenizer = _tokenizer(files)
        self._audio_tokenizer = _mimi(files)
        self._streaming_decoder = MimiStreamingDecoder(self._audio_tokenizer)
        self._watermarker = _watermarker()
        self._sample_rate = self._audio_tokenizer.cfg.sample_rate

    @property
    def watermarks(self) -> bool:
        """Return whether its speech gets a watermark."""
        return self._watermarker is not None and self._watermark_key is not None


def build(files: ModelFiles, dtype: str, compiled: str, report: Callable[[LoadProgress], None]) -> LocalCsm:
    """Return the network with its weights, all in memory.

    Args:
        files: From `find_model`.
        dtype: The type of the weights: "bfloat16", "float16", "float32", or "auto" for the file's own. Quantized ones stay as they are.
        compiled: Whether frames are compiled: "on", "off", or "auto" for only where MLX computes on a GPU.
        report: Called with the progress.

    Raises:
        ModelLoadError: The files are not those of CSM-1B, or memory is short.
    """
    report(LoadProgress("reading the codec and the tokenizer"))
    try:
        model = LocalCsm(files, compiled=compiled == "on" or (compiled == "auto" and mx.default_device() != mx.Device(mx.cpu)))
    except (TypeError, AttributeError, KeyError) as error:
        raise ModelLoadError(
            f"config.json of {files.source} does not describe a CSM that mlx-audio can build ({error}).", retry=False
        ) from error
    weights = model.sanitize(_open_weights(files))
    quantized = "quantization" in files.config or "quantization_config" in files.config
    try:
        if quantized:
            apply_quantization(model, files.config, weights, model.model_quant_predicate)
        _check_names(model, weights, files.source)
        _read_into(model, weights, None if quantized or dtype == "auto" else getattr(mx, dtype), report)
        model.model.join_layers()
    except RuntimeError as error:  # MLX's own: out of memory, or a file that cannot be read
        raise ModelLoadError(f"The weights of {files.source} could not be read into memory: {_first_line(error)}") from error
    model.eval()
    return model


def reserve_memory() -> Callable[[], None]:
    """Keep what MLX holds now in memory, and limit what it keeps for later; return a function that undoes both.

    macOS may compress or page out what a GPU has not used for a while; MLX holds on to it only if told so (macOS 15 and later).
    """
    undo = [partial(mx.set_cache_limit, mx.set_cache_limit(_MOST_CACHE))]
    recommended = mx.device_info().get("max_recommended_working_set_size")
    if isinstance(recommended, int):  # on Metal only
        limit = min(recommended, mx.get_active_memory() + _WIRED_BESIDES)
        try:
            undo.append(partial(mx.set_wired_limit, mx.set_wired_limit(limit)))
        except (ValueError, RuntimeError) as error:
            logger.warning("CSM's weights cannot be kept in memory, so the first answer after a pause may be slow: %s", _first_line(error))

    def release() -> None:
        for step in undo:
            step()

    return release


def parameters(model: LocalCsm) -> int:
    """Return the number of CSM's parameters (1.55 G for CSM-1B), without the codec's."""
    modules = dict(model.named_modules())
    count = 0
    for name, value in _flat(model).items():
        if value.dtype == mx.uint32:  # quantized: as many as fit into 32 bits
            count += value.size * 32 // modules[name.rpartition(".")[0]].bits
        elif not name.endswith((".scales", ".biases")):
            count += value.size
    return count


def precision(model: LocalCsm) -> str:
    """Return the type of the weights, such as "bfloat16" or "8-bit"."""
    head = model.model.codebook0_head
    return f"{head.bits}-bit" if hasattr(head, "bits") else str(head.weight.dtype).rpartition(".")[2]


def _flat(model: LocalCsm) -> dict[str, mx.array]:
    parameters: list[tuple[str, Any]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    return dict(parameters)


def _open_weights(files: ModelFiles) -> dict[str, mx.array]:
    """Return the tensors of all files; MLX reads each when it is first used."""
    weights: dict[str, mx.array] = {}
    for path in files.weights:
        try:
            weights.update(mx.load(str(path)))  # type: ignore[arg-type]  # a safetensors file always gives a dict
        except RuntimeError as error:
            raise ModelLoadError(f"{path.name} of {files.source} cannot be read: {_first_line(error)}", retry=False) from error
    return weights


def _check_names(model: LocalCsm, weights: dict[str, mx.array], source: str) -> None:
    """Raise if the weights are not exactly the network's, before gigabytes are read."""
    expected = _flat(model)
    unknown, missing = sorted(weights.keys() - expected.keys()), sorted(expected.keys() - weights.keys())
    wrong = [name for name in sorted(weights.keys() & expected.keys()) if weights[name].shape != expected[name].shape]
    for what, names in (("unknown", unknown), ("missing", missing), ("of another shape", wrong)):
        if names:
            raise ModelLoadError(
                f"{source} is not a CSM-1B checkpoint that mlx-audio can read: {len(names)} tensors are {what}, {names[0]} for one. "
                "Copies in the layout of transformers do not load; sesame/csm-1b and the mlx-community ones do.",
                retry=False,
            )


def _read_into(model: LocalCsm, weights: dict[str, mx.array], dtype: mx.Dtype | None, report: Callable[[LoadProgress], None]) -> None:
    """Read and convert tensor by tensor, so that memory never has a second copy in the file's own precision.

    mlx-audio 0.6.2 reads all tensors as they are in the file; a conversion after that needs both copies in memory.
    """
    total, done = sum(value.nbytes for value in weights.values()), 0
    for name in sorted(weights):
        value = weights.pop(name)
        size = value.nbytes
        if dtype is not None and value.dtype in _FLOATS:
            value = value.astype(dtype)
        mx.eval(value)
        model.load_weights([(name, value)], strict=False)
        mx.clear_cache()
        done += size
        report(LoadProgress("reading the weights", done, total))


def _tokenizer(files: ModelFiles) -> object:
    try:
        return sesame.load_llama3_tokenizer(str(files.tokenizer))
    except Exception as error:  # transformers raises many kinds of errors on a bad file
        raise ModelLoadError(
            f"The tokenizer of {TOKENIZER_REPO} cannot be read ({type(error).__name__}): remove it from Hugging Face's cache.", retry=False
        ) from error


def _mimi(files: ModelFiles) -> Mimi:
    mimi = Mimi(mimi_202407(_CODEBOOKS))
    try:
        mimi.load_pytorch_weights(str(files.mimi), strict=True)
        mx.eval(mimi.parameters())
    except (ValueError, RuntimeError) as error:
        raise ModelLoadError(
            f"{files.mimi.name} of {MIMI_REPO} cannot be read ({_first_line(error)}): remove it from Hugging Face's cache.", retry=False
        ) from error
    mimi.eval()
    return mimi


def _watermarker() -> object | None:
    """Return mlx-audio's watermarker if silentcipher is installed (it needs PyTorch; a normal installation has neither), else None."""
    if sesame.load_watermarker is None:
        return None
    try:
        watermarker: object = sesame.load_watermarker()
        return watermarker
    except Exception as error:  # its weights come from the network
        logger.warning("silentcipher is installed but cannot be loaded (%s): no watermark is applied", type(error).__name__)
        return None


def _first_line(error: Exception) -> str:
    """Return an MLX message, shortened and without paths."""
    words = str(error).strip().partition("\n")[0].split()
    return " ".join("…" if "/" in word else word for word in words)[:200]
