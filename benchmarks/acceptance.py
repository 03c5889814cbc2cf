"""Check on this machine what the requirements ask for, and print the result as a Markdown table.

    make acceptance                     on the owner's Mac: under 15 minutes with CSM-1B on the disk
    make acceptance ARGS=--quiet        play nothing
    make acceptance ARGS=--again        forget earlier results

It starts a server of its own on a free port and never downloads anything. Results are kept in the folder `acceptance`: after an interruption or
a failure, the next run repeats only what has not passed. Where CSM-1B cannot run, a tiny checkpoint with random weights takes its
place: that shows that every check runs, and says nothing about CSM, so its rows are NOT HERE. If the service is installed, it is killed once,
to see whether it comes back (not with --no-kill). The exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

import tiny_csm  # noqa: E402 - the project's folders come first
from listening import decode, transcribe, word_error_rate, words  # noqa: E402

from config import VERSION, load_settings  # noqa: E402
from http_middleware import RequestLog  # noqa: E402

PASS, FAIL, NOT_HERE = "PASS", "FAIL", "NOT HERE"
CSM_VOICES = ("conversational", "conversational_b")
BUILT_IN = "heart"
FORMATS = ("mp3", "opus", "wav", "flac")
START_SECONDS, SENTENCE_SECONDS, CONVERSION_SECONDS, MEMORY_GB, LONG_SECONDS = 30.0, 2.0, 0.5, 4.0, 30.0
MOST_ERRORS = {BUILT_IN: 0.05, "conversational": 0.10, "conversational_b": 0.10}  # word error rate, the recogniser's own errors included
LONG_CHARACTERS, RECOVERY_SECONDS = 1500, 60.0
TINY_FRAMES = 2
SERVICE_FILES = ("Library/LaunchAgents/com.burkestudio.sesame-tts.plist", ".config/systemd/user/sesame-tts.service")

SENTENCES = """
The kettle was already boiling when she came down the stairs and opened the kitchen window.
We can meet at the station tomorrow morning, or you can take the later train on Friday.
My brother fixed the old radio last night, and now it plays music from all over the world.
If the weather stays dry, the children will walk to the lake and swim before lunch.
He read the letter twice, folded it carefully, and put it back into the wooden box.
The museum opens at nine, but the best time to visit is late in the afternoon.
Nobody knew where the black cat came from, yet everybody in the street gave it food.
Please remember to water the plants on the balcony while I am away next week.
The doctor said that a long walk every day would help more than any of the pills.
She bought fresh bread, some cheese and a basket of apples at the small market.
After the storm the river was so high that the bridge had to be closed for days.
Our neighbours are moving to the coast because they miss the smell of the sea.
The teacher asked a simple question, and for a moment the whole class was silent.
You should turn left at the church and follow the road until you see a red gate.
It took them three summers to build the house with their own hands and a few friends.
The orchestra played so quietly that we could hear the rain on the roof.
I have never seen a winter as warm as this one, and the birds seem to agree.
The new bakery on the corner sells the best coffee and the worst cakes in town.
When the lights went out, my grandmother lit a candle and told us a story.
There is enough room in the car for all of us, if the dog sits on your knees.
""".strip().splitlines()

ADVICE = {
    "start": "acceptance/cache/server.log shows each step of the load. A slow disk or a full memory is the usual cause.",
    "sentence": "Close other programs that use the GPU and try again; `make bench-csm` shows the cost of a frame (docs/PERFORMANCE.md).",
    "conversion": "Is the machine busy (the load is above)? Look at the ffmpeg in use (/health, ffmpeg_version); `make bench` compares it with ffmpeg alone.",
    "formats": "Play the files in acceptance/ yourself. docs/API.md has the encoders of each format.",
    "playback": "Check the output device in the sound settings, then play the files in acceptance/ yourself.",
    "heard": "Listen to the files in acceptance/; docs/CSM.md explains the checks of a segment and their limits.",
    "voice_match": "Listen to the files in acceptance/ and decide by ear.",
    "seed": "The same seed must give the same samples: docs/CSM.md, reproducibility. Was another request running?",
    "long": "`make bench-csm` shows what a batch costs; MAX_BATCH=1 turns batches off.",
    "cancellation": "acceptance/cache/server.log shows what ran on after the disconnect.",
    "errors": "Compare the answer with the table of errors in docs/API.md.",
    "memory": "/health shows the memory of each model. MODEL_DTYPE and MAX_BATCH change it (docs/PERFORMANCE.md).",
    "recovery": "./install.sh --status and --logs; docs/SERVICE.md, Troubleshooting.",
    "openclaw": "Run the command of docs/CLIENTS.md by hand: openclaw infer tts convert.",
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    check: str
    goal: str
    measured: str
    verdict: str


@dataclass
class Options:
    """What to run, and where the results go."""

    folder: Path
    short: bool
    quiet: bool
    kill: bool
    tiny: bool

    @property
    def sentences(self) -> list[str]:
        return SENTENCES[:1] if self.short else SENTENCES

    @property
    def csm_voices(self) -> tuple[str, ...]:
        return CSM_VOICES[:1] if self.short else CSM_VOICES

    @property
    def long_characters(self) -> int:
        return 300 if self.short else LONG_CHARACTERS

    @property
    def repetitions(self) -> int:
        return 1 if self.short else 3


@dataclass
class Server:
    """A server process of our own, and requests to it.

    Args:
        options: Of this run.
        changes: Settings of this server that differ, by the names of their environment variables.
    """

    options: Options
    changes: dict[str, str] = field(default_factory=dict)
    csm_on_disk: bool = True
    start_seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = self.options.folder
        self.settings = load_settings()
        keys = self.settings.api_key
        headers = {"Authorization": f"Bearer {keys[0].get_secret_value()}"} if keys else {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, headers=headers)
        own = {
            "HOST": "127.0.0.1",
            "PORT": str(port),
            "CACHE_DIR": str(self.folder / "cache"),
            "LOG_STDERR": "false",
            "HF_HUB_OFFLINE": "1",
        }
        if self.options.tiny:
            checkpoint = tiny_csm.build(script={"": [tiny_csm.ends_after(TINY_FRAMES)]}, small_codec=True)
            own |= {"CSM": "on", "MODEL_DTYPE": "float32", "GUARD": "off", "DEFAULT_VOICE": BUILT_IN} | tiny_csm.environment(checkpoint)
        self.environment = os.environ | own | self.changes

    def start(self) -> None:
        """Start, and wait until each model is ready or has failed."""
        started = time.monotonic()
        small = [tiny_csm.__file__] if tiny_csm.SMALL_CODEC in self.environment and self.environment["CSM"] == "on" else []
        self.process = subprocess.Popen([sys.executable, *small, str(PROJECT / "server.py")], env=self.environment)
        self.start_seconds = {}
        while len(self.start_seconds) < 2:
            for name, model in self.models().items():
                if model["state"] == "failed":
                    self.csm_on_disk = False
                if model["state"] != "loading":
                    self.start_seconds.setdefault(name, time.monotonic() - started)
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self.process.returncode}: see {self.folder / 'cache' / 'server.log'}")
            time.sleep(0.05)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run the server in between."""
        try:
            self.start()
            yield
        finally:
            self.stop()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def models(self) -> dict[str, Any]:
        with contextlib.suppress(httpx.TransportError):
            return dict(self.health()["models"])
        return {}

    def health(self) -> dict[str, Any]:
        return dict(self.http.get("/health").json())

    def speak(self, text: str, voice: str, fmt: str = "wav", **fields: object) -> httpx.Response:
        """Return a complete answer.

        Raises:
            RuntimeError: The status is not 200.
        """
        body = {"model": "tts-1", "input": text, "voice": voice, "response_format": fmt} | fields
        answer = self.http.post("/v1/audio/speech", json=body)
        if answer.status_code != 200:
            raise RuntimeError(f"status {answer.status_code} for the voice {voice}: {answer.text[:300]}")
        return answer

    def first_audio(self, text: str, voice: str) -> float:
        """Return the seconds to the first byte of a stream."""
        started = time.monotonic()
        body = {"model": "tts-1", "input": text, "voice": voice, "response_format": "pcm"}
        with self.http.stream("POST", "/v1/audio/speech", json=body) as answer:
            pieces = answer.iter_raw()
            next(pieces)
            seconds = time.monotonic() - started
            for _ in pieces:
                pass
        return seconds

    def memory_gb(self) -> tuple[float, str]:
        """Return the memory of the process and how it was measured. On a Mac, only the footprint contains Metal's buffers."""
        tool = shutil.which("footprint")
        if tool:
            shown = subprocess.run([tool, "-f", "bytes", "-p", str(self.process.pid)], capture_output=True, text=True, check=False).stdout
            for line in shown.splitlines():
                if "Footprint:" in line:
                    return float(line.split("Footprint:")[1].split()[0]) / 1e9, "footprint"
        metal = sum(float(model.get("memory_gb") or 0) for model in self.models().values()) if sys.platform == "darwin" else 0.0
        return psutil.Process(self.process.pid).memory_info().rss / 1e9 + metal, "resident" + (" + MLX" if metal else "")


