"""One preset: its fields, and how a file of one is read."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from errors import shorten

ModelId = Literal["csm-1b", "hibari"]

# The voice prompts in the CSM repository's prompts/ folder that mlx-audio knows the words of; see csm_prompts.py.
CSM_VOICE_KEYS = ("conversational_a", "conversational_b")
HIBARI_VOICE_KEYS = ("heart",)

_MAX_PRESET_BYTES = 64 * 1024

_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class VoicePreset(BaseModel):
    """One voice: the fields of the first draft, and optional ones with mlx-audio's names.

    Attributes:
        name: What a request calls it.
        model: Which model speaks it.
        voice_key: A voice prompt that the model brings along.
        speaker_id: CSM's speaker number.
        temperature: Of the sampler.
        top_k: Of the sampler.
        max_audio_length_ms: No sentence group becomes longer than this.
        description: For people.
        speaker_embedding_path: Reserved by the first draft; must stay empty.
        ref_audio: A recording to clone, in the preset's folder or below it, named relative to it.
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
            _require_key(self.voice_key, CSM_VOICE_KEYS, " (or give ref_audio and ref_text in its place)")
        else:
            _require(self.voice_key is None, "voice_key", "and ref_audio exclude one another: keep one")
            _require(_stays_inside(self.ref_audio), "ref_audio", "must be a file in the preset's folder, named relative to it")
            _require(bool(self.ref_text and self.ref_text.strip()), "ref_text", "must hold the words of ref_audio, exactly as spoken")
        return self


def _require(condition: bool, key: str, fault: str) -> None:
    if not condition:
        raise ValueError(f"{key} {fault}")


def _stays_inside(name: str) -> bool:
    """Whether a path leads nowhere but down. A preset may come from somebody else, and what it names is opened."""
    path = PurePath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _require_key(value: str | None, choices: tuple[str, ...], otherwise: str = "") -> None:
    _require(value in choices, "voice_key", f"is {shorten(value)}; known voices: {', '.join(choices)}{otherwise}")


def read_preset(path: Path) -> VoicePreset:
    """The preset in a file.

    Raises:
        ValueError: With the key and the reason.
    """
    try:
        if path.stat().st_size > _MAX_PRESET_BYTES:
            raise ValueError(f"the file is larger than {_MAX_PRESET_BYTES // 1024} KiB")
        data = json.loads(path.read_text(encoding="utf-8-sig"))
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
    if fault["type"] == "missing":
        return f"{key} is missing"
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    choices = f"; known models: {', '.join(get_args(ModelId))}" if key == "model" else ""
    return f"{key}: {shorten(fault['input'])}: {fault['msg'][0].lower()}{fault['msg'][1:]}{choices}"
