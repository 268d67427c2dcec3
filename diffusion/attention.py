"""Variable-length attention over packed sequences: many documents laid end to end, each seeing only its own keys.

`varlen_attention(q, k, v, segments)` takes `[1, T, heads, head_dim]`; block i of q sees block i of k and v. With equal
lengths on both sides that is self or joint attention, with unequal ones cross-attention. Three providers:

- `xformers`: `memory_efficient_attention` with a `BlockDiagonalMask` (GPU only: xformers has no CPU kernels);
- `torch_varlen`: `torch.nn.attention.varlen` (GPU only, half precision only);
- `sdpa`: one scaled-dot-product call for each run of equal neighbours. Runs everywhere and is the oracle of the tests.

What a provider needs beside the tensors (a mask, cumulative lengths) is made once by `Segments` and shared by all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PREFERRED = ("xformers", "torch_varlen", "sdpa")
"""What `auto` tries, in this order: the first two take a batch of any lengths in one call."""
PROVIDERS = ("sdpa", "xformers", "torch_varlen")


@contextmanager
def constants() -> Iterator[None]:
    """Where index tensors are made that outlive a forward pass: on the CPU first, and fit for autograd whoever made them."""
    with torch.device("cpu"), torch.inference_mode(False):
        yield


class Segments:
    """Which queries see which keys: query block i (`q_lens[i]` tokens) sees key block i (`kv_lens[i]` tokens).

    Args:
        q_lens: query tokens of each block, all at least 1.
        kv_lens: key tokens of each block; default: as many as queries.
    Raises:
        ValueError: an empty block, or not as many query as key blocks.
    """

    def __init__(self, q_lens: Sequence[int], kv_lens: Sequence[int] | None = None) -> None:
        self.q_lens = tuple(q_lens)
        self.kv_lens = self.q_lens if kv_lens is None else tuple(kv_lens)
        if len(self.q_lens) != len(self.kv_lens):
            raise ValueError(f"{len(self.q_lens)} blocks of queries but {len(self.kv_lens)} of keys")
        if min(self.q_lens + self.kv_lens, default=0) < 1:
            raise ValueError(f"attention blocks must hold at least one token each, got queries {self.q_lens} and keys {self.kv_lens}")
        self._xformers: dict[torch.device, Any] = {}
        self._starts: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """Neighbours of equal lengths: (blocks, queries of each, keys of each)."""
        return [(len(list(run)), *lens) for lens, run in groupby(zip(self.q_lens, self.kv_lens, strict=True))]

    @property
    def totals(self) -> tuple[int, int]:
        """Query tokens and key tokens in all."""
        return sum(self.q_lens), sum(self.kv_lens)

    def xformers_mask(self, device: torch.device) -> Any:
        """`BlockDiagonalMask` of these blocks, its lengths on `device`."""
        if device not in self._xformers:
            from xformers.ops import fmha

            lens = list(self.q_lens), list(self.kv_lens)
            with constants():
                self._xformers[device] = fmha.attn_bias.BlockDiagonalMask.from_seqlens(*lens, device=device)
        return self._xformers[device]

    def starts(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """First token of each query and each key block and the end of the last, int32 `[blocks + 1]` each."""
        if device not in self._starts:
            with constants():
                ends = [torch.tensor([0, *lens]).cumsum(0).to(device, torch.int32) for lens in (self.q_lens, self.kv_lens)]
            self._starts[device] = ends[0], ends[1]
        return self._starts[device]


def _rows(x: Tensor, blocks: int, length: int) -> Tensor:
    """`[1, blocks * length, heads, d]` to `[blocks, heads, length, d]`."""
    return x.reshape(blocks, length, *x.shape[2:]).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    q_sizes = [n * length for n, length, _ in segments.runs]
    kv_sizes = [n * length for n, _, length in segments.runs]
    parts = [
        F.scaled_dot_product_attention(_rows(a, n, q_len), _rows(b, n, kv_len), _rows(c, n, kv_len)).transpose(1, 2).reshape(a.shape)
        for (n, q_len, kv_len), a, b, c in zip(segments.runs, q.split(q_sizes, 1), k.split(kv_sizes, 1), v.split(kv_sizes, 1), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _xformers(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    from xformers.ops import memory_efficient_attention

    out: Tensor = memory_efficient_attention(q, k, v, attn_bias=segments.xformers_mask(q.device))
    return out


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q_starts, kv_starts = segments.starts(q.device)
    out = varlen_attn(q[0], k[0], v[0], q_starts, kv_starts, max(segments.q_lens), max(segments.kv_lens))
    assert isinstance(out, Tensor)  # a tuple only when statistics are asked for
    return out[None]


class Provider(NamedTuple):
    """An attention provider, why it was chosen, and why each other one was not.

    Attributes:
        name: one of `PROVIDERS`.
        because: why this one.
        others: why not, by the name of every other provider; empty where the settings name one.
    """

    name: str
    because: str
    others: dict[str, str]

    @property
    def why(self) -> str:
        """A line for a run's log."""
        passed = "; ".join(f"{name}: {reason}" for name, reason in self.others.items())
        return f"attention: {self.name}, {self.because}" + (f" ({passed})" if passed else "")


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, provider: str = "sdpa") -> Tensor:
    """Attention of packed documents.

    Args:
        q: `[1, T, heads, head_dim]`.
        k, v: `[1, S, heads, head_dim]`.
        segments: which of the T queries see which of the S keys.
        provider: one of `PROVIDERS` (see `resolve_provider`).
    Returns:
        `[1, T, heads, head_dim]`.
    """
    if provider == "sdpa":
        return _sdpa(q, k, v, segments)
    if provider == "xformers":
        return _xformers(q, k, v, segments)
    return _torch_varlen(q, k, v, segments)


