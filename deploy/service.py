"""The parts of `install.sh` that need Python: read the settings, write the service files, call the server, show its download."""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import plistlib
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

PROJECT_DIR = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_DIR))

from config import Settings, SettingsError, load_settings  # noqa: E402 - the project's modules are one folder up

# What one command alone needs is imported there: install.sh runs this program up to eight times.

PLIST_TEMPLATE = PROJECT_DIR / "com.burkestudio.sesame-tts.plist"
QUICK_ACTION_TEMPLATE = PROJECT_DIR / "deploy" / "quick-action"
UNIT_TEMPLATE = PROJECT_DIR / "deploy" / "sesame-tts.service"

# Where models and added voices are stored. Copied into the service files, because a service does not see what a shell's profile exports.
_FOLDER_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "XDG_CACHE_HOME", "XDG_DATA_HOME")
_BUILT_IN_VOICE = "heart"
_GRACE_SECONDS = 15  # after SHUTDOWN_TIMEOUT: to answer the remaining requests with 503, close the models and flush the log
_SENTENCE = "Hello. Sesame is installed, and this is how it sounds."
_SPEECH_SECONDS = 180.0
_LOAD_SECONDS = 60.0  # for the built-in voice to be loaded, on a slow disk
_WATCH_SECONDS = 0.5
_INTERRUPTED = 4  # exit status of `watch` after Ctrl-C


def service_settings() -> Settings:
    """Load the settings as the service will, from `.env` alone: variables that this shell exports are ignored, with a note.

    Raises:
        SettingsError: `.env` contains an invalid setting.
    """
    names = {name.upper() for name in Settings.model_fields}
    ignored = sorted(name for name in os.environ if name.upper() in names)
    for name in ignored:
        del os.environ[name]
    if ignored:
        print(f"Note: the service does not see {', '.join(ignored)} from this shell. Set it in .env instead.", file=sys.stderr)
    return load_settings()


def address(settings: Settings) -> tuple[str, int]:
    """Return host and port for requests from this machine."""
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - a comparison, nothing is bound
    return everywhere.get(settings.host, settings.host), settings.port


def exit_timeout(settings: Settings) -> int:
    """Return the seconds from SIGTERM to SIGKILL: SHUTDOWN_TIMEOUT and some more."""
    return math.ceil(settings.shutdown_timeout) + _GRACE_SECONDS


def render_plist(settings: Settings, environment: dict[str, str]) -> bytes:
    """Return the launchd service file: the template with absolute paths, ExitTimeOut and `environment`."""
    plist = plistlib.loads(PLIST_TEMPLATE.read_bytes())
    rendered = cast("dict[str, Any]", _replace(plist, {"@PROJECT@": str(PROJECT_DIR), "@CACHE_DIR@": str(settings.cache_dir)}))
    rendered["ExitTimeOut"] = exit_timeout(settings)
    rendered["EnvironmentVariables"].update(environment)
    return plistlib.dumps(rendered, sort_keys=False)


