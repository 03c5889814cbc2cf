"""The process around the server: its port, its PID file, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from config import Settings, SettingsError
from http_connections import guarded_protocol

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 75  # longer than most clients' pools keep a connection, so that the server is not the one that closes it
_LARGEST_HEAD_BYTES = 64 * 1024


def listen(settings: Settings) -> socket.socket:
    """A socket bound to HOST:PORT. Bound before anything is loaded, so that a taken port is told within a moment.

    Raises:
        SettingsError: Says who holds the port, as far as that can be known.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise SettingsError(f"HOST={settings.host!r} cannot be used: it is neither an address nor a name of this machine.") from None
    # The protocol by name: asyncio turns Nagle's algorithm off only where it says TCP. Without that every answer on a kept connection
    # waits for the client's delayed acknowledgement (measured on Linux: 47 ms instead of 5 for a small one).
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise SettingsError(_why_not_bound(settings, error)) from None
    bound.listen(_BACKLOG)
    return bound


def _why_not_bound(settings: Settings, error: OSError) -> str:
    place = f"PORT={settings.port}"
    if isinstance(error, PermissionError):
        return f"{place} cannot be used: ports below 1024 need root. Choose another, 8880 for example."
    holder = _running_server(settings.cache_dir)
    if holder and holder.get("port") == settings.port:
        return f"{place} is taken: sesame-tts is already running there (process {holder['pid']})."
    if error.strerror and "in use" in error.strerror:
        return f"{place} is taken by another program (`lsof -i :{settings.port}` shows which). Choose another port."
    return f"HOST={settings.host} {place} cannot be used: {error.strerror}."


def _running_server(cache_dir: Path) -> dict[str, int] | None:
    """What the PID file says, if the process it names is alive."""
    try:
        holder = json.loads((cache_dir / "server.pid").read_text())
        os.kill(holder["pid"], 0)
    except PermissionError:
        return dict(holder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(holder)


@contextlib.contextmanager
def pid_file(cache_dir: Path, port: int) -> Iterator[None]:
    """`cache_dir`/server.pid while the server runs. A file left by a killed server is replaced; a folder that cannot be written is told."""
    path = cache_dir / "server.pid"
    fresh = path.with_suffix(".pid.new")  # always the same: what a killed start leaves, the next one writes over
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps({"pid": os.getpid(), "port": port}))
        fresh.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        logger.warning("no PID file: CACHE_DIR cannot be written (%s)", error.strerror or type(error).__name__)
    try:
        yield
    finally:
        holder = _running_server(cache_dir)
        if holder and holder.get("pid") == os.getpid():
            with contextlib.suppress(OSError):
                path.unlink()


class _Server(uvicorn.Server):
    """uvicorn, with an orderly end: told when the end begins, and exit status 0 after it.

    uvicorn raises the signal again when it is done, so that the shell sees a killed process; launchd would take that for a crash.
    """

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the two signals that end a service."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins an orderly end, a second Ctrl-C cuts it short."""
        if not self.should_exit:
            # Not here: a signal comes between any two instructions, of the logging or of the queue too.
            asyncio.get_running_loop().call_soon_threadsafe(self._begin_end)
        super().handle_exit(sig, frame)

    def _begin_end(self) -> None:
        logger.info("stopping: no new work, what is being spoken is finished first")
        self._on_stop()


def serve(app: ASGIApp, settings: Settings, bound: socket.socket, on_stop: Callable[[], None]) -> None:
    """Serve until a signal ends it.

    Args:
        app: The application.
        settings: SHUTDOWN_TIMEOUT bounds how long requests in progress may take to finish.
        bound: From `listen`.
        on_stop: Called in the event loop when the end begins.
    """
    protocol, backlog = guarded_protocol()
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.shutdown_timeout),
        h11_max_incomplete_event_size=_LARGEST_HEAD_BYTES,
        http=protocol,
        backlog=backlog,
        ws="none",
    )
    with pid_file(settings.cache_dir, bound.getsockname()[1]):
        _Server(config, on_stop).run(sockets=[bound])
