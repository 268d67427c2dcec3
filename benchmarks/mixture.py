"""A policy on the line that leaves its data, or not: two Gaussians as data, and a reward whose maximum lies where the data never is.

    python -m benchmarks.mixture [--json] [--figure docs/media/mixture.svg] [--updates 400] [--seeds 0 1 2]

The policy is a small network of a rectified flow; samples, advantages, losses and step kernel are those of a run (`diffusion.kernels`,
`trainer.learn`), in one process. What the runs differ in is the objective alone. Beside their samples: the data, and the exponential tilt of the data
with the same mean reward as the samples, in closed form.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.markdown import table
from diffusion.kernels import log_prob, make_kernel
from diffusion.processes import RectifiedFlow
from diffusion.seeds import generator
from trainer.config.objective import ObjectiveConfig
from trainer.learn.advantages import group_advantages
from trainer.learn.objective import Anchors, Transitions, data_terms, policy_terms

MODES, WIDTH = (-1.5, 1.0), 0.25
BUMP, BUMP_WIDTH = 2.6, 0.5
EDGE = 2.0
"""One datum of sixty thousand lies beyond: four standard deviations from the nearer mode."""
STEPS, GROUP, KEPT, BATCH = 10, 64, 5, 256
JUDGED, HELD_OUT = 20_000, 50_000
"""Samples, and evaluations of the diffusion loss, that a policy is judged by."""
PROCESS = RectifiedFlow(1.0)
KERNEL = make_kernel("flow_sde", PROCESS, 0.7, STEPS)
# by the keys of `objective`; advantages are by each group's own deviation throughout
OBJECTIVES: dict[str, dict[str, Any]] = {
    "no regulariser": {"data_weight": 0.0},
    "reverse KL 0.04": {"data_weight": 0.0, "kl_weight": 0.04},
    "reverse KL 0.4": {"data_weight": 0.0, "kl_weight": 0.4},
    "reverse KL 4": {"data_weight": 0.0, "kl_weight": 4.0},
    "DDRL 0.05": {"data_weight": 0.05},
    "DDRL 0.2": {"data_weight": 0.2},
    "DDRL 0.2, exponential": {"data_weight": 0.2, "exponential_advantage": True},
    "DDRL 1": {"data_weight": 1.0},
}


class Velocity(nn.Module):
    """v(x, t) of states `[B, 1, 1, 1]` at times `[B]`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = math.pi * t[:, None] * torch.tensor([1.0, 2.0, 4.0])
        found: Tensor = self.layers(torch.cat([x.flatten(1), t[:, None], angles.sin(), angles.cos()], 1))
        return found.view_as(x)


def draw(n: int, g: torch.Generator) -> Tensor:
    """`n` data, `[n, 1, 1, 1]`."""
    mode = torch.tensor(MODES)[torch.randint(2, (n,), generator=g)]
    return (mode + WIDTH * torch.randn(n, generator=g)).view(-1, 1, 1, 1)


