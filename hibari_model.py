"""The built-in voices: hibari. Its wheel contains the voice heart; the files of the others are downloaded once."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import re
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import regex
from numpy.typing import NDArray

from audio_formats import SAMPLE_RATE, Samples
from speech_model import LoadProgress, ModelLoadError, SegmentChunk, SegmentLengths, SpeechOptions, SpokenWord
from voice_presets import Voice

if TYPE_CHECKING:
    from hibari import Hibari
    from onnxruntime import InferenceSession

logger = logging.getLogger(__name__)

_BUNDLED = "heart"
_REPO = "maureesewilliams/hibari"  # of hibari's author, as in hibari.voices
_FIRST_RETRY_SECONDS = 30.0
_LONGEST_RETRY_SECONDS = 1800.0

# hibari reads Greek and Cyrillic by the names of the letters, and skips those of other scripts.
_UNKNOWN_LETTER = regex.compile(r"[\p{L}--[\p{Latin}\p{Common}μΩπ]]", regex.V1)
# A word with its phonemes, as hibari takes it, is left as it is.
_ACCENTED_WORD = regex.compile(
    r"\[[^\]]*\]\(/[^)]*/\)(*SKIP)(*FAIL)|[\p{Latin}\p{M}'’]*[[\p{Latin}]--[A-Za-z]][\p{Latin}\p{M}'’]*", regex.V1
)
# Its table takes a word at a sentence's end for an abbreviation.
_NO = re.compile(r"\b([Nn]os?)\.(?!\s?\d)")
# Names that neither its lexicon nor its spelling rules get right, in its phonemes.
_NAMES = {
    "José": "hOzˈA",
    "Beyoncé": "biˈɑnsA",
    "Dvořák": "dvˈɔɹʒɑk",
    "Łódź": "wˈʊʧ",
    "São": "sˈW",
    "Zoë": "zˈOi",
    "Chloë": "klˈOi",
    "Renée": "ɹənˈA",
    "André": "ˈɑndɹA",
    "Curaçao": "kjˈʊɹəsW",
}
_DURATIONS = "/Round_output_0"  # the network's inner value: the length of each phoneme
_FRAME_SECONDS = 600 / SAMPLE_RATE
_FIRST_FRAMES = 80  # of the spectrum, of 300 samples each
_SILENT = frozenset(';:,.!?—…"“”()')
_WORD = re.compile(r"\S+")
_NUMBER = re.compile(r"\d[\d,]*")
_LONGEST_NUMBER = 36  # digits: hibari has words up to decillions
# Its time for a word with signs grows with the cube of their number, and nothing can interrupt it within a part or a block.
_LONG_WORD = re.compile(r"\S{41,}")
_LONGEST_LINK = 100
_WORD_PART = re.compile(r".{1,40}")
_PART = re.compile(r"\s*(.{1,500}$|.{1,500}(?=\s)|.{1,500})", re.DOTALL)
# What the network speaks at once: up to 320 phonemes, to a clause's end or else to a space. hibari's own `phonemize` cuts at 400, and leaves
# whole what has no comma.
_BLOCK = re.compile(r"\s*(.{1,320}$|.{1,320}(?<=[,;:—])(?=\s)|.{1,320}(?=\s)|.{1,320})")


class VoiceFiles:
    """The files of hibari's voices: in the package, in hibari's own folder, or in ours, to which missing ones are downloaded.

    hibari's registry has the size and the SHA-256 of each. Thread-safe.

    Args:
        folder: Ours. A file in it is named by its SHA-256. None: nothing is downloaded.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._faults: dict[str, str] = {}
        self._wake = threading.Event()
        self._closed = False

    def pending(self, key: str) -> bool:
        """Return whether a voice's file is missing and no attempt to download it has failed yet."""
        return self.missing(key) is not None and key not in self._faults

    def missing(self, key: str) -> str | None:
        """Return why a voice cannot be loaded: its file is not here. None if it is."""
        if any(path.is_file() for path in self._places(key)):
            return None
        return f"is not downloaded: {self._faults.get(key, 'the download of its file (8 MB) has not finished.')}"

    def read(self, key: str) -> bytes:
        """Return the content of a voice's file.

        Raises:
            ModelLoadError: The file is missing or damaged.
        """
        for path in self._places(key):
            if path.is_file():
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() == _registered(key)["sha256"]:
                    return content
                if path.parent == self._folder:
                    path.unlink(missing_ok=True)
                logger.warning("the file of the voice %s in %s is damaged", key, path.parent.name)
        raise ModelLoadError(f"Voice '{key}' {self.missing(key) or 'has a damaged file: delete it from the folder of hibari.'}")

    def fetch(self, keys: Iterable[str]) -> bool:
        """Download the files that are missing; return whether all are here now. A hub that does not answer is asked for one file only."""
        missing = [key for key in keys if self.missing(key)]
        for index in range(len(missing)):
            if self._folder is None or self._closed or not self._fetch(missing[index:], self._folder):
                break
        return not any(self.missing(key) for key in missing)

    def keep_fetching(self, keys: Callable[[], Iterable[str]]) -> None:
        """Download the files in the background until `close`, and try again after a failure: the pauses grow."""
        # A daemon: the program's end must not wait for the network.
        threading.Thread(target=self._keep_fetching, args=(keys,), name="voice-downloads", daemon=True).start()

    def fetch_again(self) -> None:
        """End the pause after a failed download."""
        self._wake.set()

    def close(self) -> None:
        """End the downloads in the background."""
        self._closed = True
        self._wake.set()

    def _keep_fetching(self, keys: Callable[[], Iterable[str]]) -> None:
        pause = _FIRST_RETRY_SECONDS
        while not self._closed:
            self._wake.clear()
            complete = self.fetch(tuple(keys()))
            self._wake.wait(_LONGEST_RETRY_SECONDS if complete else pause)
            pause = min(2 * pause, _LONGEST_RETRY_SECONDS)

    def _fetch(self, keys: Sequence[str], folder: Path) -> bool:
        """Download the file of the first voice; return False after a fault that all of `keys` share: there is no network."""
        from huggingface_hub import constants

        from csm_files import HubUnreachableError, download_file

        if constants.is_offline_mode():
            self._faults |= dict.fromkeys(keys, "HF_HUB_OFFLINE is set.")
            return False
        key, about = keys[0], _registered(keys[0])
        logger.info("voice %s: downloading %.1f MB", key, about["bytes"] / 1e6)
        try:
            download_file(_REPO, f"voices/{about['file']}", about["bytes"], about["sha256"], folder)
        except HubUnreachableError as error:
            cause = type(error.__cause__).__name__
            self._fail(keys, f"the hub cannot be reached ({cause}): check the network, or HF_ENDPOINT. The server tries again by itself.")
            return False
        except ModelLoadError as error:
            self._fail([key], error.message)
        except Exception as error:
            self._faults[key] = f"unexpected error ({type(error).__name__}). See the server's log."
            logger.exception("voice %s: unexpected error during the download", key)
        else:
            logger.info("voice %s: downloaded", key)
        return True

    def _fail(self, keys: Sequence[str], fault: str) -> None:
        """Keep the fault of the last attempt. A warning says so once: a machine without a network asks again every half an hour."""
        known = all(self._faults.get(key) == fault for key in keys)
        self._faults |= dict.fromkeys(keys, fault)
        logger.log(logging.DEBUG if known else logging.WARNING, "%s %s: %s", "voices" if keys[1:] else "voice", ", ".join(keys), fault)

    def _places(self, key: str) -> list[Path]:
        from hibari import voices

        about = _registered(key)
        if about["bundled"]:
            return [Path(voices.ASSETS, about["file"])]
        ours = [self._folder / about["sha256"]] if self._folder else []
        return [*ours, Path(voices.cache_dir(), about["file"])]


