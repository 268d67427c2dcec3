"""One rank of a real gloo group that runs the scenarios of `test_ranks.py`: `python -m tests.unit.trainer.learn.ranks RANK WORLD FOLDER`.

Everything a rank needs lies in the folder (`tests.gloo`), so that one rank in the test's own process and two in processes of their own do
the same: `policy` with weights, `claim-NAME.pt` with the groups of a scenario. Whom a rank's rows, files and checkpoints are of is a label:
the number of ranks, or the name of their mesh (`mesh_ranks.py`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor

import diffusion.weights
import trainer.learn.exports
from actors.weights.shards import local_slices, write_slices
from actors.weights.transport import FolderTransport
from diffusion.checkpoint import build_network, save_policy
from diffusion.lora import trained_weights
from replay.records import Claim
from tests.gloo import join, leave
from tests.unit.trainer.learn.given import SCENARIOS as GIVEN
from tests.unit.trainer.learn.given import Given
from tests.unit.trainer.learn.reports import DEADLINE_S, Reports
from trainer.config.load import parse_config
from trainer.config.run import RunConfig
from trainer.learn.batch import StepBatch
from trainer.learn.checkpoint import CheckpointFailed, Checkpoints, Progress, read
from trainer.learn.exports import Exports
from trainer.learn.learner import Learner

CPU = torch.device("cpu")
SHAPE = (3, 8, 16)
UPDATES = 3
GROUPS, MEMBERS, TRAINED = 5, 3, 2
SAVED = ("plain", "lora", "moments in 8 bits", "finished rollouts")
"""Scenarios that write checkpoints."""


@dataclass(frozen=True)
class Scenario:
    """What a group of ranks trains, by section of the run's configuration; the policy's folder and the shape of its latents."""

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    policy: str = "policy"
    shape: tuple[int, ...] = SHAPE

    def config(self, folder: Path, mesh: dict[str, int] | None = None) -> RunConfig:
        # a large eps keeps Adam's step proportional to the gradient: with a small one it is the gradient's sign, which
        # rounding decides where the gradient is almost 0
        base: dict[str, dict[str, Any]] = {
            "model": {"path": str(folder / self.policy)},
            "sampler": {"steps": 4, "trained_steps": TRAINED, "height": SHAPE[1], "width": SHAPE[2]},
            "rollout": {"groups_per_step": GROUPS, "group_size": MEMBERS},
            "objective": {"clip": 2e-3, "data_weight": 0.3},
            "optimizer": {"lr": 5e-3, "ema": 0.9, "eps": 1e-2, "decay": "cosine"},
            "learner": {"ranks": 1, "micro_batch": 4},
        }
        sections = {name: values | self.sections.get(name, {}) for name, values in base.items()}
        return parse_config({"updates": 10, **sections, "learner": sections["learner"] | (mesh or {})})


SCENARIOS = {
    "plain": Scenario(),
    "padding rows": Scenario({"learner": {"ranks": 1, "micro_batch": 1}}),
    "clipped gradient in one unit": Scenario({"optimizer": {"grad_clip": 0.02}, "learner": {"ranks": 1, "shard_blocks": False}}),
    "recomputed": Scenario({"learner": {"ranks": 1, "micro_batch": 4, "recompute": True}}),
    "sharded gradients": Scenario({"learner": {"ranks": 1, "micro_batch": 1, "accumulate": "sharded"}}),
    "token budget": Scenario({"learner": {"ranks": 1, "micro_batch": 40, "micro_tokens": 100}}),
    "in host memory": Scenario({"learner": {"ranks": 1, "micro_batch": 4, "offload": True}}),
    "moments in 8 bits": Scenario({"optimizer": {"lr": 5e-3, "ema": 0.9, "eps": 1e-2, "decay": "cosine", "kind": "adamw8bit"}}),
    "kl": Scenario({"objective": {"kl_weight": 0.5}}),
    "lora": Scenario({"model": {"lora": {"rank": 4, "alpha": 8.0}}, "objective": {"kl_weight": 0.5}, "optimizer": {"lr": 5e-2, "eps": 1e-5}}),
    "finished rollouts": Scenario(
        {
            "objective": {"preset": "diffusion_nft", "kl_weight": 0.5, "old_decay": 0.9, "old_decay_rate": 0.3, "data_weight": 0.3},
            "learner": {"ranks": 1, "micro_batch": 1},
        }
    ),
    "finished rollouts, adapter": Scenario(
        {
            "model": {"lora": {"rank": 4, "alpha": 8.0}},
            "sampler": {"noise_on": "none"},
            "objective": {"preset": "awm", "policy_times": "stratified", "old_decay_rate": 0.3, "kl_weight": 0.5, "data_weight": 0.3},
            "optimizer": {"lr": 5e-2, "eps": 1e-5},
        }
    ),
    "two updates a claim": Scenario(
        {"objective": {"preset": "grpo_guard", "clip": 2e-3, "data_weight": 0.3}, "learner": {"ranks": 1, "micro_batch": 4, "updates_per_claim": 2}}
    ),
    "two steps in sigma space": Scenario({"sampler": {"kernel": "edm_2ab", "noise_level": 1.0, "guidance": 2.0}, "objective": {"data_noise": "shared"}}),
}


CLIPS = Scenario(
    {"sampler": {"steps": 3, "trained_steps": 2, "height": 32, "width": 48, "frames": 5}, "learner": {"ranks": 1, "micro_batch": 2, "recompute": True}},
    policy="wan",
    shape=(16, 2, 4, 6),
)
"""Clips of 12 tokens of a tiny Wan."""

STARTS: dict[str, dict[str, Any]] = {
    "weights": {},
    "weights and adapter": {"lora": {"rank": 3, "alpha": 8.0}},
    "weights in bf16 and adapter": {"lora": {"rank": 3, "alpha": 8.0}, "dtype": "bfloat16", "base_dtype": "bfloat16"},
    "drawn": {"init": True},
    "drawn, and adapter": {"init": True, "lora": {"rank": 3, "alpha": 8.0}},
}
"""How a learner gets its first values: keys of `model`."""


def scenario_of(name: str) -> Scenario | Given:
    return CLIPS if name == "clips" else GIVEN[name] if name in GIVEN else SCENARIOS[name]


class Held:
    """Payloads in a file: what `step_batches` reads."""

    def __init__(self, folder: Path, name: str) -> None:
        self.claim, self._payloads = torch.load(folder / f"claim-{name}.pt", weights_only=False)

    def read(self, item: Any, segments: list[int]) -> list[bytearray]:
        return [self._payloads[item.ref][i] for i in segments]


def whole(value: Any) -> Any:
    """A copy of a tree of tensors, gathered; collective."""
    if isinstance(value, dict):
        return {key: whole(part) for key, part in value.items()}
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def state_of(learner: Learner) -> dict[str, Any]:
    """Everything that training changes; collective."""
    optimizer = whole(get_optimizer_state_dict(learner.model, learner.optimizer))
    return {"model": learner.full_state(), "average": learner.full_state(ema=True), "optimizer": optimizer["state"], "old": whole(learner.old)}


def rows_of(learner: Learner, held: Held, claim: Claim) -> list[StepBatch]:
    """This rank's."""
    return learner.batches(held, claim, learner.mesh.data_rank, learner.mesh.data_ranks)  # type: ignore[arg-type]