def _presets(options: Options) -> Path:
    """Copy the presets, and add those of CSM's voices with the other value of `voice_match`."""
    source, target = load_settings().presets_dir, options.folder / "presets"
    shutil.rmtree(target, ignore_errors=True)
    if options.short:  # each voice of CSM costs time at the start
        target.mkdir()
        for voice in (BUILT_IN, *options.csm_voices):
            shutil.copy(source / f"{voice}.json", target)
    else:
        shutil.copytree(source, target)
    for voice in options.csm_voices:
        preset = json.loads((target / f"{voice}.json").read_text())
        preset |= {"name": other_layout(voice), "voice_match": not preset.get("voice_match", True)}
        (target / f"{other_layout(voice)}.json").write_text(json.dumps(preset))
    return target


def other_layout(voice: str) -> str:
    """Return the name of a voice whose preset has the other value of `voice_match`."""
    return f"{voice}-other-layout"


class Run:
    """All checks with one server."""

    def __init__(self, server: Server, heard: dict[str, dict[str, float]]) -> None:
        self.server, self.options, self.heard = server, server.options, heard

    @property
    def csm_speaks(self) -> bool:
        """Whether real CSM-1B runs, so that its figures count."""
        return self.server.csm_on_disk and not self.options.tiny

    @property
    def voices(self) -> list[str]:
        return [BUILT_IN, *(self.options.csm_voices if self.server.csm_on_disk else ())]

    def row(self, check: str, voice: str, goal: str, measured: str, met: bool) -> Row:
        """Return a row about one voice; NOT HERE if the voice is CSM's with random weights."""
        verdict = (PASS if met else FAIL) if voice == BUILT_IN or self.csm_speaks else NOT_HERE
        note = " (random weights)" if voice != BUILT_IN and self.options.tiny else ""
        return Row(f"{check}, {voice}{note}", goal, measured, verdict)

    def missing(self, check: str, goal: str) -> list[Row]:
        """Return rows for CSM's voices if CSM could not be loaded."""
        reason = "" if self.server.csm_on_disk else str(self.server.models()["csm-1b"].get("error"))
        return [Row(f"{check}, CSM", goal, reason, NOT_HERE)] if reason else []

    def start(self) -> list[Row]:
        goal = f"< {START_SECONDS:g} s"
        if not self.options.short:  # the first start has read the files from the disk
            self.server.stop()
            self.server.start()
        names = {BUILT_IN: "hibari"} | ({"CSM": "csm-1b"} if self.server.csm_on_disk else {})
        times = {voice: self.server.start_seconds[model] for voice, model in names.items()}
        rows = [self.row("start to ready", voice, goal, f"{seconds:.1f} s", seconds < START_SECONDS) for voice, seconds in times.items()]
        return rows + self.missing("start to ready", goal)

    def sentence(self) -> list[Row]:
        rows, goal = [], f"< {SENTENCE_SECONDS:g} s"
        for voice in self.voices:
            if not self.options.short:
                self.server.speak(SENTENCES[1], voice)
            whole, first = [], []
            for text in SENTENCES[2 : 2 + self.options.repetitions]:
                started = time.monotonic()
                self.server.speak(text, voice, "mp3")
                whole.append(time.monotonic() - started)
                first.append(self.server.first_audio(text, voice))
            seconds, early = statistics.median(whole), statistics.median(first)
            rows.append(self.row("sentence of 10 to 20 words", voice, goal, f"{seconds:.2f} s", seconds < SENTENCE_SECONDS))
            rows.append(self.row("first audio of a stream", voice, goal, f"{early:.2f} s", early < SENTENCE_SECONDS))
        return rows + self.missing("sentence of 10 to 20 words", goal)

    def conversion(self) -> list[Row]:
        """Measure from the end of the generation to the complete answer; the median, because other programs delay single ones."""
        rows = []
        for name, text in (("one sentence", SENTENCES[0]), ("20 s of speech", " ".join(SENTENCES[:4]))):
            spent = {fmt: self._seconds_after_generation(text, fmt) for fmt in FORMATS}
            measured = ", ".join(f"{fmt} {1000 * seconds:.0f} ms" for fmt, seconds in spent.items())
            met = max(spent.values()) < CONVERSION_SECONDS
            rows.append(Row(f"conversion, {name}", f"< {1000 * CONVERSION_SECONDS:.0f} ms", measured, PASS if met else FAIL))
        return rows

    def _seconds_after_generation(self, text: str, fmt: str) -> float:
        seconds = []
        for _ in range(self.options.repetitions):
            started = time.monotonic()
            headers = self.server.speak(text, BUILT_IN, fmt).headers
            seconds.append(time.monotonic() - started - float(headers["x-generation-time"]) - float(headers["x-queue-time"]))
        return statistics.median(seconds)

    def formats(self) -> list[Row]:
        good = []
        for fmt in FORMATS:
            answer = self.server.speak(SENTENCES[0], BUILT_IN, fmt)
            (self.options.folder / f"format.{fmt}").write_bytes(answer.content)
            samples, rate = decode(answer.content, fmt)
            if abs(len(samples) / rate - float(answer.headers["x-audio-duration"])) < 0.1:
                good.append(fmt)
        return [Row("formats decoded, right length", "all four", ", ".join(good), PASS if len(good) == len(FORMATS) else FAIL)]

    def playback(self) -> list[Row]:
        player = next((found for name in ("afplay", "pw-play", "paplay", "aplay", "ffplay") if (found := shutil.which(name))), None)
        if player is None or self.options.quiet:
            return [Row("formats played", "all four", "no player" if player is None else "--quiet", NOT_HERE)]
        played = []
        for fmt in FORMATS:
            options = ["-nodisp", "-autoexit"] if player.endswith("ffplay") else []
            file = self.options.folder / f"format.{fmt}"
            if subprocess.run([player, *options, file], capture_output=True, timeout=60, check=False).returncode == 0:
                played.append(fmt)
        # A player of the system may not know Opus; clients that ask for it do.
        met = set(FORMATS) - {"opus"} <= set(played)
        return [Row(f"formats played with {Path(player).name}", "all (opus if it can)", ", ".join(played), PASS if met else FAIL)]

    def measure(self, voice: str) -> dict[str, float]:
        """Let a recogniser listen to the sentences; keep the sound and the figures."""
        if voice not in self.heard:
            errors, count, retries, seconds = 0.0, 0, 0, 0.0
            for number, text in enumerate(self.options.sentences):
                answer = self.server.speak(text, voice, seed=number)
                (self.options.folder / f"{voice}-{number + 1:02d}.wav").write_bytes(answer.content)
                samples, rate = decode(answer.content, "wav")
                errors += word_error_rate(text, transcribe(samples, rate)) * len(words(text))
                count += len(words(text))
                retries += int(answer.headers["x-retries"])
                seconds += len(samples) / rate
            first = statistics.median(self.server.first_audio(text, voice) for text in self.options.sentences[: self.options.repetitions])
            figures = {"error_rate": errors / count, "retries": retries, "words_per_second": count / seconds, "first_audio": first}
            self.heard[voice] = figures
        return self.heard[voice]

    def recognised(self) -> list[Row]:
        rows, count = [], len(self.options.sentences)
        for voice in self.voices:
            rate, most = self.measure(voice)["error_rate"], MOST_ERRORS[voice]
            rows.append(self.row(f"{count} sentences heard back", voice, f"<= {most:.0%} of the words wrong", f"{rate:.1%}", rate <= most))
        return rows + self.missing("sentences heard back", "few words wrong")

    def voice_match(self) -> list[Row]:
        rows = []
        for voice in self.voices[1:]:
            with_match = json.loads((self.options.folder / "presets" / f"{voice}.json").read_text()).get("voice_match", True)
            here, other = self.measure(voice), self.measure(other_layout(voice))
            better = _better(here, other)
            advice = f'set `"voice_match": {json.dumps(not with_match)}` in presets/{voice}.json' if better else "keep the preset as it is"
            measured = f"{json.dumps(with_match)}: {_figures(here)}; {json.dumps(not with_match)}: {_figures(other)}; {advice}"
            rows.append(self.row("voice_match compared", voice, "both measured", measured, True))
        return rows + self.missing("voice_match compared", "both measured")

    def seed(self) -> list[Row]:
        rows = []
        for voice in self.voices[:2]:
            takes = [self.server.speak(SENTENCES[3], voice, seed=42).content for _ in range(2)]
            rows.append(
                self.row("same seed twice", voice, "same bytes", "same" if takes[0] == takes[1] else "different", takes[0] == takes[1])
            )
        return rows

    def long_text(self) -> list[Row]:
        length = self.options.long_characters
        rows, text, goal = [], (" ".join(SENTENCES) + " ").ljust(length)[:length], f"< {LONG_SECONDS:g} s"
        for voice in self.voices[: 1 if self.options.short else 2]:
            started = time.monotonic()
            spoken = float(self.server.speak(text, voice, "mp3").headers["x-audio-duration"])
            seconds = time.monotonic() - started
            measured = f"{seconds:.1f} s for {spoken:.0f} s of speech"
            rows.append(self.row(f"text of {length} characters", voice, goal, measured, seconds < LONG_SECONDS))
        return rows

    def cancellation(self) -> list[Row]:
        rows, text = [], " ".join(SENTENCES * 2)[:4000]
        for voice in self.voices[:2]:
            body = {"model": "tts-1", "input": text, "voice": voice, "response_format": "pcm"}
            with self.server.http.stream("POST", "/v1/audio/speech", json=body) as answer:
                next(answer.iter_raw())
            started = time.monotonic()
            while self.server.health()["queue"]["active"] and time.monotonic() - started < 30:
                time.sleep(0.01)
            seconds = time.monotonic() - started
            self.server.speak("And on it goes.", voice)
            rows.append(self.row("disconnect to idle, then a request", voice, "< 2 s", f"{seconds:.2f} s", seconds < 2))
        return rows

    def errors(self) -> list[Row]:
        """Cause each error of the requirements' table: two with a server that has faults, two by an exception in this process."""
        good = {"model": "tts-1", "input": "Hello.", "voice": BUILT_IN}
        table = {
            (400, "invalid_input"): {"input": " "},
            (400, "input_too_long"): {"input": "a" * (self.server.settings.max_input_length + 1)},
            (400, "invalid_voice"): {"voice": "nobody"},
            (400, "invalid_format"): {"response_format": "ogg"},
        }
        right = [wanted for wanted, fields in table.items() if _error(self.server.http, good | fields) == wanted]
        faults = {(503, "model_not_ready"): {"voice": CSM_VOICES[0]}, (500, "conversion_failed"): {"response_format": "mp3"}}
        with faulty_server(self.options) as http:
            right += [wanted for wanted, fields in faults.items() if _error(http, good | fields) == wanted]
        raised = {(500, "internal_error"): RuntimeError("a check of make acceptance"), (503, "insufficient_memory"): MemoryError()}
        right += [wanted for wanted, error in raised.items() if asyncio.run(_answer_to(error)) == wanted]
        count = len(table) + len(faults) + len(raised)
        measured = ", ".join(f"{code} {status}" for status, code in right)
        return [Row("error table of the requirements", f"{count} of {count}", measured, PASS if len(right) == count else FAIL)]

    def memory(self) -> list[Row]:
        for text in SENTENCES[: 0 if self.options.short else 8]:
            self.server.speak(text, self.voices[-1])
        used, how = self.server.memory_gb()
        voice = self.voices[-1] if self.csm_speaks else BUILT_IN
        return [self.row(f"steady memory ({how})", voice, f"< {MEMORY_GB:g} GB", f"{used:.2f} GB", used < MEMORY_GB)]

    def recovery(self) -> list[Row]:
        check, goal = "the service after a kill", f"answers again within {RECOVERY_SECONDS:g} s"
        installed = [file for file in SERVICE_FILES if (Path.home() / file).exists()]
        if not installed or not self.options.kill:
            return [Row(check, goal, "--no-kill" if installed else "the service is not installed", NOT_HERE)]
        seconds = seconds_to_recover(self.server.settings.cache_dir)
        return [Row(check, goal, "no answer", FAIL) if seconds is None else Row(check, goal, f"{seconds:.0f} s", PASS)]

    def openclaw(self) -> list[Row]:
        check, goal = "OpenClaw, base URL and key only", "a file with the words"
        command = _openclaw()
        if command is None:
            return [Row(check, goal, "OpenClaw is not installed", NOT_HERE)]
        folder = self.options.folder / "openclaw"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        key = self.server.settings.api_key[0].get_secret_value() if self.server.settings.api_key else "local"
        provider = {"apiKey": key, "baseUrl": str(self.server.http.base_url.join("/v1"))}
        (folder / "openclaw.json").write_text(json.dumps({"tts": {"provider": "openai", "providers": {"openai": provider}}}))
        own = {"OPENCLAW_STATE_DIR": str(folder / "state"), "OPENCLAW_CONFIG_PATH": str(folder / "openclaw.json"), "HOME": str(folder)}
        words_said = SENTENCES[0]
        arguments = ["infer", "tts", "convert", "--text", words_said, "--output", "speech", "--json"]
        ended = subprocess.run(
            [*command, *arguments], cwd=folder, env=os.environ | own, capture_output=True, text=True, timeout=180, check=False
        )
        if ended.returncode != 0:
            return [Row(check, goal, (ended.stderr or ended.stdout).strip()[-200:].replace("\n", " "), FAIL)]
        (output,) = json.loads(ended.stdout)["outputs"]
        rate = word_error_rate(words_said, transcribe(*decode(Path(output["path"]).read_bytes(), output["format"])))
        return [self.row(check, self.server.settings.default_voice, goal, f"{rate:.0%} of the words wrong", rate < 0.2)]