def trial(name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Make a small call of a provider, forward and backward: None when it works on this device, else why it does not."""
    try:
        with torch.enable_grad():
            x = torch.zeros(1, 48, 2, 64, dtype=dtype, device=device, requires_grad=True)
            varlen_attention(x, x, x, Segments([16, 32]), name).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # a missing package, no kernel for the device or its generation: each raises its own class
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]:.120}"
    return None


def resolve_provider(
    name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, trial: Callable[[str, torch.device, torch.dtype], str | None] = trial
) -> Provider:
    """Provider to use: `auto` picks the first of `PREFERRED` that works on a GPU, and sdpa on a CPU.

    Args:
        dtype: what the network computes attention in.
        trial: says None of a provider that works on a device and type, else why it does not.
    Raises:
        ValueError: unknown provider, or one that does not work on this device.
    """
    if name == "auto":
        return _automatic(device, dtype, trial)
    if name not in PROVIDERS:
        raise ValueError(f"unknown attention provider {name!r}; known: auto, {', '.join(PROVIDERS)}")
    if name != "sdpa" and device.type != "cuda":
        raise ValueError(f"attention provider {name!r} has no kernels for {device.type}; use model.attention=auto or sdpa")
    problem = None if name == "sdpa" else trial(name, device, dtype)
    if problem is not None:
        raise ValueError(f"attention provider {name!r} does not work on {device} with {dtype} ({problem}); use model.attention=auto or sdpa")
    return Provider(name, "as model.attention says", {})


def _automatic(device: torch.device, dtype: torch.dtype, trial: Callable[[str, torch.device, torch.dtype], str | None]) -> Provider:
    if device.type != "cuda":
        return Provider("sdpa", "which runs everywhere", {name: f"no kernels for {device.type}" for name in PREFERRED if name != "sdpa"})
    others: dict[str, str] = {}
    for i, name in enumerate(PREFERRED):
        problem = None if name == "sdpa" else trial(name, device, dtype)
        if problem is None:
            because = "which runs everywhere" if name == "sdpa" else "which works on this GPU"
            return Provider(name, because, others | dict.fromkeys(PREFERRED[i + 1 :], f"for where {name} does not work"))
        others[name] = f"does not work here ({problem}); ddrl doctor says more"
    raise AssertionError("sdpa runs everywhere")
