"""The rollout generator against an in-memory ledger and scorer: what a group is made of, and what happens when it fails."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.config import DataConfig, PromptConfig, RolloutConfig
from actors.groups import Weighted, group_payload, group_request, trained_steps
from actors.payload import GroupPayload, decode_group, encode
from actors.rewards import RunRewards
from actors.rollout import RolloutGenerator, RolloutSpec, WeightsMissing
from actors.sources.draws import prompt_source, training_example
from diffusion import pixels
from diffusion.checkpoint import load_policy
from diffusion.codecs import IdentityCodec
from diffusion.config import ModelConfig, SamplerConfig
from diffusion.device import DeviceMissing
from diffusion.engine.engine import Engine
from diffusion.families.conditioning import Conditioning
from diffusion.kernels import log_prob, make_kernel
from replay.policy import BufferSettings
from replay.records import Lease
from services.client.base import RewardUnavailable
from services.config import FleetConfig
from services.contract import ItemScore, ScoreFailure
from services.terms import Term

SEED = 3
SAMPLER = SamplerConfig(steps=4, trained_steps=2, height=16, width=24)
ROLLOUT = RolloutConfig(group_size=3)
TEXT = Conditioning({"prompt_embeds": torch.randn(10, 64), "pooled": torch.randn(64)})
SHAPE = (3, 16, 24)
LINEAGE = 3
NOWHERE = FleetConfig(url="http://127.0.0.1:9")
MEAN = RunRewards(NOWHERE, "rewards", (Weighted(Term.parse("mean"), 1.0),))


# -- which steps are trained ----------------------------------------------------------------------------------------


@given(steps=st.integers(2, 40), share=st.floats(0, 1), seed=st.integers(0, 2**31 - 1), group=st.integers(0, 10**6))
def test_trained_steps_are_a_function_of_seed_and_group_and_never_the_last(steps: int, share: float, seed: int, group: int) -> None:
    count = max(1, round(share * (steps - 1)))
    sampler = SamplerConfig(steps=steps, trained_steps=count)
    found = trained_steps(sampler, seed, group)
    assert found == trained_steps(sampler, seed, group)
    assert len(found) == len(set(found)) == count
    assert found == tuple(sorted(found))
    assert all(0 <= i < steps - 1 for i in found)


def test_every_step_but_the_last_gets_trained_in_some_group() -> None:
    sampler = SamplerConfig(steps=6, trained_steps=2)
    choices = [trained_steps(sampler, 0, g) for g in range(300)]
    counts = np.bincount([i for choice in choices for i in choice], minlength=6)
    assert counts[5] == 0
    assert counts[:5] == pytest.approx(120, abs=45)
    assert choices != [trained_steps(sampler, 1, g) for g in range(300)]


def test_a_window_of_neighbours_begins_anywhere_in_the_first_half() -> None:
    """Flow-GRPO-Fast: the first of two steps of ten is drawn from 0 to 5."""
    sampler = SamplerConfig(steps=10, trained_steps=2, trained_choice="window")
    choices = {trained_steps(sampler, 0, g) for g in range(300)}
    assert choices == {(first, first + 1) for first in range(6)}
    earlier = sampler.model_copy(update={"window_last": 1})
    assert {trained_steps(earlier, 0, g) for g in range(60)} == {(0, 1), (1, 2)}
    wide = SamplerConfig(steps=10, trained_steps=8, trained_choice="window")  # no room for more
    assert {trained_steps(wide, 0, g) for g in range(60)} == {tuple(range(8)), tuple(range(1, 9))}


def test_a_sliding_window_moves_with_the_updates_is_always_whole_and_comes_round() -> None:
    """MixGRPO: four neighbours, one step on every 25 updates; the last of the steps is never trained."""
    sampler = SamplerConfig(steps=8, trained_steps=4, trained_choice="sliding", window_updates=3)
    of_update = [{trained_steps(sampler, 0, update * 5 + g, 5) for g in range(5)} for update in range(30)]
    assert all(len(choices) == 1 for choices in of_update)
    assert [next(iter(choices))[0] for choices in of_update[:15]] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [0] * 3
    assert all(next(iter(choices)) == tuple(range(next(iter(choices))[0], next(iter(choices))[0] + 4)) for choices in of_update)


def test_listed_steps_are_taken_as_they_are() -> None:
    assert trained_steps(SamplerConfig(steps=10, trained_steps=[7, 0, 3]), 0, 5) == (0, 3, 7)


# -- the requests of a group ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_on", ["all", "trained"])
@pytest.mark.parametrize("same_start", [False, True])
def test_a_group_is_one_request(noise_on: str, same_start: bool) -> None:
    sampler = SAMPLER.model_copy(update={"noise_on": noise_on, "kernel": "cps", "noise_level": 0.4, "guidance": 2.5})
    negative = Conditioning({"prompt_embeds": torch.zeros(3, 64), "pooled": torch.zeros(64)})
    r = group_request(sampler, ROLLOUT.model_copy(update={"same_initial_noise": same_start}), SEED, 9, TEXT, negative, SHAPE)
    trained = trained_steps(sampler, SEED, 9)
    assert list(r.members) == [0, 1, 2]
    assert (r.seed, r.group, r.steps, r.kernel, r.noise_level, r.shape, r.same_start) == (SEED, 9, 4, "cps", 0.4, SHAPE, same_start)
    assert r.trained == trained
    assert r.stochastic == frozenset({0, 1, 2} if noise_on == "all" else trained)
    assert r.conditioning is TEXT
    assert (r.guidance, r.negative) == (2.5, negative)


# -- the generator --------------------------------------------------------------------------------------------------


@dataclass
class Ledger:
    """Grants `groups`, then stops the generator; keeps what is handed in."""

    groups: list[int]
    generator: RolloutGenerator | None = None
    settings: BufferSettings = BufferSettings(groups_per_step=1)  # noqa: RUF009  # frozen
    committed: list[tuple[int, GroupPayload, list[float], int, dict[str, Any]]] = field(default_factory=list)
    failed: list[tuple[int, str]] = field(default_factory=list)
    given_back: list[tuple[int, str]] = field(default_factory=list)
    scores: list[dict[str, list[float | None]]] = field(default_factory=list)
    revisions: list[dict[str, str]] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    extended: list[int] = field(default_factory=list)
    lineages: list[int | None] = field(default_factory=list)
    wait_s: float = 5.0

    def buffer(self) -> Ledger:
        return self

    def release(self, owner: str) -> tuple[int, int]:
        self.released.append(owner)
        return 0, 0

    def lease(self, owner: str, timeout_s: float) -> Lease | None:
        if not self.groups:
            assert self.generator is not None
            self.generator.stop()
            return None
        return Lease(self.groups.pop(0), 1, owner, 0, 1)

    def extend(self, lease: Lease) -> bool:
        self.extended.append(lease.group)
        return True

    def commit(
        self,
        lease: Lease,
        payload: list[bytearray],
        rewards: list[float],
        version: int,
        meta: dict[str, Any],
        lineage: int | None,
        timeout_s: float,
        scores: dict[str, list[float | None]],
        revisions: dict[str, str],
    ) -> bool:
        self.lineages.append(lineage)
        self.scores.append(scores)
        self.revisions.append(revisions)
        self.committed.append((lease.group, decode_group(payload), rewards, version, meta))
        return lease.group != 13  # a lease that was lost meanwhile

    def fail(self, lease: Lease, reason: str, prompt: str = "") -> None:
        self.failed.append((lease.group, reason))

    def give_back(self, lease: Lease, reason: str) -> None:
        self.given_back.append((lease.group, reason))


@dataclass(frozen=True)
class Info:
    revision: str


@dataclass
class Scorer:
    """Rewards a picture with its mean and, as a sub-score, its largest value; fails on the groups' prompts in `broken`."""

    broken: dict[str, Exception | ScoreFailure] = field(default_factory=dict)
    wait_s: float = 0.0

    def info(self, names: list[str]) -> dict[str, Info]:
        return {name: Info(f"{name}-1") for name in names}

    def score_all(
        self, names: list[str], prompts: list[str], images: np.ndarray, timeout_s: float, fps: float | None = None
    ) -> dict[str, list[ItemScore | ScoreFailure]]:
        return {name: self.score(prompts, images) for name in names}

    def score(self, prompts: list[str], images: np.ndarray) -> list[ItemScore | ScoreFailure]:
        time.sleep(self.wait_s)
        problem = self.broken.get(prompts[0])
        if isinstance(problem, Exception):
            raise problem
        scores: list[ItemScore | ScoreFailure] = [ItemScore(float(i.mean()) / 255, {"largest": float(i.max())}) for i in images]
        return [scores[0], problem, *scores[2:]] if problem else scores