@contextlib.contextmanager
def faulty_server(options: Options) -> Iterator[httpx.Client]:
    """Run a server without CSM, whose ffmpeg fails."""
    folder = options.folder / "faulty"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    ffmpeg = folder / "ffmpeg"
    ffmpeg.write_text("#!/bin/sh\nexit 1\n")
    ffmpeg.chmod(0o755)
    changes = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "CACHE_DIR": str(folder / "cache"), "CSM": "off"}
    server = Server(options, changes | {"DEFAULT_VOICE": BUILT_IN, "FALLBACK_VOICE": "none", "VERIFY": "off"})
    with server.running():
        yield server.http


def _error(http: httpx.Client, body: dict[str, str]) -> tuple[int, str]:
    """Send a speech request; return the status and the error's code, if it is an error in OpenAI's form."""
    answer = http.post("/v1/audio/speech", json=body)
    return answer.status_code, answer.json()["error"]["code"] if answer.is_error else ""


async def _answer_to(error: Exception) -> tuple[int, str]:
    """Return the status and code of the answer to an exception in the application. A real lack of memory could end other programs."""

    async def fail(*_: object) -> None:
        raise error

    async with httpx.AsyncClient(transport=httpx.ASGITransport(RequestLog(fail)), base_url="http://localhost") as client:
        answer = await client.post("/v1/audio/speech", json={})
    return answer.status_code, answer.json()["error"]["code"]


