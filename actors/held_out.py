"""What a generator does for evaluations: samples and losses of one named version, between the steps of its rollouts.

    evaluator ─ parcel ─► encode ─► [second set of weights = that version] ─► sample, or loss ─► decode ─► evaluator

A parcel is a pure function of names (weights, draw, place): noise, loss points and what stands beside what depend on nothing else, so it
may be asked of any generator, again, at any time. One parcel is with the engine at a time, while the next is encoded and the one before
decoded. The second set is let go when nobody has asked for `IDLE_S`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.conditioning import Conditioner, Subjects
from actors.ranks import GeneratorRanks
from actors.sources.draws import data_source, held_out_rows
from actors.sources.example import Example, Source
from actors.sources.latents import clean_latents
from actors.weights.reading import Exported
from actors.weights.store import View
from diffusion.checkpoint import Policy, StartingWeights
from diffusion.engine.aio import AsyncEngine, EngineClosed
from diffusion.engine.decode import Decoder
from diffusion.engine.engine import StepFailed
from diffusion.engine.request import SampleRequest, SamplingFailed
from diffusion.evaluation import diffusion_losses
from diffusion.families.conditioning import stacked
from diffusion.seeds import generator, key

if TYPE_CHECKING:
    from concurrent.futures import Future

    from actors.rollout import RolloutSpec

READ_DEADLINE_S = 300.0
"""For the bytes of a version to arrive."""
TURN_DEADLINE_S = 1800.0
"""For a parcel, the one before it included: the engine's rollouts go first."""
DECODE_DEADLINE_S = 300.0
IDLE_S = 30.0
"""After the last parcel, when the second set is let go: the evaluations of one version follow each other closely."""

Name = tuple[Any, ...]


def name_of(weights: View | Exported | None) -> Name:
    """What a version is called; equal names are equal weights."""
    if weights is None:
        return ("start",)
    if isinstance(weights, View):
        return ("version", *weights.table.name, weights.table.digest)
    return ("export", weights.version, weights.path)


class HeldOutFailed(RuntimeError):
    """A held-out sample or loss could not be made; the message says why."""


