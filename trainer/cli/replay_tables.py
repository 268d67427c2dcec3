"""A ledger as rich tables. Pure: from what `replay.inspection` read to what a person sees."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from replay.inspection import GroupView, LedgerView, State

ROWS = 40
"""Most groups that `status` lists one by one."""
LIVE: tuple[State, ...] = ("leased", "waiting", "ready", "claimed")
MEANING = {
    "leased": "a producer is making it",
    "waiting": "failed or given back; next to go",
    "ready": "committed, not yet claimed",
    "claimed": "its step has no checkpoint yet",
    "settled": "trained, in a registered checkpoint",
    "evicted": "made, but not to be trained",
    "dead": "every attempt failed",
}


def size(count: float | None) -> str:
    """`31457280 → '31.5 MB'`; nothing for None."""
    if count is None:
        return ""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB" if count >= 1e3 else f"{count:.0f} B"


def seconds(value: float | None) -> str:
    """`95.4 → '1 min 35 s'`; nothing for None."""
    if value is None:
        return ""
    sign, whole = "-" if value < 0 else "", abs(value)
    if whole < 60:
        return f"{sign}{whole:.1f} s"
    minutes, rest = divmod(int(whole), 60)
    return f"{sign}{minutes} min {rest} s" if minutes < 60 else f"{sign}{minutes // 60} h {minutes % 60} min"


def _table(title: str, columns: Iterable[str], right: Iterable[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in set(right) else "left", overflow="fold")
    return table


def status(view: LedgerView) -> RenderableType:
    """The run at a glance: states, budgets, claims, and the live groups one by one."""
    numbers = view.numbers
    unpublished = numbers.get("unpublished", 0)
    pipeline = sum(view.count(state) for state in LIVE[:3]) + unpublished
    retained = sum(view.count(state) for state in LIVE)
    head = f"run {view.run}: version {numbers.get('version', 0)}, claimed through step {numbers.get('claimed_step', 0)}, "
    head += f"settled through step {numbers.get('settled_step', 0)}, learner epoch {numbers.get('epoch', 0)}, {numbers.get('next_group', 0)} groups opened"
    parts: list[RenderableType] = [Text(head), _states(view)]

    budgets = _table("Budgets", ("budget", "used", "of", "freed by"), ("used", "of"))
    budgets.add_row("pipeline slots", str(pipeline), str(numbers.get("slots", 0)), "publish of the step, or its end")
    budgets.add_row("retained groups", str(retained), str(numbers.get("retained", 0)), "settle, or its end")
    budgets.add_row("payload bytes", size(numbers.get("bytes", 0)), size(numbers.get("max_bytes", 0)), "settle, or its end")
    if numbers.get("D"):
        budgets.add_row("unclaimed data batches", str(len(view.data)), str(numbers.get("data_depth", 0)), "claim")
    parts.append(budgets)

    if view.claims:
        claims = _table("Claims not settled", ("step", "groups", "data", "published", "age"), ("step", "age"))
        for claim in view.claims:
            shown = ", ".join(map(str, claim.groups)), ", ".join(map(str, claim.data))
            claims.add_row(str(claim.step), *shown, "yes" if claim.published else "no", seconds(claim.age_s))
        parts.append(claims)
    live = [group for group in view.live.values() if group.state != "claimed"]
    if live:
        parts.append(_live(live[:ROWS], len(live)))
    if view.last_failure:
        parts.append(Text(f"last failure: {view.last_failure}"))
    return Group(*parts)


def _states(view: LedgerView) -> Table:
    table = _table("Groups", ("state", "groups", "bytes", "oldest", "meaning"), ("groups", "bytes", "oldest"))
    for state in (*LIVE, "settled", "evicted", "dead"):
        held = [group for group in view.live.values() if group.state == state]
        total = sum(group.bytes or 0 for group in held)
        ages = [age for group in held if (age := _age(group)) is not None]
        meaning = MEANING[state]
        if state == "evicted" and view.evictions:
            meaning += f" ({', '.join(f'{reason} {count}' for reason, count in view.evictions.items())})"
        table.add_row(state, str(view.count(state)), size(total) if total else "", seconds(max(ages)) if ages else "", escape(meaning))
    return table


def _age(group: GroupView) -> float | None:
    """Seconds it has been in its state."""
    return {"leased": group.leased_age_s, "ready": group.ready_age_s, "claimed": group.claimed_age_s}.get(group.state)


def _live(groups: list[GroupView], of: int) -> Table:
    title = "Leased, waiting and ready" if len(groups) == of else f"Leased, waiting and ready: the oldest {len(groups)} of {of}"
    numbers = ("group", "for", "try", "left", "reward", "bytes")
    table = _table(title, ("group", "state", "for", "try", "owner", "left", "version", "reward", "bytes"), numbers)
    table.padding = (0, 1, 0, 0)  # all of it fits 80 columns
    for column in table.columns:
        column.no_wrap = column.header != "owner"
    for group in groups:
        version = f"{group.version}" if group.version is not None else f"≥ {group.min_version}" if group.min_version is not None else ""
        reward = f"{sum(group.rewards) / len(group.rewards):.3f}" if group.rewards else ""
        cells = (group.state, seconds(_age(group)), f"{group.attempt}", escape(group.owner or ""), seconds(group.lease_left_s), version, reward)
        table.add_row(str(group.group), *cells, size(group.bytes))
    return table


def rewards(group: GroupView) -> str:
    """Mean and range of the members' rewards."""
    if not group.rewards:
        return ""
    mean = sum(group.rewards) / len(group.rewards)
    return f"{mean:.3f} ({min(group.rewards):.3f} to {max(group.rewards):.3f}, {len(group.rewards)} members)"


