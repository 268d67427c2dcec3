"""Prompts encoded in one place: `Encoder` actors hold the text encoders, generators, feeder and ranks ask them.

    SharedTextEncoder (a `TextEncoder`) ── prompts, by digest ──► Encoder i ── cache, text encoders ──► embeddings, fp32

What an Encoder answers is a function of the policy folder and the prompt, so that it may be asked again, by anyone: a restart loses its
cache alone. A prompt always goes to the same Encoder, so that no two keep it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from actors.config import EncoderConfig
from diffusion.checkpoint import load_text_encoder
from diffusion.config import ModelConfig
from diffusion.device import resolve_device
from diffusion.engine.cache import PromptCache
from diffusion.families.conditioning import TextConditioning
from diffusion.source import locate

ENCODE_DEADLINE_S = 900.0
"""For the answer to one call, an Encoder's restart included. T5-XXL takes a few seconds a prompt on one CPU thread."""


class EncoderUnavailable(Exception):
    """The Encoder actors gave no answer; it says nothing against the prompt."""


class Encoder:
    """Plain class; the driver makes it a Ray actor."""

    def __init__(self, model: ModelConfig, settings: EncoderConfig) -> None:
        torch.set_num_threads(settings.threads)
        device = resolve_device("cuda" if settings.gpus > 0 else "cpu", f"encoder.gpus={settings.gpus:g}")
        self._encoder = load_text_encoder(locate(model.path, model.revision).folder, model, device)
        self._cache, self._batch = PromptCache(self._encoder, "cpu", settings.cache_mb * 2**20), settings.batch

    def pid(self) -> int:
        return os.getpid()

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings `[B, L, D]` and pooled vectors `[B, P]`, fp32. Raises ValueError naming a prompt that does not fit."""
        found = [one for part in _parts(prompts, self._batch) for one in self._cache.get(part)]
        return torch.stack([one.prompt_embeds for one in found]), torch.stack([one.pooled for one in found])

    def signature(self, prompt: str) -> bytes:
        """See `TextEncoder.signature`."""
        return self._encoder.signature(prompt)


def _parts(prompts: list[str], size: int) -> list[list[str]]:
    return [prompts[i : i + size] for i in range(0, len(prompts), size)]


class SharedTextEncoder:
    """A `TextEncoder` that asks Encoder actors; it pickles.

    Args:
        actors: their handles, at least one.
        deadline_s: for the answers to one call.
    """

    def __init__(self, actors: Sequence[Any], deadline_s: float = ENCODE_DEADLINE_S) -> None:
        self._actors, self._deadline_s = list(actors), deadline_s

    def encode(self, prompts: list[str]) -> TextConditioning:
        """See `TextEncoder.encode`. Raises EncoderUnavailable."""
        of = [int.from_bytes(hashlib.blake2b(p.encode(), digest_size=8).digest()) % len(self._actors) for p in prompts]
        shares = {i: [p for p, owner in zip(prompts, of, strict=True) if owner == i] for i in sorted(set(of))}
        answers = self._asked([self._actors[i].encode.remote(share) for i, share in shares.items()])
        rows = {i: iter(zip(embeds, pooled, strict=True)) for i, (embeds, pooled) in zip(shares, answers, strict=True)}
        ordered = [next(rows[owner]) for owner in of]
        return TextConditioning(torch.stack([embeds for embeds, _ in ordered]), torch.stack([pooled for _, pooled in ordered]))

    def signature(self, prompt: str) -> bytes:
        """See `TextEncoder.signature`."""
        found: bytes = self._asked([self._actors[0].signature.remote(prompt)])[0]
        return found

    def _asked(self, references: list[Any]) -> list[Any]:
        import ray

        try:
            found: list[Any] = ray.get(references, timeout=self._deadline_s)
            return found
        except ray.exceptions.GetTimeoutError:
            raise EncoderUnavailable(f"no answer of the Encoder actors within {self._deadline_s:.0f} s; add some (encoder.actors), or give them GPUs") from None
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ValueError):
                raise ValueError(str(cause)) from None
            raise EncoderUnavailable(f"an Encoder failed: {type(cause).__name__}: {cause}") from error
        except ray.exceptions.RayActorError as error:
            raise EncoderUnavailable(f"an Encoder died: {error}") from error