def train(learner: Learner, held: Held, steps: range) -> list[dict[str, Any]]:
    """Updates on the same groups; what the learner says of each."""
    said = []
    for step in steps:
        claim = Claim(step, 1, held.claim.groups, held.claim.data)
        said.append(learner.update(rows_of(learner, held, claim), step))
    return said


def scenario(name: str, folder: Path, rank: int, world: int, mesh: dict[str, int] | None = None, label: int | str | None = None) -> dict[str, Any]:
    """Train and, where it is SAVED, write checkpoints: one that the ranks wait for, and one in the background, which begins only after
    one update more; what came of it."""
    label = label or world
    held, learner = Held(folder, name), Learner(scenario_of(name).config(folder, mesh), CPU)
    out: dict[str, Any] = {"said": train(learner, held, range(1, UPDATES + 1)), "state": state_of(learner)}
    slices = local_slices(trained_weights(learner.model), rank)
    out["published"] = write_slices(transport_of(folder, name, label), slices, (1, UPDATES), rank, world)[0]
    if name not in SAVED:
        return out
    with reporting() as reports:
        for background in (False, True):
            checkpoints = Checkpoints(checkpoints_of(folder, name, label, background), rank, background)
            reports.gate.set() if not background else reports.gate.clear()
            checkpoints.take(learner, Progress(step=UPDATES, groups=[1, 2], data=[3]))
        out["next"] = train(learner, held, range(UPDATES + 1, UPDATES + 2))
        reports.gate.set()
        checkpoints.finish(DEADLINE_S)
    return out | {"next state": state_of(learner)}


