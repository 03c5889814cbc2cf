"""CSM's voice prompts: the model gets the same tokens as from stock mlx-audio, and each recording is encoded once."""

from __future__ import annotations

import logging
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import csm_loading
import mlx.core as mx
import numpy as np
import pytest
import soundfile
import tiny_csm
from mlx_audio.tts.models.sesame import Model, sesame

import csm_prompts
from csm_prompts import TRANSCRIPTS, PromptStore
from errors import InternalError, InvalidAudioError
from voice_presets import CSM_VOICE_KEYS

TEXT = "Good morning."


@pytest.fixture(scope="module")
def cache() -> Path:
    return tiny_csm.build(small_codec=True)


@pytest.fixture(scope="module")
def model(cache: Path) -> Model:
    return csm_loading.load(cache)


@pytest.fixture(scope="module")
def recordings(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint's voice prompts, cut down to one frame: Mimi encodes a second in three on a CPU."""
    folder = tmp_path_factory.mktemp("recordings")
    for path in csm_loading.prompt_folder(cache).glob("*.wav"):
        samples, rate = soundfile.read(path, dtype="int16")
        soundfile.write(folder / path.name, samples[:1920], rate)
    return folder


@pytest.fixture(scope="module")
def warm(recordings: Path, model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that holds the built-in prompt's codes."""
    folder = tmp_path_factory.mktemp("warm")
    store(model, folder, recordings).reading(csm_loading.voice())
    return folder


@pytest.fixture
def encoded(model: Model, warm: Path) -> Iterator[list[int]]:
    """The lengths of the recordings that the library's codec has encoded."""
    original, calls = model._audio_tokenizer.encode, []

    def encode(audio: mx.array) -> mx.array:
        calls.append(audio.shape[-1])
        codes: mx.array = original(audio)
        return codes

    model._audio_tokenizer.encode = encode
    yield calls
    del model._audio_tokenizer.encode


def store(model: Model, folder: Path, prompts: Path) -> PromptStore:
    return PromptStore(model, csm_loading.settings(folder), prompts)


def seen_by_stock(model: Model, prompts: Path, words: str, *, voice_match: bool, speaker: int) -> tuple[mx.array, mx.array]:
    """Return what stock `generate` passes to its network for a new text, up to the first frame."""
    seen: list[tuple[mx.array, mx.array]] = []
    original = model.model.generate_frame

    def generate_frame(tokens: mx.array, mask: mx.array, positions: mx.array, sampler: object) -> mx.array:
        seen.append((tokens[0], mask[0]))
        return mx.zeros((1, 32), mx.int32)

    model.model.generate_frame = generate_frame
    try:
        # mlx-audio's own built-in prompts have the label 0, whatever number the voice has in the text.
        segment = model.prepare_prompt(words, 0 if voice_match else speaker, str(prompts / "conversational_a.wav"), 24_000)
        list(model.generate(TEXT, context=[segment], speaker=speaker, voice_match=voice_match, max_audio_length_ms=160))
    finally:
        model.model.generate_frame = original
    return seen[0]


@pytest.mark.parametrize("voice_match", [True, False])
def test_the_model_reads_the_tokens_that_stock_generate_gives_it(recordings: Path, model: Model, warm: Path, voice_match: bool) -> None:
    prompt_store = store(model, warm, recordings)
    tokens, mask = prompt_store.tokens(csm_loading.voice(voice_match=voice_match, speaker_id=3), TEXT)
    transcript = TRANSCRIPTS["conversational_a"]
    their_tokens, their_mask = seen_by_stock(model, recordings, transcript, voice_match=voice_match, speaker=3)
    assert transcript.startswith("like revising for an exam")
    assert mx.array_equal(tokens, their_tokens)
    assert mx.array_equal(mask, their_mask)


def test_a_recording_is_encoded_once_and_never_again_after_a_restart(
    recordings: Path, model: Model, tmp_path: Path, encoded: list[int]
) -> None:
    first = store(model, tmp_path, recordings)
    tokens, _ = first.tokens(csm_loading.voice(), TEXT)
    assert len(encoded) == 1
    first.tokens(csm_loading.voice(speaker_id=2), "Something else.")
    restarted = store(model, tmp_path, recordings)
    again, _ = restarted.tokens(csm_loading.voice(), TEXT)
    assert len(encoded) == 1
    assert mx.array_equal(tokens, again)


@pytest.mark.parametrize("damage", [b"not codes at all", None])
def test_a_damaged_cache_file_is_made_anew(
    recordings: Path, model: Model, warm: Path, tmp_path: Path, encoded: list[int], damage: bytes | None
) -> None:
    shutil.copytree(warm, tmp_path, dirs_exist_ok=True)
    tokens, _ = store(model, tmp_path, recordings).tokens(csm_loading.voice(), TEXT)
    assert not encoded
    (file,) = (tmp_path / "prompts").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-5] if damage is None else damage)
    again, _ = store(model, tmp_path, recordings).tokens(csm_loading.voice(), TEXT)
    assert len(encoded) == 1
    assert mx.array_equal(tokens, again)
    assert [path.read_bytes() for path in (tmp_path / "prompts").iterdir()] == [whole]


def test_a_cache_that_cannot_be_written_only_costs_time(
    recordings: Path, model: Model, tmp_path: Path, encoded: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "prompts").write_text("a file where the folder should be")
    prompt_store = store(model, tmp_path, recordings)
    with caplog.at_level(logging.WARNING):
        prompt_store.tokens(csm_loading.voice(), TEXT)
    prompt_store.tokens(csm_loading.voice(), TEXT)
    assert len(encoded) == 1
    assert "prompt cache cannot be" in caplog.text
    assert str(tmp_path) not in caplog.text


