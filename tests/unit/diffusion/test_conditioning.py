"""Conditioning: named tensors of one example or of several, and how examples share a forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusion.families.conditioning import Conditioning, collisions, digest_of, gathered, stacked


def example(number: float, length: int = 3) -> Conditioning:
    return Conditioning({"prompt_embeds": torch.full((length, 2), number, dtype=torch.float32), "frame": torch.full((4, 1), -number, dtype=torch.float32)})


def test_several_examples_are_one_with_a_dimension_in_front() -> None:
    many = stacked([example(1), example(2), example(3)])
    assert {name: tuple(tensor.shape) for name, tensor in many.tensors.items()} == {"prompt_embeds": (3, 3, 2), "frame": (3, 4, 1)}
    assert many.tokens == example(1).tokens == 3
    assert many.nbytes == 3 * example(1).nbytes == 3 * (6 + 4) * 4
    chosen = many.rows(torch.tensor([2, 0, 2]))
    assert chosen.prompt_embeds[:, 0, 0].tolist() == [3, 1, 3]
    assert chosen.tensors["frame"][:, 0, 0].tolist() == [-3, -1, -3]
    assert many.rows(slice(1, 3)).prompt_embeds[:, 0, 0].tolist() == [2, 3]


def test_an_example_of_several_has_memory_of_its_own() -> None:
    many = stacked([example(1), example(2)])
    one = many[1]
    assert digest_of(one) == digest_of(example(2)) != digest_of(example(1))
    one.prompt_embeds.zero_()
    assert many.prompt_embeds[1].eq(2).all()
    with pytest.raises(IndexError):
        many[2]


def test_one_example_for_many_rows_is_no_copy() -> None:
    one = example(5)
    wide = one.expand(7)
    assert wide.prompt_embeds.shape == (7, 3, 2)
    assert wide.prompt_embeds.data_ptr() == one.prompt_embeds.data_ptr()


def test_examples_of_other_shapes_are_a_list_in_a_pass() -> None:
    packed = gathered([example(1, 3), example(2, 5)])
    assert isinstance(packed["frame"], Tensor)
    assert packed["frame"].shape == (2, 4, 1)
    assert [len(text) for text in packed["prompt_embeds"]] == [3, 5]
    with pytest.raises(ValueError, match="examples differ in the shape of prompt_embeds"):
        stacked([example(1, 3), example(2, 5)])


def test_examples_of_other_names_cannot_share_a_pass() -> None:
    text = Conditioning({"prompt_embeds": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="need tensors of the same names"):
        gathered([example(1), text])
    with pytest.raises(ValueError, match="need tensors of the same names"):
        stacked([])


def test_texts_that_become_the_same_are_found() -> None:
    assert collisions(lambda text: text.lower().encode(), ["A", "b", "a", "A", "c"]) == [["A", "a"]]
