"""Image- and video-to-video in the learner: groups and data that are given different numbers of frames, on tiny policies of the published layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.conditioning import Subjects
from actors.sources.latents import clean_latents
from diffusion.checkpoint import Policy, load_policy
from tests.gloo import alone
from tests.unit.trainer.learn.given import FRAMES, GROUPS, POLICIES, SIDE, Ledger, config_of, write_clips
from trainer.config.run import RunConfig
from trainer.learn.batch import StepBatch, noise_rows
from trainer.learn.learner import Learner
from trainer.learn.objective import Anchors, Transitions, data_terms, policy_terms

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    with alone():
        yield


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder)
    return folder


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    for name, write in POLICIES.items():
        write(folder / name)
    return folder


CASES = [("cosmos", "free"), ("cosmos", "own"), ("wan", "free"), ("i2v", "free"), ("i2v", "own")]


def made(name: str, pairing: str, policies: Path, clips: Path, **changes: Any) -> tuple[RunConfig, Policy, Learner, Ledger]:
    config = config_of(policies / name, clips, pairing, **changes)
    policy = load_policy(config.model)
    return config, policy, Learner(config, CPU), Ledger(config, policy)


def rows_by_shape(batches: list[StepBatch], name: str) -> dict[int, torch.Tensor]:
    """Rows of weight one with their conditioning, flat and in an order that does not depend on the ranks, by number of sampled frames."""
    found: dict[int, list[torch.Tensor]] = {}
    for batch in batches:
        rows: Transitions | Anchors | None = getattr(batch, name)
        if rows is None:  # no group, or no row of data, is given so many
            continue
        columns = [getattr(rows, f.name) for f in fields(rows) if f.name != "text" and getattr(rows, f.name) is not None]
        shown = batch.conditioning_of(rows).tensors
        columns += [shown[key] for key in sorted(shown)]
        flat = torch.cat([column.double().reshape(len(rows.weight), -1) for column in columns], 1)
        latents = rows.x if isinstance(rows, Transitions) else rows.x0
        found.setdefault(latents.shape[2], []).extend(flat[rows.weight == 1])
    return {frames: torch.stack(sorted(rows, key=lambda row: row.tolist())) for frames, rows in found.items() if rows}


@pytest.mark.parametrize(("name", "pairing"), CASES)
def test_ranks_have_every_row_once_and_equally_many_passes(name: str, pairing: str, policies: Path, clips: Path) -> None:
    _, _, learner, ledger = made(name, pairing, policies, clips)
    alone = learner.batches(ledger, ledger.claim, 0, 1)  # type: ignore[arg-type]
    assert len(alone) == (1 if name == "i2v" else 3)
    for world in (2, 5):
        ranks = [learner.batches(ledger, ledger.claim, rank, world) for rank in range(world)]  # type: ignore[arg-type]
        for kind in ("transitions", "anchors"):
            expected, found = rows_by_shape(alone, kind), rows_by_shape([batch for rank in ranks for batch in rank], kind)
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[k], found[k]) for k in expected)
            counts = [getattr(batch, f"{kind[:-1]}_rows") for batch in alone]
            assert sum(map(sum, counts)) == getattr(alone[0], f"{kind[:-1]}_count")
            for rank in ranks:
                assert [getattr(b, f"{kind[:-1]}_rows") for b in rank] == [getattr(b, f"{kind[:-1]}_rows") for b in ranks[0]]
                for batch in rank:
                    rows, own = getattr(batch, kind), getattr(batch, f"{kind[:-1]}_rows")
                    assert (0 if rows is None else int(rows.weight.sum())) == (own[ranks.index(rank)] if own else 0)
                    assert rows is None or len(rows.weight) >= 1


@pytest.mark.parametrize(("name", "pairing"), CASES)
def test_an_update_is_the_gradient_of_the_whole_sum(name: str, pairing: str, policies: Path, clips: Path) -> None:
    """Micro-batches of every shape; the density of what was stored is found again."""
    config, policy, learner, ledger = made(name, pairing, policies, clips)
    batches = learner.batches(ledger, ledger.claim, 0, 1)  # type: ignore[arg-type]
    plain, total = policy.transformer.train(), torch.zeros(())
    for batch in batches:
        rows, anchors = batch.transitions, batch.anchors
        if rows is not None:
            prediction = plain(rows.x, rows.t, **batch.conditioning_of(rows).tensors)
            assert isinstance(prediction, torch.Tensor)
            total = total + policy_terms(prediction, None, rows, learner.kernel, config.objective)[0] / batch.transition_count
        if anchors is not None:
            noised = policy.process.noise(anchors.x0, anchors.eps, anchors.t)
            data = plain(noised, anchors.t, **batch.conditioning_of(anchors).tensors)
            assert isinstance(data, torch.Tensor)
            total = total + 0.3 * data_terms(data, anchors, policy.process) / batch.anchor_count
    total.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
    stats = learner.update(batches, 1)
    assert stats["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    assert stats["ratio_deviation"] < 1e-5


def test_given_frames_are_those_of_the_rows_own_clip(policies: Path, clips: Path) -> None:
    """All clips have one text, so nothing but the clip tells them apart."""
    config, _, learner, ledger = made("cosmos", "own", policies, clips)
    seen = set()
    for batch in learner.batches(ledger, ledger.claim, 0, 1):  # type: ignore[arg-type]
        if batch.transitions is None or batch.anchors is None:
            continue
        given = 3 - batch.transitions.x.shape[2]
        seen.add(given)
        if given:
            theirs = batch.conditioning_of(batch.anchors).tensors["given"]
            assert theirs.shape[2] == given
            assert len(theirs.flatten(1).unique(dim=0)) == sum(k == given for k in ledger.given.values())
            whole = torch.cat([theirs, batch.anchors.x0], 2)
            subjects = Subjects(config.seed, config.prompts, config.data, config.sampler)
            clean = clean_latents(
                [s.example for g in GROUPS if (s := subjects.group(g)).given == given and s.example], load_policy(config.model).codec, SIDE, SIDE, FRAMES
            )
            assert all(any(torch.equal(row, x0) for x0 in clean) for row in whole)
    assert seen == set(ledger.given.values())


def test_noise_and_times_of_data_do_not_depend_on_how_many_frames_are_given(policies: Path, clips: Path) -> None:
    found = []
    for given in (0, 1, 2):
        _, _, learner, ledger = made("cosmos", "free", policies, clips, sampler={"given_frames": given}, objective={"data_per": "rollout"})
        (batch,) = learner.batches(ledger, ledger.claim, 0, 1)  # type: ignore[arg-type]
        assert batch.anchors is not None
        found.append(batch.anchors)
    for given, anchors in enumerate(found):
        assert torch.equal(anchors.t, found[0].t)
        assert torch.equal(anchors.eps, found[0].eps[:, :, given:])
        assert torch.equal(anchors.x0, found[0].x0[:, :, given:])


def test_guidance_keeps_the_frames_that_are_given(policies: Path, clips: Path) -> None:
    _, policy, learner, ledger = made("cosmos", "free", policies, clips, sampler={"guidance": 3.0, "negative_prompt": "a white cat"})
    batch = next(b for b in learner.batches(ledger, ledger.claim, 0, 1) if b.transitions is not None and b.transitions.x.shape[2] == 2)  # type: ignore[arg-type]
    rows = batch.transitions
    assert rows is not None
    shown = batch.conditioning_of(rows).tensors
    negative = policy.text_encoder.encode(["a white cat"])[0].prompt_embeds.expand(len(rows.x), -1, -1)
    with torch.no_grad():
        c, u = policy.transformer(rows.x, rows.t, **shown), policy.transformer(rows.x, rows.t, negative, given=shown["given"])
        assert isinstance(c, torch.Tensor)
        assert isinstance(u, torch.Tensor)
        torch.testing.assert_close(learner.replay(rows, batch.conditioning_of(rows)).detach(), u + 3 * (c - u), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 2, 2), (4, 4), (3, 2, 8, 8)])
def test_noise_of_some_rows_is_that_of_all(shape: tuple[int, ...]) -> None:
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    every = torch.randn((7, *shape), generator=one)
    assert torch.equal(noise_rows(7, shape, [1, 4, 5], other), every[[1, 4, 5]])
    assert torch.equal(torch.rand(5, generator=one), torch.rand(5, generator=other))
