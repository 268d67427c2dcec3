"""The tiny SD3-family policy of the glyph world: its folder without weights.

`python -m diffusion.families.glyph.policy FOLDER` writes configuration and the frozen text encoder; `ddrl train` with
`model.init=true` then starts from random weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffusion.families.glyph.text import CLASS_NAME, GlyphTextEncoder
from diffusion.families.sd3.network import SD3Config

# pos_embed_max_size 24 holds 32x96 pixels at patch size 4; sample_size = 24 patches makes table positions integers
CONFIG = SD3Config(
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
MODEL_CLASS = "SD3Transformer2DModel"
SHIFT = 2.0
"""Time shift: signs are decided at high noise, so half of the grid lies above t = 2/3."""


def write_skeleton(folder: Path) -> None:
    """Write everything of the policy but its weights."""
    parts = {
        "model_index.json": {
            "_class_name": "StableDiffusion3Pipeline",
            "transformer": ["diffusers", MODEL_CLASS],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["ddrl", CLASS_NAME],
        },
        "transformer/config.json": {"_class_name": MODEL_CLASS, **CONFIG.to_dict()},
        "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": SHIFT},
    }
    for name, content in parts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    GlyphTextEncoder.create().save(folder / "text_encoder")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diffusion.families.glyph.policy", description="Write the glyph policy's folder without weights.")
    parser.add_argument("folder", type=Path, help="where; it is made, and files of an earlier call are written anew")
    write_skeleton(parser.parse_args().folder)


if __name__ == "__main__":
    main()
