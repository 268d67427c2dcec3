"""The objective: policy loss + reverse-KL weight x KL + data weight x diffusion loss (DDRL §1.4). Pure torch.

One update maximises the group-normalised reward through a probability-ratio loss on stored transitions and minimises
the ordinary diffusion loss on anchor data; `ddrl`, `flow_grpo`, `dance_grpo` and `sft` are settings of the same sum.

    L = mean over transitions of max(-A rho, -A clip(rho, 1 ± c)),  rho = exp(log p - log p_old)
      + kl_weight   x mean over transitions of mean (mu - mu_ref)² / (2 std²)      (`kl_scale` has other divisors)
      + data_weight x mean over data evaluations of the diffusion loss

The policy loss has a second family, on finished rollouts x_0 that are noised anew, x_t at times t, and need no density; A' is A over its bound:

    nft   mean of bound / beta (r m(v+) + (1 - r) m(v-)), r = (1 + A')/2, v± = v_old ± beta (v - v_old),
          m(v) = mean (x̂_0(v) - x_0)² over its own mean |x̂_0(v) - x_0|, held constant     (DiffusionNFT, arXiv 2509.16117)
    awm   mean of -A rho, rho = exp(log w - log w of the policy before), log w = -(the matching loss, weighted over t)    (AWM, arXiv 2509.25050)
      + kl_weight x mean (v - v_ref)² + old_kl_weight x mean (v - v_old)²
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.kernels import MIN_STD, Previous, StepKernel, log_prob
from diffusion.processes import ForwardProcess
from diffusion.processes.flow_time import flow_time
from trainer.config.objective import ObjectiveConfig


@dataclass(frozen=True)
class Transitions:
    """A micro-batch of M stored transitions, in the space of the step kernel's states.

    Attributes:
        x, x_next: states before and after `[M, C, h, w]` (video: `[M, C, f, h, w]`).
        t, t_next: times `[M]`.
        step: index of the step on its time grid, int64 `[M]`.
        old_log_prob: exact log-density under the sampling weights `[M]`, fp64 (`diffusion.kernels.density` says why).
        advantage: `[M]`.
        weight: `[M]`, 1 for a real row, 0 for padding.
        text: place of its prompt among the conditioning of the update, int64 `[M]`.
        previous, t_previous: prediction of x0 in the step before, like `x`, and its time `[M]` (inf: there was none), as the
            sampler stored them; None for kernels that do not use them.
        before, mean_before: log-density `[M]` (fp64) and mean of the step, like `x`, under the policy before the first update of the claim; None
            where that is the policy at hand.
    """

    x: Tensor
    x_next: Tensor
    t: Tensor
    t_next: Tensor
    step: Tensor
    old_log_prob: Tensor
    advantage: Tensor
    weight: Tensor
    text: Tensor
    previous: Tensor | None = None
    t_previous: Tensor | None = None
    before: Tensor | None = None
    mean_before: Tensor | None = None

    @property
    def history(self) -> Previous | None:
        """What a two-step kernel is given of the step before."""
        return None if self.previous is None or self.t_previous is None else Previous(self.previous, self.t_previous)


@dataclass(frozen=True)
class Anchors:
    """A micro-batch of M diffusion-loss evaluations: clean `x0`, noise `eps`, times `t`, `weight`, and place `text` of
    the caption among the conditioning of the update."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    weight: Tensor
    text: Tensor


@dataclass(frozen=True)
class Samples:
    """A micro-batch of M finished rollouts, each noised to one time: clean `x0`, noise `eps`, times `t`, `advantage`, `weight`, and place `text` of
    the prompt among the conditioning of the update, as of `Anchors` and `Transitions`.

    Attributes:
        old: the old policy's prediction there, like `x0`; None where none is kept: then it is the policy before the update.
    """

    x0: Tensor
    eps: Tensor
    t: Tensor
    advantage: Tensor
    weight: Tensor
    text: Tensor
    old: Tensor | None = None


