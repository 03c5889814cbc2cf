"""Settings, read from the environment and `.env` and checked once at the start."""

from __future__ import annotations

import difflib
import os
import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from dotenv import dotenv_values
from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from errors import shorten

VERSION = "1.0.0"

PROJECT_DIR = Path(__file__).resolve().parent
ENV_FILE = PROJECT_DIR / ".env"

BUILT_IN_VOICE = "heart"

FormatName = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]

# Read by huggingface_hub itself from the environment; .env may set them too.
_HUB_VARIABLES = ("HF_TOKEN", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT")


class SettingsError(Exception):
    """A setting has an invalid value. The message is one line for the user."""


def _split_list(value: object) -> object:
    """Return `a, b,,c` as ("a", "b", "c")."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def system_and_processor() -> tuple[str, str]:
    """Return the operating system and the processor, such as ("darwin", "arm64"). Every module asks here, so that tests can answer."""
    return sys.platform, platform.machine()


def on_mac() -> bool:
    """Return whether this is macOS."""
    return system_and_processor()[0] == "darwin"


def csm_can_run() -> bool:
    """Return whether CSM-1B runs fast enough here: on Apple Silicon, or on Linux with MLX's CUDA backend installed.

    On a Linux CPU an 80 ms frame takes about 4 s, 50 times slower than real time (measured with random weights of full size).
    """
    system, processor = system_and_processor()
    return processor == "arm64" if system == "darwin" else _cuda_installed()


@cache
def _cuda_installed() -> bool:
    return any(_installed(backend) for backend in ("mlx-cuda-13", "mlx-cuda-12"))


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def _default_cache_dir() -> Path:
    return Path.home() / ".cache" / "sesame-tts"


def _default_data_dir(settings: dict[str, Any]) -> Path:
    """Return CACHE_DIR if it was set: who chooses a folder wants everything in it. Otherwise the platform's folder for data."""
    cache_dir = settings.get("cache_dir", _default_cache_dir())
    if cache_dir != _default_cache_dir():
        return Path(cache_dir)
    if on_mac():
        return Path.home() / "Library" / "Application Support" / "sesame-tts"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "sesame-tts"


def _csm_enabled(csm: str) -> bool:
    return csm == "on" or (csm == "auto" and csm_can_run())


def _default_voice(settings: dict[str, Any]) -> str:
    """Return CSM's voice where CSM is loaded, otherwise the built-in one."""
    return "conversational" if _csm_enabled(settings["csm"]) else BUILT_IN_VOICE


_List = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_list)]
_Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_lower)]


