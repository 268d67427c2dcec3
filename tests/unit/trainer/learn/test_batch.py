"""From a claim to a rank's rows: the whole once over all ranks, and randomness that does not know how many ranks there are."""

from __future__ import annotations

import math
import sys
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trainer.learn.batch
from actors.conditioning import Subject, Subjects
from actors.groups import trained_steps
from actors.members import SampleMembers
from actors.payload import DataPayload, GroupPayload, PayloadError, encode
from diffusion.families.conditioning import Conditioning
from diffusion.kernels import StepKernel, make_kernel
from diffusion.processes import RectifiedFlow
from diffusion.seeds import INITIAL, step_noise
from replay.records import Claim, ClaimedData, ClaimedGroup, GroupHeader
from trainer.config.load import parse_config
from trainer.config.run import RunConfig
from trainer.learn.advantages import Term, advantages_of, group_advantages
from trainer.learn.batch import StepBatch, step_batches, take
from trainer.learn.objective import Anchors, Samples, Transitions

PROCESS = RectifiedFlow(2.0)
GROUPS, MEMBERS, TRAINED = [3, 4, 7, 8, 9], 3, 2
SHAPE = (3, 2, 2)


def config_of(kernel: str = "flow_sde", data: dict[str, Any] | None = None, updates_per_claim: int = 1, **objective: Any) -> RunConfig:
    return parse_config(
        {
            "seed": 5,
            "sampler": {"kernel": kernel, "steps": 6, "trained_steps": TRAINED},
            "rollout": {"groups_per_step": len(GROUPS), "group_size": MEMBERS},
            "objective": objective,
            "data": data or {},
            "learner": {"ranks": 1, "updates_per_claim": updates_per_claim},
        }
    )


def kernel_of(config: RunConfig) -> StepKernel:
    return make_kernel(config.sampler.kernel, PROCESS, config.sampler.noise_level, config.sampler.steps)


def members_of(group: int) -> int:
    """Group 8 lost a member whose scoring failed."""
    return MEMBERS - 1 if group == 8 else MEMBERS


def rewards_of(group: int) -> list[float]:
    return [0.5] * MEMBERS if group == 7 else [0.1 * ((group * 31 + m * 17) % 10) for m in range(members_of(group))]


class Ledger:
    """A claim of real payloads; keeps what is read: (reference, segments)."""

    def __init__(self, config: RunConfig, step: int = 2) -> None:
        self.payloads: dict[str, list[bytearray]] = {}
        self.fetched: list[tuple[str, list[int]]] = []
        groups, data = [], []
        if config.uses_policy:
            for group in GROUPS:
                self.payloads[f"g{group}"] = list(encode(self._group(config, group)))
                groups.append(ClaimedGroup(group, GroupHeader(rewards_of(group), members_of(group), 0, 0, "", scores={"ocr": rewards_of(group)}), f"g{group}"))
        if config.feeds_data:
            rows = config.data_rows
            self.payloads["d1"] = encode(DataPayload(tuple(map(str, range(rows))), self._numbered(rows, *SHAPE)))
            data.append(ClaimedData(1, "d1", ""))
        self.claim = Claim(step, 1, groups, data)

    @staticmethod
    def _numbered(rows: int, *shape: int) -> torch.Tensor:
        """Row i is filled with i."""
        return torch.arange(float(rows)).reshape(rows, *[1] * len(shape)).expand(rows, *shape)

    @staticmethod
    def _group(config: RunConfig, group: int) -> GroupPayload | SampleMembers:
        """Member m, trained step k of group g: x is 100 g + 10 m + k everywhere; a finished rollout is 100 g + 10 m."""
        own = torch.full(SHAPE, float(group)) if config.data.pairing == "own" else None
        if config.objective.on_samples:
            samples = [torch.full(SHAPE, 100.0 * group + 10 * m) for m in range(members_of(group))]
            return SampleMembers(str(group), samples, kernel_of(config).time_grid(config.sampler.steps), own)
        number = 100.0 * group + 10 * torch.arange(members_of(group))[:, None] + torch.arange(TRAINED)
        x = number.reshape(*number.shape, *[1] * len(SHAPE)).expand(members_of(group), TRAINED, *SHAPE)
        return GroupPayload(
            text=str(group),
            x=x,
            x_next=x + 0.5,
            log_prob=-number.double(),
            trained=torch.tensor(trained_steps(config.sampler, config.seed, group)),
            times=kernel_of(config).time_grid(config.sampler.steps),
            previous=x - 0.5 if kernel_of(config).uses_previous else None,
            x0=own,
        )

    def read(self, item: ClaimedGroup | ClaimedData, segments: list[int]) -> list[bytearray]:
        self.fetched.append((item.ref, segments))
        return [self.payloads[item.ref][i] for i in segments]


