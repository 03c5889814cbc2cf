"""Compare CSM here with stock mlx-audio: one process, the same weights, a voice prompt of 1 s; with a tiny codec and with full-size Mimi.

    make bench-csm                                     all of it, some minutes on two cores
    python benchmarks/csm.py --requests 3 --frames 4   quicker

Stock gets its prompt as `context=[Segment(...)]`, without the two requests to the hub that `voice=` makes each time. Compare the ratios:
absolute times depend on the machine. On a CPU, stock's Mimi takes nearly all the time; on a GPU the network does, and the tiny codec,
which takes almost none, is closer to that. The network is tiny in both, so its time is mostly the framework's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests"), str(PROJECT / "benchmarks")]
os.environ.setdefault("TQDM_DISABLE", "1")

import csm_frames  # noqa: E402 - the project's folders come first
import csm_loading  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import tiny_csm  # noqa: E402
import tiny_weights  # noqa: E402
from mlx_audio.lm.sample_utils import make_sampler  # noqa: E402
from mlx_audio.tts.models.sesame import Model  # noqa: E402
from mlx_audio.tts.models.sesame.sesame import Segment  # noqa: E402

from csm_decoding import CodecDecoder, FrameBatch, RowSampler  # noqa: E402
from csm_generation import CsmSpeaker  # noqa: E402
from csm_prompts import TRANSCRIPTS, PromptStore  # noqa: E402
from speech_model import SpeechOptions  # noqa: E402

FRAME_MS = 80
# On a shared CPU, only processor time can be compared; for a GPU, only wall-clock time.
ON_CPU = mx.default_device() == mx.Device(mx.cpu)
clock = time.process_time if ON_CPU else time.perf_counter
SENTENCE = "The harbour was quiet that morning, and nobody on the long stone pier spoke a word. "
SEGMENTS = [(SENTENCE * 4)[:300].strip() for _ in range(5)]  # 1500 characters


@dataclass
class Times:
    """Times within one request, in seconds after its start."""

    start: float = field(default_factory=clock)
    first_frame: float = 0.0
    first_sound: float = 0.0
    total: float = 0.0

    def now(self) -> float:
        return clock() - self.start


@contextmanager
def timed_network(model: Model) -> Iterator[Times]:
    """Record when the network's backbone is first called: the prompt is encoded, and not yet read."""
    times = Times()
    network = model.model
    embed = network._embed_tokens

    def embed_tokens(tokens: mx.array) -> mx.array:
        if not times.first_frame:
            mx.eval(tokens)  # stock's prompt is encoded only when it is used
            times.first_frame = times.now()
        embedded: mx.array = embed(tokens)
        return embedded

    network._embed_tokens = embed_tokens
    try:
        yield times
        times.total = times.now()
    finally:
        del network._embed_tokens


class Engines:
    """Stock mlx-audio and ours, each with its own copy of the same weights, because ours changes its codec."""

    def __init__(self, folder: Path, *, small_codec: bool) -> None:
        cache = tiny_csm.build(script={"": [tiny_csm.NEVER]}, small_codec=small_codec, codebooks=tiny_weights.CODEBOOKS)
        self.stock_model, self.model = (csm_loading.load(cache, stock=stock) for stock in (True, False))
        self.recording = folder / "conversational_a.wav"
        time_axis = np.arange(24_000) / 24_000
        soundfile.write(self.recording, 0.2 * np.sin(2 * np.pi * 150 * time_axis) * (1 + 0.5 * np.sin(2 * np.pi * 5 * time_axis)), 24_000)
        settings = csm_loading.settings(folder, guard="off")
        self.prompts = PromptStore(self.model, settings, folder)
        self.speaker = CsmSpeaker(self.model, self.prompts, settings)
        self.transcript = TRANSCRIPTS["conversational_a"]

    def stock(self, segments: list[str], frames: int, *, stream: bool = False) -> Times:
        with timed_network(self.stock_model) as times:
            prompt: Segment = self.stock_model.prepare_prompt(self.transcript, 0, str(self.recording), 24_000)
            sampler = make_sampler(temp=0.9, top_k=50)
            for result in self.stock_model.generate(
                segments, context=[prompt], sampler=sampler, max_audio_length_ms=frames * FRAME_MS, stream=stream
            ):
                np.array(result.audio)
                times.first_sound = times.first_sound or times.now()
        return times

    def ours(self, segments: list[str], frames: int, *, stream: bool = False) -> Times:
        voice = csm_loading.voice(max_audio_length_ms=frames * FRAME_MS)
        with timed_network(self.model) as times:
            for _ in self.speaker.speak(segments, voice, SpeechOptions(1, streamed=stream), lambda: False):
                times.first_sound = times.first_sound or times.now()
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=12, help="requests to each engine for the same short line")
    parser.add_argument("--frames", type=int, default=4, help="frames for each segment of the long text")
    options = parser.parse_args()
    print("Seconds of processor time." if ON_CPU else "Seconds.")
    for codec in ("tiny codec", "full-size Mimi"):
        with tempfile.TemporaryDirectory(prefix="bench-csm-") as folder:
            engines = Engines(Path(folder), small_codec=codec == "tiny codec")
            print(f"\n| {codec} | stock mlx-audio | here | stock / here |\n|---|---:|---:|---:|")
            short_requests(engines, options.requests)
            first_chunk(engines)
            network_alone(engines)
            codec_alone(engines)
            long_text(engines, options.frames)
            cancellation(engines)
    csm_frames.main()