def resumed(name: str, folder: Path, saved_by: int | str, mesh: dict[str, int] | None = None) -> dict[str, Any]:
    """Load the checkpoint that a group of ranks wrote, and train one update more. The run has grown meanwhile."""
    config = SCENARIOS[name].config(folder, mesh).model_copy(update={"updates": 50})
    learner = Learner(config, CPU)
    progress = read(checkpoint_of(folder, name, saved_by), learner)
    out: dict[str, Any] = {"progress": progress, "state": state_of(learner)}
    out["next"] = train(learner, Held(folder, name), range(UPDATES + 1, UPDATES + 2))
    return out | {"next state": state_of(learner)}


@contextmanager
def reporting() -> Iterator[Reports]:
    """Checkpoints are reported to the one that is yielded."""
    report, ray.train.report = ray.train.report, Reports()
    try:
        yield ray.train.report
    finally:
        ray.train.report.gate.set()
        ray.train.report = report


def checkpoints_of(folder: Path, name: str, label: int | str, background: bool = True) -> Path:
    return folder / f"checkpoints-{label}-{name}-{background}"


def checkpoint_of(folder: Path, name: str, label: int | str, background: bool = True) -> Path:
    return checkpoints_of(folder, name, label, background) / f"step-{UPDATES:06d}"


class Counted:
    """A tensor in a file that says how many of its values were read."""

    def __init__(self, values: Any, read: list[int]) -> None:
        self._values, self._read = values, read

    def __getitem__(self, where: Any) -> torch.Tensor:
        part: torch.Tensor = self._values[where]
        self._read.append(part.numel())
        return part


