"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of a packed network.

A wrapped layer computes W x + b + (alpha / r) B A x with W, b frozen and A `[r, in]`, B `[out, r]` trained; B starts at zero, so
a fresh adapter changes nothing. Parameter names are those of peft without an adapter's name (`….to_q.lora_A.weight`), which
is how diffusers stores LoRA weights.

For sampling an adapter can be *merged*: W + (alpha / r) B A in W's place, one product a layer instead of three. That rounds
differently from the two products that the learner trains, so merged rollouts need `objective.old_log_prob: learner`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from diffusion.config import LoRAConfig

WEIGHTS = "pytorch_lora_weights.safetensors"
"""File name of an adapter in diffusers' layout."""
PREFIX = "transformer."
"""What diffusers puts before the network's own parameter names in that file."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Projections of attention, of both streams; a network has some of them."""
TARGETS = {"attention": ATTENTION, "flow_grpo": tuple(f"attn.{name}" for name in ATTENTION)}
"""Published sets of layers, by name; see `LoRAConfig.targets`. Of SD3.5-medium at rank 32: 243 layers with 23.9 M parameters,
and 191 with 18.8 M, which leave out its second attention `attn2`."""


class LoRALinear(nn.Linear):
    """A linear layer with an adapter. Takes over the layer's own parameters, and so their names.

    Args:
        layer: the layer to wrap.
        rank, alpha: r and alpha.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        where: dict[str, Any] = {"device": layer.weight.device, "dtype": torch.float32}  # trained, also beside a bf16 base
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, **where)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, **where)
        self.scale, self.active, self.merged = alpha / rank, True, False
        self._other: Tensor | None = None  # once merged: W while the adapter is in `weight`, what they make together while it is not

    def fresh(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """First values of A and B: A uniform as in peft (Kaiming with a = √5: bound 1/√in), B zero. Drawn on the CPU."""
        bound = self.in_features**-0.5
        return torch.empty(self.lora_A.weight.shape).uniform_(-bound, bound, generator=generator), torch.zeros(self.lora_B.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        if self.merged or not self.active:
            return out
        if not torch.is_autocast_enabled(x.device.type):  # which casts by itself; a cast before it would keep one more copy of x
            x = x.to(self.lora_A.weight.dtype)
        low: Tensor = self.lora_B(self.lora_A(x))
        return out + (self.scale * low).to(out.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Take the adapter as it is now into the weight; again after the adapter changed."""
        if self._other is None:
            self._other, self.merged = self.weight.detach().clone(), True
        self.weight.copy_(self._other + self.scale * self.lora_B.weight @ self.lora_A.weight)

    def turn(self) -> None:
        """Exchange what is merged and W, by pointer; again, and it is as before. Nothing where nothing was merged."""
        if self._other is not None:
            self._other, self.weight.data = self.weight.data, self._other
            self.merged = not self.merged


def _layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def fresh_adapters(model: nn.Module, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """First values of every adapter's parameters by their names, a layer at a time, drawn in the order of the layers' names."""
    for name, layer in sorted(_layers(model).items()):
        for part, values in zip(("lora_A", "lora_B"), layer.fresh(generator), strict=True):
            yield f"{name}.{part}.weight", values


def add_lora(model: nn.Module, config: LoRAConfig, generator: torch.Generator | None) -> None:
    """Wrap the linear layers whose name ends with one of `config.targets` (of a set of `TARGETS`: those that the network has),
    and freeze everything but the adapters.

    Args:
        generator: CPU generator of the first values; None leaves them undefined.
    Raises:
        ValueError: a target that names no linear layer; nothing has changed then.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    named = isinstance(config.targets, str)
    targets = TARGETS[config.targets] if isinstance(config.targets, str) else config.targets
    chosen = {target: [n for n in linear if n == target or n.endswith("." + target)] for target in targets}
    unknown = [target for target, names in chosen.items() if not names]
    if unknown and (not named or len(unknown) == len(targets)):
        ends = sorted({".".join(n.split(".")[-2:]) for n in linear})
        raise ValueError(f"model.lora.targets names no linear layer: {', '.join(unknown)}; layers end with {', '.join(ends)}")
    model.requires_grad_(False)
    for name in sorted({n for names in chosen.values() for n in names}):
        parent, _, last = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(model.get_submodule(parent), last, LoRALinear(layer, config.rank, config.alpha))
    if generator is not None:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, values in fresh_adapters(model, generator):
                parameters[name].copy_(values)


def trained_weights(model: nn.Module, keep_vars: bool = False) -> dict[str, Tensor]:
    """What training changes and publishes: the adapter's parameters, or the whole state dict of a model without one.
    `keep_vars`: the parameters themselves, as of `state_dict`."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=keep_vars)
    layers = _layers(model)
    if not layers:
        return state
    return {f"{name}.{part}.weight": state[f"{name}.{part}.weight"] for name in layers for part in ("lora_A", "lora_B")}


def merge_lora(model: nn.Module) -> None:
    """Merge every adapter of `model` into its layer, for sampling."""
    for layer in _layers(model).values():
        layer.merge()


@contextmanager
def unmerged_lora(model: nn.Module) -> Iterator[None]:
    """The network with its adapters beside their layers, as they are trained; nothing is copied. `merge_lora` must wait until it ends."""
    layers = _layers(model).values()
    for layer in layers:
        layer.turn()
    try:
        yield
    finally:
        for layer in layers:
            layer.turn()


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """The network without its adapters: the policy that training started from."""
    layers = _layers(model).values()
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


def adapter_bytes(state: dict[str, Tensor], config: LoRAConfig) -> bytes:
    """The adapter of a whole state dict as a file that diffusers' `load_lora_weights` reads: safetensors with the adapter's
    settings as metadata."""
    layers = sorted(n.removesuffix(".lora_A.weight") for n in state if n.endswith(".lora_A.weight"))
    settings = {"r": config.rank, "lora_alpha": config.alpha, "target_modules": layers}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps({PREFIX + key: value for key, value in settings.items()})}
    data: bytes = save({PREFIX + n: t.detach().cpu().contiguous() for n, t in state.items() if ".lora_" in n}, metadata=metadata)
    return data


def merged_state(state: dict[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """Whole state dict with adapters to the state dict of the plain network that computes the same."""
    return {name: merged_weight(name, tensor, state, config) for name, tensor in state.items() if ".lora_" not in name}


def merged_weight(name: str, weight: Tensor, adapter: Mapping[str, Tensor], config: LoRAConfig) -> Tensor:
    """A tensor of the plain network by its name, with its adapter merged if it has one; in its own type."""
    layer = name.removesuffix(".weight")
    a = adapter.get(f"{layer}.lora_A.weight")
    if a is None or layer == name:
        return weight
    product = adapter[f"{layer}.lora_B.weight"].float() @ a.float()
    return (weight + config.alpha / config.rank * product).to(weight.dtype)
