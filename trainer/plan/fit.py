"""What fits on N GPUs and what does not, and the nearest change that would make it fit.

Placing: each learner rank takes a GPU that has no other rank (NCCL refuses two ranks on one), then generators and rewards the GPU with most
room left that has their share, as the recipe's `gpus` say. A GPU holds what its processes hold together.

Changes are tried in the order in which they alter the run least: recomputing, gradients reduced in every pass, text encoders in bf16, shards in
host memory, moments in 8 bits, an adapter instead of all weights, what is frozen beside it in bf16, a smaller micro-batch, more ranks, a smaller
picture, another GPU; each alone, then all that can be made together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from trainer.config.errors import ConfigError
from trainer.config.run import RunConfig
from trainer.plan.assumptions import Assumptions
from trainer.plan.dry import vae_pass
from trainer.plan.gpus import GPU, GPUS
from trainer.plan.memory import Process, gathers_gradients, processes
from trainer.plan.sizes import Sizes, sizes_of

ADAPTER = {"rank": 32, "alpha": 64.0}
"""The adapter that is proposed: Flow-GRPO's and DiffusionNFT's on SD3.5."""
SMALLEST = 256
"""Edge in pixels below which no smaller picture is proposed."""


GPU_CHANGE = "another GPU"


@dataclass
class Device:
    """A GPU and what lies on it."""

    index: int
    free: float = 1.0
    holds: list[Process] = field(default_factory=list)

    def used(self, memory: float) -> float:
        """Bytes; a process that fills its share counts as that."""
        return sum(p.gpus * memory if p.reserved else p.total for p in self.holds)


@dataclass(frozen=True)
class Placement:
    """Processes on GPUs.

    Attributes:
        devices: all GPUs.
        homeless: processes that no GPU has room for, by name and how many.
        limit: bytes of a GPU that are planned with.
        memory: bytes of a GPU.
    """

    devices: list[Device]
    homeless: dict[str, int]
    limit: float
    memory: float

    @property
    def fullest(self) -> Device | None:
        return max(self.devices, key=lambda d: d.used(self.memory), default=None)

    @property
    def most(self) -> float:
        """Bytes on the fullest GPU."""
        return self.fullest.used(self.memory) if self.fullest else 0.0

    @property
    def fits(self) -> bool:
        return not self.homeless and self.most <= self.limit

    @property
    def idle(self) -> int:
        return sum(not d.holds for d in self.devices)


def place(parts: list[Process], count: int, memory: float, usable: float) -> Placement:
    """Put every process that asks for a GPU on one of `count`; one that asks for several takes whole ones."""
    devices, homeless = [Device(i) for i in range(count)], dict[str, int]()
    for part in parts:
        for _ in range(part.count if part.gpus else 0):
            taken = _taken(devices, part)
            if taken is None:
                homeless[part.name] = homeless.get(part.name, 0) + 1
                continue
            for device in taken:
                device.free -= min(1.0, part.gpus)
                device.holds.append(part)
    return Placement(devices, homeless, memory * usable, memory)


def _taken(devices: list[Device], part: Process) -> list[Device] | None:
    whole, share = max(1, int(part.gpus)), min(1.0, part.gpus)
    rank = part.name == "learner rank"
    room = [d for d in devices if d.free >= share - 1e-9 and not (rank and part in d.holds)]
    room.sort(key=lambda d: -d.free)
    return room[:whole] if len(room) >= whole else None


@dataclass(frozen=True)
class Change:
    """One way to make a run fit.

    Attributes:
        name: what is changed.
        keys: how: settings as on the command line.
        fits: whether the run then fits; `most`: bytes on the fullest GPU then.
    """

    name: str
    keys: tuple[str, ...]
    fits: bool
    most: float


@dataclass(frozen=True)
class Finding:
    """Something that a person should know. `kind` is a word to branch on; an `error` keeps the run from fitting."""

    level: Literal["error", "warning", "note"]
    kind: str
    message: str


@dataclass(frozen=True)
class Setting:
    """A run as it would be: recipe, assumptions, GPU and how many."""

    config: RunConfig
    assumptions: Assumptions
    gpu: GPU
    count: int

    def sizes(self) -> Sizes:
        return sizes_of(self.config, self.assumptions)

    def placement(self) -> Placement:
        """Raises ConfigError for a recipe that does not work."""
        sizes, sampler = self.sizes(), self.config.sampler
        parts = processes(self.config, sizes, vae_pass(sizes, sampler.height, sampler.width, sampler.frames), self.assumptions)
        return place(parts, self.count, self.gpu.memory, self.assumptions.usable)

    def with_keys(self, **changes: Any) -> Setting | None:
        """With dotted keys (`__` for a dot) of the recipe changed; None where that is no valid recipe."""
        tree = self.config.model_dump(mode="json")
        for key, value in changes.items():
            node, *rest = key.split("__")
            target = tree
            for step in [node, *rest][:-1]:
                target = target[step]
            target[[node, *rest][-1]] = value
        try:
            return Setting(RunConfig.model_validate(tree), self.assumptions, self.gpu, self.count)
        except ValidationError:
            return None


Step = tuple[str, tuple[str, ...], "Setting | None"]


def _recompute(s: Setting) -> Iterator[Step]:
    if not s.config.learner.recompute:
        yield "activation checkpointing", ("learner.recompute=true",), s.with_keys(learner__recompute=True)


def _gradients(s: Setting) -> Iterator[Step]:
    if s.config.learner.shards > 1 and s.config.learner.shard_blocks and gathers_gradients(s.config, s.sizes().tokens):
        yield "sharded gradients", ("learner.accumulate=sharded",), s.with_keys(learner__accumulate="sharded")


def _texts(s: Setting) -> Iterator[Step]:
    if s.config.model.text_dtype == "float32" and s.sizes().encoders:
        yield "text encoders in bf16", ("model.text_dtype=bfloat16",), s.with_keys(model__text_dtype="bfloat16")


def _offload(s: Setting) -> Iterator[Step]:
    if s.config.learner.gpus and not s.config.learner.offload:
        yield "shards in host memory", ("learner.offload=true",), s.with_keys(learner__offload=True)


def _moments(s: Setting) -> Iterator[Step]:
    if s.config.optimizer.kind == "adamw" and not s.config.learner.offload:  # in host memory they take nothing of a GPU
        yield "moments in 8 bits", ("optimizer.kind=adamw8bit",), s.with_keys(optimizer__kind="adamw8bit")


def _frozen(s: Setting) -> Iterator[Step]:
    model = s.config.model
    if model.lora.rank and model.dtype == "bfloat16" and model.base_dtype == "float32":
        yield "frozen weights in bf16", ("model.base_dtype=bfloat16",), s.with_keys(model__base_dtype="bfloat16")


def _adapter(s: Setting) -> Iterator[Step]:
    if not s.config.model.lora.rank:
        keys = tuple(f"model.lora.{k}={v:g}" for k, v in ADAPTER.items())
        yield "an adapter instead of all weights", keys, s.with_keys(model__lora__rank=ADAPTER["rank"], model__lora__alpha=ADAPTER["alpha"])


def _micro_batch(s: Setting) -> Iterator[Step]:
    rows = s.config.learner.rows(s.sizes().tokens)
    while rows > 1:
        rows //= 2
        yield "a smaller micro-batch", (f"learner.micro_batch={rows}",), s.with_keys(learner__micro_batch=rows)


def _ranks(s: Setting) -> Iterator[Step]:
    ranks = s.config.learner.ranks * 2
    while s.config.learner.gpus and ranks <= s.count:
        yield "more ranks", (f"learner.ranks={ranks}",), s.with_keys(learner__ranks=ranks)
        ranks *= 2


def _sequence(s: Setting) -> Iterator[Step]:
    learner, heads = s.config.learner, s.sizes().network.config.num_attention_heads
    for count in range(learner.sequence_ranks + 1, learner.shards + 1 if learner.gpus else 0):
        if heads % count == 0 and learner.shards % count == 0:
            yield "ranks that share the tokens of a sample", (f"learner.sequence_ranks={count}",), s.with_keys(learner__sequence_ranks=count)


def _picture(s: Setting) -> Iterator[Step]:
    height, width = s.config.sampler.height, s.config.sampler.width
    for share in (0.75, 0.5):
        h, w = (int(n * share) // 32 * 32 for n in (height, width))
        if min(h, w) >= SMALLEST:
            yield "a smaller picture", (f"sampler.height={h}", f"sampler.width={w}"), s.with_keys(sampler__height=h, sampler__width=w)


def _gpu(s: Setting) -> Iterator[Step]:
    for gpu in sorted(GPUS.values(), key=lambda g: g.memory):
        if gpu.memory > s.gpu.memory:
            yield GPU_CHANGE, (f"--gpu {gpu.name}",), Setting(s.config, s.assumptions, gpu, s.count)


def _count(s: Setting) -> Iterator[Step]:
    """GPUs enough for every process, when they are too few for the shares that are asked for."""
    count = max(1, s.count)
    while count < 4096:
        count += 1
        wider = Setting(s.config, s.assumptions, s.gpu, count)
        if not wider.placement().homeless:
            yield "more GPUs", (f"--gpus {count}",), wider
            return


CHANGES: tuple[Callable[[Setting], Iterator[Step]], ...] = (
    _recompute,
    _gradients,
    _texts,
    _offload,
    _moments,
    _adapter,
    _frozen,
    _micro_batch,
    _ranks,
    _sequence,
    _picture,
    _gpu,
)
"""In the order in which they alter the run least."""


def changes(setting: Setting) -> list[Change]:
    """Ways to make a run fit that does not: the first of each kind that suffices alone, else its furthest; where none on the same GPUs
    does, all kinds one on the other until it fits, before another GPU."""
    if setting.placement().homeless:
        return [_tried(step) for step in _count(setting)]
    found = []
    for kind in CHANGES:
        tried = [_tried(step) for step in kind(setting) if step[2] is not None]
        if tried:
            found.append(next((c for c in tried if c.fits), tried[-1]))
    if any(c.fits for c in found if c.name != GPU_CHANGE):
        return found
    for kinds in (CHANGES[:-1], CHANGES):
        together = _together(setting, kinds)
        if together is not None:
            others = [c for c in found if c.name == GPU_CHANGE]
            return [*(c for c in found if c.name != GPU_CHANGE), together, *others]
    return found


def _together(setting: Setting, kinds: tuple[Callable[[Setting], Iterator[Step]], ...]) -> Change | None:
    """Changes of these kinds, one on the other, until the run fits; None where it never does."""
    names: list[str] = []
    keys: list[str] = []
    now = setting
    for kind in kinds:
        best: Step | None = None
        for step in kind(now):
            if step[2] is None:
                continue
            best = step
            if _tried(step).fits:
                break
        if best is None or best[2] is None:
            continue
        now = best[2]
        names.append(best[0])
        keys.extend(best[1])
        placement = now.placement()
        if placement.fits:
            return Change(" and ".join(names), tuple(keys), True, placement.most)
    return None


def _tried(step: Step) -> Change:
    name, keys, setting = step
    assert setting is not None
    try:
        placement = setting.placement()
    except ConfigError:
        return Change(name, keys, False, float("inf"))
    return Change(name, keys, placement.fits, placement.most)
