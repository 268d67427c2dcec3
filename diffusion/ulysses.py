"""Ulysses sequence parallelism (arXiv 2309.14509): ranks share the tokens of a stream, and for the time of an attention its heads.

The T tokens of each row of a packed stream are cut into consecutive parts, whose lengths differ by one at most, so no token is padding. What
acts on tokens alone sees a rank's own; attention, by whatever provider, sees all tokens of a share of the heads:

    own tokens, all heads [R, T_r, H, d]  ── to_heads ──►  all tokens, own heads [R, T, H / S, d]  ─► varlen_attention
    own tokens            [R, T_r, H d]   ◄── to_tokens ─  all tokens            [R, T, H / S d]   ◄┘

Invariant: all ranks of a group are given the same requests and, behind `gather`, the same output, so each computes the same loss. Its
gradient enters a rank at the rank's own tokens (`gather` passes back that part and adds nothing up), and what a rank finds for a parameter
is its tokens' share: the S ranks' gradients add up to the gradient. A worked example: two ranks share 5 tokens as 2 and 3; y = w x, loss =
sum of y; each rank knows all five y, the first finds dw = x1 + x2, the second x3 + x4 + x5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def check_heads(heads: int, count: int) -> None:
    """Raises ValueError where `count` ranks cannot share so many heads evenly."""
    if heads % count:
        possible = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(f"{heads} attention heads cannot be shared evenly by {count} sequence ranks; possible are {possible}")


@dataclass(frozen=True, eq=False)
class SequenceRanks:
    """The ranks that share each stream, seen by one of them; by default one that has it all to itself.

    Attributes:
        index: which of them this is.
        count: how many, S.
        group: where they meet; every method but `cut` is collective in it, forward and backward.
    """

    index: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> SequenceRanks:
        """This process among the ranks of `group`."""
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def lens(self, total: int) -> list[int]:
        """How many of `total` tokens each rank has."""
        return [total * (r + 1) // self.count - total * r // self.count for r in range(self.count)]

    def cut(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of all tokens, which lie along `dim`: a copy, so that the whole is not kept for a backward pass."""
        if self.count == 1:
            return tokens
        lens = self.lens(tokens.shape[dim])
        return tokens.narrow(dim, sum(lens[: self.index]), lens[self.index]).clone()

    def to_heads(self, tokens: Tensor, total: int) -> Tensor:
        """This rank's tokens `[R, T_r, H, …]` to this rank's share of the heads of all `total` tokens of a row, `[R, T, H / S, …]`."""
        return tokens if self.count == 1 else _apply(_ToHeads, tokens, self, total)

    def to_tokens(self, heads: Tensor) -> Tensor:
        """Inverse of `to_heads`: `[R, T, C / S, …]` to `[R, T_r, C, …]`."""
        return heads if self.count == 1 else _apply(_ToTokens, heads, self, heads.shape[1])

    def gather(self, tokens: Tensor, total: int) -> Tensor:
        """All `total` tokens of a row `[R, T, …]`, on every rank. Backward: the part of the gradient that is of this rank's tokens."""
        return tokens if self.count == 1 else _apply(_Gather, tokens, self, total)


ALONE = SequenceRanks()


def _apply(function: type[torch.autograd.Function], tokens: Tensor, ranks: SequenceRanks, total: int) -> Tensor:
    out: Tensor = function.apply(tokens, ranks, total)
    return out


def _exchange(rows: Tensor, received: Sequence[int], sent: Sequence[int], ranks: SequenceRanks) -> Tensor:
    """Entries for each rank, one rank's behind the other's, for those that each has sent."""
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=ranks.group)
    return out


def _to_each(by_rank: Tensor, rows: int, ranks: SequenceRanks, total: int) -> Tensor:
    """Send each rank what stands for it in `[S, R, T_r, …]`; what all have sent, `[R, T, …]`."""
    sizes = [rows * n for n in ranks.lens(total)]
    out = _exchange(by_rank.flatten(0, 2), sizes, [sizes[ranks.index]] * ranks.count, ranks)
    return out[None] if rows == 1 else torch.cat([part.unflatten(0, (rows, -1)) for part in out.split(sizes)], 1)


def _heads_of(tokens: Tensor, ranks: SequenceRanks, total: int) -> Tensor:
    return _to_each(tokens.unflatten(2, (ranks.count, -1)).movedim(2, 0), len(tokens), ranks, total)


def _tokens_of(heads: Tensor, ranks: SequenceRanks, total: int) -> Tensor:
    rows, lens = len(heads), ranks.lens(total)
    entries = heads[0] if rows == 1 else torch.cat([part.flatten(0, 1) for part in heads.split(lens, 1)])
    own = rows * lens[ranks.index]
    out = _exchange(entries, [own] * ranks.count, [rows * n for n in lens], ranks)
    return out.unflatten(0, (ranks.count, rows, -1)).movedim(0, 2).flatten(2, 3)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, ranks: SequenceRanks, total: int) -> Tensor:
        ctx.ranks, ctx.total = ranks, total
        return _heads_of(tokens, ranks, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _tokens_of(gradient, ctx.ranks, ctx.total), None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, ranks: SequenceRanks, total: int) -> Tensor:
        ctx.ranks, ctx.total = ranks, total
        return _tokens_of(heads, ranks, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _heads_of(gradient, ctx.ranks, ctx.total), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, ranks: SequenceRanks, total: int) -> Tensor:
        ctx.ranks = ranks
        return _to_each(tokens.expand(ranks.count, *tokens.shape), len(tokens), ranks, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.cut(gradient), None, None
