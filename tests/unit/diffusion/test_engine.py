"""The engine: a sample depends on its own request alone, and what it stores can be replayed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffusion.engine.engine import Engine
from diffusion.engine.request import SampleRequest, SamplingFailed
from diffusion.families.conditioning import Conditioning, stacked
from diffusion.kernels import Previous, log_prob, make_kernel
from diffusion.seeds import INITIAL, step_noise
from tests.unit.diffusion.sampling import KERNELS, PLENTY, PROCESS, Build, batched, conditioning, request, same, stepped


def mixed_requests() -> list[SampleRequest]:
    """Different sizes, prompt lengths, step counts, kernels and trained steps."""
    return [
        request(0, trained=(0, 2)),
        request(1, shape=(3, 4, 12), length=2, steps=6, kernel="cps", trained=(1,)),
        request(2, steps=3, stochastic=frozenset()),
        request(3, kernel="ddim_eta", noise_level=0.9, trained=(0, 1, 2)),
        request(4, shape=(3, 16, 4), length=7, kernel="constant_sde", noise_level=0.3, steps=5, stochastic=frozenset({1, 2}), trained=(2,)),
        request(5, steps=5, guidance=3.5, negative=conditioning(77, 3), trained=(1,)),
        request(6, kernel="edm_2ab", noise_level=1.0, steps=6, trained=(0, 3), guidance=2.0, negative=conditioning(78)),
    ]


def test_a_sample_does_not_depend_on_its_batch_mates(style: str, tiny_model: Build) -> None:
    model = tiny_model(style)
    alone = [Engine(model, PROCESS, PLENTY).run([r])[0] for r in mixed_requests()]
    for a, b in zip(alone, Engine(model, PROCESS, PLENTY).run(mixed_requests()), strict=True):
        same(a, b)
    for a, b in zip(alone, Engine(model, PROCESS, 60).run(mixed_requests()), strict=True):  # two or three at a time: they join mid-run
        same(a, b)
    for a, b in zip(reversed(alone), Engine(model, PROCESS, PLENTY).run(mixed_requests()[::-1]), strict=True):
        same(a, b)


def test_requests_join_and_leave_between_steps(tiny_model: Build) -> None:
    model = tiny_model()
    early, late = request(0, steps=5, trained=(0, 3)), request(1, steps=2, trained=(0,))
    engine = Engine(model, PROCESS, PLENTY)
    engine.add_request(early)
    assert engine.step() == []
    engine.add_request(late)
    assert engine.step() == []
    (second,) = stepped(engine)
    assert second.request is late
    assert engine.step() == []
    (first,) = stepped(engine)
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


def test_members_of_a_request_are_the_requests_of_one_member_each(tiny_model: Build) -> None:
    model, base = tiny_model(), request(3, trained=(0, 2))
    together = Engine(model, PROCESS, PLENTY).run([replace(base, n=3)])
    assert [t.member for t in together] == [3, 4, 5]
    for one, t in zip((3, 4, 5), together, strict=True):
        same(t, Engine(model, PROCESS, PLENTY).run([replace(base, member=one)])[0])


def test_a_group_may_share_its_start_but_not_its_noise(tiny_model: Build) -> None:
    a, b = Engine(tiny_model(), PROCESS, PLENTY).run([request(n=2, same_start=True, trained=(0, 1))])
    assert torch.equal(a.x[0], b.x[0])
    assert torch.equal(a.x[0], step_noise(7, 0, 0, INITIAL, (3, 8, 8)))
    assert not torch.allclose(a.x_next[0], b.x_next[0], atol=1e-3)


@pytest.mark.parametrize("kernel", ["flow_sde", "edm_2ab"])
def test_steps_before_the_first_noise_are_shared_and_change_nothing(kernel: str, tiny_model: Build) -> None:
    model = tiny_model()
    group = request(n=3, steps=6, kernel=kernel, same_start=True, stochastic=frozenset({3}), trained=(3,), guidance=2.0, negative=conditioning(5))
    engine = Engine(model, PROCESS, PLENTY)
    together = engine.run([group])
    assert engine.stats.saved_steps == 2 * 3
    assert engine.stats.sequence_steps == 3 + 3 * 3
    for member, shared in enumerate(together):
        alone = Engine(model, PROCESS, PLENTY)
        same(shared, alone.run([replace(group, member=member, n=1)])[0])
        assert alone.stats.saved_steps == 0


def test_a_deterministic_group_with_one_start_is_one_sample(tiny_model: Build) -> None:
    engine = Engine(tiny_model(), PROCESS, PLENTY)
    a, b = engine.run([request(n=2, same_start=True, stochastic=frozenset())])
    assert torch.equal(a.latent, b.latent)
    assert (a.member, b.member) == (0, 1)
    assert engine.stats.sequence_steps == 4


def test_guidance_mixes_two_predictions(tiny_model: Build) -> None:
    """One Euler step by hand: u + g (c - u); a scale of 1 is the conditional sample."""
    model, c, u = tiny_model(), conditioning(1), conditioning(2, 3)
    r = request(steps=1, stochastic=frozenset(), conditioning=c, negative=u, guidance=4.0)
    done = Engine(model, PROCESS, PLENTY).run([r])[0]
    x, t = step_noise(7, 0, 0, INITIAL, r.shape)[None], torch.ones(1)
    with torch.no_grad():
        vc, vu = (model(x, t, e.prompt_embeds[None], e.tensors["pooled"][None]) for e in (c, u))
    torch.testing.assert_close(done.latent, (x - (vu + 4.0 * (vc - vu)))[0], atol=1e-5, rtol=1e-5)
    plain = Engine(model, PROCESS, PLENTY).run([replace(r, guidance=1.0)])[0]
    torch.testing.assert_close(plain.latent, (x - vc)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_request_may_bring_its_own_time_grid(tiny_model: Build) -> None:
    model, times = tiny_model(), (0.9, 0.4, 0.1, 0.0)
    plain, own = request(0, steps=3, stochastic=frozenset()), request(0, steps=3, stochastic=frozenset(), times=times)
    found = Engine(model, PROCESS, PLENTY).run([own, plain])
    assert found[0].times.tolist() == pytest.approx(times)
    x = 0.9 * step_noise(7, 0, 0, INITIAL, own.shape)[None]  # noise at its share of the first time
    for t, t_next in itertools.pairwise(torch.tensor(times)):
        x = x + (t_next - t) * model(x, t[None], *batched(own))
    torch.testing.assert_close(found[0].latent, x[0], atol=1e-5, rtol=1e-5)
    same(found[1], Engine(model, PROCESS, PLENTY).run([plain])[0])
    noisy = Engine(model, PROCESS, PLENTY).run([request(1, steps=3, times=(1.0, 0.5, 0.2, 0.0), trained=(0,))])[0]
    _, std = make_kernel("flow_sde", PROCESS.on_grid((1.0, 0.5, 0.2, 0.0)), 0.7, 3).moments(noisy.x, noisy.x, torch.ones(1), torch.tensor([0.5]))
    assert float(std) == pytest.approx(0.7 * (1 / (1 - 0.5)) ** 0.5 * 0.5**0.5)  # at t = 1 the second node stands in


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"times": (1.0, 0.0)}, "4 steps need a grid of 5 times, got 2"),
        ({"steps": 2, "times": (1.0, 1.0, 0.0)}, "decreasing times and ends at 0"),
        ({"steps": 2, "times": (1.0, 0.5, 0.1)}, "decreasing times and ends at 0"),
        ({"kernel": "edm_2ab", "steps": 3, "times": (9.0, 5.0, 1.0, 0.0)}, "edm_2ab has a time grid of its own"),
        ({"kernel": "ancestral", "steps": 2, "times": (1.0, 0.5, 0.0)}, "ancestral has a time grid of its own"),
    ],
)
def test_time_grids_that_are_refused(keys: dict[str, Any], message: str, tiny_model: Build) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(tiny_model(), PROCESS, PLENTY).add_request(request(**keys))


def test_nan_in_one_request_reaches_no_other(style: str, tiny_model: Build) -> None:
    model = tiny_model(style)
    broken = conditioning(9)
    broken.prompt_embeds[1, 2] = float("nan")
    requests = [request(0), request(1, conditioning=broken), request(2, shape=(3, 4, 12)), request(3, guidance=2.0, negative=broken)]
    engine = Engine(model, PROCESS, PLENTY)
    with pytest.raises(SamplingFailed, match="2 of 4 samples failed; member 1 of group 0: the sample is not finite") as caught:
        engine.run(requests)
    assert [f.member for f in caught.value.failures] == [1, 3]
    for t in caught.value.trajectories:
        same(t, Engine(model, PROCESS, PLENTY).run([requests[t.member]])[0])
    assert (engine.stats.finished, engine.stats.failed) == (2, 2)


def test_an_aborted_request_is_gone_and_frees_its_room(tiny_model: Build) -> None:
    model, keep, drop = tiny_model(), request(0, trained=(1,)), request(1, n=3)
    engine = Engine(model, PROCESS, 50)  # two at a time
    for r in (drop, keep):
        engine.add_request(r)
    assert stepped(engine) == []
    assert engine.abort(drop) == 3
    assert engine.unfinished == 1
    assert engine.abort(drop) == 0
    done = [t for _ in range(4) for t in stepped(engine)]
    assert [t.request for t in done] == [keep]
    same(done[0], Engine(model, PROCESS, PLENTY).run([keep])[0])
    assert engine.stats.aborted == 3


def test_a_group_aborted_between_branch_and_end_leaves_nothing(tiny_model: Build) -> None:
    engine = Engine(tiny_model(), PROCESS, 45)
    group = request(n=3, steps=4, same_start=True, stochastic=frozenset({1}))
    engine.add_request(group)
    engine.step()  # the trunk; three branches follow, two at a time
    engine.step()
    assert engine.abort(group) == 3
    assert engine.unfinished == 0


# -- prompts --------------------------------------------------------------------------------------------------------


class Encoder:
    """Encodes a text by its length; counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, prompts: list[str]) -> Conditioning:
        self.asked += prompts
        return stacked([conditioning(len(p)) for p in prompts])


