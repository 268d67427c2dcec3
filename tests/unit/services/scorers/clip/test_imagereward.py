"""ImageReward: a tiny checkpoint in the public layout scored by transformers, against BLIP's forward pass written out here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F

from services.contract import ItemScore, ScoreFailure
from services.media.base import Image, Media
from services.scorers.clip.errors import ModelFolderError
from services.scorers.clip.imagereward import MEAN, STD, TEXT_LENGTH, ImageRewardScorer
from services.scorers.clip.preparation import Preparation
from services.scorers.settings import ImageRewardReward

VISION, LAYERS, PATCH, SIDE, INNER = 128, 2, 8, 32, 96  # 128 = two heads of 64, BLIP's size of a head
TEXT, HEADS, TEXT_LAYERS, TEXT_INNER = 24, 3, 2, 40
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "square", "two", "dogs", "in", "the", "rain", "##s"]
PROMPTS = ["a red square", "Two dogs in the rain", "rain " * 60]
IMAGES: list[Image] = [np.random.default_rng(h).integers(0, 256, (h, w, 3), np.uint8) for h, w in ((64, 48), (32, 32), (35, 90))]
MED = {
    "vocab_size": len(WORDS),
    "hidden_size": TEXT,
    "num_attention_heads": HEADS,
    "num_hidden_layers": TEXT_LAYERS,
    "intermediate_size": TEXT_INNER,
    "max_position_embeddings": 48,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
    "add_cross_attention": True,
    "encoder_width": 768,
    "architectures": ["BertModel"],
}


def random_state() -> dict[str, Tensor]:
    """Every tensor of the public file, small: Salesforce's names, the reward's head, and what the reward does not use."""
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, VISION),
        "blip.visual_encoder.pos_embed": (1, (SIDE // PATCH) ** 2 + 1, VISION),
        "blip.visual_encoder.patch_embed.proj.weight": (VISION, 3, PATCH, PATCH),
        "blip.visual_encoder.patch_embed.proj.bias": (VISION,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (len(WORDS), TEXT),
        "blip.text_encoder.embeddings.position_embeddings.weight": (48, TEXT),
    }

    def linear(name: str, out: int, into: int) -> None:
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    for i in range(LAYERS):
        block = f"blip.visual_encoder.blocks.{i}"
        norm(f"{block}.norm1", VISION)
        norm(f"{block}.norm2", VISION)
        linear(f"{block}.attn.qkv", 3 * VISION, VISION)
        linear(f"{block}.attn.proj", VISION, VISION)
        linear(f"{block}.mlp.fc1", INNER, VISION)
        linear(f"{block}.mlp.fc2", VISION, INNER)
    norm("blip.visual_encoder.norm", VISION)
    norm("blip.text_encoder.embeddings.LayerNorm", TEXT)
    for i in range(TEXT_LAYERS):
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for attention, source in (("attention", TEXT), ("crossattention", VISION)):
            linear(f"{layer}.{attention}.self.query", TEXT, TEXT)
            linear(f"{layer}.{attention}.self.key", TEXT, source)
            linear(f"{layer}.{attention}.self.value", TEXT, source)
            linear(f"{layer}.{attention}.output.dense", TEXT, TEXT)
            norm(f"{layer}.{attention}.output.LayerNorm", TEXT)
        linear(f"{layer}.intermediate.dense", TEXT_INNER, TEXT)
        linear(f"{layer}.output.dense", TEXT, TEXT_INNER)
        norm(f"{layer}.output.LayerNorm", TEXT)
    linear("blip.vision_proj", 8, VISION)
    linear("blip.text_proj", 8, TEXT)
    for i, (out, into) in {0: (32, TEXT), 2: (16, 32), 4: (8, 16), 6: (4, 8), 7: (1, 4)}.items():
        linear(f"mlp.layers.{i}", out, into)
    torch.manual_seed(11)
    state = {name: torch.randn(shape) * 0.25 for name, shape in shapes.items()}
    return state | {"blip.text_encoder.embeddings.position_ids": torch.arange(48)[None]}


def write_tokenizer(folder: Path) -> None:
    """A BERT tokenizer in its published form, with few words."""
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imagereward")
    torch.save(random_state(), path / "ImageReward.pt")
    (path / "med_config.json").write_text(json.dumps(MED))
    write_tokenizer(path)
    return path


class Blip:
    """The reference forward pass, one picture and one prompt at a time, without padding."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, self.state[f"{name}.bias"], eps)

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        parts = [x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v)]
        weights = (parts[0] @ parts[1].transpose(1, 2) / math.sqrt(parts[0].shape[-1])).softmax(-1)
        return (weights @ parts[2]).transpose(0, 1).flatten(1)

    def see(self, pixels: Tensor) -> Tensor:
        name = "blip.visual_encoder"
        patches = F.conv2d(pixels[None], self.state[f"{name}.patch_embed.proj.weight"], self.state[f"{name}.patch_embed.proj.bias"], PATCH)
        x = torch.cat([self.state[f"{name}.cls_token"][0], patches[0].flatten(1).T]) + self.state[f"{name}.pos_embed"][0]
        for i in range(LAYERS):
            block = f"{name}.blocks.{i}"
            q, k, v = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
            x = x + self.linear(f"{block}.attn.proj", self.attend(q, k, v, VISION // 64))
            x = x + self.linear(f"{block}.mlp.fc2", F.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))))
        return self.norm(f"{name}.norm", x, 1e-6)

    def read(self, ids: list[int], seen: Tensor) -> Tensor:
        name = "blip.text_encoder"
        x = self.state[f"{name}.embeddings.word_embeddings.weight"][ids] + self.state[f"{name}.embeddings.position_embeddings.weight"][: len(ids)]
        x = self.norm(f"{name}.embeddings.LayerNorm", x, 1e-12)
        for i in range(TEXT_LAYERS):
            layer = f"{name}.encoder.layer.{i}"
            for attention, of in (("attention", None), ("crossattention", seen)):
                source = x if of is None else of
                q, k, v = (self.linear(f"{layer}.{attention}.self.{part}", y) for part, y in (("query", x), ("key", source), ("value", source)))
                out = self.linear(f"{layer}.{attention}.output.dense", self.attend(q, k, v, HEADS))
                x = self.norm(f"{layer}.{attention}.output.LayerNorm", out + x, 1e-12)
            inner = F.gelu(self.linear(f"{layer}.intermediate.dense", x))
            x = self.norm(f"{layer}.output.LayerNorm", self.linear(f"{layer}.output.dense", inner) + x, 1e-12)
        return x[0]

    def reward(self, image: Image, ids: list[int]) -> float:
        x = self.read(ids, self.see(torch.from_numpy(Preparation(SIDE, half="even")(image))))
        for i in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{i}", x)
        return (float(x) - MEAN) / STD


