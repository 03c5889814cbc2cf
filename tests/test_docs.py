"""The documents match the code: modules, links, settings, errors, API paths and fields, commands, and examples."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from client_programs import document_blocks
from conftest import PROJECT, RunningServer
from listening import decode, transcribe, word_error_rate

import errors
from config import Settings
from errors import TTSError
from say import _parser as build_parser
from schemas import SpeechRequest

README = (PROJECT / "README.md").read_text()
CONTRIBUTING = (PROJECT / "CONTRIBUTING.md").read_text()
API = (PROJECT / "docs" / "API.md").read_text()
DOCUMENTS = sorted([*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md"), *PROJECT.glob("upstream/*.md")])
_LEAVING = {"background_call.py", "cpu_convolution.py"}
_COMING: set[str] = set()
MODULES = sorted({path.name for path in PROJECT.glob("*.py")} - _LEAVING)

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))


def every_error(kind: type[TTSError] = TTSError) -> list[type[TTSError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in every_error(child))]


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub forms them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(document: Path, start: str) -> list[str]:
    """The commands in a document, in blocks or between backquotes, that contain `start`; each from there on, without comments."""
    text = document.read_text()
    blocks = [line for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) for line in block.splitlines()]
    indented = re.findall(r"^ {4,}(.+)$", text, re.MULTILINE)
    quoted = re.findall(r"`([^`\n]+)`", text)
    return [line[line.index(start) :] for line in [*blocks, *indented, *quoted] if f"{start} " in f"{line} "]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 180


def test_the_first_screen_of_the_readme_says_what_to_do() -> None:
    first_screen = "\n".join(README.splitlines()[:22])
    for needed in ("](docs/images/", "make run", "http://localhost:8880/v1", "`alloy`"):
        assert needed in first_screen


def test_the_tree_lists_each_module_once() -> None:
    tree = CONTRIBUTING[CONTRIBUTING.index("## Modules") :].split("```")[1]
    assert sorted(re.findall(r"^([a-z_]+\.py) {2,}\S", tree, re.MULTILINE)) == MODULES


@every_document
def test_every_module_that_a_document_names_exists(document: Path) -> None:
    if document.name in ("LOG.md", "CHANGELOG.md"):
        pytest.skip("a log names what is gone")
    places = ["", "tests", "benchmarks", "deploy"]
    names = re.findall(r"`(?:[a-z]+/)*([a-z_]+\.py)`", document.read_text())
    if document.parent.name == "upstream":
        names = [name for name in names if name not in ("models.py", "generator.py", "watermarking.py", "run_csm.py", "setup.py")]
    assert [name for name in names if not any((PROJECT / place / name).exists() for place in places)] == []


@every_document
def test_every_link_resolves(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|mailto:)([^)]+)\)", document.read_text())
    for link in links:
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists() or path in _COMING, link
        assert not anchor or anchor in anchors(target), link


@every_document
def test_every_make_target_and_option_of_the_installer_exists(document: Path) -> None:
    makefile, installer = (PROJECT / "Makefile").read_text(), (PROJECT / "install.sh").read_text()
    targets = {command.split()[1].rstrip(".,:;)") for command in commands(document, "make") if re.match(r"make [a-z]", command)}
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
    options = {word for command in commands(document, "./install.sh") for word in command.split() if word.startswith("--")}
    assert [option for option in options if option not in installer] == []


@every_document
def test_every_command_line_of_say_is_accepted(document: Path) -> None:
    for command in commands(document, "say.py"):
        words = shlex.split(command, comments=True)[1:]
        if "…" not in command:
            build_parser().parse_args(words)


@every_document
def test_every_command_line_of_sesame_is_accepted(document: Path) -> None:
    """Those that speak or list voices; the script's other commands have to be in its help."""
    usage = subprocess.run([PROJECT / "sesame", "--help"], capture_output=True, text=True, check=True).stdout
    for command in commands(document, "./sesame"):
        first, *rest = shlex.split(command, comments=True)[1:] or [""]
        if re.fullmatch("[a-z]+|--help|--version", first):
            assert f"sesame {first}" in usage, command
        elif "…" not in command:
            build_parser().parse_args([first, *rest])


@every_document
def test_every_setting_or_constant_that_a_document_names_exists(document: Path) -> None:
    patterns = ("*.py", "tests/*.py", "deploy/*", "install.sh", "Makefile", "LICENSE", ".env.example")
    source = " ".join(path.read_text() for pattern in patterns for path in PROJECT.glob(pattern) if path.is_file())
    names = set(re.findall(r"`([A-Z][A-Z_]{3,})(?:=[^`]*)?`", document.read_text())) - {"NOTICE"}  # a file of the package hibari-tts
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", source)) == []


def test_every_setting_is_in_the_readme_and_in_the_example() -> None:
    example = (PROJECT / ".env.example").read_text()
    names = [name.upper() for name in Settings.model_fields]
    assert [name for name in names if f"`{name}`" not in README] == []
    assert [name for name in names if not re.search(rf"^{name}=", example, re.MULTILINE)] == []


