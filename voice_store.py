"""Stores added voices: each is a folder with a recording and a description, created and deleted atomically."""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import os
import secrets
import shutil
import tempfile
import time
import unicodedata
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import regex
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from audio_converter import to_int16
from audio_formats import SAMPLE_RATE, Samples
from errors import ConflictError, InvalidRequestError, NotFoundError, StorageError, shorten
from files import is_shortage, write_file

logger = logging.getLogger(__name__)

MAX_VOICES = 100
"""How many voices are kept: at 60 s each, 288 MB of recordings."""

MAX_NAME = 64
"""Characters in a voice's name."""

MAX_WORDS = 2000
"""Characters in the transcript of a recording: a minute of fast speech has about 1200."""

RECORDING = "recording.wav"
"""A voice's recording in its folder: 24 kHz, mono, 16 bit."""

_DESCRIPTION = "voice.json"
_MAX_DESCRIPTION_BYTES = 64 * 1024
_TEMPORARY = ".unfinished-"  # of hidden folders: voices that are being written or deleted
_ID = regex.compile(r"voice_[0-9a-f]{24}")
# Letters of every script with their combining marks; no control, invisible or bidirectional characters.
_NAME = regex.compile(r"[\p{L}\p{N}][\p{L}\p{M}\p{N} .'’()&+_-]*")