class Generator(RolloutGenerator):
    """Samples with the weights it was built with."""

    def _refresh(self, least: int, wait_s: float | None = None) -> None:
        begun = wait_s is None  # the first look for weights, before any lease, changes nothing
        self.held = (self.lineages.pop(0) if self.lineages and begun else LINEAGE, least)

    lineages: ClassVar[list[int]] = []


def run(
    folder: Path,
    ledger: Ledger,
    scorer: Scorer,
    sampler: SamplerConfig = SAMPLER,
    prompts: PromptConfig | None = None,
    rollout: RolloutConfig = ROLLOUT,
    rewards: RunRewards = MEAN,
    data: DataConfig = DataConfig(),  # noqa: B008  # frozen
    kind: type[RolloutGenerator] = Generator,
) -> int:
    model = ModelConfig(path=str(folder), init=True)
    spec = RolloutSpec(SEED, model, sampler, rollout, prompts or PromptConfig(), data, ledger, rewards, data.pairing == "own")  # type: ignore[arg-type]
    ledger.generator = kind(spec, None, 0)
    ledger.generator.client = scorer  # type: ignore[assignment]
    for parameter in ledger.generator.policy.transformer.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return ledger.generator.run()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_generator_that_should_have_a_gpu_does_not_run_without(policy_folder: Path) -> None:
    with pytest.raises(DeviceMissing, match=r"rollout\.gpus=1 asks for a GPU"):
        run(policy_folder, Ledger([0]), Scorer(), rollout=ROLLOUT.model_copy(update={"gpus": 1.0}))


