"""One rank of the learner group: the sharded policy, its optimiser and moving average, one update, its checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from actors.conditioning import Conditioner, Subject, Subjects
from actors.encoding import LoneFrames
from diffusion.checkpoint import build_network, fill_network, load_text_encoder, open_policy
from diffusion.engine.cache import PromptCache
from diffusion.families.base import PackedModel
from diffusion.families.conditioning import Conditioning, TextEncoder, stacked
from diffusion.families.frames import FrameEncoder
from diffusion.families.given import whole_shape
from diffusion.kernels import make_kernel
from diffusion.lora import trained_weights, without_lora
from replay.buffer import Claim, ReplayBuffer
from trainer.config.learner import OptimizerConfig
from trainer.config.objective import ObjectiveConfig
from trainer.config.run import RunConfig
from trainer.learn.batch import StepBatch, step_batches, take
from trainer.learn.forward import Guidance, data_prediction, policy_prediction
from trainer.learn.objective import Anchors, Samples, Transitions, data_terms, density, policy_terms, sample_terms
from trainer.learn.optimizer import make_optimizer
from trainer.learn.parallel import Mesh, buffers_to, mesh_of, parallelize
from trainer.learn.plan import passes, slices

logger = logging.getLogger(__name__)


def guidance_of(config: RunConfig, texts: PromptCache, device: torch.device) -> Guidance | None:
    """The run's guidance with its negative prompt encoded, None without. Raises ValueError for a prompt that does not fit."""
    sampler = config.sampler
    if sampler.guidance == 1:
        return None
    return Guidance(sampler.guidance, texts.get([sampler.negative_prompt])[0].to(device))


def learning_rate(config: OptimizerConfig, step: int, decay_updates: int) -> float:
    """Learning rate of update `step` (1-based): linear warm-up, then constant, or cosine to 2 % at `decay_updates` and after."""
    rate = config.lr * min(1.0, step / config.warmup) if config.warmup else config.lr
    if config.decay == "cosine":
        rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / decay_updates)))
    return rate


SUMS = ("policy_loss", "ratio_deviation", "clipped", "reverse_kl", "data_loss", "old_kl")
"""What ranks sum over the rows of an update, in this order;"""
BY_STEP = ("count", "ratio_deviation_by_step", "log_prob_gap_by_step")
"""then, over the rows of each step index, these."""


