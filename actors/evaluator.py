"""The evaluator: held-out numbers of one weight version, on fixed prompts, fixed noise and fixed loss points.

Samples follow the ODE without guidance. Everything random is named by the split alone, so two versions (and two runs)
are compared on the same draws and differences are paired.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.config import DataConfig, EvaluationConfig, PromptConfig
from actors.pictures import caption, contact_sheet
from actors.rewards import RunRewards
from actors.sources.draws import data_source, held_out_prompts, held_out_rows, prompt_source
from actors.sources.latents import clean_latents
from actors.sources.prepared import PreparedSource
from actors.weights.reading import Exported
from actors.weights.store import View
from diffusion.checkpoint import load_network, load_policy
from diffusion.config import ModelConfig, SamplerConfig
from diffusion.device import resolve_device
from diffusion.engine.engine import Engine
from diffusion.engine.request import SampleRequest
from diffusion.evaluation import diffusion_losses
from diffusion.families.conditioning import TextEncoder
from diffusion.lora import trained_weights
from diffusion.pixels import pairwise_rms, scene_statistics
from diffusion.seeds import generator, key
from services.contract import ItemScore, ScoreFailure

SCORED_AT_ONCE = 64
"""Samples of one scoring call, which must end within `fleet.timeout_s`."""
LOSSES_AT_ONCE = 256
"""Points of the held-out loss in a forward pass, at most; fewer where they exceed the engine's token budget."""
READ_DEADLINE_S = 300.0
"""For the bytes of a version to arrive."""
Column = list[float | None]
"""One number per prompt; None where the reward failed."""


@dataclass(frozen=True)
class EvaluatorSpec:
    """Everything an evaluator needs; `encoder` encodes its prompts (None = the policy's own text encoders, loaded)."""

    model: ModelConfig
    sampler: SamplerConfig
    prompts: PromptConfig
    data: DataConfig
    evaluation: EvaluationConfig
    rewards: RunRewards
    run_dir: str
    seed: int = 0
    encoder: TextEncoder | None = None


class EvaluationFailed(Exception):
    """A reward scored none of the held-out samples; the message says why."""


@dataclass(frozen=True)
class Judgement:
    """What the rewards say of held-out samples: `values` by term, `subs` by `reward.sub_score`, why the first of each failed."""

    values: dict[str, Column]
    subs: dict[str, Column]
    first_failure: dict[str, str]
    revisions: dict[str, str]

    def record(self) -> dict[str, Any]:
        """Means of the columns without a gap: an average over the rest would be another number. And what failed."""
        failed = {name: sum(v is None for v in column) for name, column in self.values.items()}
        return {
            "rewards": _means(self.values),
            "sub_scores": _means(self.subs),
            "failed": {name: count for name, count in failed.items() if count},
            "first_failure": self.first_failure,
            "revisions": self.revisions,
        }


def _means(columns: dict[str, Column]) -> dict[str, float]:
    whole = {name: [v for v in column if v is not None] for name, column in columns.items()}
    return {name: float(np.mean(values)) for name, values in whole.items() if values and len(values) == len(columns[name])}


def judged(rewards: RunRewards, scores: dict[str, list[ItemScore | ScoreFailure]], revisions: dict[str, str]) -> Judgement:
    """Columns from the scores of every reward. Raises EvaluationFailed when a reward has no score at all."""
    subs: dict[str, Column] = {}
    first: dict[str, str] = {}
    for name, items in scores.items():
        failed = [s for s in items if isinstance(s, ScoreFailure)]
        if failed:
            first[name] = f"{failed[0].code}: {failed[0].message}"
        if len(failed) == len(items):
            raise EvaluationFailed(f"reward {name} scored none of {len(items)} held-out samples; first: {first[name]}")
        for sub in next(s for s in items if isinstance(s, ItemScore)).sub_scores:
            subs[f"{name}.{sub}"] = [s.sub_scores[sub] if isinstance(s, ItemScore) else None for s in items]
    values: dict[str, Column] = {t.name: [t.value(s) if isinstance(s, ItemScore) else None for s in scores[t.reward]] for t in rewards.terms}
    return Judgement(values, subs, first, revisions)


