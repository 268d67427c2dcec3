"""`ddrl plan`: what a recipe takes of N GPUs before anything starts. Exit status 2 for a recipe that does not fit, with the nearest change."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.cli.exits import fail
from trainer.cli.recipe import TinyFlag, read_recipe
from trainer.config.errors import ConfigError
from trainer.plan.assumptions import Assumptions, parse_assumptions
from trainer.plan.gpus import gpu_of

if TYPE_CHECKING:
    from rich.table import Table

    from trainer.plan.memory import Part, Process
    from trainer.plan.planner import Plan

WIDTH = 80
GB = 1e9


def plan(
    recipe: Annotated[Path, typer.Argument(help="recipe, a YAML file", show_default=False)],
    gpus: Annotated[int, typer.Option(min=0, max=4096, help="how many GPUs there are")] = 1,
    gpu: Annotated[str, typer.Option(help="which kind: h100-80, h200-141, a100-80, a100-40, l40s-48, rtx4090-24")] = "h100-80",
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a setting; may be repeated", show_default=False)] = None,
    assume: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="change what the plan assumes; may be repeated", show_default=False)] = None,
    price: Annotated[float | None, typer.Option(min=0, help="price of one GPU an hour, for the cost", show_default=False)] = None,
    json_: Annotated[bool, typer.Option("--json", help="print the plan as JSON: bytes, operations, seconds")] = False,
    tiny: TinyFlag = False,
) -> None:
    """Say what a recipe takes of memory, disk, links and time on N GPUs, whether it fits, and what would make it fit."""
    try:
        (config, notes), kind, assumptions = read_recipe(recipe, set_ or [], tiny, data=False), gpu_of(gpu), parse_assumptions(assume or [])

        from trainer.plan.planner import make_plan

        found = make_plan(config, kind, gpus, assumptions, price)
    except ConfigError as error:
        fail(str(error), 2)
    for line in notes:
        typer.echo(line, err=json_)
    if json_:
        typer.echo(json.dumps(found.json(), indent=2))
    else:
        show(found)
    if not found.fits:
        fail(_refusal(found), 2)


def _refusal(plan: Plan) -> str:
    """Why the recipe does not fit, and the nearest change."""
    first, *more = (f for f in plan.findings if f.level == "error")
    nearest = plan.nearest
    others = f" (and {len(more)} more)" if more else ""
    if nearest is not None:
        return f"does not fit: {first.message}{others}. Nearest change: {nearest.name} ({' '.join(nearest.keys)})"
    return f"does not fit: {first.message}{others}" + (". No change that is known here makes it fit" if plan.changes else "")


def show(plan: Plan) -> None:
    """Print the plan as tables of at most 80 columns."""
    from rich.console import Console

    console = Console(file=sys.stdout, width=WIDTH, highlight=False)
    gpu = plan.gpu
    console.print(f"[bold]{plan.name}[/] on {plan.gpus} x {gpu.name} ({gpu.memory / GB:.0f} GB, {gpu.bf16 / 1e12:.0f} TFLOP/s in bf16)")
    console.print(f"[dim]{plan.origin}; latent {'x'.join(map(str, plan.shape))}, {plan.work.tokens} tokens a sample, {plan.prompt[0]} of a prompt[/]")
    for table in (
        _policy(plan),
        *(_process(p) for p in plan.processes if p.parts),
        _gpus(plan),
        _hosts(plan),
        _storage(plan),
        _work(plan),
        _assumed(plan.assumptions),
    ):
        console.print(table)
    for finding in plan.findings:
        colour = {"error": "red", "warning": "yellow", "note": "dim"}[finding.level]
        console.print(f"[{colour}]{finding.level}[/]: {finding.message}")
    for change in plan.changes:
        ending = "fits" if change.fits else "not enough alone"
        console.print(f"  {change.name} ({' '.join(change.keys)}): {change.most / GB:.1f} GB a GPU, {ending}")
    console.print("[green]fits[/]" if plan.fits else "[red]does not fit[/]")


def _table(title: str, *columns: str) -> Table:
    """Columns whose names end with > are numbers, on the right; the last one takes what is left."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False, width=WIDTH)
    for i, name in enumerate(columns):
        table.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left", ratio=1 if i == len(columns) - 1 else None, no_wrap=i == 0)
    return table


def _bytes(size: float) -> str:
    return f"{size / GB:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _article(name: str) -> str:
    return f"{'An' if name[0] in 'aeiou' else 'A'} {name}"


def _time(seconds: float) -> str:
    if seconds != seconds:
        return "no GPU"
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.3g} s"


