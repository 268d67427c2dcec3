"""The evaluator: held-out numbers of one weight version, on fixed prompts, fixed noise and fixed loss points.

    prompts ─ parcels ─► generators, at low priority (`actors.held_out`) ─► pictures ─► rewards, statistics ─► eval/*.json

It has no network. Samples follow the ODE without guidance. Everything random is named by the split and the place alone, so two versions
(and two runs) are compared on the same draws and differences are paired, whichever generators did the work. Pictures of a parcel are judged
when they come and let go.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actors.clips import playing_sheet, shown, strip_sheet, write_clip
from actors.config import DataConfig, EvaluationConfig, PromptConfig
from actors.groups import fps_of
from actors.judgement import EvaluationFailed, Judgement, Scores, judged
from actors.noise_levels import by_band
from actors.parcels import Silence, each
from actors.pictures import caption, contact_sheet
from actors.rewards import RunRewards
from actors.sources.draws import data_source, held_out_examples, held_out_rows, prompt_source
from actors.sources.example import Example
from actors.sources.prepared import PreparedSource
from diffusion.config import SamplerConfig
from diffusion.pixels import pairwise_rms, scene_numbers, turn_size

if TYPE_CHECKING:
    from actors.weights.reading import Exported
    from actors.weights.store import View

SAMPLES_A_PARCEL = 32
"""Pictures of one parcel (large clips are fewer, see `turn_size`), or those of one prompt where they are more: most of what a forward pass of a
small policy gains by being large, and of one scoring call, which must end within `fleet.timeout_s`."""
LOSSES_A_PARCEL = 64
"""Points of the held-out loss in one parcel."""


@dataclass(frozen=True)
class EvaluatorSpec:
    """Everything an evaluator needs; `generators` are the handles of the actors that do its network's work (`RolloutGenerator`)."""

    generators: tuple[Any, ...]
    prompts: PromptConfig
    data: DataConfig
    sampler: SamplerConfig
    evaluation: EvaluationConfig
    rewards: RunRewards
    run_dir: str


def parcels(count: int, size: int) -> list[tuple[int, int]]:
    """(first, how many) of the parcels of `count` things, `size` in each and fewer in the last."""
    return [(first, min(size, count - first)) for first in range(0, count, size)]