def seconds_to_recover(cache_dir: Path) -> float | None:
    """Kill the server whose PID file is in a folder; return the seconds until another one answers, or None."""
    record = cache_dir / "server.pid"
    before = json.loads(record.read_text())
    os.kill(before["pid"], signal.SIGKILL)
    started = time.monotonic()
    while (seconds := time.monotonic() - started) < RECOVERY_SECONDS:
        with contextlib.suppress(OSError, ValueError, httpx.TransportError):
            if json.loads(record.read_text())["pid"] != before["pid"]:
                httpx.get(f"http://127.0.0.1:{before['port']}/health", timeout=5)
                return seconds
        time.sleep(0.2)
    return None


def _openclaw() -> list[str] | None:
    """Return the command of OpenClaw: the one on PATH, else the one of the tests."""
    if found := shutil.which("openclaw"):
        return [found]
    modules = PROJECT / "tests" / "clients" / "node_modules"
    program = modules / "openclaw" / "openclaw.mjs"
    # The one that the tests install, because OpenClaw needs a newer one than most systems have.
    node = next(modules.glob("node-*/bin/node"), shutil.which("node") or "node")
    return [str(node), str(program)] if program.exists() else None


def _figures(heard: dict[str, float]) -> str:
    return (
        f"{heard['error_rate']:.1%} of the words wrong, {heard['retries']:.0f} retries, {heard['words_per_second']:.1f} words/s, "
        f"first audio {heard['first_audio']:.2f} s"
    )


