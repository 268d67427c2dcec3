"""How many tokens fit: the budget of one packed forward pass, from the architecture and the memory that is free.

What grows with the budget is the activations of one forward pass; weights are resident already, states and noise of the
running sequences are a few values a token. The model says how many bytes of activations a token takes at the peak
(`activation_bytes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

SHARE = 0.7
"""Part of the free memory that activations may take: the allocator fragments, and others use the device too."""


@dataclass(frozen=True)
class MemoryPlan:
    """The token budget and where it comes from.

    Attributes:
        tokens: the budget.
        fitting: tokens whose activations fit into `SHARE` of the free memory.
        bytes_per_token: activations of one token at the peak.
        free: free bytes of the device.
        device: its name.
        reserved: bytes of them that are kept for a second set of weights (`diffusion.engine.side`).
    """

    tokens: int
    fitting: int
    bytes_per_token: int
    free: int
    device: str
    reserved: int = 0

    def __str__(self) -> str:
        bound = "memory" if self.fitting <= self.tokens else "sampler.max_tokens"
        kept = f", {self.reserved / 1e9:.1f} of them for weights under evaluation" if self.reserved else ""
        return (
            f"{self.tokens} tokens a forward pass, bound by {bound}: {self.bytes_per_token / 1000:.1f} kB of activations a token, "
            f"{self.free / 1e9:.1f} GB free on {self.device}{kept}, {self.fitting} tokens would fit"
        )


def free_bytes(device: torch.device) -> int:
    """Free memory of a device; on the CPU what the system calls available, or what is left of the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    try:
        limit, used, stat = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current", "stat"))
    except OSError:
        return available
    if limit.strip() == "max":
        return available
    # file pages that nobody uses (a checkpoint that was read) count as used, and are given up when memory is asked for
    reclaimable = next((int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file ")), 0)
    return max(0, min(available, int(limit) - int(used) + reclaimable))


def plan_memory(bytes_per_token: int, device: torch.device, max_tokens: int, reserved: int = 0) -> MemoryPlan:
    """The budget: `max_tokens`, or less if that does not fit.

    Args:
        bytes_per_token: activations of one packed token at the peak of a forward pass.
        device: where the model is.
        max_tokens: upper bound, from the configuration.
        reserved: bytes that will be wanted for something else.
    """
    free = free_bytes(device)
    fitting = max(1, int(max(0, free - reserved) * SHARE) // bytes_per_token)
    return MemoryPlan(min(max_tokens, fitting), fitting, bytes_per_token, free, str(device), reserved)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