@cache
def _package_version() -> str:
    return importlib.metadata.version("hibari-tts")  # reads a file of the package: 0.6 ms


def _registered(key: str) -> dict[str, Any]:
    from hibari.voices import VOICES

    about: dict[str, Any] = VOICES[key]
    return about


class HibariModel:
    """hibari as a `SpeechModel`. Each voice is a network of its own of 40 MB, loaded when it speaks for the first time.

    Args:
        files: The voices' files; None: those in the package and in hibari's own folder.
    """

    id = "hibari"
    sample_rate = SAMPLE_RATE
    takes_phonemes = True
    takes_turns = True
    takes_context = False
    # One sentence a segment: hibari speaks sentence by sentence anyway, in about 50 ms each. Splitting a long sentence before
    # `_BLOCK` does keeps our own pauses.
    segment_lengths = SegmentLengths(target=1, maximum=320, first=1)

    def __init__(self, files: VoiceFiles | None = None) -> None:
        self._files = files or VoiceFiles()
        self._voices: dict[str, Hibari] = {}
        self._used: dict[str, float] = {}  # when each voice spoke last, as time.monotonic
        self._pronunciations: dict[bool, Pronunciation] = {}  # text to phonemes, British or American: shared by the voices

    def load(self, report: Callable[[LoadProgress], None]) -> None:
        """Load the voice heart and the lexicons from the package (0.3 s).

        Raises:
            ModelLoadError: The package is damaged or missing.
        """
        report(LoadProgress("loading the built-in voice"))
        # onnxruntime 1.32 starts a telemetry session in every process unless this is set.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        try:
            self._voice(_BUNDLED)
        except Exception as error:
            raise ModelLoadError(
                f"The built-in voice could not be loaded ({type(error).__name__}): install the pinned packages again with `make setup`.",
                retry=False,
            ) from error

    def warm_up(self, voices: Sequence[Voice]) -> None:
        """Speak one word: hibari loads its lexicons and its tagger with the first one."""
        self._voice(_BUNDLED)("Hello.")

    def refusal(self, text: str) -> str | None:
        """Refuse a text with letters that hibari cannot pronounce: it would skip them silently."""
        letter = _UNKNOWN_LETTER.search(text)
        if letter is None:
            return None
        script = unicodedata.name(letter[0], "unknown").split()[0].capitalize().replace("Cjk", "Chinese")
        return f"this voice speaks English and cannot pronounce {script} letters. Remove them, write them in Latin letters, or use another model's voice."

    def unavailable(self, voice: Voice) -> str | None:
        """Return why this voice cannot speak: its file has not been downloaded."""
        return None if _key(voice) in self._voices else self._files.missing(_key(voice))

    def fits(self, text: str, voice: Voice) -> bool:
        """Return True: hibari has no context limit."""
        return True

    def speak(self, segments: Sequence[str], voice: Voice, options: SpeechOptions, cancelled: Callable[[], bool]) -> Iterator[SegmentChunk]:
        """Speak each segment; the utterance's seed and the segment's index seed the voice's noise."""
        hibari, pronunciation = self._voice(_key(voice)), self._pronunciation(_key(voice))
        for index, segment in enumerate(segments):
            pronunciation.verbalized = options.verbalize is True
            hibari.g2p.tokens.clear()
            hibari.sess.runs.clear()
            noise = np.random.default_rng([options.seed, index])
            for part in _parts(hibari, segment):
                for phonemes in _BLOCK.findall(hibari.g2p(part)):
                    if cancelled():
                        return
                    for samples in _sound(hibari, phonemes, noise):
                        yield SegmentChunk(index, samples, last=False)
                        if cancelled():
                            return
            yield SegmentChunk(
                index, np.zeros(0, np.float32), last=True, words=_word_times(segment, hibari.g2p.tokens, hibari.sess, hibari.vocab)
            )

    def info(self) -> dict[str, Any]:
        """Return details for `/health`."""
        return {"source": f"hibari-tts {_package_version()}", "dtype": "int8", "sample_rate": self.sample_rate, "watermark": False}

    def free_idle(self, seconds: float) -> bool:
        """Free the downloaded voices that have not spoken for `seconds`; return whether there were any."""
        now = time.monotonic()
        idle = [key for key in self._voices if key != _BUNDLED and now - self._used[key] >= seconds]
        for key in idle:
            del self._voices[key]
            logger.info("voice %s: unloaded after %.0f s without work", key, now - self._used[key])
        if not any(_registered(key)["british"] for key in self._voices):
            self._pronunciations.pop(True, None)
        return bool(idle)

    def close(self) -> None:
        """Free all voices."""
        self._voices.clear()
        self._pronunciations.clear()

    def _voice(self, key: str) -> Hibari:
        """Return a voice, loaded if it is not.

        Raises:
            ModelLoadError: Its file is missing or damaged.
        """
        self._used[key] = time.monotonic()
        if key not in self._voices:
            self._voices[key] = self._load_voice(key)
        return self._voices[key]

    def _load_voice(self, key: str) -> Hibari:
        from hibari import Hibari

        voice = Hibari(key, model=_with_durations(self._files.read(key)), g2p=self._pronunciation(key))
        voice.model_path = voice.sess._model_bytes = None  # the content, 8 MB: onnxruntime has its own copy, and would need it for a GPU
        voice.sess = _TimedSession(voice.sess)
        return voice

    def _pronunciation(self, key: str) -> Pronunciation:
        british = bool(_registered(key)["british"])
        if british not in self._pronunciations:
            self._pronunciations[british] = Pronunciation(british=british)
        return self._pronunciations[british]


