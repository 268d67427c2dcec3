"""What the published VideoAlign model takes of its device: arithmetic, without torch.

Source of the sizes: Qwen2-VL-2B (`layout.QWEN2_VL_2B`) with VideoReward's vocabulary, low-rank updates folded, and a head of one output.
"""

from __future__ import annotations

from services.scorers.videoalign.config import VideoAlignConfig

PARAMETERS = 2_208_563_200
VISION, VISION_MLP, WORDS, WORDS_MLP = 1280, 5120, 1536, 8960
PATCH = 2 * 14 * 14
"""Pixels of a patch, over two frames; four patches are a token of the language model."""
TEXT = 1000
"""Tokens of the template and a prompt, about."""
BYTES = {"float32": 4, "bfloat16": 2}


def weights_bytes(config: VideoAlignConfig) -> float:
    """The weights of a replica."""
    return float(PARAMETERS * _size(config))


def batch_bytes(config: VideoAlignConfig) -> float:
    """Live tensors of the largest batch that `batch_cost` and `batch_items` let through: of the vision tower or the language model, whichever
    has more, at a feed-forward (the residual, its norm, the hidden layer before and after its activation, the gate), and the patches in fp32."""
    size, patches = _size(config), config.batch_cost / PATCH
    tokens = patches / 4 + TEXT * config.batch_items
    return patches * 3 * PATCH * 4 + size * max(patches * (2 * VISION + 3 * VISION_MLP), tokens * (3 * WORDS + 4 * WORDS_MLP))


def _size(config: VideoAlignConfig) -> int:
    return BYTES[config.dtype] if config.dtype != "auto" else 4 if config.device == "cpu" else 2