def moments(prediction: Tensor, batch: Transitions, kernel: StepKernel) -> tuple[Tensor, Tensor]:
    """Mean (fp64) and standard deviation of the stored steps under `prediction`, a network output at `(x, t)`.

    Raises:
        ValueError: a transition with (almost) no noise, which has no usable density.
    """
    mean, std = kernel.moments(prediction.double(), batch.x.double(), batch.t, batch.t_next, batch.history)
    if bool((std < MIN_STD).any()):
        raise ValueError(f"a trained transition has std {float(std.min()):.2g} < {MIN_STD}: choose other sampler.trained_steps")
    return mean, std


def density(prediction: Tensor, batch: Transitions, kernel: StepKernel, config: ObjectiveConfig) -> dict[str, Tensor]:
    """What a policy whose output at `(x, t)` is `prediction` says of the stored steps, as `Transitions` keeps it of the policy before a claim's first
    update: its log-density, and with `center_ratio` its mean. Raises as `moments`."""
    mean, std = moments(prediction, batch, kernel)
    said = {"before": log_prob(batch.x_next, mean, std, "exact")}
    return said | {"mean_before": mean.float()} if config.center_ratio else said


def scale(std: Tensor, scaling: str) -> Tensor:
    """What a difference of exact log-densities is multiplied by, per transition `[M]`: unscaled = exact · 2 std²,
    std_weighted = exact · std."""
    return {"exact": torch.ones_like(std), "unscaled": 2 * std.square(), "std_weighted": std}[scaling]


def kl_divisor(std: Tensor, batch: Transitions, scaling: str) -> Tensor:
    """What mean (mu - mu_ref)² is divided by, per transition `[M]`. `step`: 2 std², which makes it the KL of two Gaussian steps; `rate`: 2 std² over
    the step's length in time, of a reverse SDE 2 g² (Flow-GRPO since 2d76907, 2025-07-15); `unscaled`: 1 (public DDRL code)."""
    if scaling == "unscaled":
        return torch.ones_like(std)
    return 2 * std.square() / (1 if scaling == "step" else (batch.t - batch.t_next).to(std))


