"""Tables of a ledger, from views made by hand."""

from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType

from replay.inspection import ClaimView, DataView, GroupView, LedgerView
from trainer.cli import replay_tables
from trainer.cli.replay import _show

VIEW = LedgerView(
    run="glyph",
    numbers={
        "version": 3, "claimed_step": 3, "settled_step": 2, "epoch": 1, "next_group": 9, "slots": 8, "retained": 12, "max_bytes": 4_000_000,
        "bytes": 1_500_000, "unpublished": 0, "max_attempts": 4, "evicted:stale": 1, "evicted:lineage": 0, "D": 1, "data_depth": 4,
    },
    last_failure="group 7: scoring: no text",
    live={
        4: GroupView(4, "claimed", attempt=1, spent=0, bytes=700_000, step=3, claimed_age_s=3.0, rewards=[0.0, 1.0], version=2, epoch=1, ref="g4-ab"),
        6: GroupView(6, "ready", attempt=2, spent=1, bytes=800_000, ready_age_s=95.0, rewards=[0.25, 0.75], version=3, failures=["[bold] timeout"]),
        7: GroupView(7, "waiting", attempt=2, spent=2),
        8: GroupView(8, "leased", attempt=1, spent=0, owner="generator-1", lease_left_s=-2.5, min_version=2, leased_age_s=61.0, epoch=1),
    },
    claims=[ClaimView(3, [4], [2], False, 3.0)],
    data=[DataView(3, "ready", None, None, 1000)],
    ended={"settled": frozenset({0, 1, 2}), "evicted": frozenset({3}), "dead": frozenset({5})},
    failures={5: ["lease expired (generator-0)", "scoring: no text"]},
    requeued=frozenset({5}),
)  # fmt: skip


def shown(renderable: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(renderable)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(" ".join(line.split()) for line in text.splitlines())


def test_status_shows_states_budgets_and_live_groups() -> None:
    text = shown(replay_tables.status(VIEW))
    for line in (
        "run glyph: version 3, claimed through step 3, settled through step 2, learner epoch 1, 9 groups opened",
        "ready 1 0.8 MB 1 min 35 s committed, not yet claimed",
        "settled 3 trained, in a registered checkpoint",
        "evicted 1 made, but not to be trained (stale 1)",
        "pipeline slots 3 8 publish of the step, or its end",
        "retained groups 4 12 settle, or its end",
        "payload bytes 1.5 MB 4.0 MB settle, or its end",
        "3 4 2 no 3.0 s",
        "8 leased 1 min 1 s 1 generator-1 -2.5 s ≥ 2",
        "last failure: group 7: scoring: no text",
    ):
        assert line in text


def test_many_live_groups_are_cut_with_their_number() -> None:
    many = {g: GroupView(g, "ready", attempt=1, bytes=1) for g in range(replay_tables.ROWS + 5)}
    text = shown(replay_tables.status(LedgerView("r", {}, "", many, [], [], VIEW.ended, {}, frozenset())))
    assert f"the oldest {replay_tables.ROWS} of {replay_tables.ROWS + 5}" in text


@pytest.mark.parametrize(
    ("group", "lines"),
    [
        (0, ["state settled: trained"]),
        (3, ["state evicted: made, but not to be trained", "reasons kept as totals: stale 1"]),
        (4, ["step 3", "claimed 3.0 s ago", "rewards 0, 1", "mean 0.500 (0.000 to 1.000, 2 members)", "payload g4-ab, 0.7 MB"]),
        (5, ["state dead", "requeued yes", "failure 1 lease expired (generator-0)", "failure 2 scoring: no text"]),
        (6, ["failure 1 [bold] timeout", "attempt 2, 1 of 4 failed", "version sampled by 3"]),
        (8, ["lease left -2.5 s (expired: the next asker gets it)", "version at least 2; leased in epoch 1"]),
        (9, ["state unopened: the run has not come to it"]),
    ],
)
def test_inspect_says_what_is_known_of_each_state(group: int, lines: list[str]) -> None:
    text = shown(replay_tables.inspected(VIEW, VIEW.group(group)))
    for line in lines:
        assert line in text


def test_dead_lists_every_attempt() -> None:
    text = shown(replay_tables.dead(VIEW))
    assert "5 2 1. lease expired (generator-0) requeued" in text
    assert "2. scoring: no text" in text


@pytest.mark.parametrize(("value", "text"), [(None, ""), (0.25, "0.2 s"), (-2.5, "-2.5 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")])
def test_durations(value: float | None, text: str) -> None:
    assert replay_tables.seconds(value) == text


@pytest.mark.parametrize("width", [80, 140])
def test_status_fits_a_narrow_terminal_and_a_pipe(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if width == 80:
        monkeypatch.setenv("COLUMNS", "80")
    _show(replay_tables.status(VIEW))
    rows = capsys.readouterr().out.splitlines()
    assert max(map(len, rows)) <= width
    assert any(row.split() == ["claimed", "1", "0.7", "MB", "3.0", "s", *replay_tables.MEANING["claimed"].split()] for row in rows)
    assert any(row.split() == ["8", "leased", "1", "min", "1", "s", "1", "generator-1", "-2.5", "s", "≥", "2"] for row in rows)