def test_a_prompt_is_encoded_once_for_all_its_members_and_requests(tiny_model: Build) -> None:
    encoder, model = Encoder(), tiny_model()
    engine = Engine(model, PROCESS, PLENTY, text_encoder=encoder)
    texts = [request(0, conditioning=None, prompt="four", n=2, guidance=2.0), request(2, conditioning=None, prompt="four", guidance=2.0, negative_prompt="x")]
    done = engine.run(texts)
    assert sorted(encoder.asked) == ["", "four", "x"]
    encoded = request(1, conditioning=conditioning(4), guidance=2.0, negative=conditioning(0))
    same(done[1], Engine(model, PROCESS, PLENTY).run([encoded])[0])


def test_a_prompt_needs_a_text_encoder(tiny_model: Build) -> None:
    engine = Engine(tiny_model(), PROCESS, PLENTY)
    with pytest.raises(ValueError, match="has no text encoder; give the request its conditioning"):
        engine.add_request(request(conditioning=None, prompt="a"))
    with pytest.raises(ValueError, match="has no text encoder"):
        engine.add_request(request(guidance=2.0))


# -- what is stored -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_replayed_transitions_have_ratio_one(kernel: str, style: str, tiny_model: Build) -> None:
    """The learner's computation on stored transitions, all in one batch, gives the density the engine recorded."""
    model, steps, trained = tiny_model(style), 7, (0, 2, 4)
    group = [request(m, steps=steps, kernel=kernel, noise_level=0.8, trained=trained) for m in range(3)]
    done = Engine(model, PROCESS, PLENTY).run(group)
    x, x_next = (torch.cat([getattr(d, name) for d in done]) for name in ("x", "x_next"))
    times = done[0].times
    index = torch.tensor(trained).repeat(3)
    t, t_next = times[index], times[index + 1]
    texts = [r.conditioning for r in group if r.conditioning is not None]
    embeds = torch.stack([c.prompt_embeds for c in texts]).repeat_interleave(3, 0)
    pooled = torch.stack([c.tensors["pooled"] for c in texts]).repeat_interleave(3, 0)
    step = make_kernel(kernel, PROCESS, 0.8, steps)
    previous = None
    if step.uses_previous:
        before = torch.where(index > 0, times[index - 1], torch.inf)
        previous = Previous(torch.cat([d.previous for d in done if d.previous is not None]), before)
    prediction = model(step.process.model_input(x, t), step.process.model_time(t), embeds, pooled)
    mean, std = step.moments(prediction, x, t, t_next, previous)
    ratio = (log_prob(x_next, mean, std) - torch.cat([d.log_prob for d in done])).exp()
    assert (ratio - 1).abs().max() < 1e-6


