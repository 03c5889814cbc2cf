"""Finds or downloads the files of CSM-1B, its codec and its tokenizer."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import huggingface_hub
from safetensors import SafetensorError, safe_open

from errors import shorten
from speech_model import LoadProgress, ModelLoadError
from voice_presets import CSM_VOICE_KEYS

logger = logging.getLogger(__name__)

GATED_REPO = "sesame/csm-1b"
# The same weights and voice prompts, without a licence to accept (float32, 6.2 GB).
OPEN_REPO = "mlx-community/csm-1b"
# The codec and the tokenizer that CSM was trained with; mlx-audio 0.6.2 takes them from the same repositories.
MIMI_REPO = "kyutai/moshiko-pytorch-bf16"
MIMI_FILE = "tokenizer-e351c8d8-checkpoint125.safetensors"
TOKENIZER_REPO = "unsloth/Llama-3.2-1B"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_TOKENIZER_EXTRAS = ("special_tokens_map.json", "config.json")

_CONFIG = "config.json"
_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PROMPTS = tuple(f"prompts/{key}.wav" for key in CSM_VOICE_KEYS)
_MODEL_TYPES = ("csm", "sesame")  # mlx-audio's convert writes "sesame" where the original has "csm"
_CONFIG_KEYS = ("depth_decoder_config", "audio_num_codebooks", "text_vocab_size")
_ADVICE = f"MODEL_ID must name CSM-1B in the form of {GATED_REPO}, or an MLX conversion such as {OPEN_REPO}-8bit."

_LIST_TIMEOUT_SECONDS = 10.0  # of the first request: without a network, a load fails after this time
_REPORT_SECONDS = 0.5
_SPARE_BYTES = 100_000_000  # left free on the disk for logs and other programs
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class ModelFiles:
    """All files that a load reads, on this machine."""

    source: str  # the repository of the weights, or the folder's name
    config: dict[str, Any] = field(repr=False)  # the content of config.json
    weights: tuple[Path, ...]  # the safetensors files whose keys mlx-audio knows, and no others
    prompts: Path  # a folder with `<voice_key>.wav`
    mimi: Path  # the codec's weights
    tokenizer: Path  # a folder that transformers' AutoTokenizer reads
    note: str | None = None  # why the source is not the one that MODEL_ID names


@dataclass(frozen=True)
class _HubFile:
    """A file on the hub, and its paths in Hugging Face's cache."""

    repo: str
    token: bool | None  # for requests: None sends the user's token if there is one, False sends none
    name: str  # the path in the repository
    size: int
    snapshot: Path  # a folder named by the commit of the repository's main branch
    blob: Path  # named by its digest: the SHA-256 of a large file, git's id of a small one

    @property
    def part(self) -> Path:
        return self.blob.with_name(f"{self.blob.name}.incomplete")


_Listing = dict[str, _HubFile]  # the files of a repository, by name


@dataclass(frozen=True)
class _Source:
    """The folder that has the weights, or will have them after the download."""

    name: str
    folder: Path
    note: str | None = None
    listing: _Listing = field(default_factory=dict)


class _Place(NamedTuple):
    """A folder for downloads, in the words of an error."""

    name: str
    setting: str


_HF_CACHE = _Place("Hugging Face's cache", "HF_HOME")


class _RefusedError(ModelLoadError):
    """The hub denies access to a repository: gated, private, or unknown (it answers 401 in all three cases)."""

    def __init__(self, repo: str) -> None:
        token = "your token was not accepted for it" if huggingface_hub.get_token() else "no HF_TOKEN is set"
        advice = "Check MODEL_ID, accept its licence on its page, set HF_TOKEN."
        super().__init__(f"{repo} does not exist, is private, or is gated, and {token}. {advice}", retry=False)


class HubUnreachableError(ModelLoadError):
    """The hub does not answer: a fault of the network, not of a file."""


def download_file(repo: str, name: str, size: int, sha256: str, folder: Path) -> Path:
    """Return the path of a public file of `repo`, downloaded to `folder` under the name of its SHA-256. Continues an earlier attempt.

    Raises:
        HubUnreachableError: The hub does not answer.
        ModelLoadError: With what failed and what to do. What has been downloaded is kept.
    """
    file = _HubFile(repo, None, name, size, Path("main"), folder / sha256)
    with _translated(repo, name, _Place("the folder for downloads", "CACHE_DIR")):
        _Download(lambda _: None).fetch(file, folder / f"{sha256}.lock")
    return file.blob


