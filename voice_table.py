"""The voices as a table for a person at a terminal."""

from __future__ import annotations

from typing import Any

from config import Settings
from speech_server import SpeechServer
from voice_presets import OPENAI_VOICES, VoicePresetManager
from voice_store import VoiceStore


def voice_table(server: SpeechServer | None, settings: Settings) -> str:
    """A line a voice: its name, its model, whether the server can speak with it now, its description and its other names.

    Args:
        server: Whose voices; None for those of the settings, of which nobody knows yet whether they can speak.
        settings: The settings.

    Raises:
        TTSError: The server refuses, or does not answer.
    """
    rows = [_row(voice) for voice in (_own_voices(settings) if server is None else server.voices())]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows)


def _row(voice: dict[str, Any]) -> tuple[str, ...]:
    ready = "" if "ready" not in voice else "ready" if voice["ready"] else "not ready"
    names = voice.get("aliases", ())
    if set(OPENAI_VOICES) <= set(names):
        names = [*(name for name in names if name not in OPENAI_VOICES), "OpenAI's names"]
    aliases = ", ".join(names)
    about = f"{voice.get('description') or ''}{f' (also {aliases})' if aliases else ''}".strip()
    name = voice["name"] if voice["name"] == voice["id"] else f"{voice['name']} ({voice['id']})"
    return name, voice.get("model", ""), ready, " ".join(about.split())


def _own_voices(settings: Settings) -> list[dict[str, Any]]:
    presets = VoicePresetManager(settings.presets_dir, settings.default_voice, VoiceStore(settings.cache_dir / "voices"))
    return [
        {
            "id": voice.id,
            "name": voice.name,
            "model": voice.preset.model,
            "description": voice.preset.description,
            "aliases": presets.aliases_of(voice.id),
        }
        for voice in presets.voices()
    ]
