"""The engine: a sample depends on its own request alone, and what it stores can be replayed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.engine.engine import Engine, StepFailed
from diffusion.engine.memory import free_bytes
from diffusion.engine.request import Failure, SampleRequest, SamplingFailed, Trajectory
from diffusion.kernel_names import stochastic_steps
from diffusion.kernels import Previous, log_prob, make_kernel
from diffusion.models.sd3 import SD3Transformer
from diffusion.processes import RectifiedFlow
from diffusion.seeds import INITIAL, step_noise
from diffusion.text.base import Conditioning, TextConditioning

Build = Callable[..., SD3Transformer]
PROCESS = RectifiedFlow(2.0)
KERNELS = ["flow_sde", "constant_sde", "cps", "ddim_eta", "edm_euler", "edm_2ab", "ancestral"]
PLENTY = 10_000


def conditioning(number: int, length: int = 5) -> Conditioning:
    """An encoded prompt of its own for each number."""
    g = torch.Generator().manual_seed(number)
    return Conditioning(torch.randn(length, 12, generator=g), torch.randn(6, generator=g))


def request(member: int = 0, group: int = 0, **keys: Any) -> SampleRequest:
    """A request with its own conditioning; every step that may be stochastic is, unless told otherwise."""
    steps, kernel = keys.pop("steps", 4), keys.pop("kernel", "flow_sde")
    values: dict[str, Any] = {
        "shape": (3, 8, 8),
        "steps": steps,
        "conditioning": conditioning(100 * group + member, keys.pop("length", 5)),
        "seed": 7,
        "group": group,
        "member": member,
        "kernel": kernel,
        "stochastic": frozenset(range(stochastic_steps(kernel, steps))),
    }
    return SampleRequest(**{**values, **keys})


def same(a: Trajectory, b: Trajectory, atol: float = 1e-5) -> None:
    for name in ("latent", "x", "x_next", "log_prob", "times"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=atol, rtol=1e-4)
    assert (a.previous is None) == (b.previous is None)
    if a.previous is not None and b.previous is not None:
        torch.testing.assert_close(a.previous, b.previous, atol=atol, rtol=1e-4)


def batched(r: SampleRequest) -> tuple[Tensor, Tensor]:
    assert r.conditioning is not None
    return r.conditioning.prompt_embeds[None], r.conditioning.pooled[None]


def stepped(engine: Engine) -> list[Trajectory]:
    """One step; nothing may fail."""
    done = engine.step()
    assert not any(isinstance(one, Failure) for one in done)
    return [one for one in done if isinstance(one, Trajectory)]


# -- independence ---------------------------------------------------------------------------------------------------


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
        vc, vu = (model(x, t, e.prompt_embeds[None], e.pooled[None]) for e in (c, u))
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

    def encode(self, prompts: list[str]) -> TextConditioning:
        self.asked += prompts
        rows = [conditioning(len(p)) for p in prompts]
        return TextConditioning(torch.stack([r.prompt_embeds for r in rows]), torch.stack([r.pooled for r in rows]))


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
    pooled = torch.stack([c.pooled for c in texts]).repeat_interleave(3, 0)
    step = make_kernel(kernel, PROCESS, 0.8, steps)
    previous = None
    if step.uses_previous:
        before = torch.where(index > 0, times[index - 1], torch.inf)
        previous = Previous(torch.cat([d.previous for d in done if d.previous is not None]), before)
    prediction = model(step.process.model_input(x, t), step.process.model_time(t), embeds, pooled)
    mean, std = step.moments(prediction, x, t, t_next, previous)
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


# -- weights, precision, refusals -----------------------------------------------------------------------------------


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
    before = {n: t.clone() for n, t in engine.model.state_dict().items()}
    missing = tiny_model(seed=3).state_dict()
    missing.pop("proj_out.bias")
    misshapen = {**tiny_model(seed=3).state_dict(), "proj_out.bias": torch.zeros(1)}
    for state in (missing, misshapen):
        with pytest.raises(ValueError, match=r"weights of version 3 do not fit the model: 1 tensors .* proj_out\.bias"):
            engine.set_weights(state, 3)
    assert engine.version == 0
    assert all(torch.equal(t, before[n]) for n, t in engine.model.state_dict().items())


def test_a_digest_that_is_in_place_is_not_loaded_again(tiny_model: Build) -> None:
    engine, state = Engine(tiny_model(), PROCESS, PLENTY), tiny_model(seed=3).state_dict()
    engine.set_weights(state, 3, "aa")
    engine.model.proj_out.bias.data.zero_()
    engine.set_weights(state, 4, "aa")
    assert engine.version == 4
    assert not engine.model.proj_out.bias.any()
    engine.set_weights(state, 5, "bb")
    assert torch.equal(engine.model.proj_out.bias, state["proj_out.bias"])


# -- memory ---------------------------------------------------------------------------------------------------------


class Narrow(torch.nn.Module):
    """A model on a device that holds so many tokens: more raises what an allocator raises."""

    def __init__(self, model: SD3Transformer, limit: int, error: Exception) -> None:
        super().__init__()
        self.inner, self.limit, self.error, self.seen = model, limit, error, list[int]()
        self.packed_tokens, self.activation_bytes = model.packed_tokens, model.activation_bytes

    def forward(self, latents: Tensor | list[Tensor], t: Tensor, embeds: Tensor | list[Tensor], pooled: Tensor) -> Tensor | list[Tensor]:
        tokens = sum(self.inner.packed_tokens(tuple(x.shape), len(e)) for x, e in zip(latents, embeds, strict=True))
        self.seen.append(tokens)
        if tokens > self.limit:
            raise self.error
        return self.inner(latents, t, embeds, pooled)


CPU_ALLOCATOR = RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), CPU_ALLOCATOR])
def test_a_forward_that_does_not_fit_halves_the_budget_and_loses_nothing(error: Exception, tiny_model: Build, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    requests = [request(m, trained=(0,)) for m in range(6)]  # 21 tokens each
    narrow = Narrow(model, 50, error)
    engine = Engine(narrow, PROCESS, PLENTY)  # type: ignore[arg-type]
    for t, r in zip(engine.run(requests), requests, strict=True):
        same(t, Engine(model, PROCESS, PLENTY).run([r])[0])
    assert narrow.seen[:3] == [126, 63, 21]  # 126 tokens, half of them, half again
    assert engine.stats.out_of_memory == 2
    assert engine.stats.budget == 31
    assert "out of memory with 126 tokens in 6 sequences; token budget lowered to 63" in caplog.text


def test_a_sample_that_does_not_fit_alone_fails_and_the_others_go_on(tiny_model: Build) -> None:
    model = tiny_model()
    engine = Engine(Narrow(model, 30, torch.OutOfMemoryError("CUDA out of memory")), PROCESS, PLENTY)  # type: ignore[arg-type]
    with pytest.raises(SamplingFailed, match=r"1 of 3 samples failed; member 1 of group 0: out of memory with 37 tokens alone: CUDA out of memory") as caught:
        engine.run([request(0), request(1, shape=(3, 16, 8)), request(2)])
    assert [t.member for t in caught.value.trajectories] == [0, 2]


def test_another_error_of_the_network_is_not_taken_for_a_shortage(tiny_model: Build) -> None:
    engine = Engine(Narrow(tiny_model(), 0, RuntimeError("illegal instruction")), PROCESS, PLENTY)  # type: ignore[arg-type]
    with pytest.raises(StepFailed, match="a denoising step of 2 sequences failed: RuntimeError: illegal instruction") as caught:
        engine.run([request(n=2)])
    assert len(caught.value.requests) == 1
    assert engine.unfinished == 0


def test_an_error_leaves_nothing_of_a_run_behind(tiny_model: Build) -> None:
    engine = Engine(tiny_model(), PROCESS, PLENTY)
    with pytest.raises(ValueError, match="not a multiple"):
        engine.run([request(0), request(1, shape=(3, 7, 8))])
    assert engine.unfinished == 0
    steps = engine.steps([request(2)])
    next(steps)
    steps.close()
    assert engine.unfinished == 0


def test_the_budget_is_what_memory_holds(tiny_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    each = model.activation_bytes(4)
    monkeypatch.setattr("diffusion.engine.memory.free_bytes", lambda device: 100 * each)
    engine = Engine(model, PROCESS, PLENTY)
    assert engine.plan.tokens == engine.plan.fitting == 70
    assert str(engine.plan).startswith("70 tokens a forward pass, bound by memory: ")
    assert Engine(model, PROCESS, 50).plan.tokens == 50
    assert "bound by sampler.max_tokens" in str(Engine(model, PROCESS, 50).plan)


def test_memory_of_a_container_counts_what_files_would_give_back(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"max": "1000\n", "current": "990\n", "stat": "anon 100\ninactive_file 400\nactive_file 3\n"}
    real = Path.read_text

    def read(path: Path, *arguments: Any) -> str:
        return files[path.suffix[1:]] if path.parent == Path("/sys/fs/cgroup") else real(path, *arguments)

    monkeypatch.setattr(Path, "read_text", read)
    assert free_bytes(torch.device("cpu")) == 1000 - 990 + 400
    files["current"] = "1500\n"
    assert free_bytes(torch.device("cpu")) == 0
    files["max"] = "max\n"
    assert free_bytes(torch.device("cpu")) > 2**20


def test_free_memory_is_a_number_of_this_machine() -> None:
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50


# -- refusals -------------------------------------------------------------------------------------------------------


def test_a_request_that_cannot_run_is_refused(tiny_model: Build) -> None:
    engine = Engine(tiny_model(), PROCESS, max_tokens=20)
    with pytest.raises(
        ValueError, match=r"one sample of \(3, 8, 8\) needs 21 tokens, more than the budget: 20 tokens a forward pass, bound by sampler.max_tokens"
    ):
        engine.add_request(request())  # 16 patches and 5 prompt tokens
    with pytest.raises(ValueError, match="7"):
        engine.add_request(request(shape=(3, 7, 8)))
    assert engine.step() == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stochastic": frozenset({0}), "trained": (0, 1)}, r"trained steps \(0, 1\) must be stochastic; stochastic steps are \[0\]"),
        ({"stochastic": frozenset({0, 3})}, r"stochastic steps \[0, 3\] must lie in 0..2: with 4 steps of flow_sde the last step is deterministic"),
        ({"stochastic": frozenset({-1})}, r"must lie in 0..2"),
        ({"stochastic": frozenset(), "trained": (0,)}, "must be stochastic"),
        ({"conditioning": None}, "a prompt or its conditioning"),
        ({"prompt": "both"}, "a prompt or its conditioning"),
        ({"n": 0}, "at least one sample"),
        ({"kernel": "edm_2ab", "stochastic": frozenset({2})}, r"must lie in 0..1: with 4 steps of edm_2ab the last two steps are deterministic"),
        ({"trained": (2, 0)}, "ascending"),  # transitions are stored in step order: labels in another order would be wrong
    ],
)
def test_request_refusals(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request(**keys)


def test_an_unknown_kernel_fails_loudly(tiny_model: Build) -> None:
    with pytest.raises(ValueError, match="unknown step kernel 'heun'"):
        Engine(tiny_model(), PROCESS, PLENTY).run([request(kernel="heun")])