def _key(voice: Voice) -> str:
    return voice.preset.voice_key or _BUNDLED


class Pronunciation:
    """hibari's text to phonemes, shared by the voices of one accent.

    Args:
        british: British English, else American.

    Attributes:
        verbalized: The text is in words already, so hibari's own reading of numbers and abbreviations, which mistakes words for them, is off.
        tokens: hibari's tokens of the sentences so far, with their phonemes. The caller clears them.
    """

    def __init__(self, *, british: bool) -> None:
        self.verbalized = False
        self.tokens: list[Any] = []
        self._british = british
        self._g2p: Any = None

    def __call__(self, text: str) -> str:
        """Return the phonemes of a sentence."""
        if self._g2p is None:
            from hibari.g2p import G2P

            self._g2p = G2P(british=self._british)
        if self.verbalized:
            text = _ACCENTED_WORD.sub(lambda word: self._accented(word[0]), " ".join(text.split()))
        else:
            from hibari.g2p.normalize import normalize

            text = normalize(_NO.sub(r"\1 .", text))
        # As hibari's own G2P.__call__, which does not return the tokens.
        tokens = self._g2p.phonemize_tokens(self._g2p.tokenize(text))
        self.tokens += tokens
        return "".join((token.phonemes or "") + (" " if token.whitespace else "") for token in tokens).strip()

    def _accented(self, word: str) -> str:
        """Return a word with accents as hibari says it best: from our table, or without accents where only that is in its lexicon."""
        if word in _NAMES:
            return f"[{word}](/{_NAMES[word]}/)"
        plain = "".join(sign for sign in unicodedata.normalize("NFKD", word) if not unicodedata.combining(sign))
        lexicon = self._g2p.lexicon
        known = [form in lexicon.golds or form in lexicon.silvers for form in (word, word.lower(), plain, plain.lower())]
        return plain if plain.isascii() and not any(known[:2]) and any(known[2:]) else word


