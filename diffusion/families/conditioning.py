"""What every text encoder offers: the pair (token embeddings, pooled vector) that an SD3 policy is conditioned on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """One encoded prompt: `prompt_embeds` `[L, D]` (padding included, as the pipeline makes it) and `pooled` `[P]`."""

    prompt_embeds: Tensor
    pooled: Tensor

    def to(self, device: torch.device | str) -> Conditioning:
        return Conditioning(self.prompt_embeds.to(device), self.pooled.to(device))

    @property
    def nbytes(self) -> int:
        return self.prompt_embeds.nbytes + self.pooled.nbytes


@dataclass(frozen=True, eq=False)
class TextConditioning:
    """Encoded prompts: `prompt_embeds` `[B, L, D]` and `pooled` `[B, P]`."""

    prompt_embeds: Tensor
    pooled: Tensor

    def __getitem__(self, index: int) -> Conditioning:
        """Prompt `index` alone, with memory of its own."""
        return Conditioning(self.prompt_embeds[index].clone(), self.pooled[index].clone())


class TextEncoder(Protocol):
    """Frozen encoder of prompts."""

    def encode(self, prompts: list[str]) -> TextConditioning:
        """Encode prompts; fp32 on the CPU. Raises ValueError naming a prompt that does not fit."""
        ...

    def signature(self, prompt: str) -> bytes:
        """Equal for prompts that become the same conditioning, to the bit; cheap enough for every prompt of a run. Raises as `encode`."""
        ...


def digest_of(conditioning: Conditioning) -> bytes:
    """Digest of an encoded prompt's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (conditioning.prompt_embeds, conditioning.pooled):
        digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.digest()


def collisions(signature: Callable[[str], bytes], prompts: Iterable[str]) -> list[list[str]]:
    """Groups of different prompts that become the same conditioning, to the bit (`TextEncoder.signature`): a policy cannot tell them apart.

    Raises:
        ValueError: the encoder refuses a prompt.
    """
    groups: dict[bytes, list[str]] = {}
    for prompt in dict.fromkeys(prompts):
        groups.setdefault(signature(prompt), []).append(prompt)
    return [group for group in groups.values() if len(group) > 1]
