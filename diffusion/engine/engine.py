"""The sampling engine: vLLM's shape for denoising.

`add_request` queues, `step` takes one denoising step of everything that runs and returns what finished. Requests of any
size, length and step index share one packed forward pass and join or leave between steps. Latents, kernels and
log-densities are fp32; only the network may autocast. Only transitions that will be trained are kept.

    add_request ─► waiting ─► running ─► Trajectory           one sequence a member
                      ▲          │  └──► Failure              not finite, or too large for the device
                      └── branch ┘                            same start: the shared steps first, then the members
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Series
from dataclasses import replace
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from diffusion.engine.cache import MAX_BYTES, PromptCache
from diffusion.engine.incoming import Incoming, Whole
from diffusion.engine.lead import Followers
from diffusion.engine.request import Failure, SampleRequest, SamplingFailed, Trajectory
from diffusion.engine.runner import OutOfMemory, Runner
from diffusion.engine.scheduler import Scheduler
from diffusion.engine.sequence import Context, Path, Sequence
from diffusion.engine.stats import EngineStats
from diffusion.engine.transition import advance
from diffusion.families.base import PackedModel
from diffusion.families.conditioning import Conditioning, TextEncoder
from diffusion.kernels import make_kernel
from diffusion.processes import ForwardProcess

log = logging.getLogger(__name__)

SwapPolicy = Literal["in_flight", "drain"]

PATHS_KEPT = 256
"""Kernels with their time grids that are kept for the next request of the kind."""


class StepFailed(RuntimeError):
    """A step ended in an error that is neither a shortage of memory nor one sample's: a fault of the network or its device.

    Attributes:
        requests: those that took part. They must be aborted; others may go on.
    """

    def __init__(self, batch: list[Sequence], error: Exception) -> None:
        self.requests = list({id(s.context.request): s.context.request for s in batch}.values())
        super().__init__(f"a denoising step of {len(batch)} sequences failed: {type(error).__name__}: {error}")


class Engine:
    """Continuous batching between denoising steps: a scheduler says what runs, a runner runs it.

    Args:
        model: the policy network (fp32 weights).
        process: its forward process.
        max_tokens: upper bound on the tokens of one packed forward pass; less if memory does not hold it (`runner.plan`).
        dtype: `float32` or `bfloat16` autocast inside the network.
        text_encoder: for requests that bring a prompt and not its conditioning.
        cache_bytes: bound on the encoded prompts that are kept.
        merge: merge adapters (LoRA) into the weights. Their log-densities then differ from the learner's by rounding.
        side: leave room for a second set of weights (`diffusion.engine.side`).
        followers: processes that share the network's passes (`diffusion.engine.lead`).
    """

    def __init__(
        self,
        model: PackedModel,
        process: ForwardProcess,
        max_tokens: int,
        dtype: str = "float32",
        text_encoder: TextEncoder | None = None,
        cache_bytes: int = MAX_BYTES,
        merge: bool = False,
        side: bool = False,
        followers: Followers | None = None,
    ) -> None:
        runner = Runner(model, max_tokens, dtype, merge, side, followers)
        self._begin(runner, process, PromptCache(text_encoder, runner.device, cache_bytes) if text_encoder is not None else None)

    def _begin(self, runner: Runner, process: ForwardProcess, prompts: PromptCache | None) -> None:
        self.runner, self.process, self.prompts = runner, process, prompts
        self._scheduler: Scheduler[Sequence] = Scheduler(self.runner.plan.tokens)
        self._paths: dict[tuple[str, float, int, tuple[float, ...] | None], Path] = {}
        self._stats = EngineStats()

    # --- requests

    def add_request(self, request: SampleRequest) -> None:
        """Queue a request. Raises ValueError when its size does not fit the model or the token budget, or it has a prompt
        and the engine no text encoder."""
        conditioning = self._conditioning(request.prompt, request.conditioning)
        negative = self._conditioning(request.negative_prompt, request.negative) if request.guided else None
        tokens = self.runner.packed_tokens(request.shape, [c for c in (conditioning, negative) if c is not None])
        context = Context(request, self._path(request), conditioning, negative, tokens)
        ranges = [request.members] if request.shared_steps else [range(m, m + 1) for m in request.members]
        for members in ranges:
            self._scheduler.add(Sequence.start(context, members, self.runner.device), tokens, request.priority, family=id(request))

    def _conditioning(self, prompt: str | None, encoded: Conditioning | None) -> Conditioning:
        if encoded is not None:
            return encoded.to(self.runner.device)
        if self.prompts is None:
            raise ValueError("this engine has no text encoder; give the request its conditioning (and `negative`, when guided)")
        assert prompt is not None  # SampleRequest has one of the two
        return self.prompts.get([prompt])[0]

    def _path(self, request: SampleRequest) -> Path:
        name = (request.kernel, request.noise_level, request.steps, request.times)
        if name not in self._paths:
            process = self.process if request.times is None else self.process.on_grid(request.times)
            kernel = make_kernel(request.kernel, process, request.noise_level, request.steps)
            path = Path(kernel, kernel.time_grid(request.steps))
            if request.times is not None and not torch.equal(path.times, process.time_grid(request.steps)):
                raise ValueError(f"step kernel {request.kernel} has a time grid of its own; leave `times` out")
            if len(self._paths) == PATHS_KEPT:
                self._paths.pop(next(iter(self._paths)))
            self._paths[name] = path
        return self._paths[name]

    def abort(self, request: SampleRequest) -> int:
        """Drop a request, waiting or running; what it held is free at once. Returns how many of its samples were unfinished."""
        gone = self._scheduler.remove(lambda s: s.context.request is request)
        samples = sum(len(s.members) for s in gone)
        self._stats = self._stats.after_abort(samples)
        return samples

    @property
    def unfinished(self) -> int:
        """Sequences that wait or run."""
        return len(self._scheduler)

    @property
    def stats(self) -> EngineStats:
        return replace(self._stats, budget=self._scheduler.max_tokens)

    # --- weights

    def set_weights(self, state: Mapping[str, Tensor] | Incoming, version: int, digest: str | None = None, policy: SwapPolicy = "in_flight") -> None:
        """Swap weights between steps.

        `in_flight`: at once; what runs goes on with the new weights. `drain`: when every request that has begun has finished;
        no other begins until then. Every transition's log-density is exact for the weights that drew it, and a trajectory
        carries its oldest and newest version.

        Args:
            state: everything that is trained (`diffusion.lora.trained_weights`): the whole state dict, or an adapter; tensors, or
                weights that are put in place as they come.
            version: its number.
            digest: hash of its bytes; a swap to the digest that is in place only takes over the number.

        Raises:
            ValueError: names or shapes differ from the model's; nothing has changed then.
        """
        self.runner.propose(Whole(state) if isinstance(state, Mapping) else state, version, digest)
        self._scheduler.hold = policy == "drain"
        if policy == "in_flight" or not self._scheduler.started:
            self._swap()

    def _swap(self) -> None:
        self.runner.swap()
        self._scheduler.hold = False

    # --- steps

    @torch.no_grad()
    def step(self) -> list[Trajectory | Failure]:
        """One denoising step of every running sequence; returns the samples that finished, well or not.

        A forward pass that does not fit into memory halves the token budget and is tried again in the next steps; a
        single sequence that does not fit fails.

        Raises:
            StepFailed: a fault of the network.
        """
        started = time.perf_counter()
        if not self._scheduler.started:
            self._swap()
        batch = self._scheduler.schedule()
        if not batch:
            return []
        try:
            finished = self._take_step(batch)
        except Exception as error:
            raise StepFailed(batch, error) from error
        failed = sum(isinstance(f, Failure) for f in finished)
        self._stats = self._stats.after_step(time.perf_counter() - started, len(finished) - failed, failed)
        return finished

    def _take_step(self, batch: list[Sequence]) -> list[Trajectory | Failure]:
        try:
            predictions = self.runner.forward(batch)
        except OutOfMemory as error:
            return self._shrink(batch, str(error))
        for rows, prediction in predictions:
            advance(rows, prediction, self.runner.version)
        self._stats = self._stats.after_forward(sum(s.context.tokens for s in batch), [len(s.members) for s in batch], self._scheduler.max_tokens)
        return self._collect(batch)

    def _collect(self, batch: list[Sequence]) -> list[Trajectory | Failure]:
        """Take out what is done: members finish, trunks branch."""
        done = [s for s in batch if s.index == s.end]
        finished: list[Trajectory | Failure] = []
        for s in done:
            branches = s.branch() if len(s.members) > 1 else [s]
            for one in branches:
                if one.index < one.end:
                    self._scheduler.add(one, one.context.tokens, like=s)
                elif bool(one.x.isfinite().all()):
                    finished.append(one.trajectory())
                else:
                    finished.append(Failure(one.context.request, one.members[0], "the sample is not finite: weights or conditioning hold NaN or infinity"))
        self._scheduler.finish(done)
        return finished

    def _shrink(self, batch: list[Sequence], shortage: str) -> list[Trajectory | Failure]:
        """After a forward pass that did not fit: half the tokens, or, for a sequence alone, its failure."""
        self._stats = self._stats.after_shortage()
        tokens = sum(s.context.tokens for s in batch)
        if len(batch) > 1:
            self._scheduler.lower_budget(tokens // 2)
            log.warning("out of memory with %d tokens in %d sequences; token budget lowered to %d", tokens, len(batch), self._scheduler.max_tokens)
            return []
        self._scheduler.finish(batch)
        one = batch[0]
        log.error("out of memory with one sequence of %d tokens (%s); it fails", tokens, one.context.request.shape)
        return [Failure(one.context.request, m, f"out of memory with {tokens} tokens alone: {shortage}") for m in one.members]

    def run(self, requests: Series[SampleRequest]) -> list[Trajectory]:
        """Sample all of `requests`; trajectories in the order of the requests, then of their members.

        Raises:
            SamplingFailed: some samples failed; it carries those that did not.
            StepFailed: a fault of the network.
        """
        done: dict[tuple[int, int], Trajectory] = {}
        failures: list[Failure] = []
        for one in chain.from_iterable(self.steps(requests)):
            if isinstance(one, Failure):
                failures.append(one)
            else:
                done[id(one.request), one.member] = one
        ordered = [done[key] for r in requests for m in r.members if (key := (id(r), m)) in done]
        if failures:
            raise SamplingFailed(failures, ordered)
        return ordered

    def steps(self, requests: Series[SampleRequest]) -> Iterator[list[Trajectory | Failure]]:
        """Sample all of `requests`: what ended in each step. An error, or leaving early, takes back what is unfinished."""
        try:
            for request in requests:
                self.add_request(request)
            while self.unfinished:
                yield self.step()
        finally:
            for request in requests:
                self.abort(request)
