"""Prompts, and frames that are given, encoded in one place: `Encoder` actors hold the encoders, generators, feeder and ranks ask them.

    SharedTextEncoder (a `TextEncoder`) ── prompts, by digest ──► Encoder i ── cache, text encoders ──► embeddings, fp32
    SharedFrames (a `FrameEncoder`) ── pixels, by digest ──► Encoder i ── codec, encoder of pictures ──► latents, features

What an Encoder answers is a function of the policy folder and of what it is asked, so that it may be asked again, by anyone: a restart loses
its cache alone. A prompt always goes to the same Encoder, so that no two keep it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.config import EncoderConfig
from diffusion.checkpoint import load_codec, load_frame_encoder, load_text_encoder, open_policy
from diffusion.config import ModelConfig
from diffusion.device import resolve_device
from diffusion.engine.cache import PromptCache
from diffusion.families.conditioning import Conditioning, stacked
from diffusion.families.frames import FrameEncoder
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
        self._cache = PromptCache(self._encoder, "cpu", settings.cache_mb * 2**20)
        self._frames = LoneFrames(model, device)

    def pid(self) -> int:
        return os.getpid()

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Named tensors `[B, …]`, fp32. Raises ValueError naming a prompt that does not fit."""
        return dict(stacked(self._cache.get(prompts)).tensors)

    def prefetch(self, prompts: list[str]) -> None:
        """Encode prompts that will be asked for; one that does not fit is told to who asks."""
        with contextlib.suppress(ValueError):
            self.encode(prompts)

    def signature(self, prompt: str) -> bytes:
        """See `TextEncoder.signature`."""
        return self._encoder.signature(prompt)

    def encode_frames(self, pixels: NDArray[np.uint8], frames: int) -> dict[str, Tensor]:
        """See `FrameEncoder.encode`. Raises ValueError."""
        return self._frames.encode(pixels, frames)


class LoneFrames:
    """A policy's `FrameEncoder` in this process, with the codec that it needs. Both are loaded when first asked: where a prepared set has the
    latents they never are."""

    def __init__(self, model: ModelConfig, device: torch.device | str = "cpu") -> None:
        self._model, self._device = model, device

    def encode(self, pixels: NDArray[np.uint8], frames: int) -> dict[str, Tensor]:
        """See `FrameEncoder.encode`. Raises CheckpointError for files that do not fit, ValueError for a policy of pictures."""
        return self._encoder.encode(pixels, frames)

    @cached_property
    def _encoder(self) -> FrameEncoder:
        policy = open_policy(self._model)
        folder = policy.source.folder
        found = load_frame_encoder(folder, self._model, load_codec(folder, self._device), policy.transformer.needs_picture, self._device)
        if found is None:
            raise ValueError("a policy of pictures is given no frames; set sampler.given_frames to 0")
        return found


class SharedTextEncoder:
    """A `TextEncoder` that asks Encoder actors; it pickles.

    Args:
        actors: their handles, at least one.
        deadline_s: for the answers to one call.
    """

    def __init__(self, actors: Sequence[Any], deadline_s: float = ENCODE_DEADLINE_S) -> None:
        self._actors, self._deadline_s = list(actors), deadline_s

    def encode(self, prompts: list[str]) -> Conditioning:
        """See `TextEncoder.encode`. Raises EncoderUnavailable."""
        shares = self._shares(prompts)
        answers = _answers([self._actors[i].encode.remote([prompts[row] for row in rows]) for i, rows in shares.items()], self._deadline_s)
        place = torch.tensor([row for rows in shares.values() for row in rows]).argsort()
        return Conditioning({name: torch.cat([answer[name] for answer in answers])[place] for name in answers[0]})

    def prefetch(self, prompts: Sequence[str]) -> None:
        """Have these prompts encoded ahead of need; returns at once."""
        for i, rows in self._shares(prompts).items():
            self._actors[i].prefetch.remote([prompts[row] for row in rows])

    def _shares(self, prompts: Sequence[str]) -> dict[int, list[int]]:
        """Places of the prompts that each actor keeps."""
        shares: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            shares.setdefault(_owner(prompt.encode(), len(self._actors)), []).append(row)
        return shares

    def signature(self, prompt: str) -> bytes:
        """See `TextEncoder.signature`."""
        found: bytes = _answers([self._actors[0].signature.remote(prompt)], self._deadline_s)[0]
        return found


class SharedFrames:
    """A `FrameEncoder` that asks Encoder actors; it pickles. Equal pixels always go to the same one.

    Args:
        actors, deadline_s: as of `SharedTextEncoder`.
    """

    def __init__(self, actors: Sequence[Any], deadline_s: float = ENCODE_DEADLINE_S) -> None:
        self._actors, self._deadline_s = list(actors), deadline_s

    def encode(self, pixels: NDArray[np.uint8], frames: int) -> dict[str, Tensor]:
        """See `FrameEncoder.encode`. Raises EncoderUnavailable."""
        actor = self._actors[_owner(pixels.tobytes(), len(self._actors))]
        found: dict[str, Tensor] = _answers([actor.encode_frames.remote(pixels, frames)], self._deadline_s)[0]
        return found


def _owner(content: bytes, actors: int) -> int:
    """Which of the actors keeps what is made of `content`."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) % actors


def _answers(references: list[Any], deadline_s: float) -> list[Any]:
    """What Encoder actors answer. Raises ValueError as they do, EncoderUnavailable."""
    import ray

    try:
        found: list[Any] = ray.get(references, timeout=deadline_s)
        return found
    except ray.exceptions.GetTimeoutError:
        raise EncoderUnavailable(f"no answer of the Encoder actors within {deadline_s:.0f} s; add some (encoder.actors), or give them GPUs") from None
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ValueError):
            raise ValueError(str(cause)) from None
        raise EncoderUnavailable(f"an Encoder failed: {type(cause).__name__}: {cause}") from error
    except ray.exceptions.RayActorError as error:
        raise EncoderUnavailable(f"an Encoder died: {error}") from error