@pytest.mark.parametrize("kernel", ["flow_sde", "edm_2ab"])
def test_densities_are_those_of_states_rounded_as_they_are_stored(kernel: str, tiny_model: Build) -> None:
    """Beside requests that store fp32, which it does not touch; the chain goes on from the rounded states, the sample is not rounded."""
    model, steps, trained = tiny_model(), 6, (0, 1, 3)
    half = request(0, steps=steps, kernel=kernel, noise_level=0.8, trained=trained, state_dtype="bfloat16")
    full = replace(half, state_dtype="float32", member=1)
    done, beside = Engine(model, PROCESS, PLENTY).run([half, full])
    same(beside, Engine(model, PROCESS, PLENTY).run([full])[0])
    stored = [done.x, done.x_next] + ([done.previous] if done.previous is not None else [])
    assert all(state.dtype == torch.bfloat16 for state in stored)  # half the bytes, in the trajectory too
    assert beside.x.dtype == beside.x_next.dtype == torch.float32
    done = replace(done, x=done.x.float(), x_next=done.x_next.float(), previous=None if done.previous is None else done.previous.float())
    assert torch.equal(done.x_next[0], done.x[1])
    assert not torch.equal(done.latent, done.latent.bfloat16().float())
    assert not torch.equal(beside.x, beside.x.bfloat16().float())
    step, index, (embeds, pooled) = make_kernel(kernel, PROCESS, 0.8, steps), torch.tensor(trained), batched(half)
    t, t_next = done.times[index], done.times[index + 1]
    previous = None
    if done.previous is not None:
        previous = Previous(done.previous, torch.where(index > 0, done.times[index - 1], torch.inf))
    prediction = model(step.process.model_input(done.x, t), step.process.model_time(t), embeds.expand(3, -1, -1), pooled.expand(3, -1))
    mean, std = step.moments(prediction, done.x, t, t_next, previous)
    assert ((log_prob(done.x_next, mean, std) - done.log_prob).exp() - 1).abs().max() < 1e-6


