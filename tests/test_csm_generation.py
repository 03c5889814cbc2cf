"""CSM's generation loop on tiny checkpoints: equal to stock mlx-audio, equal in batches, checked, streamed, cancelled."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import csm_loading
import mlx.core as mx
import numpy as np
import pytest
import tiny_csm
from hibari import Hibari
from mlx_audio.codec.models.mimi.modules.conv import Conv1d, ConvTranspose1d
from mlx_audio.lm.sample_utils import make_sampler
from mlx_audio.tts.models.sesame import Model
from numpy.typing import NDArray
from tiny_csm import AT_ONCE, NEVER, NOT_A_NUMBER, SILENCE, ends_after

from csm_decoding import (
    BATCH_POSITIONS,
    CONTEXT,
    CodecDecoder,
    FrameBatch,
    PrefixCache,
    RowSampler,
    attempt_seed,
    block_length,
    memory_errors,
    use_numpy_convolutions,
)
from csm_generation import SAMPLE_SEED
from csm_layers import draw, uniform_numbers
from csm_prompts import PromptStore
from csm_quality import Pace
from errors import InputTooLongError, InsufficientMemoryError, InternalError
from speech_model import SegmentChunk, SpeechOptions

TEXTS = ["Hello there.", "A rather different and longer text, you see.", "Third.", "And a fourth one, of middling length."]
EIGHT = [*TEXTS, "Five", "Six, at last.", "The seventh is the longest of them all, by far, by far.", "8"]
# By the first capital of the text: how a segment goes. The prompts' own words contain none of these letters.
SCRIPT = {
    "": [ends_after(1)],
    "L": [ends_after(3)],
    "A": [AT_ONCE],
    "N": [NEVER],
    "S": [SILENCE],
    "X": ["n~"],
    "Y": [NOT_A_NUMBER],
    "B": [AT_ONCE, ends_after(1)],
    "P": ["s_____s_."],
}
# Faults of which the best attempt is played, and a choice between two beginnings.
FAULTY = {
    "": [ends_after(1)],
    "U": ["s______sss~"],
    "T": ["s____" + "t" * 24 + "_."],
    "D": ["s" + "_" * 30 + "s_."],
    "G": [ends_after(1), ends_after(2)],
}
FRAME = 1920

Frame = NDArray[np.int32]


@pytest.fixture(scope="module")
def scripted() -> Model:
    """Ends, or fails, as the text's first capital says."""
    return csm_loading.load(tiny_csm.build(script=SCRIPT, small_codec=True))


