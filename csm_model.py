"""CSM-1B, as a speech model: loaded, described and let go here; what it says is csm_generation's work."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from config import Settings
from csm_files import find_model
from speech_model import LoadProgress, ModelLoadError, SegmentChunk, SegmentLengths, SpeechOptions
from voice_presets import Voice

if TYPE_CHECKING:
    from csm_generation import CsmSpeaker

logger = logging.getLogger(__name__)

_SAMPLE_RATE = 24_000  # Mimi's
_LONGEST_SEGMENT = 400  # characters; users report garbage beyond a sentence or two, and good results from 280 to 400
_FIRST_SEGMENT = 120


class CsmModel:
    """CSM-1B through mlx-audio. All but `info` belongs to one thread, from `load` to `close`: MLX's streams are a thread's own.

    Importing this module imports neither MLX nor mlx-audio nor transformers: they are imported by `load`.
    """

    id = "csm-1b"
    sample_rate = _SAMPLE_RATE

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.segment_lengths = SegmentLengths(
            target=settings.group_characters, maximum=_LONGEST_SEGMENT, first=min(_FIRST_SEGMENT, settings.group_characters)
        )
        self._speaker: CsmSpeaker | None = None
        self._facts: dict[str, Any] = {}
        self._memory: Callable[[], dict[str, float]] = dict

    def load(self, report: Callable[[LoadProgress], None]) -> None:
        """Fetch what is missing, read it, and be ready to speak.

        Raises:
            ModelLoadError: With what failed and what to do.
        """
        # Before anything imports tqdm: mlx-audio 0.6.2 and the hub's library write bars to stderr.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        files = find_model(self._settings.model_id, report)
        report(LoadProgress("starting MLX"))
        with _import_errors():
            import mlx.core as mx

            import csm_network
            from csm_generation import CsmSpeaker
            from csm_prompts import PromptStore

            self._memory = lambda: {
                "memory_gb": round(mx.get_active_memory() / 1e9, 3),
                "peak_memory_gb": round(mx.get_peak_memory() / 1e9, 3),
            }
        network = csm_network.build(files, self._settings.model_dtype, report)
        self._speaker = CsmSpeaker(network, PromptStore(network, self._settings, files.prompts), self._settings)
        facts: dict[str, Any] = {
            "source": files.source,
            "dtype": csm_network.precision(network),
            "parameters": csm_network.parameters(network),
            "watermark": network.watermarks,
        }
        self._facts = facts | ({"note": files.note} if files.note else {})
        logger.info("model %s: %s, %s, %.2f G parameters", self.id, facts["source"], facts["dtype"], facts["parameters"] / 1e9)

    def warm_up(self, voices: Sequence[Voice]) -> None:
        """Encode the voices' prompts and say a few frames, so that no caller waits for that."""
        self._loaded().warm_up(voices)

    def refusal(self, text: str) -> str | None:
        """Nothing: its tokenizer takes any text, and what becomes of it is for the guard to judge."""
        return None

    def fits(self, text: str, voice: Voice) -> bool:
        """Whether `text`, behind this voice's prompt, fits into the model's context."""
        return self._loaded().fits(text, voice)

    def speak(self, segments: Sequence[str], voice: Voice, options: SpeechOptions, cancelled: Callable[[], bool]) -> Iterator[SegmentChunk]:
        """Say each segment in turn, as `SpeechModel.speak`."""
        return self._loaded().speak(segments, voice, options, cancelled)

    def info(self) -> dict[str, Any]:
        """Facts for `/health`; memory in GB (1e9 bytes), of all that MLX holds. Before a load only what MODEL_ID asks for."""
        facts = self._facts
        base = {"loaded": bool(facts), "model_id": self._settings.model_id, "sample_rate": self.sample_rate, "watermark": False}
        return base | facts | (self._memory() if facts else {})

    def close(self) -> None:
        """Give the memory back; `load` may be called again."""
        loaded = self._speaker is not None
        self._speaker = None
        self._facts = {}
        gc.collect()  # modules and their caches refer to one another
        if loaded:
            import mlx.core as mx

            mx.clear_cache()
            mx.reset_peak_memory()

    def _loaded(self) -> CsmSpeaker:
        if self._speaker is None:
            raise RuntimeError("CSM is asked to speak before it is loaded")
        return self._speaker


@contextlib.contextmanager
def _import_errors() -> Iterator[None]:
    """MLX without a backend for this machine is an ImportError deep inside it."""
    try:
        yield
    except ImportError as error:
        raise ModelLoadError(
            f"MLX or mlx-audio cannot be imported ({error.name or type(error).__name__}): install the pinned packages again with `make setup`.",
            retry=False,
        ) from error
