"""The ffmpeg program: where it is, which version, and running it once to its end.

The arguments are ours: no part of one comes from a request, except numbers that were checked. There is no shell.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path

from errors import ConversionError, shorten

logger = logging.getLogger(__name__)

QUIET = ("-nostdin", "-hide_banner", "-loglevel", "error", "-y")
"""The options before all others: ask nothing, say only what fails, overwrite."""

STDERR_KEPT = 4096
"""Bytes of ffmpeg's own words that are kept."""


@cache
def _bundled_ffmpeg() -> str | None:
    """Where imageio-ffmpeg has its binary. The library runs it once to see whether it works."""
    import imageio_ffmpeg

    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError:
        return None


def find_ffmpeg() -> str | None:
    """The ffmpeg to use: the one on PATH, else imageio-ffmpeg's; None if there is none.

    Looked up each time (some microseconds), so one that is installed or removed while the server runs is noticed.
    """
    found = shutil.which("ffmpeg") or shutil.which(_bundled_ffmpeg() or "")
    return str(Path(found).absolute()) if found else None


def ffmpeg_version() -> str | None:
    """The version that ffmpeg gives itself; None if there is none or it does not run. The first call starts a process, later ones do not."""
    program = find_ffmpeg()
    if program is None:
        return None
    try:
        return _version_of(program, Path(program).stat().st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=4)
def _version_of(program: str, _changed: int) -> str | None:
    try:
        ran = subprocess.run([program, "-version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)  # noqa: S603 - fixed arguments
    except (OSError, subprocess.TimeoutExpired):
        return None
    named = re.match(rb"ffmpeg version (\S+)", ran.stdout)
    return named[1].decode("ascii", "replace") if named and ran.returncode == 0 else None


def require_ffmpeg() -> str:
    """`find_ffmpeg`, or the error that says what is missing.

    Raises:
        ConversionError: There is none.
    """
    program = find_ffmpeg()
    if program is None:
        raise ConversionError("ffmpeg is missing on the server: install it (it must be on PATH), or the package imageio-ffmpeg.")
    return program


def log_failure(what: str, stderr: bytes) -> None:
    """Tell the log what happened to an ffmpeg, and the end of what it said itself."""
    logger.error("ffmpeg %s: %s", what, shorten(stderr[-STDERR_KEPT:].decode("utf-8", "replace").strip(), 500))


def kill_group(pid: int) -> None:
    """Kill the process and all that it started: every one of them holds the pipes open."""
    with suppress(ProcessLookupError, PermissionError):  # gone already; macOS says EPERM of a group of zombies
        os.killpg(pid, signal.SIGKILL)


class FfmpegFailedError(Exception):
    """ffmpeg ended with a bad status, or did not end in time."""


def run_ffmpeg(arguments: Sequence[str], *, folder: Path, timeout: float) -> bytes:
    """What ffmpeg writes to its standard output. Blocks; for worker threads.

    Args:
        arguments: ffmpeg's own, without the program.
        folder: Where it runs: file names are relative to it, so that no message holds a path.
        timeout: Seconds it may take altogether.

    Raises:
        ConversionError: ffmpeg is missing or cannot be started.
        FfmpegFailedError: It failed or took too long.
    """
    command = [require_ffmpeg(), *QUIET, *arguments]
    try:
        process = subprocess.Popen(  # noqa: S603 - our own arguments, no shell
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, start_new_session=True
        )
    except OSError as error:
        raise not_started(error) from None
    with process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            log_failure("took too long", b"")
            raise FfmpegFailedError("took too long") from None
        finally:
            if process.returncode is None:
                kill_group(process.pid)
    if process.returncode != 0:
        log_failure(f"ended with status {process.returncode}", errors)
        raise FfmpegFailedError(f"ended with status {process.returncode}")
    return output


def not_started(error: OSError) -> ConversionError:
    """The error for an ffmpeg that the system would not start."""
    logger.error("ffmpeg cannot be started: %s", error.strerror)
    return ConversionError("ffmpeg cannot be started on the server.")