def prompt(group: int) -> str:
    return training_example(prompt_source(PromptConfig(), DataConfig()), SEED, group).text


def test_a_committed_group_is_regenerable_and_scored_in_order(policy_folder: Path) -> None:
    first, second = Ledger([4, 7]), Ledger([7])
    assert run(policy_folder, first, Scorer()) == 2
    assert run(policy_folder, second, Scorer()) == 1
    assert [c[0] for c in first.committed] == [4, 7]
    assert first.lineages == [LINEAGE, LINEAGE]
    assert first.released == ["generator-0"]  # what a former self of this generator held
    for ours, again in zip(vars(first.committed[1][1]).values(), vars(second.committed[0][1]).values(), strict=True):
        assert torch.equal(ours, again) if isinstance(ours, torch.Tensor) else ours == again
    group, payload, rewards, version, meta = first.committed[0]
    assert (group, version, len(rewards)) == (4, 0, 3)
    assert payload.x.shape == (3, 2, *SHAPE)
    assert tuple(payload.trained.tolist()) == trained_steps(SAMPLER, SEED, 4)
    assert len(set(rewards)) == 3
    assert meta["prompt"] == payload.text == prompt(4)
    assert meta["sample_s"] > 0 <= meta["score_s"]


def test_rewards_belong_to_their_members(policy_folder: Path) -> None:
    """The scored picture of member i is the decoded end of member i's trajectory."""
    ledger = Ledger([4])
    sampler = SAMPLER.model_copy(update={"trained_steps": [2], "kernel": "cps", "noise_level": 0.2})  # the step before the last
    run(policy_folder, ledger, Scorer(), sampler)
    _, payload, rewards, _, _ = ledger.committed[0]
    assert ledger.generator is not None
    policy = ledger.generator.policy
    model, process = policy.transformer, policy.process
    text = policy.text_encoder.encode([payload.text] * 3).tensors
    x = payload.x_next[:, 0]
    t = payload.times[3].expand(3)
    with torch.no_grad():
        ends = x - t[:, None, None, None] * model(x, t, **text)
        mean, std = make_kernel("cps", process, 0.2, 4).moments(
            model(payload.x[:, 0], payload.times[2].expand(3), **text),
            payload.x[:, 0],
            payload.times[2].expand(3),
            t,
        )
    pictures = IdentityCodec().decode(ends)
    assert rewards == pytest.approx([float(p.mean()) / 255 for p in pictures], abs=1e-4)
    torch.testing.assert_close(payload.log_prob[:, 0], log_prob(x, mean, std), atol=1e-6, rtol=0)


