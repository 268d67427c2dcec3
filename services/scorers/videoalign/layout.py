"""Names and shapes: which tensors a checkpoint must hold, and which weight of the stock Qwen2-VL each one is.

Three naming styles hold the same tensors. ``old`` is what VideoAlign publishes (transformers before 4.52), ``new`` what
its trainer writes under a later transformers, ``plain`` what ``convert`` writes:

    old     base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight
    new     base_model.model.model.language_model.layers.0.self_attn.q_proj.base_layer.weight
    plain   language_model.layers.0.self_attn.q_proj.weight

Invariant: ``expected`` names every tensor of a style, each with the place it goes; a checkpoint fits when its names and
shapes are equal to that, no more and no less. The public checkpoint has 1123 (28 layers, 196 low-rank updates).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from services.scorers.videoalign.errors import CheckpointError, KeyMismatch
from services.scorers.videoalign.settings import ModelSettings

Style = Literal["old", "new", "plain"]
Role = Literal["weight", "lora_a", "lora_b", "head", "unused"]

PEFT_PREFIX = "base_model.model."
HEAD = "rm_head.weight"
UNUSED = "lm_head.weight"
EMBEDDING = "language_model.embed_tokens.weight"

# The config.json values of Qwen/Qwen2-VL-2B-Instruct that shape its weights and its arithmetic.
QWEN2_VL_2B: dict[str, Any] = {
    "model_type": "qwen2_vl",
    "tie_word_embeddings": True,
    "text_config": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "num_heads": 16,
        "hidden_size": 1536,
        "mlp_ratio": 4,
        "hidden_act": "quick_gelu",
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
KNOWN_BASES = {"Qwen2-VL-2B-Instruct": QWEN2_VL_2B, "Qwen2-VL-2B": QWEN2_VL_2B}


@dataclass(frozen=True)
class Slot:
    """Where a source tensor goes. ``name`` is the stock parameter; for a low-rank factor the one it updates."""

    role: Role
    name: str
    shape: tuple[int, ...]


def known_base(name: str) -> dict[str, Any] | None:
    """Architecture of a base model by its published name or a path that ends in it; None if it is not known here."""
    return KNOWN_BASES.get(name.rstrip("/").split("/")[-1])


def empty_model(architecture: Mapping[str, Any], vocabulary: int) -> Qwen2VLModel:
    """The stock Qwen2-VL without weights (meta device), its embedding cut to ``vocabulary`` rows. Raises ``CheckpointError``."""
    if architecture.get("model_type") != "qwen2_vl":
        raise CheckpointError(f"the base model is a {architecture.get('model_type')!r}; VideoAlign is a qwen2_vl")
    config = Qwen2VLConfig.from_dict(copy.deepcopy(dict(architecture)), attn_implementation="sdpa")
    text: Any = config.text_config
    text.vocab_size, text.pad_token_id = vocabulary, None
    with torch.device("meta"):
        return Qwen2VLModel(config)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def updated_layers(model: Qwen2VLModel, settings: ModelSettings) -> list[str]:
    """Stock names of the linear layers with a low-rank update, by VideoAlign's rule on the old dotted names."""
    if settings.lora is None:
        return []
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not any(word in _old(name) for word in settings.lora.exclude):
            if isinstance(module, nn.Embedding):
                raise CheckpointError(f"the checkpoint has a low-rank update of the embedding {name}, which this scorer does not compute")
            names.append(name)
    free_heads = [head for head in ("lm_head", "rm_head") if not any(word in head for word in settings.lora.exclude)]
    if free_heads:
        raise CheckpointError(f"the checkpoint has a low-rank update of {', '.join(free_heads)}, which this scorer does not compute")
    return names[-settings.lora.last :] if settings.lora.last > 0 else names


def expected(model: Qwen2VLModel, settings: ModelSettings, style: Style, lora: bool = True) -> dict[str, Slot]:
    """Every source name of ``style`` with its slot. ``lora=False``: the updates are already in the weights."""
    shapes = shapes_of(model)
    plain = style == "plain"
    updated = set(updated_layers(model, settings)) if lora else set()
    prefix = PEFT_PREFIX if settings.lora is not None and not plain else ""
    rename: Callable[[str], str] = {"old": _old, "new": _new, "plain": _plain}[style]
    slots: dict[str, Slot] = {}
    for name, shape in shapes.items():
        layer, _, leaf = name.rpartition(".")
        inner = f"{rename(layer)}.base_layer.{leaf}" if layer in updated and not plain else rename(name)
        slots[prefix + inner] = Slot("weight", name, shape)
        if layer in updated and leaf == "weight" and settings.lora is not None:
            rank, infix = settings.lora.rank, "" if plain else "default."
            slots[f"{prefix}{rename(layer)}.lora_A.{infix}weight"] = Slot("lora_a", name, (rank, shape[1]))
            slots[f"{prefix}{rename(layer)}.lora_B.{infix}weight"] = Slot("lora_b", name, (shape[0], rank))
    hidden = model.language_model.config.hidden_size
    slots[prefix + HEAD] = Slot("head", HEAD, (settings.head_dim, hidden))
    if not plain:
        slots[prefix + UNUSED] = Slot("unused", UNUSED, shapes[EMBEDDING])
    return slots


def style_of(names: Iterable[str]) -> Style:
    """Old or new naming, by the language model's prefix."""
    return "new" if any(".language_model." in name or name.startswith("model.language_model.") for name in names) else "old"


def require_exact(where: str, slots: Mapping[str, Slot], tensors: Mapping[str, Tensor]) -> None:
    """Raise ``KeyMismatch`` unless ``tensors`` has exactly the names and shapes of ``slots``."""
    shared = slots.keys() & tensors.keys()
    wrong = [f"{n}: {list(tensors[n].shape)}, expected {list(slots[n].shape)}" for n in shared if tuple(tensors[n].shape) != slots[n].shape]
    missing, unexpected = slots.keys() - tensors.keys(), tensors.keys() - slots.keys()
    if missing or unexpected or wrong:
        raise KeyMismatch(where, list(missing), list(unexpected), wrong)


def stock_name(name: str) -> str:
    """The stock parameter that a published base model's tensor is, in old or new naming: the inverse of both."""
    for start, becomes in (("model.visual.", "visual."), ("model.language_model.", "language_model."), ("model.", "language_model.")):
        if name.startswith(start):
            return becomes + name.removeprefix(start)
    return name


def _old(name: str) -> str:
    return "model." + name.removeprefix("language_model.") if name.startswith("language_model.") else name


def _plain(name: str) -> str:
    return name


def _new(name: str) -> str:
    return "model." + name
