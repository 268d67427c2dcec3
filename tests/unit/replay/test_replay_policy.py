"""Slots, budgets and server checks: plain arithmetic."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.errors import ImpossibleSettings, UnsuitableServer
from replay.policy import (
    BufferSettings,
    budget_error,
    check_server,
    disk_needed,
    memory_needed,
    parse_version,
    room_error,
    staleness,
    worst_staleness,
    zero_variance,
)


def test_worked_example_of_the_module() -> None:
    run = BufferSettings(groups_per_step=4, max_staleness=1, checkpoint_interval=5)
    assert (run.slots, run.retained_groups) == (8, 28)


@given(G=st.integers(1, 5), S=st.integers(0, 3), choices=st.lists(st.booleans(), max_size=120))
@settings(max_examples=100, deadline=None)
def test_slots_alone_keep_staleness_in_bounds_under_strict_fifo(G: int, S: int, choices: list[bool]) -> None:
    """Any interleaving of sampling (with the version at lease) and training keeps 0 <= staleness <= S."""
    slots = BufferSettings(groups_per_step=G, max_staleness=S).slots
    queue: deque[int] = deque()
    version = 0
    for sample in choices:
        if sample and len(queue) < slots:
            queue.append(version)
        elif len(queue) >= G:
            step = version + 1
            for _ in range(G):
                assert 0 <= staleness(step, queue.popleft()) <= S
            version = step


class Pipeline:
    """Admission and the window's choice without eviction: what pacing alone guarantees."""

    def __init__(self, run: BufferSettings) -> None:
        self.run = run
        self.version = self.opened = 0
        self.live: dict[int, int] = {}  # index → version that sampled it
        self.ready: set[int] = set()
        self.worst = 0

    def lease(self) -> None:
        G, rank = self.run.groups_per_step, len(self.live)
        if rank < self.run.slots and self.version + rank // G - self.run.max_staleness <= self.version:
            slack = -(-(self.run.window - 1) // G)
            least = max(0, self.version + rank // G + slack - self.run.max_staleness)
            self.live[self.opened] = min(self.version, least)  # a sampler that is as far behind as it may be
            self.opened += 1

    def finish(self, place: int) -> None:
        making = sorted(set(self.live) - self.ready)
        if making:
            self.ready.add(making[place % len(making)])

    def step(self) -> list[int]:
        live, taken = sorted(self.live), []
        for _ in range(self.run.groups_per_step):
            inside = [g for g in live if g < live[0] + self.run.window and g in self.ready]
            if not inside:
                return []
            taken.append(inside[0])
            live.remove(inside[0])
        for g in taken:
            self.worst = max(self.worst, staleness(self.version + 1, self.live.pop(g)))
        self.version += 1
        return sorted(taken)


@given(G=st.integers(1, 4), S=st.integers(0, 3), W=st.integers(1, 8), choices=st.lists(st.integers(0, 11), max_size=200))
@settings(max_examples=200, deadline=None)
def test_pacing_keeps_the_stated_worst_staleness_without_any_eviction(G: int, S: int, W: int, choices: list[int]) -> None:
    run = BufferSettings(groups_per_step=G, max_staleness=S, window=min(W, (S + 1) * G))
    pipeline = Pipeline(run)
    for choice in choices:
        if choice % 3 == 0:
            pipeline.lease()
        elif choice % 3 == 1:
            pipeline.finish(choice)
        else:
            pipeline.step()
        assert pipeline.worst <= worst_staleness(run)


def test_a_slow_straggler_reaches_the_worst_staleness() -> None:
    """G = 2, S = 1, W = 3: the bound is 1 + ceil(2 / 2) = 2. Group 3, leased under version 0, is passed by 4 and 5."""
    run = BufferSettings(groups_per_step=2, max_staleness=1, window=3)
    pipeline = Pipeline(run)
    steps = []
    for _ in range(3):
        for _ in range(4):
            pipeline.lease()
        while set(pipeline.live) - pipeline.ready > {3}:
            making = sorted(set(pipeline.live) - pipeline.ready)
            pipeline.finish(0 if making[0] != 3 else 1)
        steps.append(pipeline.step())
    assert steps == [[0, 1], [2, 4], []], "the window never takes 6 while 3 is live"
    pipeline.finish(0)
    assert pipeline.step() == [3, 5]
    assert pipeline.worst == worst_staleness(run) == 2


def test_data_retained_counts_depth_interval_and_the_step_in_progress() -> None:
    assert BufferSettings(groups_per_step=0, data_per_step=1, checkpoint_interval=5).retained_data == 4 + 6
    assert BufferSettings(groups_per_step=1).retained_data == 0


def test_window_adds_to_the_worst_staleness() -> None:
    assert worst_staleness(BufferSettings(groups_per_step=4, max_staleness=1, window=6)) == 3
    assert worst_staleness(BufferSettings(groups_per_step=0, data_per_step=1)) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"groups_per_step": 0}, "nothing to learn"),
        ({"max_staleness": -1}, "max_staleness is -1"),
        ({"window": 9}, r"window 9 .*\(max_staleness 1 \+ 1\) x 4 groups = 8"),
        ({"data_per_step": 2, "data_depth": 1}, "data_depth 1 is below the 2"),
        ({"lease_s": 0.0}, "lease_s"),
        ({"max_attempts": 0}, "max_attempts is 0"),
        ({"checkpoint_interval": 0}, "checkpoint_interval is 0"),
        ({"groups_per_step": 5000}, "groups_per_step is 5000, must be at most 4096"),
        ({"max_drops_per_step": 0}, "set drop_zero_variance to false"),
    ],
)
def test_impossible_settings_are_refused_with_their_numbers(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ImpossibleSettings, match=words):
        BufferSettings(**{"groups_per_step": 4, **changes}).check()


