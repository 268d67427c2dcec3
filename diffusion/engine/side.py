"""A second set of weights for the network of an engine, and an engine that samples with it between that one's steps.

    set_weights(incoming) ─► held ─► forward: exchanged, run, exchanged back … ─► drop

Held are tensors of what is trained; what is frozen is shared, so that an adapter's set is small. They are put in place for one forward
pass by exchanging pointers, never copied for it, and the network's own are back in place before anybody else can look. Adapters that
are merged for the live engine run unmerged here, as they are trained.

A compiled network reads its parameters through their objects at each call and keeps no address of their data (that CUDA graphs would;
`compile_for_batches` makes none). An adapter that is merged for one engine and not for the other is compiled once for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from diffusion.engine.engine import Engine, SwapPolicy
from diffusion.engine.incoming import Incoming
from diffusion.engine.runner import Runner
from diffusion.lora import trained_weights, unmerged_lora

T = TypeVar("T")


class SideRunner(Runner):
    """The network of a live runner with weights of its own."""

    second = True

    def __init__(self, live: Runner) -> None:
        self.model, self.dtype, self.device, self.plan, self.merge = live.model, live.dtype, live.device, live.plan, False
        self.lead = live.lead
        self.version, self.digest, self._next = 0, None, None
        self._held: dict[str, Tensor] = {}

    def _places(self) -> dict[str, Tensor]:
        if not self._held:
            self._held = {name: torch.empty_like(tensor) for name, tensor in trained_weights(self.model).items()}
        return self._held

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The network has the second set meanwhile. Raises LookupError when none is held."""
        if not self._held:
            raise LookupError("no second set of weights is held; set_weights first")
        with unmerged_lora(self.model), nullcontext() if self.lead is None else self.lead.second():
            self._exchange()
            try:
                yield
            finally:
                self._exchange()

    def _exchange(self) -> None:
        for name, place in trained_weights(self.model, keep_vars=True).items():
            self._held[name], place.data = place.data, self._held[name]

    def drop(self) -> None:
        """Free the second set."""
        if self.lead is not None:
            self.lead.followers.drop()
        self._held, self._next, self.version, self.digest = {}, None, 0, None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # others share the device


class SideEngine(Engine):
    """Samples with the network of a live engine and a second set of weights, under the same token budget.

    Both belong to one thread: neither may step while the other does.
    """

    runner: SideRunner

    def __init__(self, live: Engine) -> None:
        self._begin(SideRunner(live.runner), live.process, None)

    def set_weights(self, state: Mapping[str, Tensor] | Incoming, version: int, digest: str | None = None, policy: SwapPolicy = "in_flight") -> None:
        """As `Engine.set_weights`; weights that could not be read to their end leave none."""
        try:
            super().set_weights(state, version, digest, policy)
        except BaseException:
            self.runner.drop()
            raise

    def drop(self) -> None:
        """Free the second set. Raises RuntimeError while a request needs it."""
        if self.unfinished:
            raise RuntimeError(f"{self.unfinished} sequences are being sampled with the second set of weights")
        self.runner.drop()

    @torch.no_grad()
    def call(self, work: Callable[[], T]) -> T:
        """Run `work`, such as a forward pass for its loss, with the second set in place."""
        with self.runner.weights():
            try:
                return work()
            except Exception as error:
                if self.runner.lead is not None:
                    self.runner.lead.followers.lost(error)
                raise
