"""CSM-1B as a speech model: load, describe, unload. csm_generation does the speaking.

Importing this module imports neither MLX nor mlx-audio, which takes seconds and fails where MLX has no backend: the functions that need them do.
The network is mlx-audio's, built from local files without a request to the hub and without a second copy of the weights.
"""

from __future__ import annotations

import gc
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from audio_formats import SAMPLE_RATE, Samples
from config import Settings
from csm_files import MIMI_REPO, TOKENIZER_REPO, ModelFiles, find_model
from speech_model import Codes, LoadProgress, ModelLoadError, SegmentChunk, SegmentLengths, SpeechOptions
from voice_presets import Voice

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx_audio.codec.models.mimi.mimi import Mimi
    from mlx_audio.tts.models.sesame import sesame

    from csm_generation import CsmSpeaker

logger = logging.getLogger(__name__)

_LONGEST_SEGMENT = 400  # characters; users report garbage beyond a sentence or two, and good results from 280 to 400
_FIRST_SEGMENT = 120

_CODEBOOKS = 32
_MOST_CACHE = 1 << 30  # bytes of freed buffers that MLX keeps during a request
_WIRED_BESIDES = 1 << 30  # bytes besides the weights: the caches of a batch, the codec's blocks


class CsmModel:
    """CSM-1B through mlx-audio. Call all methods but `info` on one thread, from `load` to `close`: MLX's streams belong to a thread."""

    id = "csm-1b"
    sample_rate = SAMPLE_RATE
    takes_phonemes = False
    takes_turns = False  # the codec has one state, and segments are generated side by side
    takes_context = True

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.segment_lengths = SegmentLengths(
            target=settings.group_characters, maximum=_LONGEST_SEGMENT, first=min(_FIRST_SEGMENT, settings.group_characters)
        )
        self._speaker: CsmSpeaker | None = None
        self._files: ModelFiles | None = None
        self._release: Callable[[], None] = lambda: None
        self._info: dict[str, Any] = {}
        self._faults: Counter[str] = Counter()
        self._memory: Callable[[], dict[str, float]] = dict

    def load(self, report: Callable[[LoadProgress], None]) -> None:
        """Download the files that are missing, and load the model.

        Raises:
            ModelLoadError: With what failed and what to do.
        """
        # Before tqdm is imported: mlx-audio 0.6.2 and the hub's library draw progress bars on stderr.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        files = find_model(self._settings.model_id, report)
        report(LoadProgress("starting MLX"))
        try:
            import mlx.core as mx

            import csm_generation  # noqa: F401 - fails here if MLX does not run on this machine
        except ImportError as error:
            raise ModelLoadError(
                f"MLX or mlx-audio cannot be imported ({error.name or type(error).__name__}): install the pinned packages again with `make setup`.",
                retry=False,
            ) from error
        self._memory = lambda: {
            "memory_gb": round(mx.get_active_memory() / 1e9, 3),
            "peak_memory_gb": round(mx.get_peak_memory() / 1e9, 3),
        }
        self._files = files
        self._build(files, self._settings.model_dtype, files.note, report)

    def _build(self, files: ModelFiles, dtype: str, note: str | None, report: Callable[[LoadProgress], None]) -> None:
        from csm_generation import CsmSpeaker
        from csm_prompts import PromptStore

        network = build(files, dtype, self._settings.model_compile, report)
        self._speaker = CsmSpeaker(network, PromptStore(network, self._settings, files.prompts), self._settings, self._faults)
        self._release = reserve_memory()
        info: dict[str, Any] = {
            "source": files.source,
            "dtype": precision(network),
            "parameters": _parameters(network),
            "watermark": network._watermarker is not None and network._watermark_key is not None,
        }
        self._info = info | ({"note": note} if note else {})
        logger.info("model %s: %s, %s, %.2f G parameters", self.id, info["source"], info["dtype"], info["parameters"] / 1e9)

    def warm_up(self, voices: Sequence[Voice]) -> None:
        """Encode the voices' prompts and generate a few frames, so that the first request does not wait for it.

        In float16, numbers over 65,504 are infinite. If that happens here, the weights are loaded again in bfloat16.
        """
        if self._loaded().warm_up(voices, checked=self._info["dtype"] == "float16") or self._files is None:
            return
        note = "these weights give infinite numbers in float16, so they are in bfloat16"
        logger.warning("model %s: %s", self.id, note)
        files = self._files
        self.close()
        self._build(files, "bfloat16", f"{files.note}; {note}" if files.note else note, lambda _: None)
        self._loaded().warm_up(voices)

    def refusal(self, text: str) -> str | None:
        """Return None: the tokenizer takes any text, and the quality checks judge the result."""
        return None

    def unavailable(self, voice: Voice) -> str | None:
        """Return None: a voice of CSM is a recording, which is there when the voice is listed."""
        return None

    def fits(self, text: str, voice: Voice) -> bool:
        """Return whether `text`, after this voice's prompt, fits into the model's context."""
        return self._loaded().fits(text, voice)

    def speak(self, segments: Sequence[str], voice: Voice, options: SpeechOptions, cancelled: Callable[[], bool]) -> Iterator[SegmentChunk]:
        """Speak the segments, as `SpeechModel.speak`."""
        return self._loaded().speak(segments, voice, options, cancelled)

    def encode(self, samples: Samples) -> Codes:
        """Return the codec tokens of a recording at 24 kHz."""
        return self._loaded().encode(samples)

    def info(self) -> dict[str, Any]:
        """Return the model's part of `/health`; memory in GB (1e9 bytes), all that MLX holds. The faults of its speech are for the metrics."""
        info = self._info
        base = {
            "loaded": bool(info),
            "model_id": self._settings.model_id,
            "sample_rate": self.sample_rate,
            "watermark": False,
            "faults": dict(self._faults),
        }
        return base | info | (self._memory() if info else {})

    def close(self) -> None:
        """Free the memory; `load` may be called again."""
        loaded = self._speaker is not None
        self._speaker = self._files = None
        self._release()
        self._release = lambda: None
        self._info = {}
        gc.collect()  # modules and their caches refer to one another
        if loaded:
            import mlx.core as mx

            mx.clear_cache()
            mx.reset_peak_memory()

    def _loaded(self) -> CsmSpeaker:
        if self._speaker is None:
            raise RuntimeError("CSM is not loaded")
        return self._speaker


