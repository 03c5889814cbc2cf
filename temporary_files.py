"""Temporary folders that nobody else can enter, and that are cleaned up even after a server that was killed."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import ConversionError

logger = logging.getLogger(__name__)

TEMPORARY_PREFIX = "sesame-tts-"
"""What every temporary folder's name begins with; the process id follows: it tells what a killed server left from what is in use."""


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that only this user can enter, removed at the end.

    Raises:
        ConversionError: It cannot be made.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY_PREFIX}{os.getpid()}-"))
    except OSError as error:
        logger.error("no temporary folder: %s", error.strerror)  # noqa: TRY400 - the cause is all there is to know
        raise ConversionError("The server has no room for a temporary file.") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clean_temporary_files() -> int:
    """Remove what servers that were killed left in the temporary folder; returns how many folders that were."""
    stale = [folder for folder in Path(tempfile.gettempdir()).glob(f"{TEMPORARY_PREFIX}*-*") if _is_stale(folder)]
    for folder in stale:
        shutil.rmtree(folder, ignore_errors=True)
    return len(stale)


def _is_stale(folder: Path) -> bool:
    """Whether it is ours and its process is gone."""
    number = folder.name[len(TEMPORARY_PREFIX) :].split("-")[0]
    try:
        if not number.isdecimal() or folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
            return False
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