class Evaluator:
    """Plain class; the driver makes it a Ray actor."""

    def __init__(self, spec: EvaluatorSpec) -> None:
        torch.set_num_threads(spec.evaluation.threads)
        self.spec = spec
        self.device = resolve_device("cuda" if spec.evaluation.gpus > 0 else "cpu", f"evaluation.gpus={spec.evaluation.gpus:g}")
        self.policy = load_policy(spec.model, self.device, spec.seed, spec.encoder)
        self.engine = Engine(self.policy.transformer, self.policy.process, spec.sampler.max_tokens, spec.model.dtype, self.policy.text_encoder)
        self.prompts, self.data = prompt_source(spec.prompts, spec.data), data_source(spec.data)
        self.client = spec.rewards.connect()
        self._starts = True  # whether the policy is the one that it started with
        self.run_dir = Path(spec.run_dir)

    def _use(self, weights: View | Exported | None) -> None:
        if weights is not None:
            self.engine.set_weights(weights.open(READ_DEADLINE_S), weights.version)
        elif not self._starts:  # asked for before all others, so hardly ever loaded again; kept, it would be a second model
            network, _ = load_network(self.spec.model, self.device, self.spec.seed)
            self.engine.set_weights(trained_weights(network), 0)
        self._starts = weights is None

    def _sample(self, prompts: list[str], repeats: int, name: str) -> NDArray[np.uint8]:
        """Pixels `[len(prompts) · repeats, H, W, 3]`, prompt-major."""
        sampler = self.spec.sampler
        shape = (self.policy.codec.channels, *self.policy.codec.latent_size(sampler.height, sampler.width))
        seed = key("evaluation", name)
        # every family of policies has DDIM's deterministic step, which for a flow is Euler's
        requests = [SampleRequest(shape, sampler.eval_steps, prompt=p, n=repeats, seed=seed, group=i, kernel="ddim_eta") for i, p in enumerate(prompts)]
        return self.policy.codec.decode(torch.stack([t.latent for t in self.engine.run(requests)]))

    def _judge(self, prompts: list[str], images: NDArray[np.uint8]) -> Judgement:
        rewards = self.spec.rewards
        if not rewards.names:
            return Judgement({}, {}, {}, {})
        revisions = {name: info.revision for name, info in self.client.info(rewards.names).items()}
        scores: dict[str, list[ItemScore | ScoreFailure]] = {name: [] for name in rewards.names}
        for start in range(0, len(prompts), SCORED_AT_ONCE):
            part = slice(start, start + SCORED_AT_ONCE)
            for name, found in self.client.score_all(rewards.names, prompts[part], images[part], rewards.fleet.timeout_s).items():
                scores[name] += found
        return judged(rewards, scores, revisions)

    def _losses(self, split: str, points: int) -> tuple[list[str], NDArray[np.float32]]:
        """Captions, and diffusion loss at `points` fixed (sample, time, noise) points; times are spread evenly over the process's range."""
        captions, examples = map(list, zip(*held_out_rows(self.data, split, points), strict=True))
        x0 = clean_latents(examples, self.policy.codec, self.spec.sampler.height, self.spec.sampler.width)
        text = self.policy.text_encoder.encode(captions)
        g = generator("evaluation", "loss", split)
        t = (torch.arange(points) + torch.rand(points, generator=g)) / points
        t = self.policy.process.spread_times(t[torch.randperm(points, generator=g)])
        eps = torch.randn(x0.shape, generator=g)
        network, dtype = self.policy.transformer, self.spec.model.dtype
        rows = max(1, min(LOSSES_AT_ONCE, self.spec.sampler.max_tokens // network.packed_tokens(tuple(x0.shape[1:]), text.tokens)))
        found = diffusion_losses(network, self.policy.process, x0, eps, t, text, rows, dtype, self.device)
        losses: NDArray[np.float32] = found.numpy()
        return captions, losses

    def _set(self, split: str, prompts: Sequence[str], captions: Sequence[str]) -> str:
        """Digest of what an evaluation is made on: numbers of two runs are paired only where it is the same."""
        sampler, settings = self.spec.sampler, self.spec.evaluation
        sizes = [sampler.eval_steps, sampler.height, sampler.width, settings.diversity_prompts, settings.diversity_samples]
        prepared = [self.data.manifest.digest] if isinstance(self.data, PreparedSource) else []  # other latents may have the same captions
        drawn = [split, list(prompts), list(captions), *sizes, *prepared]
        return hashlib.blake2b(json.dumps(drawn).encode(), digest_size=8).hexdigest()

    def evaluate(self, weights: View | Exported | None, split: str, step: int, kind: str = "raw", full: bool = True) -> dict[str, Any]:
        """Evaluate one version and keep its per-prompt numbers in `eval/<split>-<step>-<kind>.json`.

        Args:
            weights: version to evaluate, which is also the step recorded; None = the policy folder itself, at `step`.
            full: the sizes of the before/after evaluation; otherwise the smaller periodic ones.
        Returns:
            The metrics line (`kind: evaluation`). Raises EvaluationFailed, WeightsGone, WeightsDamaged.
        """
        step = step if weights is None else weights.version
        self._use(weights)
        settings = self.spec.evaluation
        shrink = 1 if full else 4
        points = max(2, settings.loss_points // shrink)
        prompts = held_out_prompts(self.prompts, split, settings.test_prompts if full else settings.dev_prompts)
        images = self._sample(prompts, 1, split)
        judgement = self._judge(prompts, images)
        repeats = settings.diversity_samples
        varied = prompts[: max(1, settings.diversity_prompts // shrink)]
        samples = self._sample(varied, repeats, f"{split}-diversity")
        diversity = pairwise_rms(samples.reshape(len(varied), repeats, *samples.shape[1:]))
        captions, losses = self._losses(split, points)
        record = {
            "kind": "evaluation",
            "split": split,
            "step": step,
            "weights": kind,
            "prompts": len(prompts),
            "set": self._set(split, prompts, captions),
            **judgement.record(),
            "diffusion_loss": float(losses.mean()),
            "diversity": float(diversity.mean()),
            "scene": scene_statistics(images),
        }
        details = {"rewards": judgement.values, "sub_scores": judgement.subs, "diffusion_loss": losses.tolist(), "diversity": diversity.tolist()}
        folder = self.run_dir / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{split}-{step:06d}-{kind}.partial"
        partial.write_text(json.dumps({**record, "per_prompt": details}) + "\n")
        partial.rename(partial.with_suffix(".json"))
        return record

    def grid(self, weights: View | Exported | None, name: str) -> str:
        """Captioned sample grid of fixed test prompts and fixed noise, `samples/<name>.png`; returns its path."""
        self._use(weights)
        prompts = held_out_prompts(self.prompts, "test", self.spec.evaluation.grid_prompts)
        path = self.run_dir / "samples" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(self._sample(prompts, 1, "grid"), [caption(p) for p in prompts]).save(path)
        return str(path)
