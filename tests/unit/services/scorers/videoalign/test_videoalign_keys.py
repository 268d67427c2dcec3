"""The real model's size without its weights: names, shapes and bytes of the public checkpoint (acceptance 2)."""

from __future__ import annotations

import math

import pytest

from services.scorers.videoalign import cost
from services.scorers.videoalign.layout import QWEN2_VL_2B, empty_model, expected, known_base, style_of
from services.scorers.videoalign.settings import LoraSettings, ModelSettings
from services.scorers.videoalign.tiny import VIDEOREWARD, published_shapes

SETTINGS = ModelSettings(
    base="Qwen/Qwen2-VL-2B-Instruct",
    head_dim=1,
    fps=2.0,
    max_frame_pixels=200704,
    lora=LoraSettings(rank=64, alpha=128, exclude=("lm_head", "rm_head", "embed_tokens", "visual")),
)


def test_acceptance_2_the_public_checkpoint_has_1123_tensors_of_5_gb() -> None:
    slots = expected(empty_model(QWEN2_VL_2B, VIDEOREWARD.vocab), SETTINGS, "old")
    shapes = {name: slot.shape for name, slot in slots.items()}
    assert len(shapes) == 1123
    assert shapes == published_shapes(VIDEOREWARD)
    assert sum(math.prod(shape) for shape in shapes.values()) * 2 == 5_030_744_064  # bfloat16
    assert sum(slot.role == "lora_a" for slot in slots.values()) == sum(slot.role == "lora_b" for slot in slots.values()) == 196
    assert [name for name, slot in slots.items() if slot.role == "unused"] == ["base_model.model.lm_head.weight"]
    assert SETTINGS.lora is not None
    assert SETTINGS.lora.scale == 2.0


def test_later_names_differ_by_two_prefixes_only() -> None:
    model = empty_model(QWEN2_VL_2B, VIDEOREWARD.vocab)
    old, new = expected(model, SETTINGS, "old"), expected(model, SETTINGS, "new")

    def renamed(name: str) -> str:
        for before, after in (("visual.", "model.visual."), ("model.", "model.language_model.")):
            if name.startswith(f"base_model.model.{before}"):
                return name.replace(f"base_model.model.{before}", f"base_model.model.{after}", 1)
        return name

    assert {renamed(name): slot for name, slot in old.items()} == new
    assert (style_of(old), style_of(new)) == ("old", "new")


def test_folded_weights_are_729_tensors_and_the_head() -> None:
    slots = expected(empty_model(QWEN2_VL_2B, VIDEOREWARD.vocab), SETTINGS, "plain", lora=False)
    assert len(slots) == 730
    assert all(name == slot.name for name, slot in slots.items())


@pytest.mark.parametrize("name", ["Qwen/Qwen2-VL-2B-Instruct", "./Qwen2-VL-2B-Instruct", "/models/Qwen2-VL-2B-Instruct/"])
def test_the_2b_base_is_known_by_name(name: str) -> None:
    assert known_base(name) is QWEN2_VL_2B


def test_other_bases_are_not_guessed() -> None:
    assert known_base("Qwen/Qwen2-VL-7B-Instruct") is None


def test_the_plan_counts_the_model_that_is_loaded() -> None:
    model = empty_model(QWEN2_VL_2B, VIDEOREWARD.vocab)
    assert sum(p.numel() for p in model.parameters()) + VIDEOREWARD.hidden == cost.PARAMETERS
    text, vision = QWEN2_VL_2B["text_config"], QWEN2_VL_2B["vision_config"]
    assert (text["hidden_size"], text["intermediate_size"]) == (cost.WORDS, cost.WORDS_MLP)
    assert (vision["embed_dim"], vision["embed_dim"] * vision["mlp_ratio"]) == (cost.VISION, cost.VISION_MLP)