def density(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the data."""
    parts = [np.exp(-((x - m) ** 2) / (2 * WIDTH**2)) / (WIDTH * math.sqrt(2 * math.pi)) for m in MODES]
    found: NDArray[np.float64] = np.mean(parts, 0)
    return found


def reward(x: Any) -> Any:
    """Nothing at the left mode, half at the right one: that much can be had within the data. Beyond it, 2.5 at the maximum."""
    exp = torch.exp if isinstance(x, Tensor) else np.exp
    return 0.5 / (1 + exp(-8 * x)) + 2 * exp(-((x - BUMP) ** 2) / (2 * BUMP_WIDTH**2))


def tilt(mean: float) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """The tilt p_data exp(r/β) whose mean reward is `mean`: points, density and β, by bisection."""
    x = np.linspace(-4, 6, 4001)
    low, high = 1e-2, 1e4
    for _ in range(200):
        beta = math.sqrt(low * high)
        logs = np.log(density(x) + 1e-300) + reward(x) / beta
        p = np.exp(logs - logs.max())
        p /= np.trapezoid(p, x)
        low, high = (beta, high) if np.trapezoid(p * reward(x), x) > mean else (low, beta)
    return x, p, beta


def base(seed: int = 0, updates: int = 3000) -> Velocity:
    """The starting policy: the diffusion loss alone."""
    torch.manual_seed(seed)
    model, g = Velocity(), generator(seed, "base")
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        _data_loss(model, g, BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def _data_loss(model: Velocity, g: torch.Generator, n: int) -> Tensor:
    clean, t = draw(n, g), PROCESS.sample_times(n, g)
    eps = torch.randn(clean.shape, generator=g)
    rows = Anchors(clean, eps, t, torch.ones(n), torch.zeros(n, dtype=torch.int64))
    return data_terms(model(PROCESS.noise(clean, eps, t), t), rows, PROCESS) / n


@torch.no_grad()
def rollout(model: Velocity, n: int, g: torch.Generator, noisy: bool = True) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Samples `[n, 1, 1, 1]`, and of every step but the last the states before and after and the density."""
    grid, x = KERNEL.time_grid(STEPS), KERNEL.start(torch.randn(n, 1, 1, 1, generator=g))
    taken = []
    for i in range(STEPS):
        t, t_next = grid[i].expand(n), grid[i + 1].expand(n)
        said = model(x, t).double()
        if noisy and i < STEPS - 1:
            mean, std = KERNEL.moments(said, x.double(), t, t_next)
            after = (mean + std.double().view(-1, 1, 1, 1) * torch.randn(x.shape, generator=g)).float()
            taken.append((x, after, log_prob(after, mean, std)))
        else:
            after = KERNEL.ode(said, x.double(), t, t_next).float()
        x = after
    return x, taken


@dataclass(frozen=True)
class Outcome:
    """Of a run: its samples after it, their mean reward, the share beyond the data's edge, the diffusion loss over that of the start."""

    samples: NDArray[np.float32]
    reward: float
    beyond: float
    loss: float


def train(start: Velocity, objective: dict[str, Any], seed: int, updates: int) -> Outcome:
    """Updates on groups of rollouts of their own policy."""
    config, model, reference = ObjectiveConfig(**{"clip": 0.2, **objective}), copy.deepcopy(start), copy.deepcopy(start)
    g, grid = generator(seed, "mixture"), KERNEL.time_grid(STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(updates):
        samples, taken = rollout(model, 4 * GROUP, g)
        groups = reward(samples).flatten().view(4, GROUP).tolist()
        advantages = torch.tensor(group_advantages(groups, exponential=config.exponential_advantage)).flatten()
        chosen = sorted(torch.randperm(STEPS - 1, generator=g)[:KEPT].tolist())
        n, step = 4 * GROUP, torch.tensor(chosen).repeat_interleave(4 * GROUP)
        rows = Transitions(
            x=torch.cat([taken[i][0] for i in chosen]),
            x_next=torch.cat([taken[i][1] for i in chosen]),
            t=grid[step],
            t_next=grid[step + 1],
            step=step,
            old_log_prob=torch.cat([taken[i][2] for i in chosen]),
            advantage=advantages.repeat(KEPT),
            weight=torch.ones(n * KEPT),
            text=torch.zeros(n * KEPT, dtype=torch.int64),
        )
        with torch.no_grad():
            known = reference(rows.x, rows.t) if config.kl_weight > 0 else None
        loss = policy_terms(model(rows.x, rows.t), known, rows, KERNEL, config)[0] / (n * KEPT)
        if config.data_weight > 0:
            loss = loss + config.data_weight * _data_loss(model, g, n * KEPT)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return judge(model, start)


@torch.no_grad()
def judge(model: Velocity, start: Velocity) -> Outcome:
    """Samples of the ODE and diffusion losses of fixed noise, the same for every policy."""
    samples, _ = rollout(model, JUDGED, generator(0, "judge"), noisy=False)
    losses = [float(_data_loss(one, generator(0, "held out"), HELD_OUT)) for one in (model, start)]
    return Outcome(samples.flatten().numpy(), float(reward(samples).mean()), float((samples > EDGE).float().mean()), losses[0] / losses[1] - 1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    parser.add_argument("--figure", type=Path, help="write the figure here, an SVG")
    parser.add_argument("--updates", type=int, default=400, help="updates of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of every objective")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = base()
    begun, found = time.monotonic(), {"before": [judge(start, start)]}
    for name, objective in OBJECTIVES.items():
        found[name] = [train(start, objective, seed, options.updates) for seed in options.seeds]
    if options.figure:
        figure(found, options.figure)
    rows = [[name, *(_spread([getattr(one, key) for one in ones], show) for key, show in SHOWN.items())] for name, ones in found.items()]
    if options.json:
        numbers = {name: [{key: getattr(one, key) for key in SHOWN} for one in ones] for name, ones in found.items()}
        print(json.dumps({"updates": options.updates, "seconds": round(time.monotonic() - begun, 1), "runs": numbers}))
    else:
        print(table(["objective", "mean reward", f"samples beyond {EDGE:g}", "diffusion loss"], rows))


SHOWN: dict[str, Callable[[float], str]] = {"reward": "{:.3f}".format, "beyond": "{:.1%}".format, "loss": "{:+.1%}".format}


def _spread(values: list[float], show: Callable[[float], str]) -> str:
    return show(values[0]) if len(values) == 1 else f"{show(sum(values) / len(values))} ({show(min(values))} … {show(max(values))})"


def figure(found: dict[str, list[Outcome]], file: Path) -> None:
    """Samples of the first seed of each objective over the data, and the tilt with their mean reward where it is within the data's reach. An SVG without a
    background, in tones that a light and a dark page both show."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "mixture", "font.size": 8, "text.color": TONE, "axes.edgecolor": TONE, "xtick.color": TONE}):
        shown, axes = pyplot.subplots(3, 3, figsize=(8, 5.2), sharex=True)
        x = np.linspace(-3, 4.5, 151)
        for (name, ones), axis in zip(found.items(), axes.flat, strict=True):
            axis.fill_between(x, density(x), color=TONE, alpha=0.45, linewidth=0, label="data")
            axis.hist(ones[0].samples, bins=np.linspace(-3, 4.5, 90), density=True, histtype="step", color="#2f8fd8", linewidth=1.2, label="samples")
            if ones[0].beyond < 0.01 and name != "before":
                at, p, _ = tilt(ones[0].reward)
                axis.plot(at[::20], p[::20], color="#e0902a", linewidth=1, label="tilt of the data")
            top = axis.twinx()
            top.plot(x, reward(x), color="#d0504a", linewidth=0.8, linestyle=":", label="reward")
            for one in (axis, top):
                one.set_yticks([])
                one.spines[["top", "left", "right"]].set_visible(False)
                one.patch.set_alpha(0)
            axis.set_xlim(-3, 4.5)
            axis.set_title(f"{name}: reward {ones[0].reward:.2f}", fontsize=8)
        lines = [line for axis in (axes.flat[-1], top) for line in zip(*axis.get_legend_handles_labels(), strict=True)]
        shown.legend(*zip(*lines, strict=True), loc="lower center", ncol=4, frameon=False, labelcolor=TONE)
        shown.tight_layout(rect=(0, 0.05, 1, 1))
        file.parent.mkdir(parents=True, exist_ok=True)
        shown.savefig(file, transparent=True, metadata={"Date": None})
        pyplot.close(shown)


TONE = "#888888"
"""Of text and axes, readable on white and on black."""


if __name__ == "__main__":
    sys.exit(main())
