"""Packed token streams: the tokens of all requests of a batch in one tensor.

A stream has shape `[rows, tokens, dim]`. Requests of one length stand as one row each (`[B, L, dim]`, a plain batch);
requests of unequal length are laid end to end in a single row (`[1, T, dim]`). Everything that acts on tokens alone
(linear layers, norms) does not care; what acts per request goes through the `Stream` that describes the layout.

Ranks may share a stream (`diffusion.ulysses`): each then holds consecutive tokens of every row. `pack` and what is made per token give a rank
its own; `flat` and `join` give attention all tokens of a share of the heads, `unflat` and `split` undo that; `collected` is everything.

Where shapes should repeat (compiled code), a stream is always one row and ends in padding up to a rung of a ladder
(`rung`). Padding belongs to no request: attention leaves it out, its tokens are modulated by a row of their own, and
nothing reads what becomes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.attention import Segments, constants
from diffusion.ulysses import ALONE, SequenceRanks

MIN_RUNGS = 8
"""Fewest rungs an octave: padding then stays below 1/8 of the tokens."""


def rung(tokens: int, per_octave: int) -> int:
    """Smallest rung that holds `tokens`: each octave (2^k, 2^(k+1)] has `per_octave` equally spaced rungs.

    Raises:
        ValueError: fewer than `MIN_RUNGS` rungs an octave.
    """
    if per_octave < MIN_RUNGS:
        raise ValueError(f"{per_octave} bucket sizes an octave would pad by more than 1/{MIN_RUNGS}; set buckets to {MIN_RUNGS} or more")
    step = max(1, (1 << (tokens - 1).bit_length() - 1) // per_octave) if tokens > 1 else 1
    return -(-tokens // step) * step


def spread(values: Tensor, owner: Tensor | None) -> Tensor:
    """Rows of values `[R, dim]`, of requests or of parts of them, in a shape that broadcasts over a stream's tokens.

    Args:
        owner: row of each token, `[T]` or `[rows, T]` of the stream, or None where requests stand as rows and have one row of values each.
    """
    if owner is None:
        return values[:, None]
    if owner.dim() == 1:
        return values.index_select(0, owner)[None]
    return values.index_select(0, owner.flatten()).unflatten(0, owner.shape)


@dataclass(frozen=True)
class Stream:
    """Layout of one packed stream.

    Attributes:
        lens: token count of each request, in request order.
        padding: None: requests of equal length stand as rows. A number: all requests in one row with that many tokens
            of padding behind them.
        ranks: who shares it.
    Raises:
        ValueError: fewer tokens than ranks.
    """

    lens: tuple[int, ...]
    padding: int | None = None
    ranks: SequenceRanks = ALONE
    _owners: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _parts: dict[tuple[torch.device, tuple[int, ...]], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.size < self.ranks.count:
            raise ValueError(f"a stream of {self.size} tokens cannot be shared by {self.ranks.count} sequence ranks")

    @cached_property
    def even(self) -> bool:
        """Whether requests stand as rows."""
        return self.padding is None and len(set(self.lens)) == 1 and self.lens[0] >= self.ranks.count

    @cached_property
    def total(self) -> int:
        """Tokens of all requests."""
        return sum(self.lens)

    @property
    def size(self) -> int:
        """Tokens of the stream, padding and those of other ranks included."""
        return self.total + (self.padding or 0)

    def pack(self, parts: Sequence[Tensor] | Tensor) -> Tensor:
        """Tokens per request (`[L_i, dim]` each, or `[B, L, dim]`) to a stream, or this rank's part of it."""
        if self.even:
            return self.ranks.cut(parts if isinstance(parts, Tensor) else torch.stack(list(parts)))
        flat = parts.flatten(0, 1) if isinstance(parts, Tensor) else torch.cat(list(parts))
        return self.ranks.cut((F.pad(flat, (0, 0, 0, self.padding)) if self.padding else flat)[None])

    def owner(self, device: torch.device) -> Tensor | None:
        """Request of each token that is held here `[size]`, len(lens) for padding; None where requests stand as rows."""
        if self.even:
            return None
        if device not in self._owners:
            with constants():
                lens = torch.tensor([*self.lens, self.padding or 0])
                self._owners[device] = self.ranks.cut(torch.arange(len(lens)).repeat_interleave(lens), 0).to(device)
        return self._owners[device]

    def parts(self, first: tuple[int, ...], device: torch.device) -> Tensor:
        """Part of each token, shaped as the stream: the first `first[i]` tokens of request i are part 2i, the others part 2i + 1, padding
        is part 2 len(lens)."""
        if (device, first) not in self._parts:
            counts = [n for a, length in zip(first, self.lens, strict=True) for n in (a, length - a)]
            with constants():
                lens = torch.tensor([*counts, self.padding or 0])
                numbers = torch.arange(len(lens)).repeat_interleave(lens).view(len(self.lens) if self.even else 1, -1)
                self._parts[device, first] = self.ranks.cut(numbers).to(device)
        return self._parts[device, first]

    def per_token(self, values: Tensor) -> Tensor:
        """Per-request values `[B, dim]` (one row more where there is padding) in a shape that broadcasts over the stream's tokens."""
        return spread(values, self.owner(values.device))

    @property
    def length(self) -> int:
        """Tokens of a row, those of other ranks included."""
        return self.lens[0] if self.even else self.size

    def whole(self, tokens: Tensor) -> Tensor:
        """All tokens of the rows; where ranks share them, of a rank's own heads (dimension 2)."""
        return self.ranks.to_heads(tokens, self.length)

    def own(self, tokens: Tensor) -> Tensor:
        """Inverse of `whole`."""
        return self.ranks.to_tokens(tokens)

    def flat(self, tokens: Tensor) -> Tensor:
        """`whole`, the requests' tokens in one row, without padding: `[1, total, …]`."""
        return self._flat(self.whole(tokens))

    def unflat(self, tokens: Tensor) -> Tensor:
        """Inverse of `flat`; padding becomes zeros."""
        if self.even:
            return self.own(tokens.reshape(len(self.lens), self.lens[0], *tokens.shape[2:]))
        if self.padding:
            return self.own(torch.cat([tokens, tokens.new_zeros(1, self.padding, *tokens.shape[2:])], 1))
        return self.own(tokens[0][None])  # its own stride: that of a longer row it was cut from is another input to a compiler

    def collected(self, tokens: Tensor) -> Tensor:
        """The requests' tokens in one row, without padding: `[1, total, …]`, on every rank."""
        return self._flat(self.ranks.gather(tokens, self.length))

    def _flat(self, rows: Tensor) -> Tensor:
        return rows.reshape(1, -1, *rows.shape[2:])[:, : self.total]

    def unpack(self, tokens: Tensor) -> list[Tensor]:
        """Stream to a list of `[L_i, dim]`."""
        return list(self.collected(tokens)[0].split(self.lens))


