"""Taking a policy out of a run folder, together with what made it: recipe, seed and curve."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from trainer.config.load import load_config
from trainer.run.folder import RunFolder

CURVE_POINTS = 200


class ExportError(Exception):
    """The run has no policy to export, or the destination cannot be written."""


def export_run(run: Path, out: Path, ema: bool, overwrite: bool = False, hub_folder: bool = False) -> Path:
    """Copy the newest policy of `run` into `out` with `provenance.json` (configuration, step, evaluations, loss curve), and with
    `hub_folder` a model card, README.md.

    The copy is made beside `out` and moved there when it is whole; what stood there before is removed last.

    Raises:
        ExportError: no export in the run folder, `out` holds something and `overwrite` is not set, or it cannot be written.
    """
    folder = RunFolder(run)
    suffix = "-ema" if ema else ""
    found = sorted(f for f in folder.exports.glob(f"step-*{suffix}") if f.name.endswith("-ema") == ema and f.suffix != ".partial")
    if not found:
        raise ExportError(f"{run} holds no exported policy{' average' if ema else ''}; the first one is written with the first checkpoint")
    records = folder.records()
    updates = [r for r in records if r.get("kind") == "update"]
    stride = max(1, len(updates) // CURVE_POINTS)
    step, weights = int(found[-1].name.split("-")[1]), "ema" if ema else "raw"
    provenance = {
        # paths below the current folder as one would write them in a recipe, not this machine's
        "recipe": (folder.path / "config.yaml").read_text().replace(f"{Path.cwd()}/", ""),
        "step": step,
        "weights": weights,
        "evaluations": [{k: v for k, v in r.items() if k != "time"} for r in records if r.get("kind") == "evaluation"],
        "data_loss": [[r["step"], round(r["data_loss"], 5)] for r in updates[::stride] if "data_loss" in r],
    }
    try:
        if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
            raise ExportError(f"{out} is not empty{_holds(out)}; choose another folder, or add --overwrite to replace it")
        beside = {"provenance.json": json.dumps(provenance, indent=1) + "\n"}
        if hub_folder:
            from trainer.cli.card import model_card

            beside["README.md"] = str(model_card(folder.path, found[-1], load_config(folder.path / "config.yaml"), step, weights))
        _put(found[-1], out, beside)
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error.strerror}") from None
    return out


def _holds(out: Path) -> str:
    """Which policy lies there, if it says so."""
    try:
        told = json.loads((out / "provenance.json").read_text())
        return f": it holds the {told['weights']} weights of update {told['step']} of some run"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _put(policy: Path, out: Path, beside: dict[str, str]) -> None:
    target = out.resolve()
    made, old = (target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(policy, made)
        for name, text in beside.items():
            (made / name).write_text(text)
        if target.exists():
            target.rename(old)
        try:
            made.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)