def encoded(subjects: list[Subject]) -> Conditioning:
    """A text is its number, the empty one 0."""
    texts = [subject.text for subject in subjects]
    assert len(texts) == len(set(texts))  # each is encoded once
    return Conditioning({"prompt_embeds": torch.tensor([float(text or 0) for text in texts]).reshape(-1, 1, 1).expand(-1, 4, 2)})


def numbers(batch: StepBatch, rows: Transitions | Samples | Anchors) -> list[float]:
    """What each of `rows` is conditioned on."""
    found = batch.conditioning_of(rows).prompt_embeds
    assert found.shape == (len(rows.weight), 4, 2)
    return found[:, 0, 0].tolist()


def batches_of(config: RunConfig, rank: int = 0, world: int = 1, ledger: Ledger | None = None) -> list[StepBatch]:
    ledger = ledger or Ledger(config)
    subjects = Subjects(config.seed, config.prompts, config.data, config.sampler)
    return step_batches(config, PROCESS, kernel_of(config), ledger, ledger.claim, rank, world, encoded, subjects, lambda x0, given: x0)  # type: ignore[arg-type]


def rows_of(config: RunConfig, rank: int = 0, world: int = 1, ledger: Ledger | None = None) -> StepBatch:
    (batch,) = batches_of(config, rank, world, ledger)
    return batch


def whole(batches: list[StepBatch], name: str, kind: type) -> dict[str, torch.Tensor]:
    """All rows of all ranks, by field and with what they are conditioned on, in an order that does not depend on the ranks."""
    parts = [(batch, getattr(batch, name)) for batch in batches]
    columns = {f.name: [getattr(p, f.name) for _, p in parts] for f in fields(kind) if f.name != "text"}
    joined = {name: torch.cat(values) for name, values in columns.items() if values[0] is not None}
    joined["conditioning"] = torch.cat([torch.tensor(numbers(batch, rows)) for batch, rows in parts])
    flat = torch.cat([v.reshape(len(v), -1).double() for v in joined.values()], 1)
    order = sorted(range(len(flat)), key=lambda i: flat[i].tolist())
    return {name: value[order] for name, value in joined.items()}


OBJECTIVES: list[dict[str, Any]] = [
    {},
    {"data_per": "rollout"},
    {"data_noise": "shared"},
    {"data_noise": "shared", "data_per": "rollout"},
    {"data_noise": "shared", "data_per": "first"},
    {"preset": "ddrl_cosmos", "kernel": "edm_2ab", "data_noise": "fresh"},
    {"preset": "flow_grpo"},
    {"preset": "sft"},
    {"advantage_scale": "batch", "exponential_advantage": True},
    {"kernel": "edm_2ab", "data_noise": "shared"},
    {"preset": "diffusion_nft", "data_weight": 0.1},
    {"preset": "awm", "policy_times": "stratified"},
    {"preset": "diffusion_nft", "kernel": "edm_2ab", "data_weight": 0.1, "data": {"pairing": "own"}},
    {"data": {"pairing": "own"}},
    {"data": {"pairing": "own", "caption_dropout": 0.5}, "data_noise": "shared", "data_per": "rollout"},
]