class Layout:
    """Two streams of the same requests, image and text, and who attends to whom. Made once a forward, shared by all layers.

    Attributes:
        own: each request's image tokens see themselves.
        joint: `[image_i, text_i]` see themselves (MMDiT).
        cross: image tokens see their request's text.
    """

    def __init__(self, image: Stream, text: Stream) -> None:
        if len(image.lens) != len(text.lens):
            raise ValueError(f"{len(image.lens)} image requests but {len(text.lens)} text requests")
        self.image, self.text = image, text
        self.even = image.even and text.even
        self._orders: dict[torch.device, Tensor] = {}

    @cached_property
    def own(self) -> Segments:
        return Segments(self.image.lens)

    @cached_property
    def joint(self) -> Segments:
        return Segments([a + b for a, b in zip(self.image.lens, self.text.lens, strict=True)])

    @cached_property
    def cross(self) -> Segments:
        return Segments(self.image.lens, self.text.lens)

    def _order(self, device: torch.device) -> Tensor:
        """Position in `[image tokens, text tokens]` of each token of the joint order."""
        if device not in self._orders:
            with constants():
                images = torch.arange(self.image.total).split(self.image.lens)
                texts = (torch.arange(self.text.total) + self.image.total).split(self.text.lens)
                self._orders[device] = torch.cat([p for pair in zip(images, texts, strict=True) for p in pair]).to(device)
        return self._orders[device]

    def join(self, image: Tensor, text: Tensor) -> Tensor:
        """Two streams `[rows, tokens, …]` to the joint packed sequence `[1, T, …]`, request after request, image before text."""
        if self.even:
            both = torch.cat([self.image.whole(image), self.text.whole(text)], 1)
            return both.reshape(1, -1, *both.shape[2:])
        flat = torch.cat([self.image.flat(image), self.text.flat(text)], 1)
        return flat.index_select(1, self._order(flat.device))

    def split(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of `join`; padding becomes zeros."""
        if self.even:
            rows = joint.reshape(len(self.image.lens), -1, *joint.shape[2:])
            return self.image.own(rows[:, : self.image.lens[0]]), self.text.own(rows[:, self.image.lens[0] :])
        flat = torch.empty_like(joint).index_copy(1, self._order(joint.device), joint)
        image, text = flat.split((self.image.total, self.text.total), 1)
        return self.image.unflat(image), self.text.unflat(text)


@lru_cache(maxsize=16)
def layout(image: tuple[int, ...], text: tuple[int, ...], buckets: int | None, ranks: SequenceRanks = ALONE) -> Layout:
    """Layout of requests with these token counts; remembered, since an engine's batch repeats for many steps.

    Args:
        buckets: rungs an octave that both streams are padded to (see `rung`); None: no padding.
        ranks: who shares both streams.
    Raises:
        ValueError: a stream with fewer tokens than there are ranks.
    """
    return Layout(*(Stream(lens, None if buckets is None else rung(sum(lens), buckets) - sum(lens), ranks) for lens in (image, text)))
