"""`sesame mcp`, called by the mcp package's own client: with a running server, and with the engine in its process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import as_mac
from conftest import PROJECT, RunningServer
from listening import decode, listen, transcribe, word_error_rate
from saying import add_loudspeaker, environment

if TYPE_CHECKING:  # its import takes most of a second, and every test process reads this file
    from mcp import Client
    from mcp.types import CallToolResult

TEXT = "The kettle is on, and the coffee will be ready soon."


@asynccontextmanager
async def assistant(tmp_path: Path, errors: Path, **settings: object) -> AsyncIterator[Client]:
    from mcp import Client, StdioServerParameters, stdio_client

    command, *arguments = [*as_mac.python(), str(PROJECT / "say_mcp.py")]
    server = StdioServerParameters(command=command, args=arguments, env=environment(tmp_path, **settings), cwd=tmp_path)
    with errors.open("w") as log:
        async with Client(stdio_client(server, errlog=log)) as client:
            yield client


def run(tmp_path: Path, work: Callable[[Client], Any], **settings: object) -> str:
    """Run `work` with a client, and return what the server has printed on standard error."""
    errors = tmp_path / "errors.txt"

    async def session() -> None:
        async with assistant(tmp_path, errors, **settings) as client:
            await work(client)

    anyio.run(session)
    return errors.read_text()


def text_of(result: CallToolResult) -> str:
    from mcp.types import TextContent

    (content,) = result.content
    assert isinstance(content, TextContent)
    return content.text


async def said(client: Client, **arguments: Any) -> str:
    result = await client.call_tool("speak", arguments)
    assert not result.is_error, text_of(result)
    return text_of(result)


async def refused(client: Client, **arguments: Any) -> str:
    result = await client.call_tool("speak", arguments)
    assert result.is_error
    return text_of(result)


def test_an_assistant_speaks_on_the_loudspeaker_and_into_a_file(server: RunningServer, tmp_path: Path) -> None:
    played, file = add_loudspeaker(tmp_path), tmp_path / "tea.mp3"

    async def work(client: Client) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"speak", "list_voices"}
        assert tools["speak"].input_schema["required"] == ["text"]
        assert "heart" in [voice["name"] for voice in (await client.call_tool("list_voices", {})).structured_content["result"]]
        assert (await said(client, text=TEXT, voice="alloy")).startswith("Spoken: ")
        assert word_error_rate(TEXT, listen(played.read_bytes(), "pcm")) == 0
        assert (await said(client, text=TEXT, path=str(file), speed=1.25)).startswith(f"Written to {file}: ")
        assert word_error_rate(TEXT, transcribe(*decode(file.read_bytes(), "mp3"))) == 0
        for arguments, reason in (
            ({"text": "…"}, "There is nothing to say"),
            ({"text": TEXT, "voice": "bob"}, "Voice 'bob' not found. Available voices: "),
            ({"text": TEXT, "path": "tea.mp3"}, "'tea.mp3' is not an absolute path"),
            ({"text": TEXT, "path": str(file)}, "exists already: choose another name"),
            ({"text": TEXT, "path": str(tmp_path / "tea.doc")}, "The ending of 'tea.doc' is not a known format: use .mp3, "),
            ({"text": TEXT, "path": str(tmp_path / "no" / "tea.mp3")}, "does not exist"),
        ):
            assert reason in await refused(client, **arguments)

    errors = run(tmp_path, work, PORT=server.port)
    assert "kettle" not in errors + server.log_text()
    assert "Traceback" not in errors


def test_without_a_server_the_voice_is_loaded_once_in_this_process(tmp_path: Path) -> None:
    file = tmp_path / "tea.wav"

    async def work(client: Client) -> None:
        message = await refused(client, text=TEXT)
        assert "The PortAudio library is missing" in message
        assert message.endswith("write a file: give the tool a `path`")
        await said(client, text=TEXT, voice="heart", path=str(file))
        await said(client, text=TEXT, voice="heart", path=str(tmp_path / "again.wav"))
        voices = (await client.call_tool("list_voices", {})).structured_content["result"]
        assert next(voice for voice in voices if voice["name"] == "heart")["ready"] is None

    assert "Traceback" not in run(tmp_path, work)
    assert word_error_rate(TEXT, transcribe(*decode(file.read_bytes(), "wav"))) == 0
    assert (tmp_path / "again.wav").exists()
