"""What an engine tells those who share its network: a follower with weights of its own reading computes what the leader computes, pass by pass.

Each has the network to itself here; that shares of a pass add up to it is shown in test_ulysses.py, both at once in
tests/integration/actors/test_generator_ranks.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

from diffusion.engine.engine import Engine, StepFailed
from diffusion.engine.follow import Follower
from diffusion.engine.incoming import Whole
from diffusion.engine.side import SideEngine
from diffusion.families.sd3.network import SD3Transformer
from diffusion.lora import merge_lora
from tests.unit.diffusion.sampling import PLENTY, PROCESS, Build, request
from tests.unit.diffusion.test_side_weights import adapted, copied


class Lost(Exception):
    """What the leader's processes would end with."""


class Beside:
    """A follower in this process, called at once."""

    def __init__(self, follower: Follower) -> None:
        self.follower, self.told = follower, list[str]()

    def swap(self, second: bool, version: int, digest: str | None) -> None:
        self.told.append(f"swap {version}{' second' * second}")
        self.follower.swap(second, version, digest)

    def drop(self) -> None:
        self.told.append("drop")
        self.follower.drop()

    def forward(self, second: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.told.append("forward" + " second" * second)
        self.follower.forward(second, args, kwargs)

    def lost(self, error: BaseException) -> NoReturn:
        raise Lost(str(error)) from error


def outputs(model: nn.Module) -> list[Tensor]:
    """Filled with what the network puts out."""
    found: list[Tensor] = []
    model.register_forward_hook(lambda _, args, out: found.append(out.clone()))
    return found


class Pair:
    """A leader and its follower, and what each network put out."""

    def __init__(self, led: SD3Transformer, following: SD3Transformer, merge: bool = False) -> None:
        self.beside = Beside(Follower(following, PLENTY, merge=merge))
        self.engine = Engine(led, PROCESS, PLENTY, merge=merge, side=True, followers=self.beside)
        self.side = SideEngine(self.engine)
        self.led, self.followed = outputs(led), outputs(following)

    def give(self, state: dict[str, Tensor], version: int, digest: str | None = None, second: bool = False) -> None:
        self.beside.follower.hold(second, Whole(state), version, digest)
        (self.side if second else self.engine).set_weights(state, version, digest)

    def agree(self, passes: int) -> None:
        assert len(self.led) == len(self.followed) == passes
        assert all(torch.equal(one, other) for one, other in zip(self.led, self.followed, strict=True))


def test_a_follower_has_the_same_weights_in_every_pass_live_and_second(tiny_model: Build) -> None:
    pair = Pair(tiny_model(seed=0), tiny_model(seed=0))
    pair.engine.run([request(0, 0, steps=2)])
    pair.give(tiny_model(seed=1).state_dict(), 1, "one")
    pair.engine.add_request(request(0, 1, steps=3))
    pair.engine.step()
    pair.give(tiny_model(seed=2).state_dict(), 9, second=True)
    pair.side.run([request(0, 2, steps=2)])
    pair.give(tiny_model(seed=3).state_dict(), 2, "two")
    while pair.engine.unfinished:
        pair.engine.step()
    pair.side.drop()
    pair.agree(7)
    names = [name for name in pair.beside.told if not name.startswith("forward")]
    assert names == ["swap 1", "swap 9 second", "swap 2", "drop"]
    assert len({tuple(out.flatten()[:4].tolist()) for out in pair.led}) == 7  # no two passes are the same


def test_work_that_calls_the_network_itself_is_followed(tiny_model: Build) -> None:
    """Held-out losses."""
    led = tiny_model(seed=0)
    pair = Pair(led, tiny_model(seed=0))
    pair.give(tiny_model(seed=1).state_dict(), 1, second=True)
    shown = request(0, 0).conditioning
    assert shown is not None
    pair.side.call(lambda: led(torch.ones(2, *request(0, 0).shape), torch.tensor([0.3, 0.6]), **shown.expand(2).tensors))
    pair.agree(1)
    assert pair.beside.told[-1] == "forward second"


def test_merged_adapters_are_merged_there_too_and_second_sets_are_not(tiny_model: Build) -> None:
    led, following, other = adapted(tiny_model, 1), adapted(tiny_model, 1), copied(adapted(tiny_model, 2))
    pair = Pair(led, following, merge=True)
    pair.engine.run([request(0, 0, steps=2)])
    pair.give(other, 1)
    pair.engine.run([request(0, 0, steps=2)])
    pair.give(other, 1, second=True)
    pair.side.run([request(0, 0, steps=2)])
    pair.agree(6)
    expected = adapted(tiny_model, 2)
    merge_lora(expected)
    assert all(torch.equal(a, b) for a, b in zip(following.state_dict().values(), expected.state_dict().values(), strict=True))


def test_a_digest_in_place_is_not_put_again(tiny_model: Build) -> None:
    pair = Pair(tiny_model(seed=0), tiny_model(seed=0))
    state = tiny_model(seed=1).state_dict()
    pair.give(state, 1, "same")
    pair.give({name: torch.full_like(tensor, torch.nan) for name, tensor in state.items()}, 2, "same")
    assert pair.engine.run([request(0, 0, steps=2)])[0].versions == (2, 2)
    pair.agree(2)


def test_weights_that_a_follower_was_not_given_are_an_error(tiny_model: Build) -> None:
    follower = Follower(tiny_model(seed=0), PLENTY)
    follower.hold(False, Whole(tiny_model(seed=1).state_dict()), 1, "a")
    follower.hold(False, Whole(tiny_model(seed=1).state_dict()), 2, "b")
    with pytest.raises(LookupError, match=r"weights of version 3 were not given to this rank; it holds \[1, 2\]"):
        follower.swap(False, 3, "c")
    follower.swap(False, 2, "b")
    with pytest.raises(LookupError):  # older ones are let go
        follower.swap(False, 1, "a")


def test_a_pass_that_fails_in_the_leader_loses_the_followers(tiny_model: Build) -> None:
    led = tiny_model(seed=0)
    pair = Pair(led, tiny_model(seed=0))
    led.register_forward_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("too large")))
    with pytest.raises(StepFailed) as caught:
        pair.engine.run([request(0, 0, steps=2)])
    assert isinstance(caught.value.__cause__, Lost)  # the budget was not lowered and tried again: followers would wait in the pass before
    pair.give(tiny_model(seed=1).state_dict(), 1, second=True)
    with pytest.raises(Lost):
        pair.side.call(lambda: 1 / 0)
