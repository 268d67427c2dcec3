"""Clips through the learner, on the Wan network: the update is the gradient of the whole sum, as for pictures.

`open_policy` refuses video policies (there is no codec yet), so the parts of one are put together here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.learn.learner
from actors.groups import group_payload
from actors.payload import decode_group, encode
from diffusion.attention import resolve_provider
from diffusion.checkpoint import Skeleton
from diffusion.codecs import IdentityCodec
from diffusion.engine.engine import Engine
from diffusion.engine.request import SampleRequest
from diffusion.families.conditioning import Conditioning
from diffusion.families.glyph.text import GlyphTextEncoder
from diffusion.kernels import make_kernel
from diffusion.processes import RectifiedFlow
from diffusion.source import Source
from tests.gloo import alone
from tests.unit.diffusion.test_wan import wan
from trainer.config.load import parse_config
from trainer.learn.batch import StepBatch, transitions_of
from trainer.learn.checkpoint import save_shards
from trainer.learn.learner import Learner
from trainer.learn.objective import Anchors, data_terms, policy_terms

CPU, SHAPE, PROCESS = torch.device("cpu"), (4, 3, 4, 4), RectifiedFlow(3.0)
PARTS: dict[str, Any] = {"flow_sde": {"kernel": "flow_sde", "noise_level": 0.7}, "edm_2ab": {"kernel": "edm_2ab", "noise_level": 1.0}}


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    with alone():
        yield


def video_policy(*_: Any) -> Skeleton:
    return Skeleton(wan(), IdentityCodec(), PROCESS, resolve_provider("auto", CPU, torch.float32), Source(Path()))


@pytest.mark.parametrize("kernel", PARTS)
@pytest.mark.parametrize("micro_batch", [2, 100])
def test_an_update_on_clips_is_the_gradient_of_the_whole_sum(kernel: str, micro_batch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trainer.learn.learner, "open_policy", video_policy)
    monkeypatch.setattr(trainer.learn.learner, "load_text_encoder", lambda *_: GlyphTextEncoder.create())
    monkeypatch.setattr(trainer.learn.learner, "fill_network", lambda *_: None)
    config = parse_config(
        {
            "sampler": {"steps": 4, "trained_steps": [0, 1], **PARTS[kernel]},
            "objective": {"clip": 0.2, "data_weight": 0.3},
            "learner": {"ranks": 1, "micro_batch": micro_batch},
        }
    )
    made, g = Learner(config, CPU), torch.Generator().manual_seed(0)
    texts = Conditioning({"prompt_embeds": torch.randn(6, 6, 10, generator=g)})  # the first is the rollouts'
    request = SampleRequest(
        SHAPE, steps=4, conditioning=texts[0], n=3, kernel=kernel, noise_level=config.sampler.noise_level, stochastic=frozenset({0, 1}), trained=(0, 1)
    )
    sampled = Engine(wan(), PROCESS, 10_000).run([request])
    payload = decode_group(encode(group_payload(sampled, "")))
    rows = transitions_of(payload, [1.0, -0.5, 0.2], make_kernel(kernel, PROCESS, config.sampler.noise_level, 4))
    assert rows.x.shape == (6, *SHAPE)
    x0, eps = torch.randn(2, 5, *SHAPE, generator=g)
    anchors = Anchors(x0, eps, torch.rand(5, generator=g), torch.ones(5), torch.arange(1, 6))
    batch = StepBatch(texts, rows, anchors, 6, 5, [6], [5])

    plain = copy.deepcopy(wan())
    space = made.kernel.process
    prediction = plain(space.model_input(rows.x, rows.t), space.model_time(rows.t), **batch.conditioning_of(rows).tensors)
    assert isinstance(prediction, torch.Tensor)
    loss, _ = policy_terms(prediction, None, rows, made.kernel, config.objective)
    noised = plain(PROCESS.noise(anchors.x0, anchors.eps, anchors.t), anchors.t, **batch.conditioning_of(anchors).tensors)
    assert isinstance(noised, torch.Tensor)
    data = data_terms(noised, anchors, PROCESS)
    (loss / 6 + 0.3 * data / 5).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])

    before = made.full_state()
    stats = made.update([batch], 1)
    assert stats["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert stats["data_loss"] == pytest.approx(float(data.detach()) / 5, rel=1e-5)
    assert stats["ratio_deviation"] == pytest.approx(0, abs=1e-4)
    after = made.full_state()
    assert any(not torch.equal(before[n], after[n]) for n in before)
    save_shards(made.shards(), tmp_path / "checkpoint")
    restored = Learner(config, CPU)
    restored.load(tmp_path / "checkpoint")
    assert all(torch.equal(after[n], value) for n, value in restored.full_state().items())