def _better(here: dict[str, float], other: dict[str, float]) -> bool:
    """Return whether the other layout is better: fewer wrong words by one in a hundred; if they are alike, fewer retries."""
    difference = other["error_rate"] - here["error_rate"]
    return difference < -0.01 or (abs(difference) <= 0.01 and other["retries"] < here["retries"])


CHECKS: dict[str, Callable[[Run], list[Row]]] = {
    "start": Run.start,
    "sentence": Run.sentence,
    "conversion": Run.conversion,
    "memory": Run.memory,
    "formats": Run.formats,
    "playback": Run.playback,
    "heard": Run.recognised,
    "voice_match": Run.voice_match,
    "seed": Run.seed,
    "long": Run.long_text,
    "cancellation": Run.cancellation,
    "errors": Run.errors,
    "openclaw": Run.openclaw,
    "recovery": Run.recovery,
}


class Results:
    """The results so far, kept in a file; those of another machine, version or kind of run are not used."""

    def __init__(self, options: Options, *, again: bool) -> None:
        self._file = options.folder / "results.json"
        self._key = {"machine": machine(), "short": options.short, "tiny": options.tiny, "commit": _commit()}
        self.rows: dict[str, list[Row]] = {}
        self.heard: dict[str, dict[str, float]] = {}
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads(self._file.read_text())
            if not again and kept["key"] == self._key:
                self.rows = {check: [Row(**row) for row in rows] for check, rows in kept["rows"].items()}
                self.heard = kept["heard"]

    def passed(self, check: str) -> bool:
        return check in self.rows and all(row.verdict == PASS for row in self.rows[check])

    def save(self) -> None:
        rows = {check: [asdict(row) for row in rows] for check, rows in self.rows.items()}
        draft = self._file.with_suffix(".part")
        draft.write_text(json.dumps({"key": self._key, "rows": rows, "heard": self.heard}, indent=1))
        draft.replace(self._file)


