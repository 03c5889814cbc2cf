"""What `install.sh` asks of Python: the settings a service will see, its files, and what the running server answers."""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import plistlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

PROJECT_DIR = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_DIR))

from config import Settings, SettingsError, load_settings  # noqa: E402 - the project's modules lie one folder up
from server_process import listen  # noqa: E402
from speech_model import LoadProgress, ModelLoadError  # noqa: E402

PLIST_TEMPLATE = PROJECT_DIR / "com.burkestudio.sesame-tts.plist"
UNIT_TEMPLATE = PROJECT_DIR / "deploy" / "sesame-tts.service"

# Where the model lies: a service started by the system does not see what a shell's profile exports.
_CARRIED = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "XDG_CACHE_HOME")
_GRACE_SECONDS = 15  # beyond SHUTDOWN_TIMEOUT: telling the rest 503, closing the models, flushing the log
_SENTENCE = "Hello. Sesame is installed, and this is how it sounds."
_SPEECH_SECONDS = 180.0


def service_settings() -> Settings:
    """The settings as the service will have them: from `.env` and the defaults, whatever this shell exports.

    Raises:
        SettingsError: `.env` holds something that cannot be used.
    """
    names = {name.upper() for name in Settings.model_fields}
    ignored = sorted(name for name in os.environ if name.upper() in names)
    for name in ignored:
        del os.environ[name]
    if ignored:
        print(f"Note: {', '.join(ignored)} in this shell is not seen by a service. Put it into .env to make it count.", file=sys.stderr)
    return load_settings()


def address(settings: Settings) -> tuple[str, int]:
    """Host and port at which this machine reaches the server."""
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - a comparison, nothing is bound
    return everywhere.get(settings.host, settings.host), settings.port


def exit_timeout(settings: Settings) -> int:
    """Seconds between SIGTERM and SIGKILL that leave the server its SHUTDOWN_TIMEOUT."""
    return math.ceil(settings.shutdown_timeout) + _GRACE_SECONDS


def render_plist(settings: Settings, environment: dict[str, str]) -> bytes:
    """The launchd service: the template with absolute paths, its ExitTimeOut, and `environment` added."""
    plist = plistlib.loads(PLIST_TEMPLATE.read_bytes())
    rendered = cast("dict[str, Any]", _replaced(plist, {"@PROJECT@": str(PROJECT_DIR), "@CACHE_DIR@": str(settings.cache_dir)}))
    rendered["ExitTimeOut"] = exit_timeout(settings)
    rendered["EnvironmentVariables"].update(environment)
    return plistlib.dumps(rendered, sort_keys=False)


def _replaced(value: object, names: dict[str, str]) -> object:
    if isinstance(value, dict):
        return {key: _replaced(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, names) for item in value]
    if isinstance(value, str):
        for name, text in names.items():
            value = value.replace(name, text)
    return value


def render_unit(settings: Settings, environment: dict[str, str]) -> str:
    """The systemd user unit: the template with absolute paths, its TimeoutStopSec, and `environment` added."""
    lines = []
    for line in UNIT_TEMPLATE.read_text("utf-8").splitlines():
        escape = _unit_command if line.startswith("ExecStart=") else _unit_text
        lines.append(line.replace("@PROJECT@", escape(str(PROJECT_DIR))).replace("@EXIT_TIMEOUT@", str(exit_timeout(settings))))
        if line.startswith("Environment="):
            lines += [f'Environment="{_unit_quoted(f"{name}={text}")}"' for name, text in environment.items()]
    return "\n".join(lines) + "\n"


def _unit_text(text: str) -> str:
    """`%` starts a specifier in a unit file (systemd.unit(5))."""
    return text.replace("%", "%%")


def _unit_quoted(text: str) -> str:
    return _unit_text(text.replace("\\", "\\\\").replace('"', '\\"'))


def _unit_command(text: str) -> str:
    """Inside quotes of a command line `$` starts a variable as well (systemd.service(5))."""
    return _unit_quoted(text).replace("$", "$$")


def carried_environment() -> dict[str, str]:
    """What this shell says about where models lie."""
    return {name: os.environ[name] for name in _CARRIED if os.environ.get(name)}


