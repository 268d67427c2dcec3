"""Adapters: a fresh one changes nothing, merged and unmerged ones compute the same, and nothing else is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from diffusion.checkpoint import load_policy, merged_policy, save_policy
from diffusion.config import LoRAConfig, ModelConfig
from diffusion.engine.engine import Engine
from diffusion.engine.request import SampleRequest
from diffusion.families.conditioning import Conditioning
from diffusion.families.sd3.network import SD3Config, SD3Transformer
from diffusion.lora import PREFIX, WEIGHTS, adapter_bytes, add_lora, merge_lora, merged_state, trained_weights, without_lora
from diffusion.processes import RectifiedFlow
from diffusion.weights import tensors_of, write_weights

Build = Callable[..., SD3Transformer]
CONFIG = LoRAConfig(rank=3, alpha=6.0)


def inputs(n: int = 2) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 8, 8, generator=g), torch.rand(n, generator=g), torch.randn(n, 5, 12, generator=g), torch.randn(n, 6, generator=g)


def adapted(tiny_model: Build, seed: int = 0, moved: bool = True) -> SD3Transformer:
    """A tiny policy with an adapter; `moved`: as after some training."""
    model = tiny_model()
    add_lora(model, CONFIG, torch.Generator().manual_seed(seed))
    if moved:
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if ".lora_B." in name:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i + seed))
    return model


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does(tiny_model: Build) -> None:
    plain = tiny_model()(*inputs())
    assert torch.equal(adapted(tiny_model, moved=False)(*inputs()), plain)
    trained = adapted(tiny_model)
    assert (trained(*inputs()) - plain).abs().max() > 0.01
    with without_lora(trained):
        assert torch.equal(trained(*inputs()), plain)
    assert (trained(*inputs()) - plain).abs().max() > 0.01


def test_only_adapters_get_gradients_and_all_of_them(tiny_model: Build) -> None:
    model = adapted(tiny_model)
    model(*inputs()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (".lora_" in name), name
        if ".lora_A." in name and "blocks.1.attn.add_q_proj" not in name:  # the last block asks nothing for the text
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0, name
    assert set(trained_weights(model)) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(trained_weights(tiny_model())) == set(tiny_model().state_dict())


@torch.no_grad()
def test_merging_computes_the_same_and_can_be_repeated(tiny_model: Build) -> None:
    model, after = adapted(tiny_model, 1), adapted(tiny_model, 2)
    expected, later = model(*inputs()), after(*inputs())
    state = {n: t.clone() for n, t in model.state_dict().items()}
    merge_lora(model)
    torch.testing.assert_close(model(*inputs()), expected, atol=1e-5, rtol=1e-5)
    merge_lora(model)  # from the base, not on top
    torch.testing.assert_close(model(*inputs()), expected, atol=1e-5, rtol=1e-5)
    model.load_state_dict(trained_weights(after), strict=False)
    merge_lora(model)
    torch.testing.assert_close(model(*inputs()), later, atol=1e-5, rtol=1e-5)
    plain = tiny_model(seed=9)
    plain.load_state_dict(merged_state(state, CONFIG))
    torch.testing.assert_close(plain(*inputs()), expected, atol=1e-5, rtol=1e-5)


def test_the_rule_of_the_adapter(tiny_model: Build) -> None:
    """W x + b + (alpha / r) B A x on one layer."""
    layer = adapted(tiny_model).transformer_blocks[0].attn.to_q
    x = torch.randn(4, 16)
    a, b = layer.lora_A.weight, layer.lora_B.weight
    assert (a.shape, b.shape) == ((3, 16), (16, 3))
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias + 2.0 * (x @ a.T) @ b.T)


def test_names_are_those_of_diffusers_adapters(tiny_model: Build) -> None:
    names = set(trained_weights(adapted(tiny_model, moved=False)))
    assert "transformer_blocks.0.attn.to_q.lora_A.weight" in names
    assert "transformer_blocks.0.attn.to_out.0.lora_B.weight" in names
    assert not any(n.startswith("transformer_blocks.1.attn.to_add_out") for n in names)  # the last block has none


def test_the_engine_swaps_adapters_alone_merged_or_not(tiny_model: Build) -> None:
    g = torch.Generator().manual_seed(0)
    text = Conditioning({"prompt_embeds": torch.randn(5, 12, generator=g), "pooled": torch.randn(6, generator=g)})
    request, process = SampleRequest((3, 8, 8), 4, conditioning=text, stochastic=frozenset({0, 1}), trained=(0, 1)), RectifiedFlow(2.0)
    new = {n: t.clone() for n, t in trained_weights(adapted(tiny_model, 5)).items()}
    done = []
    for merge in (False, True):
        engine = Engine(adapted(tiny_model, 4), process, 1000, merge=merge)
        engine.set_weights(new, 3)
        done.append(engine.run([request])[0])
    torch.testing.assert_close(done[0].latent, done[1].latent, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(Engine(adapted(tiny_model, 5), process, 1000).run([request])[0].latent, done[0].latent, atol=0, rtol=0)
    with pytest.raises(ValueError, match="do not fit the model"):
        Engine(adapted(tiny_model), process, 1000).set_weights(tiny_model().state_dict(), 4)


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
def test_an_adapter_is_merged_into_the_files_as_it_is_into_the_network(tmp_path: Path, policy_folder: Path, base_dtype: Literal["float32", "bfloat16"]) -> None:
    """Tensor by tensor, without the whole of it, to the bit; and in shards that diffusers opens."""
    from diffusers import SD3Transformer2DModel

    drawn = load_policy(ModelConfig(path=str(policy_folder), init=True)).transformer.state_dict()
    save_policy(tmp_path / "base", policy_folder, drawn)
    config = ModelConfig(path=str(tmp_path / "base"), dtype=base_dtype, base_dtype=base_dtype, lora=LoRAConfig(rank=4, alpha=8.0))
    model = load_policy(config).transformer
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if ".lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    expected = merged_state(model.state_dict(), config.lora)
    found = dict(merged_policy(tmp_path / "base", trained_weights(model), config))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items())

    folder = tmp_path / "transformer"
    folder.mkdir()
    largest = max(tensor.nbytes for tensor in expected.values())
    write_weights(folder, expected.items(), shard_bytes=2 * largest)
    assert len(list(folder.glob("diffusion_pytorch_model-0000?-of-0000?.safetensors"))) > 1
    assert max(file.stat().st_size for file in folder.glob("*.safetensors")) < 2 * largest + 20_000  # its header
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(folder))
    (folder / "any").touch()
    assert {file.stat().st_mode for file in folder.iterdir()} == {(folder / "any").stat().st_mode}  # whoever may read a file here may read these
    (folder / "config.json").write_bytes((policy_folder / "transformer" / "config.json").read_bytes())
    theirs = SD3Transformer2DModel.from_pretrained(folder, torch_dtype=getattr(torch, base_dtype)).state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in expected.items())


def test_mapped_weights_are_the_file_until_something_is_written_to_them(tmp_path: Path, policy_folder: Path) -> None:
    drawn = load_policy(ModelConfig(path=str(policy_folder), init=True)).transformer.state_dict()
    save_policy(tmp_path / "base", policy_folder, drawn)
    file = tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    config = ModelConfig(path=str(tmp_path / "base"), map_weights=True, lora=LoRAConfig(rank=4))
    mapped, copied = load_policy(config).transformer, load_policy(config.model_copy(update={"map_weights": False})).transformer
    assert all(torch.equal(a, b) for a, b in zip(mapped.state_dict().values(), copied.state_dict().values(), strict=True))
    ranges = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line]

    def in_file(tensor: torch.Tensor) -> bool:
        return any(low <= tensor.data_ptr() < high for low, high in ranges)

    assert all(in_file(tensor) == (".lora_" not in name) for name, tensor in mapped.state_dict().items())
    assert not any(map(in_file, copied.state_dict().values()))
    merge_lora(mapped)
    with torch.no_grad():
        next(mapped.parameters()).add_(1)
    assert file.read_bytes() == content


def test_a_folder_with_an_adapter_loads_in_diffusers_both_ways(tmp_path: Path, policy_folder: Path) -> None:
    """The exported folder as it is, and the policy's own network with the adapter's file on top, are our network."""
    from diffusers import SD3Transformer2DModel

    config = ModelConfig(path=str(policy_folder), init=True, lora=LoRAConfig(rank=4, alpha=8.0))
    model = load_policy(config).transformer
    for i, parameter in enumerate(model.parameters()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    state = model.state_dict()
    base = {n: t for n, t in state.items() if ".lora_" not in n}
    save_policy(tmp_path / "base", policy_folder, base)
    save_policy(tmp_path / "out", policy_folder, merged_state(state, config.lora), {WEIGHTS: adapter_bytes(state, config.lora)})
    g = torch.Generator().manual_seed(0)
    x, t, text, pooled = (
        torch.randn(2, 3, 16, 48, generator=g),
        torch.rand(2, generator=g),
        torch.randn(2, 10, 64, generator=g),
        torch.randn(2, 64, generator=g),
    )
    with torch.no_grad():
        expected = model(x, t, text, pooled)
        merged = SD3Transformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
        found = merged(hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=1000 * t).sample
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        adapted = SD3Transformer2DModel.from_pretrained(tmp_path / "base", subfolder="transformer")
        adapted.load_lora_adapter(tmp_path / "out", weight_name=WEIGHTS, prefix="transformer")
        found = adapted(hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=1000 * t).sample
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    own, stored = trained_weights(model), load_file(tmp_path / "out" / WEIGHTS)
    assert {n.removeprefix(PREFIX): torch.equal(t, own[n.removeprefix(PREFIX)]) for n, t in stored.items()} == dict.fromkeys(own, True)


SD35_MEDIUM: dict[str, Any] = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
"""The published transformer/config.json, where it differs from the class's defaults."""


