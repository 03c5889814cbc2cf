"""The command line: speak a text through the loudspeaker or into a file, with a server or with the engine in this process."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

# Heavy modules are imported inside functions, so that `--help` and usage errors stay fast.
from audio_formats import FORMATS
from errors import TTSError
from files import OutputError

if TYPE_CHECKING:
    import asyncio

    from config import Settings
    from say_backends import SpeechServer
    from say_output import ProgressBar
    from say_reading import Output, Speaker

T = TypeVar("T")

PROGRAM = os.environ.get("SESAME_PROGRAM", "say.py")
"""What the user called: the script `sesame` sets its own name."""

logger = logging.getLogger(__name__)

OK, FAILED, USAGE = 0, 1, 2
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_BAD_REQUEST = 400
_CAPTION_ENDINGS = (".vtt", ".srt", ".json")
_MAX_SEED = 2**32 - 1

_DESCRIPTION = """Speak a text, or write it into an audio file.

The text is given on the command line, in a file (-f), or on standard input (- or a pipe). It may be as long as a book.
If a server runs on this machine, it is used; otherwise the voice is loaded in this process, which takes a moment."""

_EPILOG = f"""examples:
  {PROGRAM} "Hello"                               play through the loudspeaker
  {PROGRAM} -f book.txt -o book.mp3               write a book into a file
  {PROGRAM} -f book.txt -o book.mp3 --captions book.vtt
  echo "Hello" | {PROGRAM} --voice heart --speed 1.2
  {PROGRAM} "Hello" -o - --format flac > a.flac   write to standard output
  {PROGRAM} --local "Hello" -o test.wav           without a server: load the model in this process
  {PROGRAM} --list-voices

formats, chosen by the file's ending: {", ".join(FORMATS)}

