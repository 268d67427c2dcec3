"""Rotary positions of a grid of patches in frames, rows and columns, as video transformers use them."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.attention import constants

THETA = 10000.0


class Rotary:
    """Rotary positions of a patch grid: channel pairs are shared out to the frame, row and column axis.

    A third of the pairs (rounded down) goes to rows and to columns each, the rest to frames; frequencies theta^(-2i/dim),
    computed in fp64.

    Args:
        head_dim: channels of a head.
        length: most patches along an axis.
        thetas: of frames, rows and columns.
    """

    def __init__(self, head_dim: int, length: int, thetas: tuple[float, float, float] = (THETA, THETA, THETA)) -> None:
        side = 2 * (head_dim // 6)
        self.dims = (head_dim - 2 * side, side, side)
        self.length, self.thetas = length, thetas
        self._tables: dict[torch.device, list[Tensor]] = {}

    def _angles(self, device: torch.device) -> list[Tensor]:
        """Angle of each position along each axis, `[length, dim / 2]` fp64."""
        if device not in self._tables:
            with constants():
                position = torch.arange(self.length, dtype=torch.float64)
                ranges = [theta ** (torch.arange(0, d, 2, dtype=torch.float64) / d) for d, theta in zip(self.dims, self.thetas, strict=True)]
                self._tables[device] = [(position[:, None] / r).to(device) for r in ranges]
        return self._tables[device]

    def __call__(self, grid: tuple[int, ...], device: torch.device, stretch: float = 1.0) -> Tensor:
        """`[tokens, 2, head_dim / 2]`: cosine and sine of each token of a grid, no axis of which is longer than `length`.

        Args:
            stretch: distance of two frames, in positions.
        """
        frames, rows, columns = grid
        f, r, c = (table[:n] for table, n in zip(self._angles(device), grid, strict=True))
        f = f * stretch
        parts = f[:, None, None].expand(-1, rows, columns, -1), r[None, :, None].expand(frames, -1, columns, -1), c[None, None].expand(frames, rows, -1, -1)
        angle = torch.cat(parts, -1).flatten(0, 2)
        return torch.stack([angle.cos(), angle.sin()], 1).float()


def rotate_pairs(x: Tensor, positions: Tensor) -> Tensor:
    """Turn neighbouring channel pairs of `x` `[rows, tokens, heads, d]` by `positions` `[1, tokens, 2, d / 2]`."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (p[:, :, None] for p in positions.unbind(2))
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, positions: Tensor) -> Tensor:
    """The same with pairs (i, i + d / 2)."""
    a, b = x.chunk(2, -1)
    cos, sin = (p[:, :, None] for p in positions.unbind(2))
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
