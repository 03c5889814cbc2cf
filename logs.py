"""The log: to stderr and to a rotating file, one line an event, never the spoken text."""

from __future__ import annotations

import logging
import sys
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path

_FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s"
_FILE_BYTES = 5_000_000
_FILE_COUNT = 4  # rotated ones kept beside the current: 25 MB at most
_COMPLAINT_SECONDS = 3600.0


class _PatientFileHandler(RotatingFileHandler):
    """A rotating file that outlives a full disk: what cannot be written is dropped, and stderr is told once an hour."""

    _complained_at = -_COMPLAINT_SECONDS

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by logging when a line could not be written."""
        now = time.monotonic()
        if now - self._complained_at >= _COMPLAINT_SECONDS:
            self._complained_at = now
            print(f"the log file cannot be written: {sys.exc_info()[1]!r}", file=sys.stderr)


def configure(level: str, folder: Path, *, to_stderr: bool = True) -> None:
    """Send the log to stderr and to `folder`/server.log. A folder that cannot be written costs the file, not the start."""
    formatter = logging.Formatter(_FORMAT, datefmt="%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    root = logging.getLogger()
    root.setLevel(level.upper())
    for handler in list(root.handlers):
        root.removeHandler(handler)
    if to_stderr:
        _add(root, logging.StreamHandler(), formatter)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _add(root, _PatientFileHandler(folder / "server.log", maxBytes=_FILE_BYTES, backupCount=_FILE_COUNT, encoding="utf-8"), formatter)
    except OSError as error:
        _add(root, logging.StreamHandler(), formatter) if not to_stderr else None
        logging.getLogger(__name__).warning("no log file: CACHE_DIR cannot be written (%s)", error.strerror or type(error).__name__)
    logging.getLogger("uvicorn.error").addFilter(_already_told)
    for noisy in ("httpx", "httpcore", "urllib3", "huggingface_hub", "asyncio", "multipart", "python_multipart", "filelock", "numba"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


def _already_told(record: logging.LogRecord) -> bool:
    """Leave out uvicorn's traceback of an application error: `RequestLog` has told it, with the request's id."""
    return not str(record.msg).startswith("Exception in ASGI application")


def _add(root: logging.Logger, handler: logging.Handler, formatter: logging.Formatter) -> None:
    handler.setFormatter(formatter)
    root.addHandler(handler)
