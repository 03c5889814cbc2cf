"""Where CSM's files come from: a folder, Hugging Face's cache, or the hub; chosen so that nothing is fetched twice, and checked."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import shorten
from hub_download import Download, Listing, RefusedError, Report, cached_snapshot, has_token, list_repository
from speech_model import LoadProgress, ModelLoadError
from voice_presets import CSM_VOICE_KEYS

logger = logging.getLogger(__name__)

GATED_REPO = "sesame/csm-1b"
# The same weights and voice prompts without the licence click (float32, 6.2 GB).
OPEN_REPO = "mlx-community/csm-1b"
# The codec and the tokenizer that CSM was trained with; mlx-audio 0.6.2 takes them from the same places.
MIMI_REPO = "kyutai/moshiko-pytorch-bf16"
MIMI_FILE = "tokenizer-e351c8d8-checkpoint125.safetensors"
TOKENIZER_REPO = "unsloth/Llama-3.2-1B"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_TOKENIZER_EXTRAS = ("special_tokens_map.json", "config.json")

_CONFIG = "config.json"
_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PROMPTS = tuple(f"prompts/{key}.wav" for key in CSM_VOICE_KEYS)
_MODEL_TYPES = ("csm", "sesame")  # mlx-audio's convert writes the second where the original says the first
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_ADVICE = f"MODEL_ID must name CSM-1B as {GATED_REPO} holds it, or an MLX conversion such as {OPEN_REPO}-8bit."


@dataclass(frozen=True)
class ModelFiles:
    """Everything that a load reads; all of it is on this machine.

    Attributes:
        source: The repository of the weights, or the folder's name.
        config: The content of config.json.
        weights: The safetensors files whose keys mlx-audio knows, and no others.
        prompts: A folder with `<voice_key>.wav`.
        mimi: The codec's weights.
        tokenizer: A folder that transformers' AutoTokenizer reads.
        note: Why the source is not the one that MODEL_ID names.
    """

    source: str
    config: dict[str, Any] = field(repr=False)
    weights: tuple[Path, ...]
    prompts: Path
    mimi: Path
    tokenizer: Path
    note: str | None = None


@dataclass(frozen=True)
class _Source:
    """Where the weights are, or will be once the download has run."""

    name: str
    folder: Path
    note: str | None = None
    listing: Listing | None = None


def find_model(model_id: str, report: Report) -> ModelFiles:
    """The files of the model that MODEL_ID names, fetched if they are not there yet. Afterwards no network is needed.

    Args:
        model_id: A repository on the hub, or a folder (begins with `/`, `~` or `.`).
        report: Told how far a download is.

    Raises:
        ModelLoadError: With what failed and what to do.
    """
    report(LoadProgress("looking for the model's files"))
    download = Download(report)
    if model_id.startswith(("/", "~", ".")):
        source = _folder(Path(model_id).expanduser())
    else:
        source = _cached(model_id) or _remote(model_id, download)
    prompts = _prompts(source, download)
    mimi = _companion(download, MIMI_REPO, (MIMI_FILE,))
    tokenizer = _companion(download, TOKENIZER_REPO, TOKENIZER_FILES, _TOKENIZER_EXTRAS)
    download.run()
    weights = tuple(source.folder / name for name in _weight_names(source.folder, _names(source.folder), source.name))
    for path in weights:
        _check_whole(path, source.name)
    _check_whole(mimi / MIMI_FILE, MIMI_REPO)
    config = _config(source.folder, source.name)
    return ModelFiles(source.name, config, weights, prompts / "prompts", mimi / MIMI_FILE, tokenizer, source.note)


def _folder(folder: Path) -> _Source:
    if not folder.is_dir():
        raise ModelLoadError(f"MODEL_ID names a folder that does not exist: {shorten(folder.name)}.", retry=False)
    _config(folder, folder.name)
    return _Source(folder.name, folder)


def _cached(repo: str) -> _Source | None:
    """The first complete copy in Hugging Face's cache, so that neither a second one is fetched nor the hub asked at each start."""
    for candidate in (repo, OPEN_REPO) if repo == GATED_REPO else (repo,):
        snapshot = cached_snapshot(candidate)
        if snapshot and _complete(snapshot, candidate):
            note = f"{OPEN_REPO} is in the cache and has the same weights as {repo}" if candidate != repo else None
            return _Source(candidate, snapshot, note)
    return None


def _complete(snapshot: Path, repo: str) -> bool:
    names = _names(snapshot)
    try:
        return _CONFIG in names and set(_weight_names(snapshot, names, repo)) <= names
    except ModelLoadError:
        return False


def _remote(repo: str, download: Download) -> _Source:
    """`repo` on the hub, or the open copy of CSM-1B if the hub refuses the gated one."""
    try:
        return _listed(repo, download)
    except RefusedError:
        if repo != GATED_REPO:
            raise
    reason = "your token was not accepted (its account must have agreed to the licence)" if has_token() else "no HF_TOKEN is set"
    note = f"{repo} is gated and {reason}; {OPEN_REPO} has the same weights"
    logger.warning("%s: using that", note)
    source = _cached(OPEN_REPO) or _listed(OPEN_REPO, download)
    return _Source(source.name, source.folder, note, source.listing)


