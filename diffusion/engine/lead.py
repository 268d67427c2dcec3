"""An engine whose network is shared by several processes: what the one with the engine tells the others.

    leader     engine ─► runner ─ swap, drop ────────────────────────┐
                            └─► network's forward pass ─ its inputs ─┤
    follower                                                         └─► follow.py: the same, in the same order, its outputs thrown away

All processes hold the network and weights of their own reading; a pass of theirs is one pass, cut by tokens and by heads (`diffusion.ulysses`).
The engine, its requests and their noise are the leader's alone. A pass that fails in one of them leaves the others in the middle of it: no
error is mended here, whoever made the processes ends them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

from torch import nn


class Followers(Protocol):
    """The other processes, told in the engine's thread and in its order. No method waits for what it starts."""

    def swap(self, second: bool, version: int, digest: str | None) -> None:
        """Weights that they hold under this name are put in place; `second`: of the second set (`diffusion.engine.side`)."""

    def drop(self) -> None:
        """The second set is let go."""

    def forward(self, second: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The network is called with these inputs."""

    def lost(self, error: BaseException) -> NoReturn:
        """A pass or a swap has failed in the leader, and they may not have; does not return."""


class Lead:
    """Tells the followers of a network whenever it is called.

    Args:
        network: of the leader, which shares its passes with theirs.
        followers: who is told.
    """

    def __init__(self, network: nn.Module, followers: Followers) -> None:
        self.followers, self._second = followers, False
        network.register_forward_pre_hook(self._called, with_kwargs=True)

    def _called(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.followers.forward(self._second, args, kwargs)

    @contextmanager
    def second(self) -> Iterator[None]:
        """The network has the second set of weights meanwhile."""
        self._second = True
        try:
            yield
        finally:
            self._second = False