def find_model(model_id: str, report: Callable[[LoadProgress], None]) -> ModelFiles:
    """Return the files of the model that MODEL_ID names; download those that are missing. After that no network is needed.

    Args:
        model_id: A repository on the hub, or a folder (begins with `/`, `~` or `.`).
        report: Called with the progress.

    Raises:
        ModelLoadError: With what failed and what to do.
    """
    report(LoadProgress("looking for the model's files"))
    download = _Download(report)
    if model_id.startswith(("/", "~", ".")):
        source = _local(Path(model_id).expanduser())
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


def _local(folder: Path) -> _Source:
    if not folder.is_dir():
        raise ModelLoadError(f"MODEL_ID names a folder that does not exist: {shorten(folder.name)}.", retry=False)
    _config(folder, folder.name)
    return _Source(folder.name, folder)


def _cached(repo: str) -> _Source | None:
    """Return the first complete copy in Hugging Face's cache: no second download, and no request to the hub at each start."""
    for candidate in (repo, OPEN_REPO) if repo == GATED_REPO else (repo,):
        snapshot = _cached_snapshot(candidate)
        names = _names(snapshot) if snapshot else set()
        with contextlib.suppress(ModelLoadError):
            if snapshot and {_CONFIG, *_weight_names(snapshot, names, candidate)} <= names:
                note = f"{OPEN_REPO} is in the cache and has the same weights as {repo}" if candidate != repo else None
                return _Source(candidate, snapshot, note)
    return None


def _remote(repo: str, download: _Download) -> _Source:
    """Return `repo` on the hub, or the open copy of CSM-1B where the hub denies access to the gated one."""
    try:
        return _listed(repo, download)
    except _RefusedError:
        if repo != GATED_REPO:
            raise
    reason = (
        "your token was not accepted (its account must have agreed to the licence)" if huggingface_hub.get_token() else "no HF_TOKEN is set"
    )
    note = f"{repo} is gated and {reason}; {OPEN_REPO} has the same weights"
    logger.warning("%s: using that", note)
    source = _cached(OPEN_REPO) or _listed(OPEN_REPO, download)
    return _Source(source.name, source.folder, note, source.listing)


def _listed(repo: str, download: _Download) -> _Source:
    listing = _list_repository(repo)
    if _CONFIG not in listing:
        raise ModelLoadError(f"{repo} has no {_CONFIG}, so it is no CSM-1B checkpoint. {_ADVICE}", retry=False)
    # Small files first: a gated repository lists its files to everybody and then refuses the first one, and config.json shows a wrong model.
    download.add(listing[name] for name in (_CONFIG, _INDEX) if name in listing)
    download.run()
    folder = listing[_CONFIG].snapshot
    _config(folder, repo)
    names = _weight_names(folder, listing, repo)
    _check_listed(repo, listing, names)
    download.add(listing[name] for name in names)
    return _Source(repo, folder, listing=listing)


def _prompts(source: _Source, download: _Download) -> Path:
    """Return the folder above `prompts/`: of the weights' own repository, else of the open copy. The gated one is not asked for prompts alone."""
    if set(_PROMPTS) <= _names(source.folder):
        return source.folder
    if set(_PROMPTS) <= source.listing.keys():
        download.add(source.listing[name] for name in _PROMPTS)
        return source.folder
    return _companion(download, OPEN_REPO, _PROMPTS)


def _companion(download: _Download, repo: str, names: Sequence[str], extras: Sequence[str] = ()) -> Path:
    """Return the folder with `names` of `repo`, queued for download if the cache lacks them; `extras` are added where they exist."""
    snapshot = _cached_snapshot(repo)
    if snapshot and set(names) <= _names(snapshot):
        return snapshot
    listing = _list_repository(repo)
    _check_listed(repo, listing, names)
    download.add(listing[name] for name in (*names, *extras) if name in listing)
    return listing[names[0]].snapshot


def _check_listed(repo: str, listing: _Listing, names: Sequence[str]) -> None:
    if missing := [name for name in names if name not in listing]:
        raise ModelLoadError(f"{repo} has no {', '.join(missing)} on the hub, which CSM needs.", retry=False)


def _names(folder: Path) -> set[str]:
    """Return the files in `folder` and in its `prompts/`, without broken links."""
    return {path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("prompts/*")) if path.is_file()}


def _weight_names(folder: Path, names: Collection[str], source: str) -> list[str]:
    """Return which of `names` are the weights that mlx-audio reads.

    mlx-audio 0.6.2 itself reads every *.safetensors in the folder and then refuses `sesame/csm-1b`, which has a second set with other keys
    (transformers-0000x-of-00002.safetensors) beside model.safetensors.
    """
    if _ONE_FILE in names:
        return [_ONE_FILE]
    shards = sorted(set(_read_json(folder, _INDEX, source).get("weight_map", {}).values())) if _INDEX in names else []
    if not shards or not all(isinstance(name, str) and "/" not in name for name in shards):
        raise ModelLoadError(f"{source} has no {_ONE_FILE}. {_ADVICE}", retry=False)
    return shards


