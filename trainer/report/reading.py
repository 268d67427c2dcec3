"""Reading a run folder as it is: ``load_run(dir) -> RunRecord``.

A run may still be going, may have been stopped, or may have died while it wrote a line. Reading therefore
never fails on content: what is absent, cut off or out of date is left out and said in ``RunRecord.problems``,
one sentence each. Only a folder that does not exist is an error.

Invariant: after a restart the learner repeats steps; ``updates`` and ``evals`` hold the lineage that counts.
When an update of step s follows one of step >= s, everything recorded before it from s on is dropped. A summary that is
older than the run's last start tells of another end and is not shown.
"""

import json
import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from trainer.report.record import EvalPoint, Grid, RunRecord, Update
from trainer.report.state import RunState, read_state
from trainer.report.tail import read_lines
from trainer.report.wording import number

OLDER = "written by an older ddrl"
SUMMARY_KEYS = (
    "seed", "rewards", "sub_scores", "diffusion_loss_before", "diffusion_loss_after", "diversity_before", "diversity_after",
    "updates", "groups", "wall_seconds",
)  # fmt: skip

_PASSWORD_IN_URL = re.compile(r"(://)[^/\s@'\"]*@")
_SECRET_LINE = re.compile(r"(?im)^(\s*[\w-]*(?:password|secret|api_key|access_key|_token)\s*:\s*)(?!null\b|~)\S.*$")


def load_run(folder: Path) -> RunRecord:
    """Read a run folder (layout: docs of the run folder in ``trainer``).

    Raises:
        FileNotFoundError: ``folder`` is not a folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder at {folder}; give the folder that holds metrics.jsonl")
    problems: list[str] = []
    config_text, config = _read_config(folder / "config.yaml", problems)
    state = read_state(folder)
    updates, evals, restarts = _read_metrics(folder, problems)
    summary = _read_summary(folder / "summary.json", state, updates[-1].step if updates else 0, problems)
    before = _read_grid(folder / "samples" / "before.png", "before", 0, problems)
    after = _read_grid(folder / "samples" / "after.png", "after", None, problems)
    between = [grid for grid in _between(folder / "samples", problems) if grid is not None]
    name = config.get("name")
    return RunRecord(
        folder=folder,
        name=name if isinstance(name, str) and name else folder.resolve().name,
        config=config,
        config_text=config_text,
        updates=updates,
        evals=evals,
        summary=summary,
        before=before,
        after=after,
        between=between,
        restarts=restarts,
        state=state,
        problems=problems,
    )


def redact(text: str) -> str:
    """Config text without the passwords in URLs and the values of secret keys: a report is passed around."""
    return _SECRET_LINE.sub(r"\1***", _PASSWORD_IN_URL.sub(r"\1***@", text))


def _numbers(mapping: object) -> dict[str, float]:
    if not isinstance(mapping, Mapping):
        return {}
    found = {str(key): number(value) for key, value in mapping.items()}
    return {key: value for key, value in found.items() if value is not None}


def _read_config(path: Path, problems: list[str]) -> tuple[str, dict[str, object]]:
    if not path.is_file():
        problems.append("config.yaml is missing: objective and seed are taken from the summary, if it has them.")
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problems.append(f"config.yaml cannot be read: {' '.join(str(error).split())}")
        return redact(text), {}
    return redact(text), config if isinstance(config, dict) else {}


def _read_metrics(folder: Path, problems: list[str]) -> tuple[list[Update], list[EvalPoint], int]:
    if not (folder / "metrics.jsonl").is_file():
        problems.append("metrics.jsonl is missing: there are no curves.")
    updates: dict[int, Update] = {}
    evals: dict[tuple[int, str, str], EvalPoint] = {}
    restarts = 0
    older = False
    for line in read_lines(folder, problems):
        step = line.get("step")
        older = older or line.get("kind") == "eval"
        if not isinstance(step, int) or isinstance(step, bool):
            continue
        if line.get("kind") == "update":
            if updates and step <= max(updates):
                restarts += 1
                updates = {known: update for known, update in updates.items() if known < step}
                evals = {place: point for place, point in evals.items() if place[0] < step}
            updates[step] = _update(step, line)
        elif line.get("kind") == "evaluation":
            point = _evaluation(folder, step, line)
            evals[step, point.split, point.weights] = point
    if older:
        problems.append(f"metrics.jsonl was {OLDER}: its evaluations are not shown.")
    elif not updates and (folder / "metrics.jsonl").is_file():
        problems.append("metrics.jsonl holds no finished update.")
    if not evals and not older:
        problems.append("The run folder holds no held-out evaluation.")
    return [updates[step] for step in sorted(updates)], [evals[place] for place in sorted(evals)], restarts


def _update(step: int, line: Mapping[str, object]) -> Update:
    values = {key: value for key, value in _numbers(line).items() if key != "step"}
    seconds, groups, rewards, failed = (_numbers(line.get(key)) for key in ("seconds", "groups", "rewards", "failed_scores"))
    return Update(step, values, seconds, groups, rewards, failed, _warnings(line))


def _warnings(line: Mapping[str, object]) -> tuple[str, ...]:
    warnings = line.get("warnings")
    return tuple(str(text) for text in warnings) if isinstance(warnings, list) else ()


def _evaluation(folder: Path, step: int, line: Mapping[str, object]) -> EvalPoint:
    split, weights = str(line.get("split", "dev")), str(line.get("weights", "raw"))
    digest = line.get("set")
    return EvalPoint(
        step,
        split,
        weights,
        {key: value for key, value in _numbers(line).items() if key != "step"},
        _numbers(line.get("scene")),
        _numbers(line.get("rewards")),
        _numbers(line.get("sub_scores")),
        _errors(folder / "eval" / f"{split}-{step:06d}-{weights}.json"),
        digest if isinstance(digest, str) else None,
        _texts(line.get("revisions")),
        _numbers(line.get("failed")),
        _texts(line.get("first_failure")),
        _warnings(line),
    )


def _errors(path: Path) -> dict[str, float]:
    """Standard error of each reward's mean, from the scores of every prompt; none where they are not kept."""
    try:
        columns = json.loads(path.read_text())["per_prompt"]["rewards"]
        scores = {name: [value for value in column if value is not None] for name, column in columns.items()}
        return {name: statistics.stdev(known) / len(known) ** 0.5 for name, known in scores.items() if len(known) > 1}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _texts(mapping: object) -> dict[str, str]:
    return {str(key): str(value) for key, value in mapping.items()} if isinstance(mapping, Mapping) else {}


