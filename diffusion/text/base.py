"""What every text encoder offers: the pair (token embeddings, pooled vector) that an SD3 policy is conditioned on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class TextConditioning:
    """Encoded prompts: `prompt_embeds` `[B, L, D]` (padding included, as the pipeline makes it) and `pooled` `[B, P]`."""

    prompt_embeds: Tensor
    pooled: Tensor


class TextEncoder(Protocol):
    """Frozen encoder of prompts."""

    def encode(self, prompts: list[str]) -> TextConditioning:
        """Encode prompts. Raises ValueError naming a prompt that does not fit."""
        ...
