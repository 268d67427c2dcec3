"""Decoding in a thread of its own: right pixels for each latent, equal shapes together, errors to whom they belong."""

from __future__ import annotations

import threading
import time
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion import pixels as pixels_module
from diffusion.codecs import IdentityCodec
from diffusion.engine import decode
from diffusion.engine.decode import Decoder
from diffusion.pixels import turn_size


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


def test_what_is_handed_in_together_is_decoded_together_and_apart_from_others() -> None:
    codec = Codec()
    codec.gate.clear()
    with Decoder(codec, batch=3) as decoder:
        mixed = decoder.submit([latent(0.0, 2 + 2 * (i % 2)) for i in range(8)])
        alone = decoder.submit([latent(0.5, 2)])
        codec.gate.set()
        assert [f.result(10).shape for f in mixed] == [(2 + 2 * (i % 2), 6, 3) for i in range(8)]
        assert alone[0].result(10).shape == (2, 6, 3)
    assert codec.calls == [(3, 3, 2, 6), (1, 3, 2, 6), (3, 3, 4, 6), (1, 3, 4, 6), (1, 3, 2, 6)]


def test_an_error_is_raised_where_the_pixels_are_asked_for_and_decoding_goes_on() -> None:
    with Decoder(Codec()) as decoder:
        good, bad, after = (decoder.submit([latent(v)])[0] for v in (0.0, 7.0, 1.0))
        assert good.result(10).shape == after.result(10).shape == (4, 6, 3)
        with pytest.raises(ValueError, match="seven"):
            bad.result(10)
        with pytest.raises(ValueError, match="seven"):
            decoder.decode([latent(0.0), latent(7.0)], 10)


def test_a_batch_that_does_not_fit_is_decoded_one_by_one() -> None:
    class Narrow(Codec):
        def decode(self, latents: Tensor) -> np.ndarray:
            pixels = super().decode(latents)
            if len(latents) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return pixels

    codec = Narrow()
    with Decoder(codec) as decoder:
        assert [p[0, 0, 0] for p in decoder.decode([latent(v) for v in (-1.0, 1.0)], 10)] == [0, 255]
    assert [n for n, *_ in codec.calls] == [2, 1, 1]


def test_a_late_picture_says_what_was_waited_for() -> None:
    codec = Codec()
    codec.gate.clear()
    with Decoder(codec) as decoder:
        with pytest.raises(TimeoutError, match=r"2 of 2 latents were not decoded within 0\.05 s"):
            decoder.decode([latent(0.0), latent(0.1)], 0.05)
        cancelled = decoder.submit([latent(0.0)])[0]
        assert cancelled.cancel()
        codec.gate.set()
        assert len(decoder.decode([latent(0.0)], 10)) == 1  # the thread outlives what nobody waits for


def test_closing_decodes_what_waits_and_takes_nothing_more() -> None:
    codec = Codec()
    decoder = Decoder(codec)
    futures = [decoder.submit([latent(0.0)])[0] for _ in range(5)]
    decoder.close()
    assert all(f.done() for f in futures)
    with pytest.raises(RuntimeError, match="closed"):
        decoder.submit([latent(0.0)])
    decoder.close()  # again: nothing happens


def test_large_latents_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Codec()
    monkeypatch.setattr(decode, "LATENT_BYTES", 2 * 4 * 3 * 4 * 6)  # two of 4 x 6
    with Decoder(codec) as decoder:
        assert [p.shape for p in decoder.decode([latent(0.0), latent(0.1), latent(0.2), latent(0.3, 40), latent(0.4, 40)], 10)][-1] == (40, 6, 3)
    assert codec.calls == [(2, 3, 4, 6), (1, 3, 4, 6), (1, 3, 40, 6), (1, 3, 40, 6)]
    assert turn_size(8, 93 * 704 * 1280 * 3) == 1
    assert turn_size(24, 512 * 512 * 3) == 24


def test_of_many_samples_two_turns_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is looked at, and one that is decoded meanwhile, whatever the number of latents and however slow the one who looks."""
    made: list[weakref.ref[np.ndarray]] = []

    class Counting(Codec):
        def decode(self, latents: Tensor) -> np.ndarray:
            pixels = super().decode(latents).copy()
            made.append(weakref.ref(pixels))
            return pixels

    monkeypatch.setattr(decode, "LATENT_BYTES", 1)
    for size in (1, 2):
        monkeypatch.setattr(pixels_module, "TURN_BYTES", size * 72)
        made.clear()
        codec, seen, most = Counting(), [], 0
        with Decoder(codec) as decoder:
            for pixels in decoder.turns([latent(i / 10) for i in range(7)], 72, 10):
                time.sleep(0.05)  # the decoder may run ahead as far as it is let
                most = max(most, sum(one() is not None for one in made))
                seen += [int(picture[0, 0, 0]) for picture in pixels]
                del pixels
        assert seen == [round((i / 10 + 1) * 127.5) for i in range(7)]
        assert most <= 2 * size
        assert len(made) == 7


def test_nothing_handed_in_is_nothing_decoded_and_the_next_is() -> None:
    """Steps of an engine in which no sample was finished."""
    with Decoder(Codec()) as decoder:
        assert decoder.submit([]) == []
        assert decoder.decode([latent(0.0)], 10)[0].shape == (4, 6, 3)
        assert list(decoder.turns([], 72, 10)) == []


def test_a_turn_that_fails_says_so_to_who_looks() -> None:
    with Decoder(Codec()) as decoder:
        with pytest.raises(ValueError, match="seven"):
            list(decoder.turns([latent(0.0), latent(7.0)], 72, 10))
        assert len(list(decoder.turns([latent(0.0)], 72, 10))) == 1
