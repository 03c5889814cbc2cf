"""The engine of the server, in this process: loads the voice's model and speaks, without any server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from types import TracebackType

import numpy as np

from captions import captions_of
from config import Settings
from model_host import ModelHost
from reading import Part
from speech_model import SpeechOptions
from tts_engine import TTSEngine
from voice_presets import VoicePresetManager
from voice_store import VoiceStore

_POLL_SECONDS = 0.2


class LocalSpeaker:
    """Speaks with the engine. An async context manager: the model is loaded inside it.

    Args:
        settings: The settings.
        voice: A voice's name or alias.
        tell: Takes a line about the load, "" when it is over.
        streamed: Somebody listens while the sound is made.

    Raises:
        InvalidVoiceError: Lists the voices there are.
    """

    def __init__(self, settings: Settings, voice: str, tell: Callable[[str], None], *, streamed: bool) -> None:
        presets = VoicePresetManager(settings.presets_dir, settings.default_voice, VoiceStore(settings.cache_dir / "voices"))
        self._voice = presets.resolve(voice)
        self.voice = self._voice.id
        self.model: str = self._voice.preset.model
        if self.model == "hibari":
            settings = settings.model_copy(update={"csm": "off"})  # 6 GB that nobody asked for stay where they are
        self._engine = TTSEngine(settings, presets)
        self._host: ModelHost = self._engine.host(self._voice)
        self.sample_rate = self._host.model.sample_rate
        self._tell = tell
        self._streamed = streamed

    async def __aenter__(self) -> LocalSpeaker:
        """Load the voice's model.

        Raises:
            ModelNotReadyError: It cannot be loaded; says why.
        """
        try:
            await self._engine.start()
            await self._loaded()
            self._engine.check_ready(self._voice)
        except BaseException:
            await self._engine.close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._engine.close()

    async def speak(self, text: str, seed: int) -> AsyncGenerator[Part, None]:
        """Say `text`.

        Raises:
            TTSError: The engine failed.
        """
        utterance = self._engine.speak(text, self._voice, SpeechOptions(seed, streamed=self._streamed))
        told = 0
        try:
            async for samples in utterance:
                marks = list(utterance.marks)
                yield Part(samples, tuple(captions_of(utterance.groups, marks[told:], 1.0)))
                told = len(marks)
            yield Part(np.zeros(0, np.float32), tuple(captions_of(utterance.groups, utterance.marks[told:], 1.0)))
        finally:
            await utterance.aclose()

    async def _loaded(self) -> None:
        """Wait until it is known whether the model can speak, telling how far the load is."""
        while self._host.state == "loading":
            progress = self._host.progress
            stage = progress.stage if progress else "starting"
            share = f" {progress.done / progress.total:.0%}" if progress and progress.done is not None and progress.total else ""
            self._tell(f"loading {self.model}: {stage}{share}")
            await asyncio.sleep(_POLL_SECONDS)
        self._tell("")
