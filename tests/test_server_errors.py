"""Every error that a request can cause, with the status, code and message of its answer."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import PROJECT, RunningServer, start_server

GOOD: dict[str, Any] = {"model": "csm-1b", "input": "Hello.", "voice": "heart"}


def refused(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """Check the envelope, and return its message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    expected_type = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    assert error["type"] == expected_type
    assert len(response.headers["x-request-id"]) > 0
    assert str(PROJECT) not in response.text
    assert "Traceback" not in response.text
    return str(error["message"])


def post(server: RunningServer, **fields: Any) -> httpx.Response:
    body = {name: value for name, value in (GOOD | fields).items() if value is not ...}
    return httpx.post(f"{server.url}/v1/audio/speech", json=body, timeout=60)


@pytest.mark.parametrize("text", ["", "   ", "\n\t", ..., None, 5, ["a"]])
def test_input_must_be_a_text(server: RunningServer, text: object) -> None:
    refused(post(server, input=text), 400, "invalid_input", "input")


@pytest.mark.parametrize("text", ["!!! ---", "🎉🎉", "```\n```", "\u200b\u200b"])
def test_input_must_have_something_to_say(server: RunningServer, text: str) -> None:
    refused(post(server, input=text), 400, "invalid_input", "input")


def test_input_may_not_be_too_long(server: RunningServer) -> None:
    message = refused(post(server, input="a" * 4097), 400, "input_too_long", "input")
    assert "4097" in message
    assert "4096" in message


def test_surrounding_space_does_not_count(server: RunningServer) -> None:
    assert post(server, input=" " * 5000 + "Hi." + "\n" * 5000).status_code == 200


def test_an_unknown_voice_is_refused_with_the_list_of_voices(server: RunningServer) -> None:
    message = refused(post(server, voice="unknown_voice"), 400, "invalid_voice", "voice")
    assert "'unknown_voice'" in message
    assert "conversational, conversational_b, emma, fenrir, heart, hibari-fable, kore" in message


@pytest.mark.parametrize("voice", [..., None, 7, {}, {"id": 5}, ["heart"]])
def test_voice_must_be_a_name_or_an_id(server: RunningServer, voice: object) -> None:
    assert "heart" in refused(post(server, voice=voice), 400, "invalid_voice", "voice")


@pytest.mark.parametrize("name", ["ogg", "", 3, "exe; rm -rf /"])
def test_an_unknown_format_is_refused_with_the_list_of_formats(server: RunningServer, name: object) -> None:
    assert "mp3, opus, aac, flac, wav, pcm" in refused(post(server, response_format=name), 400, "invalid_format", "response_format")


@pytest.mark.parametrize("speed", [0.1, 0.2499, 4.01, -1, "fast", 1e400])
def test_speed_has_its_range(server: RunningServer, speed: object) -> None:
    body = json.dumps(GOOD | {"speed": speed})
    response = httpx.post(f"{server.url}/v1/audio/speech", content=body, headers={"Content-Type": "application/json"})
    refused(response, 400, "invalid_speed", "speed")


@pytest.mark.parametrize(("field", "value"), [("seed", -1), ("seed", 2**32), ("top_k", 0), ("temperature", 3), ("stream", "perhaps"), ("stream_format", "x"), ("model", ...), ("model", 4)])  # fmt: skip
def test_other_fields_name_themselves(server: RunningServer, field: str, value: object) -> None:
    assert f"'{field}'" in refused(post(server, **{field: value}), 400, f"invalid_{field}", field)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b'{"input": "a",}', b"\xff\xfe", b"[1, 2]", b'"text"', b"[" * 50_000, b'{"seed": ' + b"9" * 6000 + b"}"],
)
def test_a_body_that_is_no_json_object(server: RunningServer, body: bytes) -> None:
    response = httpx.post(f"{server.url}/v1/audio/speech", content=body, headers={"Content-Type": "application/json"})
    refused(response, 400, "invalid_json")


@pytest.mark.parametrize("sent_as", ["whole", "chunked"])
def test_a_body_over_one_mebibyte(server: RunningServer, sent_as: str) -> None:
    body = json.dumps(GOOD | {"padding": "x" * (1 << 20)}).encode()
    content: Any = body if sent_as == "whole" else iter([body[:1000], body[1000:]])
    response = httpx.post(f"{server.url}/v1/audio/speech", content=content, headers={"Content-Type": "application/json"})
    refused(response, 413, "body_too_large")


