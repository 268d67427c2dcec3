"""Facts about a machine, as plain values: what the checks judge. Sizes are bytes; a fact that could not be had is None or ''."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Package:
    """A requirement of ddrl (`wanted`, a version specifier; of the extra `extra`, '' for a plain one) and the version installed."""

    name: str
    wanted: str
    found: str | None
    extra: str = ""


@dataclass(frozen=True)
class GPU:
    """A GPU as the driver or torch names it; `capability` is the compute capability, (9, 0) of a H100."""

    name: str
    memory: int
    capability: tuple[int, int]
    driver: str = ""


@dataclass(frozen=True)
class Attention:
    """What `model.attention: auto` takes for networks that compute in `dtype`.

    Attributes:
        because, others: why this provider, and by name why not the others.
        trials: problem of each GPU provider in a small call, '' where it worked; empty on a CPU.
    """

    dtype: str
    device: str
    name: str
    because: str
    others: Mapping[str, str]
    trials: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Torch:
    """The installed torch, asked in a process of its own.

    Attributes:
        cuda: CUDA version of the build, None for a CPU build.
        gpus: devices that it sees.
        bf16: whether the first GPU, or the CPU without one, computes bfloat16 in hardware; None unknown.
        error: why it could not be asked; nothing else is set then.
    """

    version: str = ""
    cuda: str | None = None
    gpus: tuple[GPU, ...] = ()
    bf16: bool | None = None
    attention: tuple[Attention, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Xformers:
    """The installed xformers.

    Attributes:
        version: None where it is not installed.
        built_for: torch that its own library was compiled for, by `xformers/cpp_lib.json`; '' where it has no library.
        built_cuda: CUDA version of that, as 1208 for 12.8.
        error: why its library, or the package, does not load; '' where it does, None where it was not tried.
    """

    version: str | None = None
    built_for: str = ""
    built_cuda: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Software:
    """Python, packages, torch and drivers. `requires_python` is of ddrl; `driver_gpus` are those that nvidia-smi lists."""

    python: str
    requires_python: str
    packages: tuple[Package, ...]
    torch: Torch
    xformers: Xformers
    driver_gpus: tuple[GPU, ...] = ()


@dataclass(frozen=True)
class Disk:
    """Room for `what` on the file system of `path`."""

    what: str
    path: str
    free: int
    total: int


@dataclass(frozen=True)
class Machine:
    """Memory, disks, limits and environment.

    Attributes:
        memory: that this process may use, the container's where it is limited; `available`: of it now.
        shm: free room of /dev/shm.
        open_files: soft and hard limit.
        environment: variables that matter to a run.
        redis_servers: (binary, version) in the order in which an embedded server would take them.
        leftovers: folders of clusters whose driver was killed.
        token: whether the Hugging Face hub would be shown a token.
        hub: who the token belongs to, or why the hub does not take it; None: not asked.
    """

    cpus: int
    memory: int
    available: int | None
    shm: int | None
    disks: tuple[Disk, ...]
    open_files: tuple[int, int]
    environment: Mapping[str, str]
    redis_servers: tuple[tuple[str, str], ...]
    leftovers: tuple[str, ...] = ()
    token: bool = False
    hub: HubAnswer | None = None


@dataclass(frozen=True)
class HubAnswer:
    """What the hub said of the token (`who`), or why not (`error`)."""

    who: str = ""
    error: str = ""


@dataclass(frozen=True)
class Service:
    """Something that a recipe needs and that has to answer: what it is, where (no password), what it said (`answer`), or why not."""

    what: str
    where: str
    answer: str = ""
    error: str = ""


@dataclass(frozen=True)
class PlanFacts:
    """What `ddrl plan` says of the recipe on the GPUs of this machine. `disk` and `hosts` are bytes; None: not on this machine."""

    where: str
    errors: tuple[str, ...] = ()
    nearest: str = ""
    disk: float = 0.0
    hosts: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """A recipe and what it needs.

    Attributes:
        error: why it is no valid recipe; nothing else is set then.
        files_error: which file is missing or does not fit.
        object_store: bytes of Ray's object store, 0 where a cluster is joined.
        lacking: modules of extras that it needs and that are not installed, with the extra.
        hub: id of its policy on the hub that is not in the cache, '' otherwise.
        access: what the hub says of reading that policy; None: not asked.
    """

    path: str
    name: str = ""
    error: str = ""
    files_error: str = ""
    object_store: int = 0
    lacking: Mapping[str, str] = field(default_factory=dict)
    hub: str = ""
    access: HubAnswer | None = None
    plan: PlanFacts | None = None
    plan_error: str = ""
    services: tuple[Service, ...] = ()


@dataclass(frozen=True)
class Trial:
    """What a recipe's own first groups and updates show; None where the trial did not come that far.

    Attributes:
        skipped: why nothing was tried; '' where it was.
        stage, error: what failed, and how; '' where nothing did.
        scorers: rewards whose self-test passed.
        means, spreads: mean and standard deviation of the reward within each group of the starting policy.
        top: share of all members at the highest reward that was seen.
        missing: share of scores that are missing.
        deviation, limit: largest |ratio - 1| of a transition replayed at once, and a tenth of the clip; None without densities.
        policy_gradient, data_gradient, cosine: norms of the gradients of both terms at the start, and their cosine.
        rewards, reward_error: mean reward by update on one prompt and the standard error of one such mean.
        prompt: which one.
        loss_before, loss_after: diffusion loss on fixed points of the anchor data before those updates and after.
    """

    skipped: str = ""
    stage: str = ""
    error: str = ""
    scorers: tuple[str, ...] = ()
    means: tuple[float, ...] = ()
    spreads: tuple[float, ...] = ()
    top: float | None = None
    missing: float = 0.0
    deviation: float | None = None
    limit: float | None = None
    policy_gradient: float | None = None
    data_gradient: float | None = None
    cosine: float | None = None
    rewards: tuple[float, ...] = ()
    reward_error: float | None = None
    prompt: str = ""
    loss_before: float | None = None
    loss_after: float | None = None