def test_a_disk_that_fills_up_while_codes_are_written_leaves_no_part_of_them(
    recordings: Path, model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No file may grow beyond 100 bytes, which raises the same kind of error as a full disk, in the same place."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        tokens, _ = store(model, tmp_path, recordings).tokens(csm_loading.voice(), TEXT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(tokens)
    assert "prompt cache cannot be written" in caplog.text
    assert list((tmp_path / "prompts").iterdir()) == []


def test_another_recording_or_another_codec_is_another_entry(
    recordings: Path, model: Model, warm: Path, tmp_path: Path, encoded: list[int]
) -> None:
    prompts = tmp_path / "recordings"
    shutil.copytree(warm, tmp_path, dirs_exist_ok=True)
    shutil.copytree(recordings, prompts)
    prompt_store = store(model, tmp_path, prompts)
    prompt_store.reading(csm_loading.voice())
    samples, rate = soundfile.read(prompts / "conversational_a.wav", dtype="int16")
    soundfile.write(prompts / "conversational_a.wav", samples[: len(samples) // 2] // 2, rate)
    prompt_store.reading(csm_loading.voice())
    assert len(encoded) == 1
    before = model._audio_tokenizer.downsample.conv.conv.conv.weight
    try:
        model._audio_tokenizer.downsample.conv.conv.conv.weight = before * 1.5
        store(model, tmp_path, prompts).reading(csm_loading.voice())
    finally:
        model._audio_tokenizer.downsample.conv.conv.conv.weight = before
    assert len(encoded) == 2
    assert len(list((tmp_path / "prompts").iterdir())) == 3


def test_memory_is_bounded_and_the_least_recently_used_goes(
    recordings: Path, model: Model, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csm_prompts, "_PROMPTS_IN_MEMORY", 2)
    prompts = tmp_path / "recordings"
    shutil.copytree(recordings, prompts)
    (tmp_path / "prompts").write_text("no cache on disk, so that what memory forgot is seen")
    shutil.copy(prompts / "conversational_a.wav", prompts / "conversational_b.wav")
    prompt_store = store(model, tmp_path, prompts)
    a, b = csm_loading.voice(), csm_loading.voice(voice_key="conversational_b")
    for voice in (a, b, a):
        prompt_store.reading(voice)
    assert len(encoded) == 2
    monkeypatch.setattr(csm_prompts, "_PROMPTS_IN_MEMORY", 1)
    prompt_store.reading(a)  # the one used last stays
    assert len(encoded) == 2
    prompt_store.reading(b)
    assert len(encoded) == 3


def test_a_voice_of_ones_own_is_cloned_from_its_recording(recordings: Path, model: Model, tmp_path: Path, encoded: list[int]) -> None:
    time = np.arange(44_100) / 44_100
    stereo = np.stack([0.3 * np.sin(2 * np.pi * 200 * time), 0.2 * np.sin(2 * np.pi * 310 * time)], axis=1)
    soundfile.write(tmp_path / "mine.flac", stereo, 44_100)
    voice = csm_loading.voice(tmp_path, ref_audio="mine.flac", ref_text="Words of mine.", speaker_id=1)
    tokens, mask = store(model, tmp_path, recordings).tokens(voice, TEXT)
    assert encoded == [24_000]
    text = model._text_tokenizer.encode(f"[1]Words of mine. {TEXT}")
    assert tokens[: len(text), -1].tolist() == text
    assert len(tokens) == len(text) + 13  # 12.5 frames a second
    assert mask[len(text) :, :-1].all().item()
    assert not mask[len(text) :, -1].any().item()


@pytest.mark.parametrize("key", CSM_VOICE_KEYS)
def test_the_stored_transcripts_are_those_of_mlx_audio(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    def download(*, repo_id: str, filename: str) -> str:
        if filename.endswith(".txt"):  # neither of CSM's repositories has one
            raise FileNotFoundError(filename)
        return filename

    monkeypatch.setattr(sesame, "hf_hub_download", download)
    transcript_only = SimpleNamespace(prepare_prompt=lambda text, *_: text)
    assert Model.default_speaker_prompt(transcript_only, key) == [TRANSCRIPTS[key]]


def test_a_transcript_beside_a_built_in_prompt_takes_precedence(recordings: Path, model: Model, warm: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "recordings"
    shutil.copytree(recordings, prompts)
    (prompts / "conversational_a.txt").write_text("Quite other words.")
    tokens, _ = store(model, warm, prompts).tokens(csm_loading.voice(), TEXT)
    text = model._text_tokenizer.encode(f"[0]Quite other words. {TEXT}")
    assert tokens[: len(text), -1].tolist() == text


def test_a_missing_recording_is_told_without_its_path(recordings: Path, model: Model, tmp_path: Path) -> None:
    prompt_store = store(model, tmp_path, tmp_path)
    with pytest.raises(InternalError, match="conversational_a is missing"):
        prompt_store.tokens(csm_loading.voice(), TEXT)
    with pytest.raises(InvalidAudioError) as told:
        prompt_store.tokens(csm_loading.voice(tmp_path, ref_audio="gone.wav", ref_text="Hum."), TEXT)
    assert str(tmp_path) not in told.value.message
