"""Clean latents of examples: read where they were prepared, made by the policy's codec where they were not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from actors.sources.draws import pixels_of
from actors.sources.example import Example
from diffusion.codecs import Codec


def clean_latents(examples: Sequence[Example], codec: Codec, height: int, width: int, frames: int = 1) -> Tensor:
    """fp32 `[rows, C, h, w]` on the CPU, of clips `[rows, C, f, h, w]` with their first `frames` frames. Raises SourceError."""
    stored = [example.latent for example in examples if example.latent is not None]
    if len(stored) == len(examples):
        return torch.from_numpy(np.stack([latent.load() for latent in stored]))
    return codec.encode(pixels_of(examples, height, width, frames if codec.video else None))
