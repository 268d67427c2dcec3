"""The table of docs/results.md from finished runs: DDRL against its control for each seed, and without the data term.

    python -m benchmarks.results --ddrl runs/glyph-ocr runs/glyph-ocr-1 … --control runs/glyph-control-0 … [--free runs/glyph-free]

Every figure is computed from the per-prompt numbers in the runs' `eval/` folders. `--json` prints them as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from trainer.report.summary import changes, evaluation, reward_against


def final(run: Path) -> dict[str, Any]:
    """First and last test evaluation of a run and their paired changes."""
    steps = sorted(int(f.stem.split("-")[1]) for f in (run / "eval").glob("test-*-raw.json"))
    before, after = evaluation(run, steps[0]), evaluation(run, steps[-1])
    if before is None or after is None or steps[0] == steps[-1]:
        raise SystemExit(f"{run} has no evaluation before and after; is the run finished?")
    summary = json.loads((run / "summary.json").read_text())
    return {
        "run": run.name,
        "seed": summary["seed"],
        "updates": steps[-1],
        "prompts": after["prompts"],
        "before": before["reward"],
        "after": after["reward"],
        "exact_before": before["exact_match"],
        "exact_after": after["exact_match"],
        "loss_before": before["diffusion_loss"],
        "loss_after": after["diffusion_loss"],
        "training_s": summary["wall_seconds"]["training"],
        **changes(before["per_prompt"], after["per_prompt"]),
    }


def spell(row: dict[str, Any], control: dict[str, Any] | None, difference: tuple[float, float] | None) -> str:
    rise, low, high = (100 * x for x in (row["diffusion_loss_rise"], *row["diffusion_loss_rise_ci95"]))
    cells = [
        row["run"],
        str(row["seed"]),
        f"{row['before']:.3f} → {row['after']:.3f}",
        f"{row['ocr_gain']:+.3f} ± {row['ocr_gain_stderr']:.3f} ({row['ocr_gain'] / row['ocr_gain_stderr']:.1f} se)",
        "–" if control is None else f"{control['ocr_gain']:+.3f} ± {control['ocr_gain_stderr']:.3f}",
        "–" if difference is None else f"{difference[0]:+.3f} ± {difference[1]:.3f} ({difference[0] / difference[1]:.1f} se)",
        f"{row['exact_before']:.3f} → {row['exact_after']:.3f}",
        f"{rise:+.1f} % [{low:+.1f}, {high:+.1f}]",
        f"{100 * row['diversity_change']:+.1f} %",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ddrl", type=Path, nargs="+", required=True)
    parser.add_argument("--control", type=Path, nargs="*", default=[])
    parser.add_argument("--free", type=Path, nargs="*", default=[], help="runs without the data term")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    controls = {final(run)["seed"]: (run, final(run)) for run in options.control}
    rows = []
    for run in [*options.ddrl, *options.free]:
        row = final(run)
        control_run, control = controls.get(row["seed"], (None, None))
        difference = reward_against(control_run, run) if control_run else None
        rows.append((row, control, difference))
    if options.json:
        print(json.dumps([{**row, "control": control, "above_control": difference} for row, control, difference in rows], indent=1))
        return
    print("| run | seed | OCR reward | gain (paired) | control's gain | above the control (paired) | exact match | diffusion loss [95 %] | diversity |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row, control, difference in rows:
        print(spell(row, control, difference))


if __name__ == "__main__":
    main()
