"""CSM's files and weights: cache, download, error messages, and that a load keeps only one copy in memory."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_csm
import tiny_weights
from huggingface_hub import constants
from mlx.utils import tree_flatten
from small_hub import COMMIT, WEIGHT_BYTES, SmallHub, write_small_repositories

import csm_files
from config import Settings
from csm_files import ModelFiles, find_model
from csm_model import CsmModel
from speech_model import LoadProgress, ModelLoadError

# The load takes a second, but the imports of its libraries take long on two busy cores.
pytestmark = pytest.mark.timeout(240)


def ignore(_: LoadProgress) -> None: ...


@pytest.fixture(scope="session")
def small_repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_small_repositories(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache. huggingface_hub has read its environment at import, so its constants are set too."""
    folder = tmp_path / "hub-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return folder


@pytest.fixture
def hub(cache: Path, small_repositories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    with SmallHub(dict(small_repositories)) as server:
        use_endpoint(monkeypatch, server.url)
        yield server


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def failure(model_id: str = tiny_csm.SESAME) -> ModelLoadError:
    with pytest.raises(ModelLoadError) as caught:
        find_model(model_id, ignore)
    message = caught.value.message
    assert str(Path(constants.HF_HUB_CACHE).parent) not in message
    assert "Traceback" not in message
    return caught.value


def test_only_the_wanted_files_are_fetched_and_only_once(hub: SmallHub, cache: Path) -> None:
    files = find_model(tiny_csm.SESAME, ignore)
    names = sorted(path.relative_to(files.weights[0].parent).as_posix() for path in files.weights[0].parent.rglob("*") if path.is_file())
    assert names == ["config.json", "model.safetensors", "prompts/conversational_a.wav", "prompts/conversational_b.wav"]
    assert files.source == tiny_csm.SESAME
    assert files.note is None
    assert (files.prompts / "conversational_a.wav").read_text() == "conversational_a"
    hub.requests.clear()
    assert find_model(tiny_csm.SESAME, ignore) == files
    assert hub.requests == []


def test_the_cache_is_laid_out_as_huggingface_hub_itself_lays_it_out(hub: SmallHub) -> None:
    from huggingface_hub import try_to_load_from_cache

    files = find_model(tiny_csm.SESAME, ignore)
    assert try_to_load_from_cache(tiny_csm.SESAME, "model.safetensors") == str(files.weights[0])
    assert files.weights[0].parent.name == COMMIT
    assert files.weights[0].is_symlink()


def test_progress_counts_the_bytes_of_all_files(hub: SmallHub) -> None:
    reports: list[LoadProgress] = []
    find_model(tiny_csm.SESAME, reports.append)
    counted = [report for report in reports if report.done is not None]
    assert [report.done for report in counted] == sorted(report.done or 0 for report in counted)
    assert counted[-1].done == counted[-1].total
    assert (counted[-1].total or 0) > 2 * WEIGHT_BYTES
    assert any("model.safetensors" in report.stage for report in reports)


def test_nothing_is_written_to_stderr_while_files_are_fetched(hub: SmallHub, capfd: pytest.CaptureFixture[str]) -> None:
    find_model(tiny_csm.SESAME, ignore)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("where", ["list_errors", "file_errors"])
@pytest.mark.parametrize(("status", "code"), [(401, "GatedRepo"), (403, "GatedRepo"), (401, ""), (403, "")])
def test_a_gated_repository_is_replaced_by_the_open_copy(hub: SmallHub, where: str, status: int, code: str) -> None:
    getattr(hub, where)[tiny_csm.SESAME] = (status, code)
    reports: list[LoadProgress] = []
    files = find_model(tiny_csm.SESAME, reports.append)
    assert files.source == tiny_csm.MLX_COMMUNITY
    assert max(report.done or 0 for report in reports) == reports[-2].total
    assert "gated and no HF_TOKEN is set" in (files.note or "")
    assert hub.fetched("model.safetensors") == 1


def test_the_open_copy_in_the_cache_is_used_without_asking(hub: SmallHub) -> None:
    hub.list_errors[tiny_csm.SESAME] = (401, "GatedRepo")
    find_model(tiny_csm.SESAME, ignore)
    hub.list_errors.clear()
    hub.requests.clear()
    files = find_model(tiny_csm.SESAME, ignore)
    assert files.source == tiny_csm.MLX_COMMUNITY
    assert hub.requests == []


def test_a_refused_token_is_said_and_not_shown(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    hub.bad_token = "hf_secretsecret"
    hub.list_errors[tiny_csm.SESAME] = (403, "GatedRepo")
    files = find_model(tiny_csm.SESAME, ignore)
    assert files.source == tiny_csm.MLX_COMMUNITY
    assert "token was not accepted" in (files.note or "")
    assert "secret" not in (files.note or "")


def test_the_gated_repository_is_not_asked_for_an_open_models_prompts(
    hub: SmallHub, small_repositories: dict[str, Path], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(small_repositories[tiny_csm.MLX_COMMUNITY], bare, ignore=shutil.ignore_patterns("prompts"))
    hub.repositories["somebody/csm"] = bare
    files = find_model("somebody/csm", ignore)
    assert (files.prompts / "conversational_b.wav").is_file()
    assert not any(tiny_csm.SESAME in path for path, _ in hub.requests)
    assert hub.fetched("model.safetensors") == 1


@pytest.mark.parametrize(
    ("status", "code", "words", "retry"),
    [
        (401, "RepoNotFound", "does not exist, is private, or is gated", False),
        (404, "RepoNotFound", "does not exist, is private, or is gated", False),
        (429, "", "too many requests", True),
        (500, "", "answered 500", True),
        (503, "", "answered 503", True),
    ],
)
def test_the_hubs_refusals_are_explained(hub: SmallHub, status: int, code: str, words: str, retry: bool) -> None:
    hub.list_errors["somebody/csm"] = (status, code)
    error = failure("somebody/csm")
    assert words in error.message
    assert "somebody/csm" in error.message
    assert error.retry is retry


@pytest.mark.parametrize(
    ("status", "words", "retry"),
    [(401, "gated", False), (404, "(404)", False), (429, "too many requests", True), (500, "answered 500", True)],
)
def test_a_file_that_the_hub_refuses_is_explained(
    hub: SmallHub, monkeypatch: pytest.MonkeyPatch, status: int, words: str, retry: bool
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # huggingface_hub waits before each of its own retries
    hub.file_errors[tiny_csm.MIMI] = (status, "")
    error = failure()
    assert words in error.message
    assert tiny_csm.MIMI in error.message
    assert error.retry is retry


def test_a_hub_that_takes_connections_and_says_nothing_is_given_up(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csm_files, "_LIST_TIMEOUT_SECONDS", 0.5)
    hub.silent_after = 0
    error = failure()
    assert "cannot be reached" in error.message
    assert error.retry


def test_a_hub_that_falls_silent_within_a_file_is_given_up_and_asked_again(
    hub: SmallHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # huggingface_hub waits a second before each of its own retries
    hub.silent_after = 50_000
    error = failure()
    assert "What has been downloaded is kept" in error.message
    assert error.retry
    hub.silent_after = None
    assert find_model(tiny_csm.SESAME, ignore).source == tiny_csm.SESAME
    assert not list(cache.rglob("*.incomplete"))


def test_no_network_is_said_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        use_endpoint(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}")
        error = failure()
    assert "cannot be reached" in error.message
    assert error.retry


def test_a_forbidden_network_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = failure()
    assert "HF_HUB_OFFLINE" in error.message
    assert not error.retry


def test_a_broken_download_is_continued_where_it_broke(hub: SmallHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # huggingface_hub waits a second before each of its own retries
    hub.cut_after = 100_000
    hub.file_errors[tiny_csm.MIMI] = (500, "")
    error = failure()
    assert error.retry
    hub.cut_after = None
    hub.file_errors.clear()
    hub.requests.clear()
    find_model(tiny_csm.SESAME, ignore)
    assert not list(cache.rglob("*.incomplete"))


def test_an_interrupted_file_is_kept_and_continued_by_the_next_attempt(hub: SmallHub, cache: Path) -> None:
    find_model(tiny_csm.SESAME, ignore)
    (pointer,) = cache.glob("models--sesame--csm-1b/snapshots/*/model.safetensors")
    blob = pointer.resolve()
    content = blob.read_bytes()
    pointer.unlink()
    blob.unlink()
    blob.with_name(blob.name + ".incomplete").write_bytes(content[:1_000_000])
    hub.requests.clear()
    files = find_model(tiny_csm.SESAME, ignore)
    assert files.weights[0].read_bytes() == content
    assert [range_ for path, range_ in hub.requests if path.endswith("/model.safetensors")] == ["bytes=1000000-"]


def test_a_file_that_arrives_damaged_is_thrown_away(hub: SmallHub, cache: Path) -> None:
    hub.corrupt = True
    error = failure()
    assert "arrived damaged" in error.message
    assert error.retry
    assert not list(cache.rglob("*.incomplete"))
    hub.corrupt = False
    assert find_model(tiny_csm.SESAME, ignore).source == tiny_csm.SESAME


def test_a_full_disk_is_said_and_what_was_fetched_is_kept(hub: SmallHub, cache: Path) -> None:
    """The process may write no file above 1 MB, which raises the same kind of error as a full disk, in the same place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        error = failure()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "disk is full" in error.message
    assert "model.safetensors of sesame/csm-1b" in error.message
    assert find_model(tiny_csm.SESAME, ignore).source == tiny_csm.SESAME


def test_a_cache_that_may_not_be_written_is_said(hub: SmallHub, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    error = failure()
    assert "Hugging Face's cache" in error.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json of model is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json of model is damaged"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "is not CSM-1B"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "csm"}'), "lacks depth_decoder_config"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 100), "model.safetensors of model is damaged"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors of model is damaged"),
        (shutil.rmtree, "folder that does not exist: 'model'"),
    ],
)
def test_a_bad_folder_is_refused(
    hub: SmallHub, small_repositories: dict[str, Path], tmp_path: Path, change: Callable[[Path], Any], words: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_repositories[tiny_csm.SESAME], folder)
    change(folder)
    error = failure(str(folder))
    assert words in error.message
    assert not error.retry


def test_a_name_that_is_no_repositorys_is_refused(hub: SmallHub) -> None:
    error = failure("not a name")
    assert "neither a repository's name" in error.message
    assert not error.retry


def load(cache_folder: Path, model_id: str, tmp_path: Path, dtype: str = "bfloat16") -> CsmModel:
    model = CsmModel(Settings.model_validate({"model_id": model_id, "model_dtype": dtype, "cache_dir": tmp_path}))
    with tiny_csm.activated(cache_folder):
        model.load(ignore)
    return model


@pytest.mark.parametrize(
    ("variant", "dtype", "loaded"),
    [
        ({"extra_files": True}, "bfloat16", "bfloat16"),
        ({}, "float32", "float32"),
        ({"repo": tiny_csm.MLX_COMMUNITY, "dtype": "float16"}, "auto", "float16"),
        ({"repo": tiny_csm.QUANTIZED, "quantized": True}, "bfloat16", "8-bit"),
    ],
)
def test_checkpoints_load_in_the_wanted_type(variant: dict[str, Any], dtype: str, loaded: str, tmp_path: Path) -> None:
    repo = variant.get("repo", tiny_csm.SESAME)
    model = load(tiny_csm.build(**variant), repo, tmp_path, dtype)
    info = model.info()
    assert (info["source"], info["dtype"], info["loaded"], info["watermark"]) == (repo, loaded, True, False)
    assert info["sample_rate"] == 24_000
    assert info["parameters"] == sum(value.size for value in tiny_weights.random_weights().values())
    assert 0 < info["memory_gb"] < 1
    model.close()
    assert model.info()["loaded"] is False


def test_the_weights_are_those_of_the_file(tmp_path: Path) -> None:
    cache_folder = tiny_csm.build()
    model = load(cache_folder, tiny_csm.SESAME, tmp_path, "float32")
    assert model._speaker is not None
    parameters: list[tuple[str, Any]] = tree_flatten(model._speaker._model.parameters())  # type: ignore[assignment]
    stored = mx.load(str(tiny_csm.snapshot_of(cache_folder, tiny_csm.SESAME) / "model.safetensors"))
    assert isinstance(stored, dict)
    expected = joined({tiny_csm._mlx_name(name): value for name, value in stored.items()})
    assert {name: value.shape for name, value in parameters} == {name: value.shape for name, value in expected.items()}
    assert all(mx.array_equal(value, expected[name]) for name, value in parameters)
    model.close()


def joined(stored: dict[str, mx.array]) -> dict[str, mx.array]:
    """Return the weights as the network has them: queries, keys and values (head by head) in one matrix, gate and up in one."""
    expected = {name: value for name, value in stored.items() if not re.search(r"\.(q|k|v|gate|up)_proj\.", name)}
    for name in stored:
        if ".q_proj." in name:
            keys, values = (
                stored[name.replace("q_proj", part)].reshape(-1, tiny_weights.HEAD_DIM, stored[name].shape[1])
                for part in ("k_proj", "v_proj")
            )
            pairs = mx.stack([keys, values], axis=1).flatten(0, 2)
            expected[name.replace("q_proj", "qkv_proj")] = mx.concatenate([stored[name], pairs])
        elif ".gate_proj." in name:
            expected[name.replace("gate_proj", "gate_up_proj")] = mx.concatenate(
                [stored[name], stored[name.replace("gate_proj", "up_proj")]]
            )
    return expected


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"model\.safetensors of sesame/csm-1b is damaged or incomplete") as caught:
        load(tiny_csm.build(truncated=True), tiny_csm.SESAME, tmp_path)
    assert not caught.value.retry


def test_another_models_weights_are_refused(tmp_path: Path) -> None:
    cache_folder = tiny_csm.build()
    folder = tmp_path / "model"
    shutil.copytree(tiny_csm.snapshot_of(cache_folder, tiny_csm.SESAME), folder)
    tiny_csm._save(folder / "model.safetensors", {"backbone_model.layers.0.weight": np.zeros((4, 4), np.float32)}, "float32")
    with pytest.raises(ModelLoadError, match="not a CSM-1B checkpoint that mlx-audio can read") as caught:
        load(cache_folder, str(folder), tmp_path)
    assert not caught.value.retry


def test_a_checkpoint_comes_from_the_hub_once_and_then_needs_no_network(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny = tiny_csm.build(repo=tiny_csm.MLX_COMMUNITY)
    repositories = {repo: tiny_csm.snapshot_of(tiny, repo) for repo in (tiny_csm.MLX_COMMUNITY, tiny_csm.MIMI, tiny_csm.TOKENIZER)}
    model = CsmModel(Settings.model_validate({"model_id": tiny_csm.SESAME, "cache_dir": tmp_path}))
    with SmallHub(repositories) as hub:
        use_endpoint(monkeypatch, hub.url)
        model.load(ignore)
    assert model.info()["source"] == tiny_csm.MLX_COMMUNITY
    assert "gated" in model.info()["note"]
    model.close()
    with connections() as made:
        model.load(ignore)
        assert model._speaker is not None
        assert model._speaker._model._text_tokenizer.encode("[0]Hello") == [256, *b_ids("[0]Hello"), 257]
    assert made == []
    model.close()


def b_ids(text: str) -> list[int]:
    return [tiny_weights.byte_token(character) for character in text]


_connections: list[object] | None = None
_hooked = False


@contextlib.contextmanager
def connections() -> Iterator[list[object]]:
    """Collect the connections that this process tries to make, from the interpreter's audit events (a hook cannot be removed)."""
    global _connections, _hooked
    if not _hooked:
        sys.addaudithook(_note_connection)
        _hooked = True
    made: list[object] = []
    _connections = made
    try:
        yield made
    finally:
        _connections = None


def _note_connection(event: str, arguments: tuple[object, ...]) -> None:
    if _connections is not None and event in ("socket.connect", "socket.getaddrinfo"):
        _connections.append(arguments)


def test_a_shard_index_names_the_weights(hub: SmallHub, small_repositories: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_repositories[tiny_csm.SESAME], folder)
    whole = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": whole.name}}))
    files: ModelFiles = find_model(str(folder), ignore)
    assert files.weights == (whole,)