def test_zero_variance_and_its_limit() -> None:
    assert zero_variance([0.5])
    assert zero_variance([0.5, 0.5 + 1e-10])
    assert not zero_variance([0.5, 0.5 + 1e-8])
    assert not zero_variance([0.0, 1e-9]), "as near as rewards may come and still differ"
    assert BufferSettings(groups_per_step=3).drop_limit == 0
    assert BufferSettings(groups_per_step=3, drop_zero_variance=True).drop_limit == 12
    assert BufferSettings(groups_per_step=3, drop_zero_variance=True, max_drops_per_step=5).drop_limit == 5


def test_room_error_shows_the_arithmetic() -> None:
    message = str(room_error("group 7", 3_000_000, 9_000_000, 3, 10_000_000, 120))
    assert message.startswith("group 7: 9.0 MB held by 3 ready or claimed groups (and data) + 3.0 MB = 12.0 MB, more than max_bytes 10.0 MB, for 120 s")


def test_budget_error_shows_the_arithmetic() -> None:
    message = str(budget_error(30_000_000, 1_000_000, 28, 10, 500_000_000))
    assert "28 retained groups x 30.0 MB + 10 data batches x 1.0 MB = 850.0 MB" in message
    assert "max_bytes 500.0 MB" in message


GOOD = {"maxmemory": "0", "maxmemory-policy": "noeviction", "appendonly": "yes"}


@pytest.mark.parametrize(
    ("version", "options", "memory", "recorded", "words"),
    [
        ("6.0.16", {}, 0, None, "6.2 or newer"),
        ("6.2.14", {}, 0, "7.0.15", "written by Redis 7.0.15"),
        ("7.0.15", {"maxmemory-policy": "allkeys-lru"}, 0, None, "silently drop groups"),
        ("7.0.15", {"appendonly": "no"}, 0, None, "appendonly yes"),
        ("7.0.15", {"maxmemory": "1000000"}, 0, None, "maxmemory 1.0 MB is below"),
        ("7.0.15", {}, 1 << 30, None, "do not fit"),
    ],
)
def test_unsuitable_servers_are_refused(version: str, options: dict[str, str], memory: int, recorded: str | None, words: str) -> None:
    run = BufferSettings(groups_per_step=1)
    with pytest.raises(UnsuitableServer, match=words):
        check_server(version, {**GOOD, **options}, memory, run, True, recorded)


def test_a_good_or_silent_server_passes() -> None:
    run = BufferSettings(groups_per_step=1)
    check_server("6.2.14", GOOD, 16 << 30, run, True, "6.2.7")
    check_server("7.2.0", {}, 0, run, True)
    check_server("", {}, 0, run, True, "7.2.0")
    check_server("7.2.0", {**GOOD, "maxmemory": str(100 << 20)}, 0, run, payloads_in_redis=False)


def test_versions_and_disk() -> None:
    assert parse_version("7.0.15") == (7, 0, 15)
    assert parse_version("6.2") == (6, 2, 0)
    assert parse_version("") == (0, 0, 0)
    assert disk_needed(1 << 30) > 3 << 30
    assert memory_needed(0) == 3 << 25