@given(objective=st.sampled_from(OBJECTIVES), world=st.integers(1, 2 * len(GROUPS)))
@settings(max_examples=30)
def test_the_ranks_have_every_row_once_whatever_their_number(objective: dict[str, Any], world: int) -> None:
    config = config_of(**objective)
    alone = rows_of(config)
    ranks = [rows_of(config, rank, world) for rank in range(world)]
    for name, kind in (("transitions", Samples if config.objective.on_samples else Transitions), ("anchors", Anchors)):
        one, many = getattr(alone, name), [getattr(r, name) for r in ranks]
        if one is None:
            assert many == [None] * world
            continue
        expected, found = whole([alone], name, kind), whole(ranks, name, kind)
        for key in expected:
            assert torch.equal(expected[key], found[key]), key
        counts = [len(part.weight) for part in many]
        for rank in ranks:  # all ranks know how many rows each has
            assert getattr(rank, f"{name[:-1]}_rows") == counts
            assert getattr(rank, f"{name[:-1]}_count") == sum(counts) == len(one.weight)
            assert bool((getattr(rank, name).weight == 1).all())


SEVERAL: list[dict[str, Any]] = [o for o in OBJECTIVES if o.get("preset") not in ("sft", "awm")]


@given(objective=st.sampled_from(SEVERAL), updates=st.integers(2, len(GROUPS)), world=st.integers(1, MEMBERS - 1))
@settings(max_examples=30)
def test_several_updates_have_every_row_once_in_whole_groups(objective: dict[str, Any], updates: int, world: int) -> None:
    """The rows, numbers and noise of one update, whatever the number of ranks; the data of a group's rollouts with the group."""
    config = config_of(updates_per_claim=updates, **objective)
    alone = rows_of(config_of(**objective))
    ranks = [batches_of(config, rank, world) for rank in range(world)]
    assert all([batch.part for batch in rank] == list(range(updates)) for rank in ranks)
    for name, kind in (("transitions", Samples if config.objective.on_samples else Transitions), ("anchors", Anchors)):
        if getattr(alone, name) is None:
            assert all(getattr(batch, name) is None for rank in ranks for batch in rank)
            continue
        expected, found = whole([alone], name, kind), whole([batch for rank in ranks for batch in rank], name, kind)
        assert all(torch.equal(expected[key], found[key]) for key in expected)
        for parts in zip(*ranks, strict=True):
            counts = [len(getattr(batch, name).weight) for batch in parts]
            assert all((getattr(b, f"{name[:-1]}_rows"), getattr(b, f"{name[:-1]}_count")) == (counts, sum(counts)) for b in parts)
    groups_of_parts = [{int(n) for batch in parts for n in numbers(batch, batch.transitions)} for parts in zip(*ranks, strict=True)]  # type: ignore[arg-type]
    assert sorted(g for groups in groups_of_parts for g in groups) == GROUPS
    for groups, parts in zip(groups_of_parts, zip(*ranks, strict=True), strict=True):
        if config.feeds_data:  # row i of the data has caption i
            rows = {int(n) for batch in parts if batch.anchors for n in numbers(batch, batch.anchors)}
            assert rows == {GROUPS.index(group) * MEMBERS + member for group in groups for member in range(MEMBERS)}


def test_the_groups_of_an_update_are_others_at_another_step() -> None:
    config = config_of(updates_per_claim=2)
    first = [{int(n) for n in numbers(batch, batch.transitions)} for batch in batches_of(config, ledger=Ledger(config, 2))]  # type: ignore[arg-type]
    later = [[{int(n) for n in numbers(b, b.transitions)} for b in batches_of(config, ledger=Ledger(config, step))] for step in range(3, 8)]  # type: ignore[arg-type]
    assert any(found != first for found in later)