class _TimedSession:
    """A voice's network with one more output, the length of each phoneme.

    Attributes:
        runs: The phoneme ids and their lengths in frames, of each call so far. The caller clears them.
    """

    def __init__(self, session: InferenceSession) -> None:
        self._session = session
        self.runs: list[tuple[list[int], list[float]]] = []

    def run(self, names: None, inputs: dict[str, Any]) -> list[Any]:
        """Return the outputs that hibari knows."""
        outputs = list(self._session.run(names, inputs))
        if self._session.get_outputs()[-1].name == _DURATIONS:
            self.runs.append((inputs["ids"][0].tolist(), outputs.pop().reshape(-1).tolist()))
        return outputs


def _with_durations(model: bytes) -> bytes:
    """Return an ONNX model whose inner value `_DURATIONS` is an output too; unchanged if it has no such value.

    Protobuf joins repeated fields of messages that follow each other: field 7 of a model is the graph, field 12 of a graph an output, field
    1 of an output its name.
    """
    name = _DURATIONS.encode()
    if name not in model:
        return model
    output = b"\x0a" + bytes([len(name)]) + name
    graph = b"\x62" + bytes([len(output)]) + output
    return model + b"\x3a" + bytes([len(graph)]) + graph


def _sound(hibari: Hibari, phonemes: str, noise: np.random.Generator) -> Iterator[Samples]:
    """Yield the samples of a block of phonemes: a second, then twice as much each time.

    `Hibari.from_phonemes` with other random numbers for the noise. It takes a third of its time to make the samples of the network's outputs.
    Here the first second needs little of that, and players and encoders work while the rest is made.
    """
    from hibari import dsp

    ids = np.asarray([hibari.ids(phonemes)], np.int64)
    if ids.size < 3:  # nothing between the two ends
        return
    *spectra, pitch = (output[0] for output in hibari.sess.run(None, {"ids": ids, "speed": np.ones(1, np.float32)}))
    hops = dsp.N_FFT // dsp.HOP
    squares = (dsp.WIN**2).reshape(hops, dsp.HOP)
    pulses = np.pad(dsp.pulses(pitch), dsp.N_FFT // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(pulses, dsp.N_FFT)[:: dsp.HOP]
    # The windows overlap: what those so far add to the samples after the last complete ones, and the sums of their squares, to divide by.
    sums = weights = np.zeros((hops - 1, dsp.HOP), np.float32)
    start = end = 0
    while end < pitch.size:
        start, end = end, min(2 * end + _FIRST_FRAMES, pitch.size)
        count = end - start
        spectrum = _spectrum(windows[start:end], [part[:, start:end].T for part in spectra], noise)
        pieces = (dsp.irfft(spectrum, dsp.N_FFT, 1) * dsp.WIN).reshape(count, hops, dsp.HOP)
        room = np.zeros((count, dsp.HOP), np.float32)
        sums, weights = np.concatenate([sums, room]), np.concatenate([weights, room])
        for hop in range(hops):
            sums[hop : hop + count] += pieces[:, hop]
            weights[hop : hop + count] += squares[hop]
        # The first window's middle is the first sample, and the last window's middle the end of the last frame.
        complete = slice(0 if start else hops // 2, count + (hops // 2 if end == pitch.size else 0))
        yield (sums[complete] / np.maximum(weights[complete], 1e-11)).reshape(-1)
        sums, weights = sums[count:], weights[count:]


def _spectrum(windows: Samples, spectra: Sequence[Samples], noise: np.random.Generator) -> NDArray[np.complex64]:
    """Return the spectrum of some frames, shape (frames, bins): filtered pulses, noise, and a part of its own phase (see `hibari.dsp`).

    Args:
        windows: The pulses that each frame sees, shape (frames, samples).
        spectra: The network's outputs, each of shape (frames, bins): size and phase of the filter, of the noise the size, and of the third
            part size and phase. All sizes are logarithms.
        noise: Gives the random numbers.
    """
    from hibari import dsp

    size, turn, noise_size, own_size, own_phase = spectra
    spectrum: NDArray[np.complex64] = dsp.rfft(windows * dsp.WIN_SRC, 1)
    spectrum *= _polar(dsp.ex(size), np.tanh(turn) * np.float32(np.pi))
    # Complex normal numbers by their size and phase (Box and Muller, 1958): half of the time of NumPy's own for the two parts.
    uniform, turns = noise.random((2, *spectrum.shape), dtype=np.float32)
    spectrum += _polar(dsp.ex(noise_size) * np.sqrt(-2 * np.log(1 - uniform)), turns * np.float32(2 * np.pi))
    spectrum += _polar(dsp.ex(own_size), own_phase)
    return spectrum


def _polar(size: Samples, phase: Samples) -> NDArray[np.complex64]:
    numbers = np.empty(size.shape, np.complex64)
    np.cos(phase, out=numbers.real)
    np.sin(phase, out=numbers.imag)
    numbers *= size
    return numbers


def _word_times(segment: str, tokens: Sequence[Any], session: _TimedSession, vocabulary: Mapping[str, int]) -> tuple[SpokenWord, ...]:
    """Return when each word of a segment is heard; nothing if the network does not tell.

    Args:
        segment: The text.
        tokens: hibari's tokens of the text, with their phonemes.
        session: The calls for this segment.
        vocabulary: The id of each phoneme.
    """
    spans = _phoneme_spans(session.runs, {number: sign for sign, number in vocabulary.items()})
    letters, times = "", []  # the tokens' letters, and the time of the token that each belongs to
    position = 0
    for token in tokens:
        count = sum(sign in vocabulary for sign in (token.phonemes or "") if sign != " ")
        heard = [(start, end) for sign, start, end in spans[position : position + count] if sign not in _SILENT]
        position += count
        folded = _folded(token.text)[0]
        if heard:
            letters += folded
            times += [(heard[0][0], heard[-1][1])] * len(folded)
    return _times_of_words(segment, letters, times) if position == len(spans) else ()


def _phoneme_spans(runs: Sequence[tuple[list[int], list[float]]], signs: Mapping[int, str]) -> list[tuple[str, float, float]]:
    """Return each phoneme other than a space with its start and end in seconds.

    The space between two words that are spoken without a pause belongs to the end of the first: a recogniser's word ends are met best so.
    """
    spans: list[tuple[str, float, float]] = []
    now = 0.0
    for ids, frames in runs:
        for number, (identifier, length) in enumerate(zip(ids, frames, strict=True)):
            end = now + length * _FRAME_SECONDS
            if 0 < number < len(ids) - 1:
                if signs[identifier] != " ":
                    spans.append((signs[identifier], now, end))
                elif spans and spans[-1][0] not in _SILENT:
                    spans[-1] = (*spans[-1][:2], end)
            now = end
    return spans


def _times_of_words(segment: str, letters: str, times: Sequence[tuple[float, float]]) -> tuple[SpokenWord, ...]:
    """Return the words of `segment`, by the times of the letters that were spoken. Words without any are left out."""
    written, places = _folded(segment)
    when: dict[int, tuple[float, float]] = {}
    for _, a, a_end, b, b_end in SequenceMatcher(None, written, letters, autojunk=False).get_opcodes():
        if b_end > b:  # what hibari read in other letters ("2" as "second") is spread over the written ones
            when.update({places[place]: times[b + (place - a) * (b_end - b) // (a_end - a)] for place in range(a, a_end)})
    words = []
    for match in _WORD.finditer(segment):
        heard = [when[place] for place in range(*match.span()) if place in when]
        if heard:
            words.append(SpokenWord(*match.span(), heard[0][0], heard[-1][1]))
    return tuple(words)


def _folded(text: str) -> tuple[str, list[int]]:
    """Return the letters and digits of `text`, without case and accents, and the offset of each."""
    pairs = [
        (sign, place) for place, letter in enumerate(text) for sign in unicodedata.normalize("NFKD", letter).casefold() if sign.isalnum()
    ]
    return "".join(sign for sign, _ in pairs), [place for _, place in pairs]


def _parts(hibari: Hibari, text: str) -> Iterator[str]:
    """Yield the sentences of a text, those that are too long in parts."""
    for sentence in hibari.split_sentences(_speakable(text)):
        yield from _PART.findall(_LONG_WORD.sub(lambda word: _shorter(word[0]), sentence))


def _shorter(word: str) -> str:
    """Return a word cut into parts by spaces, unless it is in lower case or has its phonemes beside it."""
    whole = (word.isalpha() and word[1:].islower()) or ("](/" in word and len(word) <= _LONGEST_LINK)
    return word if whole else " ".join(_WORD_PART.findall(word))


def _speakable(text: str) -> str:
    """Replace what makes hibari 0.2.1 raise: circled, superscript and subscript digits, and numbers that it has no word for."""
    plain = "".join(str(unicodedata.digit(sign)) if sign.isdigit() and not sign.isdecimal() else sign for sign in text)
    return _NUMBER.sub(lambda number: _spelled(number[0]), plain)


def _spelled(number: str) -> str:
    digits = number.replace(",", "")
    return number if len(digits) <= _LONGEST_NUMBER else " ".join(digits)