def test_a_member_without_a_score_fails_its_group_and_no_other(policy_folder: Path) -> None:
    ledger = Ledger([4, 5, 6])
    broken = {prompt(4): ScoreFailure("engine_error", "OCR crashed"), prompt(5): TimeoutError("no answer within 1 s")}
    assert run(policy_folder, ledger, Scorer(broken)) == 1
    assert [c[0] for c in ledger.committed] == [6]
    assert [g for g, _ in ledger.failed] == [4, 5]
    assert ledger.failed[0][1].startswith("scoring: ScoringFailed: 2 of 3 members have a reward, 3 are needed; member 1: mean: engine_error: OCR crashed")
    assert ledger.failed[1][1].startswith("scoring: TimeoutError: no answer within 1 s")


def test_a_group_large_enough_without_its_failed_members_is_trained_on_the_rest(policy_folder: Path) -> None:
    whole, partial = Ledger([4]), Ledger([4])
    run(policy_folder, whole, Scorer())
    broken = {prompt(4): ScoreFailure("engine_error", "OCR crashed")}
    assert run(policy_folder, partial, Scorer(broken), rollout=ROLLOUT.model_copy(update={"min_group_size": 2})) == 1
    (_, all_of_it, rewards, _, meta), (_, rest, left, _, rest_meta) = whole.committed[0], partial.committed[0]
    assert left == [rewards[0], rewards[2]]
    for name in ("x", "x_next", "log_prob"):
        torch.testing.assert_close(getattr(rest, name), getattr(all_of_it, name)[[0, 2]], atol=0, rtol=0)
    assert "failed_members" not in meta
    assert rest_meta["failed_members"] == 1


def test_a_group_cannot_need_more_members_than_it_has() -> None:
    with pytest.raises(ValueError, match=r"min_group_size 4 is larger than rollout\.group_size 3"):
        RolloutConfig(group_size=3, min_group_size=4)


