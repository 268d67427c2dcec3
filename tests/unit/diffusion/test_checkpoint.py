"""Policy folders: what is written opens in diffusers, what does not fit is refused with its file named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from diffusion.checkpoint import Policy, StartingWeights, load_codec, load_network, load_policy, save_policy
from diffusion.codecs import VAECodec
from diffusion.config import LoRAConfig, ModelConfig
from diffusion.families.glyph.policy import SIGNS, write_skeleton
from diffusion.families.glyph.text import GlyphTextEncoder
from diffusion.families.sd3.network import SD3Transformer
from diffusion.lora import trained_weights
from diffusion.source import CheckpointError
from diffusion.weights import WEIGHTS

COMMITTED = Path(__file__).resolve().parents[3] / "recipes" / "glyph-base"


def load(folder: Path, **keys: Any) -> Policy:
    return load_policy(ModelConfig(path=str(folder), **keys))


@pytest.fixture
def complete(policy_folder: Path) -> Path:
    """The tiny policy folder with random weights in it."""
    model = load(policy_folder, init=True).transformer
    state = {k: torch.randn_like(v) * 0.1 + (0 if "pos_embed" not in k else v) for k, v in model.state_dict().items()}
    (policy_folder / "transformer").mkdir(exist_ok=True)
    save_file(state, policy_folder / "transformer" / WEIGHTS)
    return policy_folder


def same_velocities(ours: SD3Transformer, theirs: SD3Transformer2DModel) -> None:
    """Both networks on two requests of unequal time, prompt and pooled vector, at every size up to the table's."""
    g = torch.Generator().manual_seed(0)
    config = ours.config
    for rows, columns in ((4, 12), (8, 24), (1, 1)):
        x = torch.randn(2, config.in_channels, rows * config.patch_size, columns * config.patch_size, generator=g)
        t = torch.tensor([0.13, 0.97])
        embeds, pooled = torch.randn(2, 10, config.joint_attention_dim, generator=g), torch.randn(2, config.pooled_projection_dim, generator=g)
        with torch.no_grad():
            expected = theirs(x, embeds, pooled, 1000 * t).sample
            found = ours.eval()(x, t, embeds, pooled)
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# -- the committed policy -------------------------------------------------------------------------------------------


def test_the_committed_policy_opens_in_diffusers_with_the_same_velocity() -> None:
    theirs = SD3Transformer2DModel.from_pretrained(COMMITTED, subfolder="transformer").eval()
    same_velocities(load(COMMITTED).transformer, theirs)


def test_the_committed_folder_is_the_skeleton_the_code_writes(tmp_path: Path) -> None:
    """But for the text encoder: the base was taught with version 1, whose tables it keeps to the bit."""
    write_skeleton(tmp_path)
    for name in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
        assert json.loads((COMMITTED / name).read_text()) == json.loads((tmp_path / name).read_text()), name
    GlyphTextEncoder.create(version=1).save(tmp_path / "text_encoder")
    here, there = (load_file(f / "text_encoder" / "model.safetensors") for f in (COMMITTED, tmp_path))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[k], there[k]) for k in here)


def test_the_committed_policy_is_small_and_fits_its_parts() -> None:
    model = SD3Transformer(SIGNS.config)
    assert sum(v.numel() for v in model.state_dict().values()) <= 1_800_000
    assert model.tokens((3, 32, 96)) == 8 * 24
    policy = load(COMMITTED, init=True)
    text = policy.text_encoder.encode(['a sign that says "4071"'])
    assert text.prompt_embeds.shape[-1] == policy.transformer.config.joint_attention_dim
    assert text.tensors["pooled"].shape[-1] == policy.transformer.config.pooled_projection_dim
    torch.testing.assert_close(policy.process.time_grid(2)[1], torch.tensor(SIGNS.shift / (1 + SIGNS.shift)))
    assert policy.codec.channels == policy.transformer.config.in_channels == policy.transformer.out_channels


# -- writing and reading --------------------------------------------------------------------------------------------


def test_a_saved_policy_opens_in_diffusers(complete: Path, tmp_path: Path) -> None:
    policy = load(complete)
    save_policy(tmp_path / "saved", complete, policy.transformer.state_dict())
    theirs = SD3Transformer2DModel.from_pretrained(tmp_path / "saved", subfolder="transformer").eval()
    same_velocities(policy.transformer, theirs)
    again = load(tmp_path / "saved")
    assert all(torch.equal(v, again.transformer.state_dict()[k]) for k, v in policy.transformer.state_dict().items())
    assert {p.relative_to(complete) for p in complete.rglob("*")} == {p.relative_to(tmp_path / "saved") for p in (tmp_path / "saved").rglob("*")}


def test_a_saved_policy_can_be_read_by_others(complete: Path, tmp_path: Path) -> None:
    """safetensors writes files that only their owner may read; the umask decides here, as for the files beside them."""
    save_policy(tmp_path / "saved", complete, load(complete).transformer.state_dict())
    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    assert {p.name: p.stat().st_mode for p in (tmp_path / "saved").rglob("*") if p.is_file() and p.stat().st_mode != usual} == {}


