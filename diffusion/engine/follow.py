"""A process that takes part in the forward passes of an engine elsewhere, see `lead.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion.engine.incoming import Incoming
from diffusion.engine.runner import Runner
from diffusion.engine.side import SideRunner
from diffusion.families.base import PackedModel
from diffusion.precision import autocast


class Follower:
    """The network of a follower, its two sets of weights, and those that it has been told to hold.

    Args:
        model: the network, shared with the leader's (`PackedModel.share`).
        max_tokens, dtype, merge: as of the leader's `Runner`.
    """

    def __init__(self, model: PackedModel, max_tokens: int, dtype: str = "float32", merge: bool = False) -> None:
        self._live = Runner(model, max_tokens, dtype, merge, side=True)
        self._side = SideRunner(self._live)
        self._held: dict[tuple[bool, int, str | None], Incoming] = {}

    @property
    def tokens(self) -> int:
        """Tokens of a forward pass that fit here."""
        return self._live.plan.tokens

    def hold(self, second: bool, incoming: Incoming, version: int, digest: str | None) -> None:
        """Keep opened weights until the leader swaps to them."""
        self._held[second, version, digest] = incoming

    def swap(self, second: bool, version: int, digest: str | None) -> None:
        """Put weights in place that are held under this name; others that came before them are let go.

        Raises:
            LookupError: none are.
        """
        name = second, version, digest
        if name not in self._held:
            raise LookupError(f"weights of version {version} were not given to this rank; it holds {sorted(v for _, v, _ in self._held)}")
        incoming = self._held[name]
        of_kind = [key for key in self._held if key[0] == second]
        for key in of_kind[: of_kind.index(name) + 1]:
            del self._held[key]
        runner = self._side if second else self._live
        runner.propose(incoming, version, digest)
        runner.swap()

    def drop(self) -> None:
        """Let the second set go."""
        self._side.drop()

    @torch.no_grad()
    def forward(self, second: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take part in a pass; the leader has its output."""
        runner = self._side if second else self._live
        with runner.weights(), autocast(runner.dtype, runner.device):
            runner.model(*[self._here(one) for one in args], **{name: self._here(one) for name, one in kwargs.items()})

    def _here(self, value: Any) -> Any:
        """Tensors on this rank's device."""
        if isinstance(value, Tensor):
            return value.to(self._live.device)
        return [self._here(one) for one in value] if isinstance(value, list) else value