@pytest.fixture(scope="module")
def faulty() -> Model:
    return csm_loading.load(tiny_csm.build(script=FAULTY, small_codec=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache folder for all, so that the prompt is encoded once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def frames_computed(model: Model) -> Iterator[list[int]]:
    """The batch size of each frame that was computed."""
    original, sizes = model.model.draw_frame, []

    def draw_frame(hidden: mx.array, *rest: object) -> object:
        sizes.append(len(hidden))
        return original(hidden, *rest)

    model.model.draw_frame = draw_frame
    yield sizes
    model.model.draw_frame = original


def say(
    model: Model,
    recordings: Path,
    folder: Path,
    segments: Sequence[str],
    ms: int = 160,
    streamed: bool = False,
    seed: int = 3,
    **values: Any,
) -> list[SegmentChunk]:
    speaker = csm_loading.speaker(model, recordings, folder, **values)
    options = SpeechOptions(seed, streamed=streamed)
    return list(speaker.speak(segments, csm_loading.voice(max_audio_length_ms=ms), options, lambda: False))


class Taken(Sequence[str]):
    """Texts that note which of them were asked for."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self.places: list[int] = []

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        self.places.append(index)
        return self._texts[index]


@pytest.mark.parametrize("streamed", [True, False])
def test_texts_are_taken_when_their_batch_begins(model: Model, recordings: Path, folder: Path, streamed: bool) -> None:
    speaker = csm_loading.speaker(model, recordings, folder, guard="off", max_batch=2)
    texts = Taken([" ", "A.", "B.", " ", "C.", "D.", "E.", " "])
    voice = csm_loading.voice(max_audio_length_ms=80)
    chunks = speaker.speak(texts, voice, SpeechOptions(3, streamed=streamed), lambda: False)
    assert next(chunks).segment == 0
    assert max(texts.places) == (1 if streamed else 2)
    order = [chunk.segment for chunk in chunks if chunk.last]
    assert order == list(range(1, 8))


def frames_of(
    model: Model, prompts: PromptStore, texts: Sequence[str], seeds: Sequence[int], temperature: float, count: int
) -> list[Frame]:
    """`count` frames of each text, side by side: shape (frames, codebooks) each."""
    rows = [prompts.tokens(csm_loading.voice(), text) for text in texts]
    batch = FrameBatch(model.model, rows, RowSampler(seeds, temperature, 50))
    return list(np.stack([batch.step(more=left > 0) for left in reversed(range(count))], axis=1))


def stock(model: Model, recordings: Path, prompts: PromptStore, text: str, temperature: float, seed: int, ms: int) -> NDArray[np.float32]:
    """Return the samples of mlx-audio's own `generate` on a fresh codec."""
    path = recordings / "conversational_a.wav"
    segment = model.prepare_prompt(prompts._transcript("conversational_a"), 0, str(path), 24_000)
    model._streaming_decoder.reset()
    mx.random.seed(seed)
    sampler = make_sampler(temp=temperature, top_k=50)
    (result,) = model.generate(text, context=[segment], sampler=sampler, max_audio_length_ms=ms)
    return np.array(result.audio)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_one_segment_is_what_stock_generate_says_with_the_same_seed(
    recordings: Path, model: Model, untouched: Model, folder: Path, temperature: float
) -> None:
    speaker = csm_loading.speaker(model, recordings, folder, guard="off")
    voice = csm_loading.voice(max_audio_length_ms=160, temperature=temperature)
    (chunk,) = speaker.speak([TEXTS[0]], voice, SpeechOptions(11), lambda: False)
    theirs = stock(untouched, recordings, speaker._prompts, TEXTS[0], temperature, 11, 160)
    assert chunk.samples.shape == theirs.shape == (2 * FRAME,)
    np.testing.assert_allclose(chunk.samples, theirs, atol=1e-5)


@pytest.mark.parametrize(("texts", "temperature"), [(EIGHT, 0.0), (TEXTS, 0.9)])
def test_each_row_of_a_batch_is_what_that_text_gives_alone(
    recordings: Path, model: Model, folder: Path, texts: list[str], temperature: float
) -> None:
    prompts = csm_loading.speaker(model, recordings, folder)._prompts
    seeds = [attempt_seed(11, segment, 0) for segment in range(len(texts))]
    together = frames_of(model, prompts, texts, seeds, temperature, 3)
    assert len({row.tobytes() for row in together}) > len(texts) / 2  # the text makes a difference
    for text, seed, row in zip(texts, seeds, together, strict=True):
        np.testing.assert_array_equal(row, frames_of(model, prompts, [text], [seed], temperature, 3)[0])


def test_rows_that_leave_a_batch_change_nothing_for_the_others(recordings: Path, model: Model, folder: Path) -> None:
    prompts = csm_loading.speaker(model, recordings, folder)._prompts
    rows = [prompts.tokens(csm_loading.voice(), text) for text in TEXTS]
    batch = FrameBatch(model.model, rows, RowSampler([1, 2, 3, 4], 0.9, 50))
    frames = [batch.step(more=True) for _ in range(3)]
    batch.keep([1, 3])
    later = [batch.step(more=left > 0) for left in reversed(range(4))]
    for place, row in enumerate((1, 3)):
        alone = frames_of(model, prompts, [TEXTS[row]], [row + 1], 0.9, 7)[0]
        np.testing.assert_array_equal([frame[row] for frame in frames] + [frame[place] for frame in later], alone)


def test_a_long_prompt_read_in_pieces_gives_the_same_frames(recordings: Path, model: Model, folder: Path) -> None:
    prompts = csm_loading.speaker(model, recordings, folder)._prompts
    texts = [TEXTS[1] * 14, TEXTS[0]]  # two rows of over 512 positions: more than one piece
    assert len(prompts.tokens(csm_loading.voice(), texts[0])[0]) > 512
    together = frames_of(model, prompts, texts, [1, 2], 0.0, 4)
    np.testing.assert_array_equal(together[0], frames_of(model, prompts, texts[:1], [1], 0.0, 4)[0])


def test_the_sampler_draws_with_each_rows_own_stream() -> None:
    logits = mx.random.normal((40, 3, 2051), key=mx.random.key(1)) * 3
    rows, alone = RowSampler([5, 6, 7], 0.8, 50), make_sampler(temp=0.8, top_k=50)
    uniform, _ = uniform_numbers(rows.keys, len(logits))
    drawn = np.array([draw(step, numbers, rows.scale, rows.top_k).tolist() for step, numbers in zip(logits, uniform, strict=True)])
    for row, seed in enumerate((5, 6, 7)):
        mx.random.seed(seed)
        assert drawn[:, row].tolist() == [alone(step[row : row + 1]).item() for step in logits]


def test_the_seed_is_the_utterances_own_for_the_first_attempt_only() -> None:
    assert attempt_seed(5, 0, 0) == 5
    assert len({attempt_seed(5, segment, attempt) for segment in range(9) for attempt in range(3)}) == 27
    assert attempt_seed(-1, 0, 0) == 2**64 - 1
    RowSampler([attempt_seed(-1, 0, 0), attempt_seed(2**70, 3, 2)], 0.9, 50)


def test_the_same_seed_gives_the_same_samples_at_every_request_and_leaves_the_codec_clean(
    recordings: Path, model: Model, folder: Path
) -> None:
    said = []
    for _ in range(3):
        said.append(say(model, recordings, folder, TEXTS[:1], ms=80, guard="off")[0].samples)
        assert {layer.offset for layer in model._audio_tokenizer.decoder_cache} == {0}
        mx.eval(mx.random.uniform())  # somebody else draws meanwhile
    np.testing.assert_array_equal(said[0], said[1])
    np.testing.assert_array_equal(said[0], said[2])
    assert not np.array_equal(said[0], say(model, recordings, folder, TEXTS[:1], ms=80, guard="off", seed=4)[0].samples)


def test_segments_come_in_the_texts_order_though_rows_end_when_they_end(scripted: Model, recordings: Path, folder: Path) -> None:
    chunks = say(scripted, recordings, folder, ["L.", "one.", "  ", "two."], ms=800)
    assert [(chunk.segment, len(chunk.samples) // FRAME, chunk.last, chunk.retries) for chunk in chunks] == [
        (0, 4, True, 0),
        (1, 2, True, 0),
        (2, 0, True, 0),
        (3, 2, True, 0),
    ]
    assert {chunk.samples.dtype for chunk in chunks} == {np.dtype(np.float32)}


def test_streaming_begins_with_a_small_chunk_and_holds_the_same_samples(scripted: Model, recordings: Path, folder: Path) -> None:
    complete = say(scripted, recordings, folder, ["L.", "one."], ms=800)
    streamed = say(scripted, recordings, folder, ["L.", "one."], ms=800, streamed=True)
    assert [(chunk.segment, len(chunk.samples) // FRAME, chunk.last) for chunk in streamed] == [
        (0, 2, False),
        (0, 2, False),
        (0, 0, True),
        (1, 2, True),
    ]
    np.testing.assert_array_equal(np.concatenate([chunk.samples for chunk in streamed[:3]]), complete[0].samples)
    np.testing.assert_array_equal(streamed[3].samples, complete[1].samples)


def test_a_streamed_answer_begins_with_its_first_segment_alone_and_has_the_others_side_by_side(
    recordings: Path, model: Model, folder: Path, frames_computed: list[int]
) -> None:
    say(model, recordings, folder, TEXTS, ms=80, guard="off", streamed=True)
    assert frames_computed == [1, 3]
    frames_computed.clear()
    say(model, recordings, folder, TEXTS, ms=80, guard="off")
    assert frames_computed == [4]


def test_blocks_grow_slowly_enough_for_a_model_at_three_quarters_of_real_time() -> None:
    blocks = [block_length(0)]
    while sum(blocks) < 400:
        blocks.append(block_length(sum(blocks)))
        assert 0.75 * (sum(blocks) - blocks[0]) <= sum(blocks[:-1])
    assert blocks[0] == 2
    assert max(blocks) == 32


def test_full_size_blocks_give_the_samples_that_stock_gives_frame_by_frame() -> None:
    tokens = np.random.default_rng(0).integers(1, 500, (3, 32), np.int32)
    model = csm_loading.load(tiny_csm.build())
    single = np.array(model._streaming_decoder.decode_frames(mx.array(tokens.T)[None])).reshape(-1)  # not yet changed by our code
    decoder = CodecDecoder(model)
    decoder.begin()
    blocks = np.concatenate([*(decoder.push(frame) for frame in tokens), decoder.finish()])
    assert np.abs(single).max() > 0.05
    np.testing.assert_allclose(blocks, single, atol=1e-5)


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="MLX computes on a GPU here")
def test_on_a_cpu_the_decoders_convolutions_are_numpys(model: Model, untouched: Model) -> None:
    use_numpy_convolutions(model._audio_tokenizer)
    random = np.random.default_rng(1)
    pairs = zip(model._audio_tokenizer.decoder.modules(), untouched._audio_tokenizer.decoder.modules(), strict=True)
    convolutions = [(ours, theirs) for ours, theirs in pairs if isinstance(theirs, Conv1d | ConvTranspose1d)]
    assert len(convolutions) == 2 + 4 * 3  # the first and the last, and four layers of one that widens and two that do not
    for ours, theirs in convolutions:
        assert type(ours) is not type(theirs)
        channels = theirs.weight.shape[2]
        sound = mx.array(random.standard_normal((2, channels, 9)), mx.float32)  # two rows, as in a batch
        wanted = np.array(theirs(sound))
        np.testing.assert_allclose(np.array(ours(sound)), wanted, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("streamed", [False, True])
def test_cancellation_takes_effect_within_one_frame(
    recordings: Path, model: Model, folder: Path, frames_computed: list[int], streamed: bool
) -> None:
    speaker = csm_loading.speaker(model, recordings, folder, guard="off")
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 4

    voice = csm_loading.voice(max_audio_length_ms=2000)
    chunks = list(speaker.speak(TEXTS[:2], voice, SpeechOptions(1, streamed=streamed), cancelled))
    assert not any(chunk.last for chunk in chunks)
    assert len(frames_computed) <= 5


def test_closing_the_iterator_ends_it(recordings: Path, model: Model, folder: Path, frames_computed: list[int]) -> None:
    speaker = csm_loading.speaker(model, recordings, folder, guard="off")
    stream = speaker.speak(TEXTS[:1], csm_loading.voice(max_audio_length_ms=4000), SpeechOptions(1, streamed=True), lambda: False)
    assert len(next(stream).samples) == 2 * FRAME
    stream.close()  # type: ignore[attr-defined]  # it is a generator
    assert len(frames_computed) == 2  # its block is decoded before the third is started


def test_an_empty_text_is_no_work(recordings: Path, model: Model, folder: Path, frames_computed: list[int]) -> None:
    chunks = say(model, recordings, folder, ["", " \n"], streamed=True)
    assert [(chunk.segment, len(chunk.samples), chunk.last) for chunk in chunks] == [(0, 0, True), (1, 0, True)]
    assert not frames_computed


def test_a_batch_holds_no_more_than_it_may(recordings: Path, model: Model, folder: Path, frames_computed: list[int]) -> None:
    say(model, recordings, folder, ["a", "b", "c"], ms=80, guard="off", max_batch=2)
    assert frames_computed == [2, 1]


def test_batches_stay_within_the_context(recordings: Path, model: Model, folder: Path, frames_computed: list[int]) -> None:
    speaker = csm_loading.speaker(model, recordings, folder, guard="off", max_batch=32)
    voice = csm_loading.voice(max_audio_length_ms=90_000)
    segment = speaker._segment(0, "Hi.", voice, Pace(), SpeechOptions(1))
    positions = len(segment.prompt[0]) + segment.budget
    assert len(speaker._next_batch([segment] * 32)) == BATCH_POSITIONS // positions < 32
    long = "word " * 280
    assert not speaker.fits(long, voice)
    assert speaker.fits("Hi.", voice)
    with pytest.raises(InputTooLongError):
        list(speaker.speak(["word " * 500], voice, SpeechOptions(1), lambda: False))
    tight = speaker._segment(0, long, voice, Pace(), SpeechOptions(1))
    assert len(tight.prompt[0]) + tight.budget == CONTEXT


def test_a_segment_that_never_ends_is_said_again_and_then_used_as_it_is(
    scripted: Model, recordings: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        (chunk,) = say(scripted, recordings, folder, ["Never."], ms=80, max_retries=1)
    assert chunk.retries == 1
    assert len(chunk.samples) == FRAME
    assert caplog.text.count("unended") == 2
    assert "Never" not in caplog.text
    (chunk,) = say(scripted, recordings, folder, ["Never."], ms=80, guard="off")
    assert chunk.retries == 0


@pytest.mark.parametrize("streamed", [False, True])
def test_a_retry_with_another_seed_succeeds_and_is_counted(scripted: Model, recordings: Path, folder: Path, streamed: bool) -> None:
    for seed in range(25, 65):  # one in six ends at once
        chunks = say(scripted, recordings, folder, ["B."], seed=seed, max_retries=10, streamed=streamed)
        assert sum(len(chunk.samples) for chunk in chunks) == 2 * FRAME
        if chunks[-1].retries:
            break
    assert chunks[-1].retries > 0


@pytest.mark.parametrize(
    ("text", "ms", "retries", "fault", "least", "most"),
    [
        ("U.", 800, 1, "unended", 1.5, 4),  # back to its pause
        ("T.", 2800, 0, "stuck", 2, 7),  # without the tone
        ("D.", 2800, 0, "dead", 3, 8),  # two frames and what is left of the pause
        ("One word after another, and on, and on, and on it went.", 800, 1, "too short", 2, 2),
    ],
)
def test_the_best_of_faulty_attempts_is_played_without_what_is_wrong_with_it(
    faulty: Model,
    recordings: Path,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    text: str,
    ms: int,
    retries: int,
    fault: str,
    least: float,
    most: float,
) -> None:
    with caplog.at_level(logging.WARNING):
        (chunk,) = say(faulty, recordings, folder, [text], ms=ms, max_retries=retries, max_pause_ms=200)
    assert chunk.retries == retries
    assert caplog.text.count(fault) == 1 + retries
    assert least <= len(chunk.samples) / FRAME <= most
    assert np.abs(chunk.samples).max() > 0.01


def test_with_verify_auto_doubtful_segments_and_one_in_ten_others_are_transcribed(scripted: Model, recordings: Path, folder: Path) -> None:
    speaker = csm_loading.speaker(scripted, recordings, folder, verify="auto", max_retries=0)

    def heard(text: str, seed: int) -> bool:
        (chunk,) = speaker.speak([text], csm_loading.voice(max_audio_length_ms=800), SpeechOptions(seed), lambda: False)
        return chunk.word_error_rate is not None

    usual = "Let it go."  # as long as the noise that stands for it
    sampled = next(seed for seed in range(100) if attempt_seed(seed, 0, SAMPLE_SEED) % 10 == 0)
    assert heard(usual, sampled)
    assert not heard(usual, sampled + 1)
    assert heard("Let me tell you about the long day that we had.", sampled + 1)


def test_words_have_the_times_that_a_recogniser_hears_where_they_are_wanted(scripted: Model, recordings: Path, folder: Path) -> None:
    """The tiny checkpoint makes noise, so the samples are a real reading."""
    text = "  The rain has stopped, and the harbour is quiet again."
    samples = np.asarray(Hibari()(text, seed=1), np.float32)
    speaker = csm_loading.speaker(scripted, recordings, folder, verify="auto")
    for wanted in (False, True):
        segment = speaker._segment(0, text, csm_loading.voice(), Pace(), SpeechOptions(1, word_times=wanted))
        words = speaker._word_times(segment, samples)
        assert [text[word.start_char : word.end_char] for word in words] == (text.strip(" .").replace(",", "").split() if wanted else [])
    assert 0 <= words[0].start < words[-1].end <= len(samples) / 24_000
    for streamed in (False, True):  # noise has no words
        options = SpeechOptions(1, streamed=streamed, word_times=True)
        chunks = list(speaker.speak(["Let it go."], csm_loading.voice(max_audio_length_ms=400), options, lambda: False))
        assert chunks[-1].last
        assert chunks[-1].words == ()


def test_the_faults_of_all_attempts_are_counted_by_kind(scripted: Model, recordings: Path, folder: Path) -> None:
    faults: Counter[str] = Counter()
    speaker = csm_loading.speaker(scripted, recordings, folder, max_retries=1, faults=faults)
    list(speaker.speak(["Never.", "Let it go."], csm_loading.voice(max_audio_length_ms=400), SpeechOptions(3), lambda: False))
    assert faults == {"unended": 2}


def test_the_presets_sampler_is_used_and_the_requests_goes_before_it(faulty: Model, recordings: Path, folder: Path) -> None:
    speaker = csm_loading.speaker(faulty, recordings, folder)

    def lengths(options: SpeechOptions, **preset: Any) -> set[int]:
        chunks = speaker.speak(["G."] * 4, csm_loading.voice(**preset), options, lambda: False)
        return {len(chunk.samples) // FRAME for chunk in chunks}

    assert lengths(SpeechOptions(4), temperature=0) == {2}
    assert lengths(SpeechOptions(4, temperature=2.0), temperature=0) == {2, 3}
    assert lengths(SpeechOptions(4), temperature=2.0, top_k=1) == {2}
    assert lengths(SpeechOptions(4, top_k=9), temperature=2.0, top_k=1) == {2, 3}


@pytest.mark.parametrize(("text", "attempts"), [("A.", 3), ("S.", 1), ("X.", 1)])
@pytest.mark.parametrize("streamed", [False, True])
def test_nothing_silence_and_not_a_number_are_never_played(
    scripted: Model, recordings: Path, folder: Path, text: str, attempts: int, streamed: bool
) -> None:
    with pytest.raises(InternalError, match=rf"segment 1 .* {attempts} attempt"):
        say(scripted, recordings, folder, [text], ms=80, streamed=streamed, max_retries=attempts - 1)


def test_not_a_number_is_not_played_without_the_guard_either(scripted: Model, recordings: Path, folder: Path) -> None:
    with pytest.raises(InternalError):
        say(scripted, recordings, folder, ["X."], ms=80, guard="off")


def test_a_streamed_segment_that_breaks_after_it_was_heard_is_an_error(scripted: Model, recordings: Path, folder: Path) -> None:
    speaker = csm_loading.speaker(scripted, recordings, folder)
    stream = speaker.speak(["Y."], csm_loading.voice(max_audio_length_ms=240), SpeechOptions(1, streamed=True), lambda: False)
    assert np.isfinite(next(stream).samples).all()
    with pytest.raises(InternalError):
        list(stream)


def test_a_dead_stretch_is_shortened_to_the_setting(scripted: Model, recordings: Path, folder: Path) -> None:
    (chunk,) = say(scripted, recordings, folder, ["P."], ms=800, max_pause_ms=100)
    assert chunk.retries == 0
    assert 2 * FRAME < len(chunk.samples) < 6 * FRAME


def test_the_warm_up_has_every_voices_prompt_ready(recordings: Path, model: Model, folder: Path, frames_computed: list[int]) -> None:
    speaker = csm_loading.speaker(model, recordings, folder)
    speaker.warm_up([csm_loading.voice(), csm_loading.voice(voice_match=False)])
    assert frames_computed == [8, 8, 1, 1, 1, 1]
    assert {layer.offset for layer in model._audio_tokenizer.decoder_cache} == {0}


@pytest.mark.parametrize(
    "told",
    [
        "[metal::malloc] Attempting to allocate 99999 bytes which is greater than the maximum allowed buffer size of 9 bytes.",
        "[malloc] Unable to allocate 99999 bytes.",
        "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
        "cudaMallocAsync(&data, size, stream) failed: out of memory",
    ],
)
def test_what_mlx_says_when_memory_runs_out_is_told_as_such(told: str) -> None:
    with pytest.raises(InsufficientMemoryError), memory_errors():
        raise RuntimeError(told)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="There is no Stream"), memory_errors():
        raise RuntimeError("There is no Stream(gpu, 2) in current thread.")


def test_memory_that_runs_out_while_frames_are_computed_ends_the_request_and_not_the_model(
    recordings: Path, model: Model, folder: Path
) -> None:
    """Metal reports it when a frame is waited for; the error is raised by hand here, with Metal's words."""
    original, frames = model.model.draw_frame, 0

    def draw_frame(*given: object) -> object:
        nonlocal frames
        frames += 1
        if frames == 3:
            raise RuntimeError(
                "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
            )
        return original(*given)

    before = say(model, recordings, folder, TEXTS[:1], ms=400, guard="off")[0].samples
    model.model.draw_frame = draw_frame
    try:
        with pytest.raises(InsufficientMemoryError, match="MAX_BATCH"):
            say(model, recordings, folder, TEXTS, ms=400, guard="off")
    finally:
        model.model.draw_frame = original
    np.testing.assert_array_equal(say(model, recordings, folder, TEXTS[:1], ms=400, guard="off")[0].samples, before)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_rows_after_a_prompt_that_was_read_before_have_the_same_tokens(
    recordings: Path, model: Model, folder: Path, temperature: float
) -> None:
    prompts = csm_loading.speaker(model, recordings, folder)._prompts
    voice = csm_loading.voice(voice_match=False)
    alone = prompts.alone(voice)
    assert alone is not None
    prefix = PrefixCache(model.model).get(alone)
    rows = [prompts.tokens(voice, text) for text in TEXTS]
    for count in (1, len(rows)):
        both = []
        for known in (None, prefix):
            batch = FrameBatch(model.model, rows[:count], RowSampler(range(count), temperature, 50), known)
            both.append([batch.step(more=left > 0) for left in reversed(range(4))])
        np.testing.assert_array_equal(both[0], both[1])


def test_a_prompt_that_is_a_segment_of_its_own_is_read_once(recordings: Path, model: Model, folder: Path) -> None:
    speaker = csm_loading.speaker(model, recordings, folder, guard="off")
    voice = csm_loading.voice(voice_match=False, max_audio_length_ms=80)
    original, positions = model.model.embed, []

    def embed(tokens: mx.array, mask: mx.array) -> mx.array:
        positions.append(tokens.shape[1])
        embedded: mx.array = original(tokens, mask)
        return embedded

    model.model.embed = embed
    try:
        for text in TEXTS[:2]:
            list(speaker.speak([text], voice, SpeechOptions(1), lambda: False))
    finally:
        model.model.embed = original
    alone = speaker._prompts.alone(voice)
    assert alone is not None
    texts = [len(speaker._prompts.tokens(voice, text)[0]) - len(alone[0]) for text in TEXTS[:2]]
    assert positions == [len(alone[0]), *texts]


def test_prompts_that_were_read_are_kept_up_to_a_limit(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csm_decoding.PREFIX_POSITIONS", 20)
    cache = PrefixCache(model.model)
    shape = (8, model.model.args.audio_num_codebooks + 1)
    mask = mx.ones(shape, mx.bool_)
    first, second, third = (cache.get((mx.full(shape, token, mx.int32), mask)) for token in (1, 2, 3))
    assert cache.get((mx.full(shape, 3, mx.int32), mask)) is third
    assert cache.get((mx.full(shape, 2, mx.int32), mask)) is second
    assert cache.get((mx.full(shape, 1, mx.int32), mask)) is not first
