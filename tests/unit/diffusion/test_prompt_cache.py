"""Encoded prompts: encoded once, bounded in bytes, the least recently used leave first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.engine.cache import PromptCache
from diffusion.families.conditioning import Conditioning

EACH = 4 * (2 * 3 + 2)
"""Bytes of one encoded prompt of `Encoder`."""


class Encoder:
    """Two tokens of three values a prompt, made of its letters; refuses an empty prompt."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def encode(self, prompts: list[str]) -> Conditioning:
        if "" in prompts:
            raise ValueError("prompt '' is empty")
        self.batches.append(prompts)
        numbers = torch.tensor([float(sum(map(ord, p))) for p in prompts])
        return Conditioning({"prompt_embeds": numbers[:, None, None].expand(-1, 2, 3), "pooled": numbers[:, None].expand(-1, 2)})


def test_only_new_prompts_are_encoded_and_in_one_batch() -> None:
    encoder = Encoder()
    cache = PromptCache(encoder)
    first = cache.get(["a", "b", "a"])
    assert encoder.batches == [["a", "b"]]
    assert first[0] is first[2]
    assert cache.get(["c", "b"])[1] is first[1]
    assert encoder.batches == [["a", "b"], ["c"]]
    assert (cache.hits, cache.misses, len(cache), cache.nbytes) == (2, 3, 3, 3 * EACH)


@given(asked=st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=4), max_size=20), room=st.integers(0, 5))
def test_what_comes_out_is_right_and_the_bound_holds(asked: list[list[str]], room: int) -> None:
    cache = PromptCache(Encoder(), max_bytes=room * EACH + 1)
    recent: list[str] = []
    for prompts in asked:
        for prompt, found in zip(prompts, cache.get(prompts), strict=True):
            assert found.tensors["pooled"].tolist() == [ord(prompt)] * 2
        assert cache.nbytes == len(cache) * EACH <= cache.max_bytes
        recent = [p for p in recent if p not in prompts] + list(dict.fromkeys(prompts))
    assert cache.hits + cache.misses == sum(map(len, asked))


def test_the_least_recently_used_prompt_leaves_first() -> None:
    encoder = Encoder()
    cache = PromptCache(encoder, max_bytes=2 * EACH)
    for prompt in "abac":  # b is older than a when c comes
        cache.get([prompt])
    cache.get(["a"])
    cache.get(["b"])
    assert encoder.batches == [["a"], ["b"], ["c"], ["b"]]


def test_a_prompt_holds_no_other_prompts_memory() -> None:
    one = PromptCache(Encoder()).get(["a", "b"])[0]
    assert one.prompt_embeds.untyped_storage().nbytes() == 4 * 6


def test_a_refused_prompt_leaves_nothing_behind() -> None:
    cache = PromptCache(Encoder())
    with pytest.raises(ValueError, match="is empty"):
        cache.get(["a", ""])
    assert (len(cache), cache.nbytes) == (0, 0)
