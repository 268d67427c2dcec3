"""Large pictures in overlapping tiles, stitched by linear blends, one finished band of rows after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Run = Callable[[slice, slice], Tensor]
"""What becomes of a tile, by its rows and columns: `[…, rows x unit, columns x unit]`, fp32."""


def spans(length: int, tile: int, stride: int) -> list[tuple[int, int]]:
    """Starts and ends of tiles along an axis: each `tile` long, a new one every `stride`, none that another covers."""
    found = [(0, min(tile, length))]
    while found[-1][1] < length:
        start = found[-1][0] + stride
        found.append((start, min(start + tile, length)))
    return found


def _blend(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """From `a` to `b`, of one shape, along `dim`."""
    n = a.shape[dim]
    weight = (torch.arange(n, device=a.device, dtype=a.dtype) / n).view(-1, *[1] * (-1 - dim))
    return a + (b - a) * weight


def _joined(a: Tensor, b: Tensor, overlap: int, dim: int) -> Tensor:
    """`a`, then `b` along `dim`, of which the first `overlap` lie on `a`'s last."""
    before, own = a.split([a.shape[dim] - overlap, overlap], dim)
    same, after = b.split([overlap, b.shape[dim] - overlap], dim)
    return torch.cat([before, _blend(own, same, dim), after], dim)


def stitched(run: Run, height: int, width: int, tile: int, stride: int, unit: int) -> Iterator[tuple[int, Tensor]]:
    """Bands of finished rows from top to bottom: where a band starts, in output rows, and the band. At any time there is one band of
    tiles, and nothing of the rows above.

    Args:
        height, width, tile, stride: in the unit that `run` takes its slices in.
        unit: output rows and columns of one of them.
    """
    rows, columns = spans(height, tile, stride), spans(width, tile, stride)
    above: Tensor | None = None
    for i, (top, bottom) in enumerate(rows):
        band: Tensor | None = None
        for j, (left, right) in enumerate(columns):
            part = run(slice(top, bottom), slice(left, right))
            band = part if band is None else _joined(band, part, (columns[j - 1][1] - left) * unit, -1)
        assert band is not None
        if above is not None:
            band = _joined(above, band, above.shape[-2], -2)
        done = ((rows[i + 1][0] if i + 1 < len(rows) else bottom) - top) * unit
        yield top * unit, band[..., :done, :]
        above = band[..., done:, :].clone()
