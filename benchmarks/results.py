"""The table of docs/results.md from finished runs: DDRL against its control for each seed, and without the data term.

    python -m benchmarks.results --reward ocr --ddrl runs/glyph-ocr runs/glyph-ocr-1 … --control runs/glyph-control-0 … [--free runs/glyph-free]

Every figure is computed from the per-prompt numbers in the runs' `eval/` folders. `--json` prints them as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from trainer.report.summary import changes, evaluation, last_test, reward_against


def final(run: Path, reward: str, exact: str) -> dict[str, Any]:
    """First and last test evaluation of a run and their paired changes; `exact` is a sub-score shown beside the reward."""
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
        "exact_before": before["sub_scores"].get(exact),
        "exact_after": after["sub_scores"].get(exact),
        "loss_before": before["diffusion_loss"],
        "loss_after": after["diffusion_loss"],
        "training_s": summary["wall_seconds"]["training"],
        **found,
    }


def arrow(before: float | None, after: float | None) -> str:
    return "–" if before is None or after is None else f"{before:.3f} → {after:.3f}"


def spell(row: dict[str, Any], control: dict[str, Any] | None, difference: tuple[float, float] | str) -> str:
    rise, low, high = (100 * x for x in (row["diffusion_loss_rise"], *row["diffusion_loss_rise_ci95"]))
    cells = [
        row["run"],
        str(row["seed"]),
        arrow(row["before"], row["after"]),
        f"{row['gain']:+.3f} ± {row['stderr']:.3f} ({row['gain'] / row['stderr']:.1f} se)",
        "–" if control is None else f"{control['gain']:+.3f} ± {control['stderr']:.3f}",
        difference or "–" if isinstance(difference, str) else f"{difference[0]:+.3f} ± {difference[1]:.3f} ({difference[0] / difference[1]:.1f} se)",
        arrow(row["exact_before"], row["exact_after"]),
        f"{rise:+.1f} % [{low:+.1f}, {high:+.1f}]",
        f"{100 * row['diversity_change']:+.1f} %",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", default="ocr", help="the reward of the table")
    parser.add_argument("--sub-score", default="ocr.exact_match", help="the sub-score beside it")
    parser.add_argument("--ddrl", type=Path, nargs="+", required=True)
    parser.add_argument("--control", type=Path, nargs="*", default=[])
    parser.add_argument("--free", type=Path, nargs="*", default=[], help="runs without the data term")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    finals = {run: final(run, options.reward, options.sub_score) for run in [*options.control, *options.ddrl, *options.free]}
    controls = {finals[run]["seed"]: (run, finals[run]) for run in options.control}
    rows = []
    for run in [*options.ddrl, *options.free]:
        row = finals[run]
        control_run, control = controls.get(row["seed"], (None, None))
        difference = reward_against(control_run, run, options.reward) if control_run else ""
        rows.append((row, control, difference))
    if options.json:
        print(json.dumps([{**row, "control": control, "above_control": difference} for row, control, difference in rows], indent=1))
        return
    shown = options.sub_score.rpartition(".")[2].replace("_", " ")
    print(f"| run | seed | {options.reward} | gain (paired) | control's gain | above the control (paired) | {shown} | diffusion loss [95 %] | diversity |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row, control, difference in rows:
        print(spell(row, control, difference))


if __name__ == "__main__":
    main()
