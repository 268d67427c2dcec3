"""Reading a run folder as it is: ``load_run(dir) -> RunRecord``.

A run may still be going, may have been stopped, or may have died while it wrote a line. Reading therefore
never fails on content: what is absent or cut off is left out and said in ``RunRecord.problems``, one sentence
each. Only a folder that does not exist is an error.

Invariant: after a restart the learner repeats steps; ``updates`` and ``evals`` hold the lineage that counts.
When an update of step s follows one of step >= s, everything recorded before it from s on is dropped.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from trainer.report.wording import number

SUMMARY_KEYS = (
    "seed", "ocr_before", "ocr_after", "ocr_gain_stderr", "diffusion_loss_before", "diffusion_loss_after",
    "diversity_before", "diversity_after", "updates", "groups", "wall_seconds",
)  # fmt: skip
SCENE_STATISTICS = ("brightness", "contrast", "colourfulness", "edge_density")
GROUP_STATES = ("leased", "ready", "claimed", "settled", "evicted", "dead")
ROLLOUT_STAGES = frozenset({"sample", "score", "encode", "decode", "commit"})  # run beside the learner

_PASSWORD_IN_URL = re.compile(r"(://)[^/\s@'\"]*@")
_SECRET_LINE = re.compile(r"(?im)^(\s*[\w-]*(?:password|secret|api_key|access_key|_token)\s*:\s*)(?!null\b|~)\S.*$")


@dataclass(frozen=True)
class Update:
    """One learner update. Absent numbers are absent keys, so SFT runs simply have fewer of them."""

    step: int
    values: dict[str, float]
    seconds: dict[str, float]
    groups: dict[str, float]


@dataclass(frozen=True)
class EvalPoint:
    """One held-out evaluation. ``weights`` is ``raw`` or ``ema``; rewards are in the scorer's units."""

    step: int
    split: str
    weights: str
    values: dict[str, float]
    scene: dict[str, float]


@dataclass(frozen=True)
class Grid:
    """A sample grid on fixed prompts and fixed noise; ``width`` and ``height`` in pixels."""

    label: str
    step: int | None
    path: Path
    width: int
    height: int


@dataclass(frozen=True)
class RunRecord:
    """Everything the report shows about one run."""

    folder: Path
    name: str
    config: dict[str, object] = field(default_factory=dict)
    config_text: str = ""
    updates: list[Update] = field(default_factory=list)
    evals: list[EvalPoint] = field(default_factory=list)
    summary: dict[str, object] | None = None
    before: Grid | None = None
    after: Grid | None = None
    between: list[Grid] = field(default_factory=list)
    restarts: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def objective(self) -> str | None:
        """The objective's name: ``objective`` of the config as text or its ``preset``/``name`` entry."""
        chosen = self.config.get("objective")
        if isinstance(chosen, Mapping):
            chosen = chosen.get("preset", chosen.get("name"))
        if chosen is None and self.summary is not None:
            chosen = self.summary.get("objective")
        return chosen if isinstance(chosen, str) else None

    @property
    def seed(self) -> int | None:
        """The run's seed, from the config, else from the summary."""
        value = self.config.get("seed")
        if value is None and self.summary is not None:
            value = self.summary.get("seed")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of one number of the updates, in step order."""
        return [(update.step, update.values[key]) for update in self.updates if key in update.values]

    def points(self, split: str, weights: str) -> list[EvalPoint]:
        """The evaluations of one split and one kind of weights, in step order."""
        return [point for point in self.evals if (point.split, point.weights) == (split, weights)]

    def curve_split(self) -> str | None:
        """The split whose evaluations make the curves: the one evaluated most often; ``dev`` wins a tie."""
        splits = sorted({point.split for point in self.evals})
        return max(splits, key=lambda split: len(self.points(split, "raw")), default=None)


def load_run(folder: Path) -> RunRecord:
    """Read a run folder (layout: docs of the run folder in ``trainer``).

    Raises:
        FileNotFoundError: ``folder`` is not a folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder at {folder}; give the folder that holds metrics.jsonl")
    problems: list[str] = []
    config_text, config = _read_config(folder / "config.yaml", problems)
    updates, evals, restarts = _read_metrics(folder / "metrics.jsonl", problems)
    summary = _read_summary(folder / "summary.json", problems)
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


def _json_lines(path: Path, problems: list[str]) -> Iterator[dict[str, object]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            parsed = json.loads(line)
        except ValueError:
            if place == len(lines):
                problems.append(f"metrics.jsonl: the last line ({place}) is cut off, as after a crash; left out.")
            else:
                problems.append(f"metrics.jsonl: line {place} is not JSON; left out.")
            continue
        if isinstance(parsed, dict):
            yield parsed
        else:
            problems.append(f"metrics.jsonl: line {place} is not an object; left out.")


def _read_metrics(path: Path, problems: list[str]) -> tuple[list[Update], list[EvalPoint], int]:
    if not path.is_file():
        problems.append("metrics.jsonl is missing: there are no curves.")
        return [], [], 0
    updates: dict[int, Update] = {}
    evals: dict[tuple[int, str, str], EvalPoint] = {}
    restarts = 0
    beside = path.with_name("evaluations.jsonl")
    for line in [*_json_lines(path, problems), *(_json_lines(beside, problems) if beside.is_file() else [])]:
        step = line.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            continue
        if line.get("kind") == "update":
            if updates and step <= max(updates):
                restarts += 1
                updates = {known: update for known, update in updates.items() if known < step}
                evals = {place: point for place, point in evals.items() if place[0] < step}
            values = {key: value for key, value in _numbers(line).items() if key != "step"}
            updates[step] = Update(step, values, _numbers(line.get("seconds")), _numbers(line.get("groups")))
        elif line.get("kind") == "eval":
            split, weights = str(line.get("split", "dev")), str(line.get("weights", "raw"))
            values = {key: value for key, value in _numbers(line).items() if key != "step"}
            evals[step, split, weights] = EvalPoint(step, split, weights, values, _numbers(line.get("scene")))
    if not updates:
        problems.append("metrics.jsonl holds no finished update.")
    if not evals:
        problems.append("metrics.jsonl holds no held-out evaluation.")
    return [updates[step] for step in sorted(updates)], [evals[place] for place in sorted(evals)], restarts


def _read_summary(path: Path, problems: list[str]) -> dict[str, object] | None:
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
    return Grid(label, step, path, *size)


def _png_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a complete PNG: signature, IHDR first, IEND last (PNG specification, section 5)."""
    complete = data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR" and data[-8:-4] == b"IEND"
    if not complete:
        return None
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
