"""What does not fit: memory, faults of the network, and requests that cannot run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.engine.engine import Engine, StepFailed
from diffusion.engine.memory import free_bytes
from diffusion.engine.request import SamplingFailed
from diffusion.families.sd3.network import SD3Transformer
from tests.unit.diffusion.sampling import PLENTY, PROCESS, Build, request, same


class Narrow(torch.nn.Module):
    """A model on a device that holds so many tokens: more raises what an allocator raises."""

    def __init__(self, model: SD3Transformer, limit: int, error: Exception) -> None:
        super().__init__()
        self.inner, self.limit, self.error, self.seen = model, limit, error, list[int]()
        self.packed_tokens, self.activation_bytes, self.sequence_ranks = model.packed_tokens, model.activation_bytes, model.sequence_ranks

    def forward(self, latents: Tensor | list[Tensor], t: Tensor, prompt_embeds: Tensor | list[Tensor], pooled: Tensor) -> Tensor | list[Tensor]:
        tokens = sum(self.inner.packed_tokens(tuple(x.shape), len(e)) for x, e in zip(latents, prompt_embeds, strict=True))
        self.seen.append(tokens)
        if tokens > self.limit:
            raise self.error
        return self.inner(latents, t, prompt_embeds, pooled)


CPU_ALLOCATOR = RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), CPU_ALLOCATOR])
def test_a_forward_that_does_not_fit_halves_the_budget_and_loses_nothing(error: Exception, tiny_model: Build, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    requests = [request(m, trained=(0,)) for m in range(6)]  # 21 tokens each
    narrow = Narrow(model, 50, error)
    engine = Engine(narrow, PROCESS, PLENTY)  # type: ignore[arg-type]
    for t, r in zip(engine.run(requests), requests, strict=True):
        same(t, Engine(model, PROCESS, PLENTY).run([r])[0])
    assert narrow.seen[:3] == [126, 63, 21]  # 126 tokens, half of them, half again
    assert engine.stats.out_of_memory == 2
    assert engine.stats.budget == 31
    assert "out of memory with 126 tokens in 6 sequences; token budget lowered to 63" in caplog.text


def test_a_sample_that_does_not_fit_alone_fails_and_the_others_go_on(tiny_model: Build) -> None:
    model = tiny_model()
    engine = Engine(Narrow(model, 30, torch.OutOfMemoryError("CUDA out of memory")), PROCESS, PLENTY)  # type: ignore[arg-type]
    with pytest.raises(SamplingFailed, match=r"1 of 3 samples failed; member 1 of group 0: out of memory with 37 tokens alone: CUDA out of memory") as caught:
        engine.run([request(0), request(1, shape=(3, 16, 8)), request(2)])
    assert [t.member for t in caught.value.trajectories] == [0, 2]


def test_another_error_of_the_network_is_not_taken_for_a_shortage(tiny_model: Build) -> None:
    engine = Engine(Narrow(tiny_model(), 0, RuntimeError("illegal instruction")), PROCESS, PLENTY)  # type: ignore[arg-type]
    with pytest.raises(StepFailed, match="a denoising step of 2 sequences failed: RuntimeError: illegal instruction") as caught:
        engine.run([request(n=2)])
    assert len(caught.value.requests) == 1
    assert engine.unfinished == 0


def test_an_error_leaves_nothing_of_a_run_behind(tiny_model: Build) -> None:
    engine = Engine(tiny_model(), PROCESS, PLENTY)
    with pytest.raises(ValueError, match="not a multiple"):
        engine.run([request(0), request(1, shape=(3, 7, 8))])
    assert engine.unfinished == 0
    steps = engine.steps([request(2)])
    next(steps)
    steps.close()
    assert engine.unfinished == 0


def test_the_budget_is_what_memory_holds(tiny_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    each = model.activation_bytes(4)
    monkeypatch.setattr("diffusion.engine.memory.free_bytes", lambda device: 100 * each)
    engine = Engine(model, PROCESS, PLENTY)
    assert engine.runner.plan.tokens == engine.runner.plan.fitting == 70
    assert str(engine.runner.plan).startswith("70 tokens a forward pass, bound by memory: ")
    assert Engine(model, PROCESS, 50).runner.plan.tokens == 50
    assert "bound by sampler.max_tokens" in str(Engine(model, PROCESS, 50).runner.plan)


def test_memory_of_a_container_counts_what_files_would_give_back(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"max": "1000\n", "current": "990\n", "stat": "anon 100\ninactive_file 400\nactive_file 3\n"}
    real = Path.read_text

    def read(path: Path, *arguments: Any) -> str:
        return files[path.suffix[1:]] if path.parent == Path("/sys/fs/cgroup") else real(path, *arguments)

    monkeypatch.setattr(Path, "read_text", read)
    assert free_bytes(torch.device("cpu")) == 1000 - 990 + 400
    files["current"] = "1500\n"
    assert free_bytes(torch.device("cpu")) == 0
    files["max"] = "max\n"
    assert free_bytes(torch.device("cpu")) > 2**20


def test_free_memory_is_a_number_of_this_machine() -> None:
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50


# -- refusals -------------------------------------------------------------------------------------------------------


def test_a_request_that_cannot_run_is_refused(tiny_model: Build) -> None:
    engine = Engine(tiny_model(), PROCESS, max_tokens=20)
    with pytest.raises(
        ValueError, match=r"one sample of \(3, 8, 8\) needs 21 tokens, more than the budget: 20 tokens a forward pass, bound by sampler.max_tokens"
    ):
        engine.add_request(request())  # 16 patches and 5 prompt tokens
    with pytest.raises(ValueError, match="latent size 7x8 is not a multiple of the patch size 2x2"):
        engine.add_request(request(shape=(3, 7, 8)))
    with pytest.raises(ValueError, match="4x9 patches exceed pos_embed_max_size=8; sample a smaller size"):
        engine.add_request(request(shape=(3, 8, 18)))
    assert engine.step() == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stochastic": frozenset({0}), "trained": (0, 1)}, r"trained steps \(0, 1\) must be stochastic; stochastic steps are \[0\]"),
        ({"stochastic": frozenset({0, 3})}, r"stochastic steps \[0, 3\] must lie in 0..2: with 4 steps of flow_sde the last step is deterministic"),
        ({"stochastic": frozenset({-1})}, r"must lie in 0..2"),
        ({"stochastic": frozenset(), "trained": (0,)}, "must be stochastic"),
        ({"conditioning": None}, "a prompt or its conditioning"),
        ({"prompt": "both"}, "a prompt or its conditioning"),
        ({"n": 0}, "at least one sample"),
        ({"kernel": "edm_2ab", "stochastic": frozenset({2})}, r"must lie in 0..1: with 4 steps of edm_2ab the last two steps are deterministic"),
        ({"trained": (2, 0)}, "ascending"),  # transitions are stored in step order: labels in another order would be wrong
    ],
)
def test_request_refusals(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request(**keys)


def test_an_unknown_kernel_fails_loudly(tiny_model: Build) -> None:
    with pytest.raises(ValueError, match="unknown step kernel 'heun'"):
        Engine(tiny_model(), PROCESS, PLENTY).run([request(kernel="heun")])
