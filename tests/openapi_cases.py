"""Hooks for the OpenAPI fuzzing: some of its cases get a voice that is there, and forms a recording that can be read, or nothing would succeed."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import schemathesis
import soundfile
from hypothesis import strategies as st


def _recording() -> bytes:
    """1.5 s of a sound, as WAV."""
    seconds = np.arange(36_000) / 24_000
    samples = (8000 * np.sin(2 * np.pi * 220 * seconds) * (1 + np.sin(2 * np.pi * 3 * seconds)) / 2).astype("<i2")
    file = io.BytesIO()
    soundfile.write(file, samples, 24_000, format="WAV")
    return file.getvalue()


# What is sent in place of a recording elsewhere is tested in test_voice_routes.py.
schemathesis.openapi.format("binary", st.just(_recording()))


@schemathesis.hook  # type: ignore[untyped-decorator]
def map_body(context: Any, body: Any) -> Any:
    """Every other text is spoken by a voice that is there."""
    if isinstance(body, dict) and isinstance(body.get("input"), str) and isinstance(body.get("voice"), str) and len(body["input"]) % 2:
        return body | {"voice": "heart"}
    return body


@schemathesis.hook  # type: ignore[untyped-decorator]
def filter_body(context: Any, body: Any) -> bool:
    """Leave out forms whose only fault is a value's type: a form knows text alone, and "null" or "5" is a name like any other."""
    is_form = context.operation is not None and context.operation.path.endswith("/audio/voices")
    return not (is_form and isinstance(body, dict) and any(not isinstance(value, str | bytes) for value in body.values()))
