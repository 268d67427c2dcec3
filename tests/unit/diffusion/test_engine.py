"""The engine: a sample depends on its own request alone, and what it stores can be replayed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.engine.engine import Engine
from diffusion.engine.request import SampleRequest, Trajectory
from diffusion.kernels import log_prob, make_kernel
from diffusion.models.sd3 import SD3Transformer
from diffusion.processes import RectifiedFlow
from diffusion.seeds import INITIAL, step_noise

Build = Callable[..., SD3Transformer]
PROCESS = RectifiedFlow(2.0)
KERNELS = ["flow_sde", "constant_sde", "cps", "ddim_eta"]
PLENTY = 10_000


def request(member: int = 0, group: int = 0, **keys: Any) -> SampleRequest:
    """A request with its own conditioning; every step but the last is stochastic unless told otherwise."""
    g = torch.Generator().manual_seed(100 * group + member)
    steps = keys.pop("steps", 4)
    values: dict[str, Any] = {
        "id": member,
        "prompt_embeds": torch.randn(keys.pop("length", 5), 12, generator=g),
        "pooled": torch.randn(6, generator=g),
        "shape": (3, 8, 8),
        "seed": 7,
        "group": group,
        "member": member,
        "steps": steps,
        "stochastic": frozenset(range(steps - 1)),
    }
    return SampleRequest(**{**values, **keys})


def same(a: Trajectory, b: Trajectory, atol: float = 1e-5) -> None:
    for name in ("latent", "x", "x_next", "log_prob", "times"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=atol, rtol=1e-4)


# -- independence ---------------------------------------------------------------------------------------------------


def mixed_requests() -> list[SampleRequest]:
    """Different sizes, prompt lengths, step counts, kernels and trained steps."""
    return [
        request(0, trained=(0, 2)),
        request(1, shape=(3, 4, 12), length=2, steps=6, kernel="cps", trained=(1,)),
        request(2, steps=3, stochastic=frozenset()),
        request(3, kernel="ddim_eta", noise_level=0.9, trained=(0, 1, 2)),
        request(4, shape=(3, 16, 4), length=7, kernel="constant_sde", noise_level=0.3, steps=5, stochastic=frozenset({1, 2}), trained=(2,)),
    ]


def test_a_sample_does_not_depend_on_its_batch_mates(style: str, tiny_model: Build) -> None:
    model = tiny_model(style)
    alone = [Engine(model, PROCESS, PLENTY).run([r])[0] for r in mixed_requests()]
    for a, b in zip(alone, Engine(model, PROCESS, PLENTY).run(mixed_requests()), strict=True):
        same(a, b)
    for a, b in zip(alone, Engine(model, PROCESS, 45).run(mixed_requests()), strict=True):  # two or three at a time: they join mid-run
        same(a, b)


def test_requests_join_and_leave_between_steps(tiny_model: Build) -> None:
    model = tiny_model()
    early, late = request(0, steps=5, trained=(0, 3)), request(1, steps=2, trained=(0,))
    engine = Engine(model, PROCESS, PLENTY)
    engine.add_request(early)
    assert engine.step() == []
    engine.add_request(late)
    assert engine.step() == []
    (second,) = engine.step()
    assert second.request is late
    assert engine.step() == []
    (first,) = engine.step()
    assert first.request is early
    assert engine.step() == []
    same(first, Engine(model, PROCESS, PLENTY).run([early])[0])
    same(second, Engine(model, PROCESS, PLENTY).run([late])[0])


def test_the_same_name_gives_the_same_sample_and_another_name_another(tiny_model: Build) -> None:
    model = tiny_model()
    base = request(trained=(0, 1))
    first, again = (Engine(model, PROCESS, PLENTY).run([base])[0] for _ in range(2))
    same(first, again, atol=0)
    for change in ({"seed": 8}, {"group": 1}, {"member": 1}):
        other = Engine(model, PROCESS, PLENTY).run([replace(base, **change)])[0]
        assert (other.latent - first.latent).abs().max() > 0.1


def test_a_group_may_share_its_start_but_not_its_noise(tiny_model: Build) -> None:
    trained = (0, 1)
    group = [request(m, same_start=True, trained=trained) for m in range(2)]
    group = [replace(r, prompt_embeds=group[0].prompt_embeds, pooled=group[0].pooled) for r in group]
    a, b = Engine(tiny_model(), PROCESS, PLENTY).run(group)
    assert torch.equal(a.x[0], b.x[0])
    assert torch.equal(a.x[0], step_noise(7, 0, 0, INITIAL, (3, 8, 8)))
    assert not torch.allclose(a.x_next[0], b.x_next[0], atol=1e-3)


# -- what is stored -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_replayed_transitions_have_ratio_one(kernel: str, style: str, tiny_model: Build) -> None:
    """The learner's computation on stored transitions, all in one batch, gives the density the engine recorded."""
    model, steps, trained = tiny_model(style), 6, (0, 2, 4)
    group = [request(m, steps=steps, kernel=kernel, noise_level=0.8, trained=trained) for m in range(3)]
    done = Engine(model, PROCESS, PLENTY).run(group)
    x, x_next = (torch.cat([getattr(d, name) for d in done]) for name in ("x", "x_next"))
    times = done[0].times
    index = torch.tensor(trained).repeat(3)
    t, t_next = times[index], times[index + 1]
    embeds = torch.stack([r.prompt_embeds for r in group]).repeat_interleave(3, 0)
    pooled = torch.stack([r.pooled for r in group]).repeat_interleave(3, 0)
    mean, std = make_kernel(kernel, PROCESS, 0.8, steps).moments(model(x, t, embeds, pooled), x, t, t_next)
    ratio = (log_prob(x_next, mean, std) - torch.cat([d.log_prob for d in done])).exp()
    assert (ratio - 1).abs().max() < 1e-6


