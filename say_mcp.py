"""An MCP server on standard input and output: assistants speak through this machine's loudspeaker, or into a file, and list the voices."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel, Field

from audio_formats import FORMATS
from config import VERSION, Settings, SettingsError, load_settings
from errors import TTSError
from files import OutputError
from say_backends import LocalSpeaker, ServerSpeaker, SpeechServer, local_voices, running_server
from say_output import ProgressBar, require_loudspeaker
from say_reading import Output, Speaker, clean_text, speak_pieces, split_pieces

_INSTRUCTIONS = "Speak to the user with `speak`. Write the text as it should be heard. `list_voices` names the voices."


class SpeakingVoice(BaseModel):
    """A voice as an assistant sees it."""

    name: str
    description: str
    ready: bool | None = Field(description="Whether it can speak now; null if that is known only after its model has been loaded.")


class Speech:
    """Speaks one text at a time: with the running server, else with a model in this process, which stays loaded for the next text."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._turn = asyncio.Lock()
        self._local: LocalSpeaker | None = None
        self._name = ""  # of its voice, as it was requested
        self._loaded = AsyncExitStack()

    async def speak(self, text: str, voice: str | None, path: str | None, speed: float) -> str:
        """Speak `text` and return what was done.

        Raises:
            ToolError: Says what failed and what to do.
        """
        notes: list[str] = []
        try:
            output = _output(path, speed)
            cleaned = clean_text(text, normalize=self._settings.normalize_text, speed=speed)
            pieces = split_pieces(cleaned, self._settings.max_input_length)
            async with self._turn:
                speaker = await self._speaker(voice, notes)
                seconds = await speak_pieces(pieces, speaker, output, self._settings, None, ProgressBar([], "sesame"))
        except TTSError as error:
            raise ToolError(error.message) from error
        except (OutputError, OSError) as error:
            raise ToolError(str(error)) from error
        place = f"Written to {output.path}" if output.path else "Spoken"
        return " ".join([f"{place}: {seconds:.1f} s, voice {speaker.voice}.", *notes])

    async def voices(self) -> list[SpeakingVoice]:
        """Return the voices.

        Raises:
            ToolError: The server does not answer.
        """
        try:
            server = await running_server(self._settings)
            found: list[dict[str, Any]] = await server.voices() if server else local_voices(self._settings)
        except TTSError as error:
            raise ToolError(error.message) from error
        return [SpeakingVoice(name=voice["id"], description=voice["description"], ready=voice.get("ready")) for voice in found]

    async def aclose(self) -> None:
        """Unload the model."""
        await self._loaded.aclose()

    async def _speaker(self, voice: str | None, notes: list[str]) -> Speaker:
        server = await running_server(self._settings)
        if server is not None:
            return self._with_server(server, voice, notes)
        name = voice or self._settings.default_voice
        if self._local is None or self._name != name:
            await self._loaded.aclose()
            self._local, self._name = None, name
            self._local = await self._loaded.enter_async_context(LocalSpeaker(self._settings, name, _ignore, streamed=True))
        return self._local

    def _with_server(self, server: SpeechServer, voice: str | None, notes: list[str]) -> ServerSpeaker:
        name = voice or server.default_voice or self._settings.default_voice
        return ServerSpeaker(server, name, _ignore, lambda note: notes.append(f"Note: {note}."), normalize=self._settings.normalize_text)


def create_server(speech: Speech) -> MCPServer[Any]:
    """Return the MCP server with its two tools."""
    server: MCPServer[Any] = MCPServer("sesame-tts", version=VERSION, instructions=_INSTRUCTIONS, log_level="WARNING")

    @server.tool()
    async def speak(
        text: Annotated[str, Field(description="What to say, as plain text or Markdown; of any length.")],
        voice: Annotated[str | None, Field(description="A name from list_voices; the default voice if absent.")] = None,
        path: Annotated[
            str | None, Field(description=f"Write a new file instead of playing: an absolute path that ends in {_endings()}.")
        ] = None,
        speed: Annotated[float, Field(ge=0.25, le=4.0, description="1 is normal.")] = 1.0,
    ) -> str:
        """Say a text aloud on the user's loudspeaker, and return when it has been heard; with `path`, write an audio file instead."""
        return await speech.speak(text, voice, path, speed)

    @server.tool()
    async def list_voices() -> list[SpeakingVoice]:
        """List the voices that `speak` knows."""
        return await speech.voices()

    return server


def main() -> int:
    """Serve until standard input is closed. Return the exit status: 2 if a setting is invalid, else 0."""
    try:
        settings = load_settings()
    except SettingsError as error:
        print(f"sesame: {error}", file=sys.stderr)
        return 2
    asyncio.run(_serve(settings))
    return 0


async def _serve(settings: Settings) -> None:
    speech = Speech(settings)
    try:
        await create_server(speech).run_stdio_async()
    finally:
        await speech.aclose()


def _output(path: str | None, speed: float) -> Output:
    """Return where the speech goes.

    Raises:
        ToolError: The file may not be written.
        OutputError: There is no loudspeaker.
    """
    if path is None:
        require_loudspeaker("give the tool a `path`")
        return Output(None, None, FORMATS["pcm"], speed)
    file = Path(path).expanduser()
    if not file.is_absolute():
        raise ToolError(f"{path!r} is not an absolute path.")
    if file.suffix[1:].lower() not in FORMATS:
        raise ToolError(f"The ending of {file.name!r} is not a known format: use {_endings()}.")
    if not file.parent.is_dir():
        raise ToolError(f"The folder {str(file.parent)!r} does not exist.")
    if file.exists():
        raise ToolError(f"{path!r} exists already: choose another name.")
    return Output(file, None, FORMATS[file.suffix[1:].lower()], speed)


def _endings() -> str:
    return ", ".join(f".{name}" for name in FORMATS)


def _ignore(_: str) -> None:
    """Drop the progress of a load: a tool's caller waits for its result."""


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # as in say.py: the load of a model cannot be stopped
