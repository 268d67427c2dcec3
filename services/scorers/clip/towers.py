"""A CLIP model of two towers from a local folder: pictures and prompts in, unit vectors of one space out.

Lifecycle: load (every tensor of the model comes from the files and every tensor of the files is used, or
``ModelFolderError``) → ``pictures`` and ``prompts`` for ever. Nothing is downloaded, no code of the folder is run, no
torchvision is needed. Prompts are padded to the tower's full length: its attention is causal and its answer is read at
the first end token, so padding changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPConfig

from services.media.base import Image
from services.scorers.clip.errors import ModelFolderError
from services.scorers.clip.loading import stock_model
from services.scorers.clip.preparation import Preparation
from services.scorers.clip.tokens import PromptTokenizer

END_TOKEN = "<|endoftext|>"


class Towers:
    """Both towers of a ``CLIPModel`` with their projections; embeddings are float32, unit length."""

    def __init__(self, model: Any, preparation: Preparation, tokenizer: PromptTokenizer) -> None:
        self._model, self.preparation, self._tokenizer = model, preparation, tokenizer
        side = model.config.vision_config.image_size
        if preparation.size != side:
            raise ModelFolderError(f"pictures are prepared at {preparation.size} pixels, the vision tower takes {side}")

    @property
    def logit_scale(self) -> float:
        """The model's own factor of the cosine, about 100."""
        return float(self._model.logit_scale.detach().float().exp())

    @property
    def width(self) -> int:
        """Length of an embedding."""
        return int(self._model.config.projection_dim)

    def tokens(self, prompt: str) -> Any:
        """Ids of a prompt or a ``ScoreFailure``; see ``PromptTokenizer.encode``."""
        return self._tokenizer.encode(prompt)

    @torch.inference_mode()
    def pictures(self, images: Sequence[Image]) -> Tensor:
        """uint8 RGB [H, W, 3] of any sizes → float32 [B, D] on the CPU."""
        pixels = torch.from_numpy(np.stack([self.preparation(image) for image in images]))
        pooled = self._model.vision_model(pixel_values=pixels.to(self._model.device, self._model.dtype)).pooler_output
        return _unit(self._model.visual_projection(pooled))

    @torch.inference_mode()
    def prompts(self, ids: Sequence[list[int]]) -> Tensor:
        """Token ids of B prompts → float32 [B, D] on the CPU."""
        rows = torch.tensor([self._tokenizer.padded(row) for row in ids], device=self._model.device)
        pooled = self._model.text_model(input_ids=rows).pooler_output
        return _unit(self._model.text_projection(pooled))


def load_towers(
    folder: Path, tokenizer: Path, prepare: Callable[[int], Preparation], device: str, dtype: str, state: Mapping[str, Tensor] | None = None
) -> Towers:
    """Read ``config.json`` and the safetensors of ``folder`` (or take ``state`` in their place).

    ``prepare`` makes the preparation for the vision tower's side in pixels. Raises ``ModelFolderError``.
    """
    if not (folder / "config.json").is_file():
        raise ModelFolderError(f"{folder} has no config.json; it must be a local folder of a CLIP model")
    try:
        config: Any = CLIPConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{folder / 'config.json'} is not the config of a CLIP model: {error}") from error
    model = stock_model("CLIPModel", folder, config, dtype, device, state)
    words = PromptTokenizer(tokenizer, config.text_config.max_position_embeddings, END_TOKEN)
    _require_same_words(config, words, tokenizer)
    return Towers(model, prepare(config.vision_config.image_size), words)


def _require_same_words(config: Any, words: PromptTokenizer, folder: Path) -> None:
    """The text tower reads its answer at the end token, which the tokenizer must write as the config's id.

    An id of 2 is a mistake in old configs, which transformers answers by taking the highest id instead: CLIP's end token.
    """
    end, vocabulary = config.text_config.eos_token_id, config.text_config.vocab_size
    sequence = words.encode("a")
    if not isinstance(sequence, list) or sequence[-1] != words.pad_id or (end not in (2, words.pad_id)) or max(sequence) >= vocabulary:
        raise ModelFolderError(f"the tokenizer in {folder} does not fit: end token {words.pad_id}, the config says {end} of {vocabulary}")


def _unit(vectors: Tensor) -> Tensor:
    """Unit length in float32; the zero vector stays zero, so that it fails as a number and not as NaN."""
    full = vectors.float()
    return (full / full.norm(dim=-1, keepdim=True).clamp_min(1e-12)).cpu()
