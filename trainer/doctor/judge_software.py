"""Judging: Python, packages, torch, GPUs, attention. Pure functions of facts."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet

from trainer.doctor.facts import Attention, Package, Software, Torch, Xformers
from trainer.doctor.finding import Finding

SHOWN = ("torch", "ray", "diffusers", "transformers", "xformers", "redis")
"""Packages whose version is said even where it is the one wanted."""
GIB = 1 << 30


def python(facts: Software) -> Finding:
    """Is Python new enough?"""
    wanted = facts.requires_python
    found = f"{facts.python}, wanted {wanted}" if wanted else facts.python
    if wanted and not SpecifierSet(wanted).contains(facts.python, prereleases=True):
        return Finding("python", "problem", found, f"make the environment with a Python {wanted}")
    return Finding("python", "ok", found)


def packages(facts: Software) -> list[Finding]:
    """Is what ddrl asks for installed, in the versions it was tested with? One line for all, and one for each that is not."""
    odd = [finding for package in facts.packages if (finding := _package(package)) is not None]
    there = {p.name: p.found for p in facts.packages if p.found is not None}
    versions = ", ".join(f"{name} {there[name]}" for name in SHOWN if name in there)
    absent = sorted({p.extra for p in facts.packages if p.extra and p.found is None})
    extras = f"; not installed: the extra {', '.join(absent)}" if absent else ""
    return [Finding("packages", "ok", f"{versions or 'none known'}{extras}"), *odd]


def _package(package: Package) -> Finding | None:
    name = f"package {package.name}"
    extra = f"[{package.extra}]" if package.extra else ""
    if package.found is None:
        missing = f"not installed, wanted {package.wanted}"
        return None if package.extra else Finding(name, "problem", missing, "pip install -c constraints.txt ddrl (or make setup)")
    if SpecifierSet(package.wanted).contains(package.found, prereleases=True):
        return None
    install = f"pip install '{package.name}{package.wanted}'" + (f" (the extra ddrl{extra})" if extra else "")
    return Finding(name, "warning", f"{package.found}, wanted {package.wanted}: ddrl was not tested with it", install)


def torch(facts: Software) -> Finding:
    """Does torch import, and is it built for the GPUs that the driver lists?"""
    found = facts.torch
    if found.error:
        return Finding("torch", "problem", f"does not work: {found.error}", "install torch anew: pip install --force-reinstall -c constraints.txt torch")
    build = f"{found.version}, built for CUDA {found.cuda}" if found.cuda else f"{found.version}, built for CPUs"
    listed = facts.driver_gpus
    if listed and found.cuda is None:
        return Finding(
            "torch", "warning", f"{build}, but the driver lists {_many(len(listed))}", "install a CUDA build: pip install torch from PyPI, without TORCH_INDEX"
        )
    if listed and not found.gpus:
        advice = f"update the driver (now {listed[0].driver}) to one for CUDA {found.cuda}, and look at CUDA_VISIBLE_DEVICES"
        return Finding("torch", "warning", f"{build}, which sees none of the {_many(len(listed))} that the driver lists", advice)
    return Finding("torch", "ok", build)


def gpus(facts: Software) -> Finding:
    """Which GPUs can be used."""
    found = facts.torch.gpus
    if not found:
        return Finding("gpus", "ok", "none that torch can use; ddrl runs on CPUs with learner.gpus=0 and rollout.gpus=0")
    driver = f"; driver {facts.driver_gpus[0].driver}" if facts.driver_gpus else ""
    each = ", ".join(f"{g.name} ({g.memory / GIB:.0f} GiB, compute capability {g.capability[0]}.{g.capability[1]})" for g in found)
    return Finding("gpus", "ok", each + driver)


def bfloat16(facts: Torch) -> Finding | None:
    """Is bfloat16 computed in hardware?"""
    if facts.error or facts.bf16 is None:
        return None
    where = "GPU" if facts.gpus else "CPU"
    if facts.bf16:
        return Finding("bfloat16", "ok", f"in hardware on this {where}")
    return Finding("bfloat16", "warning", f"not in hardware on this {where}: it is emulated, and slow", "keep model.dtype=float32")


def attention(facts: Torch) -> list[Finding]:
    """What `model.attention: auto` takes, why, and why not the others: a line for each type of the network."""
    return [_attention(each) for each in facts.attention]


def _attention(choice: Attention) -> Finding:
    passed = "; ".join(f"{name}: {_reason(choice, name)}" for name in choice.others)
    found = f"auto takes {choice.name}, {choice.because}" + (f" ({passed})" if passed else "")
    check = f"attention {choice.dtype}"
    if choice.device == "cpu" or choice.name != "sdpa":
        return Finding(check, "ok", found)
    return Finding(check, "warning", found, "sdpa calls once for each length in a batch and is slower; see docs/doctor.md for what xformers needs")


def _reason(choice: Attention, name: str) -> str:
    """Why not `name`; of one that `auto` had no need to try, also what a call of it said."""
    problem = choice.trials.get(name)
    if problem is None or problem in choice.others[name]:
        works = "; works here" if problem == "" else ""
        return choice.others[name] + works
    return f"{choice.others[name]}; does not work here ({problem})"


def xformers(facts: Xformers, torch: Torch) -> Finding:
    """Is xformers there, and does its library load beside this torch?"""
    if facts.version is None:
        if torch.gpus:
            return Finding("xformers", "ok", "not installed; packed attention on GPUs is torch_varlen then, for bfloat16, or see docs/doctor.md")
        return Finding("xformers", "ok", "not installed; it has kernels for GPUs only")
    library = f"library built for torch {facts.built_for} and CUDA {cuda(facts.built_cuda)}" if facts.built_for else "no library of its own"
    built = f"{facts.version}, {library}"
    if facts.error is None:
        return Finding("xformers", "ok", f"{built}; not tried, because torch does not work")
    if not facts.error:
        return Finding("xformers", "ok", f"{built}, which loads" if facts.built_for else built)
    why = f"{built}, which does not load ({facts.error})"
    if not torch.gpus:
        return Finding("xformers", "ok", f"{why}; on a CPU it is not used")
    advice = "model.attention=auto takes torch_varlen then, for bfloat16, which needs no xformers; docs/doctor.md says what makes xformers load"
    return Finding("xformers", "warning", f"{why} beside torch {torch.version}: it then refuses every call on a GPU", advice)


def cuda(number: int | None) -> str:
    """1208 as 12.8."""
    return "none" if number is None else f"{number // 100}.{number % 100}"


def _many(count: int) -> str:
    return f"{count} GPU" + "s" * (count != 1)


def judge(facts: Software) -> list[Finding]:
    """All of them, in the order in which they are shown."""
    one = [torch(facts), gpus(facts), bfloat16(facts.torch), *attention(facts.torch), xformers(facts.xformers, facts.torch)]
    return [python(facts), *packages(facts), *(finding for finding in one if finding is not None)]
