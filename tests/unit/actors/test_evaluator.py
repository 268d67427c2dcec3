"""The evaluator with a scorer in memory and real generators in threads: fixed draws, per-prompt numbers, failures that stay failures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ray.exceptions import ActorDiedError
from safetensors.torch import save_file

from actors.config import DataConfig, EvaluationConfig, PromptConfig
from actors.evaluator import Evaluator, EvaluatorSpec, parcels
from actors.groups import Weighted
from actors.judgement import EvaluationFailed
from actors.noise_levels import BANDS
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
from tests.unit.actors.local import Local, idle_generator

SETTINGS = EvaluationConfig(test_prompts=6, dev_prompts=4, loss_points=8, diversity_prompts=4, diversity_samples=3, grid_prompts=5)

SAMPLER = SamplerConfig(eval_steps=2, steps=3, trained_steps=1)


@dataclass
class Scorer:
    """Reward = mean of the picture; may fail on one place of a call."""

    fails_at: int | None = None
    always_fails: bool = False
    prompts: list[str] = field(default_factory=list)
    calls: list[list[str]] = field(default_factory=list)

    def info(self, names: list[str]) -> dict[str, Any]:
        return {name: SimpleNamespace(revision=f"{name}-1") for name in names}

    def score_all(
        self, names: list[str], prompts: list[str], images: np.ndarray, timeout_s: float, fps: float | None = None
    ) -> dict[str, list[ItemScore | ScoreFailure]]:
        return {name: self.score(name, prompts, images) for name in names}

    def score(self, name: str, prompts: list[str], images: np.ndarray) -> list[ItemScore | ScoreFailure]:
        self.prompts = prompts
        self.calls += [prompts] * (name == "mean")
        scores: list[ItemScore | ScoreFailure] = [ItemScore(float(i.mean()) / 255, {"exact_match": float(n % 2)}) for n, i in enumerate(images)]
        if self.fails_at is not None and name == "mean":
            scores[self.fails_at] = ScoreFailure("engine_error", "no")
        if self.always_fails:
            scores = [ScoreFailure("engine_error", "no") for _ in scores]
        return scores


REWARDS = RunRewards(FleetConfig(url="http://127.0.0.1:9"), "rewards", (Weighted(Term.parse("mean"), 1.0),), (Term.parse("other.exact_match"),))


def evaluator(folder: Path, run_dir: Path, scorer: Scorer | None = None, rewards: RunRewards = REWARDS) -> Evaluator:
    return evaluator_of(run_dir, [Local(idle_generator(ModelConfig(path=str(folder), init=True), SAMPLER))], scorer, rewards)


def evaluator_of(
    run_dir: Path,
    generators: Sequence[Local],
    scorer: Scorer | None = None,
    rewards: RunRewards = REWARDS,
    data: DataConfig = DataConfig(),  # noqa: B008  # frozen
    settings: EvaluationConfig = SETTINGS,
) -> Evaluator:
    made = Evaluator(EvaluatorSpec(tuple(generators), PromptConfig(), data, SAMPLER, settings, rewards, str(run_dir)))
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
    assert [len(details[k]) for k in ("diffusion_loss", "noise_level", "diversity")] == [8, 8, 4]
    bands = {
        name: [x for x, at in zip(details["diffusion_loss"], details["noise_level"], strict=True) if i / 4 <= at < (i + 1) / 4] for i, name in enumerate(BANDS)
    }
    assert [len(part) for part in bands.values()] == [2] * 4
    assert record["diffusion_loss_bands"] == {name: pytest.approx(np.mean(part)) for name, part in bands.items()}
    assert {name: len(values) for name, values in details["scene"].items()} == dict.fromkeys(record["scene"], 6)
    for name, values in details["scene"].items():
        assert (record["scene"][name], record["scene_std"][name]) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))
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
        data = DataConfig(kind="prepared", path=str(folder))
        generator = Local(idle_generator(ModelConfig(path=str(policy_folder), init=True), SAMPLER, data))
        records.append(evaluator_of(tmp_path / f"run-{name}", [generator], data=data).evaluate(None, "dev", 0))
    assert records[0]["set"] == records[1]["set"] != records[2]["set"]
    assert records[0]["diffusion_loss"] == records[1]["diffusion_loss"] != records[2]["diffusion_loss"]


# -- parcels ----------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 600), size=st.integers(1, 70))
def test_parcels_cover_everything_once_in_order(count: int, size: int) -> None:
    cut = parcels(count, size)
    assert [i for first, n in cut for i in range(first, first + n)] == list(range(count))
    assert all(0 < n <= size for _, n in cut)


def small_parcels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.evaluator.SAMPLES_A_PARCEL", 3)
    monkeypatch.setattr("actors.evaluator.LOSSES_A_PARCEL", 3)


def test_results_do_not_depend_on_who_made_what(policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One generator or three, to the last bit; and to rounding what one parcel of everything gives."""
    model, weights = ModelConfig(path=str(policy_folder), init=True), changed_weights(policy_folder, 7)
    whole = evaluator(policy_folder, tmp_path / "whole").evaluate(weights, "test", 7)
    small_parcels(monkeypatch)
    found, stored = [], []
    for n in (1, 3):
        generators = [Local(idle_generator(model, SAMPLER)) for _ in range(n)]
        found.append(evaluator_of(tmp_path / str(n), generators).evaluate(weights, "test", 7))
        stored.append((tmp_path / str(n) / "eval" / "test-000007-raw.json").read_text())
        assert all(generator.asked for generator in generators)
    assert found[0] == found[1]
    assert stored[0] == stored[1]
    assert whole["rewards"]["mean"] == pytest.approx(found[0]["rewards"]["mean"], abs=1e-3)
    assert {**whole["scene"], "loss": whole["diffusion_loss"]} == pytest.approx({**found[0]["scene"], "loss": found[0]["diffusion_loss"]}, abs=1e-3)
    assert (whole["set"], whole["diversity"]) == (found[0]["set"], pytest.approx(found[0]["diversity"], abs=1e-3))


