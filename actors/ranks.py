"""A generator of several processes, which share the tokens of every forward pass (`rollout.sequence_ranks`).

    RolloutGenerator (leader) ─ Ray calls, one after the other: hold, swap, forward … ─► GeneratorRank 1 … S - 1
            └─────────────────────────── the pass itself: gloo or NCCL ──────────────────────┘

The leader leases, encodes, samples, decodes and commits; ranks have the network alone and read weights themselves, from where the leader
reads them. They are its children: Ray ends them with it, and it ends itself when one of them is lost, so that all come again together;
groups that it had leased go to others. What a call brings is a pass's inputs, a few megabytes beside seconds of work.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from actors.weights.reading import Exported
from actors.weights.store import View
from diffusion.checkpoint import StartingWeights, load_network
from diffusion.device import resolve_device
from diffusion.engine.follow import Follower
from diffusion.engine.runner import compile_for_batches
from diffusion.families.base import PackedModel
from diffusion.ulysses import SequenceRanks

if TYPE_CHECKING:
    from actors.rollout import RolloutSpec

LOADING_DEADLINE_S = 900.0
"""For every rank of a generator to have loaded the network."""
PASS_DEADLINE_S = 300.0
"""Of a collective: a rank that is silent for so long is lost."""
WEIGHTS = "weights"
"""Concurrency group of reading weights: it goes on beside forward passes."""


def _join(index: int, world: int, store: dist.Store, device: str) -> SequenceRanks:
    """Meet the others; this process is rank `index`."""
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=index, world_size=world, timeout=timedelta(seconds=PASS_DEADLINE_S))
    group = dist.group.WORLD
    assert group is not None  # it was just made
    return SequenceRanks.of(group)


class GeneratorRank:
    """A rank that follows; plain class, which the leader makes a Ray actor. It ends when anything fails in it.

    Args:
        spec: of its generator.
        index: among its ranks, from 1.
    """

    def __init__(self, spec: RolloutSpec, index: int) -> None:
        torch.set_num_threads(spec.rollout.threads)
        self._device = resolve_device("cuda" if spec.rollout.gpus > 0 else "cpu", f"rollout.gpus={spec.rollout.gpus:g}")
        self._model, _ = load_network(spec.model, self._device, spec.seed)
        self._spec, self._index, self._turn = spec, index, 0

    def pid(self) -> int:
        """Process id, once the network is loaded."""
        return os.getpid()

    def join(self, host: str, port: int) -> int:
        """Meet the others at the leader's store; tokens of a forward pass that fit here."""
        spec, world = self._spec, self._spec.rollout.sequence_ranks
        store = dist.TCPStore(host, port, world, is_master=False, timeout=timedelta(seconds=PASS_DEADLINE_S))
        self._model.share(_join(self._index, world, store, self._device.type))
        merge = spec.model.lora.rank > 0 and spec.model.lora.merge
        self._follower = Follower(self._model, spec.sampler.max_tokens, spec.model.dtype, merge)
        if spec.model.compile:
            compile_for_batches(self._model)
        return self._follower.tokens

    def hold(self, second: bool, weights: View | Exported | None, version: int, digest: str | None, deadline_s: float) -> None:
        """Open weights (None = those that the run started from) and keep them for `swap`. Raises WeightsGone, WeightsDamaged."""
        found = StartingWeights(self._model, self._spec.model, self._spec.seed) if weights is None else weights.open(deadline_s)
        self._follower.hold(second, found, version, digest)

    def follow(self, turn: int, what: str, *values: Any) -> None:
        """Do as the leader does: `swap`, `drop` or `forward` of `Follower`. `turn` counts them: one out of its turn is an error as any other."""
        try:
            self._turn += 1
            if turn != self._turn:
                raise RuntimeError(f"turn {turn} came as turn {self._turn}")
            getattr(self._follower, what)(*values)
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # the others are in the middle of the same pass: their next collective fails at once


class GeneratorRanks:
    """The followers of a generator, as its engine and whoever gives it weights see them (`diffusion.engine.lead.Followers`).

    Args:
        spec: of the generator, which is rank 0.
        device: `cpu` or `cuda`.
    """

    def __init__(self, spec: RolloutSpec, device: str) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._world, self._device, self._turn = spec.rollout.sequence_ranks, device, 0
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)  # its links are the fastest
        kind: Any = ray.remote(concurrency_groups={WEIGHTS: 1})(GeneratorRank)  # type: ignore[call-overload]
        follower = kind.options(num_cpus=1, num_gpus=spec.rollout.gpus, scheduling_strategy=node)
        self._others = [follower.remote(spec, index) for index in range(1, self._world)]
        self._told: list[Any] = []

    def join(self, network: PackedModel) -> int:
        """Share this network's passes with them; tokens of a pass that fit in each of them.

        Raises:
            ValueError: attention heads that cannot be shared evenly.
            RuntimeError, ray.exceptions.RayError: a rank did not load the network, or did not come.
        """
        import ray

        ray.get([other.pid.remote() for other in self._others], timeout=LOADING_DEADLINE_S)
        host, wait = ray.util.get_node_ip_address(), timedelta(seconds=PASS_DEADLINE_S)
        store = dist.TCPStore(host, 0, self._world, is_master=True, timeout=wait, wait_for_workers=False)
        coming = [other.join.remote(host, store.port) for other in self._others]
        network.share(_join(0, self._world, store, self._device))
        return min(ray.get(coming, timeout=PASS_DEADLINE_S))

    def hold(self, second: bool, weights: View | Exported | None, version: int, digest: str | None, deadline_s: float) -> None:
        """Have every rank open weights that the engine will be given; to be called before it is. Raises WeightsGone, WeightsDamaged."""
        import ray

        opened = [o.hold.options(concurrency_group=WEIGHTS).remote(second, weights, version, digest, deadline_s) for o in self._others]
        try:
            ray.get(opened, timeout=2 * deadline_s)
        except ray.exceptions.RayActorError as error:
            self.lost(error)

    def swap(self, second: bool, version: int, digest: str | None) -> None:
        self._tell("swap", second, version, digest)

    def drop(self) -> None:
        self._tell("drop")

    def forward(self, second: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._tell("forward", second, [_plain(one) for one in args], {name: _plain(one) for name, one in kwargs.items()})

    def _tell(self, what: str, *values: Any) -> None:
        import ray

        try:
            if self._told:
                ray.get(ray.wait(self._told, num_returns=len(self._told), timeout=0)[0])
        except ray.exceptions.RayError as error:
            self.lost(error)
        self._turn += 1
        shared = [ray.put(value) for value in values]  # once for all of them
        self._told = [other.follow.remote(self._turn, what, *shared) for other in self._others]

    def lost(self, error: BaseException) -> NoReturn:
        print(f"a rank of this generator failed ({type(error).__name__}: {error}); it ends, and Ray starts all of its ranks again", flush=True)
        os._exit(1)


def _plain(value: Any) -> Any:
    """What another process can take: tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
