"""Voices: preset files, voices that people added, and looking them up by name."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from errors import InvalidVoiceError, shorten
from recordings import RecordingVerdicts
from voice_store import RECORDING, StoredVoice, VoiceStore, is_shortage, name_key, name_taken

logger = logging.getLogger(__name__)

# The voices that OpenAI's API and its clients name (OpenClaw's list, November 2026).
OPENAI_VOICES: tuple[str, ...] = (
    *("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable"),
    *("juniper", "marin", "nova", "onyx", "sage", "shimmer", "verse"),
)


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
        max_audio_length_ms: No segment becomes longer than this.
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


@dataclass(frozen=True)
class Voice:
    """A preset and where it came from.

    Attributes:
        preset: The checked preset. That of an added voice is named by the voice's id: logs and headers hold no person's name.
        folder: The preset file's folder: `ref_audio` is relative to it.
        uploaded: Somebody sent this voice; it is not a file of the owner's.
        given_name: What people call an added voice.
        created_at: When it was added, in Unix seconds.
    """

    preset: VoicePreset
    folder: Path
    uploaded: bool = False
    given_name: str = ""
    created_at: int | None = None

    @property
    def id(self) -> str:
        """What reaches exactly this voice."""
        return self.preset.name

    @property
    def name(self) -> str:
        """What people call it."""
        return self.given_name or self.preset.name


@dataclass(frozen=True)
class SkippedPreset:
    """A preset file that could not be used, and why."""

    file: str
    reason: str


@dataclass
class _Catalogue:
    voices: dict[str, Voice] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    given_names: dict[str, str] = field(default_factory=dict)
    skipped: list[SkippedPreset] = field(default_factory=list)


class VoicePresetManager:
    """The voices there are, by id, name and alias. Safe to use from several threads.

    Args:
        presets_dir: The folder of the preset files.
        default_voice: The voice that OpenAI's voice names reach unless a preset claims them.
        added: The voices that people added.
    """

    def __init__(self, presets_dir: Path, default_voice: str, added: VoiceStore | None = None) -> None:
        self._presets_dir = presets_dir
        self._default_voice = default_voice
        self._added = added
        self._catalogue = _Catalogue()
        self._verdicts = RecordingVerdicts()
        self._signature: object = ()
        self._reading = threading.Lock()

    def changed(self) -> bool:
        """Whether a file was added, changed or removed since the voices were read. Takes well under a millisecond."""
        try:
            return self._signature != (*self._files(), self._verdicts.signature_now())
        except OSError:  # nobody can look now: the voices that are known stay
            return False

    def refresh(self) -> None:
        """Read again what has changed. Blocks while a new recording is decoded: for worker threads."""
        with self._reading:
            self._read_if_changed()

    def resolve(self, name: str) -> Voice:
        """The voice that `name` stands for: an id, a preset's name, an alias, or what somebody called an added voice.

        Raises:
            InvalidVoiceError: There is none; the message lists the voices.
        """
        with self._latest() as catalogue:
            voice = _find(catalogue, name)
            if voice is None and name in OPENAI_VOICES:
                voice = _find(catalogue, self._default_voice)
        if voice is None:
            raise InvalidVoiceError(
                f"Voice {shorten(name)} not found. Available voices: {', '.join(self.names()) or 'none'}.", param="voice"
            )
        return voice

    def knows(self, name: str) -> bool:
        """Whether `resolve` finds a voice."""
        try:
            self.resolve(name)
        except InvalidVoiceError:
            return False
        return True

    def names(self) -> list[str]:
        """The voices' names, in the order of `voices`."""
        return [voice.name for voice in self.voices()]

    def voices(self) -> list[Voice]:
        """The voices: presets sorted by name, then added ones."""
        with self._latest() as catalogue:
            return sorted(catalogue.voices.values(), key=lambda voice: (voice.uploaded, voice.name))

    def aliases_of(self, voice_id: str) -> list[str]:
        """The other names that reach a voice, OpenAI's among them."""
        catalogue = self._catalogue  # of voices that were just listed: looking at the files again for each of them would add up
        own = {alias for alias, target in catalogue.aliases.items() if target == voice_id}
        default = _find(catalogue, self._default_voice)
        if default is not None and default.id == voice_id:
            own |= {alias for alias in OPENAI_VOICES if _find(catalogue, alias) is None}
        return sorted(own)

    def skipped(self) -> list[SkippedPreset]:
        """The preset files that could not be used."""
        with self._latest() as catalogue:
            return catalogue.skipped

    def check_new_name(self, name: str) -> None:
        """Refuse a name for an added voice that reaches another voice already, however it is written.

        Raises:
            ConflictError: It is a preset's, an alias, or one of OpenAI's.
        """
        with self._latest() as catalogue:
            names = {name_key(known) for known in (*catalogue.voices, *catalogue.aliases, *OPENAI_VOICES)}
        if name_key(name) in names:
            raise name_taken(name)

    @contextmanager
    def _latest(self) -> Iterator[_Catalogue]:
        """The voices as they are now; as they were, while another thread is reading what has changed."""
        if self._reading.acquire(blocking=False):
            try:
                self._read_if_changed()
            finally:
                self._reading.release()
        yield self._catalogue

    def _read_if_changed(self) -> None:
        if not self.changed():
            return
        files = self._files()  # taken before reading: what changes meanwhile is read again
        self._catalogue = self._read()
        self._signature = (*files, self._verdicts.signature())

    def _files(self) -> tuple[object, object]:
        return _signature(self._presets_dir), self._added and self._added.signature()

    def _read(self) -> _Catalogue:
        catalogue = _Catalogue()
        recordings: list[Path] = []
        for path in sorted(self._presets_dir.glob("*.json")):
            try:
                voice = Voice(read_preset(path), path.parent)
                if voice.preset.ref_audio is not None:
                    recordings.append(voice.folder / voice.preset.ref_audio)
                    self._check_recording(recordings[-1])
                _add(catalogue, voice)
            except ValueError as error:
                catalogue.skipped.append(SkippedPreset(path.name, str(error)))
                logger.warning("preset %s is skipped: %s", path.name, error)
        self._verdicts.keep(recordings)
        if not catalogue.voices:
            logger.warning("no usable preset in %s", self._presets_dir)
        for stored in self._added.voices() if self._added else ():
            voice = _added_voice(stored)
            catalogue.voices[voice.id] = voice
            catalogue.given_names[name_key(voice.name)] = voice.id
        return catalogue

    def _check_recording(self, path: Path) -> None:
        fault = self._verdicts.fault(path)
        if fault is not None:
            raise ValueError(f"ref_audio: {fault[0].lower()}{fault[1:]}")


