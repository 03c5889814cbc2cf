"""Whether the recordings that presets name can serve as voices: each file is decoded once, until it changes."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from errors import ConversionError, InvalidAudioError
from recordings import read_recording

logger = logging.getLogger(__name__)

_Identity = tuple[int, int, int] | None


class RecordingVerdicts:
    """What was found about recordings, as long as they stay what they are. One thread at a time."""

    def __init__(self) -> None:
        self._verdicts: dict[Path, tuple[_Identity, str | None]] = {}

    def fault(self, path: Path) -> str | None:
        """Why the recording at `path` cannot be used, or None. Decodes it unless that was done before: a tenth of a second for 30 s of sound."""
        identity = _identity(path)
        known = self._verdicts.get(path)
        if known is None or known[0] != identity:
            known = (identity, _fault(path))
            self._verdicts[path] = known
        return known[1]

    def keep(self, paths: Iterable[Path]) -> None:
        """Forget all recordings but these."""
        wanted = set(paths)
        self._verdicts = {path: verdict for path, verdict in self._verdicts.items() if path in wanted}

    def signature(self) -> object:
        """What the recordings were when they were judged."""
        return [identity for identity, _ in self._verdicts.values()]

    def signature_now(self) -> object:
        """What the recordings are: differs from `signature` once one of them has changed."""
        return [_identity(path) for path in self._verdicts]


def _fault(path: Path) -> str | None:
    try:
        read_recording(path)
    except InvalidAudioError as error:
        return error.message
    except ConversionError as error:  # no fault of the recording: the model will look at it again
        logger.warning("a preset's recording could not be checked: %s", error.message)
    return None


def _identity(path: Path) -> _Identity:
    """What changes when a file does; None when there is none, or its name is impossible."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
