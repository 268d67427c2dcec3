"""One whole update of a published architecture, at its real size, through the whole pipeline on a machine without a GPU.

    python -m benchmarks.fullsize [--model sd35-medium|wan21-1.3b|cosmos25-2b] [--dtype bfloat16|float32]
        [--json] [--folder FOLDER] [--policy POLICY]

Random weights in bfloat16, an adapter, small pictures or clips, 2 or 3 steps, 2 groups of 2; everything else is the recipe's: text encoders of full
width, guidance, step kernel, given frames, FSDP, Redis, Serve, checkpoint and export. It shows that a policy of this size loads, fits and
learns, with peak memory beside what `ddrl plan` says and seconds by stage. Weights are written to FOLDER once (14 to 20 GB); a run of
SD3.5-medium needs some 22 GB of memory and 40 GB of disk, and takes 8 to 25 minutes on two cores that multiply in bfloat16 (`avx512_bf16` or
`amx_bf16` in `lscpu`). On others a backward pass in bfloat16 can take a hundred times as long as in float32: `--dtype float32` keeps and computes
the policy's network in float32 there, and the plan beside it is one of float32.
`--policy`: another folder in diffusers' layout instead.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from actors.clips import write_clip
from benchmarks.machine import machine
from benchmarks.markdown import table
from benchmarks.random_policy import ARCHITECTURES, write_policy

ROOT = Path(__file__).parents[1]
EXAMPLES, FPS, POLL_S, DEADLINE_S = 48, 16, 0.5, 5400.0


@dataclass(frozen=True)
class Case:
    """What is tried of an architecture.

    Attributes:
        recipe: whose settings hold where nothing else is said.
        side: of a sample, in pixels.
        frames: of a sample, 1 = a picture.
        rewards: of the run; one of them must vary over noise, or the policy's loss has no gradient.
        overrides: of the recipe, beside `SMALL`.
    """

    recipe: str
    side: int
    frames: int
    rewards: dict[str, dict[str, Any]]
    overrides: tuple[str, ...] = ()


ADAPTER = 'model.lora={"rank": 16, "alpha": 32, "targets": "attention"}'
CASES = {
    "sd35-medium": Case("recipes/sd35-medium-ocr.yaml", 128, 1, {"ocr": {"weight": 1.0}, "scene.sharpness": {"weight": 0.1}}),
    "wan21-1.3b": Case("recipes/wan21-1.3b-videoalign.yaml", 64, 5, {"scene.motion": {"weight": 1.0}, "scene.sharpness": {"weight": 0.1}}),
    "cosmos25-2b": Case(
        "recipes/cosmos25-2b-videoalign.yaml",
        64,
        9,
        {"scene.motion": {"weight": 1.0}, "scene.sharpness": {"weight": 0.1}},
        (ADAPTER, "sampler.steps=3", "learner.ranks=1", "learner.sequence_ranks=1", "data.kind=prepared", "rollout.generators=1"),
    ),
}
FLEET = {"ocr": {"kind": "ocr", "mode": "flow_grpo", "reading": "detection", "upscale": 1}, "scene": {"kind": "scene"}}
SMALL = (
    "updates=1",
    "checkpoint_every=1",
    "model.map_weights=true",
    "sampler.steps=2",
    "sampler.eval_steps=2",
    "sampler.trained_steps=[0]",
    "rollout.groups_per_step=2",
    "rollout.group_size=2",
    "rollout.gpus=0",
    "rollout.threads=2",
    "encoder.gpus=0",
    "encoder.threads=2",
    "encoder.cache_mb=128",
    "learner.gpus=0",
    "learner.threads=2",
    "learner.micro_batch=2",
    "evaluation.every=0",
    "evaluation.test_prompts=2",
    "evaluation.loss_points=2",
    "evaluation.diversity_prompts=1",
    "evaluation.diversity_samples=2",
    "evaluation.grid_prompts=2",
    "replay.claim_timeout_s=3600",
    "replay.max_bytes=4294967296",
    "replay.max_staleness=0",  # no groups of a second update
    "held_out_rewards=[]",
)
ROLES = {
    "learner rank": ("RayTrainWorker",),
    "generator": ("RolloutGenerator",),
    "encoder": ("ray::Encoder",),
    "anchor feeder": ("AnchorFeeder",),
    "reward replicas": ("ServeReplica",),
    "driver": ("-m trainer train",),
}
"""What a process's title holds, by the names that a plan uses."""


