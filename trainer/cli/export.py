"""Taking a policy out of a run folder, together with what made it: recipe, seed and curve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from trainer.run.folder import RunFolder

CURVE_POINTS = 200


class ExportError(Exception):
    """The run has no policy to export, or the destination cannot be written."""


def export_run(run: Path, out: Path, ema: bool) -> Path:
    """Copy the newest policy of `run` into `out` with `provenance.json` (configuration, step, evaluations, loss curve).

    Raises:
        ExportError: no export in the run folder, or the destination cannot be written.
    """
    folder = RunFolder(run)
    suffix = "-ema" if ema else ""
    found = sorted(f for f in folder.exports.glob(f"step-*{suffix}") if f.name.endswith("-ema") == ema and f.suffix != ".partial")
    if not found:
        raise ExportError(f"{run} holds no exported policy{' average' if ema else ''}; the first one is written with the first checkpoint")
    records = folder.records()
    updates = [r for r in records if r["kind"] == "update"]
    stride = max(1, len(updates) // CURVE_POINTS)
    provenance = {
        # paths below the current folder as one would write them in a recipe, not this machine's
        "recipe": (folder.path / "config.yaml").read_text().replace(f"{Path.cwd()}/", ""),
        "step": int(found[-1].name.split("-")[1]),
        "weights": "ema" if ema else "raw",
        "evaluations": [{k: v for k, v in r.items() if k != "time"} for r in records if r["kind"] == "eval"],
        "data_loss": [[r["step"], round(r["data_loss"], 5)] for r in updates[::stride] if "data_loss" in r],
    }
    try:
        shutil.copytree(found[-1], out, dirs_exist_ok=True)
        (out / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error.strerror}") from None
    return out
