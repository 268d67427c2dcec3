"""What a checkpoint says about itself: ``model_config.json`` of VideoAlign in, the settings this scorer needs out.

The file has dozens of training options. Those that change numbers are read; a value this scorer does not compute is
refused by name, never ignored.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from services.contract import StrictModel
from services.scorers.videoalign.errors import CheckpointError

DIMENSIONS = ("VQ", "MQ", "TA")


class Spread(StrictModel):
    """Mean and standard deviation of one raw output over the authors' data."""

    mean: float = Field(allow_inf_nan=False)
    std: float = Field(gt=0, allow_inf_nan=False)


class LoraSettings(StrictModel):
    """Which linear layers have a low-rank update, and its scale."""

    rank: int = Field(ge=1)
    alpha: float
    rslora: bool = False
    exclude: tuple[str, ...] = Field(description="A layer whose dotted name contains one of these has no update.")
    last: int = Field(default=-1, description="Only the last so many layers; -1 for all.")

    @property
    def scale(self) -> float:
        """The factor of B @ A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class ModelSettings(StrictModel):
    """Everything about a checkpoint that changes its numbers, besides weights, tokenizer and template."""

    base: str = Field(description="Name of the base model.")
    head_dim: Literal[1, 3] = Field(description="Outputs of the head: one shared by the three tokens, or one for each.")
    fps: float = Field(gt=0)
    num_frames: int | None = Field(default=None, ge=2)
    max_frame_pixels: int = Field(ge=1)
    spread: tuple[Spread, Spread, Spread] | None = Field(default=None, description="For VQ, MQ, TA; null: outputs stay raw.")
    lora: LoraSettings | None = None


class _Data(BaseModel):
    max_frame_pixels: int
    num_frames: int | None = None
    fps: float
    eval_dim: list[str] | str
    prompt_template_type: str
    sample_type: str = "uniform"


class _Model(BaseModel):
    model_name_or_path: str
    output_dim: int
    use_special_tokens: bool
    reward_token: str


class _Lora(BaseModel):
    lora_enable: bool = False
    lora_r: int = 16
    lora_alpha: float = 32
    use_rslora: bool = False
    num_lora_modules: int = -1
    lora_namespan_exclude: list[str] = []
    lora_modules_to_save: list[str] | None = None


class _File(BaseModel):
    data: _Data = Field(alias="data_config")
    model: _Model = Field(alias="model_config")
    lora: _Lora = Field(alias="peft_lora_config")
    inference: dict[str, float] | None = Field(default=None, alias="inference_config")


def read_settings(file: Path) -> ModelSettings:
    """Settings from VideoAlign's ``model_config.json``. Raises ``CheckpointError``."""
    try:
        content: Any = json.loads(file.read_bytes())
        parsed = _File.model_validate(content)
    except FileNotFoundError as error:
        raise CheckpointError(f"no model_config.json at {file}; it belongs beside the checkpoint-N folders") from error
    except (ValueError, ValidationError) as error:
        raise CheckpointError(f"{file} is not VideoAlign's model_config.json: {error}") from error
    data, model, lora = parsed.data, parsed.model, parsed.lora
    needed = {
        "data_config.eval_dim": (data.eval_dim, list(DIMENSIONS)),
        "data_config.prompt_template_type": (data.prompt_template_type, "detailed_special"),
        "data_config.sample_type": (data.sample_type, "uniform"),
        "model_config.use_special_tokens": (model.use_special_tokens, True),
        "model_config.reward_token": (model.reward_token, "special"),
        "peft_lora_config.lora_modules_to_save": (lora.lora_modules_to_save or None, None),
    }
    wrong = [f"{key} is {found!r}, this scorer computes {wanted!r}" for key, (found, wanted) in needed.items() if found != wanted]
    if wrong:
        raise CheckpointError(f"{file}: " + "; ".join(wrong))
    try:
        return ModelSettings.model_validate(
            {
                "base": model.model_name_or_path,
                "head_dim": model.output_dim,
                "fps": data.fps,
                "num_frames": data.num_frames,
                "max_frame_pixels": data.max_frame_pixels,
                "spread": None if parsed.inference is None else _spread(parsed.inference, file),
                "lora": _lora(lora),
            }
        )
    except ValidationError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _spread(inference: dict[str, float], file: Path) -> tuple[dict[str, float], ...]:
    lacking = [f"{d}_{part}" for d in DIMENSIONS for part in ("mean", "std") if f"{d}_{part}" not in inference]
    if lacking:
        raise CheckpointError(f"{file}: inference_config lacks {', '.join(lacking)}")
    return tuple({"mean": inference[f"{d}_mean"], "std": inference[f"{d}_std"]} for d in DIMENSIONS)


def _lora(lora: _Lora) -> dict[str, Any] | None:
    if not lora.lora_enable:
        return None
    return {
        "rank": lora.lora_r,
        "alpha": lora.lora_alpha,
        "rslora": lora.use_rslora,
        "exclude": tuple(lora.lora_namespan_exclude),
        "last": lora.num_lora_modules,
    }
