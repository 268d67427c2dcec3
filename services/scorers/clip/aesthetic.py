"""The aesthetic reward: LAION's predictor, five linear layers on the unit embedding of a picture by CLIP L/14; about 1 to 10.

The layers have no activation between them, as published. An embedding of another CLIP of equal width would give numbers
that look right and mean nothing: the head belongs to OpenAI's ViT-L/14.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from services.contract import ScoreFailure
from services.media.base import Image
from services.scorers.clip.errors import ModelFolderError
from services.scorers.clip.head import apply_head, linear_head
from services.scorers.clip.pictures import PictureScorer
from services.scorers.clip.scorers import folder_fingerprint, load_folder
from services.scorers.settings import AestheticReward


class AestheticScorer(PictureScorer):
    """LAION aesthetic predictor v2 (sac+logos+ava1-l14-linearMSE)."""

    name = "aesthetic"
    reward = "aesthetic"
    sub_scores = ("aesthetic",)
    needs_prompt = False

    def __init__(self, config: AestheticReward) -> None:
        self._towers = load_folder(config)
        self._head = read_head(config.head, self._towers.width)
        super().__init__(config, self._towers.preparation, folder_fingerprint(config, config.head))

    def tokens(self, prompt: str) -> list[int] | ScoreFailure:
        """Prompts are not looked at."""
        return []

    def judge(self, images: Sequence[Image], prompts: Sequence[tuple[int, ...]]) -> Mapping[str, Sequence[float]]:
        """See ``PictureScorer.judge``."""
        return {"aesthetic": apply_head(self._head, self._towers.pictures(images)).tolist()}


def read_head(file: Path, width: int) -> list[tuple[Tensor, Tensor]]:
    """The head of ``file`` for embeddings of ``width``; see ``linear_head``. Raises ``ModelFolderError``."""
    try:
        tensors: Mapping[str, Tensor] = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelFolderError(f"there is no aesthetic head at {file}") from None
    except Exception as error:  # torch.load raises many kinds on a file that is not a checkpoint
        raise ModelFolderError(f"{file} does not hold tensors only ({type(error).__name__}: {str(error)[:200]})") from error
    return linear_head(str(file), tensors, width)
