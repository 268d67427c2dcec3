"""Batches: what fits together, who waits how long, what a cancelled or failing part costs the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contract import ItemScore
from services.fleet.batching import Batcher, Load, Part, Results, cut
from services.media.base import Media

BLANK = Media.image(np.zeros((1, 1, 3), np.uint8))


def part(*names: str, cost: int = 1) -> Part:
    return Part(list(names), [BLANK] * len(names), cost)


def echo(prompts: list[str], media: list[Media]) -> Results:
    return [ItemScore(float(len(p)), {}, p) for p in prompts]


def texts(results: Results) -> list[str | None]:
    return [r.text for r in results if isinstance(r, ItemScore)]


class Gate:
    """Work that waits for the test, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.open = threading.Event()
        self.entered = threading.Event()

    def __call__(self, prompts: list[str], media: list[Media]) -> Results:
        self.batches.append(prompts)
        self.entered.set()
        assert self.open.wait(10)
        return echo(prompts, media)

    async def busy(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 10)


@given(
    costs=st.lists(st.integers(1, 20), min_size=1, max_size=40),
    max_items=st.integers(1, 8),
    max_cost=st.integers(1, 30),
)
def test_cut_keeps_order_and_budget(costs: list[int], max_items: int, max_cost: int) -> None:
    prompts = [str(i) for i in range(len(costs))]
    parts = cut(prompts, [BLANK] * len(costs), costs, max_items, max_cost)
    assert [p for one in parts for p in one.prompts] == prompts
    start = 0
    for one in parts:
        mine = costs[start : start + len(one)]
        assert one.cost == sum(mine)
        assert len(one) <= max_items
        assert one.cost <= max_cost or len(one) == 1
        start += len(one)


def test_the_worked_example() -> None:
    assert [len(p) for p in cut(list("abcde"), [BLANK] * 5, [4, 4, 9, 1, 1], 3, 8)] == [2, 1, 2]


def test_what_came_in_during_a_call_makes_up_the_next_batch() -> None:
    async def body() -> None:
        work = Gate()
        batcher = Batcher(work, max_items=4, max_cost=100, wait_s=0)
        first = asyncio.create_task(batcher.add(part("a")))
        await work.busy()
        others = [asyncio.create_task(batcher.add(part(n))) for n in ("b", "c", "d", "e", "f")]
        await asyncio.sleep(0)
        assert batcher.load() == Load(waiting=5, scoring=1)
        work.open.set()
        answers = [texts(r) for r in await asyncio.gather(first, *others)]
        assert answers == [["a"], ["b"], ["c"], ["d"], ["e"], ["f"]]
        assert work.batches == [["a"], ["b", "c", "d", "e"], ["f"]]
        assert batcher.load() == Load(0, 0)

    asyncio.run(body())


def test_the_cost_budget_closes_a_batch_and_nothing_is_overtaken() -> None:
    async def body() -> None:
        work = Gate()
        batcher = Batcher(work, max_items=100, max_cost=10, wait_s=0)
        tasks = [asyncio.create_task(batcher.add(part("first")))]
        await work.busy()
        tasks += [asyncio.create_task(batcher.add(part(n, cost=c))) for n, c in (("a", 6), ("b", 6), ("c", 4), ("dear", 99), ("d", 1))]
        await asyncio.sleep(0)
        work.open.set()
        await asyncio.gather(*tasks)
        assert work.batches == [["first"], ["a"], ["b", "c"], ["dear"], ["d"]]

    asyncio.run(body())


def test_an_idle_engine_waits_for_company_only_as_long_as_it_may() -> None:
    async def body() -> None:
        work = Gate()
        work.open.set()
        batcher = Batcher(work, max_items=3, max_cost=100, wait_s=30)
        await asyncio.gather(*(batcher.add(part(n)) for n in "abc"))
        assert work.batches == [["a", "b", "c"]], "full, so it did not wait"
        soon = Batcher(work, max_items=3, max_cost=100, wait_s=0.01)
        await soon.add(part("alone"))
        assert work.batches[-1] == ["alone"]

    asyncio.run(body())


def test_a_cancelled_part_costs_nothing() -> None:
    async def body() -> None:
        work = Gate()
        batcher = Batcher(work, max_items=4, max_cost=100, wait_s=0)
        first = asyncio.create_task(batcher.add(part("a")))
        await work.busy()
        gone, stays = asyncio.create_task(batcher.add(part("gone"))), asyncio.create_task(batcher.add(part("stays")))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        work.open.set()
        assert texts(await stays) == ["stays"]
        await first
        assert work.batches == [["a"], ["stays"]]
        with pytest.raises(asyncio.CancelledError):
            await gone

    asyncio.run(body())


def test_an_exception_reaches_every_part_of_the_batch_and_the_next_batch_runs() -> None:
    async def body() -> None:
        fail = True

        def work(prompts: list[str], media: list[Media]) -> Results:
            if fail:
                raise RuntimeError("broken")
            return echo(prompts, media)

        batcher = Batcher(work, max_items=2, max_cost=100, wait_s=0.01)
        results = await asyncio.gather(batcher.add(part("a")), batcher.add(part("b")), return_exceptions=True)
        assert [str(r) for r in results] == ["broken", "broken"]
        fail = False
        assert texts(await batcher.add(part("c"))) == ["c"]

    asyncio.run(body())


@given(sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=25))
def test_everybody_gets_their_own_answers(sizes: list[tuple[int, int]]) -> None:
    async def body() -> None:
        seen: list[int] = []
        keep: Callable[[list[str], list[Media]], Results] = lambda p, m: (seen.append(len(p)), echo(p, m))[1]  # noqa: E731
        batcher = Batcher(keep, max_items=5, max_cost=12, wait_s=0)
        names = [[f"{i}.{j}" for j in range(n)] for i, (n, _) in enumerate(sizes)]
        answers = await asyncio.gather(*(batcher.add(part(*own, cost=c)) for own, (_, c) in zip(names, sizes, strict=True)))
        assert [texts(a) for a in answers] == names
        assert max(seen) <= 5

    asyncio.run(body())