def _flops(operations: float) -> str:
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12)):
        if operations >= size:
            return f"{operations / size:.1f} {unit}FLOP"
    return f"{operations / 1e9:.2f} GFLOP"


def _policy(plan: Plan) -> Table:
    table = _table("Policy", "part", "parameters>", "trained>", "buffers>", "in fp32>")
    for part in plan.components:
        table.add_row(part.name, *(f"{n:,}" for n in (part.parameters, part.trained, part.buffers)), _bytes(4 * part.values))
    return table


def _parts(table: Table, parts: tuple[Part, ...]) -> Table:
    for part in parts:
        table.add_row(part.name, _bytes(part.bytes), part.why)
    return table


def _process(process: Process) -> Table:
    where = f"{process.gpus:g} of a GPU" if process.gpus else "CPU"
    table = _parts(_table(f"{_article(process.name)} ({process.count}, {where}), at its peak", "what", "bytes>", "why"), process.parts)
    table.add_row("[bold]total[/]", f"[bold]{_bytes(process.total)}[/]", "")
    return table


def _gpus(plan: Plan) -> Table:
    placed = plan.placement
    table = _table(f"GPUs, {_bytes(placed.limit)} of {_bytes(placed.memory)} planned with", "how many>", "bytes>", "what lies on one")
    alike = Counter((" + ".join(p.name for p in d.holds) or "nothing", d.used(placed.memory)) for d in placed.devices)
    for (holds, used), count in alike.items():
        colour = "red" if used > placed.limit else "default"
        table.add_row(str(count), f"[{colour}]{_bytes(used)}[/]", holds)
    return table


def _hosts(plan: Plan) -> Table:
    table = _table("Memory of hosts", "process", "bytes>", "what")
    for process in plan.hosts:
        what = ", ".join(f"{p.name} {_bytes(p.bytes)}" for p in process.parts)
        table.add_row(f"{process.name}{f' x {process.count}' if process.count > 1 else ''}", _bytes(process.total), what)
    return table


def _storage(plan: Plan) -> Table:
    s = plan.storage
    table = _table("Payloads and disk", "what", "bytes>", "why")
    table.add_row("a group", _bytes(s.group), "trained transitions of its members, its prompt")
    table.add_row("an anchor batch", _bytes(s.data), "latents and captions of an update")
    table.add_row("an update's claim", _bytes(s.claim), "")
    table.add_row("kept", _bytes(s.retained), f"{s.groups} groups, {s.batches} batches; replay.max_bytes is {_bytes(s.budget)}")
    table.add_row(s.store.name, _bytes(s.store.bytes), s.store.why)
    return _parts(table, s.disk)


def _work(plan: Plan) -> Table:
    work, assumed = plan.work, plan.assumptions
    table = _table("An update", "what", "work>", "time>", "why")
    passes, seconds = work.forwards, work.seconds
    table.add_row("forward of a sample", _flops(work.forward), "", "")
    table.add_row(
        "sampling", _flops(work.sampling + work.prompts + work.decoding), _time(seconds["sampling"]), f"{passes['sampling']:,.0f} forwards, texts, decoding"
    )
    trained = f"{passes['policy loss'] + passes['data loss']:,.0f} forwards, backward 2 each"
    table.add_row("training", _flops(work.training), _time(seconds["training"]), trained)
    if "offload" in seconds:
        table.add_row("of that offloading", "", _time(seconds["offload"]), "shards over PCIe, the optimiser's step on the host")
    table.add_row("encoding", _flops(work.encoding), _time(seconds["encoding"]), "anchor pictures on a CPU thread, texts where prompts are encoded")
    if work.evaluation is not None:
        table.add_row("an evaluation", _flops(work.evaluation), _time(seconds["evaluation"]), "by the generators, where their rollouts leave room")
    how = "sampling and training take turns" if seconds["update"] == seconds["sampling"] + seconds["training"] else "the slower of the two"
    table.add_row("update", "", _time(seconds["update"]), how)
    for name, size in work.links.items():
        table.add_row(
            name.partition(",")[0],
            _bytes(size),
            _time(size * 8 / (assumed.link_gbit_s * 1e9)),
            f"{name.partition(', ')[2]}; {_bytes(size / seconds['update'])}/s",
        )
    table.add_row("whole run", "", _time(work.hours * 3600), "" if work.cost is None else f"{work.cost:,.0f} at {plan.price:g} a GPU and hour")
    return table


def _assumed(assumptions: Assumptions) -> Table:
    table = _table("Assumed (--assume KEY=VALUE)", "key", "value>", "what")
    for name, info in type(assumptions).model_fields.items():
        table.add_row(name, str(getattr(assumptions, name)), str(info.description))
    return table
