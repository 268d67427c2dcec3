"""One update of a one-rank learner group against the same sum written plainly; skips, averages, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import trainer.learn.learner
from diffusion.checkpoint import load_policy
from diffusion.engine.engine import Engine
from diffusion.engine.request import SampleRequest
from diffusion.families.conditioning import Conditioning
from diffusion.kernel_names import stochastic_steps
from diffusion.kernels import log_prob, make_kernel
from diffusion.lora import merged_state, trained_weights
from tests.gloo import alone
from trainer.config.learner import OptimizerConfig
from trainer.config.load import parse_config
from trainer.config.run import RunConfig
from trainer.learn.batch import StepBatch, take
from trainer.learn.checkpoint import save_shards
from trainer.learn.learner import Learner, learning_rate
from trainer.learn.objective import Anchors, Samples, Transitions, data_terms, policy_terms, sample_terms
from trainer.learn.records import append_metrics

CPU = torch.device("cpu")
SHAPE = (3, 8, 16)


# -- learning rate --------------------------------------------------------------------------------------------------


@given(lr=st.floats(1e-6, 1e-2), warmup=st.integers(0, 50), updates=st.integers(60, 500))
def test_learning_rate(lr: float, warmup: int, updates: int) -> None:
    constant = OptimizerConfig(lr=lr, warmup=warmup)
    rates = [learning_rate(constant, step, updates) for step in range(1, updates + 1)]
    assert rates[0] == pytest.approx(lr / max(1, warmup))
    assert rates[warmup:] == pytest.approx([lr] * (updates - warmup))
    assert all(a <= b for a, b in pairwise(rates))

    cosine = OptimizerConfig(lr=lr, warmup=warmup, decay="cosine")
    falling = [learning_rate(cosine, step, updates) for step in range(1, updates + 1)]
    assert falling[-1] == pytest.approx(0.02 * lr)
    assert all(a >= b for a, b in pairwise(falling[warmup:]))
    assert all(f <= r * (1 + 1e-9) for f, r in zip(falling, rates, strict=True))
    assert learning_rate(cosine, updates + 10, updates) == pytest.approx(0.02 * lr)  # a resumed run with fewer updates


# -- a group of one rank --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    with alone():
        yield


def config_of(folder: Path, micro_batch: int = 100, **sections: dict[str, Any]) -> RunConfig:
    return parse_config(
        {
            "model": {"path": str(folder), "init": True, **sections.get("model", {})},
            "sampler": {"steps": 4, "trained_steps": 2, "height": SHAPE[1], "width": SHAPE[2], **sections.get("sampler", {})},
            "objective": {"clip": 0.2, "data_weight": 0.3, **sections.get("objective", {})},
            "optimizer": {"lr": 1e-3, "ema": 0.9, **sections.get("optimizer", {})},
            "learner": {"ranks": 1, "micro_batch": micro_batch, **sections.get("learner", {})},
        }
    )


def learner_of(config: RunConfig) -> Learner:
    """With every parameter random: fresh weights predict zero and have no gradient but in the last layer."""
    made = Learner(config, CPU)
    state = {n: v + 0.05 * torch.randn(v.shape, generator=torch.Generator().manual_seed(i)) for i, (n, v) in enumerate(made.full_state().items())}
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            parameter.to_local().copy_(state[name])  # type: ignore[attr-defined]
            if name in made.ema:
                made.ema[name].to_local().copy_(state[name])  # type: ignore[attr-defined]
    return made


def test_a_learner_says_how_it_computes_and_why(policy_folder: Path, tmp_path: Path) -> None:
    made = Learner(config_of(policy_folder), CPU)
    assert made.describe(3) == {
        "kind": "learner",
        "step": 3,
        "network": "float32 on cpu, 1 ranks",
        "attention": "attention: sdpa, which runs everywhere (xformers: no kernels for cpu; torch_varlen: no kernels for cpu)",
    }
    append_metrics(tmp_path, made.describe(3))  # plain values, as a line of metrics.jsonl needs


def batch_of(made: Learner) -> StepBatch:
    """Three real rollouts of two trained transitions, and five anchor evaluations."""
    model = load_policy(made.config.model).transformer
    model.load_state_dict(made.full_state())
    g = torch.Generator().manual_seed(0)
    sampler = made.config.sampler
    texts = Conditioning({"prompt_embeds": torch.randn(6, 10, 64, generator=g), "pooled": torch.randn(6, 64, generator=g)})  # the first is the rollouts'
    trained = (0, stochastic_steps(sampler.kernel, 4) - 1)
    request = SampleRequest(
        shape=SHAPE,
        steps=4,
        conditioning=texts[0],
        n=3,
        kernel=sampler.kernel,
        noise_level=sampler.noise_level,
        stochastic=frozenset(trained) | {1},
        trained=trained,
        guidance=sampler.guidance,
        negative=made.guidance.negative if made.guidance else None,
    )
    done = Engine(model, made.process, 10_000).run([request])
    times, step = done[0].times, torch.tensor(trained)
    previous = [d.previous for d in done if d.previous is not None]
    transitions = Transitions(
        x=torch.cat([d.x for d in done]),
        x_next=torch.cat([d.x_next for d in done]),
        t=times[step].repeat(3),
        t_next=times[step + 1].repeat(3),
        step=step.repeat(3),
        old_log_prob=torch.cat([d.log_prob for d in done]),
        advantage=torch.tensor([1.0, 1.0, -0.5, -0.5, 0.2, 0.2]),
        weight=torch.ones(6),
        text=torch.zeros(6, dtype=torch.int64),
        previous=torch.cat(previous) if previous else None,
        t_previous=torch.where(step > 0, times[step - 1], torch.inf).repeat(3) if previous else None,
    )
    x0, eps = torch.randn(2, 5, *SHAPE, generator=g)
    anchors = Anchors(x0, eps, torch.rand(5, generator=g), torch.ones(5), torch.arange(1, 6))
    return StepBatch(texts, transitions, anchors, 6, 5, [6], [5])


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On one rank a gathered state shares its memory with the parameters."""
    return {k: v.clone() for k, v in state.items()}


