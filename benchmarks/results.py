"""The table of docs/results.md from finished runs: DDRL against its control for each seed, and without the data term.

    python -m benchmarks.results --reward ocr --ddrl runs/glyph-ocr runs/glyph-ocr-1 … --control runs/glyph-control-0 … [--free runs/glyph-free]
    python -m benchmarks.results --reward ocr --held-out motion --ddrl runs/glyph-video-0 … --control runs/glyph-video-control-0 …

Every figure is computed from the per-prompt numbers in the runs' `eval/` folders. `--json` prints them as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.report.summary import changes, evaluation, last_test, reward_against

Difference = tuple[float, float] | str
"""Mean and standard error of a paired difference, or why there is none."""
Row = tuple[dict[str, Any], dict[str, Any] | None, Mapping[str, Difference]]
"""A run's figures, its control's, and by reward what it is above the control."""


def final(run: Path, reward: str, exact: str, held_out: Sequence[str] = ()) -> dict[str, Any]:
    """First and last test evaluation of a run and their paired changes; `exact` is a sub-score shown beside the reward, `held_out` are
    rewards that were not trained on."""
    before, after = evaluation(run, 0), last_test(run)
    if before is None or after is None:
        raise SystemExit(f"{run} has no evaluation before and after; is the run finished?")
    found = changes(before, after)
    if reward not in found["rewards"]:
        raise SystemExit(f"{run}: {reward} cannot be paired before and after: {found['unpaired'] or 'it was not scored'}")
    summary = json.loads((run / "summary.json").read_text())
    return {
        "run": run.name,
        "seed": summary["seed"],
        "updates": after["step"],
        "prompts": after["prompts"],
        "evaluation_set": after["set"],
        "before": before["rewards"].get(reward),
        "after": after["rewards"].get(reward),
        "gain": found["rewards"][reward]["gain"],
        "stderr": found["rewards"][reward]["stderr"],
        "held_out": {name: {"before": before["rewards"].get(name), "after": after["rewards"].get(name)} for name in held_out},
        "exact_before": before["sub_scores"].get(exact),
        "exact_after": after["sub_scores"].get(exact),
        "loss_before": before["diffusion_loss"],
        "loss_after": after["diffusion_loss"],
        "training_s": summary["wall_seconds"]["training"],
        **found,
    }


def arrow(before: float | None, after: float | None) -> str:
    return "–" if before is None or after is None else f"{before:.3f} → {after:.3f}"


def compared(difference: Difference) -> str:
    """A paired difference with its standard error, or why there is none."""
    if isinstance(difference, str):
        return difference or "–"
    mean, error = difference
    return f"{mean:+.3f} ± {error:.3f}" + (f" ({mean / error:.1f} se)" if error else "")


def held_out_cell(row: dict[str, Any], reward: str, against: Difference) -> str:
    """A reward that was not trained on: before and after, and what it is above the control's."""
    found = row["held_out"][reward]
    return f"{arrow(found['before'], found['after'])}; {compared(against)}"


def spell(row: dict[str, Any], control: dict[str, Any] | None, difference: Difference, held_out: Sequence[str] = ()) -> str:
    """A line of the table; `held_out`: cells of the rewards that were not trained on."""
    rise, low, high = (100 * x for x in (row["diffusion_loss_rise"], *row["diffusion_loss_rise_ci95"]))
    cells = [
        row["run"],
        str(row["seed"]),
        arrow(row["before"], row["after"]),
        f"{row['gain']:+.3f} ± {row['stderr']:.3f} ({row['gain'] / row['stderr']:.1f} se)",
        "–" if control is None else f"{control['gain']:+.3f} ± {control['stderr']:.3f}",
        compared(difference),
        arrow(row["exact_before"], row["exact_after"]),
        *held_out,
        f"{rise:+.1f} % [{low:+.1f}, {high:+.1f}]",
        f"{100 * row['diversity_change']:+.1f} %",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", default="ocr", help="the reward of the table")
    parser.add_argument("--sub-score", default="ocr.exact_match", help="the sub-score beside it")
    parser.add_argument("--held-out", nargs="*", default=[], help="rewards that were not trained on, each with a column")
    parser.add_argument("--ddrl", type=Path, nargs="+", required=True)
    parser.add_argument("--control", type=Path, nargs="*", default=[])
    parser.add_argument("--free", type=Path, nargs="*", default=[], help="runs without the data term")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    finals = {run: final(run, options.reward, options.sub_score, options.held_out) for run in [*options.control, *options.ddrl, *options.free]}
    controls = {finals[run]["seed"]: (run, finals[run]) for run in options.control}
    rows = []
    for run in [*options.ddrl, *options.free]:
        row = finals[run]
        control_run, control = controls.get(row["seed"], (None, None))
        above = {name: reward_against(control_run, run, name) if control_run else "" for name in (options.reward, *options.held_out)}
        rows.append((row, control, above))
    if options.json:
        print(json.dumps([{**row, "control": control, "above_control": above} for row, control, above in rows], indent=1))
        return
    print("\n".join(table(rows, options.reward, options.sub_score, options.held_out)))


def table(rows: Sequence[Row], reward: str, sub_score: str, held_out: Sequence[str]) -> list[str]:
    """Lines of the table, in Markdown."""
    shown = sub_score.rpartition(".")[2].replace("_", " ")
    columns = ["run", "seed", reward, "gain (paired)", "control's gain", "above the control (paired)", shown]
    columns += [f"{name}, held out; above the control" for name in held_out] + ["diffusion loss [95 %]", "diversity"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row, control, above in rows:
        lines.append(spell(row, control, above[reward], [held_out_cell(row, name, above[name]) for name in held_out]))
    return lines


if __name__ == "__main__":
    main()
