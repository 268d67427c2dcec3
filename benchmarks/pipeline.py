"""The whole pipeline against a bare loop: what Ray, Redis, Serve and FSDP cost, or bring, in samples a second.

    python benchmarks/pipeline.py [--quick] [--json | --markdown] [--updates N] [--repeats N]

*ddrl*: `ddrl train recipes/glyph-ocr.yaml` at the recipe's own settings, evaluation off; *bare*: `benchmarks/bare.py`, the same
groups, engine, scorer, objective and optimiser in one process. Both may use every core of the machine. Sides take turns,
another one first in each repeat. Counted is the steady state, from the end of the third update to the end of the last; what
goes before the end of the first is reported apart. Both must have learnt on the same number of samples in the same number of updates.
`--quick` is a check that everything runs, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if sys.path[0] == str(ROOT / "benchmarks"):  # run as a script
    sys.path[0] = str(ROOT)

RECIPE = "recipes/glyph-ocr.yaml"
NO_EVALUATION = (
    "evaluation.every=0",
    "evaluation.test_prompts=2",
    "evaluation.loss_points=2",
    "evaluation.diversity_prompts=1",
    "evaluation.diversity_samples=2",
    "evaluation.grid_prompts=1",
)
"""The evaluations before and after cannot be left out; the first is over before the first update is."""
SMALL = ("rollout.groups_per_step=4", "rollout.group_size=4", "sampler.steps=4", "sampler.trained_steps=2")
LEAD = 3
"""Updates before the steady state: they use up what the generators have made ahead while the learner started."""
DEADLINE_S = 1800.0


def steady(records: Sequence[dict[str, Any]], group_size: int) -> dict[str, float]:
    """Samples a second, seconds an update and of its parts, from the end of update `LEAD` to the end of the last.

    Raises:
        ValueError: no update after `LEAD`.
    """
    counted = records[LEAD:]
    if not counted:
        raise ValueError(f"{len(records)} updates have no steady state; ask for more than {LEAD}")
    seconds = float(counted[-1]["time"] - records[LEAD - 1]["time"])
    found = {"samples_per_s": sum(samples(r, group_size) for r in counted) / seconds, "update_s": seconds / len(counted)}
    parts = {name for r in counted for name in r["seconds"]}
    return found | {f"{name}_s": sum(r["seconds"].get(name, 0.0) for r in counted) / len(counted) for name in parts}


def samples(record: dict[str, Any], group_size: int) -> int:
    """Samples that an update learnt on."""
    return len(record["trained_groups"]) * group_size - int(record["failed_members"])


def run_ddrl(folder: Path, updates: int, overrides: Sequence[str]) -> tuple[list[dict[str, Any]], float]:
    """Update lines of a run, and when the process was started."""
    values = [f"updates={updates}", *NO_EVALUATION, *overrides]
    command = [sys.executable, "-m", "trainer", "train", RECIPE, "--run-dir", str(folder), *(part for v in values for part in ("--set", v))]
    started = time.time()
    _run(command)
    return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "update"], started


def run_bare(folder: Path, updates: int, overrides: Sequence[str], spin: bool) -> tuple[list[dict[str, Any]], float]:
    """The same of the bare loop. `spin`: its waiting threads spin, which is faster on a machine that nobody else uses."""
    folder.mkdir()
    file = folder / "metrics.jsonl"
    started = time.time()
    _run([sys.executable, "-m", "benchmarks.bare", RECIPE, str(updates), str(file), *overrides], spin)
    return list(map(json.loads, file.read_text().splitlines())), started


def _run(command: list[str], spin: bool = False) -> None:
    from trainer.run.environment import QUIET

    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment |= QUIET  # what ddrl sets for itself, waiting threads that sleep among it
    if spin:
        del environment["OMP_WAIT_POLICY"]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[1:4])} failed with status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def measure(updates: int, repeats: int, overrides: Sequence[str], spin: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Both sides, taking turns."""
    from benchmarks.machine import machine
    from benchmarks.stats import spread
    from trainer.config.load import load_config

    here, config = machine(), load_config(ROOT / RECIPE, list(overrides))
    size = config.rollout.group_size
    sides = {"ddrl": run_ddrl, "bare": partial(run_bare, spin=spin)}
    found: dict[str, dict[str, list[float]]] = {side: {} for side in sides}
    counts: set[tuple[int, int]] = set()
    loads = []
    with tempfile.TemporaryDirectory(prefix="ddrl-bench-") as folder:
        for repeat in range(repeats):
            loads.append(os.getloadavg()[0])
            for side in sorted(sides, reverse=repeat % 2 == 1):
                say(f"repeat {repeat + 1} of {repeats}, {side} …")
                records, started = sides[side](Path(folder) / f"{side}-{repeat}", updates, overrides)
                counts.add((len(records), sum(samples(r, size) for r in records)))
                figures = steady(records, size) | {"until_first_update_s": float(records[0]["time"]) - started}
                for name, value in figures.items():
                    found[side].setdefault(name, []).append(value)
    if len(counts) != 1:
        raise SystemExit(f"the two sides did not do the same work: (updates, samples) {sorted(counts)}")
    ratios = [a / b for a, b in zip(found["ddrl"]["samples_per_s"], found["bare"]["samples_per_s"], strict=True)]
    return {
        "machine": here,
        "load_before_each_repeat": loads,
        "updates": updates,
        "bare_spins": spin,
        "samples": counts.pop()[1],
        "sides": {side: {name: spread(values) for name, values in figures.items()} for side, figures in found.items()},
        "ddrl / bare": spread(ratios),
    }