def write_source(folder: Path, case: Case) -> None:
    """Captioned pictures or clips of coloured noise."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    lines = []
    for i in range(EXAMPLES):
        coarse = draw.integers(0, 256, (case.frames, 8, 8, 3), np.uint8)
        frames = [Image.fromarray(frame).resize((case.side, case.side), Image.Resampling.BICUBIC) for frame in coarse]
        name = f"{i:03d}.{'png' if case.frames == 1 else 'mp4'}"
        if case.frames == 1:
            frames[0].save(folder / name)
        else:
            write_clip(folder / name, np.stack([np.asarray(frame) for frame in frames]), FPS)
        lines.append(json.dumps({"file_name": name, "text": f'a sign that says "{i:03d}"'}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def ddrl(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "trainer", *arguments]


class Watch:
    """Peak memory of a process and its children, by role, and the least that the machine had left. Polled: a shorter peak is missed.

    Attributes:
        resident, mapped: most bytes of a role's largest process: resident, and of those files' pages (libraries' too).
        left: least bytes of memory available on the machine.
        seconds: at which each role's process was first seen.
    """

    def __init__(self, process: subprocess.Popen[Any]) -> None:
        self._root, self._ended = psutil.Process(process.pid), threading.Event()
        self.resident: dict[str, int] = {}
        self.mapped: dict[str, int] = {}
        self.left = psutil.virtual_memory().available
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._ended.wait(POLL_S):
            self.left = min(self.left, psutil.virtual_memory().available)
            try:
                family = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in family:
                self._look(process)

    def _look(self, process: psutil.Process) -> None:
        try:
            title = " ".join(process.cmdline())
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (psutil.Error, OSError):
            return
        role = next((name for name, parts in ROLES.items() if any(part in title for part in parts)), None)
        if role is None:
            return
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(("VmRSS", "RssFile"))}
        if sizes.get("VmRSS", 0) > self.resident.get(role, 0):
            self.resident[role], self.mapped[role] = sizes["VmRSS"], sizes["RssFile"]


def planned(recipe: str, overrides: list[str]) -> dict[str, float]:
    """Bytes of a process by its role, as `ddrl plan` says."""
    done = subprocess.run(ddrl("plan", recipe, "--gpus", "0", "--json", *overrides), cwd=ROOT, text=True, capture_output=True, timeout=300, check=False)
    plan = json.loads(done.stdout)
    found: dict[str, float] = {}
    for process in plan["processes"] + plan["hosts"]:
        name = "learner rank" if process["name"] == "export of rank 0" else process["name"]
        found[name] = found.get(name, 0.0) + process["bytes"]
    return found


def measure(work: Path, policy: Path, case: Case, dtype: str) -> dict[str, Any]:
    """Prepare the anchor data, train one update, and say what it took. Raises RuntimeError for a run that is not as it should be."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    write_source(work / "source", case)
    started = time.monotonic()
    clips = [] if case.frames == 1 else ["--frames", str(case.frames), "--fps", str(FPS)]
    prepare = ddrl("prepare-data", str(work / "source"), str(work / "anchors"), "--model", str(policy), "--size", f"{case.side}x{case.side}", *clips)
    subprocess.run(prepare, cwd=ROOT, env=environment, check=True, timeout=DEADLINE_S)
    seconds = {"prepare-data": time.monotonic() - started}
    values = [*SMALL, *case.overrides, f"sampler.height={case.side}", f"sampler.width={case.side}", f"sampler.frames={case.frames}"]
    used = {reward.split(".")[0] for reward in case.rewards}
    values += [f"rewards={json.dumps(case.rewards)}", f"fleet.rewards={json.dumps({name: FLEET[name] for name in FLEET if name in used})}"]
    values += [f"model.path={policy}", "model.revision=null", f"model.dtype={dtype}", f"model.base_dtype={dtype}"]
    values += [f"data.path={work / 'anchors'}", f"replay.payloads={work / 'payloads'}"]
    overrides = [part for value in values for part in ("--set", value)]
    about = machine()
    run, started, began = work / "run", time.monotonic(), time.time()
    process = subprocess.Popen(ddrl("train", case.recipe, "--run-dir", str(run), *overrides), cwd=ROOT, env=environment)
    watch = Watch(process)
    try:
        status = process.wait(DEADLINE_S)
    finally:
        watch.end()
        if process.poll() is None:
            process.terminate()
            process.wait(120)
    seconds["train"] = time.monotonic() - started
    if status != 0:
        raise RuntimeError(f"ddrl train ended with exit status {status}")
    lines = [json.loads(line) for file in sorted(run.glob("metrics*.jsonl")) for line in file.read_text().splitlines()]
    update = next(line for line in lines if line.get("kind") == "update")
    summary = json.loads((run / "summary.json").read_text())
    check(update, summary, run)
    stages = {"first update finished after": update["time"] - began} | {f"update: {name}": value for name, value in update["seconds"].items()}
    plan = planned(case.recipe, overrides)
    memory = {role: {"plan": plan.get(role), "resident": watch.resident[role], "mapped": watch.mapped[role]} for role in ROLES if role in watch.resident}
    return {"machine": about, "memory": memory, "available_at_least": watch.left, "seconds": seconds | stages, "update": update}


def check(update: dict[str, Any], summary: dict[str, Any], run: Path) -> None:
    """Raise RuntimeError unless the update learned from both terms, and everything that a run leaves is there."""
    wrong = [name for name in ("policy_loss", "data_loss", "grad_norm") if not math.isfinite(update.get(name, math.nan))]
    if wrong or update["skipped"] or update["grad_norm"] == 0:
        raise RuntimeError(f"the update did not learn: {wrong or update}")
    if summary["missing"]:
        raise RuntimeError(f"missing: {summary['missing']}")
    for name in ("report.html", "exports/step-000001/model_index.json", "exports/step-000001/pytorch_lora_weights.safetensors"):
        if not (run / name).exists():
            raise RuntimeError(f"the run left no {name}")


def markdown(found: dict[str, Any]) -> str:
    about, gb = found["machine"], 1e9
    rows = [
        [
            role,
            "" if m["plan"] is None else f"{m['plan'] / gb:.2f}",
            f"{m['resident'] / gb:.2f}",
            f"{m['mapped'] / gb:.2f}",
            f"{(m['resident'] - m['mapped']) / gb:.2f}",
        ]
        for role, m in found["memory"].items()
    ]
    stages = [[name, f"{value:.1f}"] for name, value in found["seconds"].items()]
    head = f"{about['cores']} cores ({about['processor']}), load average {about['load_at_start']} before."
    return "\n\n".join(
        (head, table(["process, GB", "plan", "resident at its peak", "of that files' pages", "its own"], rows), table(["stage", "seconds"], stages))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--model", choices=CASES, default="sd35-medium", help="the architecture")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the policy's network; float32 where the CPU lacks bfloat16")
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    parser.add_argument("--folder", type=Path, help="where weights and the run are kept; default: a temporary folder, removed at the end")
    parser.add_argument("--policy", type=Path, help="a folder in diffusers' layout, instead of random weights at full size")
    options = parser.parse_args()
    work = options.folder or Path(tempfile.mkdtemp(prefix="ddrl-fullsize-"))
    try:
        policy = options.policy or work / f"policy-{options.model}-{options.dtype}"
        if options.policy is None:
            write_policy(policy, ARCHITECTURES[options.model], getattr(torch, options.dtype))
        for name in ("run", "payloads", "anchors", "source"):
            shutil.rmtree(work / name, ignore_errors=True)
        found = measure(work, policy.resolve(), CASES[options.model], options.dtype)
        print(json.dumps(found) if options.json else markdown(found))
    finally:
        if options.folder is None:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
