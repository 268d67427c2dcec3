"""What is trained opens in diffusers as what it is: a whole pipeline, or an adapter on the pipeline that training started from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from diffusion.checkpoint import load_policy, save_policy
from diffusion.config import LoRAConfig, ModelConfig
from diffusion.engine.generate import DiffusionEngine, SamplingParams
from diffusion.families.sd3.tiny import write_tiny
from diffusion.lora import WEIGHTS as LORA_WEIGHTS
from diffusion.lora import adapter_bytes, merge_lora, merged_state
from diffusion.seeds import INITIAL, step_noise
from diffusion.source import CheckpointError

PROMPT, PARAMS, T5_TOKENS = "a small red circle", SamplingParams(48, 80, 4, guidance=3.0), 24


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "base")
    return tmp_path / "base"


def opened(folder: Path) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: StableDiffusion3Pipeline) -> torch.Tensor:
    latent: torch.Tensor = pipeline(
        PROMPT,
        height=PARAMS.height,
        width=PARAMS.width,
        num_inference_steps=PARAMS.steps,
        sigmas=np.linspace(1, 0, PARAMS.steps + 1)[:-1],
        guidance_scale=PARAMS.guidance,
        latents=step_noise(PARAMS.seed, 0, 0, INITIAL, (16, 6, 10))[None],
        max_sequence_length=T5_TOKENS,
        output_type="latent",
    ).images[0]
    return latent


def ours(policy: Any) -> torch.Tensor:
    with DiffusionEngine(policy) as engine:
        return engine.generate([PROMPT], PARAMS)[0][0].trajectory.latent


def trained(folder: Path, lora: LoRAConfig | None = None) -> Any:
    """The policy after something was learnt, by the adapter or by all weights."""
    policy = load_policy(ModelConfig(path=str(folder), t5_tokens=T5_TOKENS, lora=lora or LoRAConfig()))
    g = torch.Generator().manual_seed(1)
    for parameter in policy.transformer.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=g)
    return policy


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_a_trained_policy_opens_as_a_whole_pipeline(base: Path, tmp_path: Path) -> None:
    policy = trained(base)
    save_policy(tmp_path / "out", base, policy.transformer.state_dict())
    assert names(tmp_path / "out") == names(base)
    expected = ours(policy)
    torch.testing.assert_close(theirs(opened(tmp_path / "out")), expected, atol=1e-4, rtol=1e-4)
    assert (theirs(opened(base)) - expected).abs().max() > 1e-2
    again = load_policy(ModelConfig(path=str(tmp_path / "out"), t5_tokens=T5_TOKENS))
    assert torch.equal(ours(again), expected)


@pytest.mark.parametrize(("rank", "alpha", "targets"), [(4, 4.0, "attention"), (4, 10.0, "flow_grpo"), (3, 1.5, ("attn.to_q", "ff.net.0.proj"))])
def test_an_adapter_opens_on_the_pipeline_it_was_trained_on(rank: int, alpha: float, targets: Any, base: Path, tmp_path: Path) -> None:
    """Equal to ours unmerged, ours merged, and the export whose network holds it merged."""
    lora = LoRAConfig(rank=rank, alpha=alpha, targets=targets)
    policy = trained(base, lora)
    state = {name: tensor.clone() for name, tensor in policy.transformer.state_dict().items()}
    save_policy(tmp_path / "out", base, merged_state(state, lora), {LORA_WEIGHTS: adapter_bytes(state, lora)})
    unmerged = ours(policy)

    pipeline = opened(base)
    before = theirs(pipeline)
    pipeline.load_lora_weights(tmp_path / "out", weight_name=LORA_WEIGHTS)
    adapted = theirs(pipeline)
    assert (adapted - before).abs().max() > 1e-3
    torch.testing.assert_close(adapted, unmerged, atol=1e-4, rtol=1e-4)
    pipeline.fuse_lora()
    torch.testing.assert_close(theirs(pipeline), unmerged, atol=1e-4, rtol=1e-4)
    merge_lora(policy.transformer)
    torch.testing.assert_close(ours(policy), unmerged, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs(opened(tmp_path / "out")), unmerged, atol=1e-4, rtol=1e-4)


def test_later_exports_share_the_frozen_weights_and_outlive_the_first(base: Path, tmp_path: Path) -> None:
    policy = trained(base)
    first, second = tmp_path / "step-1", tmp_path / "step-2"
    save_policy(first, base, policy.transformer.state_dict())
    save_policy(second, base, policy.transformer.state_dict(), earlier=first)
    for name in names(base):
        shared = (first / name).samefile(second / name)
        assert shared == (name.endswith(".safetensors") and not name.startswith("transformer")), name
        assert not (first / name).samefile(base / name), name
    shutil.rmtree(first)
    assert names(second) == names(base)
    assert torch.equal(ours(load_policy(ModelConfig(path=str(second), t5_tokens=T5_TOKENS))), ours(policy))
    save_policy(tmp_path / "step-3", base, policy.transformer.state_dict(), earlier=first)  # which is gone
    assert names(tmp_path / "step-3") == names(base)


def test_only_what_belongs_to_the_policy_is_copied(base: Path, tmp_path: Path) -> None:
    """Variants, pickles and what else lies about stay; a component of its own that the index names goes along."""
    expected = names(base)
    for name in ("vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/pytorch_model.bin", "README.md", "samples/grid.json"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"x")
    index = base / "model_index.json"
    index.write_text(index.read_text().replace('"image_encoder": [\n    null,\n    null', '"image_encoder": [\n    "transformers",\n    "SiglipVisionModel"'))
    with pytest.raises(CheckpointError, match=r"model_index\.json names image_encoder, and there is no such folder"):
        load_policy(ModelConfig(path=str(base)))
    (base / "image_encoder").mkdir()
    (base / "image_encoder" / "model.safetensors").write_bytes(b"x")
    save_policy(tmp_path / "out", base, load_policy(ModelConfig(path=str(base))).transformer.state_dict())
    assert names(tmp_path / "out") == expected | {"image_encoder/model.safetensors"}


def test_an_export_of_a_sharded_source_has_no_shards_left(base: Path, tmp_path: Path) -> None:
    pipeline = opened(base)
    pipeline.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert (tmp_path / "sharded" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists()
    policy = trained(tmp_path / "sharded")
    save_policy(tmp_path / "out", tmp_path / "sharded", policy.transformer.state_dict())
    assert names(tmp_path / "out" / "transformer") == {"config.json", "diffusion_pytorch_model.safetensors"}
    torch.testing.assert_close(theirs(opened(tmp_path / "out")), ours(policy), atol=1e-4, rtol=1e-4)
