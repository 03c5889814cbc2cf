"""A hub on loopback: lists repositories and serves their files over HTTP, or refuses, as Hugging Face's does."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import time
import wave
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import tiny_csm
import tiny_weights

PROJECT = Path(__file__).resolve().parent.parent
COMMIT = "c" * 40
WEIGHT_BYTES = 3_000_000
_LARGE = 100_000  # bytes; from here on a file is named by its SHA-256, as the hub's large ones are


@dataclass
class SmallHub:
    """The hub's content and behaviour.

    Attributes:
        repositories: Folder by repository name; files below it are served.
        list_errors: The status (and X-Error-Code, may be "") with which the list of a repository is refused.
        file_errors: The same for its files.
        bad_token: A token that is refused.
        silent_after: After this many bytes of a file the hub sends no more and keeps the connection open; 0 for every request.
        cut_after: The connection is closed after this many bytes of a file, each time.
        bytes_a_second: How fast each file is sent; None for as fast as possible.
        corrupt: Large files are sent with a wrong last byte.
        requests: The path and the Range header of each request so far.
    """

    repositories: dict[str, Path] = field(default_factory=dict)
    list_errors: dict[str, tuple[int, str]] = field(default_factory=dict)
    file_errors: dict[str, tuple[int, str]] = field(default_factory=dict)
    bad_token: str | None = None
    cut_after: int | None = None
    silent_after: int | None = None
    bytes_a_second: int | None = None
    corrupt: bool = False
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> SmallHub:
        hub = self

        class Handler(_Handler):
            def do_GET(self) -> None:
                self.serve(hub)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fetched(self, name: str) -> int:
        """Return how often a file of that name was requested."""
        return sum(path.endswith(f"/{name}") for path, _ in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None: ...

    def serve(self, hub: SmallHub) -> None:
        path = urlsplit(self.path).path
        listed = re.fullmatch(r"/api/models/([^/]+/[^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        match = listed or file
        if not match:  # requests that huggingface_hub makes by itself, once a day
            self._refuse(404, "")
            return
        hub.requests.append((path, self.headers.get("Range")))
        if hub.silent_after == 0:
            hub.over.wait()
            return
        repo = match[1]
        errors = hub.list_errors if listed else hub.file_errors
        if hub.bad_token and self.headers.get("Authorization") == f"Bearer {hub.bad_token}":
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repo in errors:
            self._refuse(*errors[repo])
        elif repo not in hub.repositories:
            self._refuse(401, "RepoNotFound")
        elif listed:
            self._send(json.dumps(_listing(repo, hub.repositories[repo])).encode())
        elif file and not (hub.repositories[repo] / file[2]).is_file():
            self._refuse(404, "EntryNotFound")
        elif file:
            self._send_file(hub, hub.repositories[repo] / file[2])

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        self.send_response(status)
        for name, value in (("X-Error-Code", code), ("X-Error-Message", message)):
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_file(self, hub: SmallHub, path: Path) -> None:
        content = path.read_bytes()
        if hub.corrupt and len(content) >= _LARGE:
            content = content[:-1] + bytes([content[-1] ^ 1])
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if hub.silent_after is None:
            self._send(content, begin, hub.cut_after, pace=hub.bytes_a_second)
        else:
            self._send(content, begin, hub.silent_after, silent=hub.over)

    def _send(
        self,
        content: bytes,
        begin: int = 0,
        cut_after: int | None = None,
        silent: threading.Event | None = None,
        pace: int | None = None,
    ) -> None:
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        body = content[begin:]
        if cut_after is not None and len(body) > cut_after:
            self.wfile.write(body[:cut_after])
            self.close_connection = True
            if silent:
                silent.wait()
        elif pace is None:
            self.wfile.write(body)
        else:
            for start in range(0, len(body), pace // 10):
                self.wfile.write(body[start : start + pace // 10])
                time.sleep(0.1)


def _listing(repo: str, folder: Path) -> dict[str, Any]:
    siblings = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        entry: dict[str, Any] = {"rfilename": path.relative_to(folder).as_posix(), "size": len(content)}
        entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324 - git's id
        if len(content) >= _LARGE:
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        siblings.append(entry)
    return {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}


def write_presets(folder: Path, name: str, frames: int) -> Path:
    """Write the presets `heart` and `name`; return the folder `folder`/presets.

    `name` is a voice of CSM that speaks `frames` at most. Its recording has two words: those of CSM's own repository have transcripts of
    500 tokens of the tiny tokenizer, and each load of the model reads them nine times.
    """
    presets = folder / "presets"
    presets.mkdir()
    shutil.copy(PROJECT / "presets" / "heart.json", presets)
    hum = 0.2 * np.sin(np.arange(1.2 * tiny_csm.SAMPLE_RATE) / 20)
    with wave.open(str(presets / "hum.wav"), "wb") as file:
        file.setparams((1, 2, tiny_csm.SAMPLE_RATE, 0, "NONE", "not compressed"))
        file.writeframes((hum * 32767).astype("<i2").tobytes())
    preset = {"name": name, "ref_audio": "hum.wav", "ref_text": "hm, hm.", "max_audio_length_ms": frames * 80}
    (presets / f"{name}.json").write_text(json.dumps(preset))
    return presets


def write_small_repositories(root: Path) -> dict[str, Path]:
    """Write the repositories that CSM needs, small, for tests that stop before the weights are read; return their folders by name."""
    tensor = {"weight": np.zeros(WEIGHT_BYTES // 4, np.float32)}
    for repo in (tiny_csm.SESAME, tiny_csm.MLX_COMMUNITY):
        folder = root / repo
        (folder / "prompts").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(tiny_weights.config()))
        tiny_csm._save(folder / "model.safetensors", tensor, "float32")
        tiny_csm._write_extra_files(folder)
        for name in ("conversational_a", "conversational_b", "read_speech_a"):
            (folder / "prompts" / f"{name}.wav").write_bytes(name.encode())
    (root / tiny_csm.MIMI).mkdir(parents=True)
    tiny_csm._save(root / tiny_csm.MIMI / tiny_csm.MIMI_FILE, tensor, "float32")
    (root / tiny_csm.TOKENIZER).mkdir(parents=True)
    tiny_csm._write_tokenizer(root / tiny_csm.TOKENIZER)
    return {repo: root / repo for repo in (tiny_csm.SESAME, tiny_csm.MLX_COMMUNITY, tiny_csm.MIMI, tiny_csm.TOKENIZER)}
