"""Hooks for the OpenAPI fuzzing: they put existing voices and readable recordings into requests, so that some of them succeed."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import schemathesis
import soundfile
from hypothesis import strategies as st


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


@schemathesis.hook  # type: ignore[untyped-decorator]
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    """Make the values of nearly all valid requests cheap: two letters to speak, and a recording with words.

    The recogniser listens for a second to a recording without words, which is the default. `before_call` must not add them:
    schemathesis takes a form with a recording that is changed there for an invalid one, which the server then wrongly accepts.
    """
    voices, speech = (raw_schema["paths"][f"/v1/audio/{name}"]["post"]["requestBody"]["content"] for name in ("voices", "speech"))
    del voices["multipart/form-data"]["schema"]["properties"]["ref_text"]["default"]
    examples = [example["value"] for example in speech["application/json"]["examples"].values()]
    for example in examples + raw_schema["components"]["schemas"]["SpeechRequest"]["examples"]:
        example["input"] = "Hi"


@schemathesis.hook  # type: ignore[untyped-decorator]
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Ask for complete captioned speech: a stream has one JSON object a line but is called JSON, as Kokoro-FastAPI does.

    test_kokoro_routes.py checks the streams.
    """
    if case.operation.path.endswith("/captioned_speech") and isinstance(case.body, dict):
        stream = case.body.get("stream")
        if stream is None or stream is True:
            case.body = case.body | {"stream": False}