def flat(stats: dict[str, Any]) -> dict[str, float]:
    """Numbers of an update, those by step under `name/step`."""
    nested = [(n, v if isinstance(v, dict) else {"": v}) for n, v in stats.items()]
    return {f"{name}/{step}": value for name, values in nested for step, value in values.items()}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[k] - b[k]).abs().max()) for k in a)


GUIDED = {"kernel": "edm_2ab", "noise_level": 1.0, "guidance": 3.0, "negative_prompt": "a sign"}


@pytest.mark.parametrize("objective", [{}, {"preset": "flow_grpo", "data_weight": 0.3}], ids=["ddrl", "with reverse KL"])
@pytest.mark.parametrize("sampler", [{}, GUIDED], ids=["plain", "guided in sigma space"])
@pytest.mark.parametrize("shard_blocks", [True, False])
def test_an_update_is_the_gradient_of_the_whole_sum(objective: dict[str, Any], sampler: dict[str, Any], shard_blocks: bool, policy_folder: Path) -> None:
    config = config_of(policy_folder, objective=objective, sampler=sampler, learner={"shard_blocks": shard_blocks})
    made = learner_of(config)
    batch = batch_of(made)
    plain = load_policy(config.model).transformer
    plain.load_state_dict(made.full_state())
    reference = load_policy(config.model, seed=config.seed).transformer if config.objective.kl_weight else None
    rows, anchors = batch.transitions, batch.anchors
    assert rows is not None
    assert anchors is not None

    kernel = make_kernel(config.sampler.kernel, made.process, config.sampler.noise_level, 4)

    def predict(model: torch.nn.Module) -> torch.Tensor:
        x, t = rows.x, rows.t
        if sampler:  # states are (1 + sigma) times the flow's
            x, t = x / (1 + t.reshape(-1, 1, 1, 1)), t / (1 + t)
        conditional: torch.Tensor = model(x, t, **batch.conditioning_of(rows).tensors)
        if not sampler:
            return conditional
        text = load_policy(config.model).text_encoder.encode(["a sign"])
        unconditional = model(x, t, **text[0].expand(6).tensors).detach()
        return unconditional + 3.0 * (conditional - unconditional)

    loss, _ = policy_terms(predict(plain), None if reference is None else predict(reference).detach(), rows, kernel, config.objective)
    noised = made.process.noise(anchors.x0, anchors.eps, anchors.t)
    data = data_terms(plain(noised, anchors.t, **batch.conditioning_of(anchors).tensors), anchors, made.process)
    (loss / 6 + 0.3 * data / 5).backward()
    o = config.optimizer
    norm = float(torch.nn.utils.clip_grad_norm_(plain.parameters(), o.grad_clip))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
    optimizer.step()

    stats = made.update([batch], 1)
    assert stats["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert stats["data_loss"] == pytest.approx(data.item() / 5, rel=1e-5)
    assert stats["ratio_deviation"] == pytest.approx(0, abs=1e-5)
    steps = {str(int(i)) for i in rows.step}
    assert set(stats["ratio_deviation_by_step"]) == set(stats["log_prob_gap_by_step"]) == steps
    assert sum(stats["ratio_deviation_by_step"].values()) / 2 == pytest.approx(stats["ratio_deviation"])
    assert ("reverse_kl" in stats) == bool(objective)
    assert (stats["skipped"], stats["lr"]) == (0, o.lr)
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    after = made.full_state()
    for name, value in plain.state_dict().items():
        # Adam's first step is lr times the gradient's sign: compare where the sign is no accident of rounding
        sure = gradients[name].abs() > 1e-6 if name in gradients else torch.ones_like(value, dtype=torch.bool)
        assert float(((after[name] - value).abs() * sure).max()) < 1e-6, name


NFT = {"preset": "diffusion_nft", "kl_weight": 0.5, "old_decay": 0.9, "old_decay_rate": 0.25, "data_weight": 0.3}
AWM = {"preset": "awm", "old_decay": 0.9, "old_decay_rate": 0.25, "data_weight": 0.3}


def samples_of(batch: StepBatch) -> StepBatch:
    """Its rollouts as finished ones, two times each."""
    rows, g = batch.transitions, torch.Generator().manual_seed(2)
    assert isinstance(rows, Transitions)
    eps, t = torch.randn(rows.x.shape, generator=g), torch.rand(6, generator=g)
    return replace(batch, transitions=Samples(rows.x_next, eps, t, rows.advantage, rows.weight, rows.text))


@pytest.mark.parametrize("objective", [NFT, AWM], ids=["nft", "awm"])
@pytest.mark.parametrize("shard_blocks", [True, False])
def test_updates_on_finished_rollouts_are_those_of_a_plain_module_and_its_old_copy(objective: dict[str, Any], shard_blocks: bool, policy_folder: Path) -> None:
    """Three of them: at the first the old policy is the trained one, then it trails by a half of the way and a quarter."""
    config = config_of(policy_folder, 4, objective=objective, learner={"shard_blocks": shard_blocks}, optimizer={"eps": 1e-2})
    made = learner_of(config)
    batch = samples_of(batch_of(made))
    with torch.no_grad():
        for name in made.old:
            made.old[name].to_local().copy_(made.model.get_parameter(name).to_local())  # type: ignore[attr-defined]
    plain, old, reference = (load_policy(config.model, seed=config.seed).transformer for _ in range(3))
    plain.load_state_dict(made.full_state())
    old.load_state_dict(made.full_state())
    o, rows, anchors = config.optimizer, batch.transitions, batch.anchors
    assert isinstance(rows, Samples)
    assert anchors is not None
    optimizer = torch.optim.AdamW(plain.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)

    def predict(model: torch.nn.Module, given: Samples | Anchors) -> torch.Tensor:
        found: torch.Tensor = model(made.process.noise(given.x0, given.eps, given.t), given.t, **batch.conditioning_of(given).tensors)
        return found

    for step in (1, 2, 3):
        with torch.no_grad():
            shown = replace(rows, old=predict(old, rows))
            start = predict(reference, rows)
        loss, told = sample_terms(predict(plain, rows), start, shown, made.process, config.objective)
        data = data_terms(predict(plain, anchors), anchors, made.process)
        (loss / 6 + 0.3 * data / 5).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), o.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        decay = 0.25 * step
        with torch.no_grad():
            for trailing, trained in zip(old.parameters(), plain.parameters(), strict=True):
                trailing.copy_(decay * trailing + (1 - decay) * trained)
        stats = made.update([batch], step)
        assert stats["policy_loss"] == pytest.approx(float(told["policy_loss"]) / 6, rel=1e-4)
        assert stats["old_kl"] == pytest.approx(float(told["old_kl"]) / 6, rel=1e-2, abs=1e-9)
        assert (stats["old_kl"] > 0) == (step > 1)
        assert stats["reverse_kl"] == pytest.approx(float(told["reverse_kl"]) / 6, rel=1e-4)
        assert not {"ratio_deviation", "clip_fraction", "ratio_deviation_by_step"} & stats.keys()
        assert difference(made.full_state(), dict(plain.state_dict())) < 1e-6
    sampled, expected = made.sampling_weights(), old if config.objective.policy_loss == "nft" else plain
    assert sampled.keys() == trained_weights(made.model).keys()
    assert max(float((sampled[name].full_tensor() - p).detach().abs().max()) for name, p in expected.named_parameters()) < 1e-6  # type: ignore[attr-defined]
    assert max(float((a - b).abs().max()) for a, b in zip(old.parameters(), plain.parameters(), strict=True)) > 1e-5


