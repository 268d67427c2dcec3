"""Architecture of a Wan network, as its config.json says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from diffusion.families.base import known_keys


@dataclass(frozen=True)
class WanConfig:
    """The keys of a diffusers `WanTransformer3DModel` config.json; same defaults."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int | None = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str | None = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Channels of what is sampled: those of the output."""
        return self.in_channels if self.out_channels is None else self.out_channels

    @property
    def image_tokens(self) -> int:
        """Rows of an image's features: CLIP ViT-H's 257, or those of a table of positions."""
        if self.image_dim is None:
            return 0
        return 257 if self.pos_embed_seq_len is None else self.pos_embed_seq_len

    @property
    def condition_channels(self) -> int:
        """Channels of the input beside them."""
        return self.in_channels - self.latent_channels

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WanConfig:
        """From a config.json. Raises ValueError on a key or value this implementation does not know."""
        config = cls(**known_keys(cls, values, "Wan"))
        if (config.image_dim is None) != (config.added_kv_proj_dim is None):
            raise ValueError(f"image_dim={config.image_dim} and added_kv_proj_dim={config.added_kv_proj_dim} belong together: features of an image")
        if config.added_kv_proj_dim not in (None, config.inner_dim):
            raise ValueError(f"added_kv_proj_dim={config.added_kv_proj_dim} must be the network's width, {config.inner_dim}")
        if config.condition_channels < 0:
            raise ValueError(f"out_channels={config.out_channels} exceeds in_channels={config.in_channels}")
        if config.qk_norm != "rms_norm_across_heads":
            raise ValueError(f"qk_norm={config.qk_norm!r} is not known; Wan 2.1 uses 'rms_norm_across_heads'")
        if len(config.patch_size) != 3:
            raise ValueError(f"patch_size={config.patch_size} must have three edges: frames, height, width")
        return config

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