@pytest.mark.parametrize("kernel", ["flow_sde", "edm_2ab"])
def test_a_row_of_a_group_carries_its_own_times_advantage_and_prompt(kernel: str) -> None:
    config = config_of(kernel, advantage_scale="batch")
    batch = rows_of(config)
    rows = batch.transitions
    assert isinstance(rows, Transitions)
    prompts = numbers(batch, rows)
    advantages = dict(zip(GROUPS, group_advantages([rewards_of(g) for g in GROUPS], "batch"), strict=True))
    grid = kernel_of(config).time_grid(6)
    seen = set()
    for i in range(len(rows.weight)):
        number = round(float(rows.x[i].flatten()[0]))
        group, member, k = number // 100, number % 100 // 10, number % 10
        seen.add((group, member, k))
        step = trained_steps(config.sampler, 5, group)[k]
        assert float(rows.x_next[i].flatten()[0]) == number + 0.5
        assert float(rows.old_log_prob[i]) == -number
        assert (rows.t[i], rows.t_next[i], rows.step[i]) == (grid[step], grid[step + 1], step)
        if kernel == "flow_sde":
            assert rows.history is None
        else:
            assert rows.history is not None
            assert float(rows.history.x0[i].flatten()[0]) == number - 0.5
            assert rows.history.t[i] == (grid[step - 1] if step else torch.inf)
        assert float(rows.advantage[i]) == pytest.approx(advantages[group][member], rel=1e-6)
        assert prompts[i] == group
    assert seen == {(g, m, k) for g in GROUPS for m in range(members_of(g)) for k in range(TRAINED)}


@pytest.mark.parametrize("times", ["steps", "stratified"])
@pytest.mark.parametrize("kernel", ["flow_sde", "edm_2ab"])
def test_a_finished_rollout_is_noised_to_the_times_of_its_trained_steps_or_of_equal_parts(kernel: str, times: str) -> None:
    config = config_of(kernel, preset="awm", policy_times=times)
    batch = rows_of(config)
    rows = batch.transitions
    assert isinstance(rows, Samples)
    advantages = dict(zip(GROUPS, group_advantages([rewards_of(g) for g in GROUPS], "batch", biased=True), strict=True))
    grid, prompts, seen = kernel_of(config).time_grid(6), numbers(batch, rows), {}
    if kernel == "edm_2ab":  # its grid has sigmas, the policy's process times
        grid = grid / (1 + grid)
    for i in range(len(rows.t)):
        number = round(float(rows.x0[i].flatten()[0]))
        group, member = number // 100, number % 100 // 10
        seen.setdefault((group, member), []).append((float(rows.t[i]), rows.eps[i]))
        assert float(rows.advantage[i]) == pytest.approx(advantages[group][member] / 5, rel=1e-6, abs=1e-9)  # bounded by advantage_max=1
        assert prompts[i] == group
    assert seen.keys() == {(g, m) for g in GROUPS for m in range(members_of(g))}
    for (group, _), drawn in seen.items():
        found = [t for t, _ in drawn]
        if times == "steps":
            assert found == pytest.approx(grid[list(trained_steps(config.sampler, 5, group))].tolist())
        else:
            middle = float(PROCESS.quantiles(torch.tensor([0.5])))
            assert found[0] < middle < found[1]
        assert not torch.equal(drawn[0][1], drawn[1][1])
    assert len({round(float(eps.sum()), 6) for drawn in seen.values() for _, eps in drawn}) == len(rows.t)


def test_samples_and_transitions_are_not_taken_for_each_other() -> None:
    one, other = config_of(preset="awm"), config_of()
    with pytest.raises(PayloadError, match="SamplePayload needs tensors"):
        rows_of(one, ledger=Ledger(other))
    with pytest.raises(PayloadError, match="GroupPayload needs tensors"):
        rows_of(other, ledger=Ledger(one))


