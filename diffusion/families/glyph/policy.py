"""The tiny policies of the glyph world, SD3's of signs and Cosmos' of moving numbers: their folders without weights.

`python -m diffusion.families.glyph.policy FOLDER [--clips]` writes configuration and the frozen text encoder; `ddrl train` with
`model.init=true` then starts from random weights.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from diffusion.families.cosmos.config import CosmosConfig
from diffusion.families.glyph.text import CLASS_NAME, GlyphTextEncoder
from diffusion.families.sd3.network import SD3Config


@dataclass(frozen=True)
class Kind:
    """What a policy of the glyph world is.

    Attributes:
        pipeline, network: classes in diffusers.
        config: the network's architecture.
        shift: of the time grid.
        pooled_dim: width of the pooled text that the network takes; 0 = none.
    """

    pipeline: str
    network: str
    config: SD3Config | CosmosConfig
    shift: float
    pooled_dim: int


SIGNS = Kind(
    pipeline="StableDiffusion3Pipeline",
    network="SD3Transformer2DModel",
    # pos_embed_max_size 24 holds 32x96 pixels at patch size 4; sample_size = 24 patches makes table positions integers
    config=SD3Config(
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
    ),
    shift=2.0,  # signs are decided at high noise: half of the grid lies above t = 2/3
    pooled_dim=64,
)
CLIPS = Kind(
    pipeline="Cosmos2_5_PredictBasePipeline",
    network="CosmosTransformer3DModel",
    # Positions are learnt beside the rotary ones, as in Cosmos 1.0: rotary ones alone, Wan's and Predict2.5's, say where tokens stand to each other, and of a
    # clip that is all noise nothing says which of them is the left one. Every frame has patches of its own, so that the first may be given; a patch is
    # a column of digits' whole height, and smaller than a token, in which the noise that a velocity repeats must find room.
    config=CosmosConfig(
        in_channels=4,
        out_channels=3,
        num_attention_heads=2,
        attention_head_dim=88,
        num_layers=4,
        mlp_ratio=2.0,
        text_embed_dim=64,
        adaln_lora_dim=16,
        max_size=(8, 24, 64),
        patch_size=(1, 12, 4),
        rope_scale=(1.0, 1.0, 1.0),
        concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    ),
    shift=2.0,
    pooled_dim=0,
)


def write_skeleton(folder: Path, kind: Kind = SIGNS) -> None:
    """Write everything of a policy but its weights."""
    parts = {
        "model_index.json": {
            "_class_name": kind.pipeline,
            "transformer": ["diffusers", kind.network],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["ddrl", CLASS_NAME],
        },
        "transformer/config.json": {"_class_name": kind.network, **kind.config.to_dict()},
        "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": kind.shift},
    }
    for name, content in parts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    GlyphTextEncoder.create(pooled_dim=kind.pooled_dim).save(folder / "text_encoder")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diffusion.families.glyph.policy", description="Write a glyph policy's folder without weights.")
    parser.add_argument("folder", type=Path, help="where; it is made, and files of an earlier call are written anew")
    parser.add_argument("--clips", action="store_true", help="the policy of clips, of the Cosmos family")
    options = parser.parse_args()
    write_skeleton(options.folder, CLIPS if options.clips else SIGNS)


if __name__ == "__main__":
    main()