class Evaluator:
    """Plain class; the driver makes it a Ray actor."""

    def __init__(self, spec: EvaluatorSpec) -> None:
        self.spec = spec
        self.prompts, self.data = prompt_source(spec.prompts, spec.data), data_source(spec.data)
        self.client = spec.rewards.connect()
        self.run_dir = Path(spec.run_dir)

    def _asked(self, method: str, calls: list[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        try:
            yield from each(self.spec.generators, method, calls)
        except Silence as error:
            raise EvaluationFailed(f"the generators did not answer: {error}") from error

    def _samples(self, weights: View | Exported | None, examples: list[Example], repeats: int, draw: str) -> Iterator[tuple[int, list[str], NDArray[np.uint8]]]:
        """Parcel by parcel as they come: its number, its prompts, their pixels `[prompts · repeats, H, W, 3]`, prompt-major."""
        cut = parcels(len(examples), max(1, turn_size(SAMPLES_A_PARCEL, self.spec.sampler.pixel_bytes) // repeats))
        calls = [(weights, draw, examples[first : first + n], first, repeats) for first, n in cut]
        for number, images in self._asked("sample_held_out", calls):
            first, n = cut[number]
            yield number, [example.text for example in examples[first : first + n]], images

    def _judged(self, weights: View | Exported | None, examples: list[Example], draw: str) -> tuple[Judgement, dict[str, NDArray[np.float64]]]:
        """What the rewards, and the scene's statistics, say of one sample of each example."""
        rewards = self.spec.rewards
        revisions = {name: info.revision for name, info in self.client.info(rewards.names).items()} if rewards.names else {}
        scores: dict[int, Scores] = {}
        scenes: dict[int, dict[str, NDArray[np.float64]]] = {}
        for number, texts, images in self._samples(weights, examples, 1, draw):
            scenes[number] = scene_numbers(images)
            if rewards.names:
                scores[number] = self.client.score_all(rewards.names, texts, images, rewards.fleet.timeout_s, fps_of(images, self.spec.sampler))
        parts = [scenes[n] for n in sorted(scenes)]
        return judged(rewards, [scores[n] for n in sorted(scores)], revisions), {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _diversity(self, weights: View | Exported | None, examples: list[Example], draw: str) -> NDArray[np.float64]:
        """Mean distance of the samples of each example."""
        repeats, found = self.spec.evaluation.diversity_samples, dict[int, NDArray[np.float64]]()
        for number, texts, images in self._samples(weights, examples, repeats, draw):
            found[number] = pairwise_rms(images.reshape(len(texts), repeats, *images.shape[1:]))
        return np.concatenate([found[n] for n in sorted(found)])

    def _losses(self, weights: View | Exported | None, split: str, points: int) -> list[tuple[float, float]]:
        """Noise level, from 0 to 1, and diffusion loss at `points` fixed (sample, time, noise) points."""
        calls = [(weights, split, points, first, n) for first, n in parcels(points, LOSSES_A_PARCEL)]
        found: dict[int, list[tuple[float, float]]] = dict(self._asked("held_out_losses", calls))
        return [point for number in sorted(found) for point in found[number]]

    def _set(self, split: str, prompts: Sequence[str], captions: Sequence[str]) -> str:
        """Digest of what an evaluation is made on: numbers of two runs are paired only where it is the same."""
        sampler, settings = self.spec.sampler, self.spec.evaluation
        sizes = [sampler.eval_steps, sampler.height, sampler.width, settings.diversity_prompts, settings.diversity_samples]
        clips = [sampler.frames, sampler.fps] if sampler.frames > 1 else []
        clips += sampler.given_choices if any(sampler.given_choices) else ()
        prepared = [self.data.manifest.digest] if isinstance(self.data, PreparedSource) else []  # other latents may have the same captions
        drawn = [split, list(prompts), list(captions), *sizes, *clips, *prepared]
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
        settings = self.spec.evaluation
        shrink = 1 if full else 4
        points = max(2, settings.loss_points // shrink)
        examples = held_out_examples(self.prompts, split, settings.test_prompts if full else settings.dev_prompts)
        prompts = [example.text for example in examples]
        judgement, scene = self._judged(weights, examples, split)
        diversity = self._diversity(weights, examples[: max(1, settings.diversity_prompts // shrink)], f"{split}-diversity")
        levels, losses = (list(column) for column in zip(*self._losses(weights, split, points), strict=True))
        bands = by_band(levels, losses)
        record = {
            "kind": "evaluation",
            "split": split,
            "step": step,
            "weights": kind,
            "prompts": len(prompts),
            "set": self._set(split, prompts, [text for text, _ in held_out_rows(self.data, split, points)]),
            **judgement.record(),
            "diffusion_loss": float(np.asarray(losses, np.float32).mean()),
            **({"diffusion_loss_bands": {name: float(np.mean(part)) for name, part in bands.items()}} if bands else {}),
            "diversity": float(diversity.mean()),
            "scene": {name: float(values.mean()) for name, values in scene.items()},
            "scene_std": {name: float(values.std(ddof=1)) if len(values) > 1 else 0.0 for name, values in scene.items()},
        }
        details = {"rewards": judgement.values, "sub_scores": judgement.subs, "diffusion_loss": losses, "noise_level": levels, "diversity": diversity.tolist()}
        details["scene"] = {name: values.tolist() for name, values in scene.items()}
        folder = self.run_dir / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{split}-{step:06d}-{kind}.partial"
        partial.write_text(json.dumps({**record, "per_prompt": details}) + "\n")
        partial.rename(partial.with_suffix(".json"))
        return record

    def grid(self, weights: View | Exported | None, name: str) -> str:
        """Captioned sample grid of fixed test prompts and fixed noise, `samples/<name>.png`; returns its path. Of clips strips of frames,
        and `samples/<name>.mp4`, where all play in step, large ones smaller than they are."""
        examples = held_out_examples(self.prompts, "test", self.spec.evaluation.grid_prompts)
        found = {
            number: [shown(clip) for clip in images] if images.ndim == 5 else list(images) for number, _, images in self._samples(weights, examples, 1, "grid")
        }
        path = self.run_dir / "samples" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = np.stack([sample for n in sorted(found) for sample in found[n]])
        if samples.ndim == 5:
            texts = [example.text for example in examples]  # whole: what moves, and how, is said outside quotes
            write_clip(path.with_suffix(".mp4"), playing_sheet(samples, texts), self.spec.sampler.fps)
            sheet = strip_sheet(samples, texts)
        else:
            sheet = contact_sheet(samples, [caption(example.text) for example in examples])
        sheet.save(path)
        return str(path)
