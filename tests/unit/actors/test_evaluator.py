"""The evaluator with a scorer in memory: fixed draws, per-prompt numbers, failures that stay failures."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from actors.config import DataConfig, EvaluationConfig, PromptConfig
from actors.evaluator import EvaluationFailed, Evaluator, EvaluatorSpec
from actors.groups import Weighted
from actors.prepared import Row, begin, finish, write_shard
from actors.rewards import RunRewards
from actors.sources.draws import held_out_prompts
from actors.sources.glyph import GlyphSource
from actors.sources.text import TextSource
from actors.weights.reading import Exported
from actors.weights.shards import local_slices, write_slices
from actors.weights.store import View
from actors.weights.table import complete
from actors.weights.transport import FolderTransport, WeightsDamaged
from diffusion.checkpoint import load_policy
from diffusion.config import ModelConfig, SamplerConfig
from services.config import FleetConfig
from services.contract import ItemScore, ScoreFailure
from services.terms import Term

SETTINGS = EvaluationConfig(test_prompts=6, dev_prompts=4, loss_points=8, diversity_prompts=4, diversity_samples=3, grid_prompts=5, threads=1)


@dataclass
class Scorer:
    """Reward = mean of the picture; may fail on one place of a call."""

    fails_at: int | None = None
    always_fails: bool = False
    prompts: list[str] = field(default_factory=list)

    def info(self, names: list[str]) -> dict[str, Any]:
        return {name: SimpleNamespace(revision=f"{name}-1") for name in names}

    def score_all(self, names: list[str], prompts: list[str], images: np.ndarray, timeout_s: float) -> dict[str, list[ItemScore | ScoreFailure]]:
        return {name: self.score(name, prompts, images) for name in names}

    def score(self, name: str, prompts: list[str], images: np.ndarray) -> list[ItemScore | ScoreFailure]:
        self.prompts = prompts
        scores: list[ItemScore | ScoreFailure] = [ItemScore(float(i.mean()) / 255, {"exact_match": float(n % 2)}) for n, i in enumerate(images)]
        if self.fails_at is not None and name == "mean":
            scores[self.fails_at] = ScoreFailure("engine_error", "no")
        if self.always_fails:
            scores = [ScoreFailure("engine_error", "no") for _ in scores]
        return scores


REWARDS = RunRewards(FleetConfig(url="http://127.0.0.1:9"), "rewards", (Weighted(Term.parse("mean"), 1.0),), (Term.parse("other.exact_match"),))


def evaluator(folder: Path, run_dir: Path, scorer: Scorer | None = None, rewards: RunRewards = REWARDS) -> Evaluator:
    model = ModelConfig(path=str(folder), init=True)
    sampler = SamplerConfig(eval_steps=2, steps=3, trained_steps=1)
    made = Evaluator(EvaluatorSpec(model, sampler, PromptConfig(), DataConfig(), SETTINGS, rewards, str(run_dir)))
    made.client = scorer or Scorer()  # type: ignore[assignment]
    return made


def changed_state(folder: Path, version: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(version)
    state = load_policy(ModelConfig(path=str(folder), init=True)).transformer.state_dict()
    return {k: v + 0.1 * torch.randn_like(v) for k, v in state.items()}


def changed_weights(folder: Path, version: int) -> View:
    transport = FolderTransport(str(folder.parent / "weights"))
    shard, objects = write_slices(transport, local_slices(changed_state(folder, version), 0), (1, version), 0, 1)
    return View(complete([shard]), transport, objects)


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
    assert scorer.prompts == held_out_prompts(GlyphSource(), "test", 6)
    assert (record["kind"], record["split"], record["step"], record["weights"], record["prompts"]) == ("evaluation", "test", 0, "raw", 6)
    stored = json.loads((tmp_path / "eval" / "test-000000-raw.json").read_text())
    details = stored.pop("per_prompt")
    assert stored == record
    assert {name: len(column) for name, column in details["rewards"].items()} == {"mean": 6, "other.exact_match": 6}
    assert details["sub_scores"].keys() == {"mean.exact_match", "other.exact_match"}
    assert [len(details[k]) for k in ("diffusion_loss", "diversity")] == [8, 4]
    assert record["rewards"] == {"mean": pytest.approx(np.mean(details["rewards"]["mean"])), "other.exact_match": 0.5}
    assert record["sub_scores"] == {"mean.exact_match": 0.5, "other.exact_match": 0.5}
    assert record["failed"] == record["first_failure"] == {}
    assert record["revisions"] == {"mean": "mean-1", "other": "other-1"}
    assert record["diffusion_loss"] == pytest.approx(np.mean(details["diffusion_loss"]))
    assert record["diversity"] == pytest.approx(np.mean(details["diversity"]))
    assert 0.1 < record["diversity"] < 1  # untrained: samples are noise


def test_an_evaluation_needs_no_reward(policy_folder: Path, tmp_path: Path) -> None:
    """Supervised training on one's own pictures has none to ask."""
    scorer = Scorer()
    record = evaluator(policy_folder, tmp_path, scorer, RunRewards(REWARDS.fleet, "rewards")).evaluate(None, "test", 0)
    assert record["rewards"] == record["sub_scores"] == record["revisions"] == {}
    assert scorer.prompts == []
    assert record["diffusion_loss"] > 0