def _commit() -> str:
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    processor = platform.processor() or platform.machine()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        processor = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or processor
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else f"{platform.system()} {platform.release()}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-audio", "hibari-tts", "numpy"))
    memory = f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    return {"machine": f"{processor}, {memory}", "system": system, "Python": platform.python_version(), "packages": packages}


def report(results: Results) -> str:
    """Return the whole report as Markdown."""
    lines = [f"# Acceptance of Sesame TTS {VERSION}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in machine().items()]
    lines += [
        f"| date | {time.strftime('%Y-%m-%d %H:%M')}, load {os.getloadavg()[0]:.1f} |",
        "",
        "| check | goal | measured | verdict |",
        "|---|---|---|---|",
    ]
    lines += [f"| {row.check} | {row.goal} | {row.measured} | {row.verdict} |" for rows in results.rows.values() for row in rows]
    failed = [check for check, rows in results.rows.items() if any(row.verdict == FAIL for row in rows)]
    if failed:
        lines += ["", "## What to look at", "", *(f"- {check}: {ADVICE[check]}" for check in failed)]
    return "\n".join(lines) + "\n"


def run_checks(options: Options, results: Results) -> None:
    """Run what has not passed yet; keep each result at once."""
    wanted = [check for check in CHECKS if not results.passed(check)]
    if not wanted:
        return
    server = Server(options, {"PRESETS_DIR": str(_presets(options))})
    with server.running():
        run = Run(server, results.heard)
        for check in wanted:
            print(f"{time.strftime('%X')} {check} ...", file=sys.stderr, flush=True)
            try:
                results.rows[check] = CHECKS[check](run)
            except Exception as error:  # one check that fails must not end the others
                results.rows[check] = [Row(check, "no error", f"{type(error).__name__}: {str(error)[:300]}".replace("\n", " "), FAIL)]
            results.save()
    results.rows = {check: results.rows[check] for check in CHECKS}


def main() -> int:
    """Run the checks and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="forget earlier results")
    parser.add_argument("--quiet", action="store_true", help="play nothing")
    parser.add_argument("--no-kill", action="store_true", help="do not kill the installed service")
    parser.add_argument("--short", action="store_true", help="fewer sentences, one of CSM's voices: shows that the checks run")
    parser.add_argument("--folder", type=Path, default=PROJECT / "acceptance", help="for results and sound files")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    options = Options(given.folder.resolve(), given.short, given.quiet, not given.no_kill, tiny=not load_settings().csm_enabled)
    transcripts = options.folder / "transcripts"  # the same sound is transcribed once
    transcripts.mkdir(exist_ok=True)
    os.environ.setdefault("TEST_RUN_FOLDER", str(transcripts))
    logging.basicConfig(filename=options.folder / "acceptance.log")
    results = Results(options, again=given.again)
    run_checks(options, results)
    text = report(results)
    (options.folder / "report.md").write_text(text)
    print(text)
    return 1 if any(row.verdict == FAIL for rows in results.rows.values() for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
