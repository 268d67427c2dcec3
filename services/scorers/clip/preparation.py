"""Pixels on their way into a vision tower: uint8 RGB of any size → normalised float32 [3, S, S]. Pillow and numpy only.

Two shapes of the way there. ``crop``: the shorter side becomes S (bicubic, on uint8), the middle is cut out; what CLIP's
own processor does. ``pad``: the longer side becomes S, the rest is black on both sides; what HPSv2 does.

Worked example, ``crop``, S = 224: 480x640 (height x width) → 224x298 → columns 37 to 261.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from services.media.base import Image
from services.scorers.clip.errors import ModelFolderError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3  # Pillow's number, as preprocessor_config.json writes it


@dataclass(frozen=True)
class Preparation:
    """How pictures reach a vision tower with inputs of ``size`` x ``size`` pixels.

    ``half`` says where an odd margin of a crop goes: ``down`` is transformers' rule, ``even`` torchvision's.
    """

    size: int
    shape: Literal["crop", "pad"] = "crop"
    half: Literal["down", "even"] = "down"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __str__(self) -> str:
        numbers = ",".join(f"{v:g}" for v in (*self.mean, *self.std))
        return f"{self.shape}-{self.size}{'' if self.half == 'down' else '-even'};bicubic-uint8;{numbers}"

    def __call__(self, image: Image) -> NDArray[np.float32]:
        """uint8 RGB [H, W, 3] with at least one pixel → float32 [3, size, size]."""
        picture = PILImage.fromarray(image)
        square = self._cropped(picture) if self.shape == "crop" else self._padded(picture)
        unit = np.asarray(square, np.float32) / np.float32(255)
        normal = (unit - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(normal.transpose(2, 0, 1))

    def _cropped(self, picture: PILImage.Image) -> PILImage.Image:
        width, height = picture.size
        # At least one pixel each way already holds: the shorter side becomes `size`.
        to = (self.size, int(self.size * height / width)) if width <= height else (int(self.size * width / height), self.size)
        resized = picture.resize(to, PILImage.Resampling.BICUBIC)
        left, top = (self._margin(side - self.size) for side in to)
        return resized.crop((left, top, left + self.size, top + self.size))

    def _margin(self, extra: int) -> int:
        return extra // 2 if self.half == "down" else round(extra / 2)

    def _padded(self, picture: PILImage.Image) -> PILImage.Image:
        width, height = picture.size
        scale = self.size / max(width, height)
        to = (max(1, round(width * scale)), max(1, round(height * scale)))
        canvas = PILImage.new("RGB", (self.size, self.size))
        canvas.paste(picture.resize(to, PILImage.Resampling.BICUBIC), ((self.size - to[0]) // 2, (self.size - to[1]) // 2))
        return canvas


def read_preparation(folder: Path) -> Preparation:
    """CLIP's ``preprocessor_config.json``. Raises ``ModelFolderError``; a step this does not do is refused, not skipped."""
    file = folder / "preprocessor_config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text())
        size, crop = _side(config["size"], "shortest_edge"), _side(config.get("crop_size", config["size"]), "height")
        if size != crop or _side(config.get("crop_size", crop), "width") != crop:
            raise ValueError(f"it resizes to {size} and crops to {crop}")
        steps = {"do_resize": True, "do_center_crop": True, "do_normalize": True, "do_rescale": True, "resample": BICUBIC}
        other = {key: config[key] for key, value in steps.items() if key in config and config[key] != value}
        if other:
            raise ValueError(f"it asks for {other}")
        r, g, b = map(float, config.get("image_mean", CLIP_MEAN))
        sr, sg, sb = map(float, config.get("image_std", CLIP_STD))
    except FileNotFoundError:
        raise ModelFolderError(f"{folder} has no preprocessor_config.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFolderError(f"{file} does not describe a preparation this scorer knows: {error}") from error
    return Preparation(size, mean=(r, g, b), std=(sr, sg, sb))


def _side(value: Any, key: str) -> int:
    """A side in either way of writing it: 224 or {"shortest_edge": 224}."""
    return int(value[key] if isinstance(value, dict) and key in value else value)
