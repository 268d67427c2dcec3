"""Weights that change while the engine samples, and the precision of the network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffusion.engine.engine import Engine
from diffusion.engine.incoming import Piece
from diffusion.kernels import log_prob, make_kernel
from tests.unit.diffusion.sampling import PLENTY, PROCESS, Build, batched, request, same, stepped


def test_a_trajectory_carries_its_oldest_version(tiny_model: Build) -> None:
    engine = Engine(tiny_model(seed=0), PROCESS, PLENTY)
    engine.set_weights(tiny_model(seed=1).state_dict(), 4)
    engine.add_request(request(0, steps=3))
    engine.step()
    engine.set_weights(tiny_model(seed=2).state_dict(), 5)
    engine.add_request(request(1, steps=2))
    versions = {d.member: d.version for _ in range(2) for d in stepped(engine)}
    assert versions == {0: 4, 1: 5}


def test_new_weights_are_used_from_the_next_step_on(tiny_model: Build) -> None:
    def run(*seeds: int) -> Tensor:
        engine = Engine(tiny_model(seed=0), PROCESS, PLENTY)
        engine.add_request(request(0, steps=2))
        done = []
        for seed in seeds:
            engine.set_weights(tiny_model(seed=seed).state_dict(), seed)
            done = stepped(engine)
        return done[0].latent

    assert torch.equal(run(1, 1), run(1, 1))
    assert not torch.allclose(run(1, 2), run(1, 1), atol=1e-3)


def test_bf16_autocast_keeps_the_density_of_the_sample_in_fp32(tiny_model: Build) -> None:
    done = Engine(tiny_model(), PROCESS, PLENTY, "bfloat16").run([request(trained=(0, 1))])[0]
    exact = Engine(tiny_model(), PROCESS, PLENTY).run([request(trained=(0, 1))])[0]
    assert done.latent.dtype == torch.float32
    torch.testing.assert_close(done.log_prob, exact.log_prob, atol=1e-5, rtol=0)  # it depends on the noise alone
    assert not torch.equal(done.latent, exact.latent)


def test_draining_finishes_what_runs_on_the_old_weights(tiny_model: Build) -> None:
    old, new = tiny_model(seed=1), tiny_model(seed=2)
    early, late = request(0, n=2, steps=4, same_start=True, stochastic=frozenset({2}), trained=(2,)), request(1, steps=2)
    engine = Engine(tiny_model(seed=1), PROCESS, PLENTY)
    engine.set_weights(old.state_dict(), 4)
    engine.add_request(early)
    assert stepped(engine) == []
    engine.set_weights(new.state_dict(), 5, policy="drain")
    engine.add_request(late)
    done = [t for _ in range(6) for t in stepped(engine)]
    assert [(t.member, t.versions) for t in done] == [(0, (4, 4)), (1, (4, 4)), (1, (5, 5))]
    for t, model, r in zip(done, (old, old, new), (early, early, late), strict=True):
        same(t, Engine(model, PROCESS, PLENTY).run([replace(r, member=t.member, n=1)])[0])


def test_draining_keeps_a_request_whole_whatever_the_budget(tiny_model: Build) -> None:
    engine = Engine(tiny_model(seed=1), PROCESS, 45)  # two samples at a time
    engine.add_request(request(0, n=4))
    engine.step()
    engine.set_weights(tiny_model(seed=2).state_dict(), 7, policy="drain")
    engine.add_request(request(9))
    done = [t for _ in range(12) for t in stepped(engine)]
    assert {t.member: t.versions for t in done} == {0: (0, 0), 1: (0, 0), 2: (0, 0), 3: (0, 0), 9: (7, 7)}


def test_weights_in_flight_are_recorded_oldest_and_newest(tiny_model: Build) -> None:
    engine = Engine(tiny_model(seed=0), PROCESS, PLENTY)
    engine.add_request(request(0, steps=3, trained=(0, 1)))
    for version in (7, 8, 9):
        engine.set_weights(tiny_model(seed=version).state_dict(), version)
        done = stepped(engine)
    assert done[0].versions == (7, 9)
    assert done[0].version == 7
    x, t, t_next = done[0].x, done[0].times[[0, 1]], done[0].times[[1, 2]]
    for i, version in enumerate((7, 8)):  # each transition's density is that of the weights which drew it
        with torch.no_grad():
            velocity = tiny_model(seed=version)(x[i : i + 1], t[i : i + 1], *batched(done[0].request))
        mean, std = make_kernel("flow_sde", PROCESS, 0.7, 3).moments(velocity, x[i : i + 1], t[i : i + 1], t_next[i : i + 1])
        torch.testing.assert_close(log_prob(done[0].x_next[i : i + 1], mean, std)[0], done[0].log_prob[i], atol=1e-6, rtol=0)


def test_weights_that_do_not_fit_change_nothing(tiny_model: Build) -> None:
    engine = Engine(tiny_model(), PROCESS, PLENTY)
    before = {n: t.clone() for n, t in engine.runner.model.state_dict().items()}
    missing = tiny_model(seed=3).state_dict()
    missing.pop("proj_out.bias")
    misshapen = {**tiny_model(seed=3).state_dict(), "proj_out.bias": torch.zeros(1)}
    for state in (missing, misshapen):
        with pytest.raises(ValueError, match=r"weights of version 3 do not fit the model: 1 tensors .* proj_out\.bias"):
            engine.set_weights(state, 3)
    assert engine.runner.version == 0
    assert all(torch.equal(t, before[n]) for n, t in engine.runner.model.state_dict().items())


class InRows:
    """Weights that come row by row, and are looked at only then."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state, self.asked = state, 0
        self.shapes = {n: tuple(t.shape) for n, t in state.items()}

    def pieces(self) -> Iterator[Piece]:
        for name, tensor in self.state.items():
            for i in range(len(tensor)):
                self.asked += 1
                yield name, (slice(i, i + 1),), tensor[i : i + 1]


def test_weights_that_come_in_pieces_are_put_in_place_at_the_swap(tiny_model: Build) -> None:
    engine, rows = Engine(tiny_model(seed=0), PROCESS, PLENTY), InRows(tiny_model(seed=3).state_dict())
    places = {n: t.data_ptr() for n, t in engine.runner.model.state_dict().items()}
    engine.add_request(request(0, steps=2))
    engine.step()
    engine.set_weights(rows, 3, policy="drain")
    assert rows.asked == 0
    assert stepped(engine)[0].versions == (0, 0)
    assert stepped(engine) == []
    found = engine.runner.model.state_dict()
    assert all(torch.equal(t, rows.state[n]) for n, t in found.items())
    assert {n: t.data_ptr() for n, t in found.items()} == places
    rows.shapes["proj_out.bias"] = (1,)
    with pytest.raises(ValueError, match=r"weights of version 4 do not fit the model: 1 tensors .* proj_out\.bias"):
        engine.set_weights(rows, 4)


def test_a_digest_that_is_in_place_is_not_loaded_again(tiny_model: Build) -> None:
    engine, state = Engine(tiny_model(), PROCESS, PLENTY), tiny_model(seed=3).state_dict()
    engine.set_weights(state, 3, "aa")
    engine.runner.model.proj_out.bias.data.zero_()
    engine.set_weights(state, 4, "aa")
    assert engine.runner.version == 4
    assert not engine.runner.model.proj_out.bias.any()
    engine.set_weights(state, 5, "bb")
    assert torch.equal(engine.runner.model.proj_out.bias, state["proj_out.bias"])
