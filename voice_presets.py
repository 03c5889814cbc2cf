"""Reads preset files and added voices, and looks voices up by name."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from errors import InvalidVoiceError, shorten
from files import folder_signature, read_json
from pronunciations import FILE as PRONUNCIATIONS
from pronunciations import Pronunciations, read_pronunciations
from recordings import RecordingVerdicts
from voice_store import RECORDING, StoredVoice, VoiceStore, name_key, name_taken

logger = logging.getLogger(__name__)

# The voices that OpenAI's API and its clients name (OpenClaw's list, November 2026).
OPENAI_VOICES: tuple[str, ...] = (
    *("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable"),
    *("juniper", "marin", "nova", "onyx", "sage", "shimmer", "verse"),
)
_DEFAULT_NAMES = ("default", *OPENAI_VOICES)

ModelId = Literal["csm-1b", "hibari"]

# The voice prompts in the prompts/ folder of CSM's repository whose transcripts are known; see csm_prompts.py.
CSM_VOICE_KEYS = ("conversational_a", "conversational_b")
HIBARI_VOICE_KEYS = ("heart", "emma", "fable", "fenrir", "kore")  # all of hibari-tts 0.2.1

_MAX_PRESET_BYTES = 64 * 1024

_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class VoicePreset(BaseModel):
    """The content of a preset file.

    Attributes:
        name: Selects the voice in a request.
        display_name: The name that people see; made from `name` where it is empty.
        model: The model that speaks.
        voice_key: A voice prompt that comes with the model.
        speaker_id: CSM's speaker number.
        temperature: For CSM's sampler.
        top_k: For CSM's sampler.
        max_audio_length_ms: The longest segment.
        description: Shown in the list of voices.
        speaker_embedding_path: Reserved; must stay empty.
        ref_audio: The path of a recording to clone, relative to the preset's folder and inside it.
        ref_text: The words of the recording, exactly as spoken.
        voice_match: Prompt CSM with the recording's text and the new text as one segment.
        aliases: Other names that select this voice.
        language: How numbers, symbols and abbreviations are read out: "en", or any other code to leave them to the model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: _Name
    display_name: str = Field("", max_length=64)
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
    language: str = Field("en", pattern=r"^[a-z]{2,3}$")

    @model_validator(mode="after")
    def _one_source_of_voice(self) -> VoicePreset:
        if self.model == "hibari":
            _require(self.ref_audio is None, "ref_audio", "is for CSM voices; hibari speaks only its own five voices")
            _require_key(self.voice_key, HIBARI_VOICE_KEYS)
        elif self.ref_audio is None:
            _require(self.ref_text is None, "ref_text", "is given without ref_audio")
            _require_key(self.voice_key, CSM_VOICE_KEYS, " (or give ref_audio and ref_text in its place)")
        else:
            _require(self.voice_key is None, "voice_key", "and ref_audio are mutually exclusive: keep one")
            _require(_stays_inside(self.ref_audio), "ref_audio", "must be a file in the preset's folder, named relative to it")
            _require(bool(self.ref_text and self.ref_text.strip()), "ref_text", "must hold the words of ref_audio, exactly as spoken")
        return self


def _require(condition: bool, key: str, fault: str) -> None:
    if not condition:
        raise ValueError(f"{key} {fault}")


def _stays_inside(name: str) -> bool:
    """Return whether a path cannot leave its folder. Preset files may come from other people, and the recordings they name are opened."""
    path = PurePath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _require_key(value: str | None, choices: tuple[str, ...], otherwise: str = "") -> None:
    _require(value in choices, "voice_key", f"is {shorten(value)}; known voices: {', '.join(choices)}{otherwise}")


def read_preset(path: Path) -> VoicePreset:
    """Read and check a preset file.

    Raises:
        ValueError: It is invalid; the message has the key and the reason.
    """
    try:
        data = read_json(path, _MAX_PRESET_BYTES)
    except OSError as error:
        raise ValueError(f"the file cannot be read: {error.strerror or type(error).__name__}") from None
    if not isinstance(data, dict):
        raise ValueError('the file must hold one JSON object, {"name": …}')  # noqa: TRY004 - callers handle one type of error
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
    """A preset, or an added voice in the form of one.

    Attributes:
        preset: The checked preset. For an added voice its name is the voice's id, so that no person's name appears in logs and headers.
        folder: `ref_audio` is relative to it.
        uploaded: The voice was added over HTTP.
        given_name: The name of an added voice.
        created_at: When it was added, in Unix seconds.
    """

    preset: VoicePreset
    folder: Path
    uploaded: bool = False
    given_name: str = ""
    created_at: int | None = None

    @property
    def id(self) -> str:
        """Unique, and never changes."""
        return self.preset.name

    @property
    def name(self) -> str:
        """The name that selects the voice: of a preset, or as a person gave it."""
        return self.given_name or self.preset.name

    @property
    def display_name(self) -> str:
        """The name that people see."""
        return self.given_name or self.preset.display_name or _as_title(self.preset.name)