@pytest.mark.parametrize("world", [1, 2, 7])
def test_a_rank_reads_the_heads_members_and_data_rows_that_it_trains(world: int) -> None:
    config = config_of()
    read: dict[str, list[int]] = {}
    for rank in range(world):
        ledger = Ledger(config)
        rows = rows_of(config, rank, world, ledger)
        assert isinstance(rows.transitions, Transitions)
        members = {(round(x) // 100, round(x) % 100 // 10) for x in rows.transitions.x[:, 0, 0, 0].tolist()}
        groups = [(int(ref[1:]), segments) for ref, segments in ledger.fetched if ref != "d1"]
        assert [segments[0] for _, segments in groups] == [0] * len({g for g, _ in members})
        assert {(group, segment - 1) for group, segments in groups for segment in segments[1:]} == members
        for group, segments in groups:
            read.setdefault(f"g{group}", []).extend(segments[1:])
        (head, data) = (segments for ref, segments in ledger.fetched if ref == "d1")
        assert head == [0]
        assert rows.anchors is not None
        assert {segment - 1 for segment in data} == {round(x) for x in rows.anchors.x0[:, 0, 0, 0].tolist()}
    assert read == {f"g{g}": list(range(1, 1 + members_of(g))) for g in GROUPS}


def test_more_ranks_than_members_are_refused() -> None:
    config = config_of()
    with pytest.raises(ValueError, match="14 items cannot be shared among 15 ranks"):
        rows_of(config, 0, 15)


def test_a_group_of_another_number_of_members_is_refused() -> None:
    config = config_of()
    ledger = Ledger(config)
    ledger.payloads["g8"] = ledger.payloads["g7"]
    with pytest.raises(PayloadError, match="group 8 has 3 members, its header says 2"):
        rows_of(config, ledger=ledger)


def test_groups_of_another_sampler_are_refused() -> None:
    """What a generator with other settings, or of another build, has sampled cannot be scored by this run's kernel."""
    ours, theirs = config_of("edm_2ab"), config_of("edm_euler")
    with pytest.raises(PayloadError, match="holds no predictions of the step before, which edm_2ab needs"):
        rows_of(ours, ledger=Ledger(theirs))
    with pytest.raises(PayloadError, match="another time grid than flow_sde's of 6 steps"):
        rows_of(config_of(), ledger=Ledger(theirs))
    rows = rows_of(theirs, ledger=Ledger(ours)).transitions  # the same grid and states, and a history that is not needed
    assert isinstance(rows, Transitions)
    assert rows.history is None


# -- anchor evaluations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data_per", "repeats"), [("transition", TRAINED), ("rollout", 1), ("first", 1)])
def test_anchor_evaluations_per_transition_or_per_rollout(data_per: str, repeats: int) -> None:
    batch = rows_of(config_of(data_per=data_per))
    anchors = batch.anchors
    assert anchors is not None
    rows = len(GROUPS) * MEMBERS
    assert anchors.x0[:, 0, 0, 0].tolist() == [float(i) for i in range(rows) for _ in range(repeats)]
    assert numbers(batch, anchors) == anchors.x0[:, 0, 0, 0].tolist()  # its own caption
    assert anchors.eps.shape == anchors.x0.shape
    assert len(anchors.t.unique()) == rows * repeats
    assert ((anchors.t > 0) & (anchors.t < 1)).all()
    assert not torch.equal(anchors.eps[0], anchors.eps[1])


def test_fresh_noise_is_named_by_seed_and_step() -> None:
    config = config_of()

    def eps(changed: RunConfig, step: int) -> torch.Tensor:
        anchors = rows_of(changed, ledger=Ledger(changed, step)).anchors
        assert anchors is not None
        return torch.cat([anchors.eps.flatten(), anchors.t])

    first = eps(config, 2)
    assert torch.equal(first, eps(config, 2))  # a step trained again after a crash
    assert not torch.equal(first, eps(config, 3))
    assert not torch.equal(first, eps(config.model_copy(update={"seed": 6}), 2))


@pytest.mark.parametrize("same_start", [False, True])
@pytest.mark.parametrize("data_per", ["transition", "rollout", "first"])
@pytest.mark.parametrize("kernel", ["flow_sde", "edm_2ab"])
def test_shared_noise_is_the_rollouts_own_start_and_times(kernel: str, data_per: str, same_start: bool) -> None:
    """A kernel in sigma space visits sigma where the flow's time is sigma / (1 + sigma)."""
    config = config_of(kernel, data_noise="shared", data_per=data_per)
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"same_initial_noise": same_start})})
    anchors = rows_of(config).anchors
    assert anchors is not None
    grid, i = kernel_of(config).time_grid(6), 0
    if kernel == "edm_2ab":
        grid = grid / (1 + grid)
    for group in GROUPS:
        times = [float(grid[k]) for k in trained_steps(config.sampler, 5, group)]
        for member in range(MEMBERS):
            start = step_noise(5, group, 0 if same_start else member, INITIAL, SHAPE)
            rows = range(i, i + (TRAINED if data_per == "transition" else 1))
            assert all(torch.equal(anchors.eps[r], start) for r in rows)
            found = [float(anchors.t[r]) for r in rows]
            assert found == {"transition": times, "first": times[:1]}.get(data_per, found)
            assert set(found) <= set(times)
            i += len(rows)
    assert i == len(anchors.t)


