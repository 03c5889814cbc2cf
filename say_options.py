"""The options of say.py: what there are, and the checks that need nothing but the command line and the disk."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

# Only what costs nothing: `--help` must be there at once.
from audio_formats import FORMATS

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
