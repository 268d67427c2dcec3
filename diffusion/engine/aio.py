"""The engine for callers that do not want to wait: a thread steps it, requests come and go between steps.

Every command (a request, an abort, new weights) is carried out between two steps, in the order in which it was given.

Beside the live weights it may hold a second set for a while (`diffusion.engine.side`), for work of low priority such as an evaluation
of one version: samples and calls of the side take steps of their own (`diffusion.engine.lanes`), so that a live sample is, bit for bit,
what it is without them.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffusion.engine.engine import Engine, SwapPolicy
from diffusion.engine.incoming import Incoming
from diffusion.engine.lanes import Answer, Lane, SideLane, Turns, answer
from diffusion.engine.request import SampleRequest, Trajectory
from diffusion.engine.stats import EngineStats

T = TypeVar("T")


class EngineClosed(RuntimeError):
    """The engine was closed before the request had finished."""


class AsyncEngine:
    """Owns an engine; nobody else may touch it. Close it, or use it as a context manager.

    Args:
        engine: an engine that has no requests.
    """

    def __init__(self, engine: Engine) -> None:
        self._live, self._side, self._turns = Lane(engine), SideLane(engine), Turns()
        self._commands: deque[Callable[[], None]] = deque()
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
        return self._submit(self._live, [request])[0]

    def submit_side(self, requests: Sequence[SampleRequest]) -> list[Future[list[Trajectory]]]:
        """As `submit`, with the second set of weights, each request's. They begin together, so that what stands beside what, and with it
        every bit of the samples, depends on nobody else. LookupError when no set is held (as the cause of a StepFailed)."""
        return self._submit(self._side, requests)

    def _submit(self, lane: Lane, requests: Sequence[SampleRequest]) -> list[Future[list[Trajectory]]]:
        answers = [Answer() for _ in requests]

        def add() -> None:
            for request, one in zip(requests, answers, strict=True):
                lane.add(request, one)

        for request, one in zip(requests, answers, strict=True):
            one.future.add_done_callback(self._aborting(request))
        self._command(add)
        return [one.future for one in answers]

    def _aborting(self, request: SampleRequest) -> Callable[[Future[Any]], None]:
        def cancelled(future: Future[Any]) -> None:
            if future.cancelled():
                self.abort(request)

        return cancelled

    async def generate(self, request: SampleRequest) -> list[Trajectory]:
        """`submit` for coroutines; cancelling the task aborts the request."""
        return await asyncio.wrap_future(self.submit(request))

    def abort(self, request: SampleRequest) -> None:
        """Drop a request between two steps; its future is cancelled. One that has finished stays finished."""

        def drop() -> None:
            self._live.abort(request)
            self._side.abort(request)

        with suppress(EngineClosed):  # nothing is left to abort
            self._command(drop)

    def set_weights(self, state: Mapping[str, Tensor] | Incoming, version: int, digest: str | None = None, policy: SwapPolicy = "in_flight") -> Future[None]:
        """`Engine.set_weights` between two steps; requests submitted later are sampled with these weights or newer ones."""
        return self._call(lambda: self._live.engine.set_weights(state, version, digest, policy))

    def set_side_weights(self, state: Mapping[str, Tensor] | Incoming, version: int, digest: str | None = None) -> Future[None]:
        """Hold a second set of weights, which takes memory until `drop_side_weights`; one that cannot be put in place to its end leaves none."""
        return self._call(lambda: self._side.engine.set_weights(state, version, digest))

    def drop_side_weights(self) -> Future[None]:
        """Free the second set. Raises RuntimeError while a request needs it."""
        return self._call(self._side.engine.drop)

    def call_side(self, work: Callable[[], T]) -> Future[T]:
        """Run `work`, one forward pass at most, between two steps with the second set in place. Raises what it raises, or LookupError."""
        future: Future[T] = Future()
        self._command(lambda: self._side.add_call(work, future))
        return future

    def stats(self) -> Future[EngineStats]:
        """The live engine's counters, between two steps."""
        return self._call(lambda: self._live.engine.stats)

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
        self._command(lambda: answer(future, work))
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
            self._live.give_up(closed)
            self._side.give_up(closed)

    def _turn(self) -> bool:
        """Commands, then one step; False when it is time to end."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._commands or self._live.busy or self._side.busy)
            if self._closing:
                return False
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        if self._turns.side(self._live.busy, self._side.busy):
            self._side.step()
        else:
            self._live.step()
        return True