def _replace(value: object, names: dict[str, str]) -> object:
    """Replace names in all strings of a nested value."""
    if isinstance(value, dict):
        return {key: _replace(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace(item, names) for item in value]
    if isinstance(value, str):
        for name, text in names.items():
            value = value.replace(name, text)
    return value


def render_unit(settings: Settings, environment: dict[str, str]) -> str:
    """Return the systemd user unit: the template with absolute paths, TimeoutStopSec and `environment`."""
    lines = []
    for line in UNIT_TEMPLATE.read_text("utf-8").splitlines():
        escape = _unit_command if line.startswith("ExecStart=") else _unit_text
        lines.append(line.replace("@PROJECT@", escape(str(PROJECT_DIR))).replace("@EXIT_TIMEOUT@", str(exit_timeout(settings))))
        if line.startswith("Environment="):
            lines += [f'Environment="{_unit_quoted(f"{name}={text}")}"' for name, text in environment.items()]
    return "\n".join(lines) + "\n"


def _unit_text(text: str) -> str:
    """Escape `%`, which starts a specifier in a unit file (systemd.unit(5))."""
    return text.replace("%", "%%")


def _unit_quoted(text: str) -> str:
    """Escape text inside double quotes."""
    return _unit_text(text.replace("\\", "\\\\").replace('"', '\\"'))


def _unit_command(text: str) -> str:
    """Escape text inside double quotes of a command line, where `$` starts a variable too (systemd.service(5))."""
    return _unit_quoted(text).replace("$", "$$")


def folder_environment() -> dict[str, str]:
    """Return the variables of this shell that say where models and added voices are stored."""
    return {name: os.environ[name] for name in _FOLDER_VARIABLES if os.environ.get(name)}


def ask(settings: Settings, method: str, path: str, body: object = None, timeout: float = 5.0) -> tuple[int, bytes]:
    """Send a request to the server, with its API key if one is set, and return the response's status and body.

    Raises:
        OSError: The server cannot be reached.
        http.client.HTTPException: The response is not valid HTTP.
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
    """Return the content of /health, or None if the server does not answer."""
    try:
        status, body = ask(settings, "GET", "/health")
        found = json.loads(body) if status == 200 else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _until(seconds: float, condition: Callable[[], bool]) -> bool:
    """Wait until `condition` is true, at most `seconds`; return whether it is."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.25)
    return True


def _pid_file(settings: Settings) -> dict[str, Any]:
    """Return the content of the PID file, or an empty dict if there is none."""
    try:
        found = json.loads((settings.cache_dir / "server.pid").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def describe(settings: Settings, _: argparse.Namespace) -> int:
    """Print what install.sh has to know, one per line.

    URL, maximum seconds of a stop, `csm` if CSM is used, the server's PID, and the folders of cache, added voices and models; `-` for none.
    """
    from huggingface_hub import constants

    host, port = address(settings)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(
        url,
        exit_timeout(settings),
        "csm" if settings.csm_enabled else "-",
        _pid_file(settings).get("pid", "-"),
        settings.cache_dir,
        settings.data_dir.resolve(),
        Path(constants.HF_HUB_CACHE).resolve(),
        sep="\n",
    )
    return 0


def render(settings: Settings, arguments: argparse.Namespace) -> int:
    """Write the service files, a plist or a unit by the ending of their names, readable by their owner only."""
    environment = folder_environment()
    settings.cache_dir.mkdir(parents=True, exist_ok=True)  # launchd creates the log file, but not its folder
    for target in arguments.files:
        content = render_plist(settings, environment) if target.suffix == ".plist" else render_unit(settings, environment).encode()
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(target.name + ".new")
        draft.write_bytes(content)
        draft.chmod(0o600)
        draft.replace(target)
    return 0


def quick_action(_: Settings, arguments: argparse.Namespace) -> int:
    """Write the macOS Quick Action into the folder `arguments.folder`: an Automator workflow that sends the selected text to `sesame`."""
    names = {"@SESAME@": shlex.quote(str(PROJECT_DIR / "sesame"))}
    contents = arguments.folder / "Contents"
    contents.mkdir(parents=True, exist_ok=True)
    for template in QUICK_ACTION_TEMPLATE.iterdir():
        rendered = cast("dict[str, Any]", _replace(plistlib.loads(template.read_bytes()), names))
        (contents / template.name).write_bytes(plistlib.dumps(rendered, sort_keys=False))
    return 0


def watch(settings: Settings, arguments: argparse.Namespace) -> int:
    """Print the progress of CSM's download and load until it is ready; 1 if it failed or the server is gone."""
    display = _Progress(sys.stdout.isatty())
    answered = time.monotonic()
    try:
        while time.monotonic() - answered < arguments.seconds:
            model = (_health(settings) or {}).get("models", {}).get("csm-1b", {})
            if model:
                answered = time.monotonic()
            if model.get("state") == "loading":
                display.show(model.get("progress") or {"stage": "loading"}, answered)
            elif model:
                display.end()
                return _report(model)
            time.sleep(_WATCH_SECONDS)
    except KeyboardInterrupt:
        display.end()
        print("Stopped watching. The service continues to load CSM-1B; ./install.sh --status shows how far it is.")
        return _INTERRUPTED
    display.end()
    print(f"The server has not answered for {arguments.seconds:g} s.", file=sys.stderr)
    return 1


def _report(model: dict[str, Any]) -> int:
    if model.get("state") == "failed":
        print(f"CSM-1B could not be loaded: {model.get('error')}", file=sys.stderr)
        return 1
    print(f"CSM-1B is ready ({model.get('source') or 'unloaded until the next request'}).")
    return 0


class _Progress:
    """Prints the progress of a load: one line that is updated on a terminal, otherwise a line for each stage and every 10 %."""

    def __init__(self, on_terminal: bool) -> None:
        from monitoring import DownloadSpeed

        self._on_terminal = on_terminal
        self._shown: object = None
        self._width = 0
        self._speed = DownloadSpeed()

    def show(self, progress: dict[str, Any], now: float) -> None:
        """Print `progress`, the field of the same name in `/health`; `now` is on the monotonic clock."""
        done, total = progress.get("done"), progress.get("total")
        step = progress["stage"] if done is None or not total else 10 * done // total
        self._print(", ".join(filter(None, (progress["stage"], self._speed.describe(progress, now)))), step)

    def end(self) -> None:
        """End the updated line."""
        if self._width:
            print()
        self._width = 0

    def _print(self, text: str, step: object) -> None:
        if self._on_terminal:
            print(f"\r{text:<{self._width}}", end="", flush=True)
            self._width = len(text)
        elif step != self._shown:
            print(text, flush=True)
        self._shown = step


def port(settings: Settings, arguments: argparse.Namespace) -> int:
    """Check that the port is free, or used by the running service itself."""
    if arguments.running and _pid_file(settings).get("port") == settings.port:
        return 0
    from server_process import listen

    for bound in listen(settings):
        bound.close()
    return 0


def wait(settings: Settings, arguments: argparse.Namespace) -> int:
    """Wait until a server with another PID than `arguments.not_pid` answers /health; 1 if none does in time."""

    def answers() -> bool:
        pid = str(_pid_file(settings).get("pid", ""))
        changed = not arguments.not_pid or pid not in ("", arguments.not_pid)
        return changed and _health(settings) is not None

    return 0 if _until(arguments.seconds, answers) else 1


def speak(settings: Settings, arguments: argparse.Namespace) -> int:
    """Generate a sentence with the default or the built-in voice and write it to `arguments.file` as WAV."""
    voice = _BUILT_IN_VOICE if arguments.built_in else settings.default_voice
    request = {"model": "tts-1", "input": _SENTENCE, "voice": voice, "response_format": "wav"}
    answer = (0, b"")

    def spoken() -> bool:
        """Whether the answer is final: 503 means that the voice is still being loaded."""
        nonlocal answer
        answer = ask(settings, "POST", "/v1/audio/speech", request, timeout=_SPEECH_SECONDS)
        return answer[0] != 503

    try:
        _until(_LOAD_SECONDS, spoken)
    except (OSError, http.client.HTTPException) as error:
        print(f"The server did not answer: {type(error).__name__}.", file=sys.stderr)
        return 1
    status, body = answer
    if status != 200:
        print(f"The server answered {status}: {body[:500].decode('utf-8', 'replace')}", file=sys.stderr)
        return 1
    arguments.file.write_bytes(body)
    print(f"Spoken with the voice {voice}: {arguments.file}")
    return 0


def status(settings: Settings, _: argparse.Namespace) -> int:
    """Print a summary of /health; 1 if the server does not answer or has a problem."""
    health = _health(settings)
    host, at = address(settings)
    if health is None:
        print(f"The server does not answer at {host}:{at}/health.")
        return 1
    print(f"The server answers at {host}:{at}: {health.get('status')}, PID {_pid_file(settings).get('pid', 'unknown')}.")
    for name, model in health.get("models", {}).items():
        progress = model.get("progress") or {}
        detail = model.get("error") or (
            f"{progress['stage']}, {progress['fraction']:.0%}" if progress.get("fraction") else progress.get("stage")
        )
        print(f"{name}: {model.get('state')}. {detail or ''}".rstrip())
    return 0 if health.get("status") in {"ok", "loading"} else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for command in (describe, render, quick_action, port, wait, watch, speak, status):
        sub = commands.add_parser(command.__name__, help=(command.__doc__ or "").splitlines()[0])
        sub.set_defaults(command=command)
        if command is render:
            sub.add_argument("files", type=Path, nargs="+", metavar="FILE")
        if command is quick_action:
            sub.add_argument("folder", type=Path)
        if command is port:
            sub.add_argument("--running", action="store_true", help="the service is running and may use the port")
        if command in (wait, watch):
            sub.add_argument("seconds", type=float)
        if command is wait:
            sub.add_argument("--not-pid", default="", metavar="PID")
        if command is speak:
            sub.add_argument("file", type=Path)
            sub.add_argument("--built-in", action="store_true", help="use the built-in voice")
    return parser


def main() -> int:
    """Run the command named on the command line; 2 for an invalid setting."""
    arguments = _parser().parse_args()
    try:
        result: int = arguments.command(service_settings(), arguments)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    return result


if __name__ == "__main__":
    sys.exit(main())
