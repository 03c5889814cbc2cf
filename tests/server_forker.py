"""A process that has imported our programs already and forks one per request: a start then takes a fraction of a second.

    python tests/server_forker.py SOCKET [csm]

With `csm` it has also imported what CSM needs, which takes 2 s.

Every program is a real process with its own environment, working directory, descriptors and signals; only Python's imports and the
built-in voice are shared. `forking.ServerForker` and `forked_program.py` talk to it: SOCKET is the descriptor of a socket that listens.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import importlib
import io
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, cast

import as_mac
import supervisor
import tiny_csm

_STREAMS = 3
_MOST_DESCRIPTORS = 300  # of this process and a program when it starts
_WITH_CSM = ("say.py", "server.py", "start.py")


def main() -> None:
    """Serve connections until the last one is closed.

    A request is a line `{"command", "env", "cwd", "mac"}`, optionally with `"descriptors"` and `"mounts_of"`, and four descriptors: standard
    input, output and error of the program, and a pipe for its exit status. The answer is its PID. A connection begins with a greeting of
    one byte. When the client sends no more, its programs are ended and the connection is closed.
    """
    import say_backends  # noqa: F401
    import say_output  # noqa: F401
    import server  # noqa: F401

    _load_voice()
    if "csm" in sys.argv[2:]:
        _import_csm()
    gc.freeze()  # a collection in a program must not touch, and so copy, what all of them share

    exits: dict[int, int] = {}

    def reap(*_: object) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            with os.fdopen(exits.pop(pid), "w") as pipe:
                pipe.write(str(os.waitstatus_to_exitcode(status)))

    signal.signal(signal.SIGCHLD, reap)
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        _serve(listener, exits)
    os._exit(0)  # nothing that a library does at exit may keep it alive


def _serve(listener: socket.socket, exits: dict[int, int]) -> None:
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    started: dict[socket.socket, set[int]] = {}
    while True:
        for key, _ in selector.select():
            client = cast(socket.socket, key.fileobj)
            if client is listener:
                client, _ = listener.accept()
                client.sendall(b"!")  # the greeting
                started[client] = set()
                selector.register(client, selectors.EVENT_READ)
            elif pid := _answer(client, exits):
                for pids in started.values():
                    pids.discard(pid)  # of an earlier program
                started[client].add(pid)
            else:
                selector.unregister(client)
                _end(started.pop(client), exits)
                client.close()
                if not started:
                    return


def _end(pids: set[int], exits: dict[int, int]) -> None:
    """Kill the programs that still run, and wait for their ends."""
    for pid in pids:
        if pid in exits:
            os.kill(pid, signal.SIGKILL)
    while any(pid in exits for pid in pids):
        time.sleep(0.01)


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


def _show_no_progress() -> None:
    """Set what csm_model sets before it imports MLX."""
    os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def _import_csm() -> None:
    """Import what a load of CSM imports; nothing starts a thread of MLX, which a fork would not have."""
    _show_no_progress()
    from transformers import PreTrainedTokenizerFast  # noqa: F401 - what its AutoTokenizer imports late

    import csm_generation  # noqa: F401


def _answer(client: socket.socket, exits: dict[int, int]) -> int | None:
    """Fork the program of the client's next request; return its PID, or None if there is none."""
    line, descriptors, _, _ = socket.recv_fds(client, 1 << 20, _STREAMS + 1)
    while line and not line.endswith(b"\n"):
        line += client.recv(1 << 20)
    if not line:
        return None
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # its pipe is known before it can end
    pid = os.fork()
    if pid == 0:
        _run(json.loads(line), descriptors[:_STREAMS])
    *streams, exits[pid] = descriptors
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    for descriptor in streams:
        os.close(descriptor)
    client.sendall(f"{pid}\n".encode())
    return pid


def _run(request: dict[str, Any], streams: list[int]) -> NoReturn:
    """Become a program, as Python would run it with this environment."""

    def run() -> int:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        _take_streams(streams)
        if request.get("mounts_of") is not None:
            _enter_namespaces(request["mounts_of"])
        os.chdir(request["cwd"])
        if request.get("descriptors") is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (request["descriptors"], request["descriptors"]))
        if request["mac"]:
            as_mac.pretend()
        return _program(request["command"], request["env"])

    _end_with(run)


def _enter_namespaces(pid: int) -> None:
    """See the users and mounts of another process."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("user", "mnt"):
        with Path(f"/proc/{pid}/ns/{kind}").open() as namespace:
            if libc.setns(namespace.fileno(), 0) != 0:
                raise OSError(ctypes.get_errno(), f"setns {kind}")


def _end_with(run: Callable[[], int]) -> NoReturn:
    """End this process as Python would after this program."""
    status = 1
    try:
        status = run()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def _program(command: list[str], environment: dict[str, str]) -> int:
    """Run a program with this environment to its end and return its exit status."""
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    tempfile.tempdir = None  # TMPDIR may be another one
    time.tzset()
    name = Path(command[0]).name
    if tiny_csm.SMALL_CODEC in os.environ and name in _WITH_CSM:
        if constants := sys.modules.get("huggingface_hub.constants"):
            importlib.reload(constants)  # they were those of this process's own environment
        _show_no_progress()
        tiny_csm.use_small_codec()
    if name in _PROGRAMS:
        return _PROGRAMS[name]()
    runpy.run_path(command[0], run_name="__main__")
    return 0


def _take_streams(streams: list[int]) -> None:
    """Make them descriptors 0 to 2, and Python's own three files; close all others."""
    copies = [fcntl.fcntl(stream, fcntl.F_DUPFD, 256) for stream in streams]
    for number, copy in enumerate(copies):
        os.dup2(copy, number)
    os.closerange(_STREAMS, _MOST_DESCRIPTORS)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)  # as with PYTHONUNBUFFERED
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), errors="backslashreplace", write_through=True)


def _say() -> int:
    """End as the end of say.py does."""
    import say

    return say._flushed(say.main())


def _serve_speech() -> int:
    import logging

    from server import main as serve

    status = serve()
    logging.shutdown()
    return status


def _supervise() -> int:
    small = {name: value for name, value in os.environ.items() if name == tiny_csm.SMALL_CODEC}

    def become(arguments: list[str], environment: dict[str, str]) -> NoReturn:
        """Take the place of the job's program: `arguments` are those of an interpreter."""
        os.closerange(_STREAMS, _MOST_DESCRIPTORS)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # without those of the supervisor
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python does when it starts
        gc.enable()  # subprocess has disabled it
        _end_with(lambda: _program(arguments[1:], environment | small))

    supervisor.main(become)
    return 0


_PROGRAMS: dict[str, Callable[[], int]] = {"say.py": _say, "server.py": _serve_speech, "supervisor.py": _supervise}


if __name__ == "__main__":
    main()
