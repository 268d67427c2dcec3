"""Decoding in a thread of its own: right pixels for each latent, equal shapes together, errors to whom they belong."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.codecs import IdentityCodec
from diffusion.engine.decode import Decoder


class Codec(IdentityCodec):
    """Pixel space; remembers its calls, waits at a gate, refuses latents that hold a 7."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []
        self.gate = threading.Event()
        self.gate.set()

    def decode(self, latents: Tensor) -> np.ndarray:
        self.gate.wait(10)
        self.calls.append(tuple(latents.shape))
        if bool((latents == 7).any()):
            raise ValueError("seven")
        return super().decode(latents)


def latent(value: float, h: int = 4, w: int = 6) -> Tensor:
    return torch.full((3, h, w), value)


def test_pixels_belong_to_their_latents_whatever_the_mix() -> None:
    codec = Codec()
    values = [-1.0, 0.0, 0.5, 1.0, -0.5]
    with Decoder(codec) as decoder:
        pictures = decoder.decode([latent(v, 4 + 2 * (i % 2)) for i, v in enumerate(values)], 10)
    for i, (picture, v) in enumerate(zip(pictures, values, strict=True)):
        assert picture.shape == (4 + 2 * (i % 2), 6, 3)
        assert picture.dtype == np.uint8
        assert (picture == round((v + 1) * 127.5)).all()


def test_what_waits_is_decoded_together_within_the_batch() -> None:
    codec = Codec()
    codec.gate.clear()
    with Decoder(codec, batch=3) as decoder:
        futures = [decoder.submit(latent(0.0, 2 + 2 * (i % 2))) for i in range(6)]
        codec.gate.set()
        for f in futures:
            f.result(10)
    assert sum(n for n, *_ in codec.calls) == 6
    assert max(n for n, *_ in codec.calls) <= 3
    assert len(codec.calls) < 6  # of those that waited at the gate, equal ones went together


def test_an_error_is_raised_where_the_pixels_are_asked_for_and_decoding_goes_on() -> None:
    with Decoder(Codec(), batch=1) as decoder:
        good, bad, after = (decoder.submit(latent(v)) for v in (0.0, 7.0, 1.0))
        assert good.result(10).shape == after.result(10).shape == (4, 6, 3)
        with pytest.raises(ValueError, match="seven"):
            bad.result(10)


def test_closing_decodes_what_waits_and_takes_nothing_more() -> None:
    codec = Codec()
    decoder = Decoder(codec)
    futures = [decoder.submit(latent(0.0)) for _ in range(5)]
    decoder.close()
    assert all(f.done() for f in futures)
    with pytest.raises(RuntimeError, match="closed"):
        decoder.submit(latent(0.0))
    decoder.close()  # again: nothing happens
