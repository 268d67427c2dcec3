"""The aesthetic head on a tiny CLIP, against the published Sequential; heads that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from services.contract import ItemScore
from services.media.base import Image, Media
from services.scorers.clip.aesthetic import AestheticScorer
from services.scorers.clip.errors import ModelFolderError
from services.scorers.clip.tiny import PROJECTION
from services.scorers.settings import AestheticReward

IMAGES: list[Image] = [np.random.default_rng(h).integers(0, 256, (h, 40, 3), np.uint8) for h in (30, 50, 70)]


class Head(nn.Module):
    """The published module: dropouts between linear layers, no activation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [(width, 64), (64, 32), (32, 16), (16, 8), (8, 1)]
        a, b, c, d, e = (nn.Linear(i, o) for i, o in widths)
        self.layers = nn.Sequential(a, nn.Dropout(0.2), b, nn.Dropout(0.2), c, nn.Dropout(0.1), d, e)


@pytest.fixture(scope="module")
def head() -> Head:
    torch.manual_seed(1)
    return Head(PROJECTION).eval()


def test_aesthetic_equals_the_published_module(head: Head, clip_folder: Path, tmp_path: Path) -> None:
    torch.save(head.state_dict(), tmp_path / "head.pth")
    scorer = AestheticScorer(AestheticReward(path=clip_folder, head=tmp_path / "head.pth"))
    results = scorer.score(["", "<|endoftext|>", "ignored"], [Media.image(image) for image in IMAGES])
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(clip_folder)(images=IMAGES, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        wanted = head.layers(features / features.norm(dim=-1, keepdim=True)).squeeze(-1).tolist()
    assert [r.reward for r in results if isinstance(r, ItemScore)] == pytest.approx(wanted, abs=1e-5)
    scorer.self_test()
    assert not scorer.info().needs_prompt


def test_the_same_head_as_safetensors(head: Head, clip_folder: Path, tmp_path: Path) -> None:
    torch.save(head.state_dict(), tmp_path / "head.pth")
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    a, b = (AestheticScorer(AestheticReward(path=clip_folder, head=tmp_path / f"head.{kind}")) for kind in ("pth", "safetensors"))
    media = [Media.image(IMAGES[0])]
    assert a.score([""], media) == b.score([""], media)


def test_heads_that_do_not_fit_are_refused(head: Head, clip_folder: Path, tmp_path: Path) -> None:
    state = head.state_dict()
    wrong = {
        "narrow": (Head(PROJECTION - 1).state_dict(), "width"),
        "short": ({k: v for k, v in state.items() if not k.startswith("layers.7")}, "layers.7.bias"),
        "more": (state | {"layers.9.bias": torch.zeros(1)}, "layers.9.bias"),
    }
    for name, (tensors, says) in wrong.items():
        torch.save(tensors, tmp_path / f"{name}.pth")
        with pytest.raises(ModelFolderError, match=says):
            AestheticScorer(AestheticReward(path=clip_folder, head=tmp_path / f"{name}.pth"))
    with pytest.raises(ModelFolderError, match="no aesthetic head"):
        AestheticScorer(AestheticReward(path=clip_folder, head=tmp_path / "none.pth"))