def test_only_trained_transitions_are_kept_and_they_chain(tiny_model: Build) -> None:
    r = request(steps=5, trained=(0, 1, 3))
    done = Engine(tiny_model(), PROCESS, PLENTY).run([r])[0]
    assert done.x.shape == done.x_next.shape == (3, 3, 8, 8)
    assert done.log_prob.shape == (3,)
    assert torch.equal(done.x[0], step_noise(7, 0, 0, INITIAL, (3, 8, 8)))
    assert torch.equal(done.x_next[0], done.x[1])
    assert not torch.equal(done.x_next[1], done.x[2])
    assert torch.equal(done.times, PROCESS.time_grid(5))
    assert {t.dtype for t in (done.x, done.x_next, done.latent, done.log_prob)} == {torch.float32}


def test_stored_noise_is_the_named_noise(tiny_model: Build) -> None:
    """(x' - mean) / std of a stored transition is the named draw of its step."""
    model, r = tiny_model(), request(member=2, steps=4, trained=(1,))
    done = Engine(model, PROCESS, PLENTY).run([r])[0]
    t, t_next = done.times[1:2], done.times[2:3]
    with torch.no_grad():
        velocity = model(done.x, t, r.prompt_embeds[None], r.pooled[None])
    mean, std = make_kernel(r.kernel, PROCESS, r.noise_level, 4).moments(velocity, done.x, t, t_next)
    torch.testing.assert_close(((done.x_next - mean) / std)[0], step_noise(7, 0, 2, 1, r.shape), atol=1e-4, rtol=0)


@torch.no_grad()
def test_without_noise_it_is_plain_euler(tiny_model: Build) -> None:
    model, r = tiny_model(), request(steps=7, stochastic=frozenset())
    done = Engine(model, PROCESS, PLENTY).run([r])[0]
    x, times = step_noise(7, 0, 0, INITIAL, r.shape)[None], PROCESS.time_grid(7)
    for t, t_next in itertools.pairwise(times):
        x = x + (t_next - t) * model(x, t[None], r.prompt_embeds[None], r.pooled[None])
    torch.testing.assert_close(done.latent, x[0], atol=1e-5, rtol=1e-5)
    assert done.x.numel() == done.log_prob.numel() == 0


# -- weights, precision, refusals -----------------------------------------------------------------------------------


def test_a_trajectory_carries_its_oldest_version(tiny_model: Build) -> None:
    engine = Engine(tiny_model(seed=0), PROCESS, PLENTY)
    engine.set_weights(tiny_model(seed=1).state_dict(), 4)
    engine.add_request(request(0, steps=3))
    engine.step()
    engine.set_weights(tiny_model(seed=2).state_dict(), 5)
    engine.add_request(request(1, steps=2))
    versions = {d.request.member: d.version for _ in range(2) for d in engine.step()}
    assert versions == {0: 4, 1: 5}


def test_new_weights_are_used_from_the_next_step_on(tiny_model: Build) -> None:
    def run(*seeds: int) -> Tensor:
        engine = Engine(tiny_model(seed=0), PROCESS, PLENTY)
        engine.add_request(request(0, steps=2))
        done = []
        for seed in seeds:
            engine.set_weights(tiny_model(seed=seed).state_dict(), seed)
            done = engine.step()
        return done[0].latent

    assert torch.equal(run(1, 1), run(1, 1))
    assert not torch.allclose(run(1, 2), run(1, 1), atol=1e-3)


def test_bf16_autocast_keeps_the_density_of_the_sample_in_fp32(tiny_model: Build) -> None:
    done = Engine(tiny_model(), PROCESS, PLENTY, "bfloat16").run([request(trained=(0, 1))])[0]
    exact = Engine(tiny_model(), PROCESS, PLENTY).run([request(trained=(0, 1))])[0]
    assert done.latent.dtype == torch.float32
    torch.testing.assert_close(done.log_prob, exact.log_prob, atol=1e-5, rtol=0)  # it depends on the noise alone
    assert not torch.equal(done.latent, exact.latent)


def test_a_request_that_cannot_run_is_refused(tiny_model: Build) -> None:
    engine = Engine(tiny_model(), PROCESS, max_tokens=20)
    with pytest.raises(ValueError, match="one request needs 21 tokens, more than the budget of 20"):
        engine.add_request(request())  # 16 patches and 5 prompt tokens
    with pytest.raises(ValueError, match="latent size 7x8 is not a multiple of the patch size 2"):
        engine.add_request(request(shape=(3, 7, 8)))
    assert engine.step() == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stochastic": frozenset({0}), "trained": (0, 1)}, r"trained steps \(0, 1\) must be stochastic; stochastic steps are \[0\]"),
        ({"stochastic": frozenset({0, 3})}, r"stochastic steps \[0, 3\] must lie in 0..2: the last step is deterministic"),
        ({"stochastic": frozenset({-1})}, r"must lie in 0..2"),
        ({"stochastic": frozenset(), "trained": (0,)}, "must be stochastic"),
        ({"trained": (2, 0)}, "ascending"),  # transitions are stored in step order: labels in another order would be wrong
    ],
)
def test_request_refusals(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request(**keys)


def test_an_unknown_kernel_fails_loudly(tiny_model: Build) -> None:
    with pytest.raises(ValueError, match="unknown step kernel 'heun'"):
        Engine(tiny_model(), PROCESS, PLENTY).run([request(kernel="heun")])
