"""Names of an open_clip ViT checkpoint → names of transformers' ``CLIPModel``. Nothing is computed, only renamed and split.

open_clip keeps query, key and value of an attention in one ``in_proj`` tensor and its projections as bare matrices
(x @ W); transformers keeps them apart, and as linear layers (x @ Wᵀ).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from services.scorers.clip.errors import ModelFolderError

_TOP = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_PROJECTIONS = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_PARTS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
_BUFFERS = frozenset({"attn_mask"})


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under ``CLIPModel``'s names. Raises ``ModelFolderError`` naming every key it does not know."""
    out: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        block = _BLOCK.fullmatch(key)
        if key in _BUFFERS:
            continue
        if key in _TOP:
            out[_TOP[key]] = tensor
        elif key in _PROJECTIONS:
            out[_PROJECTIONS[key]] = tensor.T.contiguous()
        elif block and block[3] == "attn.in_proj":
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{_layer(block)}.self_attn.{name}_proj.{block[4]}"] = part.contiguous()
        elif block and block[3] in _PARTS:
            out[f"{_layer(block)}.{_PARTS[block[3]]}.{block[4]}"] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise ModelFolderError(f"not an open_clip ViT: {len(unknown)} unknown keys, such as {', '.join(sorted(unknown)[:8])}")
    return out


def _layer(block: re.Match[str]) -> str:
    return f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}"