def _as_title(name: str) -> str:
    """Return a preset's name as people write it: "my_voice" becomes "My voice"."""
    words = name.replace("_", " ").replace("-", " ").strip()
    return words[:1].upper() + words[1:]


@dataclass(frozen=True)
class SkippedPreset:
    """A preset file, or the file of pronunciations, that cannot be used, and the reason."""

    file: str
    reason: str


def is_default_name(name: str) -> bool:
    """Return whether a request with this name asks for the default voice, unless a preset claims the name."""
    return name_key(name.strip()) in _DEFAULT_NAMES


class VoiceCatalog:
    """An immutable snapshot of all voices, looked up by id, name and alias.

    Args:
        voices: Added voices come after presets, the oldest first.
        skipped: The preset files that cannot be used.
        default_voice: The voice that OpenAI's voice names select unless a preset claims them.
        pronunciations: The owner's pronunciations of words.

    Attributes:
        voices: Presets sorted by name, then added voices sorted by name.
        skipped: The preset files that cannot be used.
        pronunciations: The owner's pronunciations of words.
        default: The default voice; None if there is none of its name.
    """

    def __init__(
        self,
        voices: Sequence[Voice] = (),
        skipped: Sequence[SkippedPreset] = (),
        default_voice: str = "",
        pronunciations: Pronunciations | None = None,
    ) -> None:
        self.pronunciations = pronunciations or Pronunciations()
        self.voices = tuple(sorted(voices, key=lambda voice: (voice.uploaded, voice.name)))
        self.skipped = tuple(skipped)
        self._by_id = {voice.id: voice for voice in voices}
        self._by_alias = {alias: voice for voice in voices for alias in voice.preset.aliases}
        self._by_key = {name_key(name): voice for name, voice in (self._by_alias | self._by_id).items()}
        self._by_given_name = {name_key(voice.name): voice for voice in voices if voice.uploaded}
        self.default = self._find(default_voice)

    def names(self) -> list[str]:
        """Return the voices' names, in the order of `voices`."""
        return [voice.name for voice in self.voices]

    def get(self, voice_id: str) -> Voice | None:
        """Return the voice with this id; names and aliases do not count."""
        return self._by_id.get(voice_id)

    def resolve(self, name: str) -> Voice:
        """Return the voice for `name`: an id, a preset's name, an alias, or the name of an added voice.

        Surrounding space and case do not matter.

        Raises:
            InvalidVoiceError: There is none; the message lists the voices.
        """
        voice = self.default if self.means_default(name) else self._find(name)
        if voice is None:
            raise InvalidVoiceError(
                f"Voice {shorten(name)} not found. Available voices: {', '.join(self.names()) or 'none'}.", param="voice"
            )
        return voice

    def knows(self, name: str) -> bool:
        """Return whether `resolve` finds a voice."""
        return (self.default if self.means_default(name) else self._find(name)) is not None

    def means_default(self, name: str) -> bool:
        """Return whether `name` selects whatever the default voice is: one of OpenAI's names or "default", unless a voice claims it."""
        return is_default_name(name) and self._find(name) is None

    def aliases_of(self, voice: Voice) -> list[str]:
        """Return the other names that select a voice, sorted; for the default voice these include OpenAI's."""
        aliases = set(voice.preset.aliases)
        if voice is self.default:
            aliases.update(filter(self.means_default, OPENAI_VOICES))
        return sorted(aliases)

    def check_new_name(self, name: str) -> None:
        """Refuse a name for an added voice that already selects another voice, ignoring case.

        Raises:
            ConflictError: It is the name of a preset, an alias, or one of OpenAI's names.
        """
        if name_key(name) in {name_key(known) for known in (*self._by_id, *self._by_alias, *_DEFAULT_NAMES)}:
            raise name_taken(name)

    def _find(self, name: str) -> Voice | None:
        """Presets and their aliases come first, so that an added voice never replaces one."""
        key = name_key(name.strip())
        return self._by_id.get(name) or self._by_alias.get(name) or self._by_key.get(key) or self._by_given_name.get(key)


