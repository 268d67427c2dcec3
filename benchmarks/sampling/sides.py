"""Who samples: our engine, a diffusers pipeline, the loop of the Flow-GRPO family, and the bare forward pass as the limit.

All have the same weights, the same encoded prompts and the same token budget. `check` proves that they draw the same
samples when they are given the same noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.sampling.workload import Batch, Job, batches
from diffusion.checkpoint import load_policy
from diffusion.config import ModelConfig
from diffusion.engine.engine import Engine
from diffusion.engine.request import SampleRequest
from diffusion.engine.stats import EngineStats
from diffusion.families.base import PackedModel
from diffusion.families.conditioning import Conditioning
from diffusion.kernels import log_prob, make_kernel
from diffusion.seeds import INITIAL, step_noise

MODEL = Path(__file__).parents[2] / "recipes" / "glyph-base"
KERNEL = "flow_sde"
TOLERANCE = 1e-3
"""Largest difference between samples of two sides from the same noise (latents lie in about -1 … 1)."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What the network is given: by place, and by name."""
NoiseOf = Callable[[Job, int, int], Tensor]
"""Noise `[C, h, w]` of (job, member, step)."""


def named_noise(job: Job, member: int, step: int) -> Tensor:
    """The engine's noise (`diffusion.seeds`)."""
    return step_noise(0, job.group, member, step, (3, job.height, job.width))


