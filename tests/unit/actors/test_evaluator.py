"""The evaluator with a scorer in memory: fixed draws, per-prompt numbers, failures that stay failures."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from actors.config import DataConfig, EvaluationConfig, PromptConfig
from actors.evaluator import EvaluationFailed, Evaluator, EvaluatorSpec
from actors.sources.prompts import held_out_prompts
from actors.weights import Weights
from diffusion.checkpoint import load_policy
from diffusion.config import ModelConfig, SamplerConfig
from services.config import FleetConfig
from services.contract import ItemScore, ScoreFailure

SETTINGS = EvaluationConfig(test_prompts=6, dev_prompts=4, loss_points=8, diversity_prompts=4, diversity_samples=3, grid_prompts=5, threads=1)


@dataclass
class Scorer:
    """Reward = mean of the picture; may fail on one place of a call."""

    fails_at: int | None = None
    prompts: list[str] = field(default_factory=list)

    def score(self, model: str, prompts: list[str], images: np.ndarray, timeout_s: float) -> list[ItemScore | ScoreFailure]:
        self.prompts = prompts
        scores: list[ItemScore | ScoreFailure] = [ItemScore(float(i.mean()) / 255, {"exact_match": float(n % 2)}) for n, i in enumerate(images)]
        if self.fails_at is not None:
            scores[self.fails_at] = ScoreFailure("engine_error", "no")
        return scores


def evaluator(folder: Path, run_dir: Path, scorer: Scorer | None = None) -> Evaluator:
    model = ModelConfig(path=str(folder), init=True)
    sampler = SamplerConfig(eval_steps=2, steps=3, trained_steps=1)
    fleet = FleetConfig(url="http://127.0.0.1:9")
    made = Evaluator(EvaluatorSpec(model, sampler, PromptConfig(), DataConfig(), SETTINGS, "mean", fleet, "rewards", str(run_dir)))
    made.client = scorer or Scorer()  # type: ignore[assignment]
    return made


def changed_weights(folder: Path, version: int) -> Weights:
    torch.manual_seed(version)
    state = load_policy(ModelConfig(path=str(folder), init=True)).transformer.state_dict()
    return Weights.of(version, save({k: v + 0.1 * torch.randn_like(v) for k, v in state.items()}))


SCHEDULERS = [
    {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5},
    {"_class_name": "DDIMScheduler", "num_train_timesteps": 100, "prediction_type": "epsilon"},
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: s["_class_name"])
def test_policies_of_every_process_are_evaluated(scheduler: dict[str, Any], policy_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(policy_folder, folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    record = evaluator(folder, tmp_path / "run").evaluate(None, "test", 0)
    assert record["diffusion_loss"] > 0
    assert record["prompts"] == 6


def test_an_evaluation_keeps_its_per_prompt_numbers(policy_folder: Path, tmp_path: Path) -> None:
    scorer = Scorer()
    record = evaluator(policy_folder, tmp_path, scorer).evaluate(None, "test", 0)
    assert scorer.prompts == held_out_prompts(PromptConfig(), "test", 6)
    assert (record["kind"], record["split"], record["step"], record["weights"], record["prompts"]) == ("eval", "test", 0, "raw", 6)
    stored = json.loads((tmp_path / "eval" / "test-000000-raw.json").read_text())
    details = stored.pop("per_prompt")
    assert stored == record
    assert [len(details[k]) for k in ("rewards", "exact", "diffusion_losses", "diversity")] == [6, 6, 8, 4]
    assert record["reward"] == pytest.approx(np.mean(details["rewards"]))
    assert record["reward_stderr"] == pytest.approx(np.std(details["rewards"], ddof=1) / 6**0.5)
    assert record["exact_match"] == 0.5
    assert record["diffusion_loss"] == pytest.approx(np.mean(details["diffusion_losses"]))
    assert record["diversity"] == pytest.approx(np.mean(details["diversity"]))
    assert 0.1 < record["diversity"] < 1  # untrained: samples are noise


def test_two_evaluations_of_one_version_are_equal_and_two_versions_differ(policy_folder: Path, tmp_path: Path) -> None:
    made = evaluator(policy_folder, tmp_path)
    other = made.evaluate(changed_weights(policy_folder, 7), "dev", 7, full=False)
    same = made.evaluate(changed_weights(policy_folder, 7), "dev", 7, full=False)
    fresh = evaluator(policy_folder, tmp_path / "b").evaluate(changed_weights(policy_folder, 7), "dev", 7, full=False)
    assert other == same == fresh
    changed = made.evaluate(changed_weights(policy_folder, 8), "dev", 8, full=False)
    assert changed["prompts"] == other["prompts"] == 4
    assert changed["diffusion_loss"] != other["diffusion_loss"]
    assert changed["reward"] != other["reward"]


def test_without_weights_it_is_the_policy_folder_that_is_evaluated(policy_folder: Path, tmp_path: Path) -> None:
    """Also when this evaluator has evaluated other weights before: `None` names the folder, not what happens to be loaded."""
    made = evaluator(policy_folder, tmp_path)
    before = made.evaluate(None, "dev", 0, full=False)
    made.evaluate(changed_weights(policy_folder, 7), "dev", 7, full=False)
    assert made.evaluate(None, "dev", 0, full=False) == before


def test_a_sample_without_a_score_is_no_average_over_the_rest(policy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationFailed, match=r"1 of 6 held-out samples have no score; first: .*engine_error"):
        evaluator(policy_folder, tmp_path, Scorer(fails_at=2)).evaluate(None, "test", 0)
    assert not (tmp_path / "eval").exists()


def test_damaged_weights_are_not_evaluated(policy_folder: Path, tmp_path: Path) -> None:
    good = changed_weights(policy_folder, 3)
    with pytest.raises(ValueError, match="weights of version 3 are damaged"):
        evaluator(policy_folder, tmp_path).evaluate(Weights(3, good.data[:-1] + b"x", good.sha256), "test", 3)


def test_the_sample_grid_is_fixed(policy_folder: Path, tmp_path: Path) -> None:
    made = evaluator(policy_folder, tmp_path)
    weights = changed_weights(policy_folder, 7)
    first, second = made.grid(weights, "before"), made.grid(weights, "again")
    assert first == str(tmp_path / "samples" / "before.png")
    assert Path(first).read_bytes() == Path(second).read_bytes()
    with Image.open(first) as image:
        assert image.size == (4 * (144 + 8), 2 * (48 + 18))  # five pictures of 48x16, three times as large
