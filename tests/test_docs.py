"""The documents say what is so: every file is listed, every link leads somewhere, every error and every field is named."""

from __future__ import annotations

import json
import re

import httpx
import pytest
from conftest import PROJECT, RunningServer

import errors
from errors import TTSError
from schemas import SpeechRequest

README = (PROJECT / "README.md").read_text()
DOCUMENTS = sorted([*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md"), *PROJECT.glob("upstream/*.md")])


def every_error(kind: type[TTSError] = TTSError) -> list[type[TTSError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in every_error(child))]


def test_the_readme_lists_every_module() -> None:
    tree = README[README.index("## The files") :]
    assert [path.name for path in sorted(PROJECT.glob("*.py")) if path.name not in tree] == []


def test_the_readme_lists_no_module_that_is_gone() -> None:
    tree = README[README.index("## The files") :].split("```")[1]
    assert [name for name in re.findall(r"[a-z_]+\.py", tree) if not (PROJECT / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(document: object) -> None:
    from pathlib import Path

    path = Path(str(document))
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_readme_names_every_code() -> None:
    codes = {kind.code for kind in every_error()} - {"invalid_request"}
    assert sorted(code for code in codes if code not in README) == []


def test_the_tree_in_errors_names_every_error() -> None:
    assert sorted(kind.__name__ for kind in every_error() if kind.__name__ not in str(errors.__doc__)) == []


def test_the_readme_explains_every_field_of_a_request() -> None:
    assert [name for name in SpeechRequest.model_fields if f"`{name}`" not in README] == []


def test_the_readmes_configuration_is_json() -> None:
    blocks = re.findall(r"```json\n(.*?)```", README, re.S)
    assert len(blocks) >= 2
    for block in blocks:
        json.loads(block)


def test_the_readme_lists_every_path_of_the_api(server: RunningServer) -> None:
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    missing = [path for path in paths if path.split("{")[0].rstrip("/") not in README]
    assert missing == []
