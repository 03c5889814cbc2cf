"""The command line: says a text aloud, or into a file, through the running server or with the engine itself."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

# Whatever is heavy is imported once it is known that there is something to say: `--help` and a typing error are answered at once.
from audio_formats import FORMATS
from errors import TTSError
from new_file import OutputError
from say_options import UsageError, parse, read_text

if TYPE_CHECKING:
    from config import Settings
    from progress_bar import ProgressBar
    from reading import Speaker
    from recital import Output
    from speech_server import SpeechServer

logger = logging.getLogger(__name__)

OK, FAILED, USAGE = 0, 1, 2
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE

_BAD_REQUEST = 400
_PROBE_SECONDS = 2.0


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit status."""
    _reserve_standard_descriptors()
    try:
        return _main(parse(arguments))
    except UsageError as error:
        return _complain(str(error), USAGE)
    except TTSError as error:
        return _complain(error.message, USAGE if error.status == _BAD_REQUEST else FAILED)
    except OutputError as error:
        return _complain(str(error), FAILED)
    except MemoryError:
        return _complain("the memory is too small for this", FAILED)
    except BrokenPipeError:
        return BROKEN_PIPE
    except OSError as error:
        return _complain(f"something cannot be read or written: {error.strerror or type(error).__name__}", FAILED)
    except Exception as error:
        logger.exception("unforeseen")
        return _complain(f"it failed in an unforeseen way ({type(error).__name__}); --verbose shows the details", FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED


def _main(args: argparse.Namespace) -> int:
    settings = _settings(args)
    if args.list_voices:
        from voice_table import voice_table

        print(voice_table(_server(args, settings), settings))
        return OK
    text = read_text(args)
    if args.output is None:
        from audio_player import require_player

        require_player()
    return _say(text, args, settings)


def _say(text: str, args: argparse.Namespace, settings: Settings) -> int:
    import reading
    from progress_bar import ProgressBar
    from recital import Interrupted, recite, run_until_signal

    pieces = reading.cut(reading.readable(text, normalize=settings.normalize_text), settings.max_input_length)
    server = _server(args, settings)
    if server is None:
        import local_speaker  # noqa: F401 - takes seconds, and inside the event loop Ctrl-C would have to wait for it
    output = _output(args, settings)
    bar = ProgressBar(reading.sentences(pieces))

    async def say() -> None:
        async with _speaker(server, args.voice, settings, bar, streamed=output.streamed) as speaker:
            await recite(pieces, speaker, output, settings, args.seed, bar)

    try:
        run_until_signal(say())
    except Interrupted as interrupted:
        return interrupted.status
    finally:
        bar.close()
    return OK


@asynccontextmanager
async def _speaker(
    server: SpeechServer | None, voice: str | None, settings: Settings, bar: ProgressBar, *, streamed: bool
) -> AsyncIterator[Speaker]:
    if server is not None:
        from server_speaker import ServerSpeaker

        yield ServerSpeaker(server, voice or server.default_voice or settings.default_voice, bar.tell, bar.warn)
        return
    from local_speaker import LocalSpeaker

    async with LocalSpeaker(settings, voice or settings.default_voice, bar.tell, streamed=streamed) as speaker:
        yield speaker


def _output(args: argparse.Namespace, settings: Settings) -> Output:
    from recital import Output

    captions = Path(args.captions) if args.captions else None
    if args.output is None:
        return Output(None, None, FORMATS["pcm"], args.speed, captions)
    if args.output == "-":
        return Output(None, _take_standard_output(), FORMATS[args.format or settings.default_format], args.speed, captions)
    path = Path(args.output)
    return Output(path, None, FORMATS[args.format or path.suffix[1:].lower()], args.speed, captions)


def _take_standard_output() -> int:
    """Standard output's descriptor, for the audio alone: what a library prints goes to standard error from here on."""
    taken = os.dup(1)
    os.dup2(2, 1)
    return taken


def _settings(args: argparse.Namespace) -> Settings:
    from config import SettingsError, load_settings

    if args.verbose:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    else:
        logging.getLogger().addHandler(logging.NullHandler())  # what goes wrong is told in one line
    try:
        return load_settings()
    except SettingsError as error:
        raise UsageError(str(error)) from None


def _server(args: argparse.Namespace, settings: Settings) -> SpeechServer | None:
    """The server to use: the one that is named, or the one that runs on this machine; None to load the engine here.

    Raises:
        UnreachableError: The one that is named does not answer.
    """
    if args.local:
        return None
    from speech_server import SpeechServer

    key = args.api_key or (settings.api_key[0].get_secret_value() if settings.api_key else None)
    try:
        server = SpeechServer(args.server or _own_url(settings), key, settings.queue_timeout + settings.generation_timeout)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if args.server:
        server.health()
        return server
    try:
        server.health(_PROBE_SECONDS)
    except TTSError:
        return None
    return server


def _own_url(settings: Settings) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 - where to reach it, not where to bind
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def _complain(message: str, status: int) -> int:
    if sys.stderr is not None:  # None: closed by whoever started us
        with suppress(OSError):
            print(f"say.py: {message}", file=sys.stderr)
    return status


def _reserve_standard_descriptors() -> None:
    """Where standard input, output or error is closed, the next file that is opened would take its number, and get its bytes."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _flushed(status: int) -> int:
    """The exit status once all that was printed has left."""
    try:
        for stream in (sys.stderr, sys.stdout):
            if stream is not None:
                stream.flush()
    except BrokenPipeError:
        return BROKEN_PIPE
    except OSError as error:
        return _complain(f"standard output cannot be written: {error.strerror}", FAILED)
    return status


if __name__ == "__main__":
    # Not sys.exit: a model that is being loaded cannot be stopped, and the interpreter's end would abort its thread in the middle of
    # native code (measured: "terminate called without an active exception", status 134). Everything is cleaned up by now.
    os._exit(_flushed(main()))
