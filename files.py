"""Atomic file writes: a file appears complete or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path


class OutputError(Exception):
    """Something cannot be written, or played; the message is for the person who asked for it."""


class NewFile:
    """A file in the making. Made at once, so that a folder that cannot be written is noticed before any work.

    Args:
        target: Where it is to be. A link is followed; what is there stays until `commit`.

    Attributes:
        path: Where it is written meanwhile, in the same folder.

    Raises:
        OutputError: The folder is missing or cannot be written, or `target` is a folder.
    """

    def __init__(self, target: Path) -> None:
        self._target = target.resolve()
        if self._target.is_dir():
            raise OutputError(f"{target} is a folder.")
        try:
            handle, name = tempfile.mkstemp(prefix=f".{self._target.name[:60]}.", suffix=".part", dir=self._target.parent)
        except OSError as error:
            raise OutputError(f"{target} cannot be written: {error.strerror}.") from None
        os.close(handle)
        self.path = Path(name)

    def commit(self) -> None:
        """Move it into place, with the permissions of the file it replaces, else those of any new file.

        Raises:
            OutputError: It cannot be moved.
        """
        try:
            self.path.chmod(self._mode())
            self.path.replace(self._target)
        except OSError as error:
            raise OutputError(f"{self._target} cannot be written: {error.strerror}.") from None

    def discard(self) -> None:
        """Remove it unless it was moved into place; may be called at any time."""
        with suppress(OSError):
            self.path.unlink()

    def _mode(self) -> int:
        with suppress(OSError):
            return stat.S_IMODE(self._target.stat().st_mode)
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


def write_file(target: Path, text: str) -> None:
    """Write `text` in UTF-8, whole or not at all. What is no regular file (a pipe, /dev/stdout) is written as it is.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
            return
        new = NewFile(target)
        try:
            new.path.write_text(text, encoding="utf-8")
            new.commit()
        finally:
            new.discard()
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}.") from None
