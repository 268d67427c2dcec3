"""Our way of preparing pictures against transformers' own processor, and the ways a folder may describe it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from services.scorers.clip.errors import ModelFolderError
from services.scorers.clip.preparation import CLIP_MEAN, CLIP_STD, Preparation, read_preparation

sides = st.integers(1, 90)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


@given(sides, sides)
def test_crop_equals_transformers(height: int, width: int) -> None:
    image = noise(height, width)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    wanted = theirs(images=image, input_data_format="channels_last", return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(Preparation(32)(image), wanted, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (720, 1280), (224, 224), (225, 224), (100, 333)])
def test_crop_equals_transformers_at_full_size(height: int, width: int) -> None:
    image = noise(height, width)
    theirs = CLIPImageProcessorPil()(images=image, input_data_format="channels_last", return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(Preparation(224)(image), theirs, atol=1e-6)


def test_an_odd_margin_goes_where_the_rule_says() -> None:
    """35 columns for 32: transformers cuts 1 on the left, torchvision rounds 1.5 to the even 2."""
    image = np.zeros((32, 35, 3), np.uint8)
    image[..., 0] = np.arange(35)
    unscaled = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    assert [round(float(Preparation(32, half=h, **unscaled)(image)[0, 0, 0] * 255)) for h in ("down", "even")] == [1, 2]  # type: ignore[arg-type]


@given(sides, sides)
def test_pad_keeps_the_whole_picture_on_black(height: int, width: int) -> None:
    white = np.full((height, width, 3), 255, np.uint8)
    found = Preparation(32, "pad", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))(white)
    wanted_h, wanted_w = max(1, round(32 * height / max(height, width))), max(1, round(32 * width / max(height, width)))
    assert found.shape == (3, 32, 32)
    assert set(np.unique(found)) <= {0, 1}
    assert found[0].sum() == wanted_h * wanted_w
    rows, columns = np.flatnonzero(found[0].any(1)), np.flatnonzero(found[0].any(0))
    assert (rows[0], columns[0]) == ((32 - wanted_h) // 2, (32 - wanted_w) // 2)


@pytest.mark.parametrize(
    "config",
    [
        {"size": 224, "crop_size": 224, "do_resize": True, "resample": 3, "feature_extractor_type": "CLIPFeatureExtractor"},
        {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)},
    ],
)
def test_both_ways_of_writing_the_config(config: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert read_preparation(tmp_path) == Preparation(224)


@pytest.mark.parametrize(
    "config",
    [
        {"size": 256, "crop_size": 224},
        {"size": 224, "crop_size": {"height": 224, "width": 112}},
        {"size": 224, "resample": 2},
        {"size": 224, "do_center_crop": False},
        {"size": {"longest_edge": 224}},
        {"size": 224, "image_mean": [0.5]},
        {},
    ],
)
def test_another_preparation_is_refused(config: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match="preparation"):
        read_preparation(tmp_path)


def test_a_folder_without_the_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"no preprocessor_config\.json"):
        read_preparation(tmp_path)


def test_what_changes_pixels_changes_the_description() -> None:
    kinds = [Preparation(224), Preparation(32), Preparation(224, "pad"), Preparation(224, half="even"), Preparation(224, mean=(0.5, 0.5, 0.5))]
    assert len({str(kind) for kind in kinds}) == len(kinds)
