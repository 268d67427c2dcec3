"""VideoAlign's arithmetic written out once more, plainly: one clip at a time, no batch, no mask, no library model.

Works on the published tensors as they are stored, low-rank updates beside the weights. Rotary positions are those of an
ordinary language model, which is what three equal axes amount to; ``coarse`` rounds what VideoAlign's cast to bfloat16 rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from services.scorers.videoalign.tiny import Dims

PRE = "base_model.model."


@dataclass(frozen=True)
class Item:
    """One clip as the model gets it: ids, patches, their grid, and which ids are special."""

    ids: list[int]
    patches: Tensor
    grid: tuple[int, int, int]
    video_id: int
    reward_ids: tuple[int, ...]


def raw_scores(tensors: dict[str, Tensor], d: Dims, item: Item, coarse: bool) -> Tensor:
    """Raw VQ, MQ, TA [3] of one clip."""
    t = {name.removeprefix(PRE): tensor.float() for name, tensor in tensors.items()}
    x = t["model.embed_tokens.weight"][item.ids].clone()
    x[torch.tensor(item.ids) == item.video_id] = vision(t, d, item, coarse)
    for i in range(d.layers):
        layer = f"model.layers.{i}."
        x = x + attend(t, d, layer + "self_attn.", rms(x, t[layer + "input_layernorm.weight"]), coarse)
        y = rms(x, t[layer + "post_attention_layernorm.weight"])
        gate, up = linear(t, d, layer + "mlp.gate_proj", y), linear(t, d, layer + "mlp.up_proj", y)
        x = x + linear(t, d, layer + "mlp.down_proj", functional.silu(gate) * up)
    out = rms(x, t["model.norm.weight"]) @ t["rm_head.weight"].T
    return torch.stack([out[item.ids.index(token), i if d.head_dim == 3 else 0] for i, token in enumerate(item.reward_ids)])


def linear(t: dict[str, Tensor], d: Dims, name: str, x: Tensor) -> Tensor:
    update = x @ t[f"{name}.lora_A.default.weight"].T @ t[f"{name}.lora_B.default.weight"].T
    return x @ t[f"{name}.base_layer.weight"].T + t.get(f"{name}.base_layer.bias", torch.zeros(1)) + update * (d.alpha / d.rank)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (i, i + half) of x [L, heads, dim] by ``angles`` [L, dim / 2], in the precision they come in."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None].float(), angles.sin()[:, None].float()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(t: dict[str, Tensor], d: Dims, name: str, x: Tensor, coarse: bool) -> Tensor:
    length, size = len(x), d.hidden // d.heads
    speeds = 1 / 1e6 ** (torch.arange(0, size, 2) / size)
    angles = torch.arange(length)[:, None] * (speeds.bfloat16().float() if coarse else speeds)
    q, k, v = (linear(t, d, f"{name}{part}_proj", x).view(length, -1, size) for part in "qkv")
    q, k = rotate(q, angles), rotate(k, angles)
    k, v = (each.repeat_interleave(d.heads // d.kv_heads, dim=1) for each in (k, v))
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = (torch.einsum("qhd,khd->hqk", q, k) / size**0.5).masked_fill(future, float("-inf")).softmax(-1)
    return linear(t, d, f"{name}o_proj", torch.einsum("hqk,khd->qhd", weights, v).reshape(length, -1))


def vision(t: dict[str, Tensor], d: Dims, item: Item, coarse: bool) -> Tensor:
    """Merged features [tokens, hidden] of one clip; attention stays inside a pair of frames."""
    frames, high, wide = item.grid
    size = d.embed // d.vision_heads
    rows, columns = [], []
    for block_row in range(high // 2):
        for block_column in range(wide // 2):
            for y in range(2):
                for x in range(2):
                    rows.append(2 * block_row + y)
                    columns.append(2 * block_column + x)
    speeds = 1 / 1e4 ** (torch.arange(0, size // 2, 2) / (size // 2))
    precision = torch.bfloat16 if coarse else torch.float32
    axes = [torch.tensor(places)[:, None].to(precision) * speeds.to(precision) for places in (rows, columns)]
    angles = torch.cat(axes, dim=1)
    out = []
    for pair in item.patches.view(frames, high * wide, -1):
        z = pair @ t["visual.patch_embed.proj.weight"].flatten(1).T
        for i in range(d.depth):
            block = f"visual.blocks.{i}."
            y = norm(t, block + "norm1", z)
            q, k, v = affine(t, block + "attn.qkv", y).view(len(z), 3, d.vision_heads, size).unbind(1)
            q, k = rotate(q, angles), rotate(k, angles)
            weights = (torch.einsum("qhd,khd->hqk", q, k) / size**0.5).softmax(-1)
            z = z + affine(t, block + "attn.proj", torch.einsum("hqk,khd->qhd", weights, v).reshape(len(z), -1))
            y = affine(t, block + "mlp.fc1", norm(t, block + "norm2", z))
            z = z + affine(t, block + "mlp.fc2", y * torch.sigmoid(1.702 * y))
        merged = norm(t, "visual.merger.ln_q", z).reshape(len(z) // 4, -1)
        out.append(affine(t, "visual.merger.mlp.2", functional.gelu(affine(t, "visual.merger.mlp.0", merged))))
    return torch.cat(out)


def norm(t: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], 1e-6)


def affine(t: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]
