"""Parameter counts of published policies, and which recipes have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from diffusion.checkpoint import load_policy, load_text_encoder
from diffusion.config import LoRAConfig, ModelConfig
from diffusion.families.cosmos.text import CosmosTextEncoder
from diffusion.families.cosmos.tiny import write_tiny as write_cosmos
from diffusion.lora import trained_weights
from trainer.config.errors import ConfigError
from trainer.config.load import parse_config
from trainer.plan.assumptions import Assumptions, parse_assumptions
from trainer.plan.published import GLYPH, PUBLISHED
from trainer.plan.sizes import Sizes, encoder_parameters, prompt_tokens, sizes_of

MEDIUM = "stabilityai/stable-diffusion-3.5-medium"


def sizes(path: str, side: int, rank: int = 0, **assumed: Any) -> Sizes:
    tree = {"model": {"path": path, "lora": {"rank": rank}}, "sampler": {"height": side, "width": side}}
    return sizes_of(parse_config(tree), Assumptions(**assumed))


@pytest.mark.parametrize(
    ("name", "parameters", "buffers", "adapter"),
    [  # parameters and table: counted of diffusers' SD3Transformer2DModel on the meta device
        ("stabilityai/stable-diffusion-3-medium-diffusers", 2_028_328_000, 56_623_104, 18_776_064),
        (MEDIUM, 2_243_171_520, 226_492_416, 23_887_872),
        ("stabilityai/stable-diffusion-3.5-large", 8_056_627_520, 89_653_248, 47_161_344),
    ],
)
def test_published_networks(name: str, parameters: int, buffers: int, adapter: int) -> None:
    found = sizes(name, 512, rank=32)
    assert found.transformer.parameters - found.transformer.trained == parameters
    assert (found.transformer.buffers, found.transformer.trained) == (buffers, adapter)
    assert found.published_values == adapter
    assert found.root + sum(found.blocks) == found.transformer.parameters


def test_everything_around_the_network() -> None:
    found = sizes(MEDIUM, 512)
    assert found.vae is not None
    assert found.vae.parameters == 83_819_683
    assert [e.parameters for e in found.encoders] == [123_650_304, 694_659_840, 4_762_310_656]
    assert (found.shape, found.prompt, found.tokens) == ((16, 64, 64), (333, 4096, 2048), 1024 + 333)
    assert sizes(MEDIUM, 512, prompt_tokens=205).tokens == 1024 + 205


@pytest.mark.parametrize("base", GLYPH)
def test_the_glyph_bases_are_what_is_loaded(base: str) -> None:
    policy = load_policy(ModelConfig(path=f"recipes/{base}", lora={"rank": 4}, init=True))
    found, text = sizes(f"recipes/{base}", 48, rank=4), policy.text_encoder.encode(["a sign"])
    assert found.published_values == sum(t.numel() for t in trained_weights(policy.transformer).values())
    assert found.transformer.values == sum(t.numel() for t in policy.transformer.state_dict().values())
    assert found.prompt == (*text.prompt_embeds.shape[1:], text.tensors["pooled"].shape[1] if "pooled" in text.tensors else 0)
    assert sizes(base, 48).transformer == sizes(f"recipes/{base}", 48).transformer


def test_encoders_count_as_transformers_builds_them() -> None:
    clip: dict[str, Any] = {
        "vocab_size": 60,
        "max_position_embeddings": 9,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "projection_dim": 12,
    }
    t5: dict[str, Any] = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 20, "num_heads": 3, "num_layers": 2, "feed_forward_proj": "gated-gelu"}
    with torch.device("meta"):
        models = {
            "CLIPTextModelWithProjection": transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**clip, num_attention_heads=2)),
            "T5EncoderModel": transformers.T5EncoderModel(transformers.T5Config(**t5)),
            "UMT5EncoderModel": transformers.UMT5EncoderModel(transformers.UMT5Config(**t5)),
        }
    for name, model in models.items():
        values = {**(clip if "CLIP" in name else t5), "architectures": [name]}
        assert encoder_parameters(values) == sum(p.numel() for p in set(model.parameters())), name


def test_prompt_tokens() -> None:
    parts = PUBLISHED[MEDIUM]
    assert prompt_tokens(parts["text_encoder"], 256) + prompt_tokens(parts["text_encoder_3"], 256) == 333
    assert prompt_tokens({"architectures": ["UMT5EncoderModel"], "d_model": 4096}, 256) == 512
    assert sizes_of(parse_config({"model": {"path": MEDIUM, "t5_tokens": 128}}), Assumptions()).prompt == (205, 4096, 2048)


def test_a_video_network_has_frames(tmp_path: Path) -> None:
    for part, values in {
        "transformer": {"_class_name": "WanTransformer3DModel", "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        "vae": {"_class_name": "AutoencoderKLWan"},
        "text_encoder": {
            "architectures": ["UMT5EncoderModel"],
            "vocab_size": 256384,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_heads": 64,
            "num_layers": 24,
            "feed_forward_proj": "gated-gelu",
        },
    }.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(values))
    tree = {"model": {"path": str(tmp_path)}, "sampler": {"height": 240, "width": 416, "frames": 33}}
    found = sizes_of(parse_config(tree), Assumptions())
    assert (found.transformer.parameters, found.shape, found.tokens) == (1_418_996_800, (16, 9, 30, 52), 3510)
    assert found.encoders[0].parameters == 5_680_910_336
    assert found.prompt == (512, 4096, 0)


@pytest.mark.parametrize(
    ("path", "side", "message"),
    [
        ("no/such-policy", 512, "neither a folder nor a published policy"),
        (MEDIUM, 500, "500x500 pixels are no multiple of 8"),
        (MEDIUM, 504, "not a multiple of the patch"),
        (MEDIUM, 8192, "exceed pos_embed_max_size"),
    ],
)
def test_mistakes_are_said(path: str, side: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sizes(path, side)


def test_assumptions_name_the_nearest_key() -> None:
    assert parse_assumptions(["usable=0.8", "prompt_tokens=5"]) == Assumptions(usable=0.8, prompt_tokens=5)
    with pytest.raises(ConfigError, match="did you mean 'usable'"):
        parse_assumptions(["usabel=0.8"])
    with pytest.raises(ConfigError, match="--assume usable"):
        parse_assumptions(["usable=2"])


def test_the_language_model_of_cosmos() -> None:
    """Of Cosmos-Reason1-7B, as published and as transformers 5 writes it; and of a tiny one, counted."""
    language = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    name = {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    assert encoder_parameters({**name, **language}) == encoder_parameters({**name, "text_config": language}) == 7_070_619_136
    assert prompt_tokens({**name, "max_position_embeddings": 128000}, 256) == 512


def test_a_cosmos_folder_is_planned_with_what_is_in_it(tmp_path: Path) -> None:
    write_cosmos(tmp_path)
    tree: dict[str, Any] = {"model": {"path": str(tmp_path)}, "sampler": {"height": 32, "width": 48, "frames": 9}}
    whole, adapted = (sizes_of(parse_config({**tree, "model": {**tree["model"], **more}}), Assumptions()) for more in ({}, {"lora": {"rank": 4}}))
    policy = load_policy(ModelConfig(path=str(tmp_path)))
    assert isinstance(policy.text_encoder, CosmosTextEncoder)
    assert whole.encoders[0].parameters == sum(p.numel() for p in policy.text_encoder.model.parameters())
    assert whole.shape == policy.codec.latent_shape(32, 48, 9)
    for sizes, more in ((whole, {}), (adapted, {"lora": LoRAConfig(rank=4)})):
        encoded = load_text_encoder(tmp_path, ModelConfig(path=str(tmp_path), **more)).encode(["a cat"]).prompt_embeds
        assert sizes.prompt[:2] == tuple(encoded.shape[1:])
