"""One rank of the learner group: the sharded policy, its optimiser and moving average, one update, its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from diffusion.checkpoint import load_policy
from diffusion.engine.forward import autocast
from diffusion.kernels import make_kernel
from trainer.batch import StepBatch, take
from trainer.config import OptimizerConfig, RunConfig
from trainer.objective import data_terms, policy_terms
from trainer.plan import passes, slices


def learning_rate(config: OptimizerConfig, step: int, updates: int) -> float:
    """Learning rate of update `step` (1-based): linear warm-up, then constant or cosine to 2 %."""
    rate = config.lr * min(1.0, step / config.warmup) if config.warmup else config.lr
    if config.decay == "cosine":
        rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / updates)))
    return rate


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Learner:
    """See the module's docstring. Every method but `shard` is collective: all ranks call it, in the same order.

    Args:
        config: the run.
        device: this rank's device.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        policy = load_policy(config.model, device, config.seed)
        self.process, self.model = policy.process, policy.transformer.train()
        self.reference = load_policy(config.model, device, config.seed).transformer.eval().requires_grad_(False) if config.objective.kl_weight > 0 else None
        self.kernel = make_kernel(config.sampler.kernel, self.process, config.sampler.noise_level, config.sampler.steps)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        if config.learner.shard_blocks:
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh, reshard_after_forward=config.learner.shard_blocks)
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True)
        self.ema = {n: p.detach().clone() for n, p in self.model.named_parameters()} if o.ema > 0 else {}

    def update(self, batch: StepBatch, step: int) -> dict[str, float]:
        """One optimiser update. A non-finite gradient skips it on all ranks alike (the norm is global).

        Returns:
            Global numbers: losses, grad_norm, lr, skipped, ratio_deviation, clip_fraction. One that is not finite is left
            out: a failure is no number, and a skipped update must still be recorded.
        """
        world = dist.get_world_size()
        sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        losses = list(self._losses(batch, sums))
        assert isinstance(self.model, FSDPModule)
        for i, compute in enumerate(losses):
            self.model.set_requires_gradient_sync(i == len(losses) - 1)
            # FSDP averages gradients over ranks; the sums are divided by global counts, hence the factor
            (compute() * world).backward()
        norm = self._clip()
        skipped = not math.isfinite(norm)
        lr = learning_rate(self.config.optimizer, step, self.config.updates)
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self._update_ema()
        self.optimizer.zero_grad()
        dist.all_reduce(sums)
        stats = {"lr": lr, "skipped": float(skipped)} | ({} if skipped else {"grad_norm": norm})
        if batch.transition_count:
            policy, ratio, clipped, kl = (sums[:4] / batch.transition_count).tolist()
            stats |= {"policy_loss": policy, "ratio_deviation": ratio, "clip_fraction": clipped}
            if self.reference is not None:
                stats["reverse_kl"] = kl
        if batch.anchor_count:
            stats["data_loss"] = float(sums[4]) / batch.anchor_count
        return {name: value for name, value in stats.items() if math.isfinite(value)}

    def _losses(self, batch: StepBatch, sums: Tensor) -> Iterator[Callable[[], Tensor]]:
        """One closure per forward pass, the same number on every rank; each adds its statistics to `sums`."""
        config, micro = self.config, self.config.learner.micro_batch

        def policy(part: slice) -> Tensor:
            assert batch.transitions is not None
            rows = take(batch.transitions, part, self.device)
            inputs = (rows.x, rows.t, rows.prompt_embeds, rows.pooled)
            with autocast(config.model.dtype, self.device):
                velocity = self.model(*inputs)
                with torch.no_grad():
                    reference = self.reference(*inputs) if self.reference is not None else None
            loss, stats = policy_terms(velocity, reference, rows, self.kernel, config.objective)
            for i, name in enumerate(("policy_loss", "ratio_deviation", "clipped", "reverse_kl")):
                if name in stats:
                    sums[i] += stats[name]
            return loss / batch.transition_count

        def data(part: slice) -> Tensor:
            assert batch.anchors is not None
            rows = take(batch.anchors, part, self.device)
            with autocast(config.model.dtype, self.device):
                velocity = self.model(self.process.noise(rows.x0, rows.eps, rows.t), rows.t, rows.prompt_embeds, rows.pooled)
            loss = data_terms(velocity, rows, self.process)
            sums[4] += loss.detach()
            return config.objective.data_weight * loss / batch.anchor_count

        if batch.transitions is not None:
            for part in slices(len(batch.transitions.x), passes(batch.transition_rows, micro)):
                yield partial(policy, part)
        if batch.anchors is not None:
            for part in slices(len(batch.anchors.x0), passes(batch.anchor_rows, micro)):
                yield partial(data, part)

    @torch.no_grad()
    def _clip(self) -> float:
        """Scale gradients to the largest norm allowed; returns the global norm before. One collective, whatever the
        number of tensors."""
        gradients = [_local(p.grad) for p in self.model.parameters() if p.grad is not None]
        square = torch.stack([g.double().square().sum() for g in gradients]).sum()
        dist.all_reduce(square)
        norm = float(square.sqrt())
        if math.isfinite(norm) and norm > self.config.optimizer.grad_clip:
            torch._foreach_mul_(gradients, self.config.optimizer.grad_clip / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def _update_ema(self) -> None:
        if self.ema:
            decay = self.config.optimizer.ema
            for name, parameter in self.model.named_parameters():
                _local(self.ema[name]).lerp_(_local(parameter.detach()), 1 - decay)

    def shard(self, rank: int) -> dict[str, Tensor]:
        """This rank's part of the state dict (dimension 0), CPU fp32, without a collective; buffers from rank 0 only."""
        state = self.model.state_dict()
        return {n: _local(t.detach()).cpu().contiguous() for n, t in state.items() if rank == 0 or isinstance(t, DTensor)}

    def full_state(self, ema: bool = False) -> dict[str, Tensor]:
        """The whole state dict, gathered on every rank, CPU fp32; with `ema`, averaged weights where there are any."""
        state = {n: _full(t.detach()).cpu() for n, t in self.model.state_dict().items()}
        if ema:
            state |= {n: _full(t).cpu() for n, t in self.ema.items()}
        return state

    def _shards(self) -> dict[str, object]:
        return {
            "model": self.model.state_dict(),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "ema": self.ema,
        }

    def save(self, folder: Path) -> None:
        """This rank's shards of model, optimiser and moving average (DCP), into a folder of its own."""
        dcp.save(self._shards(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """Restore from a complete DCP checkpoint; reshards when the number of ranks changed."""
        shards = self._shards()
        dcp.load(shards, checkpoint_id=folder)
        self.model.load_state_dict(shards["model"])  # type: ignore[arg-type]
        set_optimizer_state_dict(self.model, self.optimizer, shards["optimizer"])  # type: ignore[arg-type]
