"""The engine for callers that do not want to wait: a thread steps it, requests come and go between steps.

Every command (a request, an abort, new weights) is carried out between two steps, in the order in which it was given.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from diffusion.engine.engine import Engine, StepFailed, SwapPolicy
from diffusion.engine.incoming import Incoming
from diffusion.engine.request import Failure, SampleRequest, SamplingFailed, Trajectory
from diffusion.engine.stats import EngineStats


class EngineClosed(RuntimeError):
    """The engine was closed before the request had finished."""


class _Answer:
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


class AsyncEngine:
    """Owns an engine; nobody else may touch it. Close it, or use it as a context manager.

    Args:
        engine: an engine that has no requests.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: deque[Callable[[], None]] = deque()
        self._answers: dict[int, tuple[SampleRequest, _Answer]] = {}
        self._wake = threading.Condition()
        self._closing = False
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: SampleRequest) -> Future[list[Trajectory]]:
        """Trajectories of a request, in member order, when all are finished.

        The future raises ValueError for a request that cannot run, SamplingFailed when members failed, EngineClosed.
        Cancelling it aborts the request.
        """
        answer = _Answer()

        def add() -> None:
            if not answer.future.cancelled():
                try:
                    if id(request) in self._answers:
                        raise ValueError("this request is being sampled already; make another one")
                    self._engine.add_request(request)
                except Exception as error:  # belongs to whoever asked
                    answer.fail(error)
                else:
                    self._answers[id(request)] = request, answer

        def cancelled(future: Future[list[Trajectory]]) -> None:
            if future.cancelled():
                self.abort(request)

        answer.future.add_done_callback(cancelled)
        self._command(add)
        return answer.future

    async def generate(self, request: SampleRequest) -> list[Trajectory]:
        """`submit` for coroutines; cancelling the task aborts the request."""
        return await asyncio.wrap_future(self.submit(request))

    def abort(self, request: SampleRequest) -> None:
        """Drop a request between two steps; its future is cancelled. One that has finished stays finished."""

        def drop() -> None:
            self._engine.abort(request)
            _, answer = self._answers.pop(id(request), (None, None))
            if answer is not None:
                answer.future.cancel()

        with suppress(EngineClosed):  # nothing is left to abort
            self._command(drop)

    def set_weights(self, state: Mapping[str, Tensor] | Incoming, version: int, digest: str | None = None, policy: SwapPolicy = "in_flight") -> Future[None]:
        """`Engine.set_weights` between two steps; requests submitted later are sampled with these weights or newer ones."""
        return self._call(lambda: self._engine.set_weights(state, version, digest, policy))

    def stats(self) -> Future[EngineStats]:
        """The engine's counters, between two steps."""
        return self._call(lambda: self._engine.stats)

    def close(self) -> None:
        """End after the current step. Unfinished requests raise EngineClosed."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def __enter__(self) -> AsyncEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _call(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = work()
            except Exception as error:  # belongs to whoever asked
                future.set_exception(error)
            else:
                future.set_result(result)

        self._command(run)
        return future

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self._closing:
                raise EngineClosed("the engine is closed")
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        cause: BaseException | None = None
        try:
            while self._turn():
                pass
        except BaseException as error:  # a fault of this module; nobody may wait for a thread that is gone
            cause = error
            raise
        finally:
            with self._wake:
                self._closing = True
                left, self._commands = list(self._commands), deque()
            for command in left:  # they find the engine closed, or are answered
                command()
            closed = EngineClosed("the engine was closed" if cause is None else f"the engine's thread ended: {type(cause).__name__}: {cause}")
            self._give_up(closed, [request for request, _ in self._answers.values()])

    def _turn(self) -> bool:
        """Commands, then one step; False when it is time to end."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._commands or self._engine.unfinished)
            if self._closing:
                return False
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        try:
            finished = self._engine.step()
        except StepFailed as error:  # whoever took part hears of it; the engine goes on with the others
            self._give_up(error, error.requests)
            return True
        for one in finished:
            _, answer = self._answers[id(one.request)]
            if answer.add(one):
                del self._answers[id(one.request)]
                answer.settle()
        return True

    def _give_up(self, error: BaseException, requests: list[SampleRequest]) -> None:
        for request in requests:
            self._engine.abort(request)
            _, answer = self._answers.pop(id(request), (None, None))
            if answer is not None:
                answer.fail(error)
