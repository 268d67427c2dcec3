"""Loaded by schemathesis: media that decode, so that generated requests reach the scorers and not only the parsers."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import schemathesis
from hypothesis import strategies as st
from safetensors.numpy import save


def npy(height: int, width: int, level: int, frames: int | None) -> bytes:
    """A grey picture, or a clip when ``frames`` is given."""
    shape = (height, width, 3) if frames is None else (frames, height, width, 3)
    buffer = io.BytesIO()
    np.save(buffer, np.full(shape, level, np.uint8))
    return buffer.getvalue()


side, level = st.integers(1, 40), st.integers(0, 255)
pictures = st.builds(npy, side, side, level, st.none() | st.integers(1, 5))
files = pictures | st.binary(max_size=200) | pictures.map(lambda data: data[:-1])


def tensors(request: object, count: int, height: int, width: int, half: bool) -> bytes:
    """A safetensors body whose parts may or may not fit together."""
    array = np.zeros((count, height, width, 3), np.float16 if half else np.uint8)
    return save({"latents" if half else "media": array}, {"request": json.dumps(request)})


requests = st.fixed_dictionaries(
    {"items": st.lists(st.fixed_dictionaries({}, optional={"prompt": st.text(max_size=20), "fps": st.floats(-1, 100)}), max_size=3)},
    optional={"model": st.sampled_from(["ocr", "scene", "other"]), "rewards": st.lists(st.sampled_from(["ocr", "scene"]), max_size=2), "x": st.none()},
)
bodies = st.builds(tensors, requests, st.integers(0, 3), side, side, st.booleans()) | st.binary(max_size=200)

schemathesis.openapi.format("byte", files.map(lambda data: base64.b64encode(data).decode()).filter(bool))
schemathesis.openapi.format("binary", files)
schemathesis.openapi.media_type("application/vnd.safetensors", bodies)


def patient(value: object) -> object:
    """A valid deadline made long: a short one ends in 504, as it should."""
    return 30.0 if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 3600 else value


@schemathesis.hook
def map_headers(context: schemathesis.HookContext, headers: dict[str, object] | None) -> dict[str, object] | None:
    """No deadline that cannot be kept."""
    if not headers or "X-Timeout-S" not in headers:
        return headers
    try:
        given = float(str(headers["X-Timeout-S"]))
    except ValueError:
        return headers
    return {**headers, "X-Timeout-S": str(patient(given))}


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: object) -> object:
    """Requests that name no reward name one that exists, as the document cannot know; what they say otherwise stays."""
    if not isinstance(body, dict):
        return body
    body = {**body, "timeout_s": patient(body["timeout_s"])} if "timeout_s" in body else body
    media = body.get("items", body.get("file"))
    if not isinstance(media, list) or len(media) % 3 == 0 or body.keys() & {"model", "rewards", "reward", "combine"}:
        return body
    if "items" in body and len(media) % 3 == 2:
        return {**body, "rewards": ["ocr", "scene"], "combine": {"weights": {"ocr": 1, "scene.contrast": -2}}}
    return {**body, "model": "ocr"}