class Settings(BaseSettings):
    """All settings, by the lower-case name of their environment variable. `.env.example` explains each one."""

    model_config = SettingsConfigDict(env_file_encoding="utf-8", extra="ignore", env_ignore_empty=True, hide_input_in_errors=True)

    # Server
    host: str = "0.0.0.0"  # noqa: S104 - the start logs a warning when this is open without a key
    port: int = Field(8880, ge=0, le=65535)
    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)] = "info"
    log_stderr: bool = True
    shutdown_timeout: float = Field(30.0, ge=0, le=600)

    # Model
    csm: _Switch = "auto"
    model_id: str = Field("sesame/csm-1b", min_length=1)
    model_dtype: Annotated[Literal["bfloat16", "float16", "float32", "auto"], BeforeValidator(_lower)] = "float16"
    model_compile: _Switch = "auto"
    max_batch: int = Field(8, ge=1, le=32)
    guard: Annotated[Literal["on", "off"], BeforeValidator(_lower)] = "on"
    context_segments: int = Field(0, ge=0, le=8)
    max_retries: int = Field(2, ge=0, le=10)
    verify: Annotated[Literal["auto", "off", "whisper"], BeforeValidator(_lower)] = "auto"
    generation_timeout: float = Field(120.0, gt=0, le=3600)
    idle_unload_seconds: float = Field(0.0, ge=0)

    # Defaults
    default_voice: str = Field(default_factory=_default_voice, min_length=1)
    fallback_voice: str = ""
    default_format: Annotated[FormatName, BeforeValidator(_lower)] = "mp3"
    max_input_length: int = Field(4096, ge=1, le=100_000)
    max_audio_seconds: float = Field(1800.0, ge=1, le=86_400)

    # Speech
    normalize_text: bool = True
    group_characters: int = Field(320, ge=80, le=400)
    pause_ms: int = Field(300, ge=0, le=5000)
    max_pause_ms: int = Field(1000, ge=100, le=10_000)
    synthetic_mark: bool = True

    # Queue
    max_queue: int = Field(32, ge=1, le=10_000)
    queue_timeout: float = Field(300.0, gt=0, le=3600)

    # Clients
    client_timeout: float = Field(120.0, gt=0, le=3600)
    max_connections: int = Field(0, ge=0, le=100_000)
    max_client_connections: int = Field(0, ge=0, le=100_000)
    max_unread_mb: int = Field(512, ge=1, le=1_000_000)
    max_client_unread_mb: int = Field(256, ge=1, le=1_000_000)

    socket_pause_ms: int = Field(1000, ge=50, le=60_000)
    socket_idle_timeout: float = Field(120.0, gt=0, le=3600)

    # Conversations
    max_conversations: int = Field(100, ge=1, le=100_000)
    max_conversation_turns: int = Field(64, ge=1, le=10_000)
    max_conversations_mb: int = Field(64, ge=1, le=100_000)
    conversation_idle_seconds: float = Field(3600.0, gt=0, le=604_800)

    # Files
    cache_dir: Path = Field(default_factory=_default_cache_dir)
    data_dir: Path = Field(default_factory=_default_data_dir)
    presets_dir: Path = PROJECT_DIR / "presets"

    # Access
    api_key: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_list)] = ()
    allowed_hosts: _List = ()
    cors_origins: _List = ()
    playground: bool = True

    @field_validator("cache_dir", "data_dir", "presets_dir")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        try:
            expanded = path.expanduser()
        except RuntimeError:
            raise ValueError("there is no user of this name") from None
        return expanded if expanded.is_absolute() else PROJECT_DIR / expanded

    @property
    def csm_enabled(self) -> bool:
        """Whether CSM is loaded on this machine."""
        return _csm_enabled(self.csm)

    @property
    def fallback_allowed(self) -> bool:
        """Whether another voice may speak while the requested one is not ready."""
        return self.fallback_voice.strip().lower() != "none"

    @property
    def voice_folders(self) -> tuple[Path, Path]:
        """The folder of added voices, and the folder where earlier versions kept them."""
        return self.data_dir / "voices", self.cache_dir / "voices"

    @property
    def open_to_network(self) -> bool:
        """Whether other machines can reach the server without a key."""
        return self.host not in {"localhost", "127.0.0.1", "::1"} and not self.api_key


def load_settings(env_file: Path = ENV_FILE) -> Settings:
    """Load the settings from the environment and `env_file`; the environment takes precedence.

    Raises:
        SettingsError: A value is invalid; names the variable, its value and what is allowed.
    """
    try:
        _check_env_file(env_file)
        return Settings(_env_file=env_file)
    except ValidationError as error:
        raise SettingsError(_one_line(error)) from None
    except (UnicodeDecodeError, OSError) as error:
        raise SettingsError(f".env cannot be read: {type(error).__name__}. It must be a UTF-8 text file of NAME=value lines.") from None


def _check_env_file(env_file: Path) -> None:
    """Refuse names in `.env` that are not settings, so that a typing error is noticed; export Hugging Face's variables."""
    values = dotenv_values(env_file) if env_file.is_file() else {}
    known = [name.upper() for name in Settings.model_fields]
    for name, value in values.items():
        if name in _HUB_VARIABLES:
            if value:
                os.environ.setdefault(name, value)
        elif name.upper() not in known:
            close = difflib.get_close_matches(name.upper(), [*known, *_HUB_VARIABLES], n=1)
            hint = f" Did you mean {close[0]}?" if close else " .env.example lists every setting."
            raise SettingsError(f".env sets {shorten(name)}, which is not a setting.{hint}")


def _one_line(error: ValidationError) -> str:
    """Return the first error that pydantic found, as `NAME='value' cannot be used: what is allowed`."""
    fault: Any = error.errors(include_url=False)[0]
    name = str(fault["loc"][0])
    value = os.environ.get(name.upper(), os.environ.get(name, fault.get("input", "")))
    shown = "<hidden>" if name == "api_key" else shorten(str(value))
    return f"{name.upper()}={shown} cannot be used: {fault['msg'][0].lower()}{fault['msg'][1:]}."
