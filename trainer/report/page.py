"""``write_report``: the report page of one run, or of several runs beside each other.

The page is one file, and a content policy inside it forbids the browser to fetch anything: styles, drawings, sample grids
and clips are all inlined. Where there are clips, one script keeps them in step; the policy allows none but it. The page can
be written again at any time, also while the run is going on; the file is replaced in one move, so a reader never sees half
a page.
"""

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trainer.report import wording
from trainer.report.charts import Charts, Named, Panel
from trainer.report.outcome import VERDICTS, Measure, compare, measures, shared_reward, summary_of
from trainer.report.reading import load_run
from trainer.report.record import GROUP_STATES, EvalPoint, Grid, RunRecord
from trainer.report.troubles import dead_words, troubles
from trainer.report.wording import number

GRIDS_BETWEEN = 8
_TEMPLATES = Path(__file__).resolve().parent / "templates"


@dataclass(frozen=True)
class RunView:
    """What the template shows of one run."""

    named: Named
    facts: list[tuple[str, str]]
    rows: list[Measure]
    row_note: str
    headline: str
    before: Grid | None
    after: Grid | None
    after_title: str
    between: list[Grid]
    between_total: int
    stages: list[Panel]
    ledger: list[tuple[str, float]]
    ledger_step: int
    evals: list[EvalPoint]
    rewards: list[str]
    troubles: list[str]


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the report of these run folders to ``out``; the first run is the reference of comparisons.

    Raises:
        ValueError: no run folder was given.
        FileNotFoundError: one of them is not a folder.
    """
    if not run_dirs:
        raise ValueError("no run folder given: a report needs at least one")
    runs = [load_run(folder) for folder in run_dirs]
    page = render(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    partial.write_text(page, encoding="utf-8")
    partial.replace(out)
    return out


def render(runs: Sequence[RunRecord]) -> str:
    """The page as HTML text."""
    named = [Named(name, colour, run) for colour, (name, run) in enumerate(zip(_names(runs), runs, strict=True))]
    charts = Charts(named)
    compared = compare([(one.name, summary_of(one.run)[0]) for one in named]) if len(named) > 1 else []
    template = _environment().get_template("report.html.j2")
    views = [_view(one, charts) for one in named]
    plays = any(grid is not None and grid.clip for view in views for grid in (view.before, view.after, *view.between))
    script = (_TEMPLATES / "clips.js").read_text(encoding="utf-8") if plays else ""
    return template.render(
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        title=" · ".join(one.name for one in named),
        views=views,
        compared=compared,
        trade=charts.trade(compared, shared_reward(compared)) if compared else None,
        reward_names=list(dict.fromkeys(reward for row in compared for reward in row.gains)),
        held_out=charts.held_out(),
        sub_scores=charts.sub_scores(),
        scene=charts.scene(),
        scene_keys=charts.run_keys(),
        optimisation=charts.optimisation(),
        staleness=charts.staleness(),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.globals.update(
        fixed=wording.fixed, general=wording.general, signed=wording.signed, percent=wording.percent,
        interval=wording.interval, count=wording.count, ABSENT=wording.ABSENT, VERDICTS=VERDICTS,
        embed=_embed, embed_clip=_embed_clip,
    )  # fmt: skip
    return environment


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Run names; where two runs share one, their folders, and a running number if those are alike too."""
    given = [run.name for run in runs]
    names = [name if given.count(name) == 1 else "/".join(run.folder.resolve().parts[-2:]) for name, run in zip(given, runs, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, start=1)]


def _embed(grid: Grid) -> str:
    return _inline("image/png", grid.path)


def _embed_clip(grid: Grid) -> str:
    assert grid.clip is not None  # the template asks
    return _inline("video/mp4", grid.clip)


