"""Finds or downloads the files of CSM-1B, its codec and its tokenizer."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import shorten
from speech_model import LoadProgress, ModelLoadError
from voice_presets import CSM_VOICE_KEYS

_LIST_TIMEOUT_SECONDS = 10.0  # the first contact: without a network this is how long a load takes to say so
_REPORT_SECONDS = 0.5
_SPARE_BYTES = 100_000_000  # left free on the disk, for the logs and everybody else
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SHA256 = re.compile(r"[0-9a-f]{64}")

Report = Callable[[LoadProgress], None]


class RefusedError(ModelLoadError):
    """The hub does not let us read a repository: gated, private, or not there (it answers 401 in all three cases)."""


@dataclass(frozen=True)
class HubFile:
    """A file on the hub.

    Attributes:
        name: Its path in the repository.
        size: Bytes.
        etag: What Hugging Face's cache names its content by: the SHA-256 of a large file, git's id of a small one.
    """

    name: str
    size: int
    etag: str


@dataclass(frozen=True)
class Listing:
    """What a repository holds.

    Attributes:
        repo: `owner/name`.
        commit: Of its main branch.
        files: By name.
        token: Sent with each request: None for the user's own if there is one, False for none at all.
    """

    repo: str
    commit: str
    files: dict[str, HubFile]
    token: bool | None

    @property
    def folder(self) -> Path:
        """Where its files lie once they are fetched."""
        return _repository_folder(self.repo) / "snapshots" / self.commit


def cached_snapshot(repo: str) -> Path | None:
    """The folder of `repo`'s main branch in Hugging Face's cache, if something of it was ever fetched."""
    home = _repository_folder(repo)
    with contextlib.suppress(OSError):
        snapshot = home / "snapshots" / (home / "refs" / "main").read_text(encoding="utf-8").strip()
        return snapshot if snapshot.is_dir() else None
    return None


def offline() -> bool:
    """Whether the user has forbidden all traffic to the hub (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def has_token() -> bool:
    """Whether the user has a token for the hub, in HF_TOKEN or from a login."""
    from huggingface_hub import get_token

    return bool(get_token())


def list_repository(repo: str) -> Listing:
    """Ask the hub what `repo` holds. A token that the hub does not accept is left out: public repositories need none.

    Raises:
        RefusedError: The repository is gated, private or unknown.
        ModelLoadError: The hub cannot be reached or is in trouble.
    """
    if offline():
        raise ModelLoadError(
            f"{repo} is not complete in Hugging Face's cache, and HF_HUB_OFFLINE forbids to fetch it: unset it.", retry=False
        )
    try:
        return _list(repo, None)
    except RefusedError:
        if not has_token():
            raise
        return _list(repo, False)


def _list(repo: str, token: bool | None) -> Listing:
    from huggingface_hub import HfApi

    with _translated(repo, "the list of files"):
        info = HfApi().model_info(repo, files_metadata=True, timeout=_LIST_TIMEOUT_SECONDS, token=token)
    files = [HubFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else file.blob_id or "") for file in info.siblings or ()]
    return Listing(repo, info.sha or "main", {file.name: file for file in files if file.etag}, token)


