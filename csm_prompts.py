"""CSM's voice prompts: each is read, resampled and encoded once, and its codec tokens are kept in memory and on disk."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import logging
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, SimpleNamespace

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_audio.tts.models.sesame import sesame
from numpy.typing import NDArray

from config import Settings
from csm_decoding import PromptTokens
from errors import InternalError, InvalidAudioError
from files import file_signature, write_file
from voice_presets import Voice

logger = logging.getLogger(__name__)

# Counted up whenever what a file in the cache means changes. mlx-audio's version is part of the key, too.
_FORMAT = 1
_PROMPTS_IN_MEMORY = 64  # of at most 750 frames x 32 codebooks x 2 bytes = 48 KB each
_DIGEST_BYTES = 32
_ENCODER_PARTS = ("encoder.", "encoder_transformer.", "downsample.", "quantizer.")

Codes = NDArray[np.int16]
"""A recording as Mimi's tokens, shape (frames, codebooks)."""


@dataclass(frozen=True)
class _Recording:
    """A voice prompt's file and what is said in it.

    Attributes:
        path: The file.
        words: What is said in it.
        speaker: Who says it, where the prompt is a segment of its own.
        built_in: It came with the model.
        added: Somebody added it: its codes, from which it could be heard again, stay in its own folder and are deleted with it.
    """

    path: Path
    words: str
    speaker: int
    built_in: bool
    added: bool = False


