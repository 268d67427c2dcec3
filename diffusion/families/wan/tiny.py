"""Tiny Wan folders: every component of the published ones, with their classes and their layout, and random weights.

Sizes and weights are all that differs: UMT5 with a vocabulary of its own, an autoencoder that shrinks by 4 x 8 x 8 (TI2V-5B: 4 x 16 x 16)
and has 16 channels (48), CLIP's vision model of 224 pixels where the published folder has one, UniPC on the flow's grid of shift 3 (5).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from diffusion.families.tiny import stirred, t5_tokenizer

Style = Literal["t2v", "i2v", "ti2v"]
WIDTH = 32
"""Channels of a prompt's embeddings."""
HEADS, HEAD = 2, 12


def write_like(folder: Path, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the tiny one of a policy's kind.

    Args:
        parts: the policy's components, by name, and the keys of their config.json.

    Raises:
        ValueError: it is none of the styles: it has no VAE, or takes a picture without CLIP's features of it, as Wan 2.2's A14B.
    """
    network = parts["transformer"]
    channels, made = network.get("in_channels", 16), network.get("out_channels") or network.get("in_channels", 16)
    if "vae" not in parts:
        raise ValueError("it has UMT5 and no vae/, and a tiny policy of that layout is not known")
    if channels > made and not network.get("image_dim"):
        raise ValueError("it takes a picture and has no CLIP features of it (Wan 2.2 A14B), and a tiny policy of that layout is not known")
    write_tiny(folder, "i2v" if channels > made else "ti2v" if parts["vae"].get("is_residual") else "t2v")


def write_tiny(folder: Path, style: Style = "t2v", seed: int = 0) -> None:
    """Write a pipeline's folder, 1 MB, that `WanPipeline.from_pretrained` opens, or with `i2v` `WanImageToVideoPipeline`; `ti2v` both.

    Args:
        style: text-to-video of Wan 2.1, image-to-video of Wan 2.1, or Wan 2.2's TI2V-5B.
        seed: of all weights. The process's own random state stays as it was.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        _pipeline(style).save_pretrained(folder)


def _pipeline(style: Style) -> Any:
    import diffusers as found
    import transformers as text

    diffusers: Any = found
    transformers: Any = text
    tokens = t5_tokenizer()
    umt5 = transformers.UMT5Config(
        vocab_size=len(tokens), d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1
    )
    newer, channels = style == "ti2v", 48 if style == "ti2v" else 16
    parts: dict[str, Any] = {
        "tokenizer": tokens,
        "text_encoder": stirred(transformers.UMT5EncoderModel(umt5)),
        "vae": stirred(tiny_vae(diffusers, channels, newer)),
        "scheduler": diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0 if newer else 3.0),
    }
    image: dict[str, Any] = {}
    if style == "i2v":
        image = {"in_channels": 36, "image_dim": 24, "added_kv_proj_dim": HEADS * HEAD}
        vision = transformers.CLIPVisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=224, patch_size=14)
        parts |= {"image_encoder": stirred(transformers.CLIPVisionModel(vision)), "image_processor": transformers.CLIPImageProcessor()}
    transformer = diffusers.WanTransformer3DModel(
        **{
            "num_attention_heads": HEADS,
            "attention_head_dim": HEAD,
            "in_channels": channels,
            "out_channels": channels,
            "text_dim": WIDTH,
            "freq_dim": 16,
            "ffn_dim": 48,
            "num_layers": 3,
            "rope_max_seq_len": 64,
        }
        | image
    )
    make = diffusers.WanImageToVideoPipeline if style == "i2v" else diffusers.WanPipeline
    return make(transformer=stirred(transformer), **parts, **({"expand_timesteps": True} if newer else {}))


def tiny_vae(diffusers: Any, channels: int, newer: bool = False) -> Any:
    """An autoencoder of Wan 2.1 or, `newer`, 2.2; Cosmos has the former."""
    more = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16} if newer else {}
    spread = {"latents_mean": [0.1 * (i % 5 - 2) for i in range(channels)], "latents_std": [1.0 + 0.1 * (i % 7) for i in range(channels)]}
    return diffusers.AutoencoderKLWan(base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **spread, **more)
