"""Voice presets: JSON files in a folder, checked one by one, read again whenever the folder changes."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from errors import InvalidVoiceError, shorten

logger = logging.getLogger(__name__)

ModelId = Literal["csm-1b", "hibari"]

# The voices that OpenAI's API and its clients name (OpenClaw's list, November 2026).
OPENAI_VOICES: tuple[str, ...] = (
    *("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable"),
    *("juniper", "marin", "nova", "onyx", "sage", "shimmer", "verse"),
)

# The voice prompts in the CSM repository's prompts/ folder that mlx-audio knows the words of; see csm_prompts.py.
CSM_VOICE_KEYS = ("conversational_a", "conversational_b")
HIBARI_VOICE_KEYS = ("heart",)

_MAX_PRESET_BYTES = 64 * 1024

_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class VoicePreset(BaseModel):
    """One voice: the user's fields (TRD 3.4), and optional ones with mlx-audio's names.

    Attributes:
        name: What a request calls it.
        model: Which model speaks it.
        voice_key: A voice prompt that the model brings along.
        speaker_id: CSM's speaker number.
        temperature: Of the sampler.
        top_k: Of the sampler.
        max_audio_length_ms: No sentence group becomes longer than this.
        description: For people.
        speaker_embedding_path: Reserved by the user's document; must stay empty.
        ref_audio: A recording to clone, relative to the preset's folder.
        ref_text: What is said in it, word for word.
        voice_match: CSM's way to prompt: the recording's text and the new text as one segment.
        aliases: Other names that reach this voice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: _Name
    model: ModelId = "csm-1b"
    voice_key: str | None = None
    speaker_id: int = Field(0, ge=0, le=9)
    temperature: float = Field(0.9, ge=0.0, le=2.0)
    top_k: int = Field(50, ge=1, le=2051)
    max_audio_length_ms: float = Field(90_000, ge=80, le=90_000)
    description: str = Field("", max_length=500)
    speaker_embedding_path: None = None
    ref_audio: str | None = None
    ref_text: str | None = Field(None, max_length=2000)
    voice_match: bool = True
    aliases: tuple[_Name, ...] = ()

    @model_validator(mode="after")
    def _one_source_of_voice(self) -> VoicePreset:
        if self.model == "hibari":
            _require(self.ref_audio is None, "ref_audio", "is for CSM voices; hibari speaks only the voice in its package")
            _require_key(self.voice_key, HIBARI_VOICE_KEYS)
        elif self.ref_audio is None:
            _require(self.ref_text is None, "ref_text", "is given without ref_audio")
            _require_key(self.voice_key, CSM_VOICE_KEYS)
        else:
            _require(self.voice_key is None, "voice_key", "and ref_audio exclude one another: keep one")
            _require(bool(self.ref_text and self.ref_text.strip()), "ref_text", "must hold the words of ref_audio, exactly as spoken")
        return self


def _require(condition: bool, key: str, fault: str) -> None:
    if not condition:
        raise ValueError(f"{key} {fault}")


def _require_key(value: str | None, choices: tuple[str, ...]) -> None:
    _require(value in choices, "voice_key", f"is {shorten(value)}; known voices: {', '.join(choices)} (or give ref_audio and ref_text)")


@dataclass(frozen=True)
class Voice:
    """A preset and where it came from.

    Attributes:
        preset: The checked preset.
        folder: The preset file's folder: `ref_audio` is relative to it.
        uploaded: Somebody sent this voice; it is not a file of the owner's.
    """

    preset: VoicePreset
    folder: Path
    uploaded: bool = False


@dataclass(frozen=True)
class SkippedPreset:
    """A preset file that could not be used, and why."""

    file: str
    reason: str


@dataclass
class _Catalogue:
    voices: dict[str, Voice] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    skipped: list[SkippedPreset] = field(default_factory=list)