def policy_terms(
    velocity: Tensor, reference: Tensor | None, batch: Transitions, kernel: StepKernel, config: ObjectiveConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sums over a micro-batch of the policy loss plus the reverse-KL term, and statistics.

    Args:
        velocity: the policy's output at `(x, t)` with gradient.
        reference: the reference policy's output there, or None.
    Returns:
        Loss summed over rows (divide by the global count of transitions), and sums for logging: `policy_loss`,
        `reverse_kl`, `clipped`, and, against the density that the rollout stored, whatever `old_log_prob` says,
        `ratio_deviation` (|rho - 1|). `ratio_deviation_rows` and `log_prob_gap_rows` (|log p - stored|, exact) are `[M]`.
    Raises:
        ValueError: a transition with (almost) no noise, which has no usable density.
    """
    mean, std = moments(velocity, batch, kernel)
    exact = log_prob(batch.x_next, mean, std, "exact")
    shift = exact - batch.old_log_prob
    factor = scale(std.double(), config.log_prob)
    against_rollout = (shift * factor).exp()
    if config.old_log_prob == "learner":  # in a claim's first update the policy before it is the one at hand: ratios are 1 with a gradient
        shift = exact - (exact.detach() if batch.before is None else batch.before)
    if config.center_ratio:
        mean_before = mean.detach() if batch.mean_before is None else batch.mean_before
        shift = shift + (mean - mean_before).square().flatten(1).mean(1) / (2 * std.square())
    ratio = (shift * factor).exp()
    clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
    surrogate = torch.maximum(-batch.advantage * ratio, -batch.advantage * clipped)
    loss = config.policy_weight * (batch.weight * surrogate).sum()
    stats = {
        "policy_loss": (batch.weight * surrogate).sum(),
        "ratio_deviation": (batch.weight * (against_rollout - 1).abs()).sum(),
        "ratio_deviation_rows": batch.weight * (against_rollout - 1).abs(),
        "log_prob_gap_rows": batch.weight * (exact - batch.old_log_prob).abs(),
        "clipped": (batch.weight * ((ratio - 1).abs() > config.clip)).sum(),
    }
    if reference is not None:
        mean_ref, _ = moments(reference, batch, kernel)
        kl = (mean - mean_ref).square().flatten(1).mean(1) / kl_divisor(std, batch, config.kl_scale)
        loss = loss + config.kl_weight * (batch.weight * kl).sum()
        stats["reverse_kl"] = (batch.weight * kl).sum()
    return loss.float(), {k: v.detach().float() for k, v in stats.items()}


def data_terms(velocity: Tensor, batch: Anchors, process: ForwardProcess, weighting: str = "uniform") -> Tensor:
    """Weighted sum over a micro-batch of the diffusion loss (divide by the global count of evaluations).

    `weighting`: `cosmos` multiplies by t² + (1 - t)² of the flow's time t, which is (1 + sigma²)/sigma² times the squared error of x̂0 (public DDRL code).
    """
    loss = process.loss(velocity, batch.x0, batch.eps, batch.t)
    if weighting == "cosmos":
        t = flow_time(process, batch.t)
        loss = loss * (t.square() + (1 - t).square())
    return (batch.weight * loss).sum()


LEAST_ERROR = 1e-5
"""Below which an error of x̂_0 weighs no more, and"""
LEAST_MATCH = 1e-10
"""what keeps a power of a matching loss from a slope without end (both as in the public code)."""


def sample_terms(
    prediction: Tensor, reference: Tensor | None, batch: Samples, process: ForwardProcess, config: ObjectiveConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sums over a micro-batch of the policy loss on finished rollouts plus both regularisers, and statistics; as `policy_terms`.

    Args:
        prediction: the policy's output for the noised rollouts, with gradient.
        reference: the reference policy's output there, or None.
    Returns:
        Loss summed over rows (divide by the global count of rows), and sums for logging: `policy_loss`, `reverse_kl`, `old_kl`.
    Raises:
        ValueError: a weighting over the flow's time, of a policy that has none.
    """
    v, x0 = prediction.double(), batch.x0.double()
    old = v.detach() if batch.old is None else batch.old.double()
    rows = _attract_and_repel(v, old, x0, batch, process, config) if config.policy_loss == "nft" else _match(v, x0, batch, process, config)
    loss = config.policy_weight * (batch.weight * rows).sum()
    stats = {"policy_loss": (batch.weight * rows).sum()}
    for name, weight, other in (("reverse_kl", config.kl_weight, reference), ("old_kl", config.old_kl_weight, batch.old)):
        if other is not None:
            distance = (batch.weight * (v - other.double()).square().flatten(1).mean(1)).sum()
            loss, stats[name] = loss + weight * distance, distance
    return loss.float(), {k: value.detach().float() for k, value in stats.items()}


def _attract_and_repel(v: Tensor, old: Tensor, x0: Tensor, batch: Samples, process: ForwardProcess, config: ObjectiveConfig) -> Tensor:
    """DiffusionNFT's loss by row `[M]`."""
    bound, beta = config.advantage_max or config.advantage_clip, config.nft_beta
    share = ((batch.advantage.double() / bound).clamp(-1, 1) + 1) / 2
    x = process.noise(batch.x0, batch.eps, batch.t).double()

    def error(velocity: Tensor) -> Tensor:
        off = process.split(velocity, x, batch.t)[0] - x0
        return (off.square() / off.detach().abs().flatten(1).mean(1).clamp_min(LEAST_ERROR).view(-1, *[1] * (off.dim() - 1))).flatten(1).mean(1)

    return bound / beta * (share * error(old + beta * (v - old)) + (1 - share) * error(old - beta * (v - old)))


def _match(v: Tensor, x0: Tensor, batch: Samples, process: ForwardProcess, config: ObjectiveConfig) -> Tensor:
    """AWM's loss by row `[M]`; one optimiser update a claim, so its ratio is 1 with a gradient."""
    match = (v - process.target(x0, batch.eps.double(), batch.t).double()).square().flatten(1).mean(1)
    if config.awm_weighting != "uniform":
        t = flow_time(process, batch.t, f"objective.awm_weighting={config.awm_weighting}").double()
        if config.awm_weighting == "power":
            match = ((match + LEAST_MATCH) ** config.awm_power - LEAST_MATCH**config.awm_power) * t / config.awm_power
        else:
            match = match * (t if config.awm_weighting == "t" else t.square())
    return -batch.advantage.double() * (match.detach() - match).exp()