def row(what: str, stock: float, ours: float, unit: str = "s") -> None:
    digits = 3 if unit == "s" else 1
    print(f"| {what} | {stock:.{digits}f} {unit} | {ours:.{digits}f} {unit} | {stock / max(ours, 1e-9):.1f} |", flush=True)


def short_requests(engines: Engines, count: int) -> None:
    """The same short line many times, one frame each, the engines in alternation, so that other load on the machine affects both."""
    pairs = [(engines.stock(["Good morning."], 1), engines.ours(["Good morning."], 1)) for _ in range(count)]
    lengths = [int(model._audio_tokenizer.decoder_cache[0].offset) for model in (engines.stock_model, engines.model)]
    tenth = pairs[7:12] or pairs[1:]
    stock, ours = ([pair[engine] for pair in tenth] for engine in (0, 1))
    row("first request, total", pairs[0][0].total, pairs[0][1].total)
    row(f"request 10 (median of {len(tenth)} around it), total", median(m.total for m in stock), median(m.total for m in ours))
    row("preparation before the first frame, first request", pairs[0][0].first_frame, pairs[0][1].first_frame)
    row("preparation before the first frame, request 10", median(m.first_frame for m in stock), median(m.first_frame for m in ours))
    print(f"| codec cache length after {count} requests of one frame | {lengths[0]} | {lengths[1]} | |", flush=True)


def first_chunk(engines: Engines) -> None:
    """The time to the first samples of a streamed answer."""
    row(
        "first chunk, streamed",
        engines.stock(SEGMENTS[:1], 7, stream=True).first_sound,
        engines.ours(SEGMENTS[:1], 7, stream=True).first_sound,
    )


def network_alone(engines: Engines, frames: int = 30) -> None:
    """The time a frame takes in the network, without the codec: the stock loop, ours with one row, ours with a batch."""
    voice = csm_loading.voice()
    prompts = [engines.prompts.tokens(voice, text) for text in SEGMENTS]
    stock = timed(lambda: stock_frames(engines.stock_model, prompts[0], frames))
    for rows in (1, len(prompts)):
        ours = timed(lambda rows=rows: our_frames(engines.model, prompts[:rows], frames))  # type: ignore[misc]
        row(f"network, {rows} segment(s) in a batch, per frame", stock / frames * 1000, ours / frames / rows * 1000, "ms")


def stock_frames(model: Model, prompt: tuple[mx.array, mx.array], frames: int) -> None:
    """Run the loop of stock `generate`: one row, which waits for each frame."""
    sampler = make_sampler(temp=0.9, top_k=50)
    model.model.reset_caches()
    tokens, mask = prompt[0][None], prompt[1][None]
    for _ in range(frames):
        frame = model.model.generate_frame(tokens, mask, mx.zeros((1, 1), mx.int32), sampler)
        mx.all(frame == 0).item()
        tokens = mx.concat([frame, mx.zeros((1, 1), mx.int32)], axis=1)[:, None]
        mask = mx.concat([mx.ones(frame.shape, mx.bool_), mx.zeros((1, 1), mx.bool_)], axis=1)[:, None]


def our_frames(model: Model, prompts: list[tuple[mx.array, mx.array]], frames: int) -> None:
    batch = FrameBatch(model.model, prompts, RowSampler(range(len(prompts)), 0.9, 50))
    for left in reversed(range(frames)):
        batch.step(more=left > 0)


def codec_alone(engines: Engines, frames: int = 16) -> None:
    """The time to decode given frames: one by one as stock does, and in our blocks."""
    tokens = np.random.default_rng(0).integers(1, 500, (frames, 32), np.int32)
    decoder = CodecDecoder(engines.model)

    def in_blocks() -> None:
        decoder.begin()
        for frame in tokens:
            decoder.push(frame)
        decoder.finish()

    def one_by_one() -> None:
        engines.stock_model._streaming_decoder.reset()
        mx.eval(engines.stock_model._streaming_decoder.decode_frames(mx.array(tokens.T)[None]))

    row(f"codec, per frame of {frames}", timed(one_by_one) / frames * 1000, timed(in_blocks) / frames * 1000, "ms")
    decoder.begin()


def long_text(engines: Engines, frames: int) -> None:
    """The time for 1500 characters in five segments, and MLX's peak memory."""
    times: list[Times] = []
    memory: list[float] = []
    for speak in (engines.stock, engines.ours):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        times.append(speak(SEGMENTS, frames))
        memory.append((mx.get_peak_memory() - before) / 1e6)
    row(f"1500 characters, 5 segments of {frames} frames, total", times[0].total, times[1].total)
    row("its peak memory beyond the weights", memory[0], memory[1], "MB")


def cancellation(engines: Engines) -> None:
    """The time from a cancellation to the end of the iterator."""
    stopped = 0.0
    asked = 0

    def cancelled() -> bool:
        nonlocal stopped, asked
        asked += 1
        stopped = clock() if asked == 5 else stopped
        return asked >= 5

    voice = csm_loading.voice(max_audio_length_ms=8000)
    list(engines.speaker.speak(SEGMENTS, voice, SpeechOptions(1), cancelled))
    print(f"| from a cancellation to the end, 5 segments | not possible | {(clock() - stopped) * 1000:.1f} ms | |", flush=True)


def timed(work: Callable[[], None]) -> float:
    begun = clock()
    work()
    return clock() - begun


if __name__ == "__main__":
    main()
