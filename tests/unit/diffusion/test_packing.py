"""Packed streams: everything that goes in comes out, and per-request values reach their own tokens only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.packing import JointLayout, Stream

LENS = st.lists(st.integers(1, 7), min_size=1, max_size=6)
PAIRS = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=6)
EVEN_PAIRS = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 7)).map(lambda p: [(p[1], p[2])] * p[0])


def tokens(lens: tuple[int, ...], first: int = 0) -> list[torch.Tensor]:
    """Tokens that tell where they come from: request, place in the request."""
    return [torch.stack([torch.full((n,), float(i + first)), torch.arange(n).float()], 1) for i, n in enumerate(lens)]


@given(lens=LENS)
def test_unpack_is_the_inverse_of_pack(lens: list[int]) -> None:
    stream, parts = Stream(tuple(lens)), tokens(tuple(lens))
    packed = stream.pack(parts)
    assert packed.shape[0] * packed.shape[1] == stream.total == sum(lens)
    assert all(torch.equal(a, b) for a, b in zip(stream.unpack(packed), parts, strict=True))


def test_a_batch_passes_through() -> None:
    batch = torch.randn(3, 5, 2)
    assert Stream((5, 5, 5)).pack(batch) is batch


@given(lens=LENS)
def test_per_token_gives_each_token_the_value_of_its_request(lens: list[int]) -> None:
    stream = Stream(tuple(lens))
    packed = stream.pack(tokens(tuple(lens)))
    values = torch.arange(len(lens)).float()[:, None]
    assert torch.equal((packed * 0 + stream.per_token(values))[..., 0], packed[..., 0])


@given(pairs=st.one_of(PAIRS, EVEN_PAIRS))
def test_join_lays_text_after_image_and_split_undoes_it(pairs: list[tuple[int, int]]) -> None:
    images, texts = (tuple(n) for n in zip(*pairs, strict=True))
    layout = JointLayout(Stream(images), Stream(texts))
    image, text = layout.image.pack(tokens(images)), layout.text.pack(tokens(texts, first=100))

    joint = layout.join(image, text)
    expected = [part for pair in zip(tokens(images), tokens(texts, first=100), strict=True) for part in pair]
    assert torch.equal(joint, torch.cat(expected)[None])
    assert layout.lens == [a + b for a, b in pairs]

    back_image, back_text = layout.split(joint)
    assert torch.equal(back_image, image)
    assert torch.equal(back_text, text)


@given(pairs=PAIRS)
def test_join_carries_heads_along(pairs: list[tuple[int, int]]) -> None:
    images, texts = (tuple(n) for n in zip(*pairs, strict=True))
    layout = JointLayout(Stream(images), Stream(texts))
    image = layout.image.pack([torch.randn(n, 2, 3) for n in images])
    text = layout.text.pack([torch.randn(n, 2, 3) for n in texts])
    joint = layout.join(image, text)
    assert joint.shape == (1, sum(layout.lens), 2, 3)
    back_image, back_text = layout.split(joint)
    assert torch.equal(back_image, image)
    assert torch.equal(back_text, text)


def test_streams_of_unequal_count_are_refused() -> None:
    with pytest.raises(ValueError, match="2 image requests but 1 text requests"):
        JointLayout(Stream((4, 4)), Stream((3,)))
