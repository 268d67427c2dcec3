"""Who waits for what of an engine, and which of two engines takes the next step. For the engine's thread alone.

    add(request) ─► in the engine ─► step ─► every member has ended ─► its future

The live lane goes first: the side lane, whose engine samples with a second set of weights, takes a step when the live one has nothing to
run, or has taken `LIVE_STEPS` in a row. A worked example with both busy: L L L L S L L L L S …
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

from diffusion.engine.engine import Engine, StepFailed
from diffusion.engine.request import Failure, SampleRequest, SamplingFailed, Trajectory
from diffusion.engine.side import SideEngine

LIVE_STEPS = 4
"""Live steps in a row while the side waits. A periodic evaluation of the default recipe (224 samples of 20 steps) is 17 % of the sampling
between two of them (20 updates of 128 samples of 10 steps). With one step in five it is over before the next one is due, even where
rollouts never pause; they lose a fifth at most, and only while an evaluation is under way."""


class Answer:
    """What has come of one request so far."""

    def __init__(self) -> None:
        self.future: Future[list[Trajectory]] = Future()
        self.trajectories: dict[int, Trajectory] = {}
        self.failures: list[Failure] = []

    def add(self, one: Trajectory | Failure) -> bool:
        """Take a sample's end; True when the request is whole."""
        if isinstance(one, Failure):
            self.failures.append(one)
        else:
            self.trajectories[one.member] = one
        return len(self.trajectories) + len(self.failures) == one.request.n

    def settle(self) -> None:
        ordered = [self.trajectories[m] for m in sorted(self.trajectories)]
        with suppress(InvalidStateError):  # cancelled meanwhile
            if self.failures:
                self.future.set_exception(SamplingFailed(self.failures, ordered))
            else:
                self.future.set_result(ordered)

    def fail(self, error: BaseException) -> None:
        with suppress(InvalidStateError):
            self.future.set_exception(error)


class Lane:
    """An engine and those who wait for its samples."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._answers: dict[int, tuple[SampleRequest, Answer]] = {}

    @property
    def busy(self) -> bool:
        return bool(self.engine.unfinished)

    def add(self, request: SampleRequest, answer: Answer) -> None:
        """Queue a request; one that cannot run fails."""
        if answer.future.cancelled():
            return
        try:
            if id(request) in self._answers:
                raise ValueError("this request is being sampled already; make another one")
            self.engine.add_request(request)
        except Exception as error:  # belongs to whoever asked
            answer.fail(error)
        else:
            self._answers[id(request)] = request, answer

    def abort(self, request: SampleRequest) -> None:
        """Drop a request; its future is cancelled."""
        self.engine.abort(request)
        _, answer = self._answers.pop(id(request), (None, None))
        if answer is not None:
            answer.future.cancel()

    def step(self) -> None:
        """One step of the engine; whoever is done hears of it."""
        try:
            finished = self.engine.step()
        except StepFailed as error:  # whoever took part hears of it; the engine goes on with the others
            self.give_up(error, error.requests)
            return
        for one in finished:
            _, answer = self._answers[id(one.request)]
            if answer.add(one):
                del self._answers[id(one.request)]
                answer.settle()

    def give_up(self, error: BaseException, requests: list[SampleRequest] | None = None) -> None:
        """Fail these requests, or all."""
        for request in [request for request, _ in self._answers.values()] if requests is None else requests:
            self.engine.abort(request)
            _, answer = self._answers.pop(id(request), (None, None))
            if answer is not None:
                answer.fail(error)


class SideLane(Lane):
    """A lane whose turns also go to calls, each a forward pass or less."""

    engine: SideEngine

    def __init__(self, live: Engine) -> None:
        super().__init__(SideEngine(live))
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._calls) or super().busy

    def add_call(self, work: Callable[[], Any], future: Future[Any]) -> None:
        """Queue work that needs the second set in place."""
        self._calls.append((work, future))

    def step(self) -> None:
        if not self._calls:
            super().step()
            return
        work, future = self._calls.popleft()
        answer(future, lambda: self.engine.call(work))

    def give_up(self, error: BaseException, requests: list[SampleRequest] | None = None) -> None:
        super().give_up(error, requests)
        if requests is None:
            while self._calls:
                _, future = self._calls.popleft()
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)


class Turns:
    """Whose turn it is."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def side(self, live: bool, side: bool) -> bool:
        """Whether the side takes the next step, given who has something to run."""
        chosen = side and (not live or self._in_a_row >= LIVE_STEPS)
        self._in_a_row = 0 if chosen or not side else self._in_a_row + 1
        return chosen


def answer(future: Future[Any], work: Callable[[], Any]) -> None:
    """Run `work` for a future, unless it was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except Exception as error:  # belongs to whoever asked
        future.set_exception(error)
    else:
        future.set_result(result)
