"""Rotary angles as the published model was trained with: from frequencies rounded to bfloat16.

VideoAlign's code, at training and at scoring, casts the whole model with ``model.to(torch.bfloat16)``. Under its
transformers that rounds the rotary frequencies too, which are computed buffers. The language model then multiplies the
rounded frequencies in float32; the vision tower multiplies and takes cosines in bfloat16. Later transformers keep
them in float32: at position 1500 an angle differs by more than a radian, so this is no rounding noise.

Worked example: the second of 64 frequencies, 1e6 ** (-1/64) = 0.80584, becomes 0.80469; 1500 positions on, 1208.8
radians have become 1207.0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel


class RoundedVisionRotary(nn.Module):
    """Cosines and sines of a patch's row and column, every step rounded to bfloat16."""

    def __init__(self, frequencies: Tensor) -> None:
        """``frequencies`` [head dim / 4], one per angle of an axis."""
        super().__init__()
        self.inv_freq = nn.Buffer(frequencies.to(torch.bfloat16), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """``position_ids`` int64 [patches, 2] of row and column → two of float32 [patches, head dim]; ``x`` is not looked at."""
        angles = (position_ids[..., None].to(torch.bfloat16) * self.inv_freq).flatten(1)
        twice = torch.cat([angles, angles], dim=-1)
        return twice.cos().float(), twice.sin().float()


def fill_rotary(qwen: Qwen2VLModel, *, rounded: bool) -> None:
    """Give the model its frequencies anew (an empty model has none): as trained, or in float32 as the library has them."""
    words = type(qwen.language_model.rotary_emb)(qwen.language_model.config)
    patches = type(qwen.visual.rotary_pos_emb)(qwen.visual.config)
    if rounded:
        words.inv_freq = nn.Buffer(words.inv_freq.to(torch.bfloat16).float(), persistent=False)
    qwen.language_model.rotary_emb = words
    setattr(qwen.visual, "rotary_pos_emb", RoundedVisionRotary(patches.inv_freq) if rounded else patches)  # noqa: B010  another class, same call
