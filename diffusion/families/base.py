"""What every packed network offers to the engine, the learner and the memory planner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, ClassVar, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.packing import Layout, Stream, layout
from diffusion.ulysses import ALONE, SequenceRanks, check_heads

COMPILED_SHAPES = 256
"""Compiled variants of one region that are kept: buckets x request counts x kinds of block."""


class ModelConfigLike(Protocol):
    """Architecture of a network: the keys of its config.json."""

    @property
    def in_channels(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    def to_dict(self) -> dict[str, Any]: ...


def known_keys(config: type[Any], values: dict[str, Any], family: str) -> dict[str, Any]:
    """The fields of a config dataclass from a config.json: lists as tuples, keys with an underscore left out.

    Raises:
        ValueError: a key that the dataclass does not have.
    """
    known = {f.name for f in fields(config)}
    extra = {k for k in values if k not in known and not k.startswith("_")}
    if extra:
        raise ValueError(f"{family} config has keys this model does not know: {', '.join(sorted(extra))}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}


@dataclass(frozen=True)
class Saved:
    """Bytes of activations of one request that training keeps for its backward pass; weights, and copies of them, not counted.

    Attributes:
        blocks: of each block, when nothing is recomputed.
        inputs: of each block's input, which is all that is kept of a block that is recomputed.
        ends: of what lies before and behind the blocks.
        gradients: most bytes of gradients of activations that live at a time beside them.
        weights: values of each block's weights that the gradient of its input passes through; all of a block's are fewer where only adapters
            are trained, since what depends on time and pooled text alone then has no gradient.
    """

    blocks: tuple[int, ...]
    inputs: tuple[int, ...]
    ends: int
    gradients: int
    weights: tuple[int, ...]

    def peak(self, recompute: bool) -> int:
        """Most bytes at a time, with every block recomputed or none."""
        kept = sum(self.inputs) + max(self.blocks) if recompute else sum(self.blocks)
        return kept + self.ends + self.gradients


class Block(nn.Module):
    """One transformer block whose per-token work is cut into regions that `PackedModel.compile_blocks` may compile.

    A region is a method from tensors to tensors; attention, whose shapes follow the requests, lies between regions.
    """

    regions: ClassVar[tuple[str, ...]]


class PackedModel(nn.Module, ABC):
    """A velocity network over packed requests.

    Attributes:
        provider: attention provider (see `diffusion.attention`), changeable at any time.
        buckets: None, or rungs an octave (at least 8) that the streams' token counts are padded to, so that shapes
            repeat from batch to batch; changeable at any time.
        sequence_ranks: who shares the tokens of every forward pass (`share`).
    """

    provider: str
    buckets: int | None = None
    sequence_ranks: SequenceRanks = ALONE
    out_channels: int
    block_list: ClassVar[str]
    """Name of the block list in the checkpoint."""
    patch: tuple[int, ...]
    """Patch edges of (h, w) or (f, h, w)."""
    given_time: float | None = 0.0
    """Time that given frames are shown at; None = that of the sampled ones."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Parts of names of tensors that published files hold and no network reads."""

    @property
    @abstractmethod
    def config(self) -> ModelConfigLike: ...

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, for wrapping (FSDP, activation checkpointing)."""
        blocks = self._modules.get(self.block_list)
        if blocks is None:
            raise AttributeError(self.block_list)
        return cast(nn.ModuleList, blocks)

    @property
    def needs_picture(self) -> bool:
        """Whether it cannot run without what is made of a picture (Wan's image-to-video), and samples all frames; others take frames that are
        given as they are, where they are of clips at all, and sample those behind them."""
        return False

    def free_shape(self, shape: Sequence[int], given: int) -> tuple[int, ...]:
        """Shape of what is sampled of a clip's latent `[C, f, h, w]` whose first `given` latent frames are known; a picture's own for 0.

        Raises:
            ValueError: a number of frames that this network cannot be given.
        """
        free = shape if self.needs_picture or not given else (shape[0], shape[1] - given, *shape[2:])
        if self.needs_picture and given != 1:
            raise ValueError(f"this network is image-to-video: it is given one frame, not {given}; set sampler.given_frames to 1")
        if given and len(self.patch) != 3:
            raise ValueError(f"a network of pictures is given no frames, and sampler.given_frames has {given}; set it to 0")
        if given and free[1] < 1:
            raise ValueError(f"{given} given frames leave none of {shape[1]} latent frames to be sampled; lower sampler.given_frames")
        return tuple(free)

    def free_part(self, latents: Tensor, given: int) -> Tensor:
        """What is sampled of clean latents of clips `[…, C, f, h, w]`, see `free_shape`."""
        return latents if self.needs_picture or not given else latents[..., given:, :, :]

    @property
    def latent_channels(self) -> int:
        """Channels of what is sampled; the network's input has more where conditioning stands beside it."""
        return self.config.in_channels

    def share(self, ranks: SequenceRanks) -> None:
        """Have each forward pass shared by `ranks`, who all make it with the same requests and get the same velocities; what they find as
        gradients of parameters adds up to the gradient (`diffusion.ulysses`). Raises ValueError where heads cannot be shared evenly."""
        check_heads(self.config.num_attention_heads, ranks.count)
        self.sequence_ranks = ranks

    @property
    @abstractmethod
    def longest_edge(self) -> tuple[int, str]:
        """Most patches along an axis that have positions, and the config key that says so."""

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Patches along each axis of a latent `(C, h, w)` or `(C, f, h, w)`.

        Raises:
            ValueError: another number of axes or channels, a size that is no multiple of the patch, or one beyond the
                table of positions.
        """
        channels, *sizes = shape
        if len(sizes) != len(self.patch) or channels != self.latent_channels:
            axes = ", ".join(["frames", "height", "width"][-len(self.patch) :])
            raise ValueError(f"latent shape {tuple(shape)} does not fit: this model takes ({self.latent_channels} channels, {axes})")
        if any(n < 1 or n % p for n, p in zip(sizes, self.patch, strict=True)):
            size, patch = ("x".join(map(str, x)) for x in (sizes, self.patch))
            raise ValueError(f"latent size {size} is not a multiple of the patch size {patch}")
        grid = tuple(n // p for n, p in zip(sizes, self.patch, strict=True))
        longest, key = self.longest_edge
        if max(grid) > longest:
            raise ValueError(f"{'x'.join(map(str, grid))} patches exceed {key}={longest}; sample a smaller size")
        return grid

    def tokens(self, shape: Sequence[int]) -> int:
        """Latent tokens of one request of this latent shape. Raises ValueError when it does not fit the patches."""
        total = 1
        for n in self.grid(shape):
            total *= n
        return total

    @abstractmethod
    def packed_tokens(self, shape: Sequence[int], prompt_tokens: int) -> int:
        """What one request takes of the engine's token budget. Raises ValueError as `tokens`."""

    @abstractmethod
    def activation_bytes(self, itemsize: int) -> int:
        """Bytes of activations a packed token needs at the peak of an inference forward, values of `itemsize` bytes.

        An upper estimate from the architecture, for batches of mixed sizes; weights, and what is per request, not counted.
        """

    @abstractmethod
    def forward_flops(self, shape: Sequence[int], prompt_tokens: int) -> int:
        """Operations (a multiply-add counts two) of matrix products and attention in a forward pass of one request.

        Element-wise work, norms and softmax are left out, as `torch.utils.flop_counter` does. `prompt_tokens` include padding.
        """

    @abstractmethod
    def saved(self, shape: Sequence[int], prompt_tokens: int, itemsize: int, adapted: bool) -> Saved:
        """What a forward pass of one request keeps for its backward pass, with values of `itemsize` bytes inside the network.

        Args:
            adapted: only adapters on projections of attention are trained (their own outputs, rank channels, are not counted).
        """

    @abstractmethod
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw fresh weights for training from scratch."""

    forward: Callable[..., Tensor | list[Tensor]]
    """Velocities of a batch of requests: `(latents, t, **conditioning)`.

    Args:
        latents: `[B, C, …]`, or a list of `[C, …]` for mixed sizes.
        t: times `[B]` in [0, 1]; the network embeds 1000 t (Cosmos: t itself).
        conditioning: the tensors that the family declares by the names of its arguments (`diffusion.families.conditioning`):
            `prompt_embeds` `[B, L, D]`, or a list of `[L_i, D]`; of SD3 also `pooled` `[B, P]`.
    Returns:
        Velocities, shaped as `latents`.
    Raises:
        ValueError: a size that does not fit, or not as many prompts as latents.
    """

    def compile_blocks(self, **options: Any) -> None:
        """Compile the per-token regions of all blocks (`torch.compile`); attention stays outside.

        Each new shape of the streams compiles anew: set `buckets` so that shapes repeat.

        Args:
            options: passed to `torch.compile`.
        """
        settings: dict[str, Any] = {"dynamic": False, "fullgraph": True, "recompile_limit": COMPILED_SHAPES, **options}
        for block in self.blocks:
            for name in cast(Block, block).regions:
                region: Callable[..., Any] = getattr(block, name)
                setattr(block, name, torch.compile(region, **settings))

    # -- shared parts of the forwards ---------------------------------------------------------------------------

    def _layout(self, latents: Tensor | list[Tensor], prompt_embeds: Tensor | list[Tensor]) -> Layout:
        image = tuple(self.tokens(x.shape) for x in latents)
        return layout(image, tuple(len(e) for e in prompt_embeds), self.buckets, self.sequence_ranks)

    def _per_request(self, values: Tensor) -> Tensor:
        """Per-request values `[B, dim]`; where shapes must repeat, with rows of zeros up to a power of two above B."""
        if self.buckets is None:
            return values
        return F.pad(values, (0, 0, 0, (1 << len(values).bit_length()) - len(values)))

    def _unpack(self, tokens: Tensor, latents: Tensor | list[Tensor], stream: Stream) -> Tensor | list[Tensor]:
        """Network output over the image stream to velocities shaped as `latents`, of all ranks that share it."""
        if isinstance(latents, Tensor):
            return self._unpatchify(stream.collected(tokens).unflatten(1, (len(latents), -1))[0], latents.shape[1:])
        out: list[Tensor] = []
        parts = zip(stream.unpack(tokens), latents, strict=True)
        for shape, run in groupby(parts, key=lambda pair: pair[1].shape):
            out += list(self._unpatchify(torch.stack([part for part, _ in run]), shape))
        return out

    def _unpatchify(self, tokens: Tensor, shape: Sequence[int]) -> Tensor:
        """`[B, tokens, patch volume * channels]` to `[B, channels, …]` of latents of this shape."""
        axes = len(self.patch)
        grid = tokens.unflatten(1, self.grid(shape)).unflatten(-1, (*self.patch, self.out_channels))
        order = [0, 2 * axes + 1]  # batch, channels, then (patches, patch) along each axis
        for i in range(axes):
            order += [1 + i, 1 + axes + i]
        return grid.permute(order).reshape(-1, self.out_channels, *shape[1:])


def by_shape(tensors: Sequence[Tensor], apply: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """`apply` to stacked neighbours of one shape, so that a batch sorted by shape takes one call a shape; a list as long as the input."""
    out: list[Tensor] = []
    for _, run in groupby(tensors, key=lambda x: x.shape):
        out += list(apply(torch.stack(list(run))))
    return out


def feed_forward_bytes(dim: int, inner: int, itemsize: int) -> int:
    """Bytes a token needs while a block's feed-forward runs.

    Its hidden layer before and after the activation and the attention output still held are values of `itemsize`; the
    residual stream before and after the block, its norm, and what the modulation makes of it count as fp32, which they
    are under autocast.
    """
    return (2 * inner + dim) * itemsize + 6 * dim * 4
