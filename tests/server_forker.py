"""A process that has imported the server already and forks one server per request: a start then takes a fraction of a second.

    python tests/server_forker.py [csm]

With `csm` it has also imported what CSM needs, which takes 2 s.

Every server is a real process with its own environment, working directory, log and signals; only Python's imports are shared.
`conftest.start_server` talks to it through its standard input and output: one JSON object a line each way.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NoReturn, TextIO

import as_mac
import huggingface_hub
import tiny_csm

_EXITS = "exit-{pid}"


def main() -> None:
    """Answer requests `{"env", "cwd", "log", "exits", "mac"}` with `{"pid"}` until standard input ends, then end all servers."""
    import server  # noqa: F401

    _load_voice()
    if "csm" in sys.argv[1:]:
        _import_csm()
    gc.freeze()  # a collection in a server must not touch, and so copy, what all of them share

    requests, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    folders: dict[int, Path] = {}

    def reap(*_: object) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            folder = folders.pop(pid, None)
            if folder is not None:
                _write(folder / _EXITS.format(pid=pid), str(os.waitstatus_to_exitcode(status)))

    signal.signal(signal.SIGCHLD, reap)
    _serve(requests, answers, folders)
    for pid in list(folders):
        os.kill(pid, signal.SIGKILL)
    os._exit(0)  # nothing that a library does at exit may keep it alive


def _load_voice() -> None:
    """Load once what each server would: the built-in voice, which has one thread and does not change, and the rules for numbers."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime
    from hibari import g2p

    from hibari_model import HibariModel
    from text_verbalizer import verbalize

    g2p._load_json = cache(g2p._load_json)
    load = onnxruntime.InferenceSession
    loaded: dict[bytes, object] = {}

    def session(model: bytes, options: object, *, providers: list[str]) -> object:
        return loaded[model] if model in loaded else load(model, options, providers=providers)

    def kept(model: bytes, *arguments: object, **more: object) -> object:
        return loaded.setdefault(model, load(model, *arguments, **more))

    onnxruntime.InferenceSession = kept
    voice = HibariModel()
    voice.load(lambda _: None)
    voice.warm_up([])
    onnxruntime.InferenceSession = session
    verbalize("a1b2c3")


def _import_csm() -> None:
    """Import what a load of CSM imports; nothing starts a thread of MLX, which a fork would not have."""
    os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as csm_model sets them
    from transformers import PreTrainedTokenizerFast  # noqa: F401 - what its AutoTokenizer imports late

    import csm_generation  # noqa: F401
    import csm_network  # noqa: F401


def _serve(requests: TextIO, answers: TextIO, folders: dict[int, Path]) -> None:
    for line in requests:
        request = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # its folder is known before it can end
        pid = os.fork()
        if pid == 0:
            _run_server(request)
        folders[pid] = Path(request["exits"])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        answers.write(json.dumps({"pid": pid}) + "\n")
        answers.flush()


def _run_server(request: dict[str, str | dict[str, str] | bool]) -> NoReturn:
    """Become a server, as `python server.py` would be one with this environment."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        log = os.open(str(request["log"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.closerange(3, 256)
        os.environ.clear()
        os.environ.update(request["env"])  # type: ignore[arg-type]
        os.chdir(str(request["cwd"]))
        sys.argv = ["server.py"]
        tempfile.tempdir = None  # TMPDIR may be another one
        if request["mac"]:
            as_mac.pretend()
        if tiny_csm.SMALL_CODEC in os.environ:
            importlib.reload(huggingface_hub.constants)  # they were those of this process's own environment
            tiny_csm.use_small_codec()
        import logging

        from server import main as serve

        status = serve()
        logging.shutdown()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _write(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text)
    unfinished.rename(path)


if __name__ == "__main__":
    main()
