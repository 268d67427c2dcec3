"""A whole SD3.5 folder, tiny, in the trainer: checked at start, sampled, replayed, updated, exported as a pipeline and an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from actors.conditioning import Subject
from actors.groups import group_payload, group_request
from actors.payload import decode_group, encode
from diffusion.checkpoint import load_policy
from diffusion.engine.engine import Engine
from diffusion.families.sd3.tiny import write_tiny
from diffusion.lora import PREFIX, trained_weights
from diffusion.lora import WEIGHTS as LORA_WEIGHTS
from tests.gloo import alone
from trainer.config.load import parse_config
from trainer.config.run import RunConfig
from trainer.learn.batch import StepBatch, transitions_of
from trainer.learn.exports import Exports
from trainer.learn.learner import Learner
from trainer.learn.objective import Anchors
from trainer.run.preflight import check_files, check_policy

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    with alone():
        yield


def recipe(folder: Path, prompts: Path, base: str) -> RunConfig:
    """Flow-GRPO's settings of SD3.5: guidance, its time grid, 128 T5 tokens (here 12), its adapter."""
    colours = ("red", "green", "blue", "black", "white")
    prompts.write_text("".join(f"a {one} {shape} on the {other} sign\n" for one in colours for other in colours for shape in ("circle", "square", "cat")))
    lora = {"rank": 4, "alpha": 8.0, "targets": "flow_grpo"}
    return parse_config(
        {
            "model": {"path": str(folder), "lora": lora, "grid": "diffusers", "t5_tokens": 12, "dtype": base, "base_dtype": base, "text_dtype": base},
            "prompts": {"kind": "file", "path": str(prompts)},
            "sampler": {"steps": 4, "trained_steps": [0, 1, 2], "height": 32, "width": 48, "guidance": 4.5},
            "objective": {"clip": 0.2, "data_weight": 0.3},
            "optimizer": {"lr": 1e-2, "ema": 0.9},
            "learner": {"ranks": 1},
            "evaluation": {"test_prompts": 2, "every": 0},
        }
    )


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_a_policy_with_clip_and_t5_trains_and_its_export_opens_whole(base: str, tmp_path: Path) -> None:
    write_tiny(tmp_path / "policy")
    config = recipe(tmp_path / "policy", tmp_path / "prompts.txt", base)
    check_files(config)
    check_policy(config)

    learner, policy = Learner(config, CPU), load_policy(config.model, seed=config.seed)
    text, negative = (policy.text_encoder.encode([prompt])[0] for prompt in ("a small red circle", ""))
    request = group_request(config.sampler, config.rollout, config.seed, 0, text, negative, learner.shape)
    sampled = Engine(policy.transformer, policy.process, 100_000, base).run([request])
    payload = decode_group(encode(group_payload(sampled, "a small red circle")))
    members = len(sampled)
    rows = transitions_of(payload, [(-1.0) ** i for i in range(members)], learner.kernel)
    texts = learner.encode([Subject(payload.text)])
    assert texts.prompt_embeds.shape == (1, 77 + 12, 96)
    assert texts.tensors["pooled"].equal(text.tensors["pooled"][None])
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, *learner.shape, generator=g)
    anchors = Anchors(x0, eps, torch.rand(5, generator=g), torch.ones(5), torch.zeros(5, dtype=torch.int64))

    before = {n: t.clone() for n, t in learner.full_state().items()}
    stats = learner.update([StepBatch(texts, rows, anchors, 3 * members, 5, [3 * members], [5])], 1)
    assert not stats.get("skipped")
    assert stats["ratio_deviation"] < (1e-5 if base == "float32" else 0.02)
    after = learner.full_state()
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert changed
    assert all(".lora_" in n and ".attn." in n for n in changed)

    exports = Exports(tmp_path / "exports", config.model, 0)
    exports.take(learner, 1)
    exports.finish(60)
    folder = tmp_path / "exports" / "step-000001"
    stored = {n.removeprefix(PREFIX): t for n, t in load_file(folder / LORA_WEIGHTS).items()}
    assert all(torch.equal(stored[n], after[n]) for n in trained_weights(policy.transformer))
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a small red circle", height=32, width=48, num_inference_steps=2, max_sequence_length=12).images[0]
    assert image.size == (48, 32)
    vae = Path("vae") / "diffusion_pytorch_model.safetensors"
    assert (folder / vae).samefile(tmp_path / "exports" / "step-000001-ema" / vae)
