"""Finding and reading a checkpoint on disk, in any of its three layouts, without running anything that is in it.

    full        checkpoint-N/model.pth, every tensor (what VideoAlign publishes)
    adapter     checkpoint-N/adapter_model.safetensors + non_lora_state_dict.pth, the frozen rest in the base model's folder
    converted   videoalign.json + *.safetensors (what ``convert`` writes)

Pickles are read with ``weights_only`` and memory-mapped. Invariant: what comes out has exactly the tensors of the model,
or ``KeyMismatch`` lists every one that does not fit.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from services.contract import StrictModel
from services.scorers.fingerprint import fingerprint
from services.scorers.videoalign.errors import CheckpointError
from services.scorers.videoalign.layout import EMBEDDING, UNUSED, expected, known_base, require_exact, stock_name, style_of
from services.scorers.videoalign.settings import ModelSettings, read_settings
from services.scorers.videoalign.weights import Weights, sort_out

Layout = Literal["full", "adapter", "converted"]

MANIFEST = "videoalign.json"
FULL = "model.pth"
ADAPTER, REST = "adapter_model.safetensors", "non_lora_state_dict.pth"


class Written(StrictModel):
    """One weights file of a converted folder."""

    bytes: int
    xxh3: str


class Manifest(StrictModel):
    """``videoalign.json`` of a converted folder: everything but tensors, tokenizer and template."""

    format: Literal["ddrl-videoalign"] = "ddrl-videoalign"
    version: Literal[1] = 1
    settings: ModelSettings
    architecture: dict[str, Any] = Field(description="config.json values of the base model.")
    lora: Literal["folded", "beside"] = Field(description="Whether low-rank updates are in the weights or stored beside them.")
    dtype: Literal["float32", "bfloat16"]
    files: dict[str, Written]
    source: dict[str, str | int] = Field(description="Layout, number of tensors and xxh3 of what was converted.")


@dataclass(frozen=True)
class Found:
    """A checkpoint on disk, its settings read, its tensors not yet."""

    layout: Layout
    root: Path
    folder: Path
    settings: ModelSettings
    architecture: Mapping[str, Any]
    files: tuple[Path, ...]
    manifest: Manifest | None = None
    base: Path | None = None


def find(path: Path, checkpoint: int | None = None, base: Path | None = None) -> Found:
    """Recognise the layout under ``path`` and read its settings. Raises ``CheckpointError``."""
    if not path.is_dir():
        raise CheckpointError(f"no folder {path}")
    if (path / MANIFEST).is_file():
        return _find_converted(path)
    folder = _checkpoint_folder(path, checkpoint)
    root = path if (path / "model_config.json").is_file() or folder != path else path.parent
    settings = read_settings(root / "model_config.json")
    if (folder / FULL).is_file():
        layout: Layout = "full"
        files: tuple[Path, ...] = (folder / FULL,)
    elif (folder / ADAPTER).is_file() and (folder / REST).is_file():
        layout, files = "adapter", (folder / ADAPTER, folder / REST, *_base_files(base))
    else:
        raise CheckpointError(f"{folder} holds neither {FULL} nor {ADAPTER} with {REST}")
    return Found(layout, root, folder, settings, _architecture(settings, base), files, base=base)


def read(found: Found, model: Qwen2VLModel) -> Weights:
    """All weights of ``model`` (memory-mapped where the format allows). Raises ``CheckpointError`` or ``KeyMismatch``."""
    scale = found.settings.lora.scale if found.settings.lora else 0.0
    if found.layout == "full":
        tensors = _load_pickle(found.files[0])
        slots = expected(model, found.settings, style_of(tensors))
        require_exact(str(found.files[0]), slots, tensors)
    elif found.layout == "adapter":
        tensors = {**_load_adapter(found.files[0]), **_load_pickle(found.files[1])}
        slots = expected(model, found.settings, style_of(tensors))
        where = str(found.folder) + ("" if found.base else " (an adapter checkpoint: set `base` to the folder of its base model)")
        tensors = {**_from_base(found, {source: slot.name for source, slot in slots.items() if slot.role == "weight"}, model), **tensors}
        slots = {source: slot for source, slot in slots.items() if slot.role != "unused" or source in tensors}
        require_exact(where, slots, tensors)
    else:
        assert found.manifest is not None
        _verify(found)
        tensors = {name: tensor for file in found.files for name, tensor in _load_safetensors(file).items()}
        slots = expected(model, found.settings, "plain", lora=found.manifest.lora == "beside")
        require_exact(str(found.folder), slots, tensors)
    return sort_out(slots, tensors, scale, tied=bool(found.architecture.get("tie_word_embeddings", False)))


def _find_converted(path: Path) -> Found:
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{path / MANIFEST} is not a manifest this version reads: {error}") from error
    files = tuple(path / name for name in manifest.files)
    if any(file.parent != path for file in files):
        raise CheckpointError(f"{path / MANIFEST} names files outside its folder")
    return Found("converted", path, path, manifest.settings, manifest.architecture, files, manifest)


def _verify(found: Found) -> None:
    assert found.manifest is not None
    for file, written in zip(found.files, found.manifest.files.values(), strict=True):
        if not file.is_file() or file.stat().st_size != written.bytes or fingerprint(file) != written.xxh3:
            raise CheckpointError(f"{file} is missing or damaged; convert the checkpoint again")


def _checkpoint_folder(path: Path, checkpoint: int | None) -> Path:
    numbered = {int(child.name.removeprefix("checkpoint-")): child for child in path.glob("checkpoint-*") if child.name.removeprefix("checkpoint-").isdigit()}
    if checkpoint is not None and checkpoint not in numbered:
        raise CheckpointError(f"{path} has no checkpoint-{checkpoint}, only {', '.join(map(str, sorted(numbered))) or 'none'}")
    if numbered:
        return numbered[max(numbered) if checkpoint is None else checkpoint]
    return path


def _architecture(settings: ModelSettings, base: Path | None) -> Mapping[str, Any]:
    if base is not None:
        try:
            values: Any = json.loads((base / "config.json").read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{base} holds no readable config.json: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{base / 'config.json'} is not a model's configuration")
        return values
    known = known_base(settings.base)
    if known is None:
        raise CheckpointError(f"the checkpoint's base model {settings.base!r} is not known here; set `base` to a folder with its config.json")
    return known


def _base_files(base: Path | None) -> tuple[Path, ...]:
    return () if base is None else tuple(sorted(base.glob("*.safetensors")))


def _load_pickle(file: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{file} is not a plain torch file of tensors: {str(error).splitlines()[0]}") from error
    if not isinstance(content, Mapping) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise CheckpointError(f"{file} is not a mapping of names to tensors")
    return dict(content)


def _load_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from error


def _load_adapter(file: Path) -> dict[str, Tensor]:
    """peft saves its only adapter without the name that the full layout carries."""
    names = (("lora_A.weight", "lora_A.default.weight"), ("lora_B.weight", "lora_B.default.weight"))
    tensors = {}
    for name, tensor in _load_safetensors(file).items():
        for short, long in names:
            name = name.removesuffix(short) + long if name.endswith(short) else name
        tensors[name] = tensor
    return tensors


def _from_base(found: Found, places: Mapping[str, str], model: Qwen2VLModel) -> dict[str, Tensor]:
    """The base model's tensors under the names of the checkpoint; its embedding is cut to the checkpoint's vocabulary."""
    source_of = {stock: source for source, stock in places.items()}
    tensors: dict[str, Tensor] = {}
    for file in found.files[2:]:
        for name, tensor in _load_safetensors(file).items():
            stock = stock_name(name)
            if stock == UNUSED:
                continue
            if stock == EMBEDDING:
                tensor = tensor[: model.language_model.config.vocab_size]
            # An unknown name stays as it is and is listed as unexpected.
            tensors[source_of.get(stock, name)] = tensor
    return tensors
