"""A stock model of transformers from local tensors, all of the one in all of the other, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.utils import logging

from services.scorers.clip.errors import ModelFolderError

# Buffers that old checkpoints store and today's models compute.
_COMPUTED = ("embeddings.position_ids",)


def stock_model(name: str, folder: Path, config: Any, dtype: str, device: str, state: Mapping[str, Tensor] | None = None, **more: Any) -> Any:
    """The class ``name`` of transformers, ready to score, from the safetensors of ``folder`` or from ``state`` in their place.

    Nothing is downloaded, no code of the folder runs, no pickle is read. Raises ``ModelFolderError``.
    """
    quiet: Any = logging
    quiet.set_verbosity_error()  # process-wide: what a load leaves out is refused below, in one line
    quiet.disable_progress_bar()
    options: dict[str, Any] = {"config": config, "dtype": getattr(torch, dtype), "local_files_only": True, **more}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if state is None:
        options["use_safetensors"] = True
    else:
        options["state_dict"] = dict(state)
    try:
        model, found = getattr(transformers, name).from_pretrained(folder if state is None else None, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelFolderError(f"{folder} cannot be loaded as a {name}: {error}") from error
    _require_complete(folder, found)
    return model.eval().requires_grad_(False).to(device)


def _require_complete(folder: Path, found: Mapping[str, Any]) -> None:
    """Refuse a load that left tensors of the model to chance or tensors of the files unused."""
    unexpected = [key for key in found["unexpected_keys"] if not key.endswith(_COMPUTED)]
    wrong = {"missing": found["missing_keys"], "unexpected": unexpected, "of the wrong shape": found["mismatched_keys"]}
    lists = [f"{len(keys)} {what} ({', '.join(sorted(map(str, keys))[:8])})" for what, keys in wrong.items() if keys]
    if lists:
        raise ModelFolderError(f"{folder} does not hold exactly the tensors of this model: {'; '.join(lists)}")