class VoicePresetManager:
    """The voices there are, by name and alias.

    Args:
        presets_dir: The folder of the preset files.
        default_voice: The preset that OpenAI's voice names reach unless another preset claims them.
    """

    def __init__(self, presets_dir: Path, default_voice: str) -> None:
        self._presets_dir = presets_dir
        self._default_voice = default_voice
        self._catalogue = _Catalogue()
        self._signature: object = ()

    def refresh(self) -> None:
        """Read the folder again if a file in it was added, changed or removed since the last time."""
        signature = _signature(self._presets_dir)
        if signature != self._signature:
            self._catalogue = self._read()
            self._signature = signature

    def resolve(self, name: str) -> Voice:
        """The voice that `name`, a preset's name or an alias, stands for.

        Raises:
            InvalidVoiceError: There is none; the message lists the voices.
        """
        self.refresh()
        voices = self._catalogue.voices
        target = name if name in voices else self._catalogue.aliases.get(name)
        if target is None and name in OPENAI_VOICES:
            target = self._default_voice
        if target is None or target not in voices:
            raise InvalidVoiceError(
                f"Voice {shorten(name)} not found. Available voices: {', '.join(self.names()) or 'none'}.", param="voice"
            )
        return voices[target]

    def names(self) -> list[str]:
        """The voices' names, sorted."""
        self.refresh()
        return sorted(self._catalogue.voices)

    def voices(self) -> list[Voice]:
        """The voices, sorted by name."""
        self.refresh()
        return [self._catalogue.voices[name] for name in sorted(self._catalogue.voices)]

    def aliases_of(self, name: str) -> list[str]:
        """The other names that reach the voice `name`, OpenAI's among them."""
        claimed = self._catalogue.aliases
        own = {alias for alias, target in claimed.items() if target == name}
        if name == self._default_voice:
            own |= {alias for alias in OPENAI_VOICES if alias not in claimed and alias not in self._catalogue.voices}
        return sorted(own)

    def skipped(self) -> list[SkippedPreset]:
        """The preset files that could not be used."""
        self.refresh()
        return self._catalogue.skipped

    def _read(self) -> _Catalogue:
        catalogue = _Catalogue()
        for path in sorted(self._presets_dir.glob("*.json")):
            try:
                voice = Voice(_read_preset(path), path.parent)
                _add(catalogue, voice)
            except ValueError as error:
                catalogue.skipped.append(SkippedPreset(path.name, str(error)))
                logger.warning("preset %s is skipped: %s", path.name, error)
        if not catalogue.voices:
            logger.warning("no usable preset in %s", self._presets_dir)
        return catalogue


def _signature(folder: Path) -> object:
    """What changes when a preset, or a recording beside one, does: names, sizes, times of last change, inodes."""
    try:
        with os.scandir(folder) as entries:
            stats = [(entry.name, entry.stat()) for entry in entries]
    except OSError:  # the folder, or a file in it, was removed while it was read
        return None
    return sorted((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)


def _add(catalogue: _Catalogue, voice: Voice) -> None:
    """Put a voice among the others.

    Raises:
        ValueError: Its name or an alias is taken.
    """
    preset = voice.preset
    if preset.name in catalogue.voices:
        raise ValueError(f"name: {shorten(preset.name)} is already the name of another preset")
    for alias in preset.aliases:
        if alias in catalogue.aliases:
            raise ValueError(f"aliases: {shorten(alias)} already belongs to {shorten(catalogue.aliases[alias])}")
    catalogue.voices[preset.name] = voice
    catalogue.aliases.update(dict.fromkeys(preset.aliases, preset.name))


def _read_preset(path: Path) -> VoicePreset:
    """The preset in a file.

    Raises:
        ValueError: With the key and the reason.
    """
    try:
        if path.stat().st_size > _MAX_PRESET_BYTES:
            raise ValueError(f"the file is larger than {_MAX_PRESET_BYTES // 1024} KiB")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the file cannot be read: {error.strerror or type(error).__name__}") from None
    except UnicodeDecodeError:
        raise ValueError("the file is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("broken JSON: nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError('the file must hold one JSON object, {"name": …}')  # noqa: TRY004 - one kind of fault for the caller
    try:
        return VoicePreset.model_validate(data)
    except ValidationError as error:
        raise ValueError(_first_fault(error)) from None


def _first_fault(error: ValidationError) -> str:
    fault: Any = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{key}: unknown key; known keys: {', '.join(VoicePreset.model_fields)}"
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    choices = f"; known models: {', '.join(get_args(ModelId))}" if key == "model" else ""
    return f"{key}: {shorten(fault['input'])}: {fault['msg'][0].lower()}{fault['msg'][1:]}{choices}"
