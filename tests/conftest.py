"""Fixtures that every test file shares: a running server, with real parts, on a port of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import as_mac
import httpx
import psutil
import pytest
import tiny_csm
from forking import ForkedProcess, end_server_forkers, server_forker
from httpx._transports import default as _transports
from hypothesis import settings as hypothesis_settings

from config import Settings

if TYPE_CHECKING:
    from mlx_audio.tts.models.sesame import Model

# No deadline: a machine that is busy elsewhere is no fault of the code.
hypothesis_settings.register_profile("ours", deadline=None)
hypothesis_settings.load_profile("ours")

# Every httpx.get makes a client, and every client reads all certificate authorities: 70 ms of processor time, and no server here has TLS.
_transports.create_ssl_context = cache(_transports.create_ssl_context)  # type: ignore[attr-defined]

# An engine in the test's own process must not ask the real hub for the voices that are not in the package. Read when huggingface_hub is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# For the workers and the servers: numpy's BLAS would have a thread for each core, and those that wait for a busy core spin, which doubles
# the processor time of CSM's codec.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

PROJECT = Path(__file__).resolve().parent.parent
START_SECONDS = 90
# They are started first, the longest one at the very beginning, so that none is left to one process at the end.
_LONG_FILES = [
    "faults",
    "service",
    "playground",
    "playground_states",
    "openapi",
    "clients",
    "playground_access",
    "audio_converter",
    "long_text",
    "security",
    "say",
    "csm_load",
    "pool",
    "clients_openclaw",
    "acceptance",
    "csm_generation",
    "speech_socket",
    "say_book",
    "engine",
    "work_limits",
    "transcription",
]
_LOADER_SETTINGS = {"LD_PRELOAD", "DYLD_INSERT_LIBRARIES", "PYTHONPATH"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mac", action="store_true", help="our own code believes that it runs on Apple Silicon")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": number for number, name in enumerate(_LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def still_running(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Return which of the processes have not ended after 10 s: on a busy machine a killed one ends when it gets the processor."""
    _, alive = psutil.wait_procs(processes, 10)
    return [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def clean_environment(cache_dir: Path, **settings: object) -> dict[str, str]:
    """The environment of a server under test: none of our settings from outside, no hub, no key."""
    dropped = {name.upper() for name in Settings.model_fields} | {"PYTHONDONTWRITEBYTECODE"}  # every start would compile every module
    inherited = {name: value for name, value in os.environ.items() if name not in dropped and not name.startswith("HF_")}
    defaults = {
        "HOST": "127.0.0.1",
        "CACHE_DIR": str(cache_dir),
        "CSM": "off",
        "VERIFY": "off",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return inherited | defaults | {name: str(value) for name, value in settings.items()}


@pytest.fixture(scope="session", autouse=True)
def _server_forkers_end() -> Iterator[None]:
    yield
    end_server_forkers()


@dataclass
class RunningServer:
    """A server process under test."""

    process: subprocess.Popen[bytes] | ForkedProcess
    port: int
    cache_dir: Path
    log: Path
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **options)

    def health(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/health", timeout=30).json())

    def log_text(self) -> str:
        """What it has logged of all that it has answered: a request's line is written after its answer, but before the next one's."""
        with suppress(httpx.HTTPError):
            httpx.get(f"{self.url}/health", timeout=5)
        return self.log.read_text(errors="replace")

    def wait_for(self, condition: Callable[[dict[str, Any]], bool], seconds: float = START_SECONDS) -> dict[str, Any]:
        """The first `/health` that meets `condition`."""
        deadline = time.monotonic() + seconds
        while True:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log_text()}")
            try:
                health = self.health()
                if condition(health):
                    return health
            except httpx.TransportError:
                health = {}
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {seconds} s: {health}\n{self.log_text()}")
            time.sleep(0.05)

    def stop(self, seconds: float = 30) -> int:
        """Ask it to end, and its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
            raise


def start_server(folder: Path, **settings: object) -> RunningServer:
    """A server with these settings (by their environment names), its files in `folder`; not waited for.

    It is forked, unless a setting is read before the program runs: by the dynamic loader, or by Python.
    """
    port = int(str(settings.pop("PORT", free_port())))
    cache_dir = folder / "cache"
    log = folder / "stderr.log"
    environment = clean_environment(cache_dir, PORT=port, **settings)
    if _LOADER_SETTINGS & settings.keys():
        process: subprocess.Popen[bytes] | ForkedProcess = _run_program(environment, log)
    else:
        process = fork_server(environment, log)
    return RunningServer(process, port, cache_dir, log, dict(settings))


def fork_server(environment: dict[str, str], log: Path, **limits: int) -> ForkedProcess:
    """A forked server; `limits` are those of `ServerForker.start`."""
    with log.open("ab") as stderr, Path(os.devnull).open() as stdin:
        streams = (stdin.fileno(), stderr.fileno(), stderr.fileno())
        return server_forker(environment).start(["server.py"], environment, PROJECT, streams, **limits)


def _run_program(environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as stderr:
        return subprocess.Popen(
            [*as_mac.python(), "server.py"], cwd=PROJECT, env=environment, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr
        )


@contextmanager
def csm_server(folder: Path, cache: Path, voices: Mapping[str, int], **settings: object) -> Iterator[RunningServer]:
    """A server with a tiny CSM, once it can speak.

    Args:
        folder: For its files. Other presets may be in `presets`, and the built-in voice's is added.
        cache: From `tiny_csm.build`.
        voices: The names of CSM's voices, and the most frames that each may speak; the first one is the default.
        settings: More settings.
    """
    presets = folder / "presets"
    presets.mkdir(exist_ok=True)
    for name, frames in voices.items():
        preset = {"name": name, "voice_key": "conversational_a", "max_audio_length_ms": frames * 80}
        (presets / f"{name}.json").write_text(json.dumps(preset))
    shutil.copy(PROJECT / "presets" / "heart.json", presets)
    common = {"CSM": "on", "DEFAULT_VOICE": next(iter(voices)), "PRESETS_DIR": presets, "MODEL_DTYPE": "float32"}
    running = start_server(folder, **(common | tiny_csm.environment(cache) | settings))
    try:
        running.wait_for(lambda health: health["models"]["csm-1b"]["state"] == "ready", 180)
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server with the built-in voice, for all tests that change nothing about it."""
    running = start_server(tmp_path_factory.mktemp("server"))
    try:
        running.wait_for(lambda health: health["status"] == "ok")
        yield running
    finally:
        running.stop()


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., RunningServer]]:
    """Servers of a test's own: `make_server(API_KEY="k", wait=False)`; ended with the test."""
    running: list[RunningServer] = []

    def make(*, wait: bool = True, **settings: object) -> RunningServer:
        folder = tmp_path / f"server-{len(running)}"
        folder.mkdir()
        running.append(start_server(folder, **settings))
        if wait:
            running[-1].wait_for(lambda health: health["status"] != "loading")
        return running[-1]

    yield make
    for each in running:
        each.stop()


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CSM's voice prompts with short transcripts: the real ones have 500 tokens of the tiny tokenizer, which would be read each time."""
    import csm_loading

    folder = tmp_path_factory.mktemp("recordings")
    for path in csm_loading.prompt_folder(tiny_csm.build()).glob("*.wav"):
        shutil.copy(path, folder)
        (folder / f"{path.stem}.txt").write_text("hm, hm.")
    return folder


@pytest.fixture(scope="module")
def model() -> Model:
    """A CSM with random weights: never ends, and says something else with each seed."""
    import csm_loading

    return csm_loading.load(tiny_csm.build(small_codec=True))


@pytest.fixture(scope="module")
def untouched() -> Model:
    """The same weights in a model that our code has not changed."""
    import csm_loading

    return csm_loading.load(tiny_csm.build(small_codec=True), stock=True)


def pytest_configure(config: pytest.Config) -> None:
    """Become a Mac if asked to, and make the folder that the workers of this test run share."""
    if config.getoption("--mac"):
        as_mac.pretend()
    if not hasattr(config, "workerinput"):
        os.environ["TEST_RUN_FOLDER"] = tempfile.mkdtemp(prefix="sesame-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["TEST_RUN_FOLDER"], ignore_errors=True)
