"""A second set of weights beside the live one: each samples as if it were alone, and neither starves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion.config import LoRAConfig
from diffusion.engine.aio import AsyncEngine, EngineClosed
from diffusion.engine.engine import Engine, StepFailed
from diffusion.engine.incoming import Piece
from diffusion.engine.lanes import LIVE_STEPS, Turns
from diffusion.engine.request import SampleRequest, Trajectory
from diffusion.engine.runner import Runner, compile_for_batches
from diffusion.engine.side import SideEngine
from diffusion.families.sd3.network import SD3Transformer
from diffusion.lora import add_lora, merge_lora, trained_weights
from tests.unit.diffusion.sampling import PLENTY, PROCESS, Build, request, same

WAIT_S = 60.0
ENDLESS = 100_000
LORA = LoRAConfig(rank=3, alpha=6.0)


def equal(a: Trajectory, b: Trajectory) -> None:
    """To the last bit."""
    assert a.versions == b.versions
    for name in ("latent", "x", "x_next", "log_prob", "times"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def adapted(build: Build, seed: int) -> SD3Transformer:
    """A policy with an adapter that has been trained; `seed` is the adapter's, the base is always the same."""
    model = build(seed=0)
    add_lora(model, LORA, torch.Generator().manual_seed(seed))
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if ".lora_B." in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * seed + i))
    return model


def copied(model: SD3Transformer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trained_weights(model).items()}


def places(model: SD3Transformer) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def groups(n: int, **keys: Any) -> list[SampleRequest]:
    """Requests of a generator: two members each, every transition stored."""
    return [request(0, g, n=2, trained=(0, 1, 2), steps=4, **keys) for g in range(n)]


# -- side by side ---------------------------------------------------------------------------------------------------


def test_live_samples_are_the_same_bits_whatever_is_evaluated_beside_them(tiny_model: Build) -> None:
    """One group after the other, new weights in between, as a generator in strict mode; beside it evaluations that come and go."""
    states = {version: tiny_model(seed=version).state_dict() for version in (1, 2)}

    def live(engine: AsyncEngine) -> list[Trajectory]:
        found = engine.submit(groups(1)[0]).result(WAIT_S)
        for version, state in states.items():
            engine.set_weights(state, version).result(WAIT_S)
            found += [t for r in groups(3) for t in engine.submit(r).result(WAIT_S)]
        return found

    with AsyncEngine(Engine(tiny_model(seed=0), PROCESS, PLENTY)) as alone:
        expected = live(alone)
    with AsyncEngine(Engine(tiny_model(seed=0), PROCESS, PLENTY)) as engine:
        stop, ended = threading.Event(), []

        def evaluate() -> None:
            version = 7
            while not stop.is_set():
                engine.set_side_weights(tiny_model(seed=version).state_dict(), version).result(WAIT_S)
                ended.extend(wait(engine.submit_side(groups(2)), WAIT_S).done)
                engine.drop_side_weights().result(WAIT_S)
                version += 1

        thread = threading.Thread(target=evaluate)
        thread.start()
        try:
            for _ in range(3):
                found = live(engine)
                engine.set_weights(tiny_model(seed=0).state_dict(), 0).result(WAIT_S)
                for a, b in zip(found, expected, strict=True):
                    equal(a, b)
        finally:
            stop.set()
            thread.join(WAIT_S)
    assert len(ended) > 2


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_side_samples_are_those_of_an_engine_with_these_weights(tiny_model: Build, lora: bool, merge: bool) -> None:
    """Merged adapters run unmerged beside the live ones: the side is the engine that merges nothing."""
    build = (lambda seed: adapted(tiny_model, seed)) if lora else (lambda seed: tiny_model(seed=seed))
    model, other = build(1), build(2)
    engine = Engine(model, PROCESS, PLENTY, merge=merge)
    live = Engine(build(1), PROCESS, PLENTY, merge=merge).run(groups(2))
    before, where = {n: t.clone() for n, t in model.state_dict().items()}, places(model)
    with AsyncEngine(engine) as running:
        running.set_side_weights(copied(other), 5).result(WAIT_S)
        found = [t for f in running.submit_side(groups(2)) for t in f.result(WAIT_S)]
        again = [t for f in running._submit(running._live, groups(2)) for t in f.result(WAIT_S)]
        running.drop_side_weights().result(WAIT_S)
    expected = Engine(other, PROCESS, PLENTY)
    expected.set_weights(copied(other), 5)
    for a, b in zip(found, expected.run(groups(2)), strict=True):
        equal(a, b)
    for a, b in zip(again, live, strict=True):
        equal(a, b)
    assert places(model) == where
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_live_adapters_may_be_swapped_and_merged_anew_while_others_are_held(tiny_model: Build) -> None:
    new, held = copied(adapted(tiny_model, 3)), copied(adapted(tiny_model, 2))
    with AsyncEngine(Engine(adapted(tiny_model, 1), PROCESS, PLENTY, merge=True)) as running:
        running.set_side_weights(held, 5).result(WAIT_S)
        first = running.submit_side(groups(1))
        running.set_weights(new, 9).result(WAIT_S)
        side, live = running.submit_side(groups(1)), running.submit(groups(1)[0])
        found = [f.result(WAIT_S) for f in (*first, *side, live)]
    apart = Engine(adapted(tiny_model, 1), PROCESS, PLENTY, merge=True)
    apart.set_weights(new, 9)
    expected = apart.run(groups(1))
    for a, b in zip(found[0], found[1], strict=True):
        same(a, b)  # the second stood beside the first for a while
    for a, b in zip(found[2], expected, strict=True):
        equal(a, b)


