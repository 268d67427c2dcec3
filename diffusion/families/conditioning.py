"""What a network is given beside latents and times: named tensors, made of an example's text, and of frames of its clip, by frozen encoders.

The names are those of the arguments of the family's `forward`, so that a batch of conditioning is passed as `**conditioning.tensors`:

    SD3          prompt_embeds [L, D], pooled [P]
    Wan, Cosmos  prompt_embeds [L, D]; of image- and video-to-video also what `diffusion.families.frames` names

The glyph world's encoder gives what its policy takes: the pooled vector where its tables have one.

It is a function of (encoder, text, frames): whoever needs it asks the encoder, and nothing that is stored carries it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Named tensors of one example, or of B examples with a dimension `[B, …]` in front. Every family has `prompt_embeds`."""

    tensors: Mapping[str, Tensor]

    @property
    def prompt_embeds(self) -> Tensor:
        """Token embeddings of the text `[L, D]` or `[B, L, D]`, padding included."""
        return self.tensors["prompt_embeds"]

    @property
    def tokens(self) -> int:
        """Text tokens of an example, L."""
        return self.prompt_embeds.shape[-2]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def __getitem__(self, index: int) -> Conditioning:
        """Example `index` of several, with memory of its own."""
        return Conditioning({name: tensor[index].clone() for name, tensor in self.tensors.items()})

    def rows(self, index: Tensor | slice) -> Conditioning:
        """These examples of several, in this order; int64 `[M]` or a slice."""
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def expand(self, count: int) -> Conditioning:
        """One example, `count` times, without a copy."""
        return Conditioning({name: tensor.expand(count, *tensor.shape) for name, tensor in self.tensors.items()})

    def beside(self, tensors: Mapping[str, Tensor]) -> Conditioning:
        """One example with more tensors, on the device of those that it has."""
        return Conditioning({**self.tensors, **{name: tensor.to(self.prompt_embeds.device) for name, tensor in tensors.items()}})

    def to(self, device: torch.device | str) -> Conditioning:
        return Conditioning({name: tensor.to(device) for name, tensor in self.tensors.items()})


def stacked(examples: Sequence[Conditioning]) -> Conditioning:
    """Several examples as one, `[B, …]`. Raises ValueError when their names or shapes differ."""
    packed = gathered(examples)
    uneven = [name for name, value in packed.items() if not isinstance(value, Tensor)]
    if uneven:
        raise ValueError(f"examples differ in the shape of {', '.join(uneven)}: encode them with the same encoder")
    return Conditioning({name: value for name, value in packed.items() if isinstance(value, Tensor)})


def gathered(examples: Sequence[Conditioning]) -> dict[str, Tensor | list[Tensor]]:
    """Arguments of a packed forward pass over these examples: `[B, …]` where their shapes are equal, else a list.

    Raises:
        ValueError: no example, or examples of different names.
    """
    names = {tuple(sorted(one.tensors)) for one in examples}
    if len(names) != 1:
        raise ValueError(f"examples of one pass need tensors of the same names, found {sorted(names)}")
    columns = {name: [one.tensors[name] for one in examples] for name in examples[0].tensors}
    return {name: torch.stack(column) if len({x.shape for x in column}) == 1 else column for name, column in columns.items()}


class TextEncoder(Protocol):
    """Frozen encoder of prompts."""

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts, `[B, …]`; fp32 on the CPU. What a prompt becomes does not depend, to the bit, on those beside it.
        Raises ValueError naming a prompt that does not fit."""
        ...

    def signature(self, prompt: str) -> bytes:
        """Equal for prompts that become the same conditioning, to the bit; cheap enough for every prompt of a run. Raises as `encode`."""
        ...


def digest_of(conditioning: Conditioning) -> bytes:
    """Digest of an encoded prompt's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for _, tensor in sorted(conditioning.tensors.items()):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
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
