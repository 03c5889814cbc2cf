"""CSM-1B as a speech model: load, describe, unload. csm_generation does the speaking."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from audio_formats import SAMPLE_RATE, Samples
from config import Settings
from csm_files import ModelFiles, find_model
from speech_model import Codes, LoadProgress, ModelLoadError, SegmentChunk, SegmentLengths, SpeechOptions
from voice_presets import Voice

if TYPE_CHECKING:
    from csm_generation import CsmSpeaker

logger = logging.getLogger(__name__)

_LONGEST_SEGMENT = 400  # characters; users report garbage beyond a sentence or two, and good results from 280 to 400
_FIRST_SEGMENT = 120


class CsmModel:
    """CSM-1B through mlx-audio. Call all methods but `info` on one thread, from `load` to `close`: MLX's streams belong to a thread.

    MLX, mlx-audio and transformers are imported by `load`, not with this module.
    """

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
        with _import_errors():
            import mlx.core as mx

            import csm_generation  # noqa: F401 - fails here if MLX does not run on this machine

            self._memory = lambda: {
                "memory_gb": round(mx.get_active_memory() / 1e9, 3),
                "peak_memory_gb": round(mx.get_peak_memory() / 1e9, 3),
            }
        self._files = files
        self._build(files, self._settings.model_dtype, files.note, report)

    def _build(self, files: ModelFiles, dtype: str, note: str | None, report: Callable[[LoadProgress], None]) -> None:
        import csm_network
        from csm_generation import CsmSpeaker
        from csm_prompts import PromptStore

        network = csm_network.build(files, dtype, self._settings.model_compile, report)
        self._speaker = CsmSpeaker(network, PromptStore(network, self._settings, files.prompts), self._settings, self._faults)
        self._release = csm_network.reserve_memory()
        info: dict[str, Any] = {
            "source": files.source,
            "dtype": csm_network.precision(network),
            "parameters": csm_network.parameters(network),
            "watermark": network.watermarks,
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


@contextlib.contextmanager
def _import_errors() -> Iterator[None]:
    """Turn an ImportError into a ModelLoadError: MLX raises one where it has no backend for this machine."""
    try:
        yield
    except ImportError as error:
        raise ModelLoadError(
            f"MLX or mlx-audio cannot be imported ({error.name or type(error).__name__}): install the pinned packages again with `make setup`.",
            retry=False,
        ) from error