def test_paths_and_methods_that_are_not_there(server: RunningServer) -> None:
    assert "/docs" in refused(httpx.get(f"{server.url}/v1/nothing"), 404, "not_found")
    assert "POST" in refused(httpx.get(f"{server.url}/v1/audio/speech"), 405, "method_not_allowed")
    assert "csm-1b, hibari" in refused(httpx.get(f"{server.url}/v1/models/gpt-4"), 404, "model_not_found", "model")


def test_a_model_that_is_not_ready_names_a_voice_that_is(server: RunningServer) -> None:
    response = post(server, voice="conversational")
    assert "Voice 'heart' is ready." in refused(response, 503, "model_not_ready", "voice")
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize(("text", "script"), [("東京へ行きます。", "Chinese"), ("مرحبا", "Arabic")])
def test_a_text_that_the_voice_can_say_only_in_part_is_refused(server: RunningServer, text: str, script: str) -> None:
    assert f"cannot pronounce {script} letters" in refused(post(server, input=text), 400, "invalid_input", "input")


@pytest.mark.parametrize("text", ["Naïve cafés in Zürich cost 5 € and ½.", "The α particle.", "Use x → y, © 2026 ™."])
def test_signs_that_the_voice_has_sounds_for_are_not(server: RunningServer, text: str) -> None:
    assert post(server, input=text).status_code == 200


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1:8880", "[::1]:8880", "mymac", "mymac.local", "host.docker.internal", "a.home.arpa", "b.lan"]
)
def test_local_hosts_are_answered(server: RunningServer, host: str) -> None:
    assert httpx.get(f"{server.url}/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example.com", "localhost.evil.com", "127.0.0.1.nip.io", "evil.com:8880"])
def test_foreign_hosts_are_not(server: RunningServer, host: str) -> None:
    assert "ALLOWED_HOSTS" in refused(httpx.get(f"{server.url}/health", headers={"Host": host}), 421, "host_not_allowed")


