"""Atomic file writes, where a file appears complete or not at all, and file signatures, which show that a file has changed."""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FileSignature = tuple[int, int, int, int]
"""Size, times of the last change of content and of permissions, inode: differs once the file was changed, replaced or made readable."""


class OutputError(Exception):
    """An output cannot be written or played; the message is shown to the person at the command line."""


class NewFile:
    """A temporary file that `commit` moves to its final place. Created at once, so that an unwritable folder is noticed before any work.

    Args:
        target: The final path. A link is followed; an existing file stays until `commit`.

    Attributes:
        target: The final path, links followed.
        path: The temporary file, in the folder of the target.

    Raises:
        OSError: The folder is missing or cannot be written to, or `target` is a folder.
    """

    def __init__(self, target: Path) -> None:
        self.target = target.resolve()
        if self.target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        self.path = self.target.with_name(f".{self.target.name[:60]}.{secrets.token_hex(8)}.part")
        # A replacement is private until it gets the permissions of what it replaces; a new file follows the umask.
        mode = 0o600 if self.target.exists() else 0o666
        os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))

    def commit(self) -> None:
        """Move the file to its final place, with the permissions of the file it replaces.

        Raises:
            OSError: It cannot be moved.
        """
        with suppress(FileNotFoundError):
            self.path.chmod(stat.S_IMODE(self.target.stat().st_mode))
        self.path.replace(self.target)

    def discard(self) -> None:
        """Remove the temporary file unless it was moved; may be called at any time."""
        with suppress(OSError):
            self.path.unlink()


def write_file(target: Path, data: bytes, *, sync: bool = False) -> None:
    """Write a file atomically.

    Args:
        target: Its folder must exist.
        data: The whole content.
        sync: Return only once the content is on the disk (fsync).

    Raises:
        OSError: It cannot be written; an existing file is unchanged then.
    """
    new = NewFile(target)
    try:
        with new.path.open("wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        new.commit()
    finally:
        new.discard()


def read_regular_file(path: Path, limit: int) -> bytes:
    """Return the content of a small file. Never waits: opening or reading a pipe or a device might never end.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not a regular file, or larger than `limit` bytes.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"the file is larger than {limit // 1024} KiB")
    return content


def read_json(path: Path, limit: int) -> object:
    """Return what a small JSON file holds.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not a regular file, larger than `limit` bytes, not UTF-8 or not JSON; the message has the place.
    """
    try:
        return json.loads(read_regular_file(path, limit).decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("the file is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("broken JSON: nested too deeply") from None


def write_output(target: Path, text: str) -> None:
    """Write `text` in UTF-8: atomically to a file, directly to anything else (a pipe, /dev/stdout).

    Raises:
        OutputError: It cannot be written.
    """
    with output_errors(target):
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
        else:
            write_file(target, text.encode())


@contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Turn an OSError while `target` is written into an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}.") from None


def file_signature(path: Path | str) -> FileSignature | None:
    """Return the signature of a file; None if it does not exist or cannot be examined."""
    try:
        return _signature_of(os.stat(path))  # noqa: PTH116 - a Path takes three times as long, and /health asks each time
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None


def folder_signature(folder: Path) -> list[tuple[str, FileSignature]] | None:
    """Return the names and signatures of all files in a folder, sorted; None if it does not exist.

    Raises:
        OSError: The process has too many open files, or too little memory, to look.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted([(entry.name, _signature_of(entry.stat())) for entry in entries])
    except OSError as error:  # the folder, or a file in it, was removed meanwhile
        if is_shortage(error):
            raise
        return None


def is_shortage(error: OSError) -> bool:
    """Return whether the cause is not the file but a lack of file descriptors or memory in this process or system."""
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def _signature_of(status: os.stat_result) -> FileSignature:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
