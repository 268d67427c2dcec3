"""SDPA over runs of equal blocks against dense attention with a block-diagonal mask, ours and xformers': self, joint and cross."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion.attention import PROVIDERS, Segments, resolve_provider, trial, varlen_attention

LENS = st.lists(st.integers(1, 5), min_size=1, max_size=8)
PAIRS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=8)
CPU = torch.device("cpu")


def segments_of(pairs: list[tuple[int, int]], kind: str) -> Segments:
    """Image tokens see themselves, image and text together, or the text."""
    images, texts = [p[0] for p in pairs], [p[1] for p in pairs]
    return {"self": Segments(images), "joint": Segments([a + b for a, b in pairs]), "cross": Segments(images, texts)}[kind]


def qkv(segments: Segments, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    queries, keys = segments.totals
    return torch.randn(1, queries, 2, 8, generator=g), torch.randn(1, keys, 2, 8, generator=g), torch.randn(1, keys, 2, 8, generator=g)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)), attn_mask=mask).transpose(1, 2)


def owners(lens: tuple[int, ...]) -> Tensor:
    return torch.arange(len(lens)).repeat_interleave(torch.tensor(lens))


@pytest.mark.parametrize("kind", ["self", "joint", "cross"])
@given(pairs=PAIRS, seed=st.integers(0, 999))
@settings(max_examples=40)
def test_blocks_see_only_their_keys(kind: str, pairs: list[tuple[int, int]], seed: int) -> None:
    segments = segments_of(pairs, kind)
    q, k, v = qkv(segments, seed)
    mask = owners(segments.q_lens)[:, None] == owners(segments.kv_lens)
    torch.testing.assert_close(varlen_attention(q, k, v, segments), dense(q, k, v, mask), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["self", "joint", "cross"])
@given(pairs=PAIRS, seed=st.integers(0, 999))
@settings(max_examples=25)
def test_blocks_are_those_of_xformers_mask(kind: str, pairs: list[tuple[int, int]], seed: int) -> None:
    segments = segments_of(pairs, kind)
    q, k, v = qkv(segments, seed)
    mask = segments.xformers_mask(CPU)
    assert mask is segments.xformers_mask(CPU)  # one mask for all layers
    torch.testing.assert_close(varlen_attention(q, k, v, segments), dense(q, k, v, mask.materialize(segments.totals)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["self", "joint", "cross"])
@given(pairs=PAIRS)
@settings(max_examples=25)
def test_starts_cut_the_sequence_into_the_blocks(kind: str, pairs: list[tuple[int, int]]) -> None:
    segments = segments_of(pairs, kind)
    starts = segments.starts(CPU)
    assert starts[0] is segments.starts(CPU)[0]  # one tensor for all layers
    assert [x.dtype for x in starts] == [torch.int32] * 2
    assert tuple(starts[0].diff().tolist()) == segments.q_lens
    assert tuple(starts[1].diff().tolist()) == segments.kv_lens
    assert (int(starts[0][-1]), int(starts[1][-1])) == segments.totals


@given(pairs=PAIRS)
def test_runs_are_equal_neighbours(pairs: list[tuple[int, int]]) -> None:
    runs = segments_of(pairs, "cross").runs
    assert [lens for n, *lens in runs for _ in range(n)] == [list(p) for p in pairs]
    assert all(a[1:] != b[1:] for a, b in pairwise(runs))


@pytest.mark.parametrize(("lens", "calls"), [([4] * 6, 1), ([4] * 6 + [9] * 3, 2), ([4, 9, 4], 3)])
def test_a_run_takes_one_call(lens: list[int], calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []
    real = F.scaled_dot_product_attention

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(q.shape)
        return real(q, k, v)

    segments = Segments(lens)
    q, k, v = qkv(segments, 0)
    expected = dense(q, k, v, owners(segments.q_lens)[:, None] == owners(segments.q_lens))
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    torch.testing.assert_close(varlen_attention(q, k, v, segments), expected, atol=1e-6, rtol=1e-5)
    assert len(seen) == calls


def test_gradients_flow_through_what_was_made_in_inference_mode() -> None:
    """An engine may run in inference mode; a learner in the same process uses the same remembered tensors."""
    segments = Segments([2, 3])
    with torch.inference_mode():
        starts = segments.starts(CPU)
        mask = segments.xformers_mask(CPU)
    assert not any(x.is_inference() for x in (*starts, mask.q_seqinfo.seqstart))


@pytest.mark.parametrize("lens", [([2, 3], [1]), ([2, 0],), ([2, 1], [1, 0]), ([],)])
def test_blocks_that_do_not_pair_or_hold_nothing_are_refused(lens: tuple[list[int], ...]) -> None:
    with pytest.raises(ValueError, match=r"2 blocks of queries but 1 of keys|at least one token each"):
        Segments(*lens)


def test_provider_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    chosen = resolve_provider("auto", cpu)
    assert chosen == ("sdpa", "which runs everywhere", {"xformers": "no kernels for cpu", "torch_varlen": "no kernels for cpu"})
    assert chosen.why == "attention: sdpa, which runs everywhere (xformers: no kernels for cpu; torch_varlen: no kernels for cpu)"
    assert resolve_provider("sdpa", cpu).why == "attention: sdpa, as model.attention says"
    for name in set(PROVIDERS) - {"sdpa"}:
        with pytest.raises(ValueError, match=f"'{name}' has no kernels for cpu; use model.attention=auto or sdpa"):
            resolve_provider(name, cpu)


def works(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """A GPU on which every provider works."""


def fails(name: str, device: torch.device, dtype: torch.dtype) -> str:
    return f"ImportError: no {name}"


def torchs_own(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """A GPU beside whose torch no xformers loads."""
    return "ImportError: no xformers" if name == "xformers" else None


def halves(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """A GPU whose kernels know half precision only."""
    return None if dtype == torch.bfloat16 else "RuntimeError: expected Half or BFloat16"


def test_provider_on_a_gpu() -> None:
    gpu = torch.device("cuda")
    chosen = resolve_provider("auto", gpu, trial=works)
    assert (chosen.name, chosen.because) == ("xformers", "which works on this GPU")
    assert chosen.others == {"torch_varlen": "for where xformers does not work", "sdpa": "for where xformers does not work"}
    for name in PROVIDERS:
        assert resolve_provider(name, gpu, trial=works).name == name


def test_torchs_own_is_taken_where_xformers_does_not_work() -> None:
    chosen = resolve_provider("auto", torch.device("cuda"), trial=torchs_own)
    assert (chosen.name, chosen.because) == ("torch_varlen", "which works on this GPU")
    reason = "does not work here (ImportError: no xformers); ddrl doctor says more"
    assert chosen.others == {"xformers": reason, "sdpa": "for where torch_varlen does not work"}


def test_a_provider_that_does_not_work_on_a_gpu() -> None:
    gpu = torch.device("cuda")
    chosen = resolve_provider("auto", gpu, trial=fails)
    assert chosen.name == "sdpa"
    assert chosen.others["xformers"] == "does not work here (ImportError: no xformers); ddrl doctor says more"
    assert chosen.others["torch_varlen"] == "does not work here (ImportError: no torch_varlen); ddrl doctor says more"
    assert set(chosen.others) == {"xformers", "torch_varlen"}
    assert resolve_provider("sdpa", gpu, trial=fails).name == "sdpa"
    with pytest.raises(ValueError, match=r"'torch_varlen' does not work on cuda with torch.bfloat16 \(ImportError: no torch_varlen\)"):
        resolve_provider("torch_varlen", gpu, trial=fails)


def test_a_provider_is_tried_in_the_networks_own_precision() -> None:
    gpu = torch.device("cuda")
    assert resolve_provider("auto", gpu, torch.bfloat16, halves).name == "xformers"
    assert resolve_provider("auto", gpu, torch.float32, halves).name == "sdpa"
    with pytest.raises(ValueError, match=r"does not work on cuda with torch\.float32 \(RuntimeError: expected Half"):
        resolve_provider("torch_varlen", gpu, torch.float32, halves)


def test_a_trial_tells_what_happens() -> None:
    assert trial("sdpa", CPU) is None
    problem = trial("xformers", CPU)
    assert problem is not None
    assert problem.startswith("NotImplementedError")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_unknown_provider_is_refused_with_the_known_ones(device: str) -> None:
    with pytest.raises(ValueError, match="unknown attention provider 'flash3'; known: auto, sdpa, xformers, torch_varlen"):
        resolve_provider("flash3", torch.device(device))


def test_the_attention_kernels_of_xformers_are_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With arguments that this torch takes. Its own library must load all the same, or it refuses every call on a GPU (docs/doctor.md)."""
    from xformers.ops.fmha import cutlass
    from xformers.ops.fmha.torch_attention_compat import ensure_pt_flash_ok

    assert cutlass.FwOp.OPERATOR is torch.ops.aten._efficient_attention_forward
    assert cutlass.BwOp.OPERATOR is torch.ops.aten._efficient_attention_backward
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)  # what a CUDA build says
    ensure_pt_flash_ok()
