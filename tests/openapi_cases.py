"""Hooks for the OpenAPI fuzzing: they put existing voices and readable recordings into requests, so that some of them succeed."""

from __future__ import annotations

import io
from itertools import count
from typing import Any

import numpy as np
import schemathesis
import soundfile
from hypothesis import strategies as st
from schemathesis import GenerationMode


def _recording() -> bytes:
    """Return 1.5 s of a tone as WAV."""
    seconds = np.arange(36_000) / 24_000
    samples = (8000 * np.sin(2 * np.pi * 220 * seconds) * (1 + np.sin(2 * np.pi * 3 * seconds)) / 2).astype("<i2")
    file = io.BytesIO()
    soundfile.write(file, samples, 24_000, format="WAV")
    return file.getvalue()


# test_voice_routes.py tests uploads that are not recordings.
schemathesis.openapi.format("binary", st.just(_recording()))


@schemathesis.hook  # type: ignore[untyped-decorator]
def map_body(context: Any, body: Any) -> Any:
    """Use an existing voice for every text of odd length."""
    if isinstance(body, dict) and isinstance(body.get("input"), str) and isinstance(body.get("voice"), str) and len(body["input"]) % 2:
        return body | {"voice": "heart"}
    return body


@schemathesis.hook  # type: ignore[untyped-decorator]
def filter_body(context: Any, body: Any) -> bool:
    """Leave out forms with values that are not texts: they would be sent as texts, and "null" or "5" are valid names."""
    is_form = context.operation is not None and context.operation.path.endswith("/audio/voices")
    return not (is_form and isinstance(body, dict) and any(not isinstance(value, str | bytes) for value in body.values()))


_unwritten = count()


@schemathesis.hook  # type: ignore[untyped-decorator]
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Change what the server would answer correctly, but at a cost or in a form that the document cannot describe."""
    _write_words(case)
    _complete_captions(case)


def _write_words(case: Any) -> None:
    """Give most valid recordings their words: the server's recogniser listens to those without for most of a second."""
    is_valid = case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE
    is_voice = case.operation.path.endswith("/audio/voices") and isinstance(case.body, dict)
    if is_valid and is_voice and "ref_text" not in case.body and next(_unwritten) > 1:
        case.body = case.body | {"ref_text": "hm, hm."}


def _complete_captions(case: Any) -> None:
    """Ask for complete captioned speech: a stream has one JSON object a line but is called JSON, as Kokoro-FastAPI does.

    test_kokoro_routes.py checks the streams.
    """
    if case.operation.path.endswith("/captioned_speech") and isinstance(case.body, dict):
        stream = case.body.get("stream")
        if stream is None or stream is True:
            case.body = case.body | {"stream": False}
