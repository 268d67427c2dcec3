"""The evaluator: held-out numbers of one weight version, on fixed prompts, fixed noise and fixed loss points.

Samples follow the ODE without guidance. Everything random is named by the split alone, so two versions (and two runs)
are compared on the same draws and differences are paired.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from actors.config import DataConfig, EvaluationConfig, PromptConfig
from actors.pictures import caption, contact_sheet
from actors.sources.anchor import held_out_batch
from actors.sources.prompts import held_out_prompts
from actors.weights import Weights
from diffusion.checkpoint import load_policy
from diffusion.config import ModelConfig, SamplerConfig
from diffusion.engine.engine import Engine
from diffusion.engine.request import SampleRequest
from diffusion.evaluation import diffusion_losses
from diffusion.lora import trained_weights
from diffusion.pixels import pairwise_rms, scene_statistics
from diffusion.seeds import generator, key
from services.client.base import ItemScore
from services.client.connect import connect
from services.config import RewardConfig


@dataclass(frozen=True)
class EvaluatorSpec:
    """Everything an evaluator needs."""

    model: ModelConfig
    sampler: SamplerConfig
    prompts: PromptConfig
    data: DataConfig
    evaluation: EvaluationConfig
    reward: RewardConfig
    run_dir: str
    seed: int = 0


class EvaluationFailed(Exception):
    """Some held-out samples could not be scored; an average over the rest would be another number."""


class Evaluator:
    """Plain class; the driver makes it a Ray actor."""

    def __init__(self, spec: EvaluatorSpec) -> None:
        torch.set_num_threads(spec.evaluation.threads)
        self.spec = spec
        self.policy = load_policy(spec.model, seed=spec.seed)
        self.engine = Engine(self.policy.transformer, self.policy.process, spec.sampler.max_tokens, spec.model.dtype, self.policy.text_encoder)
        self.client = connect(spec.reward)
        self._start = Weights.of(0, save(trained_weights(self.policy.transformer)))
        self.run_dir = Path(spec.run_dir)

    def _use(self, weights: Weights | None) -> None:
        chosen = weights or self._start
        self.engine.set_weights(chosen.state(), chosen.version)

    def _sample(self, prompts: list[str], repeats: int, name: str) -> np.ndarray:
        """Pixels `[len(prompts) · repeats, H, W, 3]`, prompt-major."""
        sampler = self.spec.sampler
        shape = (self.policy.codec.channels, *self.policy.codec.latent_size(sampler.height, sampler.width))
        seed = key("evaluation", name)
        # every family of policies has DDIM's deterministic step, which for a flow is Euler's
        requests = [SampleRequest(shape, sampler.eval_steps, prompt=p, n=repeats, seed=seed, group=i, kernel="ddim_eta") for i, p in enumerate(prompts)]
        return self.policy.codec.decode(torch.stack([t.latent for t in self.engine.run(requests)]))

    def _score(self, prompts: list[str], images: np.ndarray) -> list[ItemScore]:
        scores = self.client.score(self.spec.reward.model, prompts, images, self.spec.reward.timeout_s)
        failed = [s for s in scores if not isinstance(s, ItemScore)]
        if failed:
            raise EvaluationFailed(f"{len(failed)} of {len(scores)} held-out samples have no score; first: {failed[0]}")
        return [s for s in scores if isinstance(s, ItemScore)]

    def _losses(self, split: str, points: int) -> np.ndarray:
        """Diffusion loss at `points` fixed (sample, time, noise) points; times are stratified over the noise levels of training."""
        captions, pixels = held_out_batch(self.spec.data, split, points, self.spec.sampler.height, self.spec.sampler.width)
        x0 = self.policy.codec.encode(pixels)
        text = self.policy.text_encoder.encode(captions)
        g = generator("evaluation", "loss", split)
        t = (torch.arange(points) + torch.rand(points, generator=g)) / points
        t = self.policy.process.spread_times(t[torch.randperm(points, generator=g)])
        eps = torch.randn(x0.shape, generator=g)
        losses: np.ndarray = diffusion_losses(self.policy.transformer, self.policy.process, x0, eps, t, text.prompt_embeds, text.pooled).numpy()
        return losses

    def evaluate(self, weights: Weights | None, split: str, step: int, kind: str = "raw", full: bool = True) -> dict[str, Any]:
        """Evaluate one version and keep its per-prompt numbers in `eval/<split>-<step>-<kind>.json`.

        Args:
            weights: version to evaluate, which is also the step recorded; None = the policy folder itself, at `step`.
            full: the sizes of the before/after evaluation; otherwise the smaller periodic ones.
        Returns:
            The metrics line (`kind: eval`). Raises EvaluationFailed, ValueError.
        """
        step = step if weights is None else weights.version
        self._use(weights)
        settings = self.spec.evaluation
        shrink = 1 if full else 4
        prompts = held_out_prompts(self.spec.prompts, split, settings.test_prompts if full else settings.dev_prompts)
        images = self._sample(prompts, 1, split)
        scores = self._score(prompts, images)
        repeats = settings.diversity_samples
        varied = prompts[: max(1, settings.diversity_prompts // shrink)]
        samples = self._sample(varied, repeats, f"{split}-diversity")
        diversity = pairwise_rms(samples.reshape(len(varied), repeats, *samples.shape[1:]))
        losses = self._losses(split, max(2, settings.loss_points // shrink))
        rewards = np.array([s.reward for s in scores])
        exact = np.array([s.sub_scores["exact_match"] for s in scores if "exact_match" in s.sub_scores])
        record = {
            "kind": "eval",
            "split": split,
            "step": step,
            "weights": kind,
            "prompts": len(prompts),
            "reward": float(rewards.mean()),
            "reward_stderr": float(rewards.std(ddof=1) / len(rewards) ** 0.5),
            "exact_match": float(exact.mean()) if len(exact) == len(rewards) else None,
            "diffusion_loss": float(losses.mean()),
            "diversity": float(diversity.mean()),
            "scene": scene_statistics(images),
        }
        details = {"rewards": rewards.tolist(), "exact": exact.tolist(), "diffusion_losses": losses.tolist(), "diversity": diversity.tolist()}
        folder = self.run_dir / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}-{step:06d}-{kind}.json").write_text(json.dumps({**record, "per_prompt": details}) + "\n")
        return record

    def grid(self, weights: Weights | None, name: str) -> str:
        """Captioned sample grid of fixed test prompts and fixed noise, `samples/<name>.png`; returns its path."""
        self._use(weights)
        prompts = held_out_prompts(self.spec.prompts, "test", self.spec.evaluation.grid_prompts)
        path = self.run_dir / "samples" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(self._sample(prompts, 1, "grid"), [caption(p) for p in prompts]).save(path)
        return str(path)
