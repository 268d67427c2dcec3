"""Frozen models and tokenizers of transformers, from the component folders of a pipeline: what encoders of conditioning are made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COMPUTED = ("embeddings.position_ids",)
"""Buffers that old files store and today's models compute."""


@dataclass(frozen=True)
class Part:
    """What to read of a folder that holds more than the model that is wanted of it: nothing else is made or read.

    Attributes:
        config: key of the folder's config.json that describes the model.
        others: starts of the names of tensors that are not its own.
        renamed: patterns of names in files, and what they are to the model's class.
    """

    config: str
    others: tuple[str, ...]
    renamed: dict[str, str]


def _library() -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError("text encoders of published policies need transformers: pip install 'ddrl[models]'") from None
    return transformers


def frozen_model(folder: Path, name: str, dtype: torch.dtype, device: torch.device | str, part: Part | None = None) -> Any:
    """The class `name` of transformers from the safetensors of `folder`, or of a `part` of them, frozen. Raises ValueError unless every tensor
    finds its place."""
    transformers = _library()
    loading = transformers.utils.logging
    verbosity = loading.get_verbosity()
    loading.set_verbosity_error()  # what a load leaves out is refused below, in one line
    loading.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        if part is not None:
            options |= {"config": getattr(transformers.AutoConfig.from_pretrained(folder), part.config), "key_mapping": part.renamed}
        model, found = getattr(transformers, name).from_pretrained(folder, **options)
    except Exception as error:  # each kind of damage has its own class, of several libraries
        raise ValueError(f"{folder} cannot be loaded as a {name}: {error}") from None
    finally:
        loading.set_verbosity(verbosity)
    unexpected = [key for key in found["unexpected_keys"] if not key.endswith(COMPUTED) and not (part and key.startswith(part.others))]
    wrong = {"missing": found["missing_keys"], "unexpected": unexpected, "of another shape": found["mismatched_keys"]}
    lists = [f"{len(keys)} {what} ({', '.join(sorted(map(str, keys))[:3])})" for what, keys in wrong.items() if keys]
    if lists:
        raise ValueError(f"weights of {folder} do not fit a {name}: {'; '.join(lists)}")
    return model.eval().requires_grad_(False).to(device)


def load_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer class `name` of transformers from `folder`. Raises ValueError with the folder named."""
    transformers = _library()
    if not (folder / "tokenizer_config.json").exists():
        raise ValueError(f"{folder} holds no tokenizer_config.json; download the folder again")
    try:
        return getattr(transformers, name).from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{folder} cannot be loaded as a {name}: {error}") from None


def padded_ids(tokenizer: Any, prompts: list[str], length: int) -> Tensor:
    """Token ids `[B, length]`, cut and padded."""
    ids: Tensor = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return ids


def load_image_processor(folder: Path) -> Any:
    """CLIP's image processor from `folder`: resized, cropped and normalised as its settings say. Raises ValueError with the folder named."""
    transformers = _library()
    try:
        return transformers.CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{folder} cannot be loaded as a CLIPImageProcessor: {error}") from None
