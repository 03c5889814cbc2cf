"""The command line: speak a text through the loudspeaker or into a file, through a server or with the engine in this process."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

# Heavy modules are imported when they are needed, so that `--help` and usage errors are answered at once.
from audio_formats import FORMATS
from errors import TTSError
from files import OutputError

if TYPE_CHECKING:
    from config import Settings
    from say_backends import SpeechServer
    from say_output import ProgressBar
    from say_reading import Output, Speaker


_CAPTION_ENDINGS = (".vtt", ".srt", ".json")
_MOST_SEED = 2**32 - 1

_DESCRIPTION = """Say a text aloud, or write it into an audio file.

The text is the words on the command line, a file (-f), or standard input (-, or simply a pipe); it may be as long as a book.
A server that runs on this machine is used; without one, the voice is loaded here, which takes a moment."""

_EPILOG = f"""examples:
  say.py "Hello"                               through the loudspeaker
  say.py -f book.txt -o book.mp3               a book, into a file
  say.py -f book.txt -o book.mp3 --captions book.vtt
  echo "Hello" | say.py --voice heart --speed 1.2
  say.py "Hello" -o - --format flac > a.flac   to standard output
  say.py --local "Hello" -o test.wav           without a server: loads the model here
  say.py --list-voices

formats, by the file's ending: {", ".join(FORMATS)}

exit status: 0 all was said; 1 it failed while speaking; 2 the command line, a setting, the text or the voice cannot be used;
130 ended by Ctrl-C (128 + the signal's number in general); 141 the reader of standard output went away"""


class UsageError(Exception):
    """The command line cannot be followed; the message says why."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help explains everything)")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked.

    Raises:
        UsageError: Says what is wrong.
        SystemExit: After `--help`.
    """
    args = _parser().parse_args(arguments)
    if args.server and args.local:
        raise UsageError("--server and --local exclude one another")
    if args.file is not None and args.text:
        raise UsageError("give the text on the command line or with -f, not both")
    if args.format and args.output is None:
        raise UsageError("--format says how a file is written; name the file with -o")
    if args.output is not None:
        _check_output(args.output, args.format)
    if args.captions is not None:
        _check_captions(Path(args.captions))
    return args


def read_text(args: argparse.Namespace) -> str:
    """The text, from wherever the options say.

    Raises:
        UsageError: There is none, or it cannot be read.
    """
    if args.file is not None and args.file != "-":
        return _decoded(_read_file(Path(args.file)), args.file)
    if args.text and args.text != ["-"]:
        return " ".join(args.text)
    if sys.stdin is None:
        raise UsageError("there is no text: standard input is closed")
    if not args.text and args.file is None and sys.stdin.isatty():
        raise UsageError('there is no text: say.py "Hello", or -f FILE, or - to type it')
    return _decoded(sys.stdin.buffer.read(), "standard input")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="say.py", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="*", help="what to say; - for standard input")
    parser.add_argument("-f", "--file", metavar="FILE", help="read the text from FILE (UTF-8); - for standard input")
    parser.add_argument("-o", "--output", metavar="FILE", help="write an audio file; - for standard output. Nothing is played then")
    parser.add_argument("--format", choices=FORMATS, help="the file's format, where its ending does not say it")
    parser.add_argument("--captions", metavar="FILE", help="also write when each sentence is heard, as .vtt, .srt or .json")
    parser.add_argument("--voice", metavar="NAME", help="a voice's name (default: DEFAULT_VOICE)")
    parser.add_argument("--speed", type=_number(float, 0.25, 4), default=1.0, metavar="N", help="0.25 to 4; the pitch stays (default: 1)")
    parser.add_argument("--seed", type=_number(int, 0, _MOST_SEED), metavar="N", help="the same text, voice and seed sound the same again")
    parser.add_argument("--list-voices", action="store_true", help="list the voices, and say nothing")
    parser.add_argument("--server", metavar="URL", help="use this server (default: the one on HOST and PORT of the settings, if it runs)")
    parser.add_argument("--api-key", metavar="KEY", help="the server's key (default: API_KEY from the environment or .env)")
    parser.add_argument("--local", action="store_true", help="use no server: load the model here")
    parser.add_argument("--verbose", action="store_true", help="show the log on standard error")
    return parser


