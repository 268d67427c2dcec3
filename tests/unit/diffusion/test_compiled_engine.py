"""The engine on a compiled network: same samples, few compilations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from diffusion.engine.engine import Engine
from diffusion.engine.request import SampleRequest
from diffusion.engine.runner import RUNGS, compile_for_batches
from diffusion.families.conditioning import Conditioning
from diffusion.families.sd3.network import SD3Transformer
from diffusion.processes import RectifiedFlow


def requests(n: int) -> list[SampleRequest]:
    g = torch.Generator().manual_seed(0)
    text = Conditioning({"prompt_embeds": torch.randn(5, 12, generator=g), "pooled": torch.randn(6, generator=g)})
    return [SampleRequest((3, 4 + 4 * (i % 2), 8), 2 + i % 3, conditioning=text, member=i, guidance=1.0 + i % 2, negative=text) for i in range(n)]


@pytest.mark.long
def test_a_compiled_network_draws_the_same_samples(tiny_model: Callable[..., SD3Transformer]) -> None:
    plain = Engine(tiny_model(), RectifiedFlow(2.0), 10_000).run(requests(9))
    model = tiny_model()
    compile_for_batches(model)
    engine = Engine(model, RectifiedFlow(2.0), 10_000)
    assert f"{RUNGS} buckets an octave" in engine.runner.describe()
    for a, b in zip(engine.run(requests(9)), plain, strict=True):
        torch.testing.assert_close(a.latent, b.latent, atol=1e-5, rtol=1e-4)
