"""The optimiser and the learner group."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

from pydantic import Field, model_validator

from diffusion.config import Strict

BLOCK = 256
"""Values of a moment in 8 bits that share one scale (Dettmers et al. 2021, arXiv 2110.02861, takes 2048; smaller blocks lose less)."""
LEAST_VALUES, LEAST_ROW = 4096, 32
"""Parameters with fewer values (as in the paper) or with shorter rows keep moments in fp32."""


def scales(shape: Sequence[int]) -> tuple[int, int] | None:
    """Rows and blocks a row of a parameter whose moments are held in 8 bits, one scale a block; None where they stay in fp32.

    A row is everything under one index of the first dimension, along which FSDP cuts; so no block is ever cut, and what a value becomes
    does not depend on the number of ranks.
    """
    row = prod(shape[1:])
    return (shape[0], -(-row // BLOCK)) if len(shape) > 1 and shape[0] * row >= LEAST_VALUES and row >= LEAST_ROW else None


class OptimizerConfig(Strict):
    """AdamW and the moving average of the weights."""

    kind: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw = moments in fp32, 8 bytes a trained value; adamw8bit = in blocks of 256 values with one scale, 2 bytes"
    )
    lr: float = Field(1e-4, gt=0, description="learning rate")
    betas: tuple[float, float] = Field((0.9, 0.99), description="Adam's betas")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled weight decay")
    warmup: int = Field(0, ge=0, description="updates of linear warm-up")
    decay: Literal["none", "cosine"] = Field("none", description="cosine = fall to 2 % of lr over decay_updates, then stay there")
    decay_updates: int | None = Field(None, ge=1, description="length of the cosine; null = the updates of the run's first start, also when resumed")
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    ema: float = Field(0.95, ge=0, lt=1, description="decay of the exponential moving average of the weights; 0 = none")


class LearnerConfig(Strict):
    """The FSDP learner group."""

    ranks: int = Field(2, ge=1, description="learner processes: replicas x FSDP2 shards; rows are shared over ranks / sequence_ranks of them")
    replicas: int = Field(1, ge=1, description="copies of the sharded network (HSDP): each lies on ranks / replicas neighbours, as a node's; 1 = FSDP")
    sequence_ranks: int = Field(
        1, ge=1, description="neighbouring ranks that share the tokens of every pass, and in attention its heads (Ulysses); 1 = a rank has whole rows"
    )
    shard_blocks: bool = Field(
        True, description="shard every transformer block on its own; false = the whole model as one unit (small models: fewer collectives)"
    )
    recompute: bool = Field(
        False, description="activation checkpointing: a block keeps its input alone and is computed again in the backward pass; a third more work"
    )
    accumulate: Literal["whole", "sharded"] = Field(
        "whole",
        description="gradients while the passes of an update add up: whole = on every rank, reduced once; sharded = reduced in every pass, less memory",
    )
    offload: bool = Field(
        False,
        description="sharded weights, their gradients, moments and average rest in host memory and visit the GPU block by block; no effect on CPUs",
    )
    checkpoint_async: bool = Field(
        True,
        description="write checkpoints while training goes on, from a copy of a rank's shards in host memory; false = ranks wait for the disk, no copy",
    )
    updates_per_claim: int = Field(
        1,
        ge=1,
        description="optimiser updates on the groups of a step: whole groups, and the anchor data that goes with them, in so many parts; ratios are against "
        "the policy before the first of them (objective.old_log_prob=learner) or that of the rollout",
    )
    micro_batch: int = Field(160, ge=1, description="most samples in one forward pass of a rank")
    micro_tokens: int | None = Field(
        None, ge=1, description="most tokens in one forward pass of a rank, of pictures or clips and of text; a larger sample goes alone; null = no bound"
    )
    threads: int = Field(1, ge=1, description="torch threads of one rank")
    gpus: float = Field(0.0, ge=0, description="GPUs of one rank; 0 = CPU and gloo")
    max_failures: int = Field(3, ge=0, description="worker-group restarts before the run gives up")
    collective_timeout_s: float = Field(120.0, gt=0, description="deadline of a collective among ranks")
    max_skipped: int = Field(20, ge=0, description="updates skipped in a row for non-finite gradients before the run gives up")

    @model_validator(mode="after")
    def _is_a_mesh(self) -> LearnerConfig:
        if self.ranks % self.replicas:
            raise ValueError(f"ranks={self.ranks} is no multiple of replicas={self.replicas}")
        if self.shards % self.sequence_ranks:
            raise ValueError(f"{self.shards} ranks of a replica are no multiple of sequence_ranks={self.sequence_ranks}")
        return self

    @property
    def shards(self) -> int:
        """Parts that weights, gradients and moments are cut into."""
        return self.ranks // self.replicas

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that have rows of their own."""
        return self.ranks // self.sequence_ranks

    def rows(self, tokens: int) -> int:
        """Most samples of `tokens` tokens each in one forward pass of a rank, with those that share it; 1 where a single one exceeds `micro_tokens`."""
        if self.micro_tokens is None:
            return self.micro_batch
        return max(1, min(self.micro_batch, self.sequence_ranks * self.micro_tokens // tokens))