def _find(catalogue: _Catalogue, name: str) -> Voice | None:
    """Presets and their aliases come first: what somebody sends never takes their place."""
    for voice_id in (name, catalogue.aliases.get(name), catalogue.given_names.get(name_key(name))):
        if voice_id in catalogue.voices:
            return catalogue.voices[voice_id]
    return None


def _added_voice(stored: StoredVoice) -> Voice:
    about = stored.description
    description = f"Added on {about.consent_date[:10]}, from {about.seconds:.0f} s of speech"
    fields = {"name": stored.id, "description": description, "ref_audio": RECORDING, "ref_text": about.ref_text}
    preset = VoicePreset.model_validate(fields)
    return Voice(preset, stored.folder, uploaded=True, given_name=about.name, created_at=about.created_at)


def _signature(folder: Path) -> object:
    """What changes when a preset, or a recording beside one, does: names, sizes, times of last change, inodes."""
    try:
        with os.scandir(folder) as entries:
            stats = [(entry.name, entry.stat()) for entry in entries]
    except OSError as error:  # the folder, or a file in it, was removed while it was read
        if is_shortage(error):
            raise
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
    if preset.name in catalogue.aliases:
        raise ValueError(f"name: {shorten(preset.name)} is already an alias of {shorten(catalogue.aliases[preset.name])}")
    for alias in preset.aliases:
        if alias in catalogue.voices:
            raise ValueError(f"aliases: {shorten(alias)} is already the name of another preset")
        if alias in catalogue.aliases:
            raise ValueError(f"aliases: {shorten(alias)} already belongs to {shorten(catalogue.aliases[alias])}")
    catalogue.voices[preset.name] = voice
    catalogue.aliases.update(dict.fromkeys(preset.aliases, preset.name))