def test_a_key_is_needed_once_one_is_set(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(API_KEY="first-key, second-key", ALLOWED_HOSTS="tts.example.com")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/health/ready").status_code == 200
    for key in ("", "Bearer", "Bearer wrong", "Basic first-key", "Bearer first-key, second-key"):
        response = httpx.post(f"{server.url}/v1/audio/speech", json=GOOD, headers={"Authorization": key} if key else {})
        assert "Authorization: Bearer" in refused(response, 401, "invalid_api_key")
    for key in ("first-key", "second-key"):
        headers = {"Authorization": f"Bearer {key}", "Host": "tts.example.com"}
        assert httpx.post(f"{server.url}/v1/audio/speech", json=GOOD, headers=headers).status_code == 200
        assert "models" in httpx.get(f"{server.url}/health", headers=headers).json()
    assert "first-key" not in server.log_text()


def test_any_key_is_accepted_where_none_is_set(server: RunningServer) -> None:
    response = httpx.post(f"{server.url}/v1/audio/speech", json=GOOD, headers={"Authorization": "Bearer sk-real-openai-key"})
    assert response.status_code == 200
    assert "sk-real" not in server.log_text()


def test_cors_is_off_unless_an_origin_is_named(server: RunningServer, make_server: Callable[..., RunningServer]) -> None:
    origin = {"Origin": "https://chat.example.com"}
    assert "access-control-allow-origin" not in httpx.get(f"{server.url}/health", headers=origin).headers
    open_to_one = make_server(CORS_ORIGINS="https://chat.example.com")
    allowed = httpx.get(f"{open_to_one.url}/health", headers=origin).headers
    assert allowed["access-control-allow-origin"] == "https://chat.example.com"
    assert "access-control-allow-credentials" not in allowed
    assert "access-control-allow-origin" not in httpx.get(f"{open_to_one.url}/health", headers={"Origin": "https://evil.com"}).headers


def test_a_voice_that_was_named_is_replaced_only_by_fallback_voice(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(FALLBACK_VOICE="heart")
    response = post(server, voice="conversational")
    assert response.status_code == 200
    assert (response.headers["x-voice"], response.headers["x-fallback-for"]) == ("heart", "conversational")
    assert "voice conversational is not ready; voice heart speaks instead: Model 'csm-1b' is switched off" in server.log_text()


def test_settings_with_unknown_voices_are_reported_and_do_not_change_a_requests_error(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(FALLBACK_VOICE="nobody", DEFAULT_VOICE="noone")
    health = server.health()
    assert health["status"] == "degraded"
    assert [fault.split("=")[0] for fault in health["setting_faults"]] == ["DEFAULT_VOICE", "FALLBACK_VOICE"]
    assert "FALLBACK_VOICE='nobody' is not a voice" in server.log_text()
    refused(post(server, voice="conversational"), 503, "model_not_ready", "voice")


@pytest.mark.parametrize(
    ("name", "value"), [("speed", True), ("temperature", False), ("top_k", True), ("seed", False), ("temperature", 3), ("seed", -1)]
)
def test_numbers_of_the_wrong_type_or_out_of_range_are_refused_with_the_range(server: RunningServer, name: str, value: object) -> None:
    told = refused(post(server, **{name: value}), 400, f"invalid_{name}", name)
    assert f"'{name}'={value} is not valid. Allowed: " in told


def test_the_official_client_does_not_retry_while_a_model_is_disabled(server: RunningServer) -> None:
    response = post(server, voice="conversational")
    assert int(response.headers["retry-after"]) > 60
    assert response.headers["x-should-retry"] == "false"
    before = server.log_text().count("path='/v1/audio/speech' status=503")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as client, pytest.raises(openai.InternalServerError):
        client.audio.speech.create(model="m", voice="conversational", input="Hello.")
    assert server.log_text().count("path='/v1/audio/speech' status=503") == before + 1


def test_refusals_can_be_read_by_an_allowed_page(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(CORS_ORIGINS="https://chat.example.com", API_KEY="k")
    response = httpx.post(f"{server.url}/v1/audio/speech", json=GOOD, headers={"Origin": "https://chat.example.com"})
    refused(response, 401, "invalid_api_key")
    assert response.headers["access-control-allow-origin"] == "https://chat.example.com"


def test_a_query_parameter_is_named(server: RunningServer) -> None:
    refused(httpx.get(f"{server.url}/v1/audio/speech/x/timestamps?format=pdf"), 400, "invalid_format", "format")


def test_bytes_that_are_not_http_are_refused_with_a_request_id(server: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GARBAGE\r\n\r\n")
        answer = connection.recv(4096).decode()
    assert answer.startswith("HTTP/1.1 400 ")
    assert "invalid_http" in answer
    assert "X-Request-Id: " in answer


def test_a_bad_setting_ends_the_start_with_one_line(tmp_path: Path) -> None:
    for name, value, allowed in [("PORT", "99999", "65535"), ("DEFAULT_FORMAT", "ogg", "'mp3'"), ("LOG_LEVEL", "loud", "'debug'"), ("MAX_QUEUE", "many", "integer")]:  # fmt: skip
        server = start_server(tmp_path, **({"PORT": value} if name == "PORT" else {name: value}))
        assert server.process.wait(30) == 2
        line = server.log_text().strip().splitlines()[-1]
        assert f"{name}='{value}'" in line
        assert allowed in line


def test_a_taken_port_ends_the_start_and_says_who_holds_it(make_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    first = make_server()
    second = start_server(tmp_path, PORT=first.port, CACHE_DIR=first.cache_dir)
    assert second.process.wait(30) == 2
    assert f"sesame-tts is already running there (process {first.process.pid})" in second.log_text()
    with socket.create_server(("127.0.0.1", 0)) as other:
        third = start_server(tmp_path, PORT=other.getsockname()[1])
        assert third.process.wait(30) == 2
        assert "in use by another program" in third.log_text()


def test_an_open_server_without_a_key_logs_one_warning(make_server: Callable[..., RunningServer], server: RunningServer) -> None:
    assert make_server(HOST="0.0.0.0").log_text().count("open to the network without a key") == 1
    assert "open to the network" not in server.log_text()