def _number(kind: type[int] | type[float], least: float, most: float) -> Callable[[str], float]:
    """An argument's type: a number within bounds."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(least) - 1
        if not least <= value <= most:  # NaN fails too
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to {most}")
        return value

    return convert


def _check_output(name: str, format_name: str | None) -> None:
    if name == "-":
        if sys.stdout is None:
            raise UsageError("standard output is closed")
        if sys.stdout.isatty():
            raise UsageError("-o - would write audio to the terminal: send it into a file or a pipe")
        return
    path = Path(name)
    if not format_name and path.suffix[1:].lower() not in FORMATS:
        known = ", ".join(f".{known}" for known in FORMATS)
        raise UsageError(f"the ending of {path.name!r} names no format; there are {known} (or say --format)")
    _check_target(path)


def _check_captions(path: Path) -> None:
    if path.suffix.lower() not in _CAPTION_ENDINGS:
        raise UsageError(f"the ending of {path.name!r} names no kind of captions; there are {', '.join(_CAPTION_ENDINGS)}")
    _check_target(path)


def _check_target(path: Path) -> None:
    """Notice before any work what cannot be written."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UsageError(f"{path} cannot be written: its folder does not exist")
    if not os.access(path if path.exists() and not path.is_file() else folder, os.W_OK):
        raise UsageError(f"{path} cannot be written: permission denied")


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {(error.strerror or type(error).__name__).lower()}") from None


def _decoded(data: bytes, name: str) -> str:
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text (byte {error.start + 1} cannot be read)") from None


def voice_table(server: SpeechServer | None, settings: Settings) -> str:
    """A line a voice: its name, its model, whether the server can speak with it now, its description and its other names.

    Args:
        server: Whose voices; None for those of the settings, of which nobody knows yet whether they can speak.
        settings: The settings.

    Raises:
        TTSError: The server refuses, or does not answer.
    """
    rows = [_row(voice) for voice in (_own_voices(settings) if server is None else server.voices())]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows)


def _row(voice: dict[str, Any]) -> tuple[str, ...]:
    ready = "" if "ready" not in voice else "ready" if voice["ready"] else "not ready"
    names = voice.get("aliases", ())
    from voice_presets import OPENAI_VOICES

    if set(OPENAI_VOICES) <= set(names):
        names = [*(name for name in names if name not in OPENAI_VOICES), "OpenAI's names"]
    aliases = ", ".join(names)
    about = f"{voice.get('description') or ''}{f' (also {aliases})' if aliases else ''}".strip()
    name = voice["name"] if voice["name"] == voice["id"] else f"{voice['name']} ({voice['id']})"
    return name, voice.get("model", ""), ready, " ".join(about.split())


def _own_voices(settings: Settings) -> list[dict[str, Any]]:
    from voice_presets import VoicePresetManager
    from voice_store import VoiceStore

    presets = VoicePresetManager(settings.presets_dir, settings.default_voice, VoiceStore(*settings.voice_folders))
    return [
        {
            "id": voice.id,
            "name": voice.name,
            "model": voice.preset.model,
            "description": voice.preset.description,
            "aliases": presets.catalog.aliases_of(voice),
        }
        for voice in presets.catalog.voices
    ]


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
        print(voice_table(_server(args, settings), settings))
        return OK
    text = read_text(args)
    if args.output is None:
        from say_output import require_player

        require_player()
    return _say(text, args, settings)


def _say(text: str, args: argparse.Namespace, settings: Settings) -> int:
    from say_output import ProgressBar
    from say_reading import Interrupted, cut, readable, recite, run_until_signal, sentences

    pieces = cut(readable(text, normalize=settings.normalize_text), settings.max_input_length)
    server = _server(args, settings)
    if server is None:
        import tts_engine  # noqa: F401 - takes seconds, and inside the event loop Ctrl-C would have to wait for it
    output = _output(args, settings)
    bar = ProgressBar(sentences(pieces))

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
        from say_backends import ServerSpeaker

        yield ServerSpeaker(server, voice or server.default_voice or settings.default_voice, bar.tell, bar.warn)
        return
    from say_backends import LocalSpeaker

    async with LocalSpeaker(settings, voice or settings.default_voice, bar.tell, streamed=streamed) as speaker:
        yield speaker


def _output(args: argparse.Namespace, settings: Settings) -> Output:
    from say_reading import Output

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
    from say_backends import SpeechServer

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
