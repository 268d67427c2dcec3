"""Clips of any frame count and size in one batch of the engine, on the Wan network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from diffusion.engine.engine import Engine
from diffusion.engine.request import SampleRequest
from diffusion.families.conditioning import Conditioning
from diffusion.processes import RectifiedFlow
from diffusion.seeds import INITIAL, step_noise
from tests.unit.diffusion.test_wan import wan

PROCESS = RectifiedFlow(3.0)


def clip(number: int, shape: tuple[int, ...], **keys: Any) -> SampleRequest:
    g = torch.Generator().manual_seed(number)
    text = Conditioning({"prompt_embeds": torch.randn(2 + number % 4, 10, generator=g)})
    return SampleRequest(shape, **{"steps": 3, "conditioning": text, "group": number, "seed": 1, **keys})


@pytest.mark.parametrize("buckets", [None, 8])
def test_frame_counts_sizes_and_steps_mix(buckets: int | None) -> None:
    model = wan()
    requests = [
        clip(0, (4, 1, 8, 8), n=2),
        clip(1, (4, 5, 4, 4), steps=5, stochastic=frozenset({0, 1}), trained=(1,)),
        clip(2, (4, 3, 4, 12), guidance=4.0, negative=Conditioning({"prompt_embeds": torch.ones(3, 10)})),
        clip(3, (4, 2, 2, 2), kernel="edm_2ab", noise_level=1.0, steps=6, stochastic=frozenset({0, 2}), trained=(0, 2)),
    ]
    model.buckets = buckets
    engine = Engine(model, PROCESS, 1000)
    together = engine.run(requests)
    assert [tuple(t.latent.shape) for t in together] == [(4, 1, 8, 8), (4, 1, 8, 8), (4, 5, 4, 4), (4, 3, 4, 12), (4, 2, 2, 2)]
    assert together[2].x.shape == (1, 4, 5, 4, 4)
    model.buckets = None
    for t in together:
        alone = Engine(model, PROCESS, 1000).run([replace(t.request, member=t.member, n=1)])[0]
        for name in ("latent", "x", "x_next", "log_prob"):
            torch.testing.assert_close(getattr(t, name), getattr(alone, name), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_one_step_is_the_networks_velocity() -> None:
    model, r = wan(), clip(1, (4, 3, 4, 4), steps=1)
    assert r.conditioning is not None
    x = step_noise(1, 1, 0, INITIAL, r.shape)[None]
    velocity = model(x, torch.ones(1), r.conditioning.prompt_embeds[None])
    assert isinstance(velocity, torch.Tensor)
    torch.testing.assert_close(Engine(model, PROCESS, 1000).run([r])[0].latent, (x - velocity)[0], atol=1e-5, rtol=1e-5)


def test_a_clip_costs_its_latent_tokens() -> None:
    engine = Engine(wan(), PROCESS, 20)
    with pytest.raises(ValueError, match=r"one sample of \(4, 3, 8, 4\) needs 24 tokens"):
        engine.add_request(clip(0, (4, 3, 8, 4)))
    engine.add_request(clip(0, (4, 2, 8, 4)))
