"""Architecture of a Cosmos network, as its config.json says: Predict2.5, and earlier ones whose positions are learnt beside the rotary ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from diffusion.families.base import known_keys

EPS = 1e-6
"""Of the layer norms and of the norm of time features."""
QK_EPS = 1e-5
"""Of the norms of queries and keys in diffusers 0.42.1; the original code has 1e-6."""


@dataclass(frozen=True)
class CosmosConfig:
    """The keys of a diffusers `CosmosTransformer3DModel` config.json; same defaults."""

    in_channels: int = 16
    out_channels: int = 16
    num_attention_heads: int = 32
    attention_head_dim: int = 128
    num_layers: int = 28
    mlp_ratio: float = 4.0
    text_embed_dim: int = 1024
    adaln_lora_dim: int = 256
    max_size: tuple[int, int, int] = (128, 240, 240)
    patch_size: tuple[int, int, int] = (1, 2, 2)
    rope_scale: tuple[float, float, float] = (2.0, 1.0, 1.0)
    concat_padding_mask: bool = True
    extra_pos_embed_type: str | None = "learnable"
    use_crossattn_projection: bool = False
    crossattn_proj_in_channels: int = 1024
    encoder_hidden_states_channels: int = 1024
    controlnet_block_every_n: int | None = None
    img_context_dim_in: int | None = None
    img_context_num_tokens: int = 256
    img_context_dim_out: int = 2048

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def ffn_dim(self) -> int:
        return int(self.inner_dim * self.mlp_ratio)

    @property
    def patch_channels(self) -> int:
        """Channels of the patches' input: latents, the mask of given frames, and the padding mask."""
        return self.in_channels + self.concat_padding_mask

    @property
    def prompt_channels(self) -> int:
        """Channels of a prompt's embeddings, before their projection where there is one."""
        return self.crossattn_proj_in_channels if self.use_crossattn_projection else self.text_embed_dim

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CosmosConfig:
        """From a config.json. Raises ValueError on a key or value this implementation does not know."""
        config = cls(**known_keys(cls, values, "Cosmos"))
        if config.extra_pos_embed_type not in (None, "learnable"):
            raise ValueError(f"extra_pos_embed_type={config.extra_pos_embed_type!r} is not known; Predict2.5 has none (null), Cosmos 1.0 'learnable'")
        if config.img_context_dim_in or config.controlnet_block_every_n is not None:
            raise ValueError("img_context_dim_in and controlnet_block_every_n are of Cosmos-Transfer2.5; this build has Predict2.5")
        if config.in_channels != config.out_channels + 1:
            raise ValueError(f"in_channels={config.in_channels} must be out_channels + 1 = {config.out_channels + 1}: latents, and the mask of given frames")
        if len(config.patch_size) != 3 or config.patch_size[0] != 1:
            raise ValueError(f"patch_size={config.patch_size} must be (1, height, width): times are a frame's")
        if config.use_crossattn_projection and config.encoder_hidden_states_channels != config.text_embed_dim:
            channels = config.encoder_hidden_states_channels
            raise ValueError(f"encoder_hidden_states_channels={channels} must be text_embed_dim={config.text_embed_dim}")
        if config.use_crossattn_projection and config.crossattn_proj_in_channels == config.text_embed_dim:
            raise ValueError(f"crossattn_proj_in_channels={config.text_embed_dim} must differ from text_embed_dim, by which projected text is told apart")
        return config

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
