"""Rewards that are a cosine between a picture and its prompt in CLIP's space: clipscore, pickscore, hpsv2.

Of cos, the cosine of the two embeddings, and s, the model's own logit scale (about 100):

``clipscore``  clipscore = 2.5 max(cos, 0) (Hessel et al. 2021, without their prompt prefix), cosine, flow_grpo = s cos / 30
``pickscore``  logit = s cos (the authors' score, about 20), pickscore = logit / 26 (flow_grpo, cosmos-rl), cosine
``hpsv2``      hpsv2 = cos (the authors' score, 0.2 to 0.35 on ordinary pictures)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from services.contract import ScoreFailure
from services.media.base import Image
from services.scorers.clip.errors import ModelFolderError
from services.scorers.clip.openclip import to_transformers
from services.scorers.clip.pictures import PictureScorer, unique
from services.scorers.clip.preparation import Preparation, read_preparation
from services.scorers.clip.towers import Towers, load_towers
from services.scorers.fingerprint import fingerprint
from services.scorers.settings import ClipScoreReward, Hpsv2Reward, PickScoreReward, TowerReward

PICKSCORE_DIVISOR, CLIPSCORE_WEIGHT, FLOW_GRPO_CLIP_DIVISOR = 26.0, 2.5, 30.0


class CosineScorer(PictureScorer):
    """A reward computed from the cosine of picture and prompt."""

    def __init__(self, settings: TowerReward, towers: Towers, identity: str) -> None:
        super().__init__(settings, towers.preparation, identity)
        self._towers = towers

    def tokens(self, prompt: str) -> list[int] | ScoreFailure:
        """See ``PictureScorer.tokens``."""
        ids: list[int] | ScoreFailure = self._towers.tokens(prompt)
        return ids

    def judge(self, images: Sequence[Image], prompts: Sequence[tuple[int, ...]]) -> Mapping[str, Sequence[float]]:
        """See ``PictureScorer.judge``."""
        texts, which = unique(prompts)
        cosine = (self._towers.pictures(images) * self._towers.prompts(texts)[which]).sum(-1)
        return {name: values.tolist() for name, values in self.from_cosine(cosine).items()}

    @abstractmethod
    def from_cosine(self, cosine: Tensor) -> dict[str, Tensor]:
        """Every sub-score from the cosines [B]."""


class ClipScorer(CosineScorer):
    """Agreement of picture and prompt by any ``CLIPModel``."""

    name = "clipscore"
    sub_scores = ("clipscore", "cosine", "flow_grpo")

    def __init__(self, config: ClipScoreReward) -> None:
        self.reward = config.reward
        super().__init__(config, load_folder(config), folder_fingerprint(config))

    def from_cosine(self, cosine: Tensor) -> dict[str, Tensor]:
        """See the module."""
        scaled = self._towers.logit_scale * cosine / FLOW_GRPO_CLIP_DIVISOR
        return {"clipscore": CLIPSCORE_WEIGHT * cosine.clamp_min(0), "cosine": cosine, "flow_grpo": scaled}


class PickScorer(CosineScorer):
    """PickScore v1: CLIP-H tuned on people's choices."""

    name = "pickscore"
    sub_scores = ("pickscore", "logit", "cosine")

    def __init__(self, config: PickScoreReward) -> None:
        self.reward = config.reward
        super().__init__(config, load_folder(config), folder_fingerprint(config))

    def from_cosine(self, cosine: Tensor) -> dict[str, Tensor]:
        """See the module."""
        logit = self._towers.logit_scale * cosine
        return {"pickscore": logit / PICKSCORE_DIVISOR, "logit": logit, "cosine": cosine}


class Hpsv2Scorer(CosineScorer):
    """HPSv2 and v2.1: CLIP-H tuned on people's choices, a checkpoint in open_clip's layout."""

    name = "hpsv2"
    reward = "hpsv2"
    sub_scores = ("hpsv2",)

    def __init__(self, config: Hpsv2Reward) -> None:
        state = to_transformers(read_open_clip(config.checkpoint))
        towers = _load(config, lambda side: Preparation(side, "pad"), state)
        words = (config.processor or config.path) / "tokenizer.json"
        super().__init__(config, towers, fingerprint(config.checkpoint, config.path / "config.json", words))

    def from_cosine(self, cosine: Tensor) -> dict[str, Tensor]:
        """See the module."""
        return {"hpsv2": cosine}


def load_folder(config: TowerReward) -> Towers:
    """The two towers of a folder as published on the hub. Raises ``ModelFolderError``."""
    return _load(config, lambda _: read_preparation(config.processor or config.path))


def folder_fingerprint(config: TowerReward, *more: Path) -> str:
    """Hash of everything in the folder that makes the numbers, and of ``more`` files."""
    return fingerprint(*sorted(config.path.glob("*.safetensors")), config.path / "config.json", (config.processor or config.path) / "tokenizer.json", *more)


def _load(config: TowerReward, prepare: Callable[[int], Preparation], state: Mapping[str, Tensor] | None = None) -> Towers:
    return load_towers(config.path, config.processor or config.path, prepare, config.device, config.dtype, state)


def read_open_clip(file: Path) -> Mapping[str, Tensor]:
    """The ``state_dict`` of a training checkpoint; only tensors are unpickled. Raises ``ModelFolderError``."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        state: Mapping[str, Tensor] = content["state_dict"]
        return {key.removeprefix("module."): tensor for key, tensor in state.items()}
    except FileNotFoundError:
        raise ModelFolderError(f"there is no checkpoint at {file}") from None
    except Exception as error:  # torch.load raises many kinds on a file that is not a checkpoint
        raise ModelFolderError(f"{file} is not a checkpoint with a state_dict of tensors ({type(error).__name__}: {str(error)[:200]})") from error
