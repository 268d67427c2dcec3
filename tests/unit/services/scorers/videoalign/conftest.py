"""A tiny VideoReward on disk, once per session, and scorers made from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from services.scorers.videoalign import tiny
from services.scorers.videoalign.config import VideoAlignConfig
from services.scorers.videoalign.scorer import VideoAlignScorer

DIMS = tiny.Dims()


@pytest.fixture(scope="session")
def tensors() -> dict[str, torch.Tensor]:
    """The tiny model's tensors under their published names, float32."""
    return tiny.published_tensors(DIMS)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]) -> Path:
    """The tiny base model's folder, with weights."""
    return tiny.write_base(tmp_path_factory.mktemp("base") / "Tiny-VL", DIMS, tensors)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]) -> Path:
    """The tiny checkpoint in the published layout, with VideoReward's mean and deviation."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("published") / "VideoReward", DIMS, tensors, tiny.VIDEOREWARD_SPREAD)


@pytest.fixture(scope="session")
def make_config(published: Path, base: Path) -> Callable[..., VideoAlignConfig]:
    """Settings for the tiny checkpoint; keyword arguments replace any."""

    def make(**changes: Any) -> VideoAlignConfig:
        values: dict[str, Any] = {"path": published, "base": base, "template_sha256": tiny.TEMPLATE_SHA256}
        return VideoAlignConfig(**values | changes)

    return make


@pytest.fixture(scope="session")
def make_scorer(make_config: Callable[..., VideoAlignConfig]) -> Callable[..., VideoAlignScorer]:
    """A scorer of the tiny checkpoint; keyword arguments replace settings."""
    return lambda **changes: VideoAlignScorer(make_config(**changes))


@pytest.fixture(scope="session")
def raw_scorer(make_scorer: Callable[..., VideoAlignScorer]) -> VideoAlignScorer:
    """Without normalisation, float32."""
    return make_scorer(normalise="never")
