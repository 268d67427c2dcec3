"""Safetensors bodies: a bounded JSON header, then named arrays viewed in place. Nothing is copied, nothing is run.

Layout (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, JSON
``{name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}``, then the bytes of all tensors. Held to it here: offsets
tile the rest of the body without gap or overlap, and every shape has exactly its bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from services.media.json_bounds import JsonTooLarge, check_json
from services.media.plan import Refused

_WIDTHS = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}
Size = Annotated[int, Field(ge=0, le=2**48)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    dtype: Literal["U8", "F16", "BF16", "F32"]
    shape: list[Size] = Field(max_length=6)
    data_offsets: tuple[Size, Size] = Field(strict=False)


_HEADER: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
_METADATA: TypeAdapter[dict[str, str]] = TypeAdapter(dict[str, str])


@dataclass(frozen=True)
class Tensor:
    """One named tensor of a body, still bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def array(self) -> NDArray[Any]:
        """uint8 as it is; half and bfloat16 become float32."""
        if self.dtype == "BF16":
            wide = np.frombuffer(self.data, "<u2").astype(np.uint32) << 16
            return wide.view(np.float32).reshape(self.shape)
        flat = np.frombuffer(self.data, {"U8": "u1", "F16": "<f2", "F32": "<f4"}[self.dtype])
        return (flat if self.dtype == "U8" else flat.astype(np.float32)).reshape(self.shape)


def parse(body: bytes, max_header_bytes: int, max_tensors: int) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of ``body``. Raises ``Refused`` for anything out of the format."""
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or length > len(body) - 8:
        raise Refused("the safetensors body is shorter than its header says")
    if length > max_header_bytes:
        raise Refused(f"the safetensors header has {length} bytes, at most {max_header_bytes}")
    data = memoryview(body)[8 + length :]
    try:
        check_json(body[8 : 8 + length], max_depth=4)
        header = _HEADER.validate_json(body[8 : 8 + length])
        metadata = _METADATA.validate_python(header.pop("__metadata__", {}))
        if len(header) > max_tensors:
            raise Refused(f"{len(header)} tensors, at most {max_tensors}")
        entries = {name: _Entry.model_validate(entry) for name, entry in header.items()}
    except (ValidationError, JsonTooLarge):
        raise Refused("the safetensors header is not valid; tensors are U8, F16, BF16 or F32 with at most 6 dimensions") from None
    end = 0
    for entry in sorted(entries.values(), key=lambda e: e.data_offsets):
        start, stop = entry.data_offsets
        if start != end or stop - start != math.prod(entry.shape) * _WIDTHS[entry.dtype]:
            raise Refused("the safetensors offsets do not match the shapes")
        end = stop
    if end != len(data):
        raise Refused(f"the safetensors header describes {end} bytes of tensors, the body holds {len(data)}")
    return metadata, {name: Tensor(e.dtype, tuple(e.shape), data[e.data_offsets[0] : e.data_offsets[1]]) for name, e in entries.items()}