def test_what_diffusers_saves_loads_here(complete: Path, tmp_path: Path) -> None:
    theirs = SD3Transformer2DModel.from_pretrained(complete, subfolder="transformer").eval()
    copy = tmp_path / "theirs"
    shutil.copytree(complete, copy)
    shutil.rmtree(copy / "transformer")
    theirs.save_pretrained(copy / "transformer")
    same_velocities(load(copy).transformer, theirs)


def test_shards_with_an_index_load_like_one_file(complete: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    shutil.copytree(complete, sharded)
    shutil.rmtree(sharded / "transformer")
    SD3Transformer2DModel.from_pretrained(complete, subfolder="transformer").save_pretrained(sharded / "transformer", max_shard_size="40KB")
    assert (sharded / "transformer" / f"{WEIGHTS}.index.json").exists()
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 1
    whole, parts = (load(f).transformer.state_dict() for f in (complete, sharded))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_saving_replaces_a_folder_and_leaves_nothing_beside_it(complete: Path, tmp_path: Path) -> None:
    target = tmp_path / "exports" / "step-1"
    state = load(complete).transformer.state_dict()
    save_policy(target, complete, state)
    (tmp_path / "exports" / "step-1.partial").mkdir()  # left by a crash
    save_policy(target, complete, {k: v + 1 for k, v in state.items()})
    assert [p.name for p in target.parent.iterdir()] == ["step-1"]
    assert all(torch.equal(v, state[k] + 1) for k, v in load_file(target / "transformer" / WEIGHTS).items())


# -- latent codec and other networks ----------------------------------------------------------------------------------


def test_a_vae_is_read_used_and_copied(complete: Path, tmp_path: Path, tiny_vae: Callable[..., AutoencoderKL]) -> None:
    vae = tiny_vae(latent_channels=3)
    vae.save_pretrained(complete / "vae")
    policy = load(complete)
    assert isinstance(policy.codec, VAECodec)
    assert all(torch.equal(v, vae.state_dict()[k]) for k, v in policy.codec.vae.state_dict().items())
    assert policy.codec.latent_shape(16, 48)[1:] == (8, 24)
    save_policy(tmp_path / "saved", complete, policy.transformer.state_dict())
    again = AutoencoderKL.from_pretrained(tmp_path / "saved" / "vae")
    assert all(torch.equal(v, vae.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_vae_of_other_channels_is_refused(complete: Path, tiny_vae: Callable[..., AutoencoderKL]) -> None:
    tiny_vae(latent_channels=4).save_pretrained(complete / "vae")
    with pytest.raises(CheckpointError, match="the network takes latents of 3 channels, its codec makes 4"):
        load(complete)


def test_vae_weights_must_fit(complete: Path, tiny_vae: Callable[..., AutoencoderKL]) -> None:
    tiny_vae().save_pretrained(complete / "vae")
    file = complete / "vae" / WEIGHTS
    state = load_file(file)
    state.pop("decoder.conv_out.bias")
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"vae do not fit the model: 1 missing \['decoder.conv_out.bias'\]"):
        load_codec(complete)


def test_networks_load_by_their_class_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=10, freq_dim=8, ffn_dim=32, num_layers=2
    )
    theirs.save_pretrained(tmp_path / "transformer")
    model, provider = load_network(ModelConfig(path=str(tmp_path)))
    assert provider.name == "sdpa"
    x, t, embeds = torch.randn(2, 4, 3, 4, 4), torch.tensor([0.2, 0.9]), torch.randn(2, 5, 10)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, t, embeds), theirs.eval()(x, 1000 * t, embeds).sample, atol=1e-5, rtol=1e-5)


def test_random_start_follows_the_seed_and_reads_no_weights(complete: Path) -> None:
    (complete / "transformer" / WEIGHTS).write_bytes(b"never read")
    states = [load_policy(ModelConfig(path=str(complete), init=True), seed=seed).transformer.state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])


@pytest.mark.parametrize("keys", [{}, {"init": True}, {"lora": LoRAConfig(rank=2)}, {"init": True, "lora": LoRAConfig(rank=2)}], ids=str)
def test_what_is_trained_can_be_had_again_as_it_was_before_training(complete: Path, keys: dict[str, Any]) -> None:
    config = ModelConfig(path=str(complete), **keys)
    network, _ = load_network(config, seed=3)
    again = StartingWeights(network, config, 3)
    found = {name: tensor for name, _, tensor in again.pieces()}
    own = trained_weights(network)
    assert found.keys() == own.keys() == again.shapes.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in found.items())
    assert again.shapes == {name: tuple(tensor.shape) for name, tensor in own.items()}


def test_half_precision_weights_are_widened(complete: Path) -> None:
    file = complete / "transformer" / WEIGHTS
    save_file({k: v.half() for k, v in load_file(file).items()}, file)
    assert {p.dtype for p in load(complete).transformer.parameters()} == {torch.float32}