@pytest.mark.parametrize(("targets", "layers", "parameters"), [("attention", 243, 23_887_872), ("flow_grpo", 191, 18_776_064)])
def test_published_sets_of_layers_have_their_published_size(targets: Any, layers: int, parameters: int) -> None:
    """On SD3.5-medium; Flow-GRPO reports 18.8 M, leaving out the second attention of the first 13 blocks."""
    with torch.device("meta"):
        model = SD3Transformer(SD3Config(**SD35_MEDIUM))
    assert sum(p.numel() for p in model.parameters()) == 2_243_171_520
    assert len(model.state_dict()) == 909
    add_lora(model, LoRAConfig(rank=32, targets=targets), torch.Generator())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * layers
    assert sum(p.numel() for p in trained.values()) == parameters
    assert any(".attn2." in n for n in trained) == (targets == "attention")


def test_adapters_are_fp32_beside_a_bf16_base(tiny_model: Build) -> None:
    """And train there: the base computes in its own type, the adapter in fp32, as near to fp32 as bf16 comes."""
    exact = adapted(tiny_model)
    model = tiny_model().to(torch.bfloat16)
    add_lora(model, CONFIG, torch.Generator())
    assert {p.dtype for n, p in model.named_parameters() if ".lora_" in n} == {torch.float32}
    model.load_state_dict(trained_weights(exact), strict=False)
    x, t, embeds, pooled = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, embeds, pooled)
        out.float().square().mean().backward()
    torch.testing.assert_close(out.float(), exact(x, t, embeds, pooled), atol=0.1, rtol=0.05)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.dtype == parameter.dtype == torch.float32, name
    merged = merged_state({n: p.detach() for n, p in model.state_dict().items()}, CONFIG)
    assert {v.dtype for v in merged.values()} == {torch.bfloat16}
    layer = model.transformer_blocks[0].attn.to_q
    low = layer.scale * (layer.lora_B.weight @ layer.lora_A.weight)
    torch.testing.assert_close(merged["transformer_blocks.0.attn.to_q.weight"], (layer.weight + low).bfloat16(), atol=0, rtol=0)
    plain = layer(x := torch.randn(4, 16).bfloat16())  # without autocast too
    assert plain.dtype == torch.bfloat16
    torch.testing.assert_close(plain.float(), exact.transformer_blocks[0].attn.to_q(x.float()), atol=0.05, rtol=0.05)


def test_a_set_of_layers_has_a_known_name_or_names_some() -> None:
    for wrong in ("attn", ()):
        with pytest.raises(ValidationError, match="targets"):
            LoRAConfig(targets=wrong)
    assert LoRAConfig().targets == "attention"


def test_an_unknown_target_is_refused_before_anything_changes(tiny_model: Build) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"model\.lora\.targets names no linear layer: to_x; layers end with .*attn\.to_q"):
        add_lora(model, LoRAConfig(targets=("to_q", "to_x")), torch.Generator())
    assert all(p.requires_grad for p in model.parameters())
    assert set(model.state_dict()) == set(tiny_model().state_dict())