def test_the_reference_names_every_error_code() -> None:
    codes = {kind.code for kind in every_error()} - {"invalid_request"}
    assert sorted(code for code in codes if f"`{code}`" not in API) == []


def test_the_tree_in_errors_names_every_error() -> None:
    assert sorted(kind.__name__ for kind in every_error() if kind.__name__ not in str(errors.__doc__)) == []


def test_the_reference_explains_every_field_of_a_request() -> None:
    assert [name for name in SpeechRequest.model_fields if not re.search(rf"^\|.*`{name}`.*\|.*\|.*\|", API, re.MULTILINE)] == []


def test_the_reference_lists_exactly_the_paths_of_the_api(server: RunningServer) -> None:
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    operations = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    table = API[: API.index("## Authentication")]
    assert set(re.findall(r"`([A-Z]+ /[^`]*)`", table)) == operations


@pytest.fixture(scope="module")
def openapi(server: RunningServer) -> dict[str, Any]:
    return dict(httpx.get(f"{server.url}/openapi.json").json())


def table(section: str) -> dict[str, list[str]]:
    """Return the cells of the first table of a section of the reference, by the code in the first cell; cells with several names count for each."""
    text = re.split(r"^#", API[API.index(section) + len(section) :], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if re.match(r"\| [`0-9]", line)]
    return {name: cells for cells in rows for name in re.findall(r"`([^`]+)`", cells[0]) or [cells[0]]}


def test_the_reference_gives_the_defaults_and_limits_of_the_document(openapi: dict[str, Any]) -> None:
    schema, rows = openapi["components"]["schemas"]["SpeechRequest"], table("## Speech\n")
    assert rows.keys() == schema["properties"].keys()
    for name, field in schema["properties"].items():
        default, meaning = rows[name][-2:]
        assert (default == "required") == (name in schema["required"]), name
        if field.get("default") is not None:
            assert json.loads(default.strip("`")) == field["default"], name
        rules = field["anyOf"][0] if "anyOf" in field else field
        if "default" in field and "minimum" in rules:
            assert float(re.findall(r"[\d.]+", meaning)[0]) == rules["minimum"], name
            assert float(re.findall(r"[\d.]+", meaning)[1]) == rules["maximum"], name
        assert [value for value in rules.get("enum", ()) if f"`{value}`" not in meaning] == [], name


def test_the_reference_names_the_answers_of_the_document(openapi: dict[str, Any]) -> None:
    schemas, speech = openapi["components"]["schemas"], openapi["paths"]["/v1/audio/speech"]["post"]["responses"]["200"]
    assert table("## Voices\n").keys() == schemas["VoiceEntry"]["properties"].keys()
    assert table("### Response headers\n").keys() == speech["headers"].keys() | {"X-Request-Id"}
    errors_section = API[API.index("## Errors\n") :]
    operations = [operation for methods in openapi["paths"].values() for operation in methods.values()]
    statuses = {status for operation in operations for status in operation["responses"]} - {"200", "201"}
    assert set(re.findall(r"^\| (\d{3}) \|", errors_section, re.MULTILINE)) - {"405", "401"} == statuses, (
        "401 is documented with a key only"
    )


def test_the_reference_names_the_fields_of_the_form(openapi: dict[str, Any]) -> None:
    (form,) = openapi["paths"]["/v1/audio/voices"]["post"]["requestBody"]["content"].values()
    schema = form["schema"]
    if "$ref" in schema:
        schema = openapi["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    assert [name for name in schema["properties"] if f"`{name}`" not in API[API.index("## Voices\n") :]] == []


def test_the_reference_explains_every_field_of_health(server: RunningServer) -> None:
    section = API[API.index("## State of the server") :]
    fields = server.health().keys() - {"ffmpeg_path"}
    assert sorted(field for field in fields if f"`{field}`" not in section) == []


@every_document
def test_every_block_of_json_is_json(document: Path) -> None:
    for block in re.findall(r"```json\n(.*?)```", document.read_text(), re.DOTALL):
        json.loads(block)


def test_the_python_of_the_readme_runs(server: RunningServer, tmp_path: Path) -> None:
    (block,) = (block for block in document_blocks("README.md")["Connect a client"] if "import" in block)
    code = block.replace("localhost:8880", f"localhost:{server.port}")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    samples, rate = decode((tmp_path / "hello.mp3").read_bytes(), "mp3")
    assert word_error_rate("Hello! This is my own voice server.", transcribe(samples, rate)) == 0


def test_the_curl_of_the_reference_runs(server: RunningServer, tmp_path: Path) -> None:
    (block,) = (block for block in document_blocks("docs/API.md")["Speech"] if block.startswith("curl"))
    command = block.replace("localhost:8880", f"localhost:{server.port}")
    subprocess.run(["bash", "-ec", command], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    samples, rate = decode((tmp_path / "hello.wav").read_bytes(), "wav")
    assert word_error_rate("Hello!", transcribe(samples, rate)) == 0
