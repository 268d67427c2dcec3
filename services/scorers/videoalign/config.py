"""Settings of the VideoAlign reward (pydantic only)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from services.scorers.settings import RewardSettings

# Of `DETAILED_PROMPT_WITH_SPECIAL_TOKEN` in VideoAlign's prompt_template.py, UTF-8, before the prompt is filled in.
PUBLIC_TEMPLATE_SHA256 = "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"

SubScore = Literal["overall", "overall_mean", "vq", "mq", "ta"]


class VideoAlignConfig(RewardSettings):
    """One VideoAlign reward: which weights, which template, which precision, which number to train on."""

    kind: Literal["videoalign"] = Field(default="videoalign", description="VideoAlign: quality, motion and prompt alignment of a clip.")
    path: Path = Field(description="Folder of the checkpoint: as published (checkpoint-N/model.pth), as VideoAlign's trainer saves it, or converted.")
    checkpoint: int | None = Field(default=None, ge=0, description="Which checkpoint-N of path; null takes the highest. Meaningless for a converted folder.")
    base: Path | None = Field(
        default=None,
        description="Folder of the base Qwen2-VL model. Its config.json describes a base other than the 2B; its weights complete an adapter checkpoint.",
    )
    tokenizer: Path | None = Field(default=None, description="tokenizer.json or its folder; null looks beside the checkpoint, then in base.")
    template: Path | None = Field(
        default=None,
        description="VideoAlign's prompt_template.py, or a text file with the template alone; null looks for prompt_template.txt and .py in path.",
    )
    template_sha256: str = Field(
        default=PUBLIC_TEMPLATE_SHA256,
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 the template must have; change it only for a model trained with another template.",
    )
    reward: SubScore = Field(default="overall", description="Sub-score that is the reward; overall is the sum of vq, mq and ta, overall_mean their mean.")
    normalise: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="auto: standard scores where the checkpoint states mean and deviation; always: refuse one that does not; never: raw outputs.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Precision of weights and activations; auto: float32 on cpu, bfloat16 on cuda."
    )
    rotary: Literal["bfloat16", "float32"] = Field(
        default="bfloat16",
        description="Precision of the rotary frequencies; bfloat16 is what the published model was trained and is used with, whatever the dtype.",
    )
    fold_lora: bool = Field(default=True, description="Add the LoRA update into the weights, in float32. false computes it beside them, as the reference does.")
    max_tokens: int = Field(default=32768, ge=64, description="Longest sequence of video and text tokens; longer items fail alone.")
    batch_cost: int = Field(
        default=20_000_000, ge=1, description="Largest batch in resized pixels (frames x height x width); a 6 s clip in 720p costs 2.4 million."
    )
    timeout_s: float = Field(default=120.0, gt=0, le=3600, description="Deadline of one request at this reward, repeats included.")