# --- The network ---


def build(files: ModelFiles, dtype: str, compiled: str, report: Callable[[LoadProgress], None]) -> sesame.Model:
    """Return the network with its weights, all in memory.

    Args:
        files: From `find_model`.
        dtype: The type of the weights: "bfloat16", "float16", "float32", or "auto" for the file's own. Quantized ones stay as they are.
        compiled: Whether frames are compiled: "on", "off", or "auto" for only where MLX computes on a GPU.
        report: Called with the progress.

    Raises:
        ModelLoadError: The files are not those of CSM-1B, or memory is short.
    """
    import mlx.core as mx
    from mlx_audio.utils import apply_quantization

    report(LoadProgress("reading the codec and the tokenizer"))
    try:
        model = _unfilled(files, compiled=compiled == "on" or (compiled == "auto" and mx.default_device() != mx.Device(mx.cpu)))
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


def _unfilled(files: ModelFiles, *, compiled: bool) -> sesame.Model:
    """Return mlx-audio's model before its weights are read.

    Its own constructor (mlx-audio 0.6.2) asks the hub for the codec and the tokenizer even if both are in the cache, so it is not called.
    """
    import mlx.nn as nn
    from mlx_audio.codec.models.mimi import MimiStreamingDecoder
    from mlx_audio.tts.models.sesame import sesame

    from csm_layers import FrameNetwork

    model = sesame.Model.__new__(sesame.Model)
    nn.Module.__init__(model)  # type: ignore[attr-defined]  # mlx's stubs lack it
    model.model = FrameNetwork(files.config, compiled=compiled)
    model._frame_size = model.model.args.audio_num_codebooks + 1
    model._speaker_prefix_space = bool(files.config.get("speaker_prefix_space", False))
    model._watermark_key = files.config.get("watermark_key", sesame.CSM_1B_GH_WATERMARK)
    model._use_default_voice_prompt = True
    model._default_voice_match = True
    model.tokenizer_repo = None
    model._text_tokenizer = _tokenizer(files)
    model._audio_tokenizer = _mimi(files)
    model._streaming_decoder = MimiStreamingDecoder(model._audio_tokenizer)
    model._watermarker = _watermarker()
    model._sample_rate = model._audio_tokenizer.cfg.sample_rate
    return model


