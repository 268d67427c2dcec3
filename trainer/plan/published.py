"""Published architectures by their hub id, so that a plan needs neither network nor weights: the keys of the folders' config.json files.

Sources: diffusers 0.42.1 `models/transformers/transformer_sd3.py` (keys and defaults) and `scripts/convert_sd3_to_diffusers.py` of its
repository (SD3-medium, SD3.5-medium and -large, the VAE), `transformer_wan.py`, `transformer_cosmos.py`, `autoencoder_kl_wan.py`,
`scripts/convert_wan_to_diffusers.py` and `scripts/convert_cosmos_to_diffusers.py`; the configurations of OpenAI CLIP ViT-L/14, OpenCLIP
ViT-bigG/14 and ViT-H/14, T5 v1.1 XXL and UMT5-XXL in transformers; of Cosmos-Reason1-7B the values that cosmos-rl's recipes
(`configs/cosmos-predict2-5`) build it with, which are Qwen2.5-VL-7B's. The glyph base is `diffusion.families.glyph.policy`'s.
"""

from __future__ import annotations

from typing import Any

Parts = dict[str, dict[str, Any]]
"""A policy folder: part (`transformer`, `vae`, `text_encoder`, …) to the keys of its config.json."""

_SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
_SD35_MEDIUM = _SD3 | {"pos_embed_max_size": 384, "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm"}
_SD35_LARGE = _SD3 | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
_VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "force_upcast": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_CLIP_L = {
    "architectures": ["CLIPTextModelWithProjection"],
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
_CLIP_G = _CLIP_L | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1280}
_T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "num_layers": 24,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "gated-gelu",
}


_UMT5_XXL = _T5_XXL | {"architectures": ["UMT5EncoderModel"], "vocab_size": 256384}
_CLIP_H_VISION = {
    "architectures": ["CLIPVisionModel"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
_WAN_VAE = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}
_WAN_14B = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": [1, 2, 2],
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
}
_WAN_1_3B = _WAN_14B | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_WAN_I2V = _WAN_14B | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
_COSMOS_2B = {
    "_class_name": "CosmosTransformer3DModel",
    "in_channels": 17,
    "out_channels": 16,
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "num_layers": 28,
    "mlp_ratio": 4.0,
    "text_embed_dim": 1024,
    "adaln_lora_dim": 256,
    "max_size": [128, 240, 240],
    "patch_size": [1, 2, 2],
    "rope_scale": [1.0, 3.0, 3.0],
    "concat_padding_mask": True,
    "extra_pos_embed_type": None,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 100352,
    "encoder_hidden_states_channels": 1024,
}
_COSMOS_14B = _COSMOS_2B | {"num_attention_heads": 40, "num_layers": 36}
_REASON1 = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}


def _wan(transformer: dict[str, Any], **more: dict[str, Any]) -> Parts:
    return {"transformer": transformer, "vae": _WAN_VAE, "text_encoder": _UMT5_XXL, **more}


def _cosmos(transformer: dict[str, Any]) -> Parts:
    return {"transformer": transformer, "vae": _WAN_VAE, "text_encoder": _REASON1}


def _sd3(transformer: dict[str, Any]) -> Parts:
    return {"transformer": transformer, "vae": _VAE, "text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "text_encoder_3": _T5_XXL}


PUBLISHED = {
    "stabilityai/stable-diffusion-3-medium-diffusers": _sd3(_SD3),
    "stabilityai/stable-diffusion-3.5-medium": _sd3(_SD35_MEDIUM),
    "stabilityai/stable-diffusion-3.5-large": _sd3(_SD35_LARGE),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _wan(_WAN_1_3B),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan(_WAN_14B),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _wan(_WAN_I2V, image_encoder=_CLIP_H_VISION),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": _wan(_WAN_I2V, image_encoder=_CLIP_H_VISION),
    "nvidia/Cosmos-Predict2.5-2B": _cosmos(_COSMOS_2B),
    "nvidia/Cosmos-Predict2.5-14B": _cosmos(_COSMOS_14B),
}
GLYPH = ("glyph-base", "glyph-video-base")


def published(name: str) -> Parts | None:
    """The parts of a hub id or of a glyph base, None for another name."""
    if name in GLYPH:
        from diffusion.families.glyph.policy import CLIPS, SIGNS
        from diffusion.families.glyph.text import CLASS_NAME

        kind = CLIPS if name == "glyph-video-base" else SIGNS
        return {"transformer": {"_class_name": kind.network, **kind.config.to_dict()}, "text_encoder": {"_class_name": CLASS_NAME, "max_tokens": 10}}
    return PUBLISHED.get(name)