def test_what_is_drained_keeps_its_weights_while_the_side_runs(tiny_model: Build) -> None:
    new = tiny_model(seed=2).state_dict()
    with AsyncEngine(Engine(tiny_model(seed=1), PROCESS, PLENTY)) as engine:
        engine.set_side_weights(tiny_model(seed=3).state_dict(), 3).result(WAIT_S)
        side = engine.submit_side([request(0, 8, steps=60)])[0]
        early = engine.submit(request(0, 0, steps=400))
        while not engine.stats().result(WAIT_S).forwards:
            pass
        engine.set_weights(new, 5, policy="drain").result(WAIT_S)
        late = engine.submit(request(0, 1, steps=40))
        done = [f.result(WAIT_S)[0] for f in (early, late, side)]
    assert [t.versions for t in done] == [(0, 0), (5, 5), (3, 3)]
    for t, seed in zip(done, (1, 2, 3), strict=True):
        assert torch.equal(t.latent, Engine(tiny_model(seed=seed), PROCESS, PLENTY).run([t.request])[0].latent)


def test_calls_find_the_second_set_in_place(tiny_model: Build) -> None:
    model = tiny_model(seed=1)
    inputs = torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 5, 12), torch.randn(2, 6)
    with AsyncEngine(Engine(model, PROCESS, PLENTY)) as engine:
        endless = engine.submit(request(0, steps=ENDLESS))
        engine.set_side_weights(tiny_model(seed=2).state_dict(), 2).result(WAIT_S)
        found = engine.call_side(lambda: model(*inputs)).result(WAIT_S)
        with pytest.raises(ZeroDivisionError):
            engine.call_side(lambda: 1 / 0).result(WAIT_S)
        engine.drop_side_weights().result(WAIT_S)
        with pytest.raises(LookupError, match="no second set of weights"):
            engine.call_side(lambda: None).result(WAIT_S)
        assert not endless.done()
    with torch.no_grad():
        assert torch.equal(found, tiny_model(seed=2)(*inputs))
        assert torch.equal(model(*inputs), tiny_model(seed=1)(*inputs))


# -- whose turn it is -------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_neither_starves(ticks: list[tuple[bool, bool]]) -> None:
    turns, live_steps, waited = Turns(), 0, 0
    for live, side in ticks:
        chosen = turns.side(live, side)
        assert not chosen or side
        assert chosen or live or not side  # nobody waits for nothing
        live_steps = live_steps + 1 if not chosen and live else 0 if chosen else live_steps
        waited = waited + 1 if side and not chosen else 0
        assert waited <= LIVE_STEPS


def test_with_both_busy_the_side_has_every_fifth_step() -> None:
    turns = Turns()
    assert "".join("S" if turns.side(True, True) else "L" for _ in range(11)) == "LLLLSLLLLSL"


def test_an_endless_group_does_not_keep_an_evaluation_from_its_end_nor_the_other_way_round(tiny_model: Build) -> None:
    with AsyncEngine(Engine(tiny_model(), PROCESS, PLENTY)) as engine:
        engine.set_side_weights(tiny_model(seed=2).state_dict(), 2).result(WAIT_S)
        rollout = engine.submit(request(0, 0, steps=ENDLESS))
        assert len(engine.submit_side([request(0, 1)])[0].result(WAIT_S)) == 1
        assert not rollout.done()
        rollout.cancel()
        evaluation = engine.submit_side([request(0, 2, steps=ENDLESS)])[0]
        assert len(engine.submit(request(0, 3)).result(WAIT_S)) == 1
        assert not evaluation.done()
        with pytest.raises(RuntimeError, match="1 sequences are being sampled with the second set"):
            engine.drop_side_weights().result(WAIT_S)
        evaluation.cancel()
        engine.drop_side_weights().result(WAIT_S)


# -- what goes wrong --------------------------------------------------------------------------------------------------