def reserve_memory() -> Callable[[], None]:
    """Keep what MLX holds now in memory, and limit what it keeps for later; return a function that undoes both.

    macOS may compress or page out what a GPU has not used for a while; MLX holds on to it only if told so (macOS 15 and later).
    """
    import mlx.core as mx

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


def _parameters(model: sesame.Model) -> int:
    """Return the number of CSM's parameters (1.55 G for CSM-1B), without the codec's."""
    import mlx.core as mx

    modules = dict(model.named_modules())
    count = 0
    for name, value in _flat(model).items():
        if value.dtype == mx.uint32:  # quantized: as many as fit into 32 bits
            count += value.size * 32 // modules[name.rpartition(".")[0]].bits
        elif not name.endswith((".scales", ".biases")):
            count += value.size
    return count


def precision(model: sesame.Model) -> str:
    """Return the type of the weights, such as "bfloat16" or "8-bit"."""
    head = model.model.codebook0_head
    return f"{head.bits}-bit" if hasattr(head, "bits") else str(head.weight.dtype).rpartition(".")[2]


def _flat(model: sesame.Model) -> dict[str, mx.array]:
    from mlx.utils import tree_flatten

    flat: list[tuple[str, Any]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    return dict(flat)


def _open_weights(files: ModelFiles) -> dict[str, mx.array]:
    """Return the tensors of all files; MLX reads each when it is first used."""
    import mlx.core as mx

    weights: dict[str, mx.array] = {}
    for path in files.weights:
        try:
            weights.update(mx.load(str(path)))  # type: ignore[arg-type]  # a safetensors file always gives a dict
        except RuntimeError as error:
            raise ModelLoadError(f"{path.name} of {files.source} cannot be read: {_first_line(error)}", retry=False) from error
    return weights


def _check_names(model: sesame.Model, weights: dict[str, mx.array], source: str) -> None:
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


def _read_into(model: sesame.Model, weights: dict[str, mx.array], dtype: mx.Dtype | None, report: Callable[[LoadProgress], None]) -> None:
    """Read and convert tensor by tensor, so that memory never has a second copy in the file's own precision.

    mlx-audio 0.6.2 reads all tensors as they are in the file; a conversion after that needs both copies in memory.
    """
    import mlx.core as mx

    total, done = sum(value.nbytes for value in weights.values()), 0
    for name in sorted(weights):
        value = weights.pop(name)
        size = value.nbytes
        if dtype is not None and value.dtype in (mx.float32, mx.float16, mx.bfloat16):
            value = value.astype(dtype)
        mx.eval(value)
        model.load_weights([(name, value)], strict=False)
        mx.clear_cache()
        done += size
        report(LoadProgress("reading the weights", done, total))


def _tokenizer(files: ModelFiles) -> object:
    from mlx_audio.tts.models.sesame import sesame

    try:
        return sesame.load_llama3_tokenizer(str(files.tokenizer))
    except Exception as error:  # transformers raises many kinds of errors on a bad file
        raise ModelLoadError(
            f"The tokenizer of {TOKENIZER_REPO} cannot be read ({type(error).__name__}): remove it from Hugging Face's cache.", retry=False
        ) from error


def _mimi(files: ModelFiles) -> Mimi:
    import mlx.core as mx
    from mlx_audio.codec.models.mimi.mimi import Mimi, mimi_202407

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
    from mlx_audio.tts.models.sesame import sesame

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