exit status: 0 success; 1 failed while speaking; 2 invalid option, setting, text or voice;
130 stopped by Ctrl-C (in general: 128 + the signal's number); 141 the reader of standard output closed it"""


class UsageError(Exception):
    """The command line is invalid; the message says why."""


class StoppedBySignal(Exception):
    """A signal stopped the work.

    Attributes:
        status: The exit status for this signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help for all options)")


class _Version(argparse.Action):
    """Print the version and exit: argparse's own action would need the version, and with it the import of pydantic, at every start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from config import VERSION

        print(f"{PROGRAM} {VERSION}")
        parser.exit()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    _reserve_standard_descriptors()
    try:
        return _main(parse(arguments))
    except StoppedBySignal as stopped:
        return stopped.status
    except UsageError as error:
        return _complain(str(error), USAGE)
    except TTSError as error:
        return _complain(error.message, USAGE if error.status == _BAD_REQUEST else FAILED)
    except OutputError as error:
        return _complain(str(error), FAILED)
    except MemoryError:
        return _complain("not enough memory", FAILED)
    except BrokenPipeError:
        return BROKEN_PIPE
    except OSError as error:
        return _complain(f"reading or writing failed: {error.strerror or type(error).__name__}", FAILED)
    except Exception as error:
        logger.exception("unexpected error")
        return _complain(f"unexpected error ({type(error).__name__}); --verbose shows the details", FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the checked options.

    Raises:
        UsageError: An option is invalid.
        SystemExit: After `--help`.
    """
    args = _parser().parse_args(arguments)
    if args.server and args.local:
        raise UsageError("--server and --local are mutually exclusive")
    if args.file is not None and args.text:
        raise UsageError("give the text on the command line or with -f, not both")
    if args.format and args.output is None:
        raise UsageError("--format is for files: name the file with -o")
    if args.output is not None:
        _check_output(args.output, args.format)
    if args.words and args.captions is None:
        raise UsageError("--words is for captions: name their file with --captions")
    if args.captions is not None:
        _check_captions(Path(args.captions))
    return args


def read_text(args: argparse.Namespace) -> str:
    """Return the text from the command line, a file or standard input.

    Raises:
        UsageError: There is no text, or it cannot be read.
    """
    if args.file is not None and args.file != "-":
        return _decoded(_read_file(Path(args.file)), args.file)
    if args.text and args.text != ["-"]:
        return " ".join(args.text)
    if sys.stdin is None:
        raise UsageError("there is no text: standard input is closed")
    if not args.text and args.file is None and sys.stdin.isatty():
        raise UsageError(f'there is no text: use {PROGRAM} "Hello", or -f FILE, or - to type it')
    return _decoded(sys.stdin.buffer.read(), "standard input")


def voice_table(voices: list[dict[str, Any]]) -> str:
    """Return one line a voice: name, model, whether it is ready (if known), description and aliases.

    Args:
        voices: As in the answer of `/v1/audio/voices`.
    """
    rows = [_row(voice) for voice in voices]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows)


def resting_notes(voices: list[dict[str, Any]]) -> list[str]:
    """Return why voices are not ready: one line for all voices with the same reason.

    Args:
        voices: As in the answer of `/v1/audio/voices`.
    """
    resting: dict[str, list[str]] = {}
    for voice in voices:
        if voice.get("reason"):
            resting.setdefault(voice["reason"].removeprefix(f"Voice '{voice['id']}' is "), []).append(voice["id"])
    return [f"{', '.join(names)}: {reason}" for reason, names in resting.items()]


def _main(args: argparse.Namespace) -> int:
    settings = _settings(args)
    if args.list_voices:
        from say_backends import local_voices

        server = _server(args, settings)
        voices = _run(server.voices()) if server else local_voices(settings)
        print(voice_table(voices), flush=True)
        for note in resting_notes(voices):
            print(f"{PROGRAM}: {note}", file=sys.stderr)
        return OK
    if args.check_words is not None:
        return _check_words(args, settings)
    text = read_text(args)
    if args.output is None:
        from say_output import require_loudspeaker

        require_loudspeaker()
    _say(text, args, settings)
    return OK


def _check_words(args: argparse.Namespace, settings: Settings) -> int:
    """List the words of a file that are misheard. Without a recogniser, speak them for somebody who listens."""
    from pronunciations import FILE, read_pronunciations
    from say_output import ProgressBar
    from say_reading import check_words, words_of
    from transcription import installed_recognizer

    words = words_of(_decoded(_read_file(Path(args.check_words)), args.check_words))
    if not words:
        raise UsageError(f"{args.check_words} has no words: write one a line")
    recognizer = installed_recognizer()
    if recognizer is None:
        _complain("no speech recogniser is installed (uv sync --inexact --extra verify): listen to the words yourself", OK)
        _say(".\n\n".join(words), args, settings)
        return OK
    server, bar = _server(args, settings), ProgressBar([], PROGRAM)
    known = read_pronunciations(settings.presets_dir / FILE)

    async def check() -> int:
        misheard = 0
        async with _speaker(server, args.voice, settings, bar, streamed=False, words=False) as speaker:
            async for checked in check_words(words, speaker, recognizer, known, args.seed or 0):
                if not checked.right:
                    misheard += 1
                    print(f"{checked.word}: heard {checked.heard!r}", flush=True)
        return misheard

    misheard = _run(check())
    print(f"{misheard} of {len(words)} words were misheard")
    return OK


def _say(text: str, args: argparse.Namespace, settings: Settings) -> None:
    from say_output import ProgressBar
    from say_reading import clean_text, sentences, speak_pieces, split_pieces

    pieces = split_pieces(clean_text(text, normalize=settings.normalize_text, speed=args.speed), settings.max_input_length)
    server = _server(args, settings)
    if server is None:
        import tts_engine  # noqa: F401 - takes seconds; imported inside the event loop, it would delay Ctrl-C
    output = replace(_output(args, settings), words=text if args.words else None)
    bar = ProgressBar(sentences(pieces), PROGRAM)

    async def say() -> str:
        async with _speaker(server, args.voice, settings, bar, streamed=output.streamed, words=args.words) as speaker:
            seconds = await speak_pieces(pieces, speaker, output, settings, args.seed, bar)
            return f"{seconds:.1f} s, voice {speaker.voice}"

    try:
        done = _run(say())
    finally:
        bar.close()
    bar.confirm(f"{_destination(args, output)}: {done}")


def _destination(args: argparse.Namespace, output: Output) -> str:
    """Return where the speech went, for the confirmation."""
    place = "Spoken" if args.output is None else f"Written to {output.path or 'standard output'}"
    return f"{place}, captions to {output.captions}" if output.captions else place


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` and return its result. A signal cancels it once; its clean-up is waited for.

    Signals that are ignored at the start (nohup) stay ignored. `asyncio.run` is not used because it waits for the threads of
    the default executor, and a host name look-up that hangs in one of them would delay Ctrl-C.

    Raises:
        StoppedBySignal: A signal was received.
    """
    import asyncio

    received: list[int] = []
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)

    def cancel(number: int) -> None:
        if not received:
            received.append(number)
            task.cancel()

    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, cancel, number)
    try:
        result = loop.run_until_complete(task)
    except asyncio.CancelledError:
        if not received:
            raise
    finally:
        _close(loop)
    if received:
        raise StoppedBySignal(received[0])
    return result


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what still runs in `loop`, then close it without waiting for its threads."""
    import asyncio

    if remaining := asyncio.all_tasks(loop):
        for task in remaining:
            task.cancel()
        loop.run_until_complete(asyncio.wait(remaining))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@asynccontextmanager
async def _speaker(
    server: SpeechServer | None, voice: str | None, settings: Settings, bar: ProgressBar, *, streamed: bool, words: bool
) -> AsyncIterator[Speaker]:
    from say_backends import LocalSpeaker, ServerSpeaker

    if server is not None:
        name = voice or server.default_voice or settings.default_voice
        yield ServerSpeaker(server, name, bar.status, bar.warn, normalize=settings.normalize_text, words=words)
        return
    async with LocalSpeaker(settings, voice or settings.default_voice, bar.status, streamed=streamed, words=words) as speaker:
        yield speaker


def _settings(args: argparse.Namespace) -> Settings:
    from config import SettingsError, load_settings

    if args.verbose:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    else:
        logging.getLogger().addHandler(logging.NullHandler())  # an error is reported in one line
    try:
        return load_settings()
    except SettingsError as error:
        raise UsageError(str(error)) from None


def _server(args: argparse.Namespace, settings: Settings) -> SpeechServer | None:
    """Return the server given with --server, or the one running on this machine; None to use the engine in this process.

    Raises:
        UnreachableError: The server given with --server does not answer.
    """
    if args.local:
        return None
    from say_backends import new_server, running_server

    try:
        if not args.server:
            return _run(running_server(settings, args.api_key))
        server = new_server(settings, args.server, args.api_key)
    except ValueError as error:
        raise UsageError(str(error)) from None
    _run(server.health())
    return server


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
    """Return a descriptor of standard output for the audio. From now on, what libraries print goes to standard error."""
    taken = os.dup(1)
    os.dup2(2, 1)
    return taken


def _row(voice: dict[str, Any]) -> tuple[str, ...]:
    from voice_presets import OPENAI_VOICES

    ready = "" if "ready" not in voice else "ready" if voice["ready"] else "not ready"
    names = voice.get("aliases", ())
    if set(OPENAI_VOICES) <= set(names):
        names = [*(name for name in names if name not in OPENAI_VOICES), "OpenAI's names"]
    aliases = ", ".join(names)
    description = f"{voice.get('description') or ''}{f' (also {aliases})' if aliases else ''}"
    name = voice["name"] if voice["name"] == voice["id"] else f"{voice['name']} ({voice['id']})"
    return name, voice.get("model", ""), ready, " ".join(description.split())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="*", help="the text; - for standard input")
    parser.add_argument("-f", "--file", metavar="FILE", help="read the text from FILE (UTF-8); - for standard input")
    parser.add_argument("-o", "--output", metavar="FILE", help="write an audio file instead of playing; - for standard output")
    parser.add_argument("--format", choices=FORMATS, help="the file's format, if its ending does not name one")
    parser.add_argument("--captions", metavar="FILE", help="also write the sentences with their times, as .vtt, .srt or .json")
    parser.add_argument("--words", action="store_true", help="the captions have each word with its time (built-in voices)")
    parser.add_argument("-v", "--voice", metavar="NAME", help="the voice's name (default: DEFAULT_VOICE)")
    parser.add_argument("--speed", type=_number(float, 0.25, 4), default=1.0, metavar="N", help="0.25 to 4; keeps the pitch (default: 1)")
    parser.add_argument("--seed", type=_number(int, 0, _MAX_SEED), metavar="N", help="the same text, voice and seed give the same audio")
    parser.add_argument("--check-words", metavar="FILE", help="speak each line of FILE, and list those that a speech recogniser mishears")
    parser.add_argument("--list-voices", action="store_true", help="list the voices and exit")
    parser.add_argument("--server", metavar="URL", help="use this server (default: the one on HOST and PORT of the settings, if it runs)")
    parser.add_argument("--api-key", metavar="KEY", help="the server's key (default: API_KEY from the environment or .env)")
    parser.add_argument("--local", action="store_true", help="use no server: load the model in this process")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument("--verbose", action="store_true", help="show the log on standard error")
    return parser


def _number(kind: type[int] | type[float], minimum: float, maximum: float) -> Callable[[str], float]:
    """Return an argument type: a number within bounds."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(minimum) - 1
        if not minimum <= value <= maximum:  # NaN fails too
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {minimum:g} to {maximum}")
        return value

    return convert


