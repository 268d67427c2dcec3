"""What FastAPI cannot derive of the OpenAPI document: the three request bodies, problem documents, keys.

``/v1/score`` reads the raw body, so its forms are written here, from the same schemas that parse them.
"""

from __future__ import annotations

import json
from typing import Any, cast

from fastapi import FastAPI

from services.rest.guard import ADMIN_PATHS, OPEN_PATHS
from services.rest.schemas import Combine, Problem, ScoreRequest, TensorRequest

_REF = "#/components/schemas/{model}"
_TEXTS: dict[str, dict[str, Any]] = {
    "model": {"type": "string", "pattern": "^[A-Za-z0-9_-]+$", "maxLength": 64, "description": "The one reward to score with."},
    "reward": {
        "type": "array",
        "items": {"type": "string", "pattern": "^[A-Za-z0-9_-]+$", "maxLength": 64},
        "description": "Several rewards; repeat the field, leave out model.",
    },
    "combine": {"type": "string", "description": "JSON of the schema Combine; needs reward."},
    "timeout_s": {"type": "number", "exclusiveMinimum": 0, "maximum": 3600, "description": "Deadline in seconds."},
    "prompt": {"type": "array", "items": {"type": "string"}, "description": "One per item, in order; repeat the field."},
    "fps": {"type": "number", "exclusiveMinimum": 0, "maximum": 1000, "description": "Makes npy files clips: uint8 [T, H, W, 3] or [B, T, H, W, 3]."},
}
_TEXTS["selected"] = {"type": "boolean", "description": "The frames of npy clips are already those of the reward's frame spec."}
_FILES = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "string", "format": "binary"},
    "description": "PNG, JPEG, WebP, mp4, or npy (uint8 RGB [H, W, 3] or [B, H, W, 3]); repeat the field.",
}
_TENSORS = {
    "schema": {"type": "string", "format": "binary"},
    "description": "A safetensors body; its metadata string 'request' holds JSON of the schema TensorRequest.",
}
SCORE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": _REF.format(model="ScoreRequest")}},
            "multipart/form-data": {
                "schema": {"type": "object", "required": ["file"], "properties": {**_TEXTS, "file": _FILES}, "additionalProperties": False}
            },
            "application/vnd.safetensors": {"schema": _TENSORS["schema"]},
        },
        "description": str(_TENSORS["description"]),
    }
}


def install_openapi(app: FastAPI, keyed: bool) -> None:
    """Complete the document of ``app`` when it is first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = FastAPI.openapi(app)
            components = document.setdefault("components", {})
            for model in (Problem, Combine, ScoreRequest, TensorRequest):
                schema = model.model_json_schema(ref_template=_REF)
                components.setdefault("schemas", {}).update(schema.pop("$defs", {}))
                components["schemas"][model.__name__] = schema
            if keyed:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                _protect(document)
            app.openapi_schema = json.loads(json.dumps(document))
        return cast(dict[str, Any], app.openapi_schema)

    app.openapi = openapi  # type: ignore[method-assign]


def _protect(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        if path not in OPEN_PATHS:
            for operation in operations.values():
                operation["security"] = [{"key": ["admin" if path in ADMIN_PATHS else "score"]}]
