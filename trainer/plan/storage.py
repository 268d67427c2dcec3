"""Bytes of payloads, of the store that keeps them, and of what a run leaves on disk."""

from __future__ import annotations

from dataclasses import dataclass

from diffusion.kernel_names import stochastic_steps
from replay.policy import BufferSettings, disk_needed, memory_needed
from trainer.config.run import RunConfig
from trainer.plan.memory import BYTES, MASTER, Part, checkpoint_bytes, kept_versions, version_bytes
from trainer.plan.sizes import Sizes

KEPT = 2
"""Checkpoints and exports that a run keeps."""
FILE = 2
"""Bytes of a value in the files of frozen parts, as published."""


def buffer_settings(config: RunConfig) -> BufferSettings:
    """What the run asks of the replay buffer."""
    return BufferSettings(
        groups_per_step=config.rollout.groups_per_step if config.uses_policy else 0,
        data_per_step=1 if config.feeds_data else 0,
        max_staleness=config.replay.max_staleness,
        window=config.replay.window,
        lease_s=config.replay.lease_s,
        max_attempts=config.replay.max_attempts,
        max_bytes=config.replay.max_bytes,
        data_depth=config.replay.data_depth,
        checkpoint_interval=config.checkpoint_every,
        drop_zero_variance=config.replay.drop_zero_variance,
        part_bytes=config.replay.part_bytes,
        # a strictly ordered run must not leave holes in the sequence of prompts when it goes back to a checkpoint
        remake_cut_off=config.replay.max_staleness == 0 and config.replay.window == 1,
    )


def stored_states(config: RunConfig) -> int:
    """Most states of a rollout that are stored: those before and after its trained steps, of which neighbours share one."""
    steps = config.sampler.trained_steps
    if isinstance(steps, list):
        return len({*steps, *(step + 1 for step in steps)})
    return min(2 * steps if config.sampler.trained_choice == "scattered" else steps + 1, stochastic_steps(config.sampler.kernel, config.sampler.steps) + 1)


def group_bytes(config: RunConfig, sizes: Sizes) -> int:
    """One group's payload, without the table of its head (`actors.payload` has the table)."""
    if not config.uses_policy:
        return 0
    members, k, latent = config.rollout.group_size, config.sampler.trained_count, sizes.latent_values
    if config.objective.on_samples:
        total = members * latent * 4
    else:
        states = stored_states(config) + (k if config.sampler.kernel == "edm_2ab" else 0)  # two-step kernels keep the prediction before
        total = members * (states * latent * BYTES[config.replay.store_dtype] + k * 8) + k * 8
    total += (config.sampler.steps + 1) * 4
    if config.uses_data and not config.feeds_data:
        total += latent * 4
    return total


def data_bytes(config: RunConfig, sizes: Sizes) -> int:
    """One anchor batch's payload, without the table of its head."""
    return config.data_rows * sizes.latent_values * 4 if config.feeds_data else 0


@dataclass(frozen=True)
class Storage:
    """Payloads and their store.

    Attributes:
        group, data, claim: bytes of a group, of an anchor batch, and of everything that an update claims.
        groups, batches: most groups and batches that are not settled, and with them the bytes that must be kept: `retained`.
        budget: `replay.max_bytes`.
        store: bytes that the store may take of memory (Redis) or of disk (folder).
        disk: what lies on disk, by kind.
    """

    group: int
    data: int
    claim: int
    groups: int
    batches: int
    retained: int
    budget: int
    store: Part
    disk: tuple[Part, ...]


def storage_of(config: RunConfig, sizes: Sizes) -> Storage:
    """See `Storage`."""
    settings, group, data = buffer_settings(config), group_bytes(config, sizes), data_bytes(config, sizes)
    retained = settings.retained_groups * group + settings.retained_data * data
    budget, in_redis = config.replay.max_bytes, config.replay.payloads == "redis"
    store = Part("Redis", memory_needed(budget), "memory while its log is rewritten") if in_redis else Part("folder", budget, "replay.max_bytes")
    return Storage(
        group=group,
        data=data,
        claim=config.rollout.groups_per_step * group + data,
        groups=settings.retained_groups,
        batches=settings.retained_data,
        retained=retained,
        budget=budget,
        store=store,
        disk=_disk(config, sizes, in_redis),
    )


def _disk(config: RunConfig, sizes: Sizes, in_redis: bool) -> tuple[Part, ...]:
    network, ema = sizes.transformer, bool(config.optimizer.ema)
    version = MASTER * sizes.published_values
    plain = MASTER * (network.values - (network.trained if sizes.adapted else 0))
    frozen = FILE * ((sizes.encoders[0].parameters if sizes.encoders else 0) + (sizes.vae.parameters if sizes.vae else 0))
    export = plain + frozen + (version if sizes.adapted else 0)
    parts = [
        Part("checkpoints", (KEPT + 1) * checkpoint_bytes(config, sizes), f"{KEPT} of weights, optimiser and average, and one being written"),
        Part("exports", KEPT * (1 + ema) * export, f"{KEPT} policies in fp32{' and their averages' if ema else ''}, with text_encoder and vae"),
    ]
    if config.weights.transport == "folder":
        kept = kept_versions(config)
        parts.append(Part("weights", kept * version_bytes(config, sizes), f"{kept} versions: the newest two, the next, one that is evaluated"))
    if in_redis:
        parts.append(Part("log of Redis", disk_needed(config.replay.max_bytes), "embedded server; elsewhere on its own machine"))
    else:
        parts.append(Part("payloads", config.replay.max_bytes, f"in {config.replay.payloads}"))
    return tuple(parts)