class VoicePresetManager:
    """Reads all voices and keeps the latest snapshot of them. Thread-safe.

    Args:
        presets_dir: The folder of the preset files.
        default_voice: The voice that OpenAI's voice names select unless a preset claims them.
        added: The voices that people added.
    """

    def __init__(self, presets_dir: Path, default_voice: str, added: VoiceStore | None = None) -> None:
        self._presets_dir = presets_dir
        self._default_voice = default_voice
        self._added = added
        self._catalog = VoiceCatalog()
        self._verdicts = RecordingVerdicts()
        self._signature: object = None  # nothing has been read yet
        self._reading = threading.Lock()

    @property
    def catalog(self) -> VoiceCatalog:
        """The latest snapshot. The first access reads the voices; after that only `refresh` does."""
        return self.refresh() if self._signature is None else self._catalog

    def changed(self) -> bool:
        """Return whether a file was added, changed or removed since the last snapshot. Takes well under a millisecond."""
        try:
            return self._signature != (*self._files(), self._verdicts.signature_now())
        except OSError:  # the files cannot be examined now: keep the known voices
            return False

    def refresh(self) -> VoiceCatalog:
        """Read the voices again if a file has changed. Blocks while a new recording is decoded: call it from a worker thread."""
        with self._reading:
            if self.changed():
                files = self._files()  # taken before reading, so that a later change is noticed next time
                self._catalog = self._read()
                self._signature = (*files, self._verdicts.signature())
            return self._catalog

    def _files(self) -> tuple[object, object]:
        return folder_signature(self._presets_dir), self._added and self._added.signature()

    def _read(self) -> VoiceCatalog:
        presets, skipped = self._read_presets()
        if not presets:
            logger.warning("no usable preset in %s", self._presets_dir)
        added = [_added_voice(stored) for stored in self._added.voices()] if self._added else []
        return VoiceCatalog([*presets, *added], skipped, self._default_voice, self._read_pronunciations(skipped))

    def _read_pronunciations(self, skipped: list[SkippedPreset]) -> Pronunciations:
        try:
            return read_pronunciations(self._presets_dir / PRONUNCIATIONS)
        except ValueError as error:
            skipped.append(SkippedPreset(PRONUNCIATIONS, str(error)))
            logger.warning("%s is skipped: %s", PRONUNCIATIONS, error)
            return Pronunciations()

    def _read_presets(self) -> tuple[list[Voice], list[SkippedPreset]]:
        voices: list[Voice] = []
        skipped: list[SkippedPreset] = []
        owners: dict[str, str] = {}  # each name and alias so far, and the preset it belongs to
        recordings: list[Path] = []
        for path in sorted(self._presets_dir.glob("*.json")):
            if path.name == PRONUNCIATIONS:
                continue
            try:
                preset = read_preset(path)
                if preset.ref_audio is not None:
                    recordings.append(path.parent / preset.ref_audio)
                    self._check_recording(recordings[-1])
                _check_names(preset, owners)
            except ValueError as error:
                skipped.append(SkippedPreset(path.name, str(error)))
                logger.warning("preset %s is skipped: %s", path.name, error)
            else:
                voices.append(Voice(preset, path.parent))
                owners.update(dict.fromkeys((preset.name, *preset.aliases), preset.name))
        self._verdicts.keep(recordings)
        return voices, skipped

    def _check_recording(self, path: Path) -> None:
        fault = self._verdicts.fault(path)
        if fault is not None:
            raise ValueError(f"ref_audio: {fault[0].lower()}{fault[1:]}")


def _check_names(preset: VoicePreset, owners: Mapping[str, str]) -> None:
    for key, name in (("name", preset.name), *(("aliases", alias) for alias in preset.aliases)):
        owner = owners.get(name)
        if owner is not None:
            what = "the name of another preset" if owner == name else f"an alias of {shorten(owner)}"
            raise ValueError(f"{key}: {shorten(name)} is already {what}")


def _added_voice(stored: StoredVoice) -> Voice:
    about = stored.description
    description = f"Added on {about.consent_date[:10]}, from {about.seconds:.0f} s of speech"
    fields = {"name": stored.id, "description": description, "ref_audio": RECORDING, "ref_text": about.ref_text}
    preset = VoicePreset.model_validate(fields)
    return Voice(preset, stored.folder, uploaded=True, given_name=about.name, created_at=about.created_at)