def _config(folder: Path, source: str) -> dict[str, Any]:
    """Return the content of config.json; raise ModelLoadError if it is missing, damaged or another model's."""
    config = _read_json(folder, _CONFIG, source)
    kind = config.get("model_type")
    if kind not in _MODEL_TYPES or "text_tokenizer" in config:
        raise ModelLoadError(f"{source} is not CSM-1B: its {_CONFIG} has model_type {shorten(kind)}. {_ADVICE}", retry=False)
    if missing := [key for key in _CONFIG_KEYS if key not in config]:
        raise ModelLoadError(f"The {_CONFIG} of {source} lacks {', '.join(missing)}. {_ADVICE}", retry=False)
    return config


def _read_json(folder: Path, name: str, source: str) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    except OSError as error:
        raise ModelLoadError(f"{name} of {source} is missing or cannot be read. {_ADVICE}", retry=False) from error
    except (ValueError, TypeError) as error:
        raise _damaged(name, source) from error


def _check_whole(path: Path, source: str) -> None:
    """Check that a safetensors file has the size that its header names: past the end, MLX would read zeros or crash."""
    try:
        with safe_open(path, framework="np"):
            pass
    except OSError as error:
        raise ModelLoadError(f"{path.name} of {source} cannot be read: {error.strerror or type(error).__name__}.", retry=False) from error
    except SafetensorError as error:
        raise _damaged(path.name, source) from error


def _damaged(name: str, source: str) -> ModelLoadError:
    advice = "remove it from Hugging Face's cache (or from the folder that MODEL_ID names); it will be downloaded again."
    return ModelLoadError(f"{name} of {source} is damaged or incomplete: {advice}", retry=False)


def _list_repository(repo: str) -> _Listing:
    """Ask the hub for the files of `repo`. If it does not accept the user's token, ask without: public repositories need none."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise ModelLoadError(f"{repo} is not complete in Hugging Face's cache: unset HF_HUB_OFFLINE to download it.", retry=False)
    try:
        return _list(repo, None)
    except _RefusedError:
        if not huggingface_hub.get_token():
            raise
        return _list(repo, False)


def _list(repo: str, token: bool | None) -> _Listing:
    with _translated(repo, "the list of files"):
        info = huggingface_hub.HfApi().model_info(repo, files_metadata=True, timeout=_LIST_TIMEOUT_SECONDS, token=token)
    home = _repository_folder(repo)
    snapshot = home / "snapshots" / (info.sha or "main")
    listing = {}
    for file in info.siblings or ():
        if digest := file.lfs.sha256 if file.lfs else file.blob_id:
            listing[file.rfilename] = _HubFile(repo, token, file.rfilename, file.size or 0, snapshot, home / "blobs" / digest)
    return listing


class _Download:
    """Downloads files into Hugging Face's cache, in the layout of its own library, and reports the progress over all files.

    huggingface_hub 2.4.0 deletes an incomplete file when the process ends or the connection is lost for long: at 6.2 GB that is costly.
    So its `http_get` does the transfer, and the incomplete file stays here, as `blobs/<etag>.incomplete`, for the next attempt.
    """

    def __init__(self, report: Callable[[LoadProgress], None]) -> None:
        self._report = report
        self._wanted: list[_HubFile] = []
        self._fetched = 0
        self._total = 0
        self._stage, self._reported_at = "", 0.0

    def add(self, files: Iterable[_HubFile]) -> None:
        """Queue files; those that are in the cache are only linked."""
        for file in files:
            self._wanted.append(file)
            self._total += 0 if file.blob.exists() else file.size

    def run(self) -> None:
        """Download the queued files that are missing."""
        self._check_space()
        wanted, self._wanted = self._wanted, []  # a file that is refused is not requested again
        try:
            for file in wanted:
                with _translated(file.repo, file.name):
                    lock = _cache_folder() / ".locks" / _repository_folder(file.repo).name / f"{file.blob.name}.lock"
                    self.fetch(file, lock)
                    _link(file)
        finally:
            self._total = self._fetched

    def _check_space(self) -> None:
        folder = _cache_folder()
        with _translated(self._wanted[0].repo if self._wanted else "the model", "any file"):
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
        missing = self._total - self._fetched
        needed = missing - sum(file.part.stat().st_size for file in self._wanted if file.part.exists()) + _SPARE_BYTES
        if missing and needed > free:
            raise ModelLoadError(
                f"The disk is too full: the model needs {needed / 1e9:.1f} GB in Hugging Face's cache, {free / 1e9:.1f} GB are free. "
                "Make room, or set HF_HOME."
            )

    def fetch(self, file: _HubFile, lock: Path) -> None:
        """Download one file if it is missing, and check its digest. `lock` keeps other processes from writing it at the same time."""
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # exported, but not by name

        for path in (file.blob, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not file.blob.exists():
                self._transfer(file)
                self._report(LoadProgress(f"checking {file.name} of {file.repo}"))
                _verify(file)
                file.part.replace(file.blob)

    def _transfer(self, file: _HubFile) -> None:
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        self._stage = f"downloading {file.name.rpartition('/')[2]} of {file.repo}"
        self._reported_at = 0.0  # the beginning of each file is reported
        if file.part.exists() and file.part.stat().st_size > file.size:
            file.part.unlink()
        with file.part.open("ab") as target:
            self._count(target.tell())
            http_get(
                huggingface_hub.hf_hub_url(file.repo, file.name, revision=file.snapshot.name),
                target,
                resume_size=target.tell(),
                headers=build_hf_headers(token=file.token),
                expected_size=file.size,
                tqdm_class=lambda **_: contextlib.nullcontext(SimpleNamespace(update=self._count)),  # type: ignore[arg-type]
            )

    def _count(self, size: int) -> None:
        self._fetched += size
        now = time.monotonic()
        if now - self._reported_at >= _REPORT_SECONDS or self._fetched >= self._total:
            self._reported_at = now
            self._report(LoadProgress(self._stage, self._fetched, self._total))


def _verify(file: _HubFile) -> None:
    from huggingface_hub.utils.sha import git_hash, sha_fileobj

    with file.part.open("rb") as content:
        digest = sha_fileobj(content).hex() if len(file.blob.name) == 64 else git_hash(content.read())
    if digest != file.blob.name:
        file.part.unlink()
        raise ModelLoadError(f"{file.name} of {file.repo} arrived damaged and was deleted; it will be downloaded again.")


def _link(file: _HubFile) -> None:
    """Link the file into the snapshot's folder, and make the snapshot `main`."""
    pointer = file.snapshot / file.name
    pointer.parent.mkdir(parents=True, exist_ok=True)
    if not pointer.exists():
        pointer.unlink(missing_ok=True)  # a broken link
        pointer.symlink_to(os.path.relpath(file.blob, pointer.parent))
    refs = _repository_folder(file.repo) / "refs"
    refs.mkdir(exist_ok=True)
    (refs / "main").write_text(file.snapshot.name, encoding="utf-8")


