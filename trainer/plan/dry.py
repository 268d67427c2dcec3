"""A VAE's pass without its numbers: it runs on the meta device, where tensors have shapes and no memory."""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

from trainer.plan.sizes import Sizes, build_vae

TILE = 1024
"""Longest edge in pixels that goes through in one piece (`diffusion.codecs.VAECodec`)."""
PIXELS = 1024 * 1024
"""Most pixels of one call of it."""
BATCH = 16
"""Most latents of one call (`diffusion.engine.decode.Decoder`)."""
CLIP_EDGE, CLIP_TILE, CLIP_STRIDE = 832, 256, 192
"""Of clips: the longest edge in pixels that goes through in one piece, edge and distance of tiles (`diffusion.families.wan.codec`)."""


@dataclass(frozen=True)
class Pass:
    """One pass: operations, and the most bytes of live tensors in fp32; a kernel's own workspace is not counted."""

    flops: float = 0.0
    peak: float = 0.0


@dataclass(frozen=True)
class VAEPass:
    """Decoding and encoding one sample, how many samples one call decodes, and whether a clip goes through in tiles."""

    decode: Pass = Pass()
    encode: Pass = Pass()
    batch: int = 1
    tiled: bool = False


def vae_pass(sizes: Sizes, height: int, width: int, frames: int = 1) -> VAEPass:
    """Of pictures or clips of this size, in tiles where the codec cuts them; nothing in pixel space."""
    if sizes.vae is None:
        return VAEPass()
    if sizes.vae_config.get("_class_name") == "AutoencoderKLWan":
        return _clip_pass(json.dumps(sizes.vae_config, sort_keys=True), height, width, frames)
    h, w = min(height, TILE), min(width, TILE)
    decode, encode = _passes(json.dumps(sizes.vae_config, sort_keys=True), h, w)
    share = height * width / (h * w)  # tiles overlap: a little more in truth
    return VAEPass(Pass(decode.flops * share, decode.peak), Pass(encode.flops * share, encode.peak), max(1, min(BATCH, PIXELS // (height * width))))


def _clip_pass(config: str, height: int, width: int, frames: int) -> VAEPass:
    """A clip goes through a latent frame at a time, so that its length adds operations and no memory."""
    from diffusion.families.wan.tiles import spans

    tiled = max(height, width) > CLIP_EDGE
    h, w = (min(side, CLIP_TILE) if tiled else side for side in (height, width))
    rows, columns = (sum(end - start for start, end in spans(side, one, CLIP_STRIDE)) for side, one in ((height, h), (width, w)))
    share, further = rows * columns / (h * w), (frames - 1) // 4
    found = [Pass(share * (first.flops + further * later.flops), later.peak) for first, later in _clip_chunks(config, h, w)]
    return VAEPass(found[0], found[1], 1, tiled)


@cache
def _clip_chunks(config: str, height: int, width: int) -> list[tuple[Pass, Pass]]:
    """Decoding, then encoding: of the first latent frame, and of one of those that follow, with the features that are kept of earlier ones."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    vae, found = build_vae(json.loads(config)), []
    factor, patch = int(vae.config.scale_factor_spatial), vae.config.patch_size or 1
    counter: Any
    for name in ("decoder", "encoder"):
        flops, cached = list[float](), [None] * 100
        with torch.device("meta"), torch.no_grad(), _live_bytes() as live:
            for chunk in range(3):  # what is kept of two earlier ones is there then
                if name == "decoder":
                    shape, more = (1, vae.config.z_dim, 1, height // factor, width // factor), {"first_chunk": chunk == 0}
                else:
                    shape, more = (1, 3 * patch**2, 4 if chunk else 1, height // patch, width // patch), {}
                with FlopCounterMode(display=False) as counter:
                    getattr(vae, name)(torch.empty(shape), feat_cache=cached, feat_idx=[0], **more)
                flops.append(counter.get_total_flops())
        found.append((Pass(flops[0], live.peak), Pass(flops[-1], live.peak)))
    return found


@cache
def _passes(config: str, height: int, width: int) -> tuple[Pass, Pass]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    values = json.loads(config)
    vae = build_vae(values)
    factor = 2 ** (len(values["block_out_channels"]) - 1)
    found = []
    counter: Any
    with torch.device("meta"), torch.no_grad():
        latent = torch.empty(1, values["latent_channels"], height // factor, width // factor)
        pixels = torch.empty(1, 3, height, width)
        for run, given in ((vae.decode, latent), (vae.encode, pixels)):
            with FlopCounterMode(display=False) as counter:
                run(given)
            with _live_bytes() as live:
                run(given)
            found.append(Pass(counter.get_total_flops(), live.peak))
    return found[0], found[1]


def _live_bytes() -> Any:
    """A context whose `peak` is the most bytes alive at a time in storages made inside it."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    class Live(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.live = self.peak = 0
            self.known: set[int] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
            out = func(*args, **(kwargs or {}))
            for x in tree_iter(out):
                if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known | given:
                    self._add(x.untyped_storage())
            return out

        def _add(self, storage: Any) -> None:
            key, size = storage._cdata, storage.nbytes()
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key, size)

        def _drop(self, key: int, size: int) -> None:
            self.known.discard(key)
            self.live -= size

    return Live()
