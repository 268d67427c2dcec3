"""From settings to a model that can score: find the files, fold, fill the stock model, and say which weights these are."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from services.scorers.fingerprint import fingerprint
from services.scorers.videoalign.checkpoint import Found, find, read
from services.scorers.videoalign.config import VideoAlignConfig
from services.scorers.videoalign.errors import CheckpointError
from services.scorers.videoalign.layout import empty_model, updated_layers
from services.scorers.videoalign.model import LoraLinear, RewardModel
from services.scorers.videoalign.rotary import fill_rotary
from services.scorers.videoalign.settings import ModelSettings
from services.scorers.videoalign.template import FILE_NAMES, read_template
from services.scorers.videoalign.tokens import RewardTokenizer
from services.scorers.videoalign.weights import Weights, folded, unfolded

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Loaded:
    """A model ready to score. ``identity`` names weights, tokenizer and precision: equal identities, equal numbers."""

    model: RewardModel
    tokenizer: RewardTokenizer
    settings: ModelSettings
    device: torch.device
    identity: str


def load(config: VideoAlignConfig) -> Loaded:
    """Load what ``config`` names onto its device. Raises ``CheckpointError`` when anything is missing or does not fit."""
    found = find(config.path, config.checkpoint, config.base)
    template = read_template(template_file(found, config.template), config.template_sha256)
    token_file = tokenizer_file(found, config.tokenizer)
    tokenizer = RewardTokenizer(token_file, template)
    device = torch.device(config.device)
    dtype = DTYPES[config.dtype] if config.dtype != "auto" else torch.float32 if device.type == "cpu" else torch.bfloat16
    fold = config.fold_lora or found.settings.lora is None
    qwen = empty_model(found.architecture, tokenizer.size)
    weights = read(found, qwen)
    if not fold and not weights.lora_a:
        raise CheckpointError(f"{found.folder} was converted with its updates folded; convert it with fold=False, or set fold_lora: true")
    model = fill(qwen, weights, found.settings, tokenizer, dtype, fold=fold)
    fill_rotary(qwen, rounded=config.rotary == "bfloat16")
    hollow = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if hollow:
        raise CheckpointError(f"this version of transformers has tensors that the loader does not fill: {', '.join(hollow)}")
    model.requires_grad_(False).to(device).eval()
    marks = (
        f"weights-{fingerprint(*found.files)}",
        f"tokenizer-{fingerprint(token_file)}",
        str(dtype).removeprefix("torch."),
        f"rotary-{config.rotary}",
        "no-lora" if found.settings.lora is None else "lora-folded" if fold else "lora-beside",
        device.type,
    )
    logger.info("VideoAlign from %s (%s layout, %d tensors)", found.folder, found.layout, weights.tensors_read)
    return Loaded(model, tokenizer, found.settings, device, ";".join(marks))


def fill(qwen: Qwen2VLModel, weights: Weights, settings: ModelSettings, tokenizer: RewardTokenizer, dtype: torch.dtype, *, fold: bool) -> RewardModel:
    """Give the empty stock model its weights; every tensor of the model is filled and every weight used, or torch raises."""
    if not fold and settings.lora is not None:
        for name in updated_layers(qwen, settings):
            parent, _, leaf = name.rpartition(".")
            layer = qwen.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            setattr(qwen.get_submodule(parent), leaf, LoraLinear(layer, settings.lora.rank, settings.lora.scale))
    model = RewardModel(qwen, settings.head_dim, tokenizer.video_id, tokenizer.reward_ids)
    tensors = folded(weights, dtype) if fold else unfolded(weights, dtype)
    updated = set() if fold else {name.removesuffix(".weight") for name in weights.lora_a}
    state = {_inner(name, updated): tensor for name, tensor in tensors}
    model.load_state_dict(state, strict=True, assign=True)
    return model


def tokenizer_file(found: Found, given: Path | None) -> Path:
    """tokenizer.json: the one given, else beside the checkpoint, else the base model's."""
    places = [given] if given else [found.folder / "tokenizer", found.folder, found.root / "tokenizer", found.root, *([found.base] if found.base else [])]
    candidates = [place / TOKENIZER if place.is_dir() else place for place in places]
    return _first(candidates, f"no {TOKENIZER}", "set `tokenizer` to the base model's")


def template_file(found: Found, given: Path | None) -> Path:
    """The prompt template: the one given, else prompt_template.txt or .py beside the checkpoint."""
    candidates = [given] if given else [found.root / name for name in FILE_NAMES]
    return _first(candidates, "no prompt template", "set `template` to VideoAlign's prompt_template.py")


def _first(candidates: list[Path], what: str, advice: str) -> Path:
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise CheckpointError(f"{what} at {', '.join(map(str, candidates))}; {advice} (docs/rewards/videoalign.md)")


def _inner(name: str, updated: set[str]) -> str:
    """A stock name as the reward model calls it."""
    layer, _, leaf = name.rpartition(".")
    if name.startswith("rm_head."):
        return name
    return f"qwen.{layer}.base_layer.{leaf}" if layer in updated else f"qwen.{name}"