class Bench:
    """The policy of recipes/glyph-base on a device, once as ours and once as diffusers', and its prompts encoded.

    Args:
        device: `cpu` or `cuda`.
        max_tokens: token budget of a forward pass, for everybody.
        noise_level: of the stochastic steps.
        rivals: whether to load diffusers too.
    """

    def __init__(self, device: str, max_tokens: int, noise_level: float, rivals: bool = True) -> None:
        self.device, self.max_tokens, self.noise_level = torch.device(device), max_tokens, noise_level
        self.policy = load_policy(ModelConfig(path=str(MODEL)), self.device)
        self.model: PackedModel = self.policy.transformer.eval()
        self._texts: dict[str, Conditioning] = {}
        if rivals:
            from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

            self.rival: Any = SD3Transformer2DModel.from_pretrained(MODEL / "transformer", low_cpu_mem_usage=False).eval().to(self.device)
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(json.loads((MODEL / "scheduler" / "scheduler_config.json").read_text()))
            absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
            self.pipe: Any = StableDiffusion3Pipeline(transformer=self.rival, scheduler=scheduler, **absent)
            self.pipe.set_progress_bar_config(disable=True)

    def text(self, prompt: str) -> Conditioning:
        if prompt not in self._texts:
            self._texts[prompt] = self.policy.text_encoder.encode([prompt])[0].to(self.device)
        return self._texts[prompt]

    @property
    def text_tokens(self) -> int:
        """Tokens of an encoded prompt."""
        return self.text("").tokens

    def with_budget(self, max_tokens: int) -> Bench:
        """The same with another token budget."""
        other = copy(self)
        other.max_tokens = max_tokens
        return other

    def sync(self) -> None:
        """Wait for what was asked of a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # -- (b) ours

    def request(self, job: Job, rollout: bool) -> SampleRequest:
        """As an ODE sample, or as a rollout: noise, density and a stored transition in every step but the last."""
        noisy = range(job.steps - 1) if rollout else ()
        return SampleRequest(
            shape=(3, job.height, job.width),
            steps=job.steps,
            conditioning=self.text(job.prompt),
            n=job.n,
            group=job.group,
            kernel=KERNEL,
            noise_level=self.noise_level,
            stochastic=frozenset(noisy),
            trained=tuple(noisy),
        )

    def engine(self) -> Engine:
        return Engine(self.model, self.policy.process, self.max_tokens)

    def run_engine(self, work: Sequence[Job], rollout: bool) -> tuple[list[Tensor], EngineStats]:
        """Latents by job, `[n, C, h, w]` each, and the engine's counters."""
        engine = self.engine()
        flat = iter(engine.run([self.request(job, rollout) for job in work]))
        return [torch.stack([next(flat).latent for _ in range(job.n)]) for job in work], engine.stats

    # -- (a) the limit

    def record(self, work: Sequence[Job]) -> list[Call]:
        """What the network is given in every forward pass that the engine makes of this work."""
        calls: list[Call] = []
        hook = self.model.register_forward_pre_hook(lambda _, inputs, named: calls.append((inputs, named)), with_kwargs=True)
        try:
            self.run_engine(work, rollout=False)
        finally:
            hook.remove()
        return calls

    @torch.no_grad()
    def run_limit(self, calls: Sequence[Call]) -> None:
        for inputs, named in calls:
            self.model(*inputs, **named)

    # -- (c) a pipeline call for each kind

    def run_batch(self, work: Sequence[Job], batch: Batch, latents: Tensor | None = None) -> Tensor:
        """One pipeline call; latents `[samples, C, h, w]`."""
        height, width, steps = batch.kind
        texts = [self.text(work[p].prompt) for p, n in batch.parts for _ in range(n)]
        scale = self.pipe.vae_scale_factor  # the pipeline thinks in pixels of a VAE that this policy does not have
        out: Tensor = self.pipe(
            prompt_embeds=torch.stack([t.prompt_embeds for t in texts]),
            pooled_prompt_embeds=torch.stack([t.tensors["pooled"] for t in texts]),
            height=scale * height,
            width=scale * width,
            num_inference_steps=steps,
            sigmas=[1 - i / steps for i in range(steps)],  # the scheduler shifts them
            guidance_scale=1.0,
            latents=latents,
            output_type="latent",
            return_dict=False,
        )[0]
        return out

    def run_pipeline(self, work: Sequence[Job], noise: NoiseOf | None = None) -> list[Tensor]:
        """Latents by job; without `noise` the pipeline draws its own."""
        found: list[list[Tensor]] = [[] for _ in work]
        for batch in batches(work, self.max_tokens):
            start = None
            if noise is not None:
                done = {p: sum(map(len, found[p])) for p, _ in batch.parts}
                start = torch.stack([noise(work[p], done[p] + i, INITIAL) for p, n in batch.parts for i in range(n)]).to(self.device)
            out = self.run_batch(work, batch, start)
            for (p, _), part in zip(batch.parts, out.split([n for _, n in batch.parts]), strict=True):
                found[p].append(part)
        return [torch.cat(parts) for parts in found]

    # -- (d) a loop over time steps for each prompt's group

    @torch.no_grad()
    def run_group(self, job: Job, noise: NoiseOf | None = None) -> Tensor:
        """The rollouts of one prompt, states and log-densities kept; latents `[n, C, h, w]`."""
        kernel = make_kernel(KERNEL, self.policy.process, self.noise_level, job.steps)
        text = self.text(job.prompt)
        embeds, pooled = text.prompt_embeds.expand(job.n, -1, -1), text.tensors["pooled"].expand(job.n, -1)
        times = kernel.time_grid(job.steps).to(self.device)

        def draw(step: int) -> Tensor:
            if noise is None:
                return torch.randn(job.n, 3, job.height, job.width, device=self.device)
            return torch.stack([noise(job, m, step) for m in range(job.n)]).to(self.device)

        x = kernel.start(draw(INITIAL))
        states, densities = [x], []
        for i in range(job.steps):
            t, t_next = times[i].expand(job.n), times[i + 1].expand(job.n)
            velocity = self.rival(hidden_states=x, timestep=1000 * t, encoder_hidden_states=embeds, pooled_projections=pooled, return_dict=False)[0]
            if i == job.steps - 1:
                x = kernel.ode(velocity, x, t, t_next)
            else:
                mean, std = kernel.moments(velocity, x, t, t_next)
                x = mean + std.reshape(-1, 1, 1, 1) * draw(i)
                densities.append(log_prob(x, mean, std))
            states.append(x)
        return x

    def run_loop(self, work: Sequence[Job], noise: NoiseOf | None = None) -> list[Tensor]:
        return [self.run_group(job, noise) for job in work]

    # -- the same work

    def check(self, work: Sequence[Job]) -> dict[str, float]:
        """Largest difference of our samples from the rivals' of the same noise. Raises ValueError when it exceeds TOLERANCE."""
        ours, rollouts = self.run_engine(work, rollout=False)[0], self.run_engine(work, rollout=True)[0]
        found = {
            "engine and pipeline": _difference(ours, self.run_pipeline(work, named_noise)),
            "engine and loop, with noise": _difference(rollouts, self.run_loop(work, named_noise)),
        }
        for name, difference in found.items():
            if not difference < TOLERANCE:
                raise ValueError(f"{name} do not draw the same samples: they differ by {difference:.2g}, more than {TOLERANCE:g}")
        return found


def _difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return float(torch.stack([(a.cpu() - b.cpu()).abs().max() for a, b in zip(ours, theirs, strict=True)]).max())  # NaN stays NaN