def inspected(view: LedgerView, group: GroupView) -> RenderableType:
    """Everything known about one group."""
    rows: list[tuple[str, str]] = [("state", f"{group.state}: {MEANING.get(group.state, 'the run has not come to it')}")]
    if group.state == "evicted":
        rows.append(("reasons", f"kept as totals: {', '.join(f'{reason} {count}' for reason, count in view.evictions.items()) or 'none'}"))
    if group.requeued:
        rows.append(("requeued", "yes: it takes the place of the next new index"))
    if group.attempt is not None:
        rows.append(("attempt", f"{group.attempt}, {group.spent} of {view.numbers.get('max_attempts', '?')} failed"))
    if group.owner:
        rows.append(("owner", group.owner))
    if group.lease_left_s is not None:
        expired = " (expired: the next asker gets it)" if group.lease_left_s < 0 else ""
        rows.append(("lease left", seconds(group.lease_left_s) + expired))
    versions = [f"{name} {value}" for name, value in (("at least", group.min_version), ("sampled by", group.version)) if value is not None]
    if versions:
        rows.append(("version", f"{', '.join(versions)}; leased in epoch {group.epoch}"))
    if group.step is not None:
        rows.append(("step", str(group.step)))
    for name, age in (("leased", group.leased_age_s), ("ready", group.ready_age_s), ("claimed", group.claimed_age_s)):
        if age is not None:
            rows.append((name, f"{seconds(age)} ago"))
    if group.rewards:
        rows += [("rewards", ", ".join(f"{reward:.4g}" for reward in group.rewards)), ("mean", rewards(group))]
    if group.ref is not None:
        rows.append(("payload", f"{group.ref}, {size(group.bytes)}"))
    rows += [(f"meta.{name}", str(value)) for name, value in group.meta.items()]
    rows += [(f"failure {i}", reason) for i, reason in enumerate(group.failures, 1)]
    if group.state == "dead" and not group.failures:
        rows.append(("failures", "not kept any more (the ledger keeps those of the latest 1000)"))
    table = _table(f"Group {group.group}", ("what", "value"))
    for name, value in rows:
        table.add_row(name, escape(value))
    return table


def dead(view: LedgerView) -> RenderableType:
    """Dead groups with the reason of every attempt."""
    indices = sorted(view.ended["dead"])
    if not indices:
        return Text(f"run {view.run}: no dead groups")
    table = _table(f"{len(indices)} dead groups", ("group", "attempts", "reasons", ""), ("group", "attempts"))
    for index in indices:
        reasons = view.failures.get(index, [])
        shown = "\n".join(f"{i}. {reason}" for i, reason in enumerate(reasons, 1)) or "not kept any more"
        table.add_row(str(index), str(len(reasons) or ""), escape(shown), "requeued" if index in view.requeued else "")
    return table