def test_pictures_are_judged_parcel_by_parcel(policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a prompt's samples of the diversity figure stay together."""
    small_parcels(monkeypatch)
    scorer, generator = Scorer(), Local(idle_generator(ModelConfig(path=str(policy_folder), init=True), SAMPLER))
    evaluator_of(tmp_path, [generator], scorer).evaluate(None, "test", 0)
    prompts = held_out_prompts(GlyphSource(), "test", 6)
    assert sorted(scorer.calls) == sorted([prompts[:3], prompts[3:]])  # whichever came first
    asked = [arguments[1:] for name, arguments in generator.asked if name == "sample_held_out"]
    sampled = sorted((draw, [example.text for example in examples], first, repeats) for draw, examples, first, repeats in asked)
    expected = [("test", prompts[:3], 0, 1), ("test", prompts[3:], 3, 1), *(("test-diversity", [prompts[i]], i, 3) for i in range(4))]
    assert sampled == sorted(expected)
    assert sorted(arguments[1:] for name, arguments in generator.asked if name == "held_out_losses") == [
        ("test", 8, 0, 3),
        ("test", 8, 3, 3),
        ("test", 8, 6, 2),
    ]


def test_a_generator_that_dies_is_replaced_by_another(policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_parcels(monkeypatch)
    model = ModelConfig(path=str(policy_folder), init=True)
    sound, mortal = Local(idle_generator(model, SAMPLER)), Local(Mortal())
    record = evaluator_of(tmp_path / "a", [mortal, sound]).evaluate(None, "test", 0)
    assert mortal.asked
    assert record == evaluator_of(tmp_path / "b", [sound]).evaluate(None, "test", 0)


class Mortal:
    """Dies whenever it is asked."""

    def __getattr__(self, name: str) -> Any:
        def dies(*arguments: Any) -> None:
            raise ActorDiedError

        return dies


def test_without_an_answer_an_evaluation_fails_at_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.parcels.SILENCE_S", 0.2)
    monkeypatch.setattr("actors.parcels.LOOK_S", 0.05)
    with pytest.raises(EvaluationFailed, match="the generators did not answer: 1 parcels are not back, and none of 1 workers"):
        evaluator_of(tmp_path, [Local(Mortal())]).evaluate(None, "test", 0)
