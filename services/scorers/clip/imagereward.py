"""ImageReward: BLIP reads the prompt beside the picture, five linear layers turn its first token into a number.

The public checkpoint is one file with the names of Salesforce's BLIP code. Its tensors are renamed for transformers'
``BlipVisionModel`` and ``BlipTextModel`` (whose names the text half shares) and every one is accounted for; the package
``image-reward``, which needs a transformers of 2022, is not used.

reward = (head - 0.1672) / 1.0333, so that people's choices have mean 0 and deviation 1 on the authors' data.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BlipTextConfig, BlipVisionConfig

from services.contract import ScoreFailure
from services.media.base import Image
from services.scorers.clip.errors import ModelFolderError
from services.scorers.clip.head import apply_head, linear_head
from services.scorers.clip.loading import stock_model
from services.scorers.clip.pictures import PictureScorer
from services.scorers.clip.preparation import Preparation
from services.scorers.clip.tokens import PromptTokenizer
from services.scorers.fingerprint import fingerprint
from services.scorers.settings import ImageRewardReward

MEAN, STD = 0.16717362830052426, 1.0333394966054072
TEXT_LENGTH = 35  # the authors' cut
VISION_HEAD, VISION_EPS = 64, 1e-6  # size of an attention head and LayerNorm's epsilon in BLIP's vision tower
PAD_TOKEN, UNKNOWN_TOKEN = "[PAD]", "[UNK]"

_VISION = (
    (r"patch_embed\.proj", "embeddings.patch_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"cls_token", "embeddings.class_embedding"),
    (r"blocks\.(\d+)\.norm([12])", r"encoder.layers.\1.layer_norm\2"),
    (r"blocks\.(\d+)\.attn\.qkv", r"encoder.layers.\1.self_attn.qkv"),
    (r"blocks\.(\d+)\.attn\.proj", r"encoder.layers.\1.self_attn.projection"),
    (r"blocks\.(\d+)\.mlp\.fc([12])", r"encoder.layers.\1.mlp.fc\2"),
    (r"norm", "post_layernorm"),
)
# Buffers, and projections for BLIP's pre-training that the reward does not use.
_UNUSED = re.compile(r"blip\.(text_encoder\.embeddings\.position_ids|(vision|text)_proj\.(weight|bias))")


class ImageRewardScorer(PictureScorer):
    """ImageReward v1.0."""

    name = "imagereward"
    reward = "imagereward"
    sub_scores = ("imagereward",)

    def __init__(self, config: ImageRewardReward) -> None:
        file, words = config.path / "ImageReward.pt", config.processor or config.path
        vision, text, head = split(read_checkpoint(config))
        self._dtype, self._device = getattr(torch, config.dtype), torch.device(config.device)
        # "eager" adds a float mask to the scores, which is what BLIP's text half does in any case.
        options: dict[str, Any] = {"dtype": config.dtype, "device": config.device, "attn_implementation": "eager"}
        self._vision = stock_model("BlipVisionModel", config.path, vision_config(vision), state=vision, **options)
        shape = text_config(config, self._vision.config.hidden_size)
        self._text = stock_model("BlipTextModel", config.path, shape, state=text, add_pooling_layer=False, **options)
        self._head = linear_head(str(file), head, self._text.config.hidden_size)
        self._tokenizer = PromptTokenizer(words, TEXT_LENGTH, PAD_TOKEN, UNKNOWN_TOKEN)
        identity = fingerprint(file, config.path / "med_config.json", words / "tokenizer.json")
        super().__init__(config, Preparation(self._vision.config.image_size, half="even"), identity)

    def tokens(self, prompt: str) -> list[int] | ScoreFailure:
        """See ``PictureScorer.tokens``."""
        return self._tokenizer.encode(prompt)

    @torch.inference_mode()
    def judge(self, images: Sequence[Image], prompts: Sequence[tuple[int, ...]]) -> Mapping[str, Sequence[float]]:
        """See ``PictureScorer.judge``."""
        pixels = torch.from_numpy(np.stack([self._preparation(image) for image in images]))
        seen = self._vision(pixel_values=pixels.to(self._device, self._dtype)).last_hidden_state
        ids = torch.tensor([self._tokenizer.padded(list(row)) for row in prompts], device=self._device)
        mask = torch.tensor([[i < len(row) for i in range(TEXT_LENGTH)] for row in prompts], device=self._device).long()
        read = self._text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return {"imagereward": ((apply_head(self._head, read[:, 0].float().cpu()) - MEAN) / STD).tolist()}


def read_checkpoint(config: ImageRewardReward) -> Mapping[str, Tensor]:
    """``ImageReward.pt``: a plain mapping of names to tensors. Raises ``ModelFolderError``."""
    file = config.path / "ImageReward.pt"
    try:
        state: Mapping[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return dict(state)
    except FileNotFoundError:
        raise ModelFolderError(f"there is no checkpoint at {file}") from None
    except Exception as error:  # torch.load raises many kinds on a file that is not a checkpoint
        raise ModelFolderError(f"{file} does not hold tensors only ({type(error).__name__}: {str(error)[:200]})") from error


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint as vision, text and head tensors under transformers' names. Raises ``ModelFolderError`` for unknown ones."""
    vision, text, head, unknown = {}, {}, {}, []
    for key, tensor in state.items():
        if _UNUSED.fullmatch(key):
            continue
        if key.startswith("mlp."):
            head[key.removeprefix("mlp.")] = tensor
        elif key.startswith("blip.text_encoder."):
            text[key.removeprefix("blip.text_encoder.")] = tensor
        elif name := _vision_name(key):
            vision[name] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise ModelFolderError(f"not an ImageReward checkpoint: {len(unknown)} unknown tensors, such as {', '.join(sorted(unknown)[:8])}")
    return vision, text, head


def _vision_name(key: str) -> str | None:
    found = re.fullmatch(r"blip\.visual_encoder\.(.+?)(\.weight|\.bias)?", key)
    for old, new in _VISION if found else ():
        match = re.fullmatch(old, found[1]) if found else None
        if found and match:
            return match.expand(new) + (found[2] or "")
    return None


def vision_config(state: Mapping[str, Tensor]) -> Any:
    """The vision tower's shape, read off its tensors. Raises ``ModelFolderError``."""
    try:
        width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
        side = math.isqrt(state["embeddings.position_embedding"].shape[1] - 1)
        inner = state["encoder.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ModelFolderError(f"not an ImageReward checkpoint: the vision tower lacks {error}") from None
    layers = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.layers."))
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // VISION_HEAD),
        image_size=side * patch,
        patch_size=patch,
        layer_norm_eps=VISION_EPS,
    )


def text_config(config: ImageRewardReward, vision_width: int) -> Any:
    """The text half's shape from ``med_config.json``, a BERT config. Raises ``ModelFolderError``."""
    file = config.path / "med_config.json"
    same = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "hidden_act",
        "layer_norm_eps",
    )
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        shape = {key: content[key] for key in same}
    except FileNotFoundError:
        raise ModelFolderError(f"there is no {file}; it is published beside ImageReward.pt") from None
    except (ValueError, KeyError) as error:
        raise ModelFolderError(f"{file} does not describe BLIP's text half: {error}") from error
    if content.get("position_embedding_type", "absolute") != "absolute":
        raise ModelFolderError(f"{file} asks for positions of type {content['position_embedding_type']!r}")
    # `is_decoder` is transformers' switch for cross-attention here; the attention mask stays bidirectional.
    return BlipTextConfig(**shape, encoder_hidden_size=vision_width, is_decoder=True, pad_token_id=content.get("pad_token_id", 0))