def _listed(repo: str, download: Download) -> _Source:
    listing = list_repository(repo)
    if _CONFIG not in listing.files:
        raise ModelLoadError(f"{repo} has no {_CONFIG}, so it is no CSM-1B checkpoint. {_ADVICE}", retry=False)
    # Small files first: a gated repository lists its files to everybody and refuses the first one, and a wrong model shows in its config.
    download.add(listing, [name for name in (_CONFIG, _INDEX) if name in listing.files])
    download.run()
    _config(listing.folder, repo)
    download.add(listing, _weight_names(listing.folder, listing.files, repo))
    return _Source(repo, listing.folder, listing=listing)


def _prompts(source: _Source, download: Download) -> Path:
    """The folder above `prompts/`: the weights' own, else the open copy's. The gated repository is asked only for its own weights' sake."""
    if set(_PROMPTS) <= _names(source.folder):
        return source.folder
    if source.listing and set(_PROMPTS) <= set(source.listing.files):
        download.add(source.listing, _PROMPTS)
        return source.folder
    return _companion(download, OPEN_REPO, _PROMPTS)


def _companion(download: Download, repo: str, names: Sequence[str], extras: Sequence[str] = ()) -> Path:
    """The folder with `names` of `repo`, queued to be fetched if they are not in the cache; `extras` come along where they exist."""
    snapshot = cached_snapshot(repo)
    if snapshot and set(names) <= _names(snapshot):
        return snapshot
    listing = list_repository(repo)
    missing = [name for name in names if name not in listing.files]
    if missing:
        raise ModelLoadError(f"{repo} has no {', '.join(missing)} on the hub, which CSM needs.", retry=False)
    download.add(listing, [*names, *(name for name in extras if name in listing.files)])
    return listing.folder


def _names(folder: Path) -> set[str]:
    """The files in `folder` and in its `prompts/`; a link to nothing is no file."""
    return {path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("prompts/*")) if path.is_file()}


def _weight_names(folder: Path, names: Collection[str], source: str) -> list[str]:
    """Which of `names` are the weights that mlx-audio reads.

    mlx-audio 0.6.2 itself reads every *.safetensors in the folder and then refuses `sesame/csm-1b`, where a second set with other keys
    (transformers-0000x-of-00002.safetensors) lies beside model.safetensors.

    Raises:
        ModelLoadError: None of them are.
    """
    if _ONE_FILE in names:
        return [_ONE_FILE]
    shards = sorted(set(_read_json(folder, _INDEX, source).get("weight_map", {}).values())) if _INDEX in names else []
    if not shards or not all(isinstance(name, str) and "/" not in name for name in shards):
        raise ModelLoadError(f"{source} has no {_ONE_FILE}. {_ADVICE}", retry=False)
    return shards


def _config(folder: Path, source: str) -> dict[str, Any]:
    """config.json, if it is one of CSM's.

    Raises:
        ModelLoadError: It is missing, damaged or another model's.
    """
    config = _read_json(folder, _CONFIG, source)
    kind = config.get("model_type")
    if kind not in _MODEL_TYPES or "text_tokenizer" in config:
        raise ModelLoadError(f"{source} is not CSM-1B: its {_CONFIG} says model_type {shorten(kind)}. {_ADVICE}", retry=False)
    missing = [key for key in ("depth_decoder_config", "audio_num_codebooks", "text_vocab_size") if key not in config]
    if missing:
        raise ModelLoadError(f"The {_CONFIG} of {source} lacks {', '.join(missing)}. {_ADVICE}", retry=False)
    return config


def _read_json(folder: Path, name: str, source: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(f"{name} of {source} is missing or cannot be read. {_ADVICE}", retry=False) from error
    except ValueError as error:
        raise ModelLoadError(_damaged(name, source), retry=False) from error
    if not isinstance(content, dict):
        raise ModelLoadError(_damaged(name, source), retry=False)
    return content


def _check_whole(path: Path, source: str) -> None:
    """Compare a safetensors file's size with what its header promises: MLX would read zeros, or crash, behind the end.

    The format: 8 bytes little-endian length of the header, the header in JSON, the tensors at the offsets it names.

    Raises:
        ModelLoadError: The file is damaged or not whole.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length <= min(size, _LONGEST_HEADER) else None
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"] if header else []
    except OSError as error:
        raise ModelLoadError(f"{path.name} of {source} cannot be read: {error.strerror}.", retry=False) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelLoadError(_damaged(path.name, source), retry=False) from error
    if not ends or 8 + length + max(ends) != size:
        raise ModelLoadError(_damaged(path.name, source), retry=False)


def _damaged(name: str, source: str) -> str:
    return f"{name} of {source} is damaged or not whole: remove it from Hugging Face's cache (or the folder of MODEL_ID), it will be fetched again."
