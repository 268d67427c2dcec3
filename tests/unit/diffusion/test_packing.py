"""Packed streams: everything that goes in comes out, and per-request values reach their own tokens only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.packing import Layout, Stream, layout, rung

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
    layout = Layout(Stream(images), Stream(texts))
    image, text = layout.image.pack(tokens(images)), layout.text.pack(tokens(texts, first=100))

    joint = layout.join(image, text)
    expected = [part for pair in zip(tokens(images), tokens(texts, first=100), strict=True) for part in pair]
    assert torch.equal(joint, torch.cat(expected)[None])
    assert layout.joint.q_lens == tuple(a + b for a, b in pairs)

    back_image, back_text = layout.split(joint)
    assert torch.equal(back_image, image)
    assert torch.equal(back_text, text)


@given(pairs=PAIRS)
def test_join_carries_heads_along(pairs: list[tuple[int, int]]) -> None:
    images, texts = (tuple(n) for n in zip(*pairs, strict=True))
    layout = Layout(Stream(images), Stream(texts))
    image = layout.image.pack([torch.randn(n, 2, 3) for n in images])
    text = layout.text.pack([torch.randn(n, 2, 3) for n in texts])
    joint = layout.join(image, text)
    assert joint.shape == (1, layout.joint.totals[0], 2, 3)
    back_image, back_text = layout.split(joint)
    assert torch.equal(back_image, image)
    assert torch.equal(back_text, text)


def test_streams_of_unequal_count_are_refused() -> None:
    with pytest.raises(ValueError, match="2 image requests but 1 text requests"):
        Layout(Stream((4, 4)), Stream((3,)))


# -- padding ------------------------------------------------------------------------------------------------------------


@given(tokens=st.integers(1, 10**6), per_octave=st.sampled_from([8, 16, 64]))
def test_a_rung_holds_its_tokens_and_wastes_less_than_its_share(tokens: int, per_octave: int) -> None:
    size = rung(tokens, per_octave)
    assert tokens <= size < tokens * (1 + 1 / per_octave)
    assert rung(size, per_octave) == size


@pytest.mark.parametrize("per_octave", [8, 16])
def test_an_octave_has_as_many_rungs_as_asked(per_octave: int) -> None:
    assert len({rung(n, per_octave) for n in range(4097, 8193)}) == per_octave
    assert rung(4096, per_octave) == 4096


def test_too_coarse_a_ladder_is_refused() -> None:
    with pytest.raises(ValueError, match="4 bucket sizes an octave would pad by more than 1/8; set buckets to 8 or more"):
        rung(100, 4)


@given(pairs=st.one_of(PAIRS, EVEN_PAIRS), padding=st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_padded_streams_keep_every_token_and_end_in_zeros(pairs: list[tuple[int, int]], padding: tuple[int, int]) -> None:
    images, texts = (tuple(n) for n in zip(*pairs, strict=True))
    layout = Layout(Stream(images, padding[0]), Stream(texts, padding[1]))
    image, text = layout.image.pack(tokens(images)), layout.text.pack(tokens(texts, first=100))
    assert image.shape == (1, layout.image.size, 2)
    assert not image[0, layout.image.total :].any()
    assert all(torch.equal(a, b) for a, b in zip(layout.image.unpack(image), tokens(images), strict=True))
    assert torch.equal(layout.image.unflat(layout.image.flat(image)), image)

    image[:, layout.image.total :] = text[:, layout.text.total :] = torch.nan  # nothing reads it
    joint = layout.join(image, text)
    assert torch.equal(joint, Layout(Stream(images), Stream(texts)).join(Stream(images).pack(tokens(images)), Stream(texts).pack(tokens(texts, first=100))))
    back_image, back_text = layout.split(joint)
    assert torch.equal(back_image, layout.image.pack(tokens(images)))
    assert torch.equal(back_text, layout.text.pack(tokens(texts, first=100)))


@given(lens=LENS, padding=st.integers(0, 5))
def test_padding_has_an_owner_of_its_own(lens: list[int], padding: int) -> None:
    stream = Stream(tuple(lens), padding)
    owner = stream.owner(torch.device("cpu"))
    assert owner is not None
    assert owner.tolist() == [i for i, n in enumerate([*lens, padding]) for _ in range(n)]
    values = torch.arange(len(lens) + 1).float()[:, None]
    assert torch.equal(stream.per_token(values)[0, :, 0], owner.float())


def test_a_batch_of_equal_requests_packs_like_a_list() -> None:
    batch = torch.randn(3, 5, 2)
    assert torch.equal(Stream((5, 5, 5), 2).pack(batch), Stream((5, 5, 5), 2).pack(list(batch)))


def test_layouts_are_remembered_and_fit_for_autograd() -> None:
    with torch.inference_mode():
        made = layout((3, 4), (2, 2), None)
        order = made.join(torch.zeros(1, 7, 1), torch.zeros(2, 2, 1))
    assert order.shape == (1, 11, 1)
    assert layout((3, 4), (2, 2), None) is made
    image = torch.randn(1, 7, 1, requires_grad=True)
    made.split(made.join(image, torch.zeros(2, 2, 1)) * made.image.per_token(torch.ones(2, 1)).sum())[0].sum().backward()
    assert image.grad is not None
    assert layout((3, 4), (2, 2), 8).image.size == 7
    assert layout((30, 40), (2, 2), 8).image.size == 72
