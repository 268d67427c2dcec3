"""Encoded prompts, kept by content: members of a group, requests of a prompt and the negative prompt are encoded once."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

import torch

from diffusion.families.conditioning import Conditioning, TextEncoder

MAX_BYTES = 256 * 2**20
"""Default bound. A prompt of SD3.5 (333 tokens x 4096 values, fp32) takes 5.5 MB."""


class PromptCache:
    """Least recently used prompts leave first. Threads may share one; the encoder then encodes for one at a time.

    Args:
        encoder: the frozen text encoder.
        device: where the network wants the conditioning.
        max_bytes: bound on what is kept. A prompt that alone exceeds it is encoded each time.

    Attributes:
        hits, misses: prompts that were found, and those that had to be encoded.
        nbytes: bytes held.
    """

    def __init__(self, encoder: TextEncoder, device: torch.device | str = "cpu", max_bytes: int = MAX_BYTES) -> None:
        self._encoder, self._device, self.max_bytes = encoder, device, max_bytes
        self._kept: OrderedDict[bytes, Conditioning] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = self.misses = self.nbytes = 0

    def get(self, prompts: list[str]) -> list[Conditioning]:
        """Conditioning of each prompt; those not yet known are encoded in one call.

        Raises:
            ValueError: the encoder refuses a prompt; nothing is kept then.
        """
        with self._lock:
            return self._get(prompts)

    def _get(self, prompts: list[str]) -> list[Conditioning]:
        keys = [hashlib.blake2b(p.encode(), digest_size=16).digest() for p in prompts]
        found: dict[bytes, Conditioning] = {}
        for k in keys:
            if k in self._kept:
                self._kept.move_to_end(k)
                found[k] = self._kept[k]
        new = {k: p for k, p in zip(keys, prompts, strict=True) if k not in found}
        self.misses += len(new)
        self.hits += len(prompts) - len(new)
        if new:
            encoded = self._encoder.encode(list(new.values()))
            for i, k in enumerate(new):
                found[k] = encoded[i].to(self._device)
                self._keep(k, found[k])
        return [found[k] for k in keys]

    def _keep(self, name: bytes, conditioning: Conditioning) -> None:
        if conditioning.nbytes > self.max_bytes:
            return
        self._kept[name] = conditioning
        self.nbytes += conditioning.nbytes
        while self.nbytes > self.max_bytes:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes

    def __len__(self) -> int:
        return len(self._kept)