def _inline(kind: str, path: Path) -> str:
    return f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _view(named: Named, charts: Charts) -> RunView:
    run = named.run
    summary, row_note = summary_of(run)
    rows = measures(summary)
    after, after_title = run.after, "After training"
    if after is None and run.between:
        after, after_title = run.between[-1], f"Latest, {run.between[-1].label}"
    last = run.updates[-1] if run.updates else None
    groups = dict(last.groups) if last else {}
    ledger = [(state, groups.pop(state)) for state in GROUP_STATES if state in groups]
    return RunView(
        named=named,
        facts=_facts(run),
        rows=rows,
        row_note=row_note,
        headline=_headline(rows),
        before=run.before,
        after=after,
        after_title=after_title,
        between=_between(run),
        between_total=len(run.between),
        stages=charts.stages(named),
        ledger=ledger + [(state.replace("_", " "), amount) for state, amount in groups.items()],
        ledger_step=last.step if last else 0,
        evals=run.evals,
        rewards=run.rewards(),
        troubles=troubles(run),
    )


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    summary = run.summary or {}
    updates = number(summary.get("updates")) or (run.updates[-1].step if run.updates else None)
    facts = [
        ("Objective", run.objective or wording.ABSENT),
        ("Seed", wording.ABSENT if run.seed is None else str(run.seed)),
        ("Updates", wording.count(updates)),
        ("Groups", wording.count(number(summary.get("groups")))),
        ("Held-out prompts", wording.count(_prompts(run))),
        ("Wall time", wording.duration(_wall_seconds(run))),
        ("State", run.state.words()),
    ]
    if run.restarts:
        facts.append(("Restarts", f"{run.restarts}, repeated updates counted once"))
    if dead_words(run):
        facts.append(("Dead groups", dead_words(run)))
    for label, key in (
        ("Skipped updates", "skipped"),
        ("Zero-variance groups", "zero_variance_groups"),
    ):
        total = sum(update.values.get(key, 0.0) for update in run.updates)
        if total:
            facts.append((label, wording.count(total)))
    return facts


def _prompts(run: RunRecord) -> float | None:
    if run.summary is not None and number(run.summary.get("prompts")) is not None:
        return number(run.summary.get("prompts"))
    return max((point.values["prompts"] for point in run.evals if "prompts" in point.values), default=None)


def _wall_seconds(run: RunRecord) -> float | None:
    stages = (run.summary or {}).get("wall_seconds")
    if isinstance(stages, Mapping):
        total = number(stages.get("total"))
        known = [seconds for seconds in (number(value) for value in stages.values()) if seconds is not None]
        return total if total is not None else sum(known) if known else None
    times = [update.values["time"] for update in run.updates if "time" in update.values]
    return times[-1] - times[0] if len(times) > 1 else None


def _headline(rows: Sequence[Measure]) -> str:
    """The result in one sentence, from the rows that have a change."""
    parts = []
    for row in rows:
        if row.kind == "reward" and row.change is not None:
            bounds = f" (95{wording.NARROW}% interval {wording.interval(row.ci95)})" if row.ci95 else ""
            start = f"held-out score of {row.label} went" if row.trained else f"{row.label}, never trained on,"
            parts.append(f"{start} from {wording.fixed(row.before)} to {wording.fixed(row.after)}, {wording.signed(row.change)}{bounds}")
        if row.kind in ("loss", "diversity") and row.change is not None:
            parts.append(
                f"held-out diffusion loss changed by {wording.percent(row.change)}" if row.kind == "loss" else f"diversity by {wording.percent(row.change)}"
            )
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "." if text else ""


def _between(run: RunRecord) -> list[Grid]:
    """Grids of the time between: some, evenly spread, and those in which a sign of hacking was seen, which say so."""
    told = {point.step for point in run.evals if point.warnings and point.split == "dev"}
    shown = {grid.step for grid in _spread(run.between, GRIDS_BETWEEN)} | told
    grids = [grid for grid in run.between if grid.step in shown]
    return [replace(grid, label=f"{grid.label}: a sign of reward hacking") if grid.step in told else grid for grid in grids]


def _spread(grids: Sequence[Grid], most: int) -> list[Grid]:
    """At most ``most`` grids, evenly spread, first and last included."""
    if len(grids) <= most:
        return list(grids)
    return [grids[round(place * (len(grids) - 1) / (most - 1))] for place in range(most)]
