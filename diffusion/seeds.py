"""Counter-based randomness: every draw has a name, and the name alone decides it.

Nothing random hides in a process: noise of a group is a function of (run seed, group, member, step), so any group can
be made again anywhere, and a sample does not depend on who shares its batch. Generators live on the CPU so that a run
draws the same numbers on every device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

INITIAL = -1
"""Step index of a trajectory's starting noise."""


def key(*parts: int | str) -> int:
    """63-bit seed of a name, e.g. `key(seed, "noise", group, member, step)`; stable across machines and versions."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """CPU generator of a name."""
    return torch.Generator().manual_seed(key(*parts))


def step_noise(seed: int, group: int, member: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """Gaussian noise of one step of one rollout, fp32 on the CPU; `step=INITIAL` is the starting noise."""
    return torch.randn(shape, generator=generator(seed, "noise", group, member, step))
