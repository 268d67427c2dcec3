"""Prompts in, pictures out: the engine with a policy's text encoder and codec around it, for people and scripts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
from torch import Tensor

from diffusion.checkpoint import Policy, load_policy
from diffusion.config import ModelConfig
from diffusion.engine.decode import Decoder, collect
from diffusion.engine.engine import Engine
from diffusion.engine.request import Failure, SampleRequest, SamplingFailed, Trajectory
from diffusion.engine.stats import EngineStats
from diffusion.families.conditioning import Conditioning
from diffusion.kernel_names import stochastic_steps

MAX_TOKENS = 16384
"""Default token budget of a forward pass."""
DECODE_DEADLINE_S = 600.0


@dataclass(frozen=True)
class SamplingParams:
    """How the samples of a prompt are drawn.

    Attributes:
        height, width: size in pixels.
        frames: of a clip; 1 = a picture.
        given: frames that the clip begins with, uint8 `[p, H, W, 3]` of this size; None = text-to-video, or a picture.
        steps: denoising steps.
        n: samples of the prompt.
        seed: with the prompt's position in the call and the sample's number, the name of every noise.
        guidance, negative_prompt: classifier-free guidance; 1 = none.
        kernel, noise_level: the solver, and the noise of its stochastic steps.
        stochastic: `none` (an ODE sample) or `all` (noise in every step that may have some).
        priority: head start in the queue.
    """

    height: int
    width: int
    steps: int = 20
    n: int = 1
    seed: int = 0
    guidance: float = 1.0
    negative_prompt: str = ""
    kernel: str = "ddim_eta"
    noise_level: float = 0.7
    stochastic: str = "none"
    priority: int = 0
    frames: int = 1
    given: np.ndarray | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.stochastic not in ("none", "all"):
            raise ValueError(f"stochastic={self.stochastic!r} must be 'none' or 'all'")


@dataclass(frozen=True, eq=False)
class Sample:
    """A finished sample. `image` is uint8 RGB `[H, W, 3]`, of a video policy a clip `[F, H, W, 3]`; `number` counts the prompt's samples."""

    prompt: str
    params: SamplingParams
    number: int
    image: np.ndarray
    trajectory: Trajectory


class DiffusionEngine:
    """`generate` on a policy. Close it, or use it as a context manager.

    Args:
        policy: network, text encoder, codec, process.
        max_tokens: upper bound on the tokens of one forward pass.
        dtype: `float32` or `bfloat16` autocast inside the network.
    """

    def __init__(self, policy: Policy, max_tokens: int = MAX_TOKENS, dtype: str = "float32") -> None:
        self.policy = policy
        self.engine = Engine(policy.transformer, policy.process, max_tokens, dtype, policy.text_encoder)
        self._decoder = Decoder(policy.codec, self.engine.runner.device)

    @classmethod
    def from_pretrained(
        cls, path: str, revision: str | None = None, device: str = "cpu", max_tokens: int = MAX_TOKENS, dtype: str = "float32", **settings: Any
    ) -> Self:
        """From a folder in diffusers' layout or a hub id; `settings` are others of `ModelConfig`. Raises CheckpointError."""
        return cls(load_policy(ModelConfig(path=path, revision=revision, **settings), device), max_tokens, dtype)

    def request(self, prompt: str, params: SamplingParams, group: int) -> SampleRequest:
        """The request that draws `params.n` samples of a prompt. Raises ValueError for a size the codec cannot make, and for frames that
        cannot be given."""
        codec = self.policy.codec
        shape = self.policy.transformer.free_shape(codec.latent_shape(params.height, params.width, params.frames), self._latent_frames(params))
        given = self._given(params)
        conditioning, negative = self._conditioning(prompt, given), self._conditioning(params.negative_prompt, given) if params.guidance != 1 else None
        noisy = range(stochastic_steps(params.kernel, params.steps)) if params.stochastic == "all" else ()
        return SampleRequest(
            shape=shape,
            steps=params.steps,
            conditioning=conditioning,
            n=params.n,
            seed=params.seed,
            group=group,
            kernel=params.kernel,
            noise_level=params.noise_level,
            stochastic=frozenset(noisy),
            guidance=params.guidance,
            negative=negative,
            priority=params.priority,
            id=prompt,
        )

    def _latent_frames(self, params: SamplingParams) -> int:
        """Latent frames that are given: as many as the pixels of `given` make. Raises ValueError for a number that makes none."""
        if params.given is None:
            return 0
        pixels, latent = len(params.given), 1
        while self.policy.codec.pixel_frames(latent) < pixels:
            latent += 1
        if self.policy.codec.pixel_frames(latent) != pixels:
            raise ValueError(f"{pixels} given frames make no whole latent frames of this policy; give {self.policy.codec.pixel_frames(latent)}")
        return latent

    def _given(self, params: SamplingParams) -> dict[str, Tensor]:
        """What is made of the frames that are given."""
        if params.given is None:
            return {}
        if self.policy.frames is None:
            raise ValueError("a policy of pictures is given no frames")
        if params.given.shape[1:] != (params.height, params.width, 3):
            raise ValueError(f"given frames are {params.given.shape[1:]}, the clip's are {(params.height, params.width, 3)}")
        return self.policy.frames.encode(params.given, params.frames)

    def _conditioning(self, prompt: str, given: dict[str, Tensor]) -> Conditioning:
        assert self.engine.prompts is not None  # it was made with a text encoder
        return self.engine.prompts.get([prompt])[0].beside(given)

    def generate(
        self, prompts: Sequence[str], params: SamplingParams | Sequence[SamplingParams], progress: Callable[[int, int], None] | None = None
    ) -> list[list[Sample]]:
        """Samples of every prompt, in the order given.

        Args:
            prompts: texts; a text may occur more than once.
            params: for all prompts, or one each.
            progress: told, after every forward pass, how many samples are finished, and of how many.

        Raises:
            ValueError: a prompt or a size that cannot be sampled.
            SamplingFailed: some samples failed.
            StepFailed: a fault of the network.
            TimeoutError: latents were not decoded in time.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(each)} sampling parameters; give one for all, or one each")
        requests = [self.request(prompt, p, group) for group, (prompt, p) in enumerate(zip(prompts, each, strict=True))]
        number = {id(r): i for i, r in enumerate(requests)}
        done: list[list[tuple[Trajectory, Future[np.ndarray]]]] = [[] for _ in requests]
        failures: list[Failure] = []
        total, ended = sum(r.n for r in requests), 0
        for step in self.engine.steps(requests):
            good = [one for one in step if isinstance(one, Trajectory)]
            failures += [one for one in step if isinstance(one, Failure)]
            for one, image in zip(good, self._decoder.submit([t.whole for t in good]), strict=True):
                done[number[id(one.request)]].append((one, image))
            ended += len(step)
            if progress is not None:
                progress(ended, total)
        if failures:
            raise SamplingFailed(failures, [t for samples in done for t, _ in samples])
        collect([image for samples in done for _, image in samples], DECODE_DEADLINE_S)
        return [
            [Sample(prompt, p, t.member, image.result(), t) for t, image in sorted(samples, key=lambda pair: pair[0].member)]
            for prompt, p, samples in zip(prompts, each, done, strict=True)
        ]

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats

    def close(self) -> None:
        self._decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
