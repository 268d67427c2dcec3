"""The optimisers: torch's AdamW, and one whose moments take two bytes a value.

Both moments of `AdamW8bit` are held in codes of 8 bits, one scale for 256 values of a row (`trainer.config.learner.scales`); small parameters
keep them in fp32. The codes are those of dynamic quantisation (Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization, arXiv
2110.02861, §1.3): a table of 256 numbers from -1 (or 0) to 1, dense where moments lie. A step computes in fp32: moments are decoded,
updated, used, and encoded again.

Invariant: codes and scales are plain tensors, cut like their parameter. So a checkpoint is as any other, loads on another number of ranks,
and what a step makes of a value does not depend on how many there are. A worked example: a block whose largest moment is 0.5 has the scale
0.5, and a moment of 0.4 the code whose number is nearest to 0.8, some 0.7 % off.

Why not a library: bitsandbytes has no DTensor support (its issues 89 and 1633), and torchao 0.18 cuts blocks through rows, so that its
state loads only where they happen to line up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainer.config.learner import BLOCK, OptimizerConfig, scales

TINY = 1e-30
"""Least scale of a block, so that one of zeros divides by no zero."""
CODES = ("exp_avg", "exp_avg_sq")


def make_optimizer(config: OptimizerConfig, parameters: Iterable[Tensor]) -> Optimizer:
    """The optimiser of `optimizer.kind`."""
    if config.kind == "adamw8bit":
        return AdamW8bit(parameters, config)
    return torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)


@cache
def table(signed: bool, device: torch.device) -> Tensor:
    """The 256 numbers of dynamic quantisation, ascending fp32 `[256]`: zero, one, and in each of seven decades the middles of equal parts of
    [0.1, 1], twice as many as in the decade below."""
    numbers = [0.0, 1.0]
    for decade in range(7):
        parts = 2 ** (decade if signed else decade + 1)
        middles = [10.0 ** (decade - 6) * (0.1 + 0.9 * (i + 0.5) / parts) for i in range(parts)]
        numbers += middles + [-m for m in middles if signed]
    return torch.tensor(sorted(numbers), device=device)


def encode(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes, uint8 like `values`, and the scales of its blocks `[rows, blocks]`; rows along the first dimension."""
    known = table(signed, values.device)
    row = values.flatten(1).shape[1]
    blocks = F.pad(values.flatten(1), (0, -row % BLOCK)).unflatten(1, (-(-row // BLOCK), BLOCK))
    scale = blocks.abs().amax(-1)
    codes = torch.bucketize(blocks / scale.clamp_min(TINY)[..., None], (known[1:] + known[:-1]) / 2, out_int32=True)
    return codes.to(torch.uint8).flatten(1)[:, :row].reshape(values.shape), scale


def decode(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The values of codes, fp32 like `codes`."""
    row = codes.flatten(1).shape[1]
    values = table(signed, codes.device)[codes.flatten(1).int()]
    return (values * scale.repeat_interleave(BLOCK, 1)[:, :row]).reshape(codes.shape)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class AdamW8bit(Optimizer):
    """See the module's docstring. State of a parameter: `step`, `exp_avg`, `exp_avg_sq`, and where these are codes their scales
    `exp_avg_scale`, `exp_avg_sq_scale`.

    Args:
        parameters: fp32; DTensors may be cut along the first dimension only, as FSDP2 does.
    """

    def __init__(self, parameters: Iterable[Tensor], config: OptimizerConfig) -> None:
        super().__init__(parameters, {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay})

    def _fresh(self, parameter: Tensor) -> dict[str, Tensor]:
        """Moments of zero."""
        state, coded = {"step": torch.tensor(0.0)}, scales(parameter.shape) is not None
        for name in CODES:
            if not coded:
                state[name] = torch.zeros_like(parameter)
                continue
            zero = int((table(name == "exp_avg", torch.device("cpu")) == 0).nonzero())
            state[name] = torch.full_like(parameter, zero, dtype=torch.uint8)
            every = parameter.detach().flatten(1)[:, ::BLOCK]  # one value a block, cut like the parameter
            state[f"{name}_scale"] = torch.zeros_like(every, memory_format=torch.contiguous_format)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One AdamW step (decoupled weight decay, bias correction), as torch's."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter] = self.state[parameter] or self._fresh(parameter)
                    _update({n: _local(t) for n, t in self.state[parameter].items()}, _local(parameter), _local(parameter.grad), group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would turn codes into the type of the parameters."""
        own = list(chain.from_iterable(g["params"] for g in self.param_groups))
        saved = list(chain.from_iterable(g["params"] for g in state_dict["param_groups"]))
        states = state_dict["state"]
        coded = {k: [n for n, t in s.items() if isinstance(t, Tensor) and t.dtype == torch.uint8] for k, s in states.items()}
        kept = {k: {n: t for n, t in s.items() if n not in coded[k]} for k, s in states.items()}
        super().load_state_dict({**state_dict, "state": kept})
        for parameter, key in zip(own, saved, strict=True):
            for name in coded.get(key, ()):  # in the same order on all ranks, who may gather them one by one
                self.state[parameter][name] = states[key][name].to(parameter.device)


def _update(state: dict[str, Tensor], weights: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
    """One parameter's shard, in place."""
    state["step"] += 1
    step, lr, (beta1, beta2) = float(state["step"]), float(group["lr"]), group["betas"]
    coded = "exp_avg_scale" in state
    mean, square = (decode(state[n], state[f"{n}_scale"], n == "exp_avg") if coded else state[n] for n in CODES)
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    weights.mul_(1 - lr * group["weight_decay"])
    weights.addcdiv_(mean, (square.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"]), value=-lr / (1 - beta1**step))
    if coded:
        for name, values in zip(CODES, (mean, square), strict=True):
            codes, scale = encode(values, name == "exp_avg")
            state[name].copy_(codes)
            state[f"{name}_scale"].copy_(scale)