def _cached_snapshot(repo: str) -> Path | None:
    """Return the folder of `repo`'s main branch in Hugging Face's cache, if it has one."""
    home = _repository_folder(repo)
    with contextlib.suppress(OSError):
        snapshot = home / "snapshots" / (home / "refs" / "main").read_text(encoding="utf-8").strip()
        return snapshot if snapshot.is_dir() else None
    return None


def _cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _repository_folder(repo: str) -> Path:
    return _cache_folder() / f"models--{repo.replace('/', '--')}"


@contextlib.contextmanager
def _translated(repo: str, what: str, place: _Place = _HF_CACHE) -> Iterator[None]:
    """Turn errors of the hub, the network and the disk into a ModelLoadError."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise ModelLoadError(f"MODEL_ID {repo!r} is neither a repository's name (owner/name) nor a folder.", retry=False) from error
    except RepositoryNotFoundError as error:  # also for gated ones
        raise _RefusedError(repo) from error
    except HfHubHTTPError as error:
        raise _http_error(repo, what, error.response.status_code) from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise HubUnreachableError(
            f"The hub cannot be reached ({type(error).__name__}) to download {what} of {repo}: check the network, or HF_ENDPOINT. "
            "What has been downloaded is kept."
        ) from error
    except OSError as error:
        raise _disk_error(repo, what, place, error) from error


def _http_error(repo: str, what: str, status: int) -> ModelLoadError:
    if status in (401, 403):
        return _RefusedError(repo)
    if status == 404:
        return ModelLoadError(f"{repo} has no {what} on the hub (404). Check MODEL_ID.", retry=False)
    if status == 429:
        return ModelLoadError(f"The hub refused {what} of {repo}: too many requests (429). It will be retried; HF_TOKEN raises the limit.")
    return ModelLoadError(f"The hub answered {status} for {what} of {repo}. It will be retried; what has been downloaded is kept.")


def _disk_error(repo: str, what: str, place: _Place, error: OSError) -> ModelLoadError:
    if error.errno in _NO_SPACE:
        return ModelLoadError(f"The disk is full: cannot write {what} of {repo} to {place.name}. Make room, or set {place.setting}.")
    reason = error.strerror or type(error).__name__
    return ModelLoadError(f"Cannot download or store {what} of {repo}: {reason}. Check that {place.name} ({place.setting}) is writable.")
