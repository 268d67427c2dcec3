"""A recipe's plan: sizes, memory, storage, work, where it lies on N GPUs, and what a person should know before starting it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from trainer.config.run import RunConfig
from trainer.plan.assumptions import Assumptions
from trainer.plan.dry import vae_pass
from trainer.plan.fit import Change, Finding, Placement, Setting, changes
from trainer.plan.gpus import GPU
from trainer.plan.memory import Process, gathers_gradients, hosts, pass_count, processes
from trainer.plan.sizes import Component, Sizes
from trainer.plan.storage import Storage, storage_of
from trainer.plan.work import Work, work_of

GB = 1e9


@dataclass(frozen=True)
class Plan:
    """Everything that is said of a recipe; the parts' classes say what their numbers mean."""

    name: str
    origin: str
    gpu: GPU
    gpus: int
    assumptions: Assumptions
    price: float | None
    components: tuple[Component, ...]
    shape: tuple[int, ...]
    prompt: tuple[int, int, int]
    processes: tuple[Process, ...]
    hosts: tuple[Process, ...]
    storage: Storage
    work: Work
    placement: Placement
    findings: tuple[Finding, ...]
    changes: tuple[Change, ...]

    @property
    def fits(self) -> bool:
        return not any(f.level == "error" for f in self.findings)

    @property
    def nearest(self) -> Change | None:
        """The first change with which the run fits."""
        return next((c for c in self.changes if c.fits), None)

    def json(self) -> dict[str, Any]:
        """The plan as plain values: bytes, operations, seconds."""
        plan = {k: v for k, v in vars(self).items() if k not in ("assumptions", "placement")}
        found = {k: _plain(v) for k, v in plan.items()}
        for listed, held in (("processes", self.processes), ("hosts", self.hosts)):
            for one, process in zip(found[listed], held, strict=True):
                one["bytes"] = process.total
        placed = self.placement
        devices = [{"index": d.index, "bytes": d.used(placed.memory), "holds": [p.name for p in d.holds]} for d in placed.devices]
        found["placement"] = {"limit": placed.limit, "memory": placed.memory, "homeless": placed.homeless, "devices": devices}
        nearest = self.nearest
        return found | {"assumptions": self.assumptions.model_dump(), "fits": self.fits, "nearest": None if nearest is None else asdict(nearest)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def make_plan(config: RunConfig, gpu: GPU, count: int, assumptions: Assumptions, price: float | None = None) -> Plan:
    """The plan of `config` on `count` GPUs. Raises ConfigError for a recipe that no machine could run."""
    setting = Setting(config, assumptions, gpu, count)
    sizes, sampler = setting.sizes(), config.sampler
    vae = vae_pass(sizes, sampler.height, sampler.width, sampler.frames)
    storage, placement = storage_of(config, sizes), setting.placement()
    work, machines = work_of(config, sizes, vae, storage, gpu, count, assumptions, price), hosts(config, sizes)
    found = [*_placed(placement, gpu), *_stored(config, storage), *_noted(config, sizes, work, machines, placement)]
    return Plan(
        name=config.name,
        origin=sizes.origin,
        gpu=gpu,
        gpus=count,
        assumptions=assumptions,
        price=price,
        components=(sizes.transformer, *((sizes.vae,) if sizes.vae else ()), *sizes.encoders),
        shape=sizes.shape,
        prompt=sizes.prompt,
        processes=tuple(processes(config, sizes, vae, assumptions)),
        hosts=tuple(machines),
        storage=storage,
        work=work,
        placement=placement,
        findings=tuple(found),
        changes=(*_stores(config, storage, placement), *(() if placement.fits else changes(setting))),
    )


def _placed(placement: Placement, gpu: GPU) -> list[Finding]:
    """Whether the processes lie on the GPUs, and their bytes in them."""
    found = []
    for name, count in placement.homeless.items():
        found.append(Finding("error", "gpus", f"{count} x {name} find no GPU: {len(placement.devices)} GPUs have no share left that is as large as asked for"))
    fullest = placement.fullest
    if fullest is not None and placement.most > placement.limit:
        holds = ", ".join(f"{p.name} {(p.gpus * placement.memory if p.reserved else p.total) / GB:.1f}" for p in fullest.holds)
        limit = f"{placement.limit / GB:.1f} GB of a {gpu.name}"
        found.append(Finding("error", "memory", f"a GPU would hold {placement.most / GB:.1f} GB ({holds}), more than the {limit} that are planned with"))
    return found


def _stored(config: RunConfig, storage: Storage) -> list[Finding]:
    """Whether payloads fit the store."""
    found = []
    if storage.retained > storage.budget:
        sums = f"{storage.groups} groups x {storage.group / 1e6:.1f} MB + {storage.batches} anchor batches x {storage.data / 1e6:.1f} MB"
        remedy = f"set replay.max_bytes={_rounded(storage.retained)}, or lower checkpoint_every or replay.data_depth"
        message = (
            f"what is kept between checkpoints, {sums} = {storage.retained / GB:.1f} GB, exceeds replay.max_bytes ({storage.budget / GB:.1f} GB): {remedy}"
        )
        found.append(Finding("error", "budget", message))
    return found


def _stores(config: RunConfig, storage: Storage, placement: Placement) -> list[Change]:
    """Changes that make payloads fit; the run then fits where its GPUs hold it."""
    found = []
    if storage.retained > storage.budget:
        found.append(Change("more room for payloads", (f"replay.max_bytes={_rounded(storage.retained)}",), placement.fits, placement.most))
    return found


def _rounded(size: float) -> int:
    """The next whole GiB."""
    return -(-int(size) // 2**30) * 2**30


def _noted(config: RunConfig, sizes: Sizes, work: Work, machines: list[Process], placement: Placement) -> list[Finding]:
    """What slows a run down, and what this build does otherwise than one would think."""
    found = []
    asks = config.learner.gpus or (config.uses_policy and config.rollout.gpus)
    if placement.devices and not asks:
        found.append(Finding("warning", "cpu", "the recipe asks for no GPU: set learner.gpus and rollout.gpus (0.5 each share one)"))
    elif placement.idle:
        found.append(Finding("warning", "idle", f"{placement.idle} of {len(placement.devices)} GPUs hold nothing: {_more(config)}"))
    seconds = work.seconds
    if asks and seconds["encoding"] > seconds["update"]:
        told = f"anchor data with its texts of an update take {seconds['encoding']:.0f} s, GPUs {seconds['update']:.0f} s: training would wait for it"
        remedy = (
            "encode prompts on a GPU (encoder.gpus)"
            if config.encoder.actors and not config.encoder.gpus
            else "the VAE of the anchor feeder runs on a CPU: prepare the data"
        )
        found.append(Finding("warning", "encoding", f"{told}; {remedy}"))
    if work.evaluation is not None and seconds["evaluation"] > config.evaluation.every * seconds["update"]:
        where = f"{config.rollout.generators} generators" + ("" if config.rollout.gpus else " on CPUs (rollout.gpus puts them on GPUs)")
        told = f"a periodic evaluation takes {seconds['evaluation'] / 60:.1f} min of {where}"
        remedy = "raise evaluation.every or rollout.generators"
        found.append(Finding("warning", "evaluation", f"{told}, longer than the {config.evaluation.every} updates between two: it falls behind; {remedy}"))
    rank = machines[0].total
    if rank > 16e9:
        found.append(
            Finding("warning", "host", f"each learner rank takes {rank / GB:.0f} GB of host memory ({_largest(machines[0])}), x {config.learner.ranks}")
        )
    if config.learner.shards > 1 and gathers_gradients(config, sizes.tokens) and not sizes.adapted:
        told = f"gradients are whole on every rank while the {pass_count(config, sizes.tokens)} passes of an update accumulate"
        found.append(Finding("note", "gradients", f"{told}: with learner.accumulate=sharded (and shard_blocks) each keeps its part"))
    bound = config.learner.micro_tokens
    if bound is not None and sizes.tokens > bound * config.learner.sequence_ranks:
        found.append(Finding("warning", "tokens", f"a sample has {sizes.tokens} tokens, more than learner.micro_tokens={bound}: each takes a pass of its own"))
    if config.learner.offload and not config.learner.gpus:
        found.append(Finding("note", "offload", "learner.offload has no effect while learner.gpus=0"))
    found += _trainable(sizes)
    return found


def _more(config: RunConfig) -> str:
    """What would put idle GPUs to use: more ranks and generators, as long as an update has rollouts and groups for them."""
    r, learner = config.rollout, config.learner
    rollouts, groups = r.groups_per_step * r.group_size, r.groups_per_step * (1 + config.replay.max_staleness)
    if config.uses_policy and learner.data_ranks >= rollouts and r.generators >= groups:
        told = f"{rollouts} rollouts an update, {groups} groups in the making, keep no more than so many ranks with rows of their own and generators busy"
        return f"{told}; raise rollout.groups_per_step, or learner.ranks with learner.sequence_ranks"
    return f"raise learner.ranks={learner.ranks}, rollout.generators={r.generators}"


def _largest(process: Process) -> str:
    return ", ".join(f"{p.name} {p.bytes / GB:.0f} GB" for p in sorted(process.parts, key=lambda p: -p.bytes)[:2])


def _trainable(sizes: Sizes) -> list[Finding]:
    """What of the policy this build cannot run."""
    from diffusion.families.registry import TEXT_ENCODERS

    if sizes.encoder_class not in {**TEXT_ENCODERS, **sizes.family.text_encoders}:
        name = sizes.encoder_class or "text encoder that its config.json names"
        return [Finding("warning", "build", f"this build can plan this policy and not yet train it: it has no {name}")]
    return []
