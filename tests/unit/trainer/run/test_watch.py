"""The driver's decisions: every look has its actions, and an end is final."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.run.watch import EVALUATION_DEADLINE_S, AskToStop, End, Evaluate, EvaluateFinal, Look, Watch


def update(step: int) -> dict[str, Any]:
    return {"kind": "update", "step": step}


def watch(updates: int = 10, every: int = 2, resumed_at: int = 0, max_dead: int = 2) -> Watch:
    return Watch(updates, every, max_dead, stop_deadline_s=20.0, resumed_at=resumed_at)


def trained(w: Watch, *evaluations: str) -> Watch:
    assert w.look(Look(100.0, trained=10)) == [EvaluateFinal(10)]
    w.expect(evaluations, 100.0)
    return w


def test_a_run_from_its_first_update_to_its_end() -> None:
    w = watch(updates=4)
    w.expect(["test-000000-raw"], 0.0)
    assert w.look(Look(1.0)) == []
    assert w.look(Look(5.0, [update(1)], evaluated=["test-000000-raw"])) == []
    assert w.first_update == 5.0
    assert w.look(Look(6.0, [update(2), update(3)])) == [Evaluate(2)]
    w.expect(["dev-000002-raw"], 6.0)
    assert w.look(Look(7.0, [update(4)])) == []  # the last one is evaluated on test prompts
    assert w.look(Look(8.0, trained=4)) == [EvaluateFinal(4)]
    w.expect(["test-000004-raw"], 8.0)
    assert w.look(Look(9.0, evaluated=["dev-000002-raw"])) == []
    assert w.look(Look(10.0, evaluated=["test-000004-raw"])) == [End("finished")]
    assert (w.missing, w.look(Look(11.0, learner_failed="late"))) == ({}, [])


def test_a_resumed_run_asks_for_no_evaluation_of_its_past() -> None:
    """Its lines are read again from the start of the file."""
    w = watch(resumed_at=4)
    assert w.look(Look(1.0, [update(s) for s in range(1, 5)])) == []
    assert w.first_update is None
    assert w.look(Look(2.0, [update(5), update(6)])) == [Evaluate(6)]


def test_updates_made_again_after_a_restart_are_evaluated_again() -> None:
    w = watch()
    assert w.look(Look(1.0, [update(1), update(2), update(3)])) == [Evaluate(2)]
    assert w.look(Look(2.0, [update(1), update(2)])) == [Evaluate(2)]


def test_a_sign_of_hacking_stops_the_run_after_its_checkpoint() -> None:
    w = watch()
    assert w.look(Look(1.0, [update(1), update(2)])) == [Evaluate(2)]
    assert w.look(Look(2.0, [update(3)], evaluated=["dev-000002-raw"], hacking="loss +12 %")) == [AskToStop("loss +12 %")]
    assert w.look(Look(3.0, [update(4)], hacking="loss +15 %")) == []
    (end,) = w.look(Look(4.0, trained=4))
    assert isinstance(end, End)
    assert (end.state, end.by_rule) == ("interrupted", True)
    assert end.why == (
        "hacking.stop=stop: loss +12 %; stopped after update 4 of 10; its checkpoint is kept, the same command with --resume goes on, "
        "with --set hacking.stop=warn past further signs"
    )


def test_a_person_who_asks_at_the_same_time_is_who_stopped_it() -> None:
    w = watch()
    w.look(Look(1.0, [update(1)]))
    assert w.look(Look(2.0, signals=1, hacking="loss +12 %")) == [AskToStop()]
    (end,) = w.look(Look(3.0, trained=1, signals=1))
    assert isinstance(end, End)
    assert not end.by_rule
    assert "hacking" not in end.why


def test_a_sign_after_the_last_update_stops_nothing() -> None:
    w = watch()
    assert w.look(Look(1.0, [update(10)], trained=10, hacking="loss +12 %")) == [EvaluateFinal(10)]
    w.expect(["test-000010-raw"], 1.0)
    assert w.look(Look(2.0, evaluated=["test-000010-raw"], hacking="loss +12 %")) == [End("finished")]


def test_a_rule_waits_for_its_checkpoint_until_a_person_asks_too() -> None:
    w = watch()
    w.look(Look(1.0, [update(1)], hacking="loss +12 %"))
    assert w.look(Look(1000.0)) == []
    assert w.look(Look(1001.0, signals=1)) == []
    assert w.look(Look(1020.0, signals=1)) == []
    (end,) = w.look(Look(1022.0, signals=1))
    assert isinstance(end, End)
    assert end.by_rule
    assert "update 2 was not finished within stop_deadline_s=20; no checkpoint was registered" in end.why


def test_a_late_evaluation_is_missing_and_the_run_finished() -> None:
    w = trained(watch(), "test-000010-raw", "test-000010-ema")
    assert w.look(Look(200.0, evaluated=["test-000010-raw"])) == []
    assert w.look(Look(200.0 + EVALUATION_DEADLINE_S)) == []
    assert w.look(Look(201.0 + EVALUATION_DEADLINE_S)) == [End("finished")]
    assert list(w.missing) == ["test-000010-ema"]


def test_once_it_is_trained_nothing_makes_a_run_fail() -> None:
    w = trained(watch(), "test-000010-raw")
    end = w.look(Look(101.0, broken={"test-000010-raw": "no scores"}, ended={"rollout generator 0": "stopped by itself"}, dead=9))
    assert (end, w.missing) == ([End("finished")], {"test-000010-raw": "no scores"})


def test_weights_that_are_gone_make_an_evaluation_missing_at_any_time() -> None:
    w = watch()
    w.expect(["dev-000002-raw"], 0.0)
    assert w.look(Look(1.0, gone={"dev-000002-raw": "version 2 is not kept any more"})) == []
    assert (w.pending, list(w.missing)) == ([], ["dev-000002-raw"])


@pytest.mark.parametrize(
    ("seen", "part", "words"),
    [
        (Look(1.0, [{"kind": "self_test", "step": 0, "refused": "gap 0.3"}]), "log-probability self-test", "gap 0.3"),
        (Look(1.0, learner_failed="OOM"), "learner", "OOM"),
        (Look(1.0, ended={"anchor feeder": "ValueError: x"}), "anchor feeder", "ValueError: x"),
        (Look(1.0, broken={"test-000000-raw": "no quoted text"}), "evaluator", "test-000000-raw: no quoted text"),
        (Look(1.0, dead=3, dead_reason="scoring: x"), "rollouts", "3 groups failed every attempt; the first: scoring: x; max_dead_groups=2"),
    ],
)
def test_what_makes_a_run_fail_while_it_trains(seen: Look, part: str, words: str) -> None:
    assert watch().look(seen) == [End("failed", part, words)]


def test_dead_groups_up_to_the_limit_are_survived() -> None:
    assert watch().look(Look(1.0, dead=2, dead_reason="x")) == []


# -- signals --------------------------------------------------------------------------------------------------------


def test_a_signal_waits_for_the_update_and_its_checkpoint() -> None:
    w = watch()
    w.look(Look(1.0, [update(1)]))
    assert w.look(Look(2.0, signals=1)) == [AskToStop()]
    assert w.look(Look(3.0, [update(2)], ended={"anchor feeder": "gone"}, dead=9, signals=1)) == []  # no evaluation, no failure
    (end,) = w.look(Look(4.0, trained=2, signals=1))
    assert isinstance(end, End)
    assert end.state == "interrupted"
    assert "stopped after update 2 of 10" in end.why
    assert "--resume" in end.why


def test_a_signal_before_anything_was_learnt_does_not_wait() -> None:
    ask, end = watch().look(Look(1.0, signals=1))
    assert ask == AskToStop()
    assert isinstance(end, End)
    assert "starts it anew" in end.why
    _, end = watch(resumed_at=4).look(Look(1.0, [update(4)], signals=1))
    assert isinstance(end, End)
    assert "the checkpoint of update 4 is kept" in end.why


def test_an_update_that_outlasts_the_deadline_is_given_up() -> None:
    w = watch()
    w.look(Look(1.0, [update(1), update(2)]))
    assert w.look(Look(2.0, signals=1)) == [AskToStop()]
    assert w.look(Look(22.0, signals=1)) == []
    (end,) = w.look(Look(22.1, signals=1, registered=1))
    assert isinstance(end, End)
    assert end.state == "interrupted"
    assert "update 3 was not finished within stop_deadline_s=20; the last registered checkpoint is that of update 1" in end.why


def test_a_learner_that_fails_while_it_stops_has_failed() -> None:
    w = watch()
    w.look(Look(1.0, [update(1)]))
    w.look(Look(2.0, signals=1))
    assert w.look(Look(3.0, learner_failed="disk full", signals=1)) == [End("failed", "learner", "disk full")]


def test_a_signal_in_the_last_evaluation_keeps_all_updates() -> None:
    (end,) = trained(watch(), "test-000010-raw").look(Look(101.0, signals=1))
    assert isinstance(end, End)
    assert end.state == "interrupted"
    assert "all 10 updates are kept" in end.why