def test_imagereward_equals_blip(folder: Path) -> None:
    scorer = ImageRewardScorer(ImageRewardReward(path=folder))
    results = scorer.score(PROMPTS, [Media.image(image) for image in IMAGES])
    found = [r.reward for r in results if isinstance(r, ItemScore)]
    rows = [[2, 4, 5, 6, 3], [2, 7, 8, 9, 10, 11, 3], [2, *[11] * (TEXT_LENGTH - 2), 3]]  # [CLS] … [SEP], cut at 35
    blip = Blip(random_state())
    assert found == pytest.approx([blip.reward(image, ids) for image, ids in zip(IMAGES, rows, strict=True)], abs=1e-4)
    assert len({round(x, 3) for x in found}) == len(found)
    scorer.self_test()


def test_a_special_token_in_the_prompt_is_refused(folder: Path) -> None:
    scorer = ImageRewardScorer(ImageRewardReward(path=folder))
    refused, scored, unknown = scorer.score(["a [SEP] red square", "a red square", "a 🦊"], [Media.image(IMAGES[0])] * 3)
    assert isinstance(refused, ScoreFailure)
    assert refused.code == "prompt_refused"
    assert isinstance(scored, ItemScore)
    assert isinstance(unknown, ItemScore)


@pytest.mark.parametrize(
    ("lacking", "extra", "says"),
    [
        ("blip.visual_encoder.norm.weight", {}, "1 missing"),
        ("blip.text_encoder.encoder.layer.1.crossattention.self.key.bias", {}, "1 missing"),
        ("mlp.layers.7.bias", {}, "the head is"),
        ("blip.visual_encoder.pos_embed", {}, "position_embedding"),
        (None, {"blip.text_decoder.x": torch.zeros(1)}, "text_decoder"),
        (None, {"blip.text_encoder.pooler.dense.bias": torch.zeros(2)}, "1 unexpected"),
    ],
)
def test_every_tensor_is_accounted_for(lacking: str | None, extra: dict[str, Tensor], says: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "med_config.json").write_text(json.dumps(MED))
    torch.save({k: v for k, v in (random_state() | extra).items() if k != lacking}, tmp_path / "ImageReward.pt")
    with pytest.raises(ModelFolderError, match=says):
        ImageRewardScorer(ImageRewardReward(path=tmp_path, processor=folder))


def test_an_incomplete_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="no checkpoint"):
        ImageRewardScorer(ImageRewardReward(path=tmp_path))
    torch.save(random_state(), tmp_path / "ImageReward.pt")
    with pytest.raises(ModelFolderError, match=r"med_config\.json"):
        ImageRewardScorer(ImageRewardReward(path=tmp_path, processor=folder))
    (tmp_path / "med_config.json").write_text(json.dumps(MED | {"position_embedding_type": "relative_key"}))
    with pytest.raises(ModelFolderError, match="relative_key"):
        ImageRewardScorer(ImageRewardReward(path=tmp_path, processor=folder))