# -- refusals -------------------------------------------------------------------------------------------------------


def edit_json(name: str, **change: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **change}))

    return edit


def new_json(path: Path, **content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(folder / "transformer" / WEIGHTS)
        change(state)
        save_file(state, folder / "transformer" / WEIGHTS)

    return edit


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100]) and None


def remove(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return edit


def broken_index(folder: Path) -> None:
    transformer = folder / "transformer"
    (transformer / WEIGHTS).rename(transformer / "a.safetensors")
    (transformer / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))


BIAS = "proj_out.bias"
REFUSALS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing folder": (remove("."), ["checkpoint folder", "does not exist", "model.path"]),
    "empty vae": (lambda folder: (folder / "vae").mkdir(), ["vae/config.json does not exist"]),
    "another vae": (lambda folder: new_json(folder / "vae" / "config.json", _class_name="VQModel"), ["vae/config.json", "VQModel", "AutoencoderKL"]),
    "vae without weights": (
        lambda folder: AutoencoderKL(latent_channels=3, norm_num_groups=32).save_config(folder / "vae"),
        ["vae holds no", "download the folder again"],
    ),
    "pixels for a network of latents": (
        lambda folder: new_json(folder / "transformer" / "config.json", _class_name="WanTransformer3DModel", num_layers=1, num_attention_heads=1),
        ["the network takes latents of 16 channels", "its codec makes 3"],
    ),
    "pictures for a video network": (
        lambda folder: (
            new_json(folder / "transformer" / "config.json", _class_name="WanTransformer3DModel", num_layers=1, num_attention_heads=1),
            AutoencoderKL(latent_channels=16, norm_num_groups=32).save_config(folder / "vae"),
        ),
        ["the network takes clips", "its codec makes pictures"],
    ),
    "no class name": (lambda folder: new_json(folder / "transformer" / "config.json", num_layers=1), ["transformer is a None", "SD3Transformer2DModel"]),
    "no text encoder": (remove("text_encoder"), ["text_encoder/config.json does not exist"]),
    "another text encoder": (edit_json("text_encoder/config.json", _class_name="T5EncoderModel"), ["text_encoder is a T5EncoderModel", "GlyphTextEncoder"]),
    "no transformer config": (remove("transformer/config.json"), ["transformer/config.json does not exist"]),
    "another transformer": (
        edit_json("transformer/config.json", _class_name="FluxTransformer2DModel"),
        ["transformer is a FluxTransformer2DModel", "SD3Transformer2DModel"],
    ),
    "unknown key": (edit_json("transformer/config.json", rope_theta=1), ["transformer/config.json", "rope_theta"]),
    "wrong width": (edit_json("transformer/config.json", caption_projection_dim=5), ["transformer/config.json", "caption_projection_dim=5"]),
    "config is no JSON": (write("transformer/config.json", b"{"), ["transformer/config.json cannot be read as JSON"]),
    "config is no object": (write("transformer/config.json", b"[]"), ["transformer/config.json holds no JSON object"]),
    "config is binary": (write("transformer/config.json", b"\xff\xfe\x00"), ["transformer/config.json cannot be read as JSON"]),
    "no scheduler": (remove("scheduler"), ["scheduler/scheduler_config.json does not exist"]),
    "impossible shift": (edit_json("scheduler/scheduler_config.json", shift=0), ["scheduler_config.json", "shift"]),
    "no weights": (remove(f"transformer/{WEIGHTS}"), ["transformer", f"holds no {WEIGHTS}", "model.init=true"]),
    "missing tensor": (edit_weights(lambda s: s.pop(BIAS)), ["do not fit the model", f"1 missing ['{BIAS}']"]),
    "unexpected tensor": (edit_weights(lambda s: s.update(lora=torch.zeros(1))), ["do not fit the model", "1 unexpected ['lora']"]),
    "misshapen tensor": (edit_weights(lambda s: s.update({BIAS: torch.zeros(3)})), ["do not fit the model", f"{BIAS} (3,) instead of (48,)"]),
    "damaged weights": (truncate(f"transformer/{WEIGHTS}"), ["cannot be read", "transformer", WEIGHTS]),
    "weights are no safetensors": (write(f"transformer/{WEIGHTS}", b"pickle"), ["cannot be read", "transformer", WEIGHTS]),
    "a shard is missing": (broken_index, ["cannot be read", "b.safetensors"]),
    "damaged text encoder": (truncate("text_encoder/model.safetensors"), ["text_encoder", "model.safetensors"]),
    "no text encoder tables": (remove("text_encoder/model.safetensors"), ["text_encoder", "model.safetensors"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_folder_that_cannot_be_used_is_refused_with_the_file_named(name: str, complete: Path) -> None:
    load(complete)
    damage, words = REFUSALS[name]
    damage(complete)
    with pytest.raises(CheckpointError) as error:
        load(complete)
    for word in (complete.name, *words):
        assert word in str(error.value)
