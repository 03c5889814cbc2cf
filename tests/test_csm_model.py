"""CSM as a speech model, on tiny checkpoints: loaded by MODEL_ID with little memory, speaking without a network and without output on stderr."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import csm
import mlx.core as mx
import numpy as np
import pytest
import tiny_csm
import tiny_weights
from csm_loading import settings, voice
from mlx_audio.codec.models.mimi import mimi

import csm_model
from csm_files import find_model
from csm_model import CsmModel
from speech_model import LoadProgress, SpeechOptions

FRAME = 1920  # samples


def test_a_quantized_checkpoint_speaks_by_its_name_without_network_or_progress_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []
    model = CsmModel(settings(tmp_path, model_id=tiny_csm.QUANTIZED, guard="off"))
    with tiny_csm.activated(tiny_csm.build(repo=tiny_csm.QUANTIZED, quantized=True)):
        model.load(lambda _: None)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    speaker = voice(max_audio_length_ms=80)
    model.warm_up([speaker])
    (chunk,) = model.speak(["Hello."], speaker, SpeechOptions(1), lambda: False)
    assert len(chunk.samples) == FRAME
    assert np.abs(chunk.samples).max() > 0.01
    assert model.info()["dtype"] == "8-bit"
    assert asked == []
    assert capfd.readouterr() == ("", "")
    model.close()


def test_the_benchmark_finds_a_model_with_a_small_codec_and_all_codebooks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engines = csm.Engines(tmp_path, small_codec=True)
    csm.short_requests(engines, 2)
    csm.codec_alone(engines, frames=2)
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_a_float32_file_becomes_bfloat16_without_a_second_copy_in_memory() -> None:
    """The peak is measured from the first tensor on, after the codec was read."""
    told: list[LoadProgress] = []

    def report(progress: LoadProgress) -> None:
        if progress.total and not any(earlier.total for earlier in told):
            mx.reset_peak_memory()
        told.append(progress)

    with tiny_csm.activated(tiny_csm.build()):
        files = find_model(tiny_csm.SESAME, lambda _: None)
    network = csm_model.build(files, "bfloat16", "auto", report)
    whole = files.weights[0].stat().st_size
    other = mx.get_active_memory() - sum(value.nbytes for value in csm_model._flat(network).values())  # the codec, above all
    assert csm_model.precision(network) == "bfloat16"
    assert told[-1].done == told[-1].total
    assert whole > 60_000_000
    assert whole / 2 < mx.get_peak_memory() - other < 1.05 * whole


def test_weights_that_overflow_in_float16_are_loaded_again_in_bfloat16(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tiny_csm.build(small_codec=True)
    small = tiny_weights.small_mimi_config()
    monkeypatch.setattr(mimi, "mimi_202407", lambda _: small)
    folder = tmp_path / "model"
    shutil.copytree(tiny_csm.snapshot_of(cache, tiny_csm.SESAME), folder)
    weights: dict[str, mx.array] = mx.load(str(folder / "model.safetensors"))  # type: ignore[assignment]
    weights["text_embeddings.weight"] = weights["text_embeddings.weight"] * 1e6
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "prompts" / "conversational_a.txt").write_text("hm, hm.")  # the real transcript has 500 tokens of the tiny tokenizer
    model = CsmModel(settings(tmp_path, model_id=str(folder), max_batch=1))
    with tiny_csm.activated(cache):
        model.load(lambda _: None)
    assert model.info()["dtype"] == "float16"
    model.warm_up([voice()])
    info = model.info()
    assert info["dtype"] == "bfloat16"
    assert "float16" in info["note"]
    assert info["note"] in caplog.text
    model.close()


def test_memory_is_held_within_the_machines_limit_while_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Mac; this machine has no GPU whose memory could be held."""
    held = [0]
    recommended = mx.get_active_memory() + 1000

    def set_wired_limit(limit: int) -> int:
        held.append(limit)
        return held[-2]

    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": recommended})
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    before = mx.set_cache_limit(12345)
    release = csm_model.reserve_memory()
    assert held == [0, recommended]
    release()
    assert held == [0, recommended, 0]
    assert mx.set_cache_limit(before) == 12345


def test_a_system_that_refuses_to_hold_memory_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def set_wired_limit(_: int) -> int:
        raise ValueError("[metal::set_wired_limit] Setting a wired limit larger than the maximum working set size is not allowed.")

    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 1000})
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    csm_model.reserve_memory()()
    assert "slow" in caplog.text
