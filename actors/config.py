"""Settings of the actors and of the sources they read. Pydantic only."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from diffusion.config import Strict


class PromptConfig(Strict):
    """Where prompts come from. They are split into train, dev and test by a hash of the example's id."""

    kind: Literal["data", "glyph", "glyph_video", "ocr_scenes", "file", "folder"] = Field(
        "data",
        description="data = captions of the anchor data; glyph = signs with 2 to 4 digits; glyph_video = numbers that move; "
        "ocr_scenes = sentences with a text to be written in quotes; file = one prompt a line; folder = captions of pictures",
    )
    seed: int = Field(0, ge=0, description="kind: ocr_scenes: which of its endless collections; another seed has other prompts")
    path: str | None = Field(None, description="file of prompts (kind: file) or image folder (kind: folder)")

    @model_validator(mode="after")
    def _path_given(self) -> PromptConfig:
        if self.kind in ("file", "folder") and not self.path:
            raise ValueError(f"prompts.kind={self.kind} needs prompts.path")
        return self


class DataConfig(Strict):
    """Anchor data: the distribution that the data term holds the policy to."""

    kind: Literal["glyph", "glyph_video", "folder", "prepared"] = Field(
        "glyph",
        description="glyph = rendered signs; glyph_video = rendered clips of moving numbers; "
        "folder = images or clips with a metadata.jsonl (file_name, text); prepared = latents that ddrl prepare-data or ddrl presample made",
    )
    path: str | None = Field(None, description="image folder (kind: folder) or prepared set (kind: prepared)")
    pairing: Literal["free", "own"] = Field(
        "free", description="free = anchor data is drawn apart from the prompts; own = each rollout's own example is its datum (public DDRL code)"
    )
    batch_size: int | None = Field(None, ge=1, description="anchor samples per update; null = as many as rollouts")
    caption_dropout: float = Field(0.0, ge=0, le=1, description="share of anchor captions replaced by the empty prompt (public DDRL code: 0.2)")

    @model_validator(mode="after")
    def _path_given(self) -> DataConfig:
        if self.kind not in ("glyph", "glyph_video") and not self.path:
            raise ValueError(f"data.kind={self.kind} needs data.path")
        return self


class RolloutConfig(Strict):
    """How many rollouts, by how many generators."""

    generators: int = Field(
        2, ge=1, description="rollout generator actors; they also do the network's work of evaluations, in runs without rollouts nothing else"
    )
    groups_per_step: int = Field(8, ge=1, description="groups (prompts) per update, G")
    group_size: int = Field(16, ge=1, description="rollouts per group, N; of a group of 1 the advantage is the reward itself (public DDRL code)")
    min_group_size: int | None = Field(
        None, ge=2, description="rewarded members with which a group is still trained when scoring the others failed; null = all of them, else it is made again"
    )
    concurrent_groups: int = Field(
        1, ge=1, description="groups that a generator samples at a time; 1 keeps sampling independent of who arrives when, bit for bit (strict mode)"
    )
    weights: Literal["in_flight", "drain"] = Field(
        "in_flight", description="new weights: in_flight = between two denoising steps; drain = when the groups being sampled have finished"
    )
    same_initial_noise: bool = Field(False, description="all members of a group start from the same noise (DanceGRPO)")
    threads: int = Field(1, ge=1, description="torch threads of one generator")
    gpus: float = Field(0.0, ge=0, description="GPUs of one generator; of each of its processes where several share the tokens")
    sequence_ranks: int = Field(
        1, ge=1, description="processes of a generator that share the tokens of every forward pass, and in attention its heads (Ulysses); 1 = it is one"
    )

    @model_validator(mode="after")
    def _ranks_have_devices(self) -> RolloutConfig:
        if self.sequence_ranks > 1 and self.gpus % 1:
            raise ValueError(f"each of rollout.sequence_ranks={self.sequence_ranks} processes needs a whole GPU (NCCL refuses two on one), not {self.gpus:g}")
        return self

    @model_validator(mode="after")
    def _group_can_be_enough(self) -> RolloutConfig:
        if self.min_group_size is not None and self.min_group_size > self.group_size:
            raise ValueError(f"rollout.min_group_size {self.min_group_size} is larger than rollout.group_size {self.group_size}")
        return self

    @property
    def enough_members(self) -> int:
        """Members that must have a reward."""
        return self.group_size if self.min_group_size is None else self.min_group_size


class EncoderConfig(Strict):
    """Where prompts are encoded."""

    actors: int = Field(0, ge=0, description="Encoder actors that hold the text encoders for everyone; 0 = generators and ranks each load their own")
    gpus: float = Field(0.0, ge=0, description="GPUs of one Encoder actor")
    threads: int = Field(1, ge=1, description="torch threads of one Encoder actor")
    cache_mb: int = Field(1024, ge=0, description="encoded prompts that one Encoder actor keeps, in MiB (SD3.5 with 128 T5 tokens: 3.2 a prompt)")


class WeightsConfig(Strict):
    """The way of the weights from the ranks to whoever samples."""

    transport: Literal["folder", "objects"] = Field(
        "folder",
        description="folder = files, which outlive ranks and the weight store; objects = Ray's shared memory on the ranks' nodes, gone with its rank",
    )
    path: str | None = Field(None, description="transport: folder: one that every node sees, /dev/shm/… where there is one node; null = the run's weights/")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="floating point type on the way: float32 = as trained; bfloat16 = half the bytes, needs objective.old_log_prob=learner"
    )


class EvaluationConfig(Strict):
    """Held-out numbers: raw weights (EMA beside), ODE sampler, no guidance, fixed prompts, noise and loss points. The rollout generators make
    them, beside their rollouts."""

    every: int = Field(20, ge=0, description="updates between evaluations on dev prompts; 0 = none")
    dev_prompts: int = Field(96, ge=2, description="dev prompts of a periodic evaluation")
    test_prompts: int = Field(512, ge=2, description="test prompts of the evaluations before and after")
    loss_points: int = Field(
        512, ge=2, description="fixed (sample, time, noise) points of the held-out diffusion loss before and after; a periodic evaluation uses a quarter"
    )
    diversity_prompts: int = Field(32, ge=1, description="prompts of the diversity figure before and after; a periodic evaluation uses a quarter")
    diversity_samples: int = Field(16, ge=2, description="samples per prompt of the diversity figure")
    grid_prompts: int = Field(32, ge=1, description="prompts of the sample grids")