def _check_output(name: str, format_name: str | None) -> None:
    if name == "-":
        if sys.stdout is None:
            raise UsageError("standard output is closed")
        if sys.stdout.isatty():
            raise UsageError("-o - would write audio to the terminal: redirect it to a file or a pipe")
        return
    path = Path(name)
    if not format_name and path.suffix[1:].lower() not in FORMATS:
        known = ", ".join(f".{known}" for known in FORMATS)
        raise UsageError(f"the ending of {path.name!r} is not a known format: use {known}, or --format")
    _check_writable(path)


def _check_captions(path: Path) -> None:
    if path.suffix.lower() not in _CAPTION_ENDINGS:
        raise UsageError(f"the ending of {path.name!r} is not a known caption format: use {', '.join(_CAPTION_ENDINGS)}")
    _check_writable(path)


def _check_writable(path: Path) -> None:
    """Raise UsageError before any work if `path` cannot be written."""
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
        raise UsageError(f"{name} is not UTF-8 text (invalid byte at position {error.start + 1})") from None


def _complain(message: str, status: int) -> int:
    if sys.stderr is not None:  # None: closed by the calling process
        with suppress(OSError):
            print(f"{PROGRAM}: {message}", file=sys.stderr)
    return status


def _reserve_standard_descriptors() -> None:
    """Open /dev/null for each closed standard descriptor, or the next opened file would get its number, and its output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _flushed(status: int) -> int:
    """Flush what was printed and return the exit status."""
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
    # Not sys.exit: the load of a model cannot be stopped, and the end of the interpreter would abort its thread in the middle of
    # native code (measured: "terminate called without an active exception", status 134). All clean-up is done at this point.
    os._exit(_flushed(main()))
