"""Routes that only some clients ask for: OpenAI's and Open WebUI's lists of models, and Kokoro-FastAPI's speech with word times."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import regex
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from captions import WordCaption
from config import FormatName
from errors import NotFoundError, shorten
from schemas import ResponseModel, SpeechRequest, document_nulls, refusals
from speech_response import AnswerForm
from speech_routes import Service, SpeechService

_MODELS = {
    "csm-1b": {"id": "csm-1b", "object": "model", "created": 1740000000, "owned_by": "sesame"},
    "hibari": {"id": "hibari", "object": "model", "created": 1760000000, "owned_by": "hibari"},
}
# OpenAI's models, with or without a date, and the one of Kokoro's clients.
_FOREIGN_MODEL = regex.compile(r"(?:tts-1(?:-hd)?|gpt-4o-mini-tts)(?:-\d[\d-]{3,9})?|kokoro")

# The types that Kokoro-FastAPI names, which are not all ours.
_TYPES = {"mp3": "audio/mpeg", "opus": "audio/opus", "aac": "audio/aac", "flac": "audio/flac", "wav": "audio/wav", "pcm": "audio/pcm"}
# Kokoro's voices: a letter for the language, one for the gender, and a name; several are mixed with "+", and may have a weight.
_KOKORO_VOICE = regex.compile(r"([a-z])([fm])_[a-z0-9_]+(?:\([0-9.]+\))?(?:[+-].*)?")
_NEAREST = {("a", "m"): "fenrir", ("b", "f"): "emma", ("b", "m"): "hibari-fable"}
_ANY = "heart"


class Model(ResponseModel):
    """A model in OpenAI's form."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(ResponseModel):
    """OpenAI's list of models."""

    object: Literal["list"]
    data: list[Model]


class AudioModel(ResponseModel):
    """A model in Open WebUI's form."""

    id: str


class AudioModelList(ResponseModel):
    """Open WebUI's list of models."""

    models: list[AudioModel]


class NormalizationOptions(BaseModel):
    """Of Kokoro-FastAPI's options, the one that is known here."""

    model_config = ConfigDict(strict=True)

    normalize: bool = True


class CaptionedSpeechRequest(BaseModel):
    """Kokoro-FastAPI's request. Fields that have no meaning here are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, json_schema_extra=document_nulls)

    model: str = Field("kokoro", description="Ignored: the voice decides which model speaks.", max_length=200)
    input: str = Field(description="The text to speak.", min_length=1)
    voice: str = Field("af_heart", description="A voice; Kokoro's other voices are spoken by the nearest built-in voice.", max_length=200)
    response_format: FormatName = "mp3"
    speed: float = Field(1.0, ge=0.25, le=4.0)
    stream: bool = Field(True, description="Send one JSON object a line while the audio is generated; else a single one.")
    return_timestamps: bool = Field(True, description="Send the time of each word.")
    normalization_options: NormalizationOptions = NormalizationOptions()

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: object) -> object:
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body


class WordTimestamp(BaseModel):
    """A word of the input, with its start and end in seconds."""

    word: str
    start_time: float
    end_time: float


class CaptionedSpeech(BaseModel):
    """An answer, or a line of a streamed one: a part of the audio file, and the words whose sentence is complete."""

    audio: str
    audio_format: str
    timestamps: list[WordTimestamp] | None


router = APIRouter(tags=["speech"])


@router.post(
    "/dev/captioned_speech",
    operation_id="createCaptionedSpeech",
    summary="Create speech with word times for Kokoro's clients",
    response_model=CaptionedSpeech,
    responses=refusals(429),
)
async def create_captioned_speech(body: CaptionedSpeechRequest, request: Request, service: Service) -> Response:
    """Speak a text. The answer has the audio in base64 and the time of each word, as Kokoro-FastAPI's does."""
    fields: dict[str, Any] = body.model_dump(include={"model", "input", "response_format", "speed", "stream"})
    if not body.normalization_options.normalize:
        fields["normalize"] = False
    speech = SpeechRequest(**fields, voice=_voice(body.voice, service), timestamps="word")
    return await service.answer(speech, request, _form(_TYPES[body.response_format], body.return_timestamps))


def _voice(name: str, service: SpeechService) -> str:
    """Return a voice that exists: the first of a mixture that is known, else the ready one nearest to Kokoro's."""
    kokoro = _KOKORO_VOICE.fullmatch(name.strip().lower())
    if kokoro is None or service.knows(name):
        return name
    parts = [regex.sub(r"\(.*", "", part).strip() for part in regex.split(r"[+-]", name)]
    candidates = (*parts, _NEAREST.get((kokoro[1], kokoro[2]), _ANY), _ANY)
    return next((candidate for candidate in candidates if service.can_speak(candidate)), "default")


def _form(audio_type: str, timed: bool) -> AnswerForm:
    def answer(audio: bytes, words: Sequence[WordCaption], empty: list[object] | None) -> bytes:
        timestamps = [{"word": word.text, "start_time": word.start, "end_time": word.end} for word in words] if timed else empty
        fields = {"audio": base64.b64encode(audio).decode(), "audio_format": audio_type, "timestamps": timestamps}
        return json.dumps(fields, ensure_ascii=False).encode()

    async def lines(parts: AsyncIterator[tuple[bytes, Sequence[WordCaption]]]) -> AsyncIterator[bytes]:
        async for audio, words in parts:
            yield answer(audio, words, []) + b"\n"

    return AnswerForm("application/json", lambda audio, words: answer(audio, words, None), lines)


@router.get("/audio/models", operation_id="listAudioModels", summary="List models for Open WebUI", response_model=AudioModelList)
async def list_audio_models() -> dict[str, Any]:
    """Return the models in the form that Open WebUI reads."""
    return {"models": [{"id": name} for name in _MODELS]}


@router.get("/models", operation_id="listModels", summary="List models", response_model=ModelList)
async def list_models() -> dict[str, Any]:
    """Return the models in OpenAI's form."""
    return {"object": "list", "data": list(_MODELS.values())}


@router.get("/models/{model}", operation_id="getModel", summary="Get a model", response_model=Model, responses=refusals(404))
async def get_model(model: str) -> dict[str, Any]:
    """Return one model in OpenAI's form. The names of OpenAI's and Kokoro's models are accepted too, as in speech requests: some clients look them up first."""
    if _FOREIGN_MODEL.fullmatch(model):
        return _MODELS["csm-1b"] | {"id": model}
    if model not in _MODELS:
        raise NotFoundError(f"Model {shorten(model)} not found. Models: {', '.join(_MODELS)}.", param="model", code="model_not_found")
    return _MODELS[model]
