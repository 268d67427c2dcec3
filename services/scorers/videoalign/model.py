"""The reward model: a stock Qwen2-VL that reads clip and template, and a linear head at the three reward tokens.

Composition, not a subclass: transformers 5 loads a legacy Qwen2-VL checkpoint into a subclass with the language model
left at random, and says so only in a report.

Positions are 0 … L-1 on all three rotary axes, although Qwen2-VL has a 3-D scheme: the published model was trained and is
used with plain positions, because its code calls the inner language model without any.

No attention mask: the decoder is causal and padding stands on the right, so no real token sees it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel


class LoraLinear(nn.Module):
    """A linear layer with its low-rank update beside it: base(x) + scale * B(A(x)), each rounded to the weights' dtype."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device="meta")
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device="meta")
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x)) * self.scale


class RewardModel(nn.Module):
    """Token ids and patches in, three raw outputs out."""

    def __init__(self, qwen: Qwen2VLModel, head_dim: int, video_id: int, reward_ids: tuple[int, ...]) -> None:
        super().__init__()
        self.qwen = qwen
        self.rm_head = nn.Linear(qwen.language_model.config.hidden_size, head_dim, bias=False, device="meta")
        self.video_id, self.reward_ids = video_id, reward_ids

    @torch.inference_mode()
    def forward(self, ids: Tensor, patches: Tensor, grids: Tensor) -> Tensor:
        """Raw outputs [B, 3] for VQ, MQ, TA.

        ``ids`` int64 [B, L], padded on the right; ``patches`` [P, 1176] of all clips in order; ``grids`` int64 [B, 3] of
        (t, h, w) patches. Raises ``ValueError`` unless each row holds every reward token once, in order.
        """
        places = reward_places(ids, self.reward_ids)
        seen = self.qwen.visual(patches.to(self.qwen.visual.dtype), grid_thw=grids).pooler_output
        words = self.qwen.language_model.embed_tokens(ids)
        video = ids == self.video_id
        if int(video.sum()) != len(seen):
            raise ValueError(f"{int(video.sum())} video tokens for {len(seen)} merged patches")
        words = words.masked_scatter(video[..., None], seen.to(words.dtype))
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, len(ids), -1)
        hidden = self.qwen.language_model(inputs_embeds=words, position_ids=positions, use_cache=False).last_hidden_state
        return pool(self.rm_head(hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))))


def reward_places(ids: Tensor, reward_ids: tuple[int, ...]) -> Tensor:
    """Positions [B, 3] of the reward tokens. Raises ``ValueError`` unless each occurs once per row, in order."""
    hits = torch.stack([ids == token for token in reward_ids], dim=1)  # [B, 3, L]
    counts, places = hits.sum(-1), hits.int().argmax(-1)
    if not bool((counts == 1).all()) or not bool((places.diff(dim=1) > 0).all()):
        raise ValueError(f"each row needs the three reward tokens once and in order, found {counts.tolist()}")
    return places


def pool(outputs: Tensor) -> Tensor:
    """Head outputs at the three tokens [B, 3, 1 or 3] → [B, 3]: the shared output, or the i-th at the i-th token."""
    return outputs[..., 0] if outputs.shape[-1] == 1 else outputs.diagonal(dim1=1, dim2=2)
