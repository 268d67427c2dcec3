"""A network over the ranks: what is recomputed and what is sharded. The family declares its blocks (`PackedModel.blocks`)."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from diffusion.families.base import PackedModel
from trainer.config.learner import LearnerConfig

SHARD = "shard"
"""Dimension of the mesh over which parameters, gradients and the optimiser's state are cut."""


def mesh_of(device: torch.device) -> DeviceMesh:
    """All ranks along the dimension `shard`, on devices of this rank's kind; collective."""
    return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=(SHARD,))


def parallelize(model: PackedModel, mesh: DeviceMesh, config: LearnerConfig) -> None:
    """Recompute every block in the backward pass (`recompute`) and shard the network with FSDP2: block by block and the rest
    (`shard_blocks`), or as one unit. With `offload` shards, their gradients and so the optimiser's state rest in host memory, pinned
    where the mesh is of GPUs; parameters must then be given their values there, and buffers on the device. Works on the meta device;
    names of parameters stay as they are.

    Args:
        mesh: has a dimension `shard`.
    """
    if config.recompute:
        for block in model.blocks:
            recompute(block)
    shard = mesh[SHARD]
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
