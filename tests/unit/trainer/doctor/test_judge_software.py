"""Python, packages, torch, GPUs and attention: each check with facts that pass and facts that do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.trainer.doctor.facts import CPU_SOFTWARE, CPU_TORCH, FOREIGN, GPU_SOFTWARE, GPU_TORCH, H100, LOADS, ON_CPU, ON_GPU, PACKAGES
from trainer.doctor import judge_software as judge
from trainer.doctor.facts import Attention, Package, Torch, Xformers
from trainer.doctor.finding import worst


@pytest.mark.parametrize("facts", [GPU_SOFTWARE, CPU_SOFTWARE])
def test_a_sound_machine_is_ok_throughout(facts: judge.Software) -> None:
    findings = judge.judge(facts)
    assert worst(findings) == "ok"
    assert not any(f.advice for f in findings)
    assert [f.check for f in findings if f.check.startswith("attention")] == [f"attention {each.dtype}" for each in facts.torch.attention]


def test_python() -> None:
    assert judge.python(GPU_SOFTWARE).found == "3.11.7, wanted >=3.11"
    old = judge.python(replace(GPU_SOFTWARE, python="3.10.4"))
    assert (old.level, old.advice) == ("problem", "make the environment with a Python >=3.11")


def test_packages_as_wanted_are_one_line() -> None:
    (line,) = judge.packages(GPU_SOFTWARE)
    assert line.found == "torch 2.13.0+cu130, ray 2.60.0, xformers 0.0.35; not installed: the extra models"


def test_packages_that_are_missing_or_others() -> None:
    odd = (Package("redis", "==8.1.0", None), Package("diffusers", "==0.42.1", "0.41.0"), Package("wandb", "<1,>=0.19", "1.2", "wandb"))
    _, redis, diffusers, wandb = judge.packages(replace(GPU_SOFTWARE, packages=(*PACKAGES, *odd)))
    assert (redis.check, redis.level, redis.found) == ("package redis", "problem", "not installed, wanted ==8.1.0")
    assert (diffusers.level, diffusers.found) == ("warning", "0.41.0, wanted ==0.42.1: ddrl was not tested with it")
    assert wandb.advice == "pip install 'wandb<1,>=0.19' (the extra ddrl[wandb])"


def test_torch_and_the_driver() -> None:
    assert judge.torch(GPU_SOFTWARE).found == "2.13.0+cu130, built for CUDA 13.0"
    broken = judge.torch(replace(GPU_SOFTWARE, torch=Torch(error="OSError: libcudart.so.13")))
    assert (broken.level, broken.found) == ("problem", "does not work: OSError: libcudart.so.13")
    cpu = judge.torch(replace(CPU_SOFTWARE, driver_gpus=(H100, H100)))
    assert (cpu.level, cpu.found) == ("warning", "2.13.0+cpu, built for CPUs, but the driver lists 2 GPUs")
    blind = judge.torch(replace(GPU_SOFTWARE, torch=replace(GPU_TORCH, gpus=())))
    assert blind.level == "warning"
    assert "sees none of the 1 GPU that the driver lists" in blind.found
    assert "580.65.06" in blind.advice


def test_gpus_and_bfloat16() -> None:
    assert judge.gpus(GPU_SOFTWARE).found == "NVIDIA H100 80GB HBM3 (80 GiB, compute capability 9.0); driver 580.65.06"
    assert judge.gpus(CPU_SOFTWARE).found.startswith("none that torch can use")
    for torch, where in ((GPU_TORCH, "GPU"), (CPU_TORCH, "CPU")):
        there, emulated = judge.bfloat16(torch), judge.bfloat16(replace(torch, bf16=False))
        assert there is not None
        assert (there.level, there.found) == ("ok", f"in hardware on this {where}")
        assert emulated is not None
        assert (emulated.level, emulated.advice) == ("warning", "keep model.dtype=float32")
    assert judge.bfloat16(Torch(error="broken")) is None


def test_why_a_provider_was_taken_and_each_other_was_not() -> None:
    (line,) = judge.attention(GPU_TORCH)
    assert line.found == (
        "auto takes xformers, which works on this GPU (torch_varlen: for where xformers does not work; works here; sdpa: for where xformers does not work)"
    )
    (line,) = judge.attention(CPU_TORCH)
    assert (line.level, line.found) == ("ok", "auto takes sdpa, which runs everywhere (xformers: no kernels for cpu; torch_varlen: no kernels for cpu)")


def fallen(xformers: str, varlen: str) -> Attention:
    trials = {"xformers": xformers, "torch_varlen": varlen}
    others = {name: f"does not work here ({problem})" for name, problem in trials.items()}
    return replace(ON_GPU, name="sdpa", because="which runs everywhere", others=others, trials=trials)


def test_a_gpu_on_which_auto_falls_back() -> None:
    (line,) = judge.attention(replace(GPU_TORCH, attention=(fallen("RuntimeError: no kernel image", "RuntimeError: expected Half"),)))
    assert line.level == "warning"
    assert "xformers: does not work here (RuntimeError: no kernel image); torch_varlen: does not work here (RuntimeError: expected Half)" in line.found
    assert line.advice == "sdpa calls once for each length in a batch and is slower; see docs/doctor.md for what xformers needs"


def test_xformers() -> None:
    """Where its library does not load it refuses every call on a GPU, also those that torch's own kernels would make."""
    foreign = judge.xformers(FOREIGN, GPU_TORCH)
    assert foreign.level == "warning"
    assert foreign.found == (
        "0.0.35, library built for torch 2.10.0+cu128 and CUDA 12.8, which does not load (libcudart.so.12: cannot open shared object file) "
        "beside torch 2.13.0+cu130: it then refuses every call on a GPU"
    )
    assert foreign.advice.startswith("model.attention=auto takes torch_varlen then, for bfloat16")
    assert judge.xformers(FOREIGN, CPU_TORCH).level == "ok"
    assert judge.xformers(LOADS, GPU_TORCH).found.endswith("CUDA 12.8, which loads")
    assert judge.xformers(replace(LOADS, built_for=""), GPU_TORCH).found == "0.0.35, no library of its own"
    assert "not tried" in judge.xformers(replace(FOREIGN, error=None), Torch(error="broken")).found
    assert [judge.xformers(Xformers(), torch).level for torch in (GPU_TORCH, CPU_TORCH)] == ["ok", "ok"]


def test_cuda_versions() -> None:
    assert [judge.cuda(n) for n in (1208, 1300, None)] == ["12.8", "13.0", "none"]


def test_both_types_are_looked_at() -> None:
    both = replace(CPU_TORCH, attention=(ON_CPU, replace(ON_CPU, dtype="bfloat16")))
    assert [f.check for f in judge.attention(both)] == ["attention float32", "attention bfloat16"]
