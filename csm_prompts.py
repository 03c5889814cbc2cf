"""Encodes CSM's voice prompts, each once, and keeps their codec tokens in memory and on disk."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_audio.tts.models.sesame import sesame

from audio_formats import Samples
from config import Settings
from csm_decoding import PromptTokens
from errors import InternalError, InvalidAudioError
from files import FileSignature, file_signature, write_file
from speech_model import CODEC_FRAMES_PER_SECOND, Codes, ContextPart
from voice_presets import Voice

logger = logging.getLogger(__name__)

# Increased whenever the meaning of a file in the cache changes. mlx-audio's version is part of the key, too.
_FORMAT = 1
_PROMPTS_IN_MEMORY = 64  # of at most 750 frames x 32 codebooks x 2 bytes = 48 KB each
_DIGEST_BYTES = 32
_ENCODER_PARTS = ("encoder.", "encoder_transformer.", "downsample.", "quantizer.")

# The transcripts of the two prompts that come with CSM's weights, as in mlx-audio 0.6.2 (which has them inside a method that asks the hub
# for files). A `.txt` file beside the recording takes precedence there and here.
TRANSCRIPTS = {
    "conversational_a": (
        "like revising for an exam I'd have to try and like keep up the momentum because I'd start really early I'd be like okay I'm gonna "
        "start revising now and then like you're revising for ages and then I just like start losing steam I didn't do that for the exam we "
        "had recently to be fair that was a more of a last minute scenario but like yeah I'm trying to like yeah I noticed this yesterday "
        "that like Mondays I sort of start the day with this not like a panic but like a"
    ),
    "conversational_b": (
        "like a super Mario level. Like it's very like high detail. And like, once you get into the park, it just like, everything looks "
        "like a computer game and they have all these, like, you know, if, if there's like a, you know, like in a Mario game, they will "
        "have like a question block. And if you like, you know, punch it, a coin will come out. So like everyone, when they come into the "
        "park, they get like this little bracelet and then you can go punching question blocks around."
    ),
}


@dataclass(frozen=True)
class _Recording:
    """A voice prompt's file and its transcript."""

    path: Path
    transcript: str
    built_in: bool  # it came with the model
    added: bool = False  # by a user: its codes, which can be decoded to speech, stay in its own folder and are deleted with it