def ask(settings: Settings, method: str, path: str, body: object = None, timeout: float = 5.0) -> tuple[int, bytes]:
    """Status and body of one request to the server, with its key if it has one.

    Raises:
        OSError: Nobody answers.
        http.client.HTTPException: Somebody answers, but not in HTTP.
    """
    host, port = address(settings)
    headers = {"Content-Type": "application/json"}
    if settings.api_key:
        headers["Authorization"] = f"Bearer {settings.api_key[0].get_secret_value()}"
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _health(settings: Settings) -> dict[str, Any] | None:
    """What /health says, or None while nobody does."""
    try:
        status, body = ask(settings, "GET", "/health")
        found = json.loads(body) if status == 200 else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _until(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether `condition` came true in time; asked four times a second."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.25)
    return True


def _pid_file(settings: Settings) -> dict[str, Any]:
    """What the running server has written down of itself, or nothing."""
    try:
        found = json.loads((settings.cache_dir / "server.pid").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def facts(settings: Settings, _: argparse.Namespace) -> int:
    """One a line, for the shell: URL, cache folder, seconds a stop may take, `csm` if it is wanted, the running server's PID; `-` for nothing."""
    host, port = address(settings)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(
        url,
        settings.cache_dir,
        exit_timeout(settings),
        "csm" if settings.csm_enabled else "-",
        _pid_file(settings).get("pid", "-"),
        sep="\n",
    )
    return 0


def render(settings: Settings, arguments: argparse.Namespace) -> int:
    """Write the service files that the endings of `arguments.files` ask for, readable by their owner alone."""
    environment = carried_environment()
    settings.cache_dir.mkdir(parents=True, exist_ok=True)  # launchd makes the log file, but not its folder
    for target in arguments.files:
        content = render_plist(settings, environment) if target.suffix == ".plist" else render_unit(settings, environment).encode()
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(target.name + ".new")
        draft.write_bytes(content)
        draft.chmod(0o600)
        draft.replace(target)
    return 0


def fetch(settings: Settings, _: argparse.Namespace) -> int:
    """Fetch what is missing of Sesame's model, and say how far it is. Stopped at any point, the next run goes on from there."""
    from csm_files import find_model

    try:
        files = find_model(settings.model_id, _Progress(sys.stdout.isatty()).report)
    except ModelLoadError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. What has been fetched is kept.", file=sys.stderr)
        return 1
    print(f"All of {files.source} is on this machine." + (f" ({files.note}.)" if files.note else ""))
    return 0


class _Progress:
    """On a terminal one line that counts up; elsewhere a line for each tenth."""

    def __init__(self, on_terminal: bool) -> None:
        self._on_terminal = on_terminal
        self._tenth = -1

    def report(self, progress: LoadProgress) -> None:
        """Called twice a second at most while something is fetched."""
        if not progress.total:
            return
        done = progress.done or 0
        tenth = 10 * done // progress.total
        line = f"{done / 1e9:6.2f} of {progress.total / 1e9:.2f} GB  {progress.stage}"
        if self._on_terminal:
            print(f"\r{line:<110.110}", end="\n" if done >= progress.total else "", flush=True)
        elif tenth > self._tenth:
            print(line, flush=True)
        self._tenth = tenth


def port(settings: Settings, arguments: argparse.Namespace) -> int:
    """0 if the port can be had, or is the running service's own; else the server's own words about who holds it."""
    if arguments.running and _pid_file(settings).get("port") == settings.port:
        return 0
    listen(settings).close()
    return 0


def wait(settings: Settings, arguments: argparse.Namespace) -> int:
    """0 as soon as a server answers /health, and is not the one with `arguments.not_pid`."""

    def answers() -> bool:
        pid = str(_pid_file(settings).get("pid", ""))
        changed = not arguments.not_pid or pid not in ("", arguments.not_pid)
        return changed and _health(settings) is not None

    return 0 if _until(arguments.seconds, answers) else 1


def ready(settings: Settings, arguments: argparse.Namespace) -> int:
    """0 as soon as the default voice can speak; 1 when its model failed or the time is over."""

    def settled() -> bool:
        health = _health(settings) or {}
        return health.get("status") in {"ok", "degraded"}

    _until(arguments.seconds, settled)
    try:
        status, _ = ask(settings, "GET", "/health/ready")
    except (OSError, http.client.HTTPException):
        return 1
    return 0 if status == 200 else 1


def speak(settings: Settings, arguments: argparse.Namespace) -> int:
    """Write one spoken sentence to `arguments.file`, as WAV."""
    voice = arguments.voice or settings.default_voice
    request = {"model": "tts-1", "input": _SENTENCE, "voice": voice, "response_format": "wav"}
    try:
        status, body = ask(settings, "POST", "/v1/audio/speech", request, timeout=_SPEECH_SECONDS)
    except (OSError, http.client.HTTPException) as error:
        print(f"The server did not answer: {type(error).__name__}.", file=sys.stderr)
        return 1
    if status != 200:
        print(f"The server answered {status}: {body[:500].decode('utf-8', 'replace')}", file=sys.stderr)
        return 1
    arguments.file.write_bytes(body)
    print(f"It spoke with the voice {voice}: {arguments.file}")
    return 0


def status(settings: Settings, _: argparse.Namespace) -> int:
    """Say what /health says, in a line or two; 1 if nobody answers or something is wrong."""
    health = _health(settings)
    host, at = address(settings)
    if health is None:
        print(f"Nobody answers at {host}:{at}/health.")
        return 1
    print(f"Answers at {host}:{at}: {health.get('status')}, PID {_pid_file(settings).get('pid', 'unknown')}.")
    for name, model in health.get("models", {}).items():
        print(f"{name}: {model.get('state')}. {model.get('error') or ''}".rstrip())
    return 0 if health.get("status") in {"ok", "loading"} else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for command in (facts, render, fetch, port, wait, ready, speak, status):
        sub = commands.add_parser(command.__name__, help=(command.__doc__ or "").splitlines()[0])
        sub.set_defaults(command=command)
        if command is render:
            sub.add_argument("files", type=Path, nargs="+", metavar="FILE")
        if command is port:
            sub.add_argument("--running", action="store_true", help="the service runs already, and may hold the port")
        if command in (wait, ready):
            sub.add_argument("seconds", type=float)
        if command is wait:
            sub.add_argument("--not-pid", default="", metavar="PID")
        if command is speak:
            sub.add_argument("file", type=Path)
            sub.add_argument("--voice", default="")
    return parser


def main() -> int:
    """Run the command named on the command line; 2 for a setting that cannot be used."""
    arguments = _parser().parse_args()
    try:
        result: int = arguments.command(service_settings(), arguments)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    return result


if __name__ == "__main__":
    sys.exit(main())