class HeldOut:
    """Held-out work on a running engine.

    Args:
        spec: the generator's settings.
        engine: its engine; the policy in it; what makes conditioning for it; its codec's thread.
        max_tokens: of one forward pass.
        ranks: other processes that share the network's passes.
    """

    def __init__(
        self,
        spec: RolloutSpec,
        engine: AsyncEngine,
        policy: Policy,
        conditioner: Conditioner,
        decoder: Decoder,
        max_tokens: int,
        ranks: GeneratorRanks | None = None,
    ) -> None:
        self._spec, self._engine, self._policy, self._conditioner = spec, engine, policy, conditioner
        self._decoder, self._max_tokens, self._ranks = decoder, max_tokens, ranks
        self._subjects = Subjects(spec.seed, spec.prompts, spec.data, spec.sampler)
        self._lock = threading.Lock()
        self._name: Name | None = None  # of the second set that the engine holds
        self._used = 0.0

    @cached_property
    def _data(self) -> Source:
        return data_source(self._spec.data)

    @property
    def holds(self) -> Name | None:
        """Name of the second set that is held."""
        return self._name

    def sample(self, weights: View | Exported | None, draw: str, examples: list[Example], first: int, repeats: int) -> NDArray[np.uint8]:
        """Pixels `[len(examples) · repeats, H, W, 3]` (clips: `[…, F, H, W, 3]`), example-major: ODE samples of their texts, and of the frames
        that they give, without guidance.

        Args:
            weights: version; None = the policy that the run started from.
            draw: names the noise, with the place of an example.
            first: place of the first example.
        Raises:
            WeightsGone, WeightsDamaged: its weights cannot be read.
            HeldOutFailed: a sample could not be finished.
        """
        torch.set_num_threads(self._spec.rollout.threads)
        codec, sampler = self._policy.codec, self._spec.sampler
        shape = codec.latent_shape(sampler.height, sampler.width, sampler.frames)
        seed, subjects = key("evaluation", draw), self._subjects.held_out(examples, first)
        free = [self._policy.transformer.free_shape(shape, subject.given) for subject in subjects]
        # every family of policies has DDIM's deterministic step, which for a flow is Euler's
        requests = [
            SampleRequest(free[i], sampler.eval_steps, conditioning=shown, n=repeats, seed=seed, group=first + i, kernel="ddim_eta")
            for i, shown in enumerate(self._conditioner.get(subjects))
        ]
        with self._turn(weights):
            futures = self._engine.submit_side(requests)
            try:
                latents = [t.whole for future in futures for t in self._waited(future)]
            finally:
                for future in futures:
                    future.cancel()
        return self._pixels(latents)

    def _pixels(self, latents: list[Tensor]) -> NDArray[np.uint8]:
        found, start = list[NDArray[np.uint8]](), 0
        for pixels in self._decoder.turns(latents, self._spec.sampler.pixel_bytes, DECODE_DEADLINE_S):
            if not found:
                found.append(np.empty((len(latents), *pixels.shape[1:]), np.uint8))
            found[0][start : start + len(pixels)] = pixels
            start += len(pixels)
            del pixels  # before the next is waited for
        return found[0]

    def losses(self, weights: View | Exported | None, split: str, points: int, first: int, count: int) -> list[tuple[float, float]]:
        """Noise level and diffusion loss at `count` of `points` fixed (sample, time, noise) points of `split`, from place `first` on. Levels lie in
        (0, 1), from least noise to most, spread evenly over all points. Raises WeightsGone, WeightsDamaged, SourceError, HeldOutFailed."""
        torch.set_num_threads(self._spec.rollout.threads)
        part = slice(first, first + count)
        examples = [example for _, example in held_out_rows(self._data, split, points)[part]]
        network, process, dtype = self._policy.transformer, self._policy.process, self._spec.model.dtype
        sampler = self._spec.sampler
        x0 = clean_latents(examples, self._policy.codec, sampler.height, sampler.width, sampler.frames).cpu()
        subjects = self._subjects.held_out(examples, first, x0)
        conditioning = self._conditioner.get(subjects)
        g = generator("evaluation", "loss", split)
        level = (torch.arange(points) + torch.rand(points, generator=g)) / points
        level = level[torch.randperm(points, generator=g)][part]
        t = process.spread_times(level)
        eps = torch.randn((points, *x0.shape[1:]), generator=g)[part]
        rows = max(1, self._max_tokens // network.packed_tokens(tuple(x0.shape[1:]), conditioning[0].tokens))
        found: dict[int, float] = {}
        with self._turn(weights):
            for given in sorted({subject.given for subject in subjects}):
                places = [i for i, subject in enumerate(subjects) if subject.given == given]
                free, noise = network.free_part(x0, given), network.free_part(eps, given)
                for own in (places[i : i + rows] for i in range(0, len(places), rows)):
                    shown = stacked([conditioning[i] for i in own])
                    work = partial(diffusion_losses, network, process, free[own], noise[own], t[own], shown, rows, dtype, shown.prompt_embeds.device)
                    found |= dict(zip(own, self._waited(self._engine.call_side(work)).tolist(), strict=True))
        return [(float(level[i]), found[i]) for i in range(count)]

    def _waited(self, future: Future[Any]) -> Any:
        try:
            return future.result(TURN_DEADLINE_S)
        except (SamplingFailed, StepFailed) as error:  # they hold tensors and do not pickle
            raise HeldOutFailed(str(error)) from None

    @contextmanager
    def _turn(self, weights: View | Exported | None) -> Iterator[None]:
        """The engine's second set is that version, and nobody else's, meanwhile."""
        if not self._lock.acquire(timeout=TURN_DEADLINE_S):
            raise TimeoutError(f"the parcel before this one was not done within {TURN_DEADLINE_S:.0f} s")
        try:
            self._use(weights)
            yield
        finally:
            self._used = time.monotonic()
            self._lock.release()
            timer = threading.Timer(IDLE_S, self._let_go)
            timer.daemon = True
            timer.start()

    def _use(self, weights: View | Exported | None) -> None:
        name = name_of(weights)
        if name == self._name:
            return
        version = 0 if weights is None else weights.version
        if self._ranks is not None:
            self._ranks.hold(True, weights, version, None, READ_DEADLINE_S)
        incoming = StartingWeights(self._policy.transformer, self._spec.model, self._spec.seed) if weights is None else weights.open(READ_DEADLINE_S)
        self._name = None
        self._waited(self._engine.set_side_weights(incoming, version))
        self._name = name

    def _let_go(self) -> None:
        """Free the second set, unless somebody has used it since."""
        with self._lock:
            if self._name is not None and time.monotonic() >= self._used + IDLE_S:
                self._name = None
                with suppress(EngineClosed):
                    self._waited(self._engine.drop_side_weights())
