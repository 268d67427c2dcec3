"""Packed token streams: the tokens of all requests of a batch in one tensor.

A stream has shape `[rows, tokens, dim]`. Requests of one length stand as one row each (`[B, L, dim]`, a plain batch);
requests of unequal length are laid end to end in a single row (`[1, T, dim]`). Everything that acts on tokens alone
(linear layers, norms) does not care; what acts per request goes through the `Stream` that describes the layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """Layout of one packed stream: the token count of each request, in request order."""

    lens: tuple[int, ...]

    @cached_property
    def even(self) -> bool:
        return len(set(self.lens)) == 1

    @property
    def total(self) -> int:
        return sum(self.lens)

    def pack(self, parts: list[Tensor] | Tensor) -> Tensor:
        """Tokens per request (`[L_i, dim]` each, or `[B, L, dim]`) to a stream."""
        if isinstance(parts, Tensor):
            return parts
        return torch.stack(parts) if self.even else torch.cat(parts)[None]

    def per_token(self, values: Tensor) -> Tensor:
        """Per-request values `[B, dim]` in a shape that broadcasts over the stream's tokens."""
        if self.even:
            return values[:, None]
        repeats = torch.tensor(self.lens, device=values.device)
        return values.repeat_interleave(repeats, dim=0, output_size=self.total)[None]

    def unpack(self, tokens: Tensor) -> list[Tensor]:
        """Stream to a list of `[L_i, dim]`."""
        return list(tokens) if self.even else list(tokens[0].split(self.lens))


class JointLayout:
    """How two streams interleave for joint attention: `[image_0, text_0, image_1, text_1, …]`."""

    def __init__(self, image: Stream, text: Stream) -> None:
        if len(image.lens) != len(text.lens):
            raise ValueError(f"{len(image.lens)} image requests but {len(text.lens)} text requests")
        self.image, self.text = image, text
        self.lens = [a + b for a, b in zip(image.lens, text.lens, strict=True)]
        self.even = image.even and text.even

    @cached_property
    def _order(self) -> Tensor:
        """Position in `[all image tokens, all text tokens]` of each token of the joint order."""
        images = torch.arange(self.image.total).split(self.image.lens)
        texts = (torch.arange(self.text.total) + self.image.total).split(self.text.lens)
        return torch.cat([p for pair in zip(images, texts, strict=True) for p in pair])

    def join(self, image: Tensor, text: Tensor) -> Tensor:
        """Two streams `[rows, tokens, …]` to the joint packed sequence `[1, T, …]`."""
        if self.even:
            both = torch.cat([image, text], 1)
            return both.reshape(1, -1, *both.shape[2:])
        flat = torch.cat([a.reshape(-1, *a.shape[2:]) for a in (image, text)])
        return flat[self._order.to(flat.device)][None]

    def split(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of `join`."""
        if self.even:
            rows = joint.reshape(len(self.lens), self.lens[0], *joint.shape[2:])
            return rows[:, : self.image.lens[0]], rows[:, self.image.lens[0] :]
        back = torch.empty_like(self._order)
        back[self._order] = torch.arange(len(self._order))
        flat = joint[0][back.to(joint.device)]
        parts = flat[: self.image.total], flat[self.image.total :]
        return (
            parts[0].reshape(len(self.image.lens), -1, *flat.shape[1:]) if self.image.even else parts[0][None],
            parts[1].reshape(len(self.text.lens), -1, *flat.shape[1:]) if self.text.even else parts[1][None],
        )