def started(keys: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A learner before its first update; how many values of sharded parameters this rank read, and how many are its own."""
    config, read, place = Scenario({"model": {"path": str(folder / "policy"), **keys}}).config(folder), list[int](), diffusion.weights.place

    def counting(model: Any, name: str, values: Any, *where: Any) -> None:
        place(model, name, Counted(values, read) if name in parameters else values, *where)

    parameters = {n for n, _ in build_network(config.model)[0].named_parameters()}
    diffusion.weights.place = counting  # type: ignore[assignment]
    try:
        learner = Learner(config, CPU)
    finally:
        diffusion.weights.place = place
    own = sum(p.to_local().numel() for n, p in learner.model.named_parameters() if ".lora_" not in n)  # type: ignore[attr-defined]
    return {"state": whole(learner.full_state()), "average": whole(learner.full_state(ema=True)), "read": sum(read), "own": own}


def transport_of(folder: Path, name: str, label: int | str) -> FolderTransport:
    return FolderTransport(str(folder / f"weights-{label}-{name}"))


def poisoned(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """An update in which the last rank alone has a gradient that is no number."""
    held, learner = Held(folder, "plain"), Learner(SCENARIOS["plain"].config(folder), CPU)
    before = state_of(learner)
    (batch,) = rows_of(learner, held, held.claim)
    assert batch.transitions is not None
    if rank == world - 1:
        batch.transitions.advantage[0] = torch.nan
    said = learner.update([batch], 1)
    return {"said": said, "before": before, "state": state_of(learner)}


def slow_checkpoint(folder: Path, rank: int) -> dict[str, Any]:
    """A checkpoint of which nothing is written before the ranks have made two updates more, together; then the next."""
    held, learner = Held(folder, "plain"), Learner(SCENARIOS["plain"].config(folder), CPU)
    where, progress = folder / "slow-checkpoints", Progress(step=0, groups=[1])
    checkpoints = Checkpoints(where, rank, background=True)
    with reporting() as reports:
        reports.gate.clear()
        states = [state_of(learner)]
        checkpoints.take(learner, progress)
        said = train(learner, held, range(1, 3))
        written = [f.name for f in where.glob("*/*")]
        states.append(state_of(learner))
        reports.gate.set()
        progress.step = 2
        checkpoints.take(learner, progress)
        train(learner, held, range(3, 4))
        checkpoints.finish(DEADLINE_S)
    loaded = []
    for step in (0, 2):
        found = Learner(learner.config, CPU)
        read(where / f"step-{step:06d}", found)
        loaded.append(state_of(found))
    return {"said": said, "written": written, "states": states, "loaded": loaded, "names": reports.names}


def failed_checkpoints(folder: Path, rank: int) -> dict[str, str]:
    """What every rank hears when the last one cannot write, or writes elsewhere than the first."""
    learner, heard = Learner(SCENARIOS["plain"].config(folder), CPU), {}
    (folder / "no-folder").touch()
    for name, last in (("barred", folder / "no-folder"), ("elsewhere", folder / "elsewhere")):
        checkpoints = Checkpoints(folder / "failed" if rank == 0 else last, rank, background=True)
        with reporting() as reports:
            checkpoints.take(learner, Progress(step=5))
            try:
                checkpoints.finish(DEADLINE_S)
            except CheckpointFailed as error:
                heard[name] = str(error)
            assert reports.names == []
    return heard


def slow_export(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """An export whose writer does not end before the ranks have made another update together."""
    held, learner = Held(folder, "plain"), Learner(SCENARIOS["plain"].config(folder), CPU)
    moved_on, exports = folder / "moved-on", Exports(folder / "exports", learner.config.model, rank)

    def slow(*args: Any) -> None:
        until = time.monotonic() + DEADLINE_S
        while not moved_on.exists():
            assert time.monotonic() < until, "the ranks wait for the export"
            time.sleep(0.02)
        save_policy(*args)

    trainer.learn.exports.save_policy = slow
    try:
        exported = state_of(learner)
        exports.take(learner, 7)
        exports.take(learner, 8)  # comes while 7 is being written: waits
        train(learner, held, range(1, 2))
        exports.take(learner, 9)  # takes the place of 8
        last = state_of(learner)
        if rank == world - 1:
            moved_on.touch()
        exports.finish(DEADLINE_S)
    finally:
        trainer.learn.exports.save_policy = save_policy
    return {"exported": exported, "last": last}


def missing_export(folder: Path, rank: int) -> None:
    """A restart finds `exports/step-9` there and `step-11` not."""
    learner = Learner(SCENARIOS["plain"].config(folder), CPU)
    exports = Exports(folder / "exports", learner.config.model, rank)
    for step in (0, 9, 11):
        exports.take_missing(learner, step)
    exports.finish(DEADLINE_S)


def main(rank: int, world: int, folder: Path) -> None:
    join(rank, world, folder)
    out: dict[str, Any] = {name: scenario(name, folder, rank, world) for name in SCENARIOS}
    out |= {f"{name}, resumed": resumed(name, folder, saved_by=1) for name in SAVED}
    out |= {"starts": {name: started(keys, folder) for name, keys in STARTS.items()}}
    out |= {"poisoned": poisoned(folder, rank, world), "slow export": slow_export(folder, rank, world)}
    out |= {"slow checkpoint": slow_checkpoint(folder, rank), "failed checkpoints": failed_checkpoints(folder, rank)}
    missing_export(folder, rank)
    leave(rank, folder, out)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
