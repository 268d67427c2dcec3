"""The tiny policies of the glyph world, SD3's of signs and Wan's of moving numbers: their folders without weights.

`python -m diffusion.families.glyph.policy FOLDER [--clips]` writes configuration and the frozen text encoder; `ddrl train` with
`model.init=true` then starts from random weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffusion.families.glyph.text import CLASS_NAME, GlyphTextEncoder
from diffusion.families.sd3.network import SD3Config
from diffusion.families.wan.config import WanConfig

# pos_embed_max_size 24 holds 32x96 pixels at patch size 4; sample_size = 24 patches makes table positions integers
SIGNS = SD3Config(
    sample_size=96,
    patch_size=4,
    in_channels=3,
    out_channels=3,
    num_layers=4,
    attention_head_dim=32,
    num_attention_heads=3,
    joint_attention_dim=64,
    caption_projection_dim=96,
    pooled_projection_dim=64,
    pos_embed_max_size=24,
    qk_norm="rms_norm",
)
# a frame is a patch of its own, so that the first may be given and the others sampled
CLIPS = WanConfig(
    patch_size=(1, 4, 8),
    num_attention_heads=4,
    attention_head_dim=24,
    in_channels=3,
    out_channels=3,
    text_dim=64,
    freq_dim=64,
    ffn_dim=384,
    num_layers=6,
    rope_max_seq_len=64,
)
SHIFT = {"signs": 2.0, "clips": 3.0}
"""Time shift: signs are decided at high noise, so half of the grid lies above t = 2/3. The frames of a clip repeat each other, and
withstand more noise together: above 3/4."""


def write_skeleton(folder: Path, clips: bool = False) -> None:
    """Write everything of the policy of signs, or of clips, but its weights."""
    pipeline, network, shift = ("WanPipeline", "WanTransformer3DModel", SHIFT["clips"]) if clips else ("StableDiffusion3Pipeline", "SD3Transformer2DModel", SHIFT["signs"])
    config = CLIPS.to_dict() if clips else SIGNS.to_dict()
    parts = {
        "model_index.json": {
            "_class_name": pipeline,
            "transformer": ["diffusers", network],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["ddrl", CLASS_NAME],
        },
        "transformer/config.json": {"_class_name": network, **config},
        "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": shift},
    }
    for name, content in parts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    GlyphTextEncoder.create(pooled_dim=0 if clips else 64).save(folder / "text_encoder")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diffusion.families.glyph.policy", description="Write a glyph policy's folder without weights.")
    parser.add_argument("folder", type=Path, help="where; it is made, and files of an earlier call are written anew")
    parser.add_argument("--clips", action="store_true", help="the policy of clips, of the Wan family")
    options = parser.parse_args()
    write_skeleton(options.folder, options.clips)


if __name__ == "__main__":
    main()
