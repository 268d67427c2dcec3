"""Ratios against a float64 reference, over the whole grid of the public sampler: noise levels from 200 down to 0.01."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusion.engine.forward import Rows
from diffusion.engine.request import SampleRequest, Trajectory
from diffusion.engine.sequence import Context, Path, Sequence
from diffusion.engine.transition import advance
from diffusion.families.conditioning import Conditioning
from diffusion.kernels import StepKernel, make_kernel
from diffusion.kernels.edm import EDM2AB
from diffusion.processes import RectifiedFlow
from trainer.config.objective import ObjectiveConfig
from trainer.learn.objective import Transitions, policy_terms

STEPS, TRAINED, SHAPE = 21, 19, (3, 8, 8)
CPU = torch.device("cpu")


def sampled(kernel: StepKernel, name: str) -> tuple[Trajectory, Tensor]:
    """A trajectory made by the engine's own step from given predictions, and those predictions."""
    generator = torch.Generator().manual_seed(5)
    text = Conditioning({"prompt_embeds": torch.zeros(1, 1)})
    request = SampleRequest(SHAPE, STEPS, conditioning=text, kernel=name, noise_level=5.0, stochastic=frozenset(range(TRAINED)), trained=tuple(range(TRAINED)))
    path = Path(kernel, kernel.time_grid(STEPS))
    sequence = Sequence.start(Context(request, path, text, None, 1), range(1), CPU)
    predictions = torch.randn(STEPS, *SHAPE, generator=generator)
    for prediction in predictions:
        advance(Rows.of(path, [sequence], CPU), prediction[None], 0)
    return sequence.trajectory(), predictions[:TRAINED]


def squares(kernel: StepKernel, batch: Transitions, prediction: Tensor) -> Tensor:
    """Mean squared distance of the stored states from the step's mean `[M]`, from the formulas alone, in float64."""
    wide = (-1, 1, 1, 1)
    sigma = batch.t.double().reshape(wide)
    node = batch.t_next.double() / (1 + min(5.0 / STEPS, 1.2**0.5 - 1))
    node = torch.where(batch.t_next > 0.010001, node, batch.t_next.double())
    x0 = (batch.x.double() - sigma * prediction.double()) / (1 + sigma)
    if isinstance(kernel, EDM2AB):
        assert batch.previous is not None
        assert batch.t_previous is not None
        of_x, of_x0, of_older = (w.reshape(wide) for w in kernel.weights(batch.t, node, batch.t_previous))
        mean = of_x * batch.x.double() + of_x0 * x0 + of_older * batch.previous.double()
    else:
        shrink = node.reshape(wide) / sigma
        mean = shrink * batch.x.double() + (1 - shrink) * x0
    return (batch.x_next.double() - mean).square().flatten(1).mean(1)


@pytest.mark.parametrize("name", ["edm_2ab", "edm_euler"])
def test_unscaled_ratios_are_exact_where_the_noise_is_large(name: str) -> None:
    """exp(-(new - old squared error)); from two fp32 densities it moves in jumps of 2e-3 at std 47."""
    kernel = make_kernel(name, RectifiedFlow(1.0), 5.0, STEPS)
    done, drawn = sampled(kernel, name)
    step = torch.arange(TRAINED)
    batch = Transitions(
        x=done.x,
        x_next=done.x_next,
        t=done.times[:TRAINED],
        t_next=done.times[1 : TRAINED + 1],
        step=step,
        old_log_prob=done.log_prob,
        advantage=torch.ones(TRAINED),
        weight=torch.ones(TRAINED),
        text=torch.zeros(TRAINED, dtype=torch.int64),
        previous=done.previous,
        t_previous=torch.where(step > 0, done.times[(step - 1).clamp_min(0)], torch.inf) if done.previous is not None else None,
    )
    config = ObjectiveConfig(preset="dance_grpo", log_prob="unscaled", clip=1e-3)
    moved = drawn + 1e-3 * torch.randn(drawn.shape, generator=torch.Generator().manual_seed(6))
    for prediction in (drawn, moved):
        expected = (squares(kernel, batch, drawn) - squares(kernel, batch, prediction)).exp()
        found = policy_terms(prediction, None, batch, kernel, config)[1]["ratio_deviation_rows"]
        assert float((found - (expected - 1).abs()).abs().max()) <= 1e-5