def test_the_set_of_an_evaluation_is_its_prompts_and_its_draws(policy_folder: Path, tmp_path: Path) -> None:
    """Numbers of two runs are paired by it; a file of as many other prompts is another set."""
    made = evaluator(policy_folder, tmp_path)
    first = made.evaluate(None, "test", 0)["set"]
    assert evaluator(policy_folder, tmp_path / "b").evaluate(None, "test", 0)["set"] == first
    assert made.evaluate(None, "dev", 0, full=False)["set"] != first
    (tmp_path / "prompts.txt").write_text("\n".join(f'a board that says "{i}"' for i in range(200)))
    made.prompts = TextSource(str(tmp_path / "prompts.txt"))
    assert made.evaluate(None, "test", 0)["set"] != first


def test_two_evaluations_of_one_version_are_equal_and_two_versions_differ(policy_folder: Path, tmp_path: Path) -> None:
    made = evaluator(policy_folder, tmp_path)
    other = made.evaluate(changed_weights(policy_folder, 7), "dev", 7, full=False)
    same = made.evaluate(changed_weights(policy_folder, 7), "dev", 7, full=False)
    fresh = evaluator(policy_folder, tmp_path / "b").evaluate(changed_weights(policy_folder, 7), "dev", 7, full=False)
    assert other == same == fresh
    changed = made.evaluate(changed_weights(policy_folder, 8), "dev", 8, full=False)
    assert changed["prompts"] == other["prompts"] == 4
    assert changed["diffusion_loss"] != other["diffusion_loss"]
    assert changed["rewards"]["mean"] != other["rewards"]["mean"]


def test_without_weights_it_is_the_policy_folder_that_is_evaluated(policy_folder: Path, tmp_path: Path) -> None:
    """Also when this evaluator has evaluated other weights before: `None` names the folder, not what happens to be loaded."""
    made = evaluator(policy_folder, tmp_path)
    before = made.evaluate(None, "dev", 0, full=False)
    made.evaluate(changed_weights(policy_folder, 7), "dev", 7, full=False)
    assert made.evaluate(None, "dev", 0, full=False) == before


def test_a_sample_without_a_score_is_no_average_over_the_rest(policy_folder: Path, tmp_path: Path) -> None:
    """The reward that failed on one has no mean and says so; the other rewards, loss and diversity stand."""
    record = evaluator(policy_folder, tmp_path, Scorer(fails_at=2)).evaluate(None, "test", 0)
    assert record["rewards"] == {"other.exact_match": 0.5}
    assert record["failed"] == {"mean": 1}
    assert record["first_failure"] == {"mean": "engine_error: no"}
    column = json.loads((tmp_path / "eval" / "test-000000-raw.json").read_text())["per_prompt"]["rewards"]["mean"]
    assert [value is None for value in column] == [False, False, True, False, False, False]


def test_a_reward_without_any_score_fails_the_evaluation(policy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationFailed, match="reward mean scored none of 6 held-out samples; first: engine_error: no"):
        evaluator(policy_folder, tmp_path, Scorer(always_fails=True)).evaluate(None, "test", 0)
    assert not (tmp_path / "eval").exists()


def test_damaged_weights_are_not_evaluated(policy_folder: Path, tmp_path: Path) -> None:
    weights, made = changed_weights(policy_folder, 3), evaluator(policy_folder, tmp_path)
    (file,) = (tmp_path / "weights").rglob("*.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(WeightsDamaged, match="weights of version 3 are damaged"):
        made.evaluate(weights, "test", 3)
    assert not (tmp_path / "eval").exists()


def test_an_exported_policy_is_evaluated_like_the_version_it_came_from(policy_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "exported.safetensors"
    save_file({f"transformer.{k}": v for k, v in changed_state(policy_folder, 7).items()}, file)
    made = evaluator(policy_folder, tmp_path)
    exported = made.evaluate(Exported(7, str(file), "transformer."), "dev", 7, full=False)
    assert exported == made.evaluate(changed_weights(policy_folder, 7), "dev", 7, full=False)


def test_the_sample_grid_is_fixed(policy_folder: Path, tmp_path: Path) -> None:
    made = evaluator(policy_folder, tmp_path)
    weights = changed_weights(policy_folder, 7)
    first, second = made.grid(weights, "before"), made.grid(weights, "again")
    assert first == str(tmp_path / "samples" / "before.png")
    assert Path(first).read_bytes() == Path(second).read_bytes()
    with Image.open(first) as image:
        assert image.size == (4 * (144 + 8), 2 * (48 + 18))  # five pictures of 48x16, three times as large


def test_losses_on_a_prepared_set_are_paired_with_those_on_the_same_set_only(policy_folder: Path, tmp_path: Path) -> None:
    """Sets of equal captions and other latents are other sets; sets of equal latents have equal losses."""
    records = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = tmp_path / name
        begin(folder, {})
        captions = [f'a sign that says "{i}"' for i in range(100, 200)]
        x0 = np.random.default_rng(seed).normal(size=(100, 3, 16, 48)).astype(np.float32)
        write_shard(folder, 0, x0, [Row(text, text, "", 1, 1) for text in captions], [])
        finish(folder, 1, [], codec="pixels", model="", height=16, width=48, latent=(3, 16, 48))
        model, sampler = ModelConfig(path=str(policy_folder), init=True), SamplerConfig(eval_steps=2, steps=3, trained_steps=1)
        data = DataConfig(kind="prepared", path=str(folder))
        made = Evaluator(EvaluatorSpec(model, sampler, PromptConfig(), data, SETTINGS, REWARDS, str(tmp_path / f"run-{name}")))
        made.client = Scorer()  # type: ignore[assignment]
        records.append(made.evaluate(None, "dev", 0))
    assert records[0]["set"] == records[1]["set"] != records[2]["set"]
    assert records[0]["diffusion_loss"] == records[1]["diffusion_loss"] != records[2]["diffusion_loss"]
