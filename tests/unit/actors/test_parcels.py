"""Who is asked for which parcel, whatever workers do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.parcels import IN_FLIGHT, LATE_S, REST_S, SILENCE_S, Deal, Silence


def test_the_worked_example() -> None:
    deal = Deal(5, 2, 0.0)
    assert deal.ask(0.0) == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert deal.ask(1.0) == []
    deal.died(1, 1, 1.0)
    deal.died(3, 1, 1.0)
    assert deal.answered(0, 0, 2.0)
    assert deal.ask(2.0) == [(1, 0)]  # the lowest, of the one that is awake
    assert deal.ask(1.0 + REST_S) == [(3, 1), (4, 1)]


def test_a_late_parcel_is_given_to_an_idle_worker_and_the_first_answer_counts() -> None:
    deal = Deal(2, 2, 0.0)
    assert deal.ask(0.0) == [(0, 0), (1, 1)]
    assert deal.answered(1, 1, 1.0)
    assert deal.ask(LATE_S) == []
    assert deal.ask(LATE_S + 1) == [(0, 1)]
    assert deal.ask(2 * LATE_S + 3) == []  # never more than two
    assert deal.answered(0, 1, LATE_S + 2)
    assert deal.over
    assert not deal.answered(0, 0, LATE_S + 3)


def test_what_another_one_is_asked_for_too_does_not_wait_again_when_one_dies() -> None:
    deal = Deal(1, 2, 0.0)
    deal.ask(0.0)
    assert deal.ask(LATE_S + 1) == [(0, 1)]
    deal.died(0, 0, LATE_S + 2)
    assert deal.ask(LATE_S + 3) == []
    deal.died(0, 1, LATE_S + 3)
    assert deal.ask(LATE_S + 2 + REST_S) == [(0, 0)]


def test_silence_has_a_deadline_that_every_answer_moves() -> None:
    deal = Deal(2, 1, 0.0)
    deal.ask(0.0)
    deal.answered(0, 0, 100.0)
    deal.ask(100.0 + SILENCE_S)
    deal.died(1, 0, 100.0 + SILENCE_S, "ActorDiedError: killed")
    with pytest.raises(Silence, match="1 parcels are not back, and none of 1 workers has answered for 1800 s; the last that died: ActorDiedError: killed"):
        deal.ask(101.0 + SILENCE_S)


@given(parcels=st.integers(1, 12), workers=st.integers(1, 4), events=st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.floats(0.1, 15)), max_size=80))
def test_every_parcel_is_answered_once_whatever_dies(parcels: int, workers: int, events: list[tuple[int, bool, float]]) -> None:
    """All events together are shorter than the silence that ends everything, should nobody answer in any of them."""
    assert 80 * 15 + REST_S < SILENCE_S
    now, deal = 0.0, Deal(parcels, workers, 0.0)
    flying: list[tuple[int, int]] = []
    answered: list[int] = []
    for choice, dies, wait in [*events, *[(0, False, REST_S)] * 3 * parcels]:
        for asked in deal.ask(now):
            assert asked not in flying
            flying.append(asked)
        assert all(sum(w == worker for _, w in flying) <= IN_FLIGHT for worker in range(workers))
        now += wait
        if flying:
            parcel, worker = flying.pop(choice % len(flying))
            if dies:
                deal.died(parcel, worker, now)
            elif deal.answered(parcel, worker, now):
                answered.append(parcel)
    assert sorted(answered) == list(range(parcels))
    assert deal.over
