"""Floating-point operations of one forward pass, from the architecture."""

from __future__ import annotations

from math import prod

from diffusion.families.sd3.network import SD3Config
from diffusion.families.wan.network import WanConfig


def forward_flops(config: SD3Config | WanConfig, shape: tuple[int, ...], prompt_tokens: int) -> int:
    """Operations (a multiply-add counts two) of matrix products and attention for one request.

    Element-wise work, norms and softmax are left out, as `torch.utils.flop_counter` does.

    Args:
        config: architecture.
        shape: latent shape (C, h, w) or (C, f, h, w).
        prompt_tokens: text tokens, padding included.
    """
    return _sd3(config, shape, prompt_tokens) if isinstance(config, SD3Config) else _wan(config, shape, prompt_tokens)


def _sd3(c: SD3Config, shape: tuple[int, ...], text: int) -> int:
    dim, patch = c.inner_dim, c.patch_size**2
    image = prod(shape[1:]) // patch
    out = c.in_channels if c.out_channels is None else c.out_channels
    square = 2 * dim * dim
    ends = 2 * dim * (image * patch * (c.in_channels + out) + text * c.joint_attention_dim)
    per_request = 2 * dim * (256 + c.pooled_projection_dim) + 2 * square + 2 * square  # time, pooled, last modulation
    total = ends + per_request
    for i in range(c.num_layers):
        last, dual = i == c.num_layers - 1, i in c.dual_attention_layers
        total += square * ((9 if dual else 6) + (2 if last else 6))  # modulation
        total += square * image * (4 + 8) + square * text * (3 if last else 4 + 8)  # q, k, v, out and feed-forward
        total += 4 * (image + text) ** 2 * dim
        if dual:
            total += square * image * 4 + 4 * image**2 * dim
    return total


def _wan(c: WanConfig, shape: tuple[int, ...], text: int) -> int:
    dim, patch = c.inner_dim, prod(c.patch_size)
    video = prod(shape[1:]) // patch
    out = c.in_channels if c.out_channels is None else c.out_channels
    square = 2 * dim * dim
    ends = 2 * dim * video * patch * (c.in_channels + out) + 2 * dim * text * c.text_dim + square * text
    per_request = 2 * dim * c.freq_dim + square + 6 * square
    layer = square * video * (4 + 2) + square * text * 2 + 4 * video**2 * dim + 4 * video * text * dim + 4 * video * dim * c.ffn_dim
    return ends + per_request + c.num_layers * layer