def test_fresh_times_follow_the_law_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise is the same; of clips the public law draws higher levels than of pictures."""
    own, public = (rows_of(config_of(data_times=law)).anchors for law in ("policy", "cosmos"))
    assert own is not None
    assert public is not None
    assert torch.equal(own.eps, public.eps)
    assert not torch.equal(own.t, public.t)
    monkeypatch.setattr(sys.modules[__name__], "SHAPE", (3, 5, 2, 2))
    clip = rows_of(config_of(data_times="cosmos")).anchors
    assert clip is not None
    sigma = clip.t / (1 - clip.t)
    assert bool(((clip.t > 0) & (clip.t < 1)).all())
    assert float(sigma.log().mean()) > math.log(4)


# -- micro-batches --------------------------------------------------------------------------------------------------


def test_take_slices_every_field_and_pads_with_weight_zero() -> None:
    rows = rows_of(config_of()).transitions
    assert rows is not None
    part = take(rows, slice(3, 7))
    filled = [f.name for f in fields(Transitions) if getattr(rows, f.name) is not None]
    assert set(filled) == {f.name for f in fields(Transitions)} - {"previous", "t_previous", "before", "mean_before"}
    assert all(torch.equal(getattr(part, name), getattr(rows, name)[3:7]) for name in filled)
    padding = take(rows, slice(4, 4))
    assert padding.weight.tolist() == [0.0]
    assert all(len(getattr(padding, name)) == 1 for name in filled)
    assert padding.x.isfinite().all()


# -- scores and video -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["each", "sum"])
def test_scores_of_the_header_make_the_advantages(combine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a header has scores by reward, its totals are not looked at."""
    config, terms = config_of(advantages=combine, failed_reward="fill_mean"), {"ocr": Term(), "jpeg": Term(0.5, (0.0, 1.0))}
    monkeypatch.setattr(trainer.learn.batch, "terms_of", lambda config: terms)
    ledger, scores = Ledger(config), []
    for item in ledger.claim.groups:
        n = members_of(item.group)
        scores.append({"ocr": [float((item.group * m) % 3) for m in range(n)], "jpeg": [None, *[2.0 * m for m in range(1, n)]]})
    groups = [replace(g, header=replace(g.header, scores=s)) for g, s in zip(ledger.claim.groups, scores, strict=True)]
    ledger.claim = replace(ledger.claim, groups=groups)
    rows = rows_of(config, ledger=ledger).transitions
    assert rows is not None
    expected = [a for group in advantages_of(scores, terms, combine, "fill_mean") for a in group for _ in range(TRAINED)]  # type: ignore[arg-type]
    assert rows.advantage.tolist() == pytest.approx(expected, abs=1e-6)


