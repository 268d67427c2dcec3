"""A machine on which everything is as it should be: a GPU machine, and one without. Tests change one fact at a time."""

from __future__ import annotations

from trainer.doctor.facts import GPU, Attention, Disk, Machine, Package, Recipe, Software, Torch, Xformers

H100 = GPU("NVIDIA H100 80GB HBM3", 80 << 30, (9, 0), "580.65.06")
WORKS = {"xformers": "", "torch_varlen": ""}
ON_GPU = Attention(
    "bfloat16",
    "cuda",
    "xformers",
    "which works on this GPU",
    {"torch_varlen": "for where xformers does not work", "sdpa": "for where xformers does not work"},
    WORKS,
)
ON_CPU = Attention("float32", "cpu", "sdpa", "which runs everywhere", {"xformers": "no kernels for cpu", "torch_varlen": "no kernels for cpu"})
PACKAGES = (
    Package("torch", "==2.13.0", "2.13.0+cu130"),
    Package("ray", "==2.60.0", "2.60.0"),
    Package("numpy", "<3,>=1.26", "2.4.6"),
    Package("xformers", "==0.0.35", "0.0.35", "gpu"),
    Package("transformers", "==5.23.0", None, "models"),
)
GPU_TORCH = Torch("2.13.0+cu130", "13.0", (H100,), True, (ON_GPU,))
CPU_TORCH = Torch("2.13.0+cpu", None, (), True, (ON_CPU,))
LOADS = Xformers("0.0.35", "2.10.0+cu128", 1208, "")
FOREIGN = Xformers("0.0.35", "2.10.0+cu128", 1208, "libcudart.so.12: cannot open shared object file")
GPU_SOFTWARE = Software("3.11.7", ">=3.11", PACKAGES, GPU_TORCH, LOADS, (H100,))
CPU_SOFTWARE = Software("3.11.7", ">=3.11", PACKAGES, CPU_TORCH, Xformers())
GB = 10**9
MACHINE = Machine(
    cpus=8,
    memory=32 * GB,
    available=24 * GB,
    shm=16 * GB,
    disks=(Disk("run folders", "runs", 200 * GB, 500 * GB), Disk("temporary files", "/tmp", 50 * GB, 100 * GB)),
    open_files=(1024, 65536),
    environment={},
    redis_servers=(("/usr/bin/redis-server", "7.0.15"), ("/venv/redis-server", "6.2.14")),
)
RECIPE = Recipe("recipe.yaml", "mine", object_store=256 << 20)
