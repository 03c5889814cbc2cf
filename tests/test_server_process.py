"""The sockets that the server listens on."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import RunningServer, free_port

from config import Settings, SettingsError
from files import file_signature
from server_process import listen, pid_file

try:
    socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    HAS_IPV6 = True
except OSError:
    HAS_IPV6 = False

needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="this machine has no ::1")


@contextlib.contextmanager
def listening(tmp_path: Path, **settings: Any) -> Iterator[list[Any]]:
    """The addresses that `listen` binds."""
    bound = listen(Settings(cache_dir=tmp_path, **settings))
    try:
        yield [each.getsockname()[:2] for each in bound]
    finally:
        for each in bound:
            each.close()


@needs_ipv6
@pytest.mark.parametrize("host", ["localhost", "0.0.0.0"])
def test_ipv4_and_ipv6_loopback_answer_alike(make_server: Callable[..., RunningServer], host: str) -> None:
    server = make_server(HOST=host)
    for address in ("127.0.0.1", "[::1]"):
        assert httpx.get(f"http://{address}:{server.port}/health").json()["status"] == "ok"
    assert f"{'127.0.0.1' if host == 'localhost' else host} and ::1, port" in server.log_text()


@needs_ipv6
@pytest.mark.parametrize(("host", "others"), [("127.0.0.1", []), ("::1", []), ("localhost", ["::1"]), ("0.0.0.0", ["::1"])])
def test_the_addresses_of_each_host(tmp_path: Path, host: str, others: list[str]) -> None:
    first = "127.0.0.1" if host == "localhost" else host
    port = free_port()
    with listening(tmp_path, host=host, port=port) as addresses:
        assert addresses == [(address, port) for address in [first, *others]]


@pytest.mark.parametrize("host", ["localhost", "0.0.0.0"])
def test_a_machine_without_ipv6_listens_on_ipv4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    class Ipv4Only(socket.socket):
        """A kernel without IPv6 refuses such a socket."""

        def __init__(self, family: int = -1, *rest: Any, **more: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(97, "Address family not supported by protocol")
            super().__init__(family, *rest, **more)

    monkeypatch.setattr(socket, "socket", Ipv4Only)
    with listening(tmp_path, host=host, port=0) as addresses:
        assert [family_host for family_host, _ in addresses] == ["127.0.0.1" if host == "localhost" else host]


@needs_ipv6
@pytest.mark.parametrize("host", ["localhost", "0.0.0.0"])
def test_a_program_on_ipv6_loopback_only_is_noticed(tmp_path: Path, host: str) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        port = other.getsockname()[1]
        with pytest.raises(SettingsError, match=f"PORT={port} is in use by another program"), listening(tmp_path, host=host, port=port):
            pass
    with listening(tmp_path, host=host, port=port):
        pass  # the failed attempt left nothing open


def test_a_program_on_127_0_0_1_only_is_noticed_on_a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Xnu(socket.socket):
        """macOS binds 0.0.0.0 although another program has the port on 127.0.0.1. Linux refuses that, so bind an unused address instead."""

        def bind(self, address: Any) -> None:
            super().bind(("127.0.0.9", address[1]) if address[0] == "0.0.0.0" else address)

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(socket, "socket", Xnu)
        with (
            pytest.raises(SettingsError, match=f"PORT={port} is in use by another program"),
            listening(tmp_path, host="0.0.0.0", port=port),
        ):
            pass


@pytest.mark.parametrize(
    "content", [b'{"pid": %d, "port": %d}', b'{"pid": 0, "port": %.0s%d}', b'{"pid": -1, "port": %.0s%d}', b'{"pid": 1%.0s, "port": %d}', b'{"pid": 9e99%.0s, "port": %d}', b'{"pid": ' + b"9" * 5000 + b'%.0s, "port": %d}', b"[" * 900 + b"%.0d%.0d"],
)  # fmt: skip
def test_the_number_in_a_pid_file_proves_no_running_server(tmp_path: Path, content: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (tmp_path / "server.pid").write_bytes(content % (b"%d" % os.getpid() if b"%.0s" in content else os.getpid(), port))
        with pytest.raises(SettingsError, match="by another program"), listening(tmp_path, host="127.0.0.1", port=port):
            pass
    running = f"already running there .process {os.getpid()}"
    with (
        pid_file(tmp_path, port),
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(SettingsError, match=running),
        listening(tmp_path, host="127.0.0.1", port=port),
    ):
        pass


def test_a_file_that_becomes_readable_has_another_signature(tmp_path: Path) -> None:
    file = tmp_path / "preset.json"
    file.write_text("{}")
    file.chmod(0o000)
    before = file_signature(file)
    file.chmod(0o644)
    assert file_signature(file) != before


def test_connections_have_lower_file_numbers_than_listening_sockets(make_server: Callable[..., RunningServer]) -> None:
    server = make_server()
    with server.client() as client:
        client.get("/health")
        sockets = psutil.Process(server.process.pid).net_connections("tcp")
    numbers = {state: [each.fd for each in sockets if each.status == state] for state in ("LISTEN", "ESTABLISHED")}
    assert min(numbers["LISTEN"]) > max(numbers["ESTABLISHED"]), "when it is killed, it accepts nothing more before its connections close"