class VoiceDescription(BaseModel):
    """The content of `voice.json`.

    Attributes:
        name: The voice's name.
        ref_text: The words of the recording.
        consent: The speaker's consent as it was sent: a word for yes, or the id of a consent.
        consent_date: When it was sent: ISO 8601, UTC.
        created_at: The same in Unix seconds.
        seconds: The length of the recording.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str = Field(min_length=1, max_length=MAX_NAME)
    ref_text: str = Field(min_length=1, max_length=MAX_WORDS)
    consent: str = Field(min_length=1, max_length=200)
    consent_date: str
    created_at: int
    seconds: float


@dataclass(frozen=True)
class StoredVoice:
    """An added voice.

    Attributes:
        id: Random, never used twice.
        folder: Contains the recording. Never shown to clients.
        description: The rest.
    """

    id: str
    folder: Path
    description: VoiceDescription


def clean_name(name: str) -> str:
    """Return `name` as it is stored: composed characters, single spaces.

    Raises:
        InvalidRequestError: It is not valid as a voice's name; the message says what is.
    """
    cleaned = " ".join(unicodedata.normalize("NFC", name).split(" ")).strip()
    if not _NAME.fullmatch(cleaned) or len(cleaned) > MAX_NAME or _ID.fullmatch(cleaned):
        raise InvalidRequestError(
            f"The name {shorten(name)} cannot be used: it must have 1 to {MAX_NAME} characters, begin with a letter or a digit, and hold "
            "only letters, digits, spaces and . ' ( ) & + _ -",
            param="name",
            code="invalid_name",
        )
    return cleaned


def name_key(name: str) -> str:
    """Return a key that is equal for names that differ only in case or in Unicode composition."""
    return unicodedata.normalize("NFC", name).casefold()


class VoiceStore:
    """The added voices in a folder. Safe for several threads and processes, and against being killed.

    A voice is written into a hidden folder that is then renamed. All changes happen under one lock, so a hidden folder that exists when the
    lock is acquired was left by a killed process. All methods block; `add` for milliseconds.

    Args:
        folder: Created when the first voice is added. It must be outside the project.
        older: The folder of earlier versions. `clean` moves its voices into `folder`; those that cannot be moved are used where they are.
    """

    def __init__(self, folder: Path, older: Path | None = None) -> None:
        self._folder = folder
        self._older = older if older != folder else None

    def signature(self) -> object:
        """Return a value that changes when a voice is added or deleted. Nothing else can change: ids and voices are final."""
        return frozenset(folder.name for folder in self._folders())

    def voices(self) -> list[StoredVoice]:
        """Return the voices, oldest first; a damaged one is left out, with a warning in the log."""
        found = []
        for folder in self._folders():
            try:
                found.append(StoredVoice(folder.name, folder, _read(folder)))
            except ValueError as error:
                logger.warning("the added voice %s is skipped: %s", folder.name, error)
        return sorted(found, key=lambda voice: (voice.description.created_at, voice.id))

    def add(self, name: str, recording: Samples, ref_text: str, consent: str) -> StoredVoice:
        """Store a voice.

        Args:
            name: From `clean_name`.
            recording: float32, shape (n,), 24 kHz, from `recordings`.
            ref_text: The words of the recording.
            consent: The speaker's consent, as it was sent.

        Raises:
            ConflictError: The name is taken, or there are too many voices.
            StorageError: The disk is full or cannot be written to; nothing is left on it.
        """
        now = int(time.time())
        date = datetime.fromtimestamp(now, timezone.utc).isoformat()
        seconds = round(len(recording) / SAMPLE_RATE, 3)
        description = VoiceDescription(name=name, ref_text=ref_text, consent=consent, consent_date=date, created_at=now, seconds=seconds)
        with self._alone():
            self._check_room(name)
            voice_id = f"voice_{secrets.token_hex(12)}"
            folder = self._folder / voice_id
            with self._unfinished() as unfinished:
                write_file(unfinished / RECORDING, _wav(recording), sync=True)
                write_file(unfinished / _DESCRIPTION, description.model_dump_json(indent=2).encode(), sync=True)
                unfinished.rename(folder)
        return StoredVoice(voice_id, folder, description)

    def delete(self, voice_id: str) -> None:
        """Delete a voice and everything made from its recording.

        Raises:
            NotFoundError: There is none with this id.
            StorageError: It cannot be removed.
        """
        missing = NotFoundError("There is no added voice with this id. GET /v1/audio/voices lists the voices.")
        folder = next((folder for folder in self._folders() if folder.name == voice_id), None)
        if folder is None:
            raise missing
        with self._alone(), self._unfinished() as leaving:
            try:
                folder.rename(leaving / voice_id)  # atomic; then its files are deleted
            except FileNotFoundError:
                raise missing from None
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                shutil.rmtree(folder)

    def clean(self) -> None:
        """Delete what a killed process has left, and move the voices of the older folder. Only log a warning if that is impossible."""
        older = _voice_folders(self._older)
        if not older and not self._folder.is_dir():
            return
        try:
            with self._alone():
                for folder in older:
                    self._adopt(folder)
        except StorageError as error:
            logger.warning("%s", error.message)

    def _adopt(self, folder: Path) -> None:
        """Move a voice into the folder of this store. Until it is there completely, it stays where it was."""
        try:
            folder.rename(self._folder / folder.name)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            with self._unfinished() as unfinished:  # another file system
                shutil.copytree(folder, unfinished, dirs_exist_ok=True)
                unfinished.rename(self._folder / folder.name)
            shutil.rmtree(folder)

    def _folders(self) -> list[Path]:
        """Return the folders of all voices; in the older folder only those that are not in the new one."""
        found = {folder.name: folder for place in (self._older, self._folder) for folder in _voice_folders(place)}
        return list(found.values())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock the folder against other changes, and delete the leftovers of killed processes."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self._folder / ".lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system even if the process is killed
                for leftover in self._folder.glob(f"{_TEMPORARY}*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                yield
        except OSError as error:
            logger.error("an added voice cannot be stored or deleted: %s", error.strerror)  # noqa: TRY400 - the cause is enough
            raise StorageError(f"The server cannot change its folder of voices: {error.strerror or type(error).__name__}.") from None

    @contextmanager
    def _unfinished(self) -> Iterator[Path]:
        """Create a hidden folder, readable by this user only; delete it at the end unless it was renamed."""
        folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self._folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _check_room(self, name: str) -> None:
        voices = self.voices()
        if len(self._folders()) >= MAX_VOICES:
            raise ConflictError(f"There are {MAX_VOICES} voices, which is the limit: delete one first.", code="too_many_voices")
        if any(name_key(voice.description.name) == name_key(name) for voice in voices):
            raise name_taken(name)


def _voice_folders(place: Path | None) -> list[Path]:
    """Return the folders of the voices in one place."""
    if place is None:
        return []
    try:
        with os.scandir(place) as entries:
            return [Path(entry.path) for entry in entries if _ID.fullmatch(entry.name)]
    except OSError as error:  # it does not exist
        if is_shortage(error):
            raise
        return []


def name_taken(name: str) -> ConflictError:
    """Return the error for a name that already selects a voice."""
    return ConflictError(f"The name {shorten(name)} is taken: choose another.", param="name")


def _read(folder: Path) -> VoiceDescription:
    """Read the description of a voice and check that its recording is complete.

    Raises:
        ValueError: The voice is damaged; the message contains no path.
    """
    try:
        with (folder / _DESCRIPTION).open("rb") as file:
            description = VoiceDescription.model_validate_json(file.read(_MAX_DESCRIPTION_BYTES))
        with wave.open(str(folder / RECORDING), "rb") as recording:
            size = recording.getnframes() * recording.getsampwidth()
        whole = size > 0 and (folder / RECORDING).stat().st_size >= size
    except OSError as error:
        raise ValueError(f"its files cannot be read: {error.strerror or type(error).__name__}") from None
    except ValidationError as error:
        raise ValueError(f"its description is damaged ({error.error_count()} faults)") from None
    except (wave.Error, EOFError):
        whole = False
    if not whole:
        raise ValueError("its recording is damaged")
    return description


def _wav(samples: Samples) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SAMPLE_RATE)
        writer.writeframes(to_int16(samples))
    return file.getvalue()