class PromptStore:
    """Makes voice prompts from recordings, and caches their codes.

    Args:
        model: The loaded CSM.
        settings: Only `cache_dir` is used.
        prompt_folder: Has `<voice_key>.wav`, as the `prompts/` of CSM's repositories.
    """

    def __init__(self, model: sesame.Model, settings: Settings, prompt_folder: Path) -> None:
        self._model = model
        self._prompt_folder = prompt_folder
        self._cache_folder = settings.cache_dir / "prompts"
        self._in_memory: OrderedDict[tuple[Path, FileSignature | None], Codes] = OrderedDict()
        self._codec: str | None = None

    def tokens(self, voice: Voice, text: str) -> PromptTokens:
        """Return the prompt with which the model says `text` in `voice`: the same tokens as in stock `generate()` with a labelled prompt.

        Raises:
            InvalidAudioError: The voice's recording cannot be used.
            InternalError: A built-in voice's file is missing.
        """
        preset = voice.preset
        alone = self.alone(voice)
        if alone is not None:
            return joined(alone, self._text(text, preset.speaker_id))
        recording = self._recording(voice)
        audio = self._audio(self._codes(recording), ends=False)
        return joined(self._text(f"{recording.transcript} {text}".strip(), preset.speaker_id), audio)

    def alone(self, voice: Voice) -> PromptTokens | None:
        """Return the part of the prompt that no text changes: with `voice_match: false` a segment of its own; None without such a part.

        The segment has the voice's own speaker number. mlx-audio labels its built-in prompts 0 and the text with the voice's number.
        """
        return None if voice.preset.voice_match else self._segment(voice)

    def segments(self, voice: Voice, context: Sequence[ContextPart]) -> list[PromptTokens]:
        """Return the prompt of a conversation without the new text: the voice's recording and what was said, each a segment of its own.

        With the new text's `text`, they are the tokens of stock `generate(context=[Segment…], voice_match=False)`.
        """
        said = (joined(self._text(part.text, part.speaker), self._audio(part.codes, ends=True)) for part in context)
        return [self._segment(voice), *said]

    def text(self, voice: Voice, text: str) -> PromptTokens:
        """Return a text that the voice is to speak, after `segments`."""
        return self._text(text, voice.preset.speaker_id)

    def encode(self, samples: Samples) -> Codes:
        """Return Mimi's codes of samples at 24 kHz."""
        return self._encoded(mx.array(samples))

    def _segment(self, voice: Voice) -> PromptTokens:
        recording = self._recording(voice)
        return joined(self._text(recording.transcript, voice.preset.speaker_id), self._audio(self._codes(recording), ends=True))

    def reading(self, voice: Voice) -> tuple[str, float]:
        """Return the words of the voice's recording, and its length in seconds."""
        recording = self._recording(voice)
        return recording.transcript, len(self._codes(recording)) / CODEC_FRAMES_PER_SECOND

    def _text(self, text: str, speaker: int) -> PromptTokens:
        tokens, mask = self._model._tokenize_text_segment(text, speaker)
        return tokens, mask

    def _audio(self, codes: Codes, *, ends: bool) -> PromptTokens:
        """Return frames of codes as prompt tokens: the last column is the text's, and empty. `ends` adds the zero frame that ends a segment."""
        frames = np.vstack([codes, np.zeros((int(ends), codes.shape[1]), codes.dtype)])
        text = np.zeros((len(frames), 1), np.int32)
        tokens = mx.array(np.hstack([frames.astype(np.int32), text]))
        return tokens, mx.broadcast_to(mx.arange(tokens.shape[1]) < codes.shape[1], tokens.shape)

    def _recording(self, voice: Voice) -> _Recording:
        preset = voice.preset
        if preset.ref_audio is not None:
            return _Recording(voice.folder / preset.ref_audio, preset.ref_text or "", built_in=False, added=voice.uploaded)
        key = preset.voice_key or ""
        return _Recording(self._prompt_folder / f"{key}.wav", self._transcript(key), built_in=True)

    def _transcript(self, voice_key: str) -> str:
        file = self._prompt_folder / f"{voice_key}.txt"
        return file.read_text(encoding="utf-8") if file.is_file() else TRANSCRIPTS[voice_key]

    def _codes(self, recording: _Recording) -> Codes:
        """Return the recording's codes: from memory, from the disk, or encoded now."""
        try:
            key = (recording.path, file_signature(recording.path))
            codes = self._in_memory.get(key)
            if codes is None:
                codes = self._load_or_encode(recording)
        except FileNotFoundError as error:
            return self._deleted(recording, error)
        except OSError as error:
            raise _unreadable(recording) from error
        self._in_memory[key] = codes
        self._in_memory.move_to_end(key)
        while len(self._in_memory) > _PROMPTS_IN_MEMORY:
            self._in_memory.popitem(last=False)
        return codes

    def _deleted(self, recording: _Recording, error: FileNotFoundError) -> Codes:
        """Return the codes of a voice that was deleted while a request speaks with it: its later segments need them, too."""
        for (path, _), codes in reversed(self._in_memory.items()):
            if path == recording.path:
                return codes
        raise _unreadable(recording) from error

    def _load_or_encode(self, recording: _Recording) -> Codes:
        folder = recording.path.parent if recording.added else self._cache_folder
        file = folder / f"{self._key(recording)}.codes"
        codes = self._read(file)
        if codes is None:
            codes = self._encode(recording)
            _write(file, codes, make_folder=not recording.added)
        return codes

    def _key(self, recording: _Recording) -> str:
        """Return a digest of everything that the codes depend on: the recording's bytes, how they are read, the codec's weights, the code."""
        if self._codec is None:
            self._codec = _codec_identity(self._model._audio_tokenizer)
        content = hashlib.sha256(recording.path.read_bytes()).hexdigest()
        parts = (_FORMAT, importlib.metadata.version("mlx-audio"), self._codec, recording.built_in, content)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _read(self, file: Path) -> Codes | None:
        """Return the codes in a file of the cache; None if it is missing, unreadable or damaged."""
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("the prompt cache cannot be read: %s", error.strerror)
            return None
        digest, payload = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            logger.warning("a file of the prompt cache is damaged; the voice prompt is encoded again")
            return None
        codes: Codes = np.load(io.BytesIO(payload), allow_pickle=False)
        return codes

    def _encode(self, recording: _Recording) -> Codes:
        """Return Mimi's codes of a recording. Nothing else decodes, resamples or encodes a voice prompt."""
        if recording.built_in:
            audio = self._model.prepare_prompt("", 0, str(recording.path), self._model.sample_rate).audio
        else:
            from recordings import read_recording

            audio = mx.array(read_recording(recording.path))
        return self._encoded(audio)

    def _encoded(self, audio: mx.array) -> Codes:
        codes = np.array(self._model._audio_tokenizer.encode(audio[None, None])[0]).T.astype(np.int16)
        self._model._audio_tokenizer.reset_state()  # else it keeps the encoder's caches until the next prompt
        mx.clear_cache()
        return codes


def joined(*parts: PromptTokens) -> PromptTokens:
    """Return prompts as one."""
    tokens, masks = zip(*parts, strict=True)
    return mx.concat(list(tokens), axis=0).astype(mx.int32), mx.concat(list(masks), axis=0).astype(mx.bool_)


def _unreadable(recording: _Recording) -> Exception:
    if recording.built_in:
        return InternalError(f"The voice prompt {recording.path.stem} is missing from the model's files: load the model again.")
    return InvalidAudioError("The voice's recording cannot be read.", param="voice")


def _codec_identity(mimi: sesame.Mimi) -> str:
    """Return a digest of all weights that turn audio into codes, whatever file they came from (takes 0.3 s for Mimi)."""
    digest = hashlib.sha256()
    for name, value in sorted(dict(tree_flatten(mimi.parameters())).items()):
        if name.startswith(_ENCODER_PARTS):
            digest.update(f"{name} {value.dtype} {value.shape}".encode())
            digest.update(np.array(value.view(mx.uint8)).tobytes())
    return digest.hexdigest()


def _write(file: Path, codes: Codes, *, make_folder: bool) -> None:
    """Write codes into the cache, atomically. If that fails, they are encoded again at the next start."""
    payload = io.BytesIO()
    np.save(payload, codes, allow_pickle=False)
    data = payload.getvalue()
    try:
        if make_folder:  # not for an added voice, whose folder may have been deleted meanwhile
            file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, hashlib.sha256(data).digest() + data)
    except OSError as error:
        logger.warning("the prompt cache cannot be written: %s", error.strerror)