class Torn:
    """Weights whose file ends in the middle."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state, self.shapes = state, {n: tuple(t.shape) for n, t in state.items()}

    def pieces(self) -> Iterator[Piece]:
        name = next(iter(self.state))
        yield name, (), self.state[name]
        raise OSError("the file ends here")


def test_a_set_that_cannot_be_read_leaves_none_and_spares_the_live_weights(tiny_model: Build) -> None:
    with AsyncEngine(Engine(tiny_model(seed=1), PROCESS, PLENTY)) as engine:
        engine.set_side_weights(tiny_model(seed=2).state_dict(), 2).result(WAIT_S)
        with pytest.raises(OSError, match="ends here"):
            engine.set_side_weights(Torn(tiny_model(seed=3).state_dict()), 3).result(WAIT_S)
        with pytest.raises(ValueError, match="weights of version 4 do not fit the model"):
            engine.set_side_weights({}, 4).result(WAIT_S)
        (lost,) = engine.submit_side(groups(1))
        with pytest.raises(StepFailed, match="no second set of weights is held"):
            lost.result(WAIT_S)
        found = engine.submit(groups(1)[0]).result(WAIT_S)
    for a, b in zip(found, Engine(tiny_model(seed=1), PROCESS, PLENTY).run(groups(1)), strict=True):
        equal(a, b)


def test_a_fault_in_a_side_step_puts_the_live_weights_back(tiny_model: Build) -> None:
    model = tiny_model(seed=1)
    inner, faults = model.forward, [RuntimeError("illegal instruction")]

    def forward(*inputs: Any, **conditioning: Any) -> Any:
        if faults:
            raise faults.pop()
        return inner(*inputs, **conditioning)

    where = places(model)
    model.forward = forward  # type: ignore[method-assign]
    with AsyncEngine(Engine(model, PROCESS, PLENTY)) as engine:
        engine.set_side_weights(tiny_model(seed=2).state_dict(), 2).result(WAIT_S)
        with pytest.raises(StepFailed, match="illegal instruction"):
            engine.submit_side(groups(1))[0].result(WAIT_S)
        assert len(engine.submit_side(groups(1))[0].result(WAIT_S)) == 2
    assert places(model) == where


def test_closing_ends_what_the_side_has_not_finished(tiny_model: Build) -> None:
    engine = AsyncEngine(Engine(tiny_model(), PROCESS, PLENTY))
    engine.set_side_weights(tiny_model(seed=2).state_dict(), 2).result(WAIT_S)
    lost = engine.submit_side([request(0, steps=ENDLESS)])[0]
    engine.close()
    with pytest.raises(EngineClosed):
        lost.result(WAIT_S)
    with pytest.raises(EngineClosed):
        engine.call_side(lambda: None)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_the_second_set_is_as_large_as_what_is_trained_and_gone_when_it_is_dropped(tiny_model: Build) -> None:
    model = adapted(tiny_model, 1)
    side = SideEngine(Engine(model, PROCESS, PLENTY))
    assert side.runner._held == {}
    side.set_weights(copied(model), 3, "aa")
    assert side.runner._held.keys() == trained_weights(model).keys()
    assert side.runner.version == 3
    side.drop()
    assert side.runner._held == {}
    assert (side.runner.version, side.runner.digest) == (0, None)


def test_room_for_the_second_set_is_taken_off_the_token_budget(tiny_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.engine.memory.free_bytes", lambda device: 10**8)
    model = tiny_model()
    trained = sum(t.nbytes for t in model.state_dict().values())
    without, with_room = Runner(model, 10**9).plan, Runner(model, 10**9, side=True).plan
    assert (without.reserved, with_room.reserved) == (0, trained)
    assert with_room.tokens == int((10**8 - trained) * 0.7) // without.bytes_per_token < without.tokens
    assert "of them for weights under evaluation" in str(with_room)
    assert "evaluation" not in str(without)


def test_merging_again_waits_until_the_adapter_is_back(tiny_model: Build) -> None:
    """The pointers of a merged layer come back as they were: what is merged next starts from the base."""
    model = adapted(tiny_model, 1)
    engine = Engine(model, PROCESS, PLENTY, merge=True)
    merged = model.transformer_blocks[0].attn.to_q.weight.clone()
    side = SideEngine(engine)
    side.set_weights(copied(adapted(tiny_model, 2)), 2)
    base = side.call(lambda: model.transformer_blocks[0].attn.to_q.weight.clone())
    assert torch.equal(base, tiny_model(seed=0).transformer_blocks[0].attn.to_q.weight)
    assert torch.equal(model.transformer_blocks[0].attn.to_q.weight, merged)
    merge_lora(model)
    assert torch.equal(model.transformer_blocks[0].attn.to_q.weight, merged)


# -- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("merge", [False, True])
def test_a_compiled_network_computes_with_the_set_that_is_in_place(tiny_model: Build, merge: bool) -> None:
    model = adapted(tiny_model, 1)
    compile_for_batches(model)
    side_of: Callable[[], list[Trajectory]] = lambda: side.run(groups(2))  # noqa: E731
    live = Engine(model, PROCESS, PLENTY, merge=merge)
    side = SideEngine(live)
    side.set_weights(copied(adapted(tiny_model, 2)), 2)
    found = live.run(groups(2)), side_of(), live.run(groups(2)), side_of()
    plain = [Engine(adapted(tiny_model, seed), PROCESS, PLENTY, merge=merge and seed == 1).run(groups(2)) for seed in (1, 2)]
    for index, trajectories in enumerate(found):
        for a, b in zip(trajectories, plain[index % 2], strict=True):
            torch.testing.assert_close(a.latent, b.latent, atol=1e-5, rtol=1e-4)
    for a, b in zip(found[0] + found[1], found[2] + found[3], strict=True):
        assert torch.equal(a.latent, b.latent)