@pytest.mark.parametrize("objective", [{"old_log_prob": "rollout"}, {"old_log_prob": "learner"}, {"preset": "grpo_guard", "clip": 0.2}, NFT], ids=str)
def test_several_updates_of_a_claim_start_from_the_same_old_policy(objective: dict[str, Any], policy_folder: Path) -> None:
    """Two of them, one of the first rollout and one of the others: ratios are to the policy before both, the average follows each."""
    config = config_of(
        policy_folder,
        4,
        objective={**objective, "data_weight": 0.3, "kl_weight": 0.0, "old_decay": 0.0},
        learner={"updates_per_claim": 2},
        optimizer={"eps": 1e-2, "lr": 4e-2},
    )
    made = learner_of(config)
    batch = batch_of(made)
    assert isinstance(batch.transitions, Transitions)
    if config.objective.old_log_prob == "learner":  # what the rollout stored is not asked
        batch = replace(batch, transitions=replace(batch.transitions, old_log_prob=batch.transitions.old_log_prob + 0.1))
    batch = samples_of(batch) if config.objective.on_samples else batch
    rows, anchors = batch.transitions, batch.anchors
    assert rows is not None
    assert anchors is not None
    parts = [
        replace(batch, transitions=take(rows, slice(0, 2)), anchors=take(anchors, slice(0, 2)), transition_count=2, anchor_count=2),
        replace(batch, transitions=take(rows, slice(2, 6)), anchors=take(anchors, slice(2, 5)), transition_count=4, anchor_count=3),
    ]
    parts = [replace(p, transition_rows=[p.transition_count], anchor_rows=[p.anchor_count], part=i) for i, p in enumerate(parts)]
    plain, before = (load_policy(config.model).transformer for _ in range(2))
    plain.load_state_dict(made.full_state())
    before.load_state_dict(made.full_state())
    average = copied(made.full_state())
    o = config.optimizer
    optimizer = torch.optim.AdamW(plain.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
    kernel, norms, policy_loss = make_kernel(config.sampler.kernel, made.process, config.sampler.noise_level, 4), [], 0.0
    for part in parts:
        own, fed = part.transitions, part.anchors
        assert own is not None
        assert fed is not None

        def predict(model: torch.nn.Module, given: Any, part: StepBatch = part) -> torch.Tensor:
            x = given.x if isinstance(given, Transitions) else made.process.noise(given.x0, given.eps, given.t)
            found: torch.Tensor = model(x, given.t, **part.conditioning_of(given).tensors)
            return found

        with torch.no_grad():
            said = predict(before, own)
        if isinstance(own, Samples):
            loss, told = sample_terms(predict(plain, own), None, replace(own, old=said), made.process, config.objective)
        else:
            mean, std = kernel.moments(said.double(), own.x.double(), own.t, own.t_next)
            shown = own
            if config.objective.old_log_prob == "learner":
                shown = replace(own, before=log_prob(own.x_next, mean, std, "exact"), mean_before=mean)
            loss, told = policy_terms(predict(plain, own), None, shown, kernel, config.objective)
        data = data_terms(predict(plain, fed), fed, made.process)
        (loss / part.transition_count + 0.3 * data / part.anchor_count).backward()
        policy_loss += float(told["policy_loss"])
        norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), o.grad_clip)))
        optimizer.step()
        optimizer.zero_grad()
        average = {name: o.ema * average[name] + (1 - o.ema) * value for name, value in plain.state_dict().items()}
    stats = made.update(parts, 1)
    assert stats["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-4)
    assert stats["policy_loss"] == pytest.approx(policy_loss / 6, rel=1e-4)
    assert stats["skipped"] == 0
    assert difference(made.full_state(), dict(plain.state_dict())) < 1e-6
    assert difference(made.full_state(ema=True), average) < 1e-6
    if not config.objective.on_samples:
        assert stats["ratio_deviation"] > 1e-3  # the second update's ratios are not 1


def test_an_update_of_a_claim_that_is_skipped_leaves_the_others(policy_folder: Path) -> None:
    made = learner_of(config_of(policy_folder, learner={"updates_per_claim": 2}))
    batch = batch_of(made)
    assert isinstance(batch.transitions, Transitions)
    broken = replace(batch, transitions=replace(batch.transitions, advantage=torch.full((6,), torch.nan)))
    before = copied(made.full_state())
    stats = made.update([broken, replace(batch, part=1)], 1)
    assert stats["skipped"] == 0.5
    assert math.isfinite(stats["grad_norm"])
    assert difference(made.full_state(), before) > 1e-4


def test_the_trained_weights_are_back_when_the_old_policys_pass_fails(policy_folder: Path) -> None:
    made = learner_of(config_of(policy_folder, objective=NFT))
    before = copied(made.full_state())

    def fail() -> None:
        with made.as_old():
            assert difference(made.full_state(), before) > 1e-3
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert difference(made.full_state(), before) == 0


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("shard_blocks", [True, False])
def test_the_size_of_a_micro_batch_changes_nothing(micro_batch: int, shard_blocks: bool, policy_folder: Path) -> None:
    whole = learner_of(config_of(policy_folder))
    parts = learner_of(config_of(policy_folder, micro_batch, learner={"shard_blocks": shard_blocks}))
    batch = batch_of(whole)
    one, other = whole.update([batch], 1), parts.update([batch], 1)
    assert flat(one) == pytest.approx(flat(other), rel=1e-4, abs=2e-6)


@pytest.mark.parametrize(("micro_tokens", "expected"), [(1000, (1, 1)), (60, (2, 3)), (15, (6, 5))])
def test_passes_are_cut_by_tokens(
    micro_tokens: int, expected: tuple[int, int], policy_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rollouts of 18 tokens, anchors of another size of 26: the update is that of the undivided sum."""
    whole, parts = learner_of(config_of(policy_folder)), learner_of(config_of(policy_folder, learner={"micro_tokens": micro_tokens}))
    batch = batch_of(whole)
    assert batch.transitions is not None
    g = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 5, 3, 16, 16, generator=g)
    anchors = Anchors(x0, eps, torch.rand(5, generator=g), torch.ones(5), torch.arange(1, 6))
    batch = replace(batch, anchors=anchors)
    tokens = (whole.model.packed_tokens(SHAPE, 10), whole.model.packed_tokens((3, 16, 16), 10))
    assert tokens == (18, 26)
    made: list[tuple[str, int]] = []
    for name in ("policy_prediction", "data_prediction"):
        predict = getattr(trainer.learn.learner, name)

        def counting(*args: Any, name: str = name, predict: Any = predict) -> torch.Tensor:
            rows = args[2]
            made.append((name, len(rows.t)))
            return predict(*args)  # type: ignore[no-any-return]

        monkeypatch.setattr(trainer.learn.learner, name, counting)
    said = parts.update([batch], 1)
    assert tuple(sum(kind == name for kind, _ in made) for name in ("policy_prediction", "data_prediction")) == expected
    sizes = dict(zip(("policy_prediction", "data_prediction"), tokens, strict=True))
    assert all(rows == 1 or rows * sizes[name] <= micro_tokens for name, rows in made)
    parts.update([batch], 2)
    assert [r.name for r in caplog.records].count("trainer.learn.learner") == (micro_tokens == 15)  # said once
    assert flat(said) == pytest.approx(flat(whole.update([batch], 1)), rel=1e-4, abs=2e-6)


def test_a_group_of_ranks_with_unequal_rows_pads_without_effect(policy_folder: Path) -> None:
    """This rank has 6 rows, another is said to have 9: three passes more, of weight zero or of fewer rows."""
    made, again = learner_of(config_of(policy_folder, 1)), learner_of(config_of(policy_folder, 1))
    batch = batch_of(made)
    one = made.update([batch], 1)
    padded = again.update([replace(batch, transition_rows=[6, 9], anchor_rows=[5, 7])], 1)
    assert flat(one) == pytest.approx(flat(padded), rel=1e-5, abs=1e-6)


def test_a_gradient_that_is_not_finite_skips_the_update(policy_folder: Path) -> None:
    made = learner_of(config_of(policy_folder))
    batch = batch_of(made)
    assert batch.transitions is not None
    before, average = copied(made.full_state()), copied(made.full_state(ema=True))
    poisoned = replace(batch, transitions=replace(batch.transitions, advantage=torch.tensor([math.nan] + [0.0] * 5)))
    stats = made.update([poisoned], 1)
    assert stats["skipped"] == 1
    assert all(math.isfinite(value) for value in flat(stats).values())
    append_metrics(policy_folder, {"kind": "update", "step": 1, **stats})  # a skipped update is recorded like any other
    assert "grad_norm" not in stats
    assert difference(made.full_state(), before) == 0
    assert difference(made.full_state(ema=True), average) == 0
    assert made.update([batch], 2)["skipped"] == 0
    assert difference(made.full_state(), before) > 0


def test_the_optimiser_steps_with_limited_gradients_at_the_scheduled_rate(policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the update says of norm and rate is also what Adam is given; one rank against two cannot tell, both would leave it out."""
    made = learner_of(config_of(policy_folder, optimizer={"lr": 1e-3, "warmup": 8, "grad_clip": 1e-3}))
    given: list[tuple[float, float]] = []
    step = made.optimizer.step

    def stepping() -> None:
        gradients = [p.grad.full_tensor() for p in made.model.parameters() if p.grad is not None]  # type: ignore[attr-defined]
        given.append((float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt()), made.optimizer.param_groups[0]["lr"]))
        step()

    monkeypatch.setattr(made.optimizer, "step", stepping)
    said = made.update([batch_of(made)], 2)
    assert said["grad_norm"] > 5e-3
    ((norm, lr),) = given
    assert norm == pytest.approx(1e-3, rel=1e-2)
    assert lr == said["lr"] == pytest.approx(0.25e-3)


def test_the_moving_average_follows_by_its_decay(policy_folder: Path) -> None:
    made = learner_of(config_of(policy_folder))
    batch, before = batch_of(made), copied(made.full_state())
    made.update([batch], 1)
    after, average = made.full_state(), made.full_state(ema=True)
    for name, _ in made.model.named_parameters():
        torch.testing.assert_close(average[name], 0.9 * before[name] + 0.1 * after[name], atol=1e-7, rtol=1e-5)
    assert learner_of(config_of(policy_folder, optimizer={"ema": 0.0})).ema == {}


def test_a_restored_learner_goes_on_bit_for_bit(policy_folder: Path, tmp_path: Path) -> None:
    made = learner_of(config_of(policy_folder))
    batch = batch_of(made)
    made.update([batch], 1)
    save_shards(made.shards(), tmp_path / "checkpoint")
    restored = learner_of(config_of(policy_folder))
    restored.load(tmp_path / "checkpoint")
    assert difference(restored.full_state(), made.full_state()) == 0
    assert made.update([batch], 2) == restored.update([batch], 2)
    assert difference(restored.full_state(), made.full_state()) == 0
    assert difference(restored.full_state(ema=True), made.full_state(ema=True)) == 0


LORA = {"lora": {"rank": 4, "alpha": 8.0}}


@pytest.mark.parametrize("shard_blocks", [True, False])
def test_with_an_adapter_nothing_else_is_trained_or_published(shard_blocks: bool, policy_folder: Path, tmp_path: Path) -> None:
    config = config_of(policy_folder, model=LORA, objective={"preset": "flow_grpo", "data_weight": 0.3}, learner={"shard_blocks": shard_blocks})
    made = learner_of(config)
    batch, before = batch_of(made), copied(made.full_state())
    stats = made.update([batch], 1)
    assert stats["ratio_deviation"] < 1e-6
    assert stats["reverse_kl"] > 0  # learner_of moved the adapter; without it the network is the reference
    after = made.full_state()
    assert {n for n in before if not torch.equal(before[n], after[n])} == set(trained_weights(made.model)) == set(made.ema)
    assert all(".lora_" in n for n in made.ema)
    save_shards(made.shards(), tmp_path / "checkpoint")
    restored = learner_of(config)
    restored.load(tmp_path / "checkpoint")
    assert difference(restored.full_state(), made.full_state()) == 0
    assert made.update([batch], 2) == restored.update([batch], 2)
    assert difference(restored.full_state(), made.full_state()) == 0


def test_the_reference_of_an_adapter_is_the_policy_without_it(policy_folder: Path) -> None:
    """Whatever the adapter, the reverse KL is measured against the network that training started from."""
    config = config_of(policy_folder, model=LORA, objective={"preset": "flow_grpo"}, sampler={"guidance": 2.0})
    made = learner_of(config)
    batch = batch_of(made)
    adapted = made.update([batch], 1)["reverse_kl"]
    plain = learner_of(config_of(policy_folder, objective={"preset": "flow_grpo"}, sampler={"guidance": 2.0}))
    state = merged_state(learner_of(config).full_state(), config.model.lora)
    base = {n: t for n, t in learner_of(config).full_state().items() if ".lora_" not in n}
    assert plain.reference is not None
    with torch.no_grad():
        for name, parameter in plain.reference.named_parameters():
            parameter.to_local().copy_(base[name])  # type: ignore[attr-defined]
        for name, parameter in plain.model.named_parameters():
            parameter.to_local().copy_(state[name])  # type: ignore[attr-defined]
    assert plain.update([batch], 1)["reverse_kl"] == pytest.approx(adapted, rel=1e-4)


def test_without_rollouts_the_data_term_trains_alone(policy_folder: Path) -> None:
    made = learner_of(config_of(policy_folder, objective={"preset": "sft", "data_weight": 1.0}))
    batch = batch_of(made)
    stats = made.update([StepBatch(batch.conditioning, None, batch.anchors, 0, 5, [], [5])], 1)
    assert stats.keys() == {"lr", "skipped", "grad_norm", "data_loss"}
    for step in range(2, 6):
        last = made.update([StepBatch(batch.conditioning, None, batch.anchors, 0, 5, [], [5])], step)
    assert last["data_loss"] < stats["data_loss"]