class PromptStore:
    """The prompts of the voices that were asked for.

    Args:
        model: mlx_audio.tts.models.sesame.Model.
        settings: For the folder of the cache.
        prompt_folder: Where `<voice_key>.wav` lie, as in the `prompts/` of CSM's repositories.
    """

    def __init__(self, model: sesame.Model, settings: Settings, prompt_folder: Path) -> None:
        self._model = model
        self._prompt_folder = prompt_folder
        self._cache_folder = settings.cache_dir / "prompts"
        self._in_memory: OrderedDict[object, Codes] = OrderedDict()
        self._codec: str | None = None

    def tokens(self, voice: Voice, text: str) -> PromptTokens:
        """What the model is to continue when it says `text` with `voice`: the tokens of stock `generate()`, shape (positions, codebooks + 1).

        Raises:
            InvalidAudioError: The voice's recording cannot be used.
            InternalError: A built-in voice's file is missing.
        """
        preset = voice.preset
        recording = self._recording(voice)
        said = self._audio(self._codes(recording), ends=not preset.voice_match)
        if preset.voice_match:
            parts = [self._text(f"{recording.words} {text}".strip(), preset.speaker_id), said]
        else:
            parts = [self._text(recording.words, recording.speaker), said, self._text(text, preset.speaker_id)]
        tokens, masks = zip(*parts, strict=True)
        return mx.concat(list(tokens), axis=0).astype(mx.int32), mx.concat(list(masks), axis=0).astype(mx.bool_)

    def prepare(self, voice: Voice) -> None:
        """Have the voice's prompt ready in memory; raises as `tokens` does."""
        self._codes(self._recording(voice))

    def _text(self, text: str, speaker: int) -> PromptTokens:
        tokens, mask = self._model._tokenize_text_segment(text, speaker)
        return tokens, mask

    def _audio(self, codes: Codes, *, ends: bool) -> PromptTokens:
        """Frames of codes as the model reads them: in every place but the text's. `ends` adds the frame of zeros that ends a segment."""
        frames = np.vstack([codes, np.zeros((int(ends), codes.shape[1]), codes.dtype)])
        text = np.zeros((len(frames), 1), np.int32)
        tokens = mx.array(np.hstack([frames.astype(np.int32), text]))
        return tokens, mx.broadcast_to(mx.arange(tokens.shape[1]) < codes.shape[1], tokens.shape)

    def _recording(self, voice: Voice) -> _Recording:
        preset = voice.preset
        if preset.ref_audio is not None:
            return _Recording(
                voice.folder / preset.ref_audio, preset.ref_text or "", preset.speaker_id, built_in=False, added=voice.uploaded
            )
        key = preset.voice_key or ""
        return _Recording(self._prompt_folder / f"{key}.wav", self._words_of(key), speaker=0, built_in=True)

    def _words_of(self, voice_key: str) -> str:
        """The words of a built-in prompt: of the `.txt` beside it, else mlx-audio's.

        mlx-audio has them inside a method that asks the hub for the files, so that very method runs here with its look-ups answered from
        the prompt folder, and without reading the audio.
        """

        def look_up(repo_id: str, filename: str) -> str:  # noqa: ARG001 - the hub's signature
            path = self._prompt_folder / Path(filename).name
            if path.suffix == ".txt" and not path.is_file():
                raise FileNotFoundError(filename)
            return str(path)

        method = FunctionType(sesame.Model.default_speaker_prompt.__code__, {**vars(sesame), "hf_hub_download": look_up})
        words_only = SimpleNamespace(prepare_prompt=lambda text, *_: text)
        return str(method(words_only, voice_key, "")[0])

    def _codes(self, recording: _Recording) -> Codes:
        """The recording's codes: from memory, else from the disk, else encoded."""
        try:
            key = (recording.path, file_signature(recording.path))
            codes = self._in_memory.get(key)
            if codes is None:
                codes = self._load_or_encode(recording)
        except OSError as error:
            raise _unreadable(recording) from error
        self._in_memory[key] = codes
        self._in_memory.move_to_end(key)
        while len(self._in_memory) > _PROMPTS_IN_MEMORY:
            self._in_memory.popitem(last=False)
        return codes

    def _load_or_encode(self, recording: _Recording) -> Codes:
        folder = recording.path.parent if recording.added else self._cache_folder
        file = folder / f"{self._key(recording)}.codes"
        codes = self._read(file)
        if codes is None:
            codes = self._encode(recording)
            _write(file, codes, make_folder=not recording.added)
        return codes

    def _key(self, recording: _Recording) -> str:
        """What the codes depend on: the recording's bytes, how they are read, the codec's weights, the code."""
        if self._codec is None:
            self._codec = _codec_identity(self._model._audio_tokenizer)
        content = hashlib.sha256(recording.path.read_bytes()).hexdigest()
        parts = (_FORMAT, importlib.metadata.version("mlx-audio"), self._codec, recording.built_in, content)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _read(self, file: Path) -> Codes | None:
        """The codes in a file of the cache; None when there is none, or none that is whole."""
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
        """Mimi's codes of a recording. The only place where a voice prompt is decoded, resampled or encoded."""
        if recording.built_in:
            audio = self._model.prepare_prompt("", 0, str(recording.path), self._model.sample_rate).audio
        else:
            from recordings import read_recording

            audio = mx.array(read_recording(recording.path))
        codes = np.array(self._model._audio_tokenizer.encode(audio[None, None])[0]).T.astype(np.int16)
        self._model._audio_tokenizer.reset_state()  # it would keep the encoder's caches until the next prompt
        mx.clear_cache()
        return codes


def _unreadable(recording: _Recording) -> Exception:
    if recording.built_in:
        return InternalError(f"The voice prompt {recording.path.stem} is missing from the model's files: load the model again.")
    return InvalidAudioError("The voice's recording cannot be read.", param="voice")


def _codec_identity(mimi: sesame.Mimi) -> str:
    """A digest of all weights that turn audio into codes (0.3 s for Mimi): right whatever file they came from and however it is named."""
    digest = hashlib.sha256()
    for name, value in sorted(dict(tree_flatten(mimi.parameters())).items()):
        if name.startswith(_ENCODER_PARTS):
            digest.update(f"{name} {value.dtype} {value.shape}".encode())
            digest.update(np.array(value.view(mx.uint8)).tobytes())
    return digest.hexdigest()


def _write(file: Path, codes: Codes, *, make_folder: bool) -> None:
    """Put codes into the cache, at once or not at all. A folder that cannot be written to only costs the next start its time."""
    payload = io.BytesIO()
    np.save(payload, codes, allow_pickle=False)
    data = payload.getvalue()
    try:
        if make_folder:  # an added voice's has been there, and must not come back when it was deleted meanwhile
            file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, hashlib.sha256(data).digest() + data)
    except OSError as error:
        logger.warning("the prompt cache cannot be written: %s", error.strerror)
