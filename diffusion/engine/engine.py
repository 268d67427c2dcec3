"""The sampling engine: vLLM's shape for denoising.

`add_request` queues, `step` takes one denoising step of everything that runs and returns what finished. Requests of any
size and step index share one packed forward and join or leave between steps. Latents, kernels and log-densities are
fp32; only the network may autocast. Only transitions that will be trained are kept.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from diffusion.engine.request import SampleRequest, Trajectory
from diffusion.engine.scheduler import Scheduler
from diffusion.kernels import StepKernel, log_prob, make_kernel, ode_step
from diffusion.models.base import PackedModel
from diffusion.processes import ForwardProcess
from diffusion.seeds import INITIAL, step_noise


class _Running:
    """State of one request between steps."""

    def __init__(self, request: SampleRequest, times: Tensor, version: int, device: torch.device) -> None:
        self.request, self.times, self.version = request, times, version
        self.index = 0
        member = 0 if request.same_start else request.member
        self.x = step_noise(request.seed, request.group, member, INITIAL, request.shape).to(device)
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def trajectory(self) -> Trajectory:
        r = self.request
        parts = list(zip(*self.kept, strict=True)) or [(), (), ()]
        x, x_next, lp = (torch.stack(list(p)).cpu() if p else torch.zeros(0) for p in parts)
        return Trajectory(r, self.x.cpu(), x, x_next, lp, self.times, self.version)


def autocast(dtype: str, device: torch.device) -> AbstractContextManager[object]:
    """The one precision policy of sampling and training: fp32, or autocast to bf16 inside the network."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


class Engine:
    """Continuous batching between denoising steps.

    Args:
        model: the policy network (fp32 weights).
        process: its forward process.
        max_tokens: token budget of one packed forward (image and text tokens together).
        dtype: `float32` or `bfloat16` autocast inside the network.
    """

    def __init__(self, model: PackedModel, process: ForwardProcess, max_tokens: int, dtype: str = "float32") -> None:
        self.model, self.process, self.dtype = model.eval(), process, dtype
        self.device = next(model.parameters()).device
        self.version = 0
        self._scheduler: Scheduler[_Running] = Scheduler(max_tokens)
        self._kernels: dict[tuple[str, float, int], StepKernel] = {}

    def set_weights(self, state: dict[str, Tensor], version: int) -> None:
        """Swap weights between steps; running requests go on with the new ones and keep the oldest version's number."""
        self.model.load_state_dict(state)
        self.version = version

    def add_request(self, request: SampleRequest) -> None:
        """Queue a request. Raises ValueError when its size does not fit the model or the token budget."""
        tokens = self.model.packed_tokens(request.shape, len(request.prompt_embeds))
        self._scheduler.add(_Running(request, self.process.time_grid(request.steps), self.version, self.device), tokens)

    def _kernel(self, request: SampleRequest) -> StepKernel:
        name = (request.kernel, request.noise_level, request.steps)
        if name not in self._kernels:
            self._kernels[name] = make_kernel(request.kernel, self.process, request.noise_level, request.steps)
        return self._kernels[name]

    def _predict(self, running: list[_Running], t: Tensor) -> list[Tensor]:
        same = len({r.request.shape for r in running}) == 1
        latents: Tensor | list[Tensor] = torch.stack([r.x for r in running]) if same else [r.x for r in running]
        embeds: Tensor | list[Tensor] = [r.request.prompt_embeds.to(self.device) for r in running]
        if len({len(e) for e in embeds}) == 1:
            embeds = torch.stack(list(embeds))
        pooled = torch.stack([r.request.pooled for r in running]).to(self.device)
        with autocast(self.dtype, self.device):
            return list(self.model(latents, t, embeds, pooled))

    @torch.no_grad()
    def step(self) -> list[Trajectory]:
        """One denoising step of every running request; returns the trajectories that finished."""
        running = self._scheduler.schedule()
        if not running:
            return []
        t = torch.stack([r.times[r.index] for r in running]).to(self.device)
        t_next = torch.stack([r.times[r.index + 1] for r in running]).to(self.device)
        predictions = self._predict(running, t)

        batches: dict[tuple[StepKernel | None, tuple[int, ...]], list[int]] = defaultdict(list)
        for i, r in enumerate(running):
            kernel = self._kernel(r.request) if r.index in r.request.stochastic else None
            batches[kernel, r.request.shape].append(i)
        for (kernel, _), rows in batches.items():
            self._advance(kernel, [running[i] for i in rows], torch.stack([predictions[i] for i in rows]), t[rows], t_next[rows])

        finished = [r for r in running if r.index == r.request.steps]
        self._scheduler.finish({id(r) for r in finished})
        return [r.trajectory() for r in finished]

    def _advance(self, kernel: StepKernel | None, rows: list[_Running], prediction: Tensor, t: Tensor, t_next: Tensor) -> None:
        x = torch.stack([r.x for r in rows])
        density: Tensor | None = None
        if kernel is None:
            x_next = ode_step(self.process, prediction, x, t, t_next)
        else:
            mean, std = kernel.moments(prediction, x, t, t_next)
            noise = torch.stack([step_noise(r.request.seed, r.request.group, r.request.member, r.index, r.request.shape) for r in rows])
            x_next = mean + std.reshape(-1, 1, 1, 1) * noise.to(self.device)
            density = log_prob(x_next, mean, std)
        for i, r in enumerate(rows):
            if density is not None and r.index in r.request.trained:
                r.kept.append((r.x, x_next[i], density[i]))
            r.x = x_next[i]
            r.version = min(r.version, self.version)
            r.index += 1

    def run(self, requests: list[SampleRequest]) -> list[Trajectory]:
        """Sample all of `requests`; trajectories in request order."""
        for request in requests:
            self.add_request(request)
        done: dict[int, Trajectory] = {}
        while len(self._scheduler):
            for trajectory in self.step():
                done[id(trajectory.request)] = trajectory
        return [done[id(r)] for r in requests]