def _read_summary(path: Path, state: RunState, last: int, problems: list[str]) -> dict[str, object] | None:
    if not path.is_file():
        problems.append("summary.json is missing: the run is still going, or ended before its last evaluation.")
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        problems.append(f"summary.json cannot be read: {error}")
        return None
    if not isinstance(summary, dict):
        problems.append("summary.json is not an object.")
        return None
    if "rewards" not in summary and "ocr_before" in summary:
        problems.append(f"summary.json was {OLDER}: it is not shown.")
        return None
    made = number(summary.get("updates"))
    if (state.started is not None and path.stat().st_mtime < state.started) or (made is not None and made < last):
        problems.append("summary.json tells of an earlier end of this run, before it went on: it is not shown.")
        return None
    lacking = [key for key in SUMMARY_KEYS if key not in summary]
    if lacking:
        problems.append(f"summary.json lacks {', '.join(lacking)}.")
    return summary


def _between(samples: Path, problems: list[str]) -> Iterator[Grid | None]:
    for path in sorted(samples.glob("step-*.png")):
        digits = path.stem.removeprefix("step-")
        if digits.isdigit():
            yield _read_grid(path, f"update {int(digits)}", int(digits), problems)


def _read_grid(path: Path, label: str, step: int | None, problems: list[str]) -> Grid | None:
    if not path.is_file():
        problems.append(f"samples/{path.name} is missing.")
        return None
    size = _png_size(path.read_bytes())
    if size is None:
        problems.append(f"samples/{path.name} is cut off or not a PNG; left out.")
        return None
    clip = path.with_suffix(".mp4")
    return Grid(label, step, path, *size, clip if clip.is_file() else None)


def _png_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a complete PNG: signature, IHDR first, IEND last (PNG specification, section 5)."""
    complete = data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR" and data[-8:-4] == b"IEND"
    if not complete:
        return None
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
