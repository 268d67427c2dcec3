"""A network over the ranks: what is recomputed, what is sharded and who shares tokens. The family declares its blocks
(`PackedModel.blocks`).

Ranks form one mesh, replicas x shards x sequence, neighbours along the last: the ranks of a sequence group have the same rows, every other
group has rows of its own (data ranks), and weights are sharded over all ranks of a replica, whatever their rows. A worked example: 8 ranks
with `replicas: 2` and `sequence_ranks: 2` are two copies of the network, each cut into four; ranks 0 and 1 share the tokens of the first
quarter of the rows, 2 and 3 those of the second.

Convention of gradients: FSDP averages over all ranks. A rank finds its tokens' share of a row's gradient (`diffusion.ulysses`), so the sum
over all ranks is the gradient of the sum over all rows, each once, and a loss is multiplied by the number of ranks, whatever the mesh.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from diffusion.families.base import PackedModel
from diffusion.ulysses import ALONE, SequenceRanks
from trainer.config.learner import LearnerConfig

REPLICATE, SHARD = "replicate", "shard"
"""Dimensions of the mesh: over the first, where it is there, gradients alone travel; over the second parameters, gradients and the
optimiser's state are cut."""


@dataclass(frozen=True)
class Mesh:
    """All ranks, as one of them sees them.

    Attributes:
        shards: all ranks along `shard`, or along `replicate` and `shard`.
        sequence: those that share this rank's tokens.
        data_rank, data_ranks: which rows this rank has, and how many groups have rows of their own.
    """

    shards: DeviceMesh
    sequence: SequenceRanks
    data_rank: int
    data_ranks: int

    @property
    def speaks(self) -> bool:
        """Whether this rank counts its rows where sums run over all ranks: of those that share them the first does."""
        return self.sequence.index == 0


def mesh_of(device: torch.device, config: LearnerConfig) -> Mesh:
    """The mesh of all ranks, on devices of this rank's kind; collective. Raises ValueError where they form none."""
    world, count = dist.get_world_size(), config.sequence_ranks
    if world % (config.replicas * count):
        raise ValueError(f"{world} ranks are no multiple of learner.replicas={config.replicas} x learner.sequence_ranks={count}")
    deadline = timedelta(seconds=config.collective_timeout_s)
    sequence = ALONE if count == 1 else SequenceRanks.of(_group_among([list(range(i, i + count)) for i in range(0, world, count)], deadline))
    shards = init_device_mesh(device.type, (world,), mesh_dim_names=(SHARD,)) if config.replicas == 1 else _replicated(device, config.replicas, deadline)
    return Mesh(shards, sequence, dist.get_rank() // count, world // count)


def _group_among(groups: list[list[int]], deadline: timedelta) -> dist.ProcessGroup:
    """This rank's of groups that are made of all ranks; collective."""
    own, _ = dist.new_subgroups_by_enumeration(groups, timeout=deadline)
    assert own is not None
    return own


def _replicated(device: torch.device, replicas: int, deadline: timedelta) -> DeviceMesh:
    """Replicas of neighbours; groups are made here, as those of `init_device_mesh` have no deadline of ours."""
    ranks = torch.arange(dist.get_world_size()).view(replicas, -1)
    groups = [_group_among(found.tolist(), deadline) for found in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=(REPLICATE, SHARD))


def parallelize(model: PackedModel, mesh: Mesh, config: LearnerConfig) -> None:
    """Have the mesh's sequence ranks share every forward pass, recompute every block in the backward pass (`recompute`) and shard the network
    with FSDP2: block by block and the rest (`shard_blocks`), or as one unit. With `offload` shards, their gradients and so the optimiser's
    state rest in host memory, pinned where the mesh is of GPUs; parameters must then be given their values there, and buffers on the device.
    Works on the meta device; names of parameters stay as they are.

    Raises:
        ValueError: attention heads that the sequence ranks cannot share.
    """
    model.share(mesh.sequence)
    if config.recompute:
        for block in model.blocks:
            recompute(block)
    shard = mesh.shards
    rest = CPUOffloadPolicy(pin_memory=shard.device_type != "cpu") if config.offload else OffloadPolicy()
    if config.shard_blocks:
        for block in model.blocks:
            fully_shard(block, mesh=shard, offload_policy=rest)
    fully_shard(model, mesh=shard, reshard_after_forward=config.shard_blocks, offload_policy=rest)


def buffers_to(model: nn.Module, device: torch.device) -> None:
    """Move buffers, and no parameter, to `device`: offloaded parameters stay where they are."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def recompute(block: nn.Module) -> None:
    """Keep of the block's forward pass only its inputs. FSDP's hooks stand outside, so that weights are gathered once for the
    recomputation and the backward pass behind it. No block draws random numbers, so none of their state is kept."""
    forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    object.__setattr__(block, "forward", forward)
