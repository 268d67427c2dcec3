"""What the policy is shown of examples: their texts, and in image- and video-to-video the first frames of their clips.

    names ─► Subjects ─► Subject (text, example, how many frames are given) ─► Conditioner ─► conditioning
                                    text ─► text encoder, cached by text
                  frames: clean latent ─► its first frames, as they are
                   or of files, pixels ─► frame encoder, cached by pixels

Conditioning is stored nowhere: which example a group or a row has, and how many of its frames are given, follows from names, so that a rank
asks for the same as the generator did.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.config import DataConfig, PromptConfig
from actors.sources.draws import data_source, prompt_source, training_example, training_row
from actors.sources.example import Example, Source, SourceError
from diffusion.codecs import Codec
from diffusion.config import SamplerConfig
from diffusion.engine.cache import PromptCache
from diffusion.families.conditioning import Conditioning
from diffusion.families.frames import FrameEncoder
from diffusion.families.given import GIVEN
from diffusion.seeds import key

MAX_BYTES = 256 * 2**20
"""Of frames' conditioning that is kept. A first frame of Cosmos at 720p takes 0.9 MB, a condition of Wan at 480p with 81 frames 10.5 MB."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What a sample is of.

    Attributes:
        text: the prompt, or the caption; empty where it was dropped.
        given: latent frames of the example's clip that are given.
        example: whose clip they are of; not needed where none are given.
        x0: the clean latent `[C, f, h, w]` of that clip, where it is at hand.
    """

    text: str
    given: int = 0
    example: Example | None = None
    x0: Tensor | None = None


class Subjects:
    """What groups, rows of anchor data and held-out prompts of a run are of: pure functions of names. A source is opened when it is needed.

    Args:
        seed: the run's.
        prompts, data: where its examples come from.
        sampler: how many frames are given.
    """

    def __init__(self, seed: int, prompts: PromptConfig, data: DataConfig, sampler: SamplerConfig) -> None:
        self._seed, self._prompt_settings, self._data_settings, self._sampler = seed, prompts, data, sampler

    @cached_property
    def _prompts(self) -> Source:
        return prompt_source(self._prompt_settings, self._data_settings)

    @cached_property
    def _data(self) -> Source:
        return data_source(self._data_settings)

    def given_to_group(self, group: int) -> int:
        """Latent frames that a group is given, all its members alike."""
        return self._given(self._seed, "given", group)

    def given_to_row(self, batch: int, row: int) -> int:
        """Latent frames that a row of anchor data is given, where it is drawn apart from the prompts."""
        return self._given(self._seed, "given-to-data", batch, row)

    def _given(self, *name: int | str) -> int:
        choices = self._sampler.given_choices
        return choices[0] if len(choices) == 1 else choices[int(np.random.default_rng(key(*name)).integers(len(choices)))]

    def group(self, group: int) -> Subject:
        """Of a group of rollouts. Raises SourceError."""
        example = training_example(self._prompts, self._seed, group)
        return Subject(example.text, self.given_to_group(group), example)

    def of_group(self, group: int, text: str, x0: Tensor | None = None) -> Subject:
        """Of a group whose payload has the text and perhaps the clean latent; or of its own example as anchor data. Raises SourceError."""
        given = self.given_to_group(group)
        return Subject(text, given, training_example(self._prompts, self._seed, group) if given else None, x0)

    def of_row(self, batch: int, row: int, text: str, x0: Tensor) -> Subject:
        """Of a row of anchor data with this caption and clean latent. Raises SourceError."""
        given = self.given_to_row(batch, row)
        return Subject(text, given, training_row(self._data, 0.0, self._seed, batch, row)[1] if given else None, x0)

    def held_out(self, examples: Sequence[Example], first: int, latents: Tensor | None = None) -> list[Subject]:
        """Of held-out examples, the first of them at place `first`: the choices of how many frames are given take turns."""
        choices = self._sampler.given_choices
        return [
            Subject(example.text, choices[(first + i) % len(choices)], example, None if latents is None else latents[i]) for i, example in enumerate(examples)
        ]


class Conditioner:
    """See the module's docstring. Threads may share one.

    Args:
        texts: the policy's text encoder, with its cache.
        frames: its encoder of frames; None of a policy of pictures.
        codec: the policy's, for sizes alone.
        sampler: size of the clips.
        picture: whether the network needs a picture, which pixels alone can be (`PackedModel.needs_picture`).
        max_bytes: of what is kept of frames.
    """

    def __init__(
        self, texts: PromptCache, frames: FrameEncoder | None, codec: Codec, sampler: SamplerConfig, picture: bool = False, max_bytes: int = MAX_BYTES
    ) -> None:
        self._texts, self._frames, self._codec, self._sampler, self._picture = texts, frames, codec, sampler, picture
        self._kept: dict[bytes, dict[str, Tensor]] = {}
        self._max_bytes, self._lock = max_bytes, threading.Lock()

    def get(self, subjects: Sequence[Subject]) -> list[Conditioning]:
        """Conditioning of each, on the device that the texts' is on.

        Raises:
            ValueError: a text that does not fit its encoder; SourceError is one: an example without the frames that are asked for.
            EncoderUnavailable: an Encoder actor gave no answer.
        """
        texts = self._texts.get([subject.text for subject in subjects])
        return [text.beside(self._given(subject)) if subject.given else text for text, subject in zip(texts, subjects, strict=True)]

    def _given(self, subject: Subject) -> dict[str, Tensor]:
        """What is made of the frames that a subject is given."""
        if not self._picture:
            clean = subject.x0
            if clean is None and subject.example is not None and subject.example.latent is not None:
                clean = torch.from_numpy(subject.example.latent.load())
            if clean is not None:
                return {GIVEN: clean[:, : subject.given].clone()}
        if self._frames is None:
            raise SourceError("a policy of pictures is given no frames; set sampler.given_frames to 0")
        pixels = first_frames(subject.example, self._codec.pixel_frames(subject.given), self._sampler.height, self._sampler.width)
        return self._encoded(pixels, self._frames)

    def _encoded(self, pixels: NDArray[np.uint8], encoder: FrameEncoder) -> dict[str, Tensor]:
        name = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
        with self._lock:
            found = self._kept.pop(name, None) or encoder.encode(pixels, self._sampler.frames)
            self._kept[name] = found  # the last used is last
            while sum(tensor.nbytes for tensors in self._kept.values() for tensor in tensors.values()) > self._max_bytes:
                self._kept.pop(next(iter(self._kept)))
        return found


def first_frames(example: Example | None, count: int, height: int, width: int) -> NDArray[np.uint8]:
    """The first `count` frames of an example's clip, or its picture as one frame, uint8 `[count, H, W, 3]`. Raises SourceError."""
    if example is None or (example.media is None and example.latent is None):
        name = "a prompt" if example is None else f"example {example.id!r}"
        raise SourceError(f"{name} has a text only, and sampler.given_frames asks for frames of its clip; take prompts from clips (prompts.kind: data, folder)")
    if example.media is None and example.first is not None and count == 1:
        return example.first.load()[None]
    pixels = example.pixels(height, width, count)
    clip = pixels[None] if pixels.ndim == 3 else pixels
    if len(clip) < count:
        found = "a picture" if pixels.ndim == 3 else f"a clip of {len(clip)} frames"
        raise SourceError(f"example {example.id!r} is {found}, and {count} frames of it are to be given; lower sampler.given_frames, or leave it out")
    return clip
