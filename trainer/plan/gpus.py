"""GPUs that a plan may be made for: memory and dense rates, from their makers' data sheets (rates there with sparsity are halved here)."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config.errors import ConfigError


@dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    Attributes:
        memory: bytes; data sheets give decimal GB.
        bf16, fp32: peak operations a second of dense bf16 products with fp32 sums, and of fp32 without tensor cores.
        source: the document.
    """

    name: str
    memory: float
    bf16: float
    fp32: float
    source: str

    def rate(self, dtype: str) -> float:
        """Peak operations a second inside a network of this precision."""
        return self.bf16 if dtype == "bfloat16" else self.fp32


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("h100-80", 80e9, 989e12, 67e12, "NVIDIA H100 data sheet, SXM5: 1,979 with sparsity"),
        GPU("h200-141", 141e9, 989e12, 67e12, "NVIDIA H200 data sheet, SXM: 1,979 with sparsity"),
        GPU("a100-80", 80e9, 312e12, 19.5e12, "NVIDIA A100 80GB data sheet, SXM: 312"),
        GPU("a100-40", 40e9, 312e12, 19.5e12, "NVIDIA A100 data sheet, 40 GB: 312"),
        GPU("l40s-48", 48e9, 362e12, 91.6e12, "NVIDIA L40S data sheet: 362 (733 with sparsity)"),
        GPU("rtx4090-24", 24e9, 165e12, 82.6e12, "NVIDIA Ada GPU architecture, appendix A: 165.2 with fp32 accumulate"),
    )
}


def gpu_of(name: str) -> GPU:
    """Raises ConfigError for a name that is not in the table."""
    if name not in GPUS:
        raise ConfigError(f"--gpu {name}: not in the table; there are {', '.join(GPUS)}")
    return GPUS[name]