def test_a_prompt_that_cannot_be_sampled_goes_back_with_its_reason(policy_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text('a sign that says "123456789"\n')
    ledger = Ledger([0, 1])
    assert run(policy_folder, ledger, Scorer(), prompts=PromptConfig(kind="file", path=str(file))) == 0
    assert ledger.committed == []
    assert [g for g, _ in ledger.failed] == [0, 1]
    assert all(r.startswith("sampling: ValueError: prompt ") for _, r in ledger.failed)


def test_leases_are_kept_alive_while_a_group_is_in_hand(policy_folder: Path) -> None:
    ledger, slow = Ledger([4], settings=BufferSettings(groups_per_step=1, lease_s=0.06)), Scorer(wait_s=0.3)
    assert run(policy_folder, ledger, slow) == 1
    assert len(ledger.extended) >= 2
    assert set(ledger.extended) == {4}
    beats = len(ledger.extended)
    time.sleep(0.1)
    assert len(ledger.extended) == beats  # not after it was handed in


def test_a_lost_lease_is_not_counted(policy_folder: Path) -> None:
    assert run(policy_folder, Ledger([13]), Scorer()) == 0


@pytest.mark.parametrize("kernel", ["flow_sde", "edm_2ab"])
def test_a_payload_stacks_members(kernel: str, policy_folder: Path) -> None:
    policy = load_policy(ModelConfig(path=str(policy_folder), init=True))
    sampler = SAMPLER.model_copy(update={"kernel": kernel, "steps": 6, "trained_steps": [0, 2]})
    done = Engine(policy.transformer, policy.process, 10_000).run([group_request(sampler, ROLLOUT, SEED, 2, TEXT, None, SHAPE)])
    payload = decode_group(encode(group_payload(done, "a sign")))
    for i, trajectory in enumerate(done):
        for name in ("x", "x_next", "log_prob"):
            assert torch.equal(getattr(payload, name)[i], getattr(trajectory, name))
    assert payload.trained.tolist() == [0, 2]
    assert payload.trained.dtype == torch.int64
    if kernel == "flow_sde":
        assert payload.previous is None
    else:
        assert payload.previous is not None
        assert payload.previous.shape == (3, 2, *SHAPE)
        assert not payload.previous[:, 0].any()  # before step 0 there was none
        assert payload.previous[:, 1].abs().min() > 0
    assert torch.equal(group_payload([replace(d) for d in done], "").times, done[0].times)


def test_members_are_scored_in_turns_with_the_same_result(policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Watching(Scorer):
        def score(self, prompts: list[str], images: np.ndarray) -> list[ItemScore | ScoreFailure]:
            seen.append(len(images))
            return super().score(prompts, images)

    whole, apart = Ledger([4]), Ledger([4])
    for ledger, size, turns in ((whole, pixels.TURN_BYTES, [3]), (apart, 2 * SAMPLER.pixel_bytes, [2, 1])):
        seen: list[int] = []
        monkeypatch.setattr(pixels, "TURN_BYTES", size)
        assert run(policy_folder, ledger, Watching()) == 1
        assert seen == turns
    assert whole.committed[0][2] == pytest.approx(apart.committed[0][2], abs=1 / 255)
    assert torch.equal(whole.committed[0][1].x, apart.committed[0][1].x)
    seen = []
    monkeypatch.setattr(pixels, "TURN_BYTES", 1)
    failing = Ledger([4])
    late = Watching({prompt(4): TimeoutError("no answer within 1 s")})
    assert run(policy_folder, failing, late) == 0
    assert failing.failed[0][1].startswith("scoring: TimeoutError: no answer within 1 s")
    assert seen == [1]


def test_groups_sampled_side_by_side_are_those_sampled_one_by_one(policy_folder: Path) -> None:
    apart, together = Ledger([4, 7, 8, 9]), Ledger([4, 7, 8, 9])
    assert run(policy_folder, apart, Scorer()) == 4
    assert run(policy_folder, together, Scorer(), rollout=ROLLOUT.model_copy(update={"concurrent_groups": 3})) == 4
    beside = {c[0]: c[1:] for c in together.committed}
    for group, payload, rewards, _, meta in apart.committed:
        assert beside[group][1] == pytest.approx(rewards, abs=1 / 255)
        assert beside[group][3]["prompt"] == meta["prompt"]
        for name in ("x", "x_next", "log_prob"):
            torch.testing.assert_close(getattr(beside[group][0], name), getattr(payload, name), atol=1e-4, rtol=1e-4)


def test_a_stopped_generator_hands_in_what_it_has_begun(policy_folder: Path) -> None:
    """`stop` comes while three groups are in the engine; none of them is lost."""
    ledger = Ledger([4, 7, 8])
    assert run(policy_folder, ledger, Scorer(wait_s=0.1), rollout=ROLLOUT.model_copy(update={"concurrent_groups": 8})) == 3
    assert sorted(c[0] for c in ledger.committed) == [4, 7, 8]
    assert ledger.failed == []


def test_a_group_of_two_histories_goes_back(policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner returned to a checkpoint, and its weights came in while the first group was being sampled."""
    monkeypatch.setattr(Generator, "lineages", [LINEAGE, LINEAGE + 1])
    ledger = Ledger([4, 7])
    assert run(policy_folder, ledger, Scorer(), rollout=ROLLOUT.model_copy(update={"concurrent_groups": 2})) == 1
    assert [g for g, _ in ledger.given_back] == [4]  # it is not the group's fault: no attempt is lost
    assert ledger.failed == []
    assert "the learner went back to a checkpoint" in ledger.given_back[0][1]


# -- what others owe a generator --------------------------------------------------------------------------------------


class WithoutWeights(Generator):
    """No weights appear at the first two looks."""

    looks: ClassVar[list[bool]] = []

    def _refresh(self, least: int, wait_s: float | None = None) -> None:
        ledger = self.spec.target
        self.looks.append(bool(ledger.released) and len(ledger.groups) == 1)  # type: ignore[attr-defined]
        if len(self.looks) < 3:
            raise WeightsMissing("not yet")
        super()._refresh(least, wait_s)


def test_nothing_is_leased_before_there_are_weights(policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner that takes long to start costs no group an attempt."""
    monkeypatch.setattr(WithoutWeights, "looks", [])
    ledger = Ledger([4])
    assert run(policy_folder, ledger, Scorer(), kind=WithoutWeights) == 1
    assert WithoutWeights.looks[:3] == [True, True, True]  # the group was still in the ledger
    assert ledger.failed == ledger.given_back == []


def test_a_service_that_does_not_answer_costs_a_group_no_attempt(policy_folder: Path) -> None:
    ledger = Ledger([4, 5])
    assert run(policy_folder, ledger, Scorer({prompt(4): RewardUnavailable("serve://rewards/mean", "no answer", "Start it.")})) == 1
    assert [g for g, _ in ledger.given_back] == [4]
    assert ledger.failed == []


# -- several rewards, and the example's own datum ---------------------------------------------------------------------


def test_every_reward_travels_by_name_and_the_total_is_weighted(policy_folder: Path) -> None:
    terms = (Weighted(Term.parse("mean"), 2.0), Weighted(Term.parse("other.largest"), 0.5, (0.0, 100.0)))
    ledger = Ledger([4])
    run(policy_folder, ledger, Scorer(), rewards=RunRewards(NOWHERE, "rewards", terms))
    scores, totals = ledger.scores[0], ledger.committed[0][2]
    assert scores.keys() == {"mean", "other.largest"}
    assert totals == pytest.approx([2 * a + 0.5 * min(b, 100.0) for a, b in zip(scores["mean"], scores["other.largest"], strict=True)])  # type: ignore[type-var, operator]
    assert ledger.revisions == [{"mean": "mean-1", "other": "other-1"}]


def test_a_failed_score_may_count_as_the_mean_of_its_group(policy_folder: Path) -> None:
    """The member stays, its gap is handed on, and the payload is whole."""
    ledger = Ledger([4])
    rewards = RunRewards(NOWHERE, "rewards", MEAN.trained, fill_mean=True)
    broken = {prompt(4): ScoreFailure("engine_error", "OCR crashed")}
    assert run(policy_folder, ledger, Scorer(broken), rollout=ROLLOUT.model_copy(update={"min_group_size": 2}), rewards=rewards) == 1
    _, payload, totals, _, meta = ledger.committed[0]
    first, gap, last = ledger.scores[0]["mean"]
    assert gap is None
    assert first is not None
    assert last is not None
    assert totals == pytest.approx([first, (first + last) / 2, last])
    assert len(payload.x) == 3
    assert (meta["failed_members"], meta["failed_scores"]) == (0, 1)


def test_a_group_brings_its_own_example_as_anchor_data(policy_folder: Path) -> None:
    ledger = Ledger([4])
    data = DataConfig(pairing="own", caption_dropout=0.2)
    run(policy_folder, ledger, Scorer(), data=data)
    payload = ledger.committed[0][1]
    example = training_example(prompt_source(PromptConfig(), data), SEED, 4)
    assert payload.x0 is not None
    pixels = IdentityCodec().decode(payload.x0[None])[0]
    np.testing.assert_array_equal(pixels, example.pixels(16, 24))
    assert payload.text == example.text
