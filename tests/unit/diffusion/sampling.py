"""Requests for the tests of the engine, and how two trajectories are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion.engine.engine import Engine
from diffusion.engine.request import Failure, SampleRequest, Trajectory
from diffusion.families.conditioning import Conditioning
from diffusion.families.sd3.network import SD3Transformer
from diffusion.kernel_names import stochastic_steps
from diffusion.processes import RectifiedFlow

Build = Callable[..., SD3Transformer]
PROCESS = RectifiedFlow(2.0)
KERNELS = ["flow_sde", "constant_sde", "cps", "ddim_eta", "edm_euler", "edm_2ab", "ancestral"]
PLENTY = 10_000


def conditioning(number: int, length: int = 5) -> Conditioning:
    """An encoded prompt of its own for each number."""
    g = torch.Generator().manual_seed(number)
    return Conditioning({"prompt_embeds": torch.randn(length, 12, generator=g), "pooled": torch.randn(6, generator=g)})


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
    return r.conditioning.prompt_embeds[None], r.conditioning.tensors["pooled"][None]


def stepped(engine: Engine) -> list[Trajectory]:
    """One step; nothing may fail."""
    done = engine.step()
    assert not any(isinstance(one, Failure) for one in done)
    return [one for one in done if isinstance(one, Trajectory)]
