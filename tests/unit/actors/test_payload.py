"""The wire format: what is encoded comes back, what is damaged does not."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from actors.payload import FORMAT, DataPayload, GroupPayload, PayloadError, decode_data, decode_group, encode

SIZE = st.integers(1, 4)


def group(n: int = 2, k: int = 3, c: int = 3, h: int = 4, w: int = 5, tokens: int = 6, dim: int = 2, pooled: int = 3, seed: int = 0) -> GroupPayload:
    g = torch.Generator().manual_seed(seed)
    return GroupPayload(
        x=torch.randn(n, k, c, h, w, generator=g),
        x_next=torch.randn(n, k, c, h, w, generator=g),
        log_prob=torch.randn(n, k, generator=g, dtype=torch.float64),
        trained=torch.arange(k),
        times=torch.linspace(1, 0, k + 2),
        prompt_embeds=torch.randn(tokens, dim, generator=g),
        pooled=torch.randn(pooled, generator=g),
    )


def two_step(frames: int = 0, seed: int = 0) -> GroupPayload:
    """A group of a two-step kernel; with `frames`, of video."""
    plain = group(seed=seed)
    if frames:
        clip = torch.randn(2, 3, 3, frames, 4, 5, generator=torch.Generator().manual_seed(seed))
        return replace(plain, x=clip, x_next=clip + 1, previous=clip - 1)
    return replace(plain, previous=plain.x - 1)


def data(rows: int = 3, tokens: int = 6, seed: int = 0) -> DataPayload:
    g = torch.Generator().manual_seed(seed)
    return DataPayload(torch.randn(rows, 3, 4, 5, generator=g), torch.randn(rows, tokens, 2, generator=g), torch.randn(rows, 3, generator=g))


def equal(a: GroupPayload | DataPayload, b: GroupPayload | DataPayload) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]
    return type(a) is type(b) and all(p is q is None or (p is not None and q is not None and torch.equal(p, q)) for p, q in pairs)


@given(n=SIZE, k=SIZE, c=SIZE, h=SIZE, w=SIZE, tokens=SIZE, dim=SIZE, pooled=SIZE, seed=st.integers(0, 99))
@settings(max_examples=50)
def test_a_group_comes_back(n: int, k: int, c: int, h: int, w: int, tokens: int, dim: int, pooled: int, seed: int) -> None:
    payload = group(n, k, c, h, w, tokens, dim, pooled, seed)
    assert equal(decode_group(encode(payload)), payload)


@given(rows=SIZE, tokens=SIZE, seed=st.integers(0, 99))
@settings(max_examples=25)
def test_a_data_batch_comes_back(rows: int, tokens: int, seed: int) -> None:
    payload = data(rows, tokens, seed)
    assert equal(decode_data(encode(payload)), payload)


@pytest.mark.parametrize("frames", [0, 1, 3])
def test_predictions_of_the_step_before_and_video_come_back(frames: int) -> None:
    payload = two_step(frames)
    assert equal(decode_group(encode(payload)), payload)
    without = replace(payload, previous=None)
    back = decode_group(encode(without))
    assert back.previous is None
    assert equal(back, without)
    clips = DataPayload(torch.zeros(2, 3, 4, 5, 6), torch.zeros(2, 6, 2), torch.zeros(2, 3))
    assert equal(decode_data(encode(clips)), clips)


def test_views_and_non_finite_values_come_back() -> None:
    payload = group()
    views = replace(payload, x=payload.x.transpose(3, 4).contiguous().transpose(3, 4), prompt_embeds=payload.prompt_embeds[:1].expand(6, 2))
    assert equal(decode_group(encode(views)), views)
    odd = replace(payload, log_prob=torch.tensor([[torch.inf, -torch.inf, 1e-45]] * 2, dtype=torch.float64))
    assert equal(decode_group(encode(odd)), odd)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"\xff" * 40, lambda b: b[8:], lambda b: b + b"x"])
def test_damaged_bytes_are_refused(damage: object) -> None:
    for payload, decode in ((group(), decode_group), (data(), decode_data)):
        with pytest.raises(PayloadError, match="payload is not safetensors"):
            decode(damage(encode(payload)))  # type: ignore[operator]


@given(cut=st.integers(0, 400))
@settings(max_examples=40)
def test_a_cut_anywhere_is_noticed(cut: int) -> None:
    whole = encode(data())
    with pytest.raises(PayloadError):
        decode_data(whole[: min(cut, len(whole) - 1)])


@pytest.mark.parametrize("version", [None, [FORMAT + 1], [FORMAT, FORMAT]])
def test_another_version_is_refused(version: list[int] | None) -> None:
    tensors = load(encode(group()))
    del tensors["format"]
    if version is not None:
        tensors["format"] = torch.tensor(version)
    with pytest.raises(PayloadError, match="it was written by another version of ddrl"):
        decode_group(save(tensors))


def test_the_other_kind_is_refused() -> None:
    with pytest.raises(PayloadError, match="GroupPayload needs tensors of dimensions"):
        decode_group(encode(data()))
    with pytest.raises(PayloadError, match="DataPayload needs tensors of dimensions"):
        decode_data(encode(group()))


CLASHES = {
    "x_next of another shape": {"x_next": torch.zeros(2, 3, 3, 4, 4)},
    "log_prob of another group": {"log_prob": torch.zeros(3, 3, dtype=torch.float64)},
    "other trained steps": {"trained": torch.arange(2)},
    "a dimension too few": {"pooled": torch.zeros(())},
    "predictions of another shape": {"previous": torch.zeros(2, 3, 3, 4, 4)},
    "predictions of video": {"previous": torch.zeros(2, 3, 3, 2, 4, 5)},
    "states of video, next states of images": {"x": torch.zeros(2, 3, 3, 2, 4, 5)},
}


@pytest.mark.parametrize("name", CLASHES)
def test_clashing_shapes_are_refused(name: str) -> None:
    with pytest.raises(PayloadError):
        decode_group(encode(replace(group(), **CLASHES[name])))


def test_data_rows_without_conditioning_are_refused() -> None:
    with pytest.raises(PayloadError):
        decode_data(encode(replace(data(), pooled=torch.zeros(2, 3))))


@pytest.mark.parametrize("change", [{"x": group().x.double()}, {"trained": torch.arange(3).float()}, {"log_prob": group().log_prob.bfloat16()}])
def test_other_types_than_the_tables_are_refused(change: dict[str, torch.Tensor]) -> None:
    with pytest.raises(PayloadError, match=r"float32|int64|f32|i64"):
        decode_group(encode(replace(group(), **change)))
