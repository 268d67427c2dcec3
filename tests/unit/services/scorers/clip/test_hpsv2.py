"""HPSv2: a checkpoint in open_clip's layout scored by transformers, against open_clip's forward pass written out here."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from services.contract import ItemScore
from services.media.base import Image, Media
from services.scorers.clip.errors import ModelFolderError
from services.scorers.clip.openclip import to_transformers
from services.scorers.clip.preparation import Preparation
from services.scorers.clip.scorers import Hpsv2Scorer
from services.scorers.clip.tiny import PATCH, PROJECTION, SIDE, TEXT_LENGTH, clip_tokenizer
from services.scorers.settings import Hpsv2Reward

HEADS, LAYERS, VISION, TEXT, MLP = 4, 2, 48, 32, 64
PROMPTS = ["a red square", "two dogs", "日本"]
IMAGES: list[Image] = [np.random.default_rng(h).integers(0, 256, (h, w, 3), np.uint8) for h, w in ((64, 48), (32, 32), (20, 90))]


class Tower(nn.Module):
    """A pre-norm transformer with open_clip's parameter names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(nn.ModuleDict(self.block(width)) for _ in range(LAYERS))

    @staticmethod
    def block(width: int) -> dict[str, nn.Module]:
        mlp = nn.ModuleDict({"c_fc": nn.Linear(width, MLP), "c_proj": nn.Linear(MLP, width)})
        return {"ln_1": nn.LayerNorm(width), "attn": nn.MultiheadAttention(width, HEADS, batch_first=True), "ln_2": nn.LayerNorm(width), "mlp": mlp}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            y = block["ln_1"](x)  # type: ignore[index]
            x = x + block["attn"](y, y, y, need_weights=False, attn_mask=mask)[0]  # type: ignore[index]
            x = x + block["mlp"]["c_proj"](nn.functional.gelu(block["mlp"]["c_fc"](block["ln_2"](x))))  # type: ignore[index]
        return x


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(VISION))
        self.positional_embedding = nn.Parameter(torch.empty((SIDE // PATCH) ** 2 + 1, VISION))
        self.conv1 = nn.Conv2d(3, VISION, PATCH, PATCH, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(VISION), nn.LayerNorm(VISION)
        self.transformer = Tower(VISION)
        self.proj = nn.Parameter(torch.empty(VISION, PROJECTION))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """``ViT`` of open_clip, shrunk."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.visual = Visual()
        self.transformer = Tower(TEXT)
        self.token_embedding = nn.Embedding(vocabulary, TEXT)
        self.positional_embedding = nn.Parameter(torch.empty(TEXT_LENGTH, TEXT))
        self.ln_final = nn.LayerNorm(TEXT)
        self.text_projection = nn.Parameter(torch.empty(TEXT, PROJECTION))
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.register_buffer("attn_mask", torch.full((TEXT_LENGTH, TEXT_LENGTH), float("-inf")).triu(1))

    def texts(self, ids: Tensor) -> Tensor:
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding, self.attn_mask)
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


@pytest.fixture(scope="module")
def reference() -> OpenClip:
    torch.manual_seed(5)
    model = OpenClip(len(clip_tokenizer())).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.3)
    return model


@pytest.fixture(scope="module")
def checkpoint(reference: OpenClip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 3, "name": "hps", "state_dict": {f"module.{key}": tensor for key, tensor in reference.state_dict().items()}}, file)
    return file


def reference_scores(reference: OpenClip) -> list[float]:
    """As the authors do it: the longest side fits, the rest is black; ids end with the end token and are padded with zeros."""
    pixels = torch.from_numpy(np.stack([Preparation(SIDE, "pad")(image) for image in IMAGES]))
    rows = [clip_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    ids = torch.tensor([row + [0] * (TEXT_LENGTH - len(row)) for row in rows])
    with torch.no_grad():
        return nn.functional.cosine_similarity(reference.visual(pixels), reference.texts(ids)).tolist()


def test_hpsv2_equals_open_clip(reference: OpenClip, checkpoint: Path, clip_folder: Path) -> None:
    scorer = Hpsv2Scorer(Hpsv2Reward(path=clip_folder, checkpoint=checkpoint))
    results = scorer.score(PROMPTS, [Media.image(image) for image in IMAGES])
    found = [r.reward for r in results if isinstance(r, ItemScore)]
    assert found == pytest.approx(reference_scores(reference), abs=1e-5)
    assert len({round(x, 3) for x in found}) == len(found)
    scorer.self_test()
    assert "pad-32" in scorer.preprocessing


def test_every_tensor_has_its_place(reference: OpenClip) -> None:
    named = to_transformers(reference.state_dict())
    split = 2 * 2 * LAYERS * 2  # in_proj weight and bias of each layer of both towers become three
    assert len(named) == len(reference.state_dict()) - 1 + split
    assert sum(t.numel() for t in named.values()) == sum(t.numel() for t in reference.parameters())


def test_the_weights_of_the_base_folder_are_not_needed(checkpoint: Path, clip_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(clip_folder, tmp_path / "base", ignore=lambda *_: {"model.safetensors", "preprocessor_config.json"})
    Hpsv2Scorer(Hpsv2Reward(path=tmp_path / "base", checkpoint=checkpoint)).self_test()


def test_an_unknown_or_missing_tensor_is_refused(reference: OpenClip, clip_folder: Path, tmp_path: Path) -> None:
    state = dict(reference.state_dict())
    for name, change, says in (("more", {"visual.extra": torch.zeros(1)}, "visual.extra"), ("less", {"visual.proj": None}, "visual_projection.weight")):
        torch.save({"state_dict": {k: v for k, v in (state | change).items() if v is not None}}, tmp_path / name)
        with pytest.raises(ModelFolderError, match=says):
            Hpsv2Scorer(Hpsv2Reward(path=clip_folder, checkpoint=tmp_path / name))


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("/tmp/ddrl-hpsv2-bomb"),))  # type: ignore[return-value]


def test_a_checkpoint_that_runs_code_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {"visual.proj": Bomb()}}, tmp_path / "bomb.pt")
    with pytest.raises(ModelFolderError, match="tensors"):
        Hpsv2Scorer(Hpsv2Reward(path=clip_folder, checkpoint=tmp_path / "bomb.pt"))
    assert not Path("/tmp/ddrl-hpsv2-bomb").exists()
