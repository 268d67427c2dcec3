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
from collections.abc import Iterator
from collections.abc import Sequence as Series
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from diffusion.engine.cache import MAX_BYTES, PromptCache
from diffusion.engine.forward import Rows, predict, rows_of
from diffusion.engine.memory import keep_freed_memory, out_of_memory, plan_memory
from diffusion.engine.request import Failure, SampleRequest, SamplingFailed, Trajectory
from diffusion.engine.scheduler import Scheduler
from diffusion.engine.sequence import Context, Path, Sequence, previous_of
from diffusion.kernels import log_prob, make_kernel
from diffusion.lora import merge_lora, trained_weights
from diffusion.models.base import PackedModel
from diffusion.processes import ForwardProcess
from diffusion.text.base import Conditioning, TextEncoder

log = logging.getLogger(__name__)

SwapPolicy = Literal["in_flight", "drain"]

PATHS_KEPT = 256
"""Kernels with their time grids that are kept for the next request of the kind."""
RUNGS = 8
"""Buckets an octave of total tokens when the network is compiled: at most an eighth of the tokens is padding."""


def compile_for_batches(model: PackedModel) -> None:
    """Compile the network's per-token parts and pad token counts to buckets, so that batches of any mix repeat few shapes."""
    model.buckets = RUNGS
    model.compile_blocks()


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done since it was made.

    Attributes:
        forwards: packed forward passes.
        tokens: packed tokens in them (a guided sequence counts twice).
        sequence_steps: denoising steps taken, a shared one once.
        saved_steps: denoising steps that members did not take because the steps before their branch were shared.
        occupancy: mean share of the token budget that a forward pass used.
        seconds: time spent in `step`.
        finished, failed, aborted: samples.
        out_of_memory: forward passes that did not fit and were tried again with less.
        budget: token budget now.
    """

    forwards: int = 0
    tokens: int = 0
    sequence_steps: int = 0
    saved_steps: int = 0
    occupancy: float = 0.0
    seconds: float = 0.0
    finished: int = 0
    failed: int = 0
    aborted: int = 0
    out_of_memory: int = 0
    budget: int = 0


class StepFailed(RuntimeError):
    """A step ended in an error that is neither a shortage of memory nor one sample's: a fault of the network or its device.

    Attributes:
        requests: those that took part. They must be aborted; others may go on.
    """

    def __init__(self, batch: list[Sequence], error: Exception) -> None:
        self.requests = list({id(s.context.request): s.context.request for s in batch}.values())
        super().__init__(f"a denoising step of {len(batch)} sequences failed: {type(error).__name__}: {error}")


class Engine:
    """Continuous batching between denoising steps. On the CPU, its process keeps the memory that a forward pass has used.

    Args:
        model: the policy network (fp32 weights).
        process: its forward process.
        max_tokens: upper bound on the tokens of one packed forward pass; less if memory does not hold it (`self.plan`).
        dtype: `float32` or `bfloat16` autocast inside the network.
        text_encoder: for requests that bring a prompt and not its conditioning.
        cache_bytes: bound on the encoded prompts that are kept.
        merge: merge adapters (LoRA) into the weights. Their log-densities then differ from the learner's by rounding.
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
    ) -> None:
        self.model, self.process, self.dtype = model.eval(), process, dtype
        self.device = next(model.parameters()).device
        self.prompts = PromptCache(text_encoder, self.device, cache_bytes) if text_encoder is not None else None
        self.merge = merge
        if merge:
            merge_lora(model)  # before memory is measured: the unmerged weights are kept
        if self.device.type == "cpu":
            keep_freed_memory()
        itemsize = 2 if dtype == "bfloat16" else 4
        self.plan = plan_memory(model.activation_bytes(itemsize), self.device, max_tokens)
        self.version = 0
        self.digest: str | None = None
        self._next_weights: tuple[dict[str, Tensor], int, str | None] | None = None
        self._scheduler: Scheduler[Sequence] = Scheduler(self.plan.tokens)
        self._paths: dict[tuple[str, float, int, tuple[float, ...] | None], Path] = {}
        self._stats = EngineStats()

    def describe_network(self) -> str:
        """How the network runs, for a log: precision, device, padding."""
        padded = "" if self.model.buckets is None else f", token counts in {self.model.buckets} buckets an octave"
        return f"{self.dtype} on {self.device}{padded}"

    # --- requests

    def add_request(self, request: SampleRequest) -> None:
        """Queue a request. Raises ValueError when its size does not fit the model or the token budget, or it has a prompt
        and the engine no text encoder."""
        conditioning = self._conditioning(request.prompt, request.conditioning)
        negative = self._conditioning(request.negative_prompt, request.negative) if request.guided else None
        tokens = self.model.packed_tokens(request.shape, len(conditioning.prompt_embeds))
        if negative is not None:
            tokens += self.model.packed_tokens(request.shape, len(negative.prompt_embeds))
        if tokens > self.plan.tokens:
            raise ValueError(f"one sample of {request.shape} needs {tokens} tokens, more than the budget: {self.plan}")
        context = Context(request, self._path(request), conditioning, negative, tokens)
        ranges = [request.members] if request.shared_steps else [range(m, m + 1) for m in request.members]
        for members in ranges:
            self._scheduler.add(Sequence.start(context, members, self.device), tokens, request.priority, family=id(request))

    def _conditioning(self, prompt: str | None, encoded: Conditioning | None) -> Conditioning:
        if encoded is not None:
            return encoded.to(self.device)
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
        self._stats = replace(self._stats, aborted=self._stats.aborted + samples)
        return samples

    @property
    def unfinished(self) -> int:
        """Sequences that wait or run."""
        return len(self._scheduler)

    @property
    def stats(self) -> EngineStats:
        return replace(self._stats, budget=self._scheduler.max_tokens)

    # --- weights

    def set_weights(self, state: dict[str, Tensor], version: int, digest: str | None = None, policy: SwapPolicy = "in_flight") -> None:
        """Swap weights between steps.

        `in_flight`: at once; what runs goes on with the new weights. `drain`: when every request that has begun has finished;
        no other begins until then. Every transition's log-density is exact for the weights that drew it, and a trajectory
        carries its oldest and newest version.

        Args:
            state: everything that is trained (`diffusion.lora.trained_weights`): the whole state dict, or an adapter.
            version: its number.
            digest: hash of its bytes; a swap to the digest that is in place only takes over the number.

        Raises:
            ValueError: names or shapes differ from the model's; nothing has changed then.
        """
        own = trained_weights(self.model)
        wrong = sorted(own.keys() ^ state.keys()) or sorted(n for n in own if own[n].shape != state[n].shape)
        if wrong:
            raise ValueError(
                f"weights of version {version} do not fit the model: {len(wrong)} tensors missing, unexpected or of another shape, e.g. {wrong[0]}"
            )
        self._next_weights = (state, version, digest)
        self._scheduler.hold = policy == "drain"
        if policy == "in_flight" or not self._scheduler.started:
            self._swap()

    def _swap(self) -> None:
        if self._next_weights is None:
            return
        state, self.version, digest = self._next_weights
        if digest is None or digest != self.digest:
            self.model.load_state_dict(state, strict=False)  # names were checked; with an adapter the rest stays
            if self.merge:
                merge_lora(self.model)
        self.digest, self._next_weights, self._scheduler.hold = digest, None, False

    # --- steps

    @torch.no_grad()
    def step(self) -> list[Trajectory | Failure]:
        """One denoising step of every running sequence; returns the samples that finished, well or not.

        A forward pass that does not fit into memory halves the token budget and is tried again in the next steps; a
        single sequence that does not fit fails.

        Raises:
            StepFailed: a fault of the network.
        """
        started, short = time.perf_counter(), self._stats.out_of_memory
        if not self._scheduler.started:
            self._swap()
        batch = self._scheduler.schedule()
        if not batch:
            return []
        try:
            finished = self._take_step(batch)
        except Exception as error:
            raise StepFailed(batch, error) from error
        did_step = self._stats.out_of_memory == short
        self._count(batch if did_step else [], finished, time.perf_counter() - started)
        return finished

    def _take_step(self, batch: list[Sequence]) -> list[Trajectory | Failure]:
        rows = rows_of(batch, self.device)
        predictions, shortage = None, ""
        try:
            predictions = predict(self.model, rows, self.dtype)
        except Exception as error:
            if not out_of_memory(error):
                raise
            shortage = str(error) or type(error).__name__
        if predictions is None:  # not inside `except`: the error's frames would keep the tensors alive
            return self._shrink(batch, shortage)
        for r, prediction in zip(rows, predictions, strict=True):
            self._advance(r, prediction)
        return self._collect(batch)

    def _advance(self, rows: Rows, prediction: Tensor) -> None:
        """Take the kernel's step of every row: stochastic rows draw, the others follow the solver."""
        kernel, sequences = rows.path.kernel, rows.sequences
        noisy = [i for i, s in enumerate(sequences) if s.stochastic]
        for stochastic, chosen in ((True, noisy), (False, [i for i in range(len(sequences)) if i not in set(noisy)])):
            if not chosen:
                continue
            whole = len(chosen) == len(sequences)
            x, t, t_next, v = (a if whole else a[chosen] for a in (rows.x, rows.t, rows.t_next, prediction))
            part = [sequences[i] for i in chosen]
            previous, density = previous_of(part), None
            if stochastic:
                mean, std = kernel.moments(v, x, t, t_next, previous)
                noise = torch.stack([s.noise() for s in part]).to(self.device)
                x_next = mean + std.reshape(-1, *[1] * (x.dim() - 1)) * noise
                density = log_prob(x_next, mean, std)
            else:
                x_next = kernel.ode(v, x, t, t_next, previous)
            x0 = kernel.process.split(v, x, t)[0] if kernel.uses_previous else None
            for i, s in enumerate(part):
                s.advance(x_next[i], None if x0 is None else x0[i], None if density is None else density[i], self.version)

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
        self._stats = replace(self._stats, out_of_memory=self._stats.out_of_memory + 1)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        tokens = sum(s.context.tokens for s in batch)
        if len(batch) > 1:
            self._scheduler.lower_budget(tokens // 2)
            log.warning("out of memory with %d tokens in %d sequences; token budget lowered to %d", tokens, len(batch), self._scheduler.max_tokens)
            return []
        self._scheduler.finish(batch)
        one = batch[0]
        log.error("out of memory with one sequence of %d tokens (%s); it fails", tokens, one.context.request.shape)
        return [Failure(one.context.request, m, f"out of memory with {tokens} tokens alone: {shortage}") for m in one.members]

    def _count(self, batch: list[Sequence], finished: list[Trajectory | Failure], seconds: float) -> None:
        s = self._stats
        tokens = sum(one.context.tokens for one in batch)
        failed = sum(isinstance(f, Failure) for f in finished)
        self._stats = replace(
            s,
            forwards=s.forwards + bool(batch),
            tokens=s.tokens + tokens,
            sequence_steps=s.sequence_steps + len(batch),
            saved_steps=s.saved_steps + sum(len(one.members) - 1 for one in batch),
            occupancy=(s.occupancy * s.forwards + tokens / self._scheduler.max_tokens) / max(1, s.forwards + bool(batch)),
            seconds=s.seconds + seconds,
            finished=s.finished + len(finished) - failed,
            failed=s.failed + failed,
        )

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