def _finite(numbers: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def old_decay(config: ObjectiveConfig, step: int) -> float:
    """How much of the old policy stays after update `step` (1-based)."""
    return min(config.old_decay, config.old_decay_rate * max(0, step - config.old_decay_start))


class Learner:
    """See the module's docstring. Every method is collective: all ranks call it, in the same order.

    Args:
        config: the run.
        device: this rank's device.
        encoder: of prompts and captions; None = the policy's own text encoders, loaded.
        frames: of frames that are given; None = the policy's own, loaded when first asked.
    Attributes:
        attention: the provider in use, and why.
        process: the policy's forward process.
        kernel: step kernel of its rollouts; `kernel.process` is the space of their states.
        guidance: guidance of rollouts and of their replay, None without.
        subjects: what groups and rows of anchor data are of.
        probe: conditioning of group 0, for the self-test; None without rollouts.
        shape: shape of what is sampled of a rollout of group 0.
        ema, old: shards of the moving average, and of the policy that trails the trained one (`objective.old_decay`); empty where none is kept.
        decay_updates: length of the learning rate's schedule; a checkpoint carries it, so that a resumed run with more
            `updates` goes on at the rate it had.
    """

    def __init__(self, config: RunConfig, device: torch.device, encoder: TextEncoder | None = None, frames: FrameEncoder | None = None) -> None:
        self.config, self.device = config, device
        policy = open_policy(config.model, device)
        self.attention = policy.attention
        self.process = policy.process
        sampler = config.sampler
        self._texts = PromptCache(encoder or load_text_encoder(policy.source.folder, config.model, device))
        self._conditioner = Conditioner(self._texts, frames or LoneFrames(config.model), policy.codec, sampler, policy.transformer.needs_picture)
        self.subjects = Subjects(config.seed, config.prompts, config.data, sampler)
        self.kernel = make_kernel(config.sampler.kernel, self.process, config.sampler.noise_level, config.sampler.steps)
        self.guidance: Guidance | None = None
        self.probe: Conditioning | None = None
        if config.uses_policy:
            self.guidance = guidance_of(config, self._texts, device)
            self.probe = self.encode([self.subjects.group(0)])[0]
        self.shape = policy.transformer.free_shape(policy.codec.latent_shape(sampler.height, sampler.width, sampler.frames), self.subjects.given_to_group(0))
        self.model = self._filled(policy.transformer).train()
        self.reference = self._reference()
        o = config.optimizer
        self.decay_updates = o.decay_updates or config.updates
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(o, trained.values())
        self.ema, self.old = ({n: p.detach().clone() for n, p in trained.items()} if kept else {} for kept in (o.ema > 0, config.objective.keeps_old))
        self._warned = False

    def encode(self, subjects: list[Subject]) -> Conditioning:
        """Conditioning `[B, …]` of subjects that are given equally many frames, on the CPU; no collective. Raises as `Conditioner.get`."""
        return stacked(self._conditioner.get(subjects))

    def batches(self, buffer: ReplayBuffer, claim: Claim, rank: int, world: int) -> list[StepBatch]:
        """This rank's rows of a claim; no collective. Raises as `step_batches`."""
        return step_batches(self.config, self.process, self.kernel, buffer, claim, rank, world, self.encode, self.subjects, self.model.free_part)

    @cached_property
    def mesh(self) -> Mesh:
        """The ranks, and which rows are this one's; collective when first asked for."""
        return mesh_of(self.device, self.config.learner)

    def _spread(self, model: PackedModel) -> None:
        """Shard a network over the ranks."""
        parallelize(model, self.mesh, self.config.learner)

    def _filled(self, model: PackedModel) -> PackedModel:
        """A network without values, sharded and then given those of the starting policy; no rank ever holds the whole of it."""
        self._spread(model)
        fill_network(model, self.config.model, "cpu" if self.config.learner.offload else self.device, self.config.seed)
        buffers_to(model, self.device)
        return model

    def _reference(self) -> PackedModel | None:
        """The starting policy, for the reverse KL: a copy; or, where only an adapter is trained, the policy without it."""
        if self.config.objective.kl_weight == 0:
            return None
        if self.config.model.lora.rank:
            return self.model
        return self._filled(build_network(self.config.model, self.device)[0].eval().requires_grad_(False))

    def describe(self, step: int) -> dict[str, Any]:
        """How the ranks compute, as a line of metrics.jsonl; `step`: updates made so far."""
        learner, ranks = self.config.learner, f"{dist.get_world_size()} ranks"
        if learner.replicas > 1 or learner.sequence_ranks > 1:
            ranks += f" (replicas {learner.replicas}, sequence ranks {learner.sequence_ranks})"
        network = f"{self.config.model.dtype} on {self.device}, {ranks}"
        return {"kind": "learner", "step": step, "network": network, "attention": self.attention.why}

    def update(self, batches: Sequence[StepBatch], step: int) -> dict[str, Any]:
        """The optimiser updates of a step on the batches of `step_batches`. A non-finite gradient skips one on all ranks alike (the norm is global).

        Returns:
            Global numbers: losses, grad_norm (of several updates the mean), lr, skipped (the share of those that were), ratio_deviation,
            clip_fraction; and by index of the trained step (as a string) `ratio_deviation_by_step` and `log_prob_gap_by_step`. One that is
            not finite is left out: a failure is no number, and a skipped update must still be recorded.
        """
        sums = torch.zeros(len(SUMS) + len(BY_STEP) * self.kernel.steps, dtype=torch.float64, device=self.device)
        lr = learning_rate(self.config.optimizer, step, self.decay_updates)
        parts = [list(part) for _, part in groupby(self._with_old(batches), key=lambda batch: batch.part)]
        norms = [self._optimise(part, sums, lr) for part in parts]
        done = [norm for norm in norms if math.isfinite(norm)]
        if done:
            self._trail(self.old, old_decay(self.config.objective, step))
        self.add_up(sums)
        stats = {"lr": lr, "skipped": 1 - len(done) / len(norms)} | ({"grad_norm": sum(done) / len(done)} if done else {})
        transition_count, anchor_count = (sum(counts) for counts in zip(*((p[0].transition_count, p[0].anchor_count) for p in parts), strict=True))
        if transition_count:
            means = dict(zip(SUMS, (sums[: len(SUMS)] / transition_count).tolist(), strict=True))
            stats["policy_loss"] = means["policy_loss"]
            if not self.config.objective.on_samples:
                stats |= {"ratio_deviation": means["ratio_deviation"], "clip_fraction": means["clipped"]}
            if self.reference is not None:
                stats["reverse_kl"] = means["reverse_kl"]
            if self.old:
                stats["old_kl"] = means["old_kl"]
        if anchor_count:
            stats["data_loss"] = float(sums[SUMS.index("data_loss")]) / anchor_count
        found: dict[str, Any] = _finite(stats)
        if transition_count and not self.config.objective.on_samples:
            count, *values = sums[len(SUMS) :].view(len(BY_STEP), -1).tolist()
            for name, value in zip(BY_STEP[1:], values, strict=True):
                found[name] = _finite({str(i): v / n for i, (v, n) in enumerate(zip(value, count, strict=True)) if n})
        return found

    def _optimise(self, batches: Sequence[StepBatch], sums: Tensor, lr: float) -> float:
        """One optimiser update, left out where the gradient's norm, which is returned, is not finite. Statistics are added to `sums`."""
        self._backward([loss for batch in batches for loss in self._losses(batch, sums)])
        norm = self._clip()
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self._trail(self.ema, self.config.optimizer.ema)
        self.optimizer.zero_grad()
        return norm

    def _backward(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        """Gradients of the sum of these losses over all ranks."""
        assert isinstance(self.model, FSDPModule)
        for i, compute in enumerate(losses):
            self.model.set_requires_gradient_sync(self.config.learner.accumulate == "sharded" or i == len(losses) - 1)
            # FSDP averages gradients over ranks; the sums are divided by global counts, hence the factor (`trainer.learn.parallel`)
            (compute() * dist.get_world_size()).backward()

    def add_up(self, sums: Tensor) -> None:
        """Add up, in place, what ranks have summed over their rows, each row once; collective."""
        dist.all_reduce(sums if self.mesh.speaks else sums.zero_())

    def replay(self, rows: Transitions, conditioning: Conditioning) -> Tensor:
        """The policy's prediction for stored transitions on this rank's device, with gradient; collective."""
        return self._predict(self.model, rows, conditioning)

    def _predict(self, model: PackedModel, rows: Transitions | Samples, conditioning: Conditioning) -> Tensor:
        """A network's prediction for rows of the policy loss."""
        if isinstance(rows, Samples):
            return data_prediction(model, self.process, rows, conditioning, self.config.model.dtype)
        return policy_prediction(model, self.kernel.process, rows, conditioning, self.guidance, self.config.model.dtype)

    def _losses(self, batch: StepBatch, sums: Tensor) -> Iterator[Callable[[], Tensor]]:
        """One closure per forward pass, the same number on every rank; each adds its statistics to `sums`."""
        config = self.config
        by_step = sums[len(SUMS) :].view(len(BY_STEP), -1)

        def policy(part: slice) -> Tensor:
            rows: Any = take(cast(Any, batch.transitions), part, self.device)
            conditioning = batch.conditioning_of(rows)
            prediction, reference = self._predict(self.model, rows, conditioning), None
            if self.reference is not None:
                with torch.no_grad(), without_lora(self.reference):
                    reference = self._predict(self.reference, rows, conditioning)
            if isinstance(rows, Samples):
                loss, stats = sample_terms(prediction, reference, rows, self.process, config.objective)
            else:
                loss, stats = policy_terms(prediction, reference, rows, self.kernel, config.objective)
                for i, values in enumerate((rows.weight, stats["ratio_deviation_rows"], stats["log_prob_gap_rows"])):
                    by_step[i].index_add_(0, rows.step, values.double())
            for i, name in enumerate(SUMS):
                if name in stats:
                    sums[i] += stats[name]
            return loss / batch.transition_count

        def data(part: slice) -> Tensor:
            assert batch.anchors is not None
            rows = take(batch.anchors, part, self.device)
            prediction = data_prediction(self.model, self.process, rows, batch.conditioning_of(rows), config.model.dtype)
            loss = data_terms(prediction, rows, self.process, config.objective.data_weighting)
            sums[SUMS.index("data_loss")] += loss.detach()
            return config.data_share * loss / batch.anchor_count

        if batch.transitions is not None:
            for part in self._parts(batch.transitions, batch):
                yield partial(policy, part)
        if batch.anchors is not None:
            for part in slices(len(batch.anchors.x0), passes(batch.anchor_rows, self.rows_of_pass(batch.anchors, batch.conditioning))):
                yield partial(data, part)

    def _parts(self, rows: Transitions | Samples, batch: StepBatch) -> list[slice]:
        """Rows of the policy loss in passes, equally many on every rank."""
        return slices(len(rows.t), passes(batch.transition_rows, self.rows_of_pass(rows, batch.conditioning)))

    def rows_of_pass(self, rows: Transitions | Samples | Anchors, conditioning: Conditioning) -> int:
        """Most of these rows in one forward pass, the same number on every rank; collective where `micro_tokens` is set. A rank's rows
        are of one size; those of transitions and of anchor data may differ."""
        learner, latents = self.config.learner, rows.x if isinstance(rows, Transitions) else rows.x0
        if learner.micro_tokens is None:
            return learner.micro_batch
        shape = whole_shape(tuple(latents.shape[1:]), conditioning)
        tokens, speaks = self._longest(self.model.packed_tokens(shape, conditioning.tokens))
        if tokens > learner.sequence_ranks * learner.micro_tokens and not self._warned and speaks:
            self._warned = True
            told = f" on each of {learner.sequence_ranks} ranks" if learner.sequence_ranks > 1 else ""
            logger.warning("a sample of %d tokens exceeds learner.micro_tokens=%d%s and takes a pass of its own", tokens, learner.micro_tokens, told)
        return learner.rows(tokens)

    def _longest(self, tokens: int) -> tuple[int, bool]:
        """The largest of all ranks' numbers, and whether this rank tells of it; collective."""
        longest = torch.tensor(tokens, device=self.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        return int(longest), dist.get_rank() == 0

    def _clip(self) -> float:
        """Scale gradients to the largest norm allowed; returns the norm before, over all parameters and ranks. One collective."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = _full(get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if bool(norm.isfinite()):
            clip_grads_with_norm_(parameters, self.config.optimizer.grad_clip, norm)
        return float(norm)

    @torch.no_grad()
    def _trail(self, average: dict[str, Tensor], decay: float) -> None:
        """Move an average towards the trained weights."""
        for name, parameter in self.model.named_parameters():
            if name in average:
                _local(average[name]).lerp_(_local(parameter.detach()), 1 - decay)

    @torch.no_grad()
    def _with_old(self, batches: Sequence[StepBatch]) -> list[StepBatch]:
        """The batches with what the old policy says of their rollouts, where that is another than the policy at hand: one that is kept, or, of several
        updates, the one before the first. All of them at once, so that weights change places once."""
        config, several = self.config.objective, self.config.learner.updates_per_claim > 1
        if not self.old and not (several and (config.on_samples or config.old_log_prob == "learner")):
            return list(batches)
        with self.as_old() if self.old else nullcontext():
            return [replace(batch, transitions=self._said_before(batch)) for batch in batches]

    def _said_before(self, batch: StepBatch) -> Transitions | Samples | None:
        """The rows of the policy loss with what the policy at hand says of them."""
        rows, found = batch.transitions, list[dict[str, Tensor]]()
        if rows is None:
            return None
        for part in self._parts(rows, batch):
            given: Any = take(cast(Any, rows), part, self.device)
            prediction = self._predict(self.model, given, batch.conditioning_of(given)).float()
            said = {"old": prediction} if isinstance(given, Samples) else density(prediction, given, self.kernel, self.config.objective)
            found.append({name: tensor.cpu()[: part.stop - part.start] for name, tensor in said.items()})  # a pass without rows has one of weight zero
        return replace(cast(Any, rows), **{name: torch.cat([said[name] for said in found]) for name in found[0]})

    @contextmanager
    @torch.no_grad()
    def as_old(self) -> Iterator[None]:
        """The network with the old policy's weights."""
        trained = {name: _local(p.detach()) for name, p in self.model.named_parameters() if name in self.old}
        kept = {name: tensor.clone() for name, tensor in trained.items()}

        def put(values: dict[str, Tensor]) -> None:
            for name, tensor in trained.items():
                tensor.copy_(_local(values[name]))
            for unit in self.model.modules():  # the outermost keeps its gathered weights from one pass to the next
                if isinstance(unit, FSDPModule):
                    unit.reshard()

        put(self.old)
        try:
            yield
        finally:
            put(kept)

    def sampling_weights(self) -> dict[str, Tensor]:
        """What rollouts are sampled with: the trained weights, or with policy_loss=nft the old policy's."""
        weights = trained_weights(self.model)
        return {name: self.old.get(name, w) for name, w in weights.items()} if self.config.objective.policy_loss == "nft" else weights

    def full_state(self, ema: bool = False, keep: bool = True, frozen: bool = True) -> dict[str, Tensor]:
        """A copy of the whole state dict, gathered one tensor at a time, CPU fp32; with `ema`, averaged weights where there are
        any; without `frozen`, what is trained alone. A rank that does not `keep` it helps to gather and gets an empty dict."""
        state: dict[str, Tensor] = {}
        for name, tensor in (self.model.state_dict() if frozen else trained_weights(self.model)).items():
            whole = _full(self.ema.get(name, tensor) if ema else tensor).detach()
            if keep:
                state[name] = whole.to("cpu", copy=True)
        return state

    def shards(self) -> dict[str, Any]:
        """This rank's part of what a checkpoint holds: weights, optimiser, moving average and old policy, as they are trained on; not a copy."""
        return {
            "model": trained_weights(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "ema": self.ema,
            "old": self.old,
        }

    def load(self, folder: Path) -> None:
        """Restore from a complete DCP checkpoint; reshards when the number of ranks changed."""
        shards = self.shards()
        dcp.load(shards, checkpoint_id=folder)
        self.model.load_state_dict(shards["model"], strict=False)  # what is not trained stays
        set_optimizer_state_dict(self.model, self.optimizer, shards["optimizer"])