def markdown(result: dict[str, Any]) -> str:
    """The tables of docs/benchmarks.md."""
    from benchmarks.markdown import figure, table

    m, loads = result["machine"], result["load_before_each_repeat"]
    head = f"{m['cores']} cores ({m['processor']}), load average before the repeats {min(loads):.1f} to {max(loads):.1f}, Python {m['python']}."
    if result["quick"]:
        head += " **A quick check, not a measurement.**"
    columns = ("samples_per_s", "update_s", "until_first_update_s")
    rows = [[side, *(figure(figures[name], 1) for name in columns)] for side, figures in result["sides"].items()]
    parts = []
    for side, figures in result["sides"].items():
        names = [n for n in figures if n.endswith("_s") and n not in columns]
        parts.append(f"- {side}, seconds: " + ", ".join(f"{n.removesuffix('_s')} {figure(figures[n], 2)}" for n in sorted(names)))
    told = f"{result['updates']} updates on {result['samples']} samples each; samples/s, ddrl / bare: **{figure(result['ddrl / bare'], 2)}**."
    return "\n\n".join([head, table(["side", "samples/s", "seconds an update", "seconds until the first update ends"], rows), told, "\n".join(parts)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five small updates, once: does everything run?")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print Markdown (the default)")
    parser.add_argument("--updates", type=int, help="updates of a run [default: 12]")
    parser.add_argument("--repeats", type=int, help="[default: 3]")
    parser.add_argument("--spin", action="store_true", help="let the bare loop's waiting threads spin: faster, on a machine that nobody else uses")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the recipe, for both sides")
    options = parser.parse_args()
    if options.json and options.markdown:
        parser.error("choose one of --json and --markdown")
    updates, repeats = options.updates or (5 if options.quick else 12), options.repeats or (1 if options.quick else 3)
    overrides = [*(SMALL if options.quick else ()), *options.set]
    result = measure(updates, repeats, overrides, options.spin, lambda line: print(line, file=sys.stderr, flush=True)) | {"quick": options.quick}
    print(json.dumps(result, indent=1) if options.json else markdown(result))


if __name__ == "__main__":
    main()
