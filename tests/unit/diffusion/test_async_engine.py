"""The engine in a thread: same samples, requests come and go while it steps, errors reach whom they belong to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

from diffusion.engine.aio import AsyncEngine, EngineClosed
from diffusion.engine.engine import Engine, StepFailed
from diffusion.engine.request import SampleRequest, SamplingFailed
from diffusion.families.conditioning import Conditioning
from diffusion.families.sd3.network import SD3Transformer
from diffusion.processes import RectifiedFlow

Build = Callable[..., SD3Transformer]
PROCESS = RectifiedFlow(2.0)
WAIT_S = 60.0
ENDLESS = 100_000
"""Steps of a request that is still running whenever a test looks."""


def request(group: int = 0, **keys: Any) -> SampleRequest:
    g = torch.Generator().manual_seed(group)
    values: dict[str, Any] = {
        "conditioning": Conditioning({"prompt_embeds": torch.randn(5, 12, generator=g), "pooled": torch.randn(6, generator=g)}),
        "group": group,
        "seed": 7,
    }
    return SampleRequest((3, 4, 4), **{"steps": 3, **values, **keys})


@pytest.fixture
def engine(tiny_model: Build) -> Iterator[AsyncEngine]:
    with AsyncEngine(Engine(tiny_model(), PROCESS, 100)) as made:
        yield made


def test_requests_from_several_places_are_what_run_gives(engine: AsyncEngine, tiny_model: Build) -> None:
    requests = [request(g, n=1 + g % 3, steps=2 + g % 4) for g in range(8)]
    futures = [engine.submit(r) for r in requests]
    expected = Engine(tiny_model(), PROCESS, 100).run(requests)
    found = [t for f in futures for t in f.result(WAIT_S)]
    assert [(t.request, t.member) for t in found] == [(t.request, t.member) for t in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.latent, b.latent, atol=1e-5, rtol=1e-4)
    assert engine.stats().result(WAIT_S).finished == len(expected)


def test_coroutines_share_the_engine_and_a_cancelled_one_leaves_it(engine: AsyncEngine) -> None:
    async def main() -> list[int]:
        lost = asyncio.create_task(engine.generate(request(9, n=2, steps=ENDLESS)))
        done = await asyncio.wait_for(asyncio.gather(*(engine.generate(request(g)) for g in range(3))), WAIT_S)
        lost.cancel()
        with pytest.raises(asyncio.CancelledError):
            await lost
        return [trajectories[0].request.group for trajectories in done]

    assert asyncio.run(main()) == [0, 1, 2]
    assert engine.stats().result(WAIT_S).aborted == 2


def test_an_abort_cancels_the_future_and_spares_the_others(engine: AsyncEngine) -> None:
    endless, short = request(0, steps=ENDLESS), request(1)
    lost, kept = engine.submit(endless), engine.submit(short)
    engine.abort(endless)
    with pytest.raises(CancelledError):
        lost.result(WAIT_S)
    assert len(kept.result(WAIT_S)) == 1
    engine.abort(short)  # too late: nothing happens
    assert len(kept.result(WAIT_S)) == 1


def test_what_cannot_run_is_refused_to_its_caller_alone(engine: AsyncEngine) -> None:
    bad, good = engine.submit(request(0, conditioning=None, prompt="x")), engine.submit(request(1))
    with pytest.raises(ValueError, match="has no text encoder"):
        bad.result(WAIT_S)
    assert len(good.result(WAIT_S)) == 1
    endless = request(2, steps=ENDLESS)
    engine.submit(endless)
    with pytest.raises(ValueError, match="being sampled already"):
        engine.submit(endless).result(WAIT_S)


def test_a_failed_member_fails_its_request_and_no_other(engine: AsyncEngine) -> None:
    broken = request(0, n=2)
    assert broken.conditioning is not None
    broken.conditioning.tensors["pooled"][0] = float("inf")
    bad, good = engine.submit(broken), engine.submit(request(1))
    with pytest.raises(SamplingFailed, match="2 of 2 samples failed"):
        bad.result(WAIT_S)
    assert len(good.result(WAIT_S)) == 1


def test_new_weights_come_between_the_requests_they_were_given_between(engine: AsyncEngine, tiny_model: Build) -> None:
    before = engine.submit(request(0, steps=50))
    swap = engine.set_weights(tiny_model(seed=5).state_dict(), 5, policy="drain")
    after = engine.submit(request(1))
    swap.result(WAIT_S)
    assert before.result(WAIT_S)[0].versions == (0, 0)
    assert after.result(WAIT_S)[0].versions == (5, 5)
    with pytest.raises(ValueError, match="do not fit the model"):
        engine.set_weights({}, 6).result(WAIT_S)


def test_a_fault_of_the_network_reaches_those_in_the_batch_and_nobody_else(tiny_model: Build) -> None:
    model = tiny_model()
    inner, faults, gate = model.forward, [RuntimeError("illegal instruction")], threading.Event()

    def forward(*inputs: Any, **conditioning: Any) -> Any:
        gate.wait(WAIT_S)
        if faults:
            raise faults.pop()
        return inner(*inputs, **conditioning)

    model.forward = forward  # type: ignore[method-assign]
    with AsyncEngine(Engine(model, PROCESS, 10)) as engine:  # one sample of 9 tokens at a time
        first, second = engine.submit(request(0)), engine.submit(request(1))
        gate.set()
        with pytest.raises(StepFailed, match="illegal instruction"):
            first.result(WAIT_S)
        assert len(second.result(WAIT_S)) == 1


def test_a_cancelled_command_does_not_end_the_engine(tiny_model: Build) -> None:
    model, gate = tiny_model(), threading.Event()
    inner = model.forward

    def forward(*inputs: Any, **conditioning: Any) -> Any:
        gate.wait(WAIT_S)
        return inner(*inputs, **conditioning)

    model.forward = forward  # type: ignore[method-assign]
    with AsyncEngine(Engine(model, PROCESS, 100)) as engine:
        sampled = engine.submit(request(0))
        asked = engine.stats()
        while not asked.cancel() and not asked.done():
            pass
        gate.set()
        assert len(sampled.result(WAIT_S)) == 1
        assert engine.stats().result(WAIT_S).finished == 1


def test_closing_ends_what_is_unfinished(tiny_model: Build) -> None:
    engine = AsyncEngine(Engine(tiny_model(), PROCESS, 100))
    lost = engine.submit(request(0, steps=ENDLESS))
    engine.close()
    with pytest.raises(EngineClosed):
        lost.result(WAIT_S)
    with pytest.raises(EngineClosed):
        engine.submit(request(1))