class Download:
    """Fetches files into Hugging Face's cache, as its own library would lay them out, and reports how far all of them are.

    huggingface_hub 2.4.0 throws a part of a file away when the process ends or the connection is lost for long; at 6.2 GB that hurts.
    So the transfer is its `http_get`, and the part is kept here, as `blobs/<etag>.incomplete`, to be continued by the next attempt.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._wanted: list[tuple[Listing, HubFile]] = []
        self._fetched = 0
        self._total = 0
        self._stage = ""
        self._reported_at = 0.0

    def add(self, listing: Listing, names: Sequence[str]) -> None:
        """Want these files of a repository; those in the cache already are only linked."""
        for name in names:
            file = listing.files[name]
            self._wanted.append((listing, file))
            if not _blob(listing.repo, file).exists():
                self._total += file.size

    def run(self) -> None:
        """Fetch what is missing of what was added since.

        Raises:
            RefusedError: The hub shows the repository's files but does not hand them out.
            ModelLoadError: With what failed and what to do.
        """
        self._check_space()
        wanted, self._wanted = self._wanted, []  # a file that is refused is not wanted again
        try:
            for listing, file in wanted:
                with _translated(listing.repo, file.name):
                    self._fetch(listing, file)
                    _link(listing, file)
        except ModelLoadError:
            self._total = self._fetched
            raise

    def _check_space(self) -> None:
        missing = self._total - self._fetched
        folder = _cache_folder()
        with _translated(self._wanted[0][0].repo if self._wanted else "the model", "any file"):
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
        parts = sum(_part(listing.repo, file).stat().st_size for listing, file in self._wanted if _part(listing.repo, file).exists())
        if missing and missing - parts + _SPARE_BYTES > free:
            needed, there = (f"{amount / 1e9:.1f} GB" for amount in (missing - parts + _SPARE_BYTES, free))
            raise ModelLoadError(
                f"The disk is too full: the model needs {needed} in Hugging Face's cache, {there} are free. Make room, or set HF_HOME."
            )

    def _fetch(self, listing: Listing, file: HubFile) -> None:
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # exported, but not by name

        blob, part = _blob(listing.repo, file), _part(listing.repo, file)
        if blob.exists():
            return
        blob.parent.mkdir(parents=True, exist_ok=True)
        lock = _cache_folder() / ".locks" / _repository_folder(listing.repo).name / f"{file.etag}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not blob.exists():
                self._transfer(listing, file, part)
                self._report(LoadProgress(f"checking {file.name} of {listing.repo}"))
                _verify(file, part, listing.repo)
                part.replace(blob)

    def _transfer(self, listing: Listing, file: HubFile, part: Path) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        self._stage = f"downloading {file.name.rpartition('/')[2]} of {listing.repo}"
        self._reported_at = 0.0  # a new file is always told of
        if part.exists() and part.stat().st_size > file.size:
            part.unlink()
        with part.open("ab") as target:
            there = target.tell()
            self._count(there)
            if there < file.size or not file.size:
                http_get(
                    hf_hub_url(listing.repo, file.name, revision=listing.commit),
                    target,
                    resume_size=there,
                    headers=build_hf_headers(token=listing.token),
                    expected_size=file.size,
                    displayed_filename=file.name,
                    tqdm_class=_counter(self._count),
                )

    def _count(self, size: int) -> None:
        self._fetched += size
        now = time.monotonic()
        if now - self._reported_at >= _REPORT_SECONDS or self._fetched >= self._total:
            self._reported_at = now
            self._report(LoadProgress(self._stage, self._fetched, self._total))


def _counter(count: Callable[[int], None]) -> type[object]:
    """What `http_get` takes for a progress bar: it counts, and writes nothing anywhere."""

    class Counter:
        def __init__(self, **options: object) -> None: ...

        def __enter__(self) -> Counter:
            return self

        def __exit__(self, *error: object) -> None: ...

        def update(self, n: int | float | None = 1) -> None:
            count(int(n or 0))

    return Counter


def _verify(file: HubFile, part: Path, repo: str) -> None:
    """Compare the content with the hub's SHA-256; small files have none, their size must do."""
    digest = hashlib.sha256()
    if _SHA256.fullmatch(file.etag):
        with part.open("rb") as content:
            while block := content.read(1 << 22):
                digest.update(block)
    damaged = part.stat().st_size != file.size if not _SHA256.fullmatch(file.etag) else digest.hexdigest() != file.etag
    if damaged:
        part.unlink()
        raise ModelLoadError(f"{file.name} of {repo} arrived damaged and was thrown away; it will be fetched again.")


def _link(listing: Listing, file: HubFile) -> None:
    """Make the file appear in the snapshot's folder, and the snapshot be `main`."""
    home = _repository_folder(listing.repo)
    pointer = listing.folder / file.name
    pointer.parent.mkdir(parents=True, exist_ok=True)
    if not pointer.exists():
        pointer.unlink(missing_ok=True)  # a link whose file is gone
        pointer.symlink_to(os.path.relpath(_blob(listing.repo, file), pointer.parent))
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(listing.commit, encoding="utf-8")


def _cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _repository_folder(repo: str) -> Path:
    return _cache_folder() / f"models--{repo.replace('/', '--')}"


def _blob(repo: str, file: HubFile) -> Path:
    return _repository_folder(repo) / "blobs" / file.etag


def _part(repo: str, file: HubFile) -> Path:
    return _repository_folder(repo) / "blobs" / f"{file.etag}.incomplete"


@contextlib.contextmanager
def _translated(repo: str, what: str) -> Iterator[None]:
    """Turn the hub's errors, the network's and the disk's into sentences. The one place where they are."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise ModelLoadError(f"MODEL_ID {repo!r} is neither a repository's name (owner/name) nor a folder.", retry=False) from error
    except RepositoryNotFoundError as error:  # gated ones too
        raise RefusedError(_refusal(repo), retry=False) from error
    except HfHubHTTPError as error:
        raise _http_error(repo, what, error.response.status_code) from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise ModelLoadError(
            f"The hub cannot be reached ({type(error).__name__}) to fetch {what} of {repo}: check the network, or HF_ENDPOINT. "
            "What has been fetched is kept."
        ) from error
    except OSError as error:
        raise _disk_error(repo, what, error) from error


def _refusal(repo: str) -> str:
    token = "your token was not accepted for it" if has_token() else "no HF_TOKEN is set"
    return f"{repo} does not exist, is private, or is gated, and {token}. Check MODEL_ID, accept its licence on its page, set HF_TOKEN."


def _http_error(repo: str, what: str, status: int) -> ModelLoadError:
    if status in (401, 403):
        return RefusedError(_refusal(repo), retry=False)
    if status == 404:
        return ModelLoadError(f"{repo} has no {what} on the hub (404). Check MODEL_ID.", retry=False)
    if status == 429:
        return ModelLoadError(
            f"The hub refuses {what} of {repo} for now: too many requests (429). It will be tried again; HF_TOKEN raises the limit."
        )
    return ModelLoadError(f"The hub answered {status} for {what} of {repo}. It will be tried again; what has been fetched is kept.")


def _disk_error(repo: str, what: str, error: OSError) -> ModelLoadError:
    if error.errno in _NO_SPACE:
        return ModelLoadError(
            f"The disk is full: {what} of {repo} could not be written to Hugging Face's cache. Make room, or set HF_HOME."
        )
    reason = error.strerror or type(error).__name__
    advice = "Check that Hugging Face's cache (HF_HOME) may be written."
    return ModelLoadError(f"{what} of {repo} could not be stored or fetched: {reason}. {advice}")


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
