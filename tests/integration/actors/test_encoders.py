"""Encoder actors on a real Ray: shared out, killed, refusing, silent."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.config import EncoderConfig
from actors.encoding import Encoder, EncoderUnavailable, SharedTextEncoder
from diffusion.checkpoint import load_text_encoder
from diffusion.config import ModelConfig

DEADLINE_S = 120.0
BASE = Path(__file__).resolve().parents[3] / "recipes" / "glyph-base"
MODEL = ModelConfig(path=str(BASE))
PROMPTS = [f'a sign that says "{i}"' for i in range(12)]
pytestmark = pytest.mark.usefixtures("ray_cluster")


class Silent:
    def encode(self, prompts: list[str]) -> None:
        time.sleep(5)


class Broken:
    def encode(self, prompts: list[str]) -> None:
        raise MemoryError("no room")


@pytest.fixture
def actors() -> Iterator[list[Any]]:
    made = [ray.remote(Encoder).options(num_cpus=0.1, max_restarts=-1, max_task_retries=-1).remote(MODEL, EncoderConfig(actors=2)) for _ in range(2)]
    yield made
    for actor in made:
        ray.kill(actor)


def test_prompts_are_shared_out_and_come_back_in_order_though_encoders_die(actors: list[Any]) -> None:
    shared, own = SharedTextEncoder(actors, DEADLINE_S), load_text_encoder(BASE, MODEL)
    expected = own.encode(PROMPTS)
    found = shared.encode(PROMPTS)
    assert torch.equal(found.prompt_embeds, expected.prompt_embeds)
    assert torch.equal(found.tensors["pooled"], expected.tensors["pooled"])
    with pytest.raises(ValueError, match="0123456789"):
        shared.encode([PROMPTS[0], 'a sign that says "0123456789"'])
    assert shared.signature(PROMPTS[0]) == own.signature(PROMPTS[0])
    pids = ray.get([actor.pid.remote() for actor in actors], timeout=DEADLINE_S)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert torch.equal(shared.encode(PROMPTS).prompt_embeds, expected.prompt_embeds)
    assert not {*pids} & {*ray.get([actor.pid.remote() for actor in actors], timeout=DEADLINE_S)}


@pytest.mark.parametrize(
    ("kind", "words"), [(Silent, r"no answer of the Encoder actors within 0 s; add some \(encoder\.actors\)"), (Broken, "MemoryError: no room")]
)
def test_an_encoder_that_gives_no_answer_is_told_from_a_prompt_that_does_not_fit(kind: type, words: str) -> None:
    actor = ray.remote(kind).options(num_cpus=0.1).remote()
    with pytest.raises(EncoderUnavailable, match=words):
        SharedTextEncoder([actor], 0.3 if kind is Silent else DEADLINE_S).encode(PROMPTS)
    ray.kill(actor)
    with pytest.raises(EncoderUnavailable, match="an Encoder died"):
        SharedTextEncoder([actor], DEADLINE_S).encode(PROMPTS)