def test_groups_of_one_prompt_have_one_mean_where_the_baseline_is_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Subjects, "group", lambda self, group: Subject("the same" if group < 8 else f"prompt {group}"))
    found = rows_of(config_of(advantage_baseline="prompt", advantage_std="biased")).transitions
    assert found is not None
    texts = ["same" if group < 8 else str(group) for group in GROUPS]
    expected = group_advantages([rewards_of(g) for g in GROUPS], biased=True, prompts=texts)
    torch.testing.assert_close(found.advantage, torch.tensor([a for group in expected for a in group]).repeat_interleave(TRAINED))
    assert expected[0] != group_advantages([rewards_of(GROUPS[0])], biased=True)[0]


@pytest.mark.parametrize("kernel", ["flow_sde", "edm_2ab"])
@pytest.mark.parametrize("data_noise", ["fresh", "shared"])
def test_clips_become_rows_like_pictures(kernel: str, data_noise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames are one dimension more; everything else of a row is what it is for a picture."""
    config = config_of(kernel, data_noise=data_noise)
    picture = rows_of(config)
    monkeypatch.setattr(sys.modules[__name__], "SHAPE", (3, 5, 2, 2))
    clip = rows_of(config)
    assert picture.transitions is not None
    assert picture.anchors is not None
    assert clip.transitions is not None
    assert clip.anchors is not None
    for name in ("x", "x_next", "previous"):
        value, flat = getattr(clip.transitions, name), getattr(picture.transitions, name)
        assert (value is None) == (flat is None)
        assert value is None or torch.equal(value, flat[:, :, None].expand_as(value))
    for name in ("t", "t_next", "step", "old_log_prob", "advantage", "weight"):
        assert torch.equal(getattr(clip.transitions, name), getattr(picture.transitions, name)), name
    assert clip.anchors.x0.shape == clip.anchors.eps.shape == (len(clip.anchors.t), 3, 5, 2, 2)
    assert torch.equal(clip.anchors.x0[:, :, 0], picture.anchors.x0)
    if data_noise == "shared":
        assert torch.equal(clip.anchors.t, picture.anchors.t)
        assert torch.equal(clip.anchors.eps[0], step_noise(5, GROUPS[0], 0, INITIAL, SHAPE))
    assert take(clip.transitions, slice(2, 5)).x.shape == (3, 3, 5, 2, 2)
    assert take(clip.anchors, slice(2, 2)).eps.shape == (1, 3, 5, 2, 2)


def test_a_damaged_payload_stops_the_step() -> None:
    config = config_of()
    ledger = Ledger(config)
    ledger.payloads["g7"][2] = ledger.payloads["g7"][2][:-1]
    with pytest.raises(PayloadError, match="its table says"):
        rows_of(config, ledger=ledger)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_with_own_pairs_every_rollout_has_its_groups_example(dropout: float) -> None:
    """No feeder takes part; a dropped caption is the empty one, and the same ones are dropped again."""
    config = config_of(data={"pairing": "own", "caption_dropout": dropout}, data_per="rollout")
    ledger = Ledger(config)
    batch = rows_of(config, ledger=ledger)
    anchors = batch.anchors
    assert anchors is not None
    assert [ref for ref, _ in ledger.fetched] == [f"g{group}" for group in GROUPS]
    assert anchors.x0[:, 0, 0, 0].tolist() == [float(group) for group in GROUPS for _ in range(MEMBERS)]
    captions = numbers(batch, anchors)
    assert all(c in (0.0, x) for c, x in zip(captions, anchors.x0[:, 0, 0, 0].tolist(), strict=True))
    assert 0 < captions.count(0.0) < len(captions) if dropout else 0.0 not in captions
    again = rows_of(config)
    assert again.anchors is not None
    assert numbers(again, again.anchors) == captions


def test_a_group_without_its_own_example_is_refused() -> None:
    config = config_of(data={"pairing": "own"})
    ledger = Ledger(config)
    ledger.payloads["g4"] = encode(Ledger._group(config_of(), 4))
    with pytest.raises(PayloadError, match="without its own anchor datum"):
        rows_of(config, ledger=ledger)
