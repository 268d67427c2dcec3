"""One of the ranks that share streams in `test_ulysses.py`: `python -m tests.unit.diffusion.sequence_ranks RANK WORLD FOLDER`.

Each family with packs of equal and unequal sizes: clips and texts of odd lengths, fewer text tokens of a request than ranks, a
request that several ranks share and ranks that have several.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffusion.families.base import PackedModel
from diffusion.families.cosmos.config import CosmosConfig
from diffusion.families.cosmos.network import CosmosTransformer
from diffusion.families.sd3.network import SD3Config, SD3Transformer
from diffusion.families.wan.config import WanConfig
from diffusion.families.wan.network import WanTransformer
from diffusion.ulysses import ALONE, SequenceRanks
from tests.gloo import join, leave
from tests.unit.diffusion import test_saved
from trainer.learn.parallel import recompute

HEADS = 12
SD3 = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 4,
    "num_attention_heads": HEADS,
    "joint_attention_dim": 10,
    "caption_projection_dim": 4 * HEADS,
    "pooled_projection_dim": 6,
    "pos_embed_max_size": 9,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0,),
}
WAN: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "freq_dim": 8,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 16,
}
I2V = {"in_channels": 12, "image_dim": 6, "added_kv_proj_dim": 8 * HEADS}
COSMOS: dict[str, Any] = {
    "in_channels": 5,
    "out_channels": 4,
    "num_attention_heads": HEADS,
    "attention_head_dim": 12,
    "num_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": 10,
    "adaln_lora_dim": 6,
    "max_size": (8, 24, 24),
    "patch_size": (1, 2, 2),
    "rope_scale": (1.0, 3.0, 3.0),
    "concat_padding_mask": True,
    "extra_pos_embed_type": None,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 14,
    "encoder_hidden_states_channels": 10,
}
PICTURES, CLIPS, LENGTHS = [(8, 8), (2, 6), (18, 2), (8, 8)], [(1, 6, 6), (3, 2, 10), (5, 2, 2), (1, 6, 6)], [5, 1, 7, 3]
EVEN_PICTURES, EVEN_CLIPS, EVEN_LENGTHS = [(6, 10)] * 3, [(3, 6, 2)] * 3, [5] * 3
GIVEN, EVEN_GIVEN = [1, 0, 2, 3], [1] * 3


def texts(channels: int, lengths: list[int], g: torch.Generator) -> list[Tensor]:
    return [torch.randn(n, channels, generator=g) for n in lengths]


@dataclass(frozen=True)
class Case:
    """A network and requests for it."""

    build: Callable[[], PackedModel]
    sizes: list[tuple[int, ...]]
    lengths: list[int]
    channels: int
    given: list[int] | None = None
    buckets: int | None = None
    recompute: bool = False

    def network(self) -> PackedModel:
        """With random weights, none of them at one or zero."""
        model = self.build()
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g))
        model.buckets = self.buckets
        for block in model.blocks if self.recompute else ():
            recompute(block)
        return model

    def inputs(self) -> dict[str, Any]:
        """Stacked where sizes are equal, else lists."""
        g = torch.Generator().manual_seed(1)
        even = len(set(self.sizes)) == 1 and len(set(self.lengths)) == 1
        put = torch.stack if even else list
        found: dict[str, Any] = {"latents": put([torch.randn(4, *size, generator=g) for size in self.sizes]), "t": torch.rand(len(self.sizes), generator=g)}
        network = self.build()
        found["prompt_embeds"] = put(texts(self.channels, self.lengths, g))
        if isinstance(network, SD3Transformer):
            found["pooled"] = torch.randn(len(self.sizes), network.config.pooled_projection_dim, generator=g)
        if network.needs_picture:
            found["image_embeds"] = put([torch.randn(257, 6, generator=g) for _ in self.sizes])
            found["condition"] = put([torch.randn(8, *size, generator=g) for size in self.sizes])
        if self.given is not None:
            found["given"] = put([torch.randn(4, k, *size[1:], generator=g) for k, size in zip(self.given, self.sizes, strict=True)])
            if isinstance(network, CosmosTransformer):
                found["fps"] = torch.tensor([16.0, 24.0, 30.0, 8.0])[: len(self.sizes)]
        return found


def _cases() -> dict[str, Case]:
    networks: dict[str, tuple[Callable[[], PackedModel], int, bool]] = {
        "SD3": (lambda: SD3Transformer(SD3Config(**SD3)), 10, False),
        "Wan T2V": (lambda: WanTransformer(WanConfig(**WAN)), 10, False),
        "Wan I2V": (lambda: WanTransformer(WanConfig(**{**WAN, **I2V})), 10, False),
        "Wan TI2V": (lambda: WanTransformer(WanConfig(**WAN)), 10, True),
        "Cosmos T2V": (lambda: CosmosTransformer(CosmosConfig(**COSMOS)), 14, False),
        "Cosmos V2V": (lambda: CosmosTransformer(CosmosConfig(**COSMOS)), 14, True),
        "Cosmos 1.0's positions": (lambda: CosmosTransformer(CosmosConfig(**{**COSMOS, "extra_pos_embed_type": "learnable"})), 14, False),
    }
    found = {}
    for name, (build, channels, given) in networks.items():
        mixed, even = (PICTURES, EVEN_PICTURES) if name == "SD3" else (CLIPS, EVEN_CLIPS)
        case = partial(Case, build, channels=channels)
        found[f"{name}, a mixed pack"] = case(sizes=mixed, lengths=LENGTHS, given=GIVEN if given else None)
        found[f"{name}, equal rows"] = case(sizes=even, lengths=EVEN_LENGTHS, given=EVEN_GIVEN if given else None)
        found[f"{name}, in buckets"] = case(sizes=mixed, lengths=LENGTHS, given=GIVEN if given else None, buckets=8)
        found[f"{name}, recomputed"] = case(sizes=mixed, lengths=LENGTHS, given=GIVEN if given else None, recompute=True)
    return found


CASES: dict[str, Case] = _cases()


def computed(case: Case, ranks: SequenceRanks = ALONE) -> dict[str, Any]:
    """Velocities, a loss that weighs each of their values otherwise, and the gradients of it that this rank finds."""
    model = case.network()
    model.share(ranks)
    out = model(**case.inputs())
    g = torch.Generator().manual_seed(2)
    loss = torch.stack([(torch.randn(v.shape, generator=g) * v + v.square()).sum() for v in out]).sum()
    loss.backward()
    return {"velocities": [v.detach() for v in out], "loss": loss.detach(), "gradients": {n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def numbered() -> Tensor:
    return (torch.arange(2 * 7 * HEADS * 2) % 251).to(torch.bfloat16).reshape(2, 7, HEADS, 2)


def exchanged(ranks: SequenceRanks) -> dict[str, Any]:
    """Two rows of seven tokens of twelve heads, numbered, there and back; in bf16."""
    whole = numbered()
    own = ranks.cut(whole).requires_grad_()
    heads = ranks.to_heads(own, 7)
    back = ranks.to_tokens(heads)
    (back * back.detach()).sum().backward()
    return {
        "heads": heads.detach(),
        "gathered": ranks.gather(own, 7).detach(),
        "back": torch.equal(back, own),
        "gradient": torch.equal(own.grad, own) if own.grad is not None else False,
    }


def kept(ranks: SequenceRanks) -> dict[str, tuple[int, int]]:
    """Bytes of activations that this rank keeps for a backward pass, and those of one that has all tokens to itself, by architecture. (A
    picture's features, few beside a clip's tokens, are embedded by every rank.)"""
    found = {}
    for name, config in (("SD3", test_saved.SD35), ("Wan", test_saved.WAN), ("Cosmos", test_saved.COSMOS)):
        model = test_saved.network(config)
        inputs, bytes_of = test_saved.inputs(model), partial(test_saved.kept, model)
        alone = bytes_of(inputs, "float32")[0]
        model.share(ranks)
        found[name] = (bytes_of(inputs, "float32")[0], alone)
    return found


def main(rank: int, world: int, folder: Path) -> None:
    join(rank, world, folder)
    assert dist.group.WORLD is not None
    ranks = SequenceRanks.of(dist.group.WORLD)
    leave(
        rank, folder, {name: computed(case, ranks) for name, case in CASES.items()} | {"exchanged": exchanged(ranks), "kept": kept(ranks) if world < 4 else {}}
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