def test_only_trained_transitions_are_kept_and_they_chain(tiny_model: Build) -> None:
    r = request(steps=5, trained=(0, 1, 3))
    done = Engine(tiny_model(), PROCESS, PLENTY).run([r])[0]
    assert done.x.shape == done.x_next.shape == (3, 3, 8, 8)
    assert done.log_prob.shape == (3,)
    assert torch.equal(done.x[0], step_noise(7, 0, 0, INITIAL, (3, 8, 8)))
    assert torch.equal(done.x_next[0], done.x[1])
    assert not torch.equal(done.x_next[1], done.x[2])
    assert torch.equal(done.times, PROCESS.time_grid(5))
    assert {t.dtype for t in (done.x, done.x_next, done.latent)} == {torch.float32}
    assert done.log_prob.dtype == torch.float64


def test_stored_noise_is_the_named_noise(tiny_model: Build) -> None:
    """(x' - mean) / std of a stored transition is the named draw of its step."""
    model, r = tiny_model(), request(member=2, steps=4, trained=(1,))
    done = Engine(model, PROCESS, PLENTY).run([r])[0]
    t, t_next = done.times[1:2], done.times[2:3]
    with torch.no_grad():
        velocity = model(done.x, t, *batched(r))
    mean, std = make_kernel(r.kernel, PROCESS, r.noise_level, 4).moments(velocity, done.x, t, t_next)
    torch.testing.assert_close(((done.x_next - mean) / std)[0], step_noise(7, 0, 2, 1, r.shape), atol=1e-4, rtol=0)


@torch.no_grad()
def test_without_noise_it_is_plain_euler(tiny_model: Build) -> None:
    model, r = tiny_model(), request(steps=7, stochastic=frozenset())
    done = Engine(model, PROCESS, PLENTY).run([r])[0]
    x, times = step_noise(7, 0, 0, INITIAL, r.shape)[None], PROCESS.time_grid(7)
    for t, t_next in itertools.pairwise(times):
        x = x + (t_next - t) * model(x, t[None], *batched(r))
    torch.testing.assert_close(done.latent, x[0], atol=1e-5, rtol=1e-5)
    assert done.x.numel() == done.log_prob.numel() == 0
