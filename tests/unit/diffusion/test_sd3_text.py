"""The text encoders of SD3 are those of diffusers' pipeline, on whole folders with tiny weights."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from diffusion.checkpoint import CheckpointError, load_policy
from diffusion.config import ModelConfig
from diffusion.families.conditioning import collisions, digest_of
from diffusion.families.sd3.text import SD3TextEncoder
from diffusion.families.sd3.tiny import WIDTH, clip_tokenizer, write_tiny

LONG = "a small red circle on the large black square and a cat in the sign of WINTER 1234567890 " * 4
PROMPTS = ["a red circle", "", "Übung,  42!\n", LONG]


@pytest.fixture(scope="module", params=[True, False], ids=["t5", "without-t5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("sd3") / "pipeline"
    write_tiny(path, "sd3", t5=request.param)
    return path


@pytest.fixture
def copy(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    write_tiny(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@torch.no_grad()
def theirs(folder: Path, prompts: list[str], negative: str, t5_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    absent = {} if (folder / "text_encoder_3").exists() else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=dtype, **absent)
    found: tuple[torch.Tensor, ...] = pipeline.encode_prompt(prompts, None, None, negative_prompt=negative, max_sequence_length=t5_tokens)
    return found


@pytest.mark.parametrize("t5_tokens", [256, 128, 7])
def test_prompts_become_what_the_pipeline_makes_of_them(t5_tokens: int, folder: Path) -> None:
    encoder = SD3TextEncoder.load(folder, t5_tokens=t5_tokens)
    embeds, negative, pooled, negative_pooled = theirs(folder, PROMPTS, "a white cat", t5_tokens)
    ours, other = encoder.encode(PROMPTS), encoder.encode(["a white cat"])
    assert ours.prompt_embeds.shape == (4, 77 + t5_tokens, WIDTH)
    assert ours.tensors["pooled"].shape == (4, 48)
    torch.testing.assert_close(ours.prompt_embeds, embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.tensors["pooled"], pooled, atol=1e-5, rtol=1e-5)
    for i in range(4):  # the pipeline repeats the negative prompt for each
        torch.testing.assert_close(other.prompt_embeds[0], negative[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other.tensors["pooled"][0], negative_pooled[i], atol=1e-5, rtol=1e-5)
    assert not ours.prompt_embeds[:, :77, 64:].any()  # zeros beside the 24 + 40 channels of both CLIPs
    assert bool(ours.prompt_embeds[:, 77:].any()) == (folder / "text_encoder_3").exists()
    assert len({row.numpy().tobytes() for row in ours.prompt_embeds}) == 4


def test_bfloat16_rounds_as_the_pipeline_does(folder: Path) -> None:
    embeds, _, pooled, _ = theirs(folder, PROMPTS, "", 32, torch.bfloat16)
    ours = SD3TextEncoder.load(folder, torch.bfloat16, t5_tokens=32).encode(PROMPTS)
    assert embeds.dtype == torch.bfloat16
    assert ours.prompt_embeds.dtype == ours.tensors["pooled"].dtype == torch.float32
    torch.testing.assert_close(ours.prompt_embeds, embeds.float(), atol=0, rtol=2**-7)
    torch.testing.assert_close(ours.tensors["pooled"], pooled.float(), atol=0, rtol=2**-7)


def test_a_policy_brings_the_encoder_frozen(folder: Path) -> None:
    policy = load_policy(ModelConfig(path=str(folder), t5_tokens=16, text_dtype="bfloat16"))
    encoder = policy.text_encoder
    assert isinstance(encoder, SD3TextEncoder)
    models = [*encoder.clips, *([encoder.t5] if encoder.t5 else [])]
    assert len(models) == 2 + (folder / "text_encoder_3").exists()
    for model in models:
        assert not model.training
        assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(False, torch.bfloat16)}
    text = encoder.encode(["a cat"])
    assert not text.prompt_embeds.requires_grad
    velocity = policy.transformer(torch.randn(1, 16, 8, 4), torch.tensor([0.3]), text.prompt_embeds, text.tensors["pooled"])
    assert velocity.shape == (1, 16, 8, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_becomes_the_same_whatever_is_encoded_beside_it(folder: Path, dtype: torch.dtype) -> None:
    """To the bit: the learner encodes the prompts of an update again, and its densities must be those of the sampler."""
    encoder = SD3TextEncoder.load(folder, dtype, t5_tokens=16)
    together = encoder.encode(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        assert digest_of(encoder.encode([prompt])[0]) == digest_of(together[i])


def test_prompts_that_the_tokenizers_cut_to_the_same_are_collisions(folder: Path) -> None:
    encoder = SD3TextEncoder.load(folder, t5_tokens=16)
    longer, cased = LONG + " a cat", "A red CIRCLE"  # CLIP has no capitals, T5 does
    found = collisions(encoder.signature, [*PROMPTS, longer, cased])
    same = {frozenset(group) for group in found}
    assert same == {frozenset({LONG, longer})} | (set() if encoder.t5 else {frozenset({"a red circle", cased})})
    for group in found:
        a, b = encoder.encode(group[:1]), encoder.encode(group[1:])
        assert torch.equal(a.prompt_embeds, b.prompt_embeds)
        assert torch.equal(a.tensors["pooled"], b.tensors["pooled"])


def test_the_old_layout_of_tokenizers_reads_the_same(copy: Path) -> None:
    """vocab.json and merges.txt in place of tokenizer.json, as in the published folders."""
    expected = SD3TextEncoder.load(copy).encode(PROMPTS)
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        stored = json.loads((copy / name / "tokenizer.json").read_text())["model"]
        shutil.rmtree(copy / name)
        (copy / name).mkdir()
        (copy / name / "vocab.json").write_text(json.dumps(stored["vocab"]))
        (copy / name / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in stored["merges"]))
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
        (copy / name / "tokenizer_config.json").write_text(json.dumps(settings))
    found = SD3TextEncoder.load(copy).encode(PROMPTS)
    assert torch.equal(found.prompt_embeds, expected.prompt_embeds)
    assert torch.equal(found.tensors["pooled"], expected.tensors["pooled"])


def test_what_older_files_also_hold_is_no_surprise(copy: Path) -> None:
    """A buffer of positions that is computed today, T5's token embedding a second time, and variants beside."""
    expected = SD3TextEncoder.load(copy).encode(PROMPTS)
    for name in ("text_encoder", "text_encoder_3"):
        path = copy / name / "model.safetensors"
        state = load_file(path)
        if name == "text_encoder_3":
            state["encoder.embed_tokens.weight"] = state["shared.weight"].clone()
        else:
            state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save_file(state, path, metadata={"format": "pt"})
        save_file({"wrong": torch.zeros(1)}, copy / name / "model.fp16.safetensors")
        (copy / name / "model.safetensors.index.fp16.json").write_text("{}")
        (copy / name / "pytorch_model.bin").write_bytes(b"never read")
    found = SD3TextEncoder.load(copy).encode(PROMPTS)
    assert torch.equal(found.prompt_embeds, expected.prompt_embeds)
    assert torch.equal(found.tensors["pooled"], expected.tensors["pooled"])


def test_writing_a_tiny_folder_is_a_function_of_its_seed_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_tiny(tmp_path / name, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = ({p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()} for n in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert a != c
    assert sum(map(len, a.values())) < 3_000_000


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change a JSON file or the tensors of a safetensors file."""

    def edit(folder: Path) -> None:
        path = folder / name
        if path.suffix == ".json":
            values = json.loads(path.read_text())
            change(values)
            path.write_text(json.dumps(values))
        else:
            state = load_file(path)
            change(state)
            save_file(state, path, metadata={"format": "pt"})

    return edit


NORM = "text_model.final_layer_norm.weight"
REFUSALS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing tensor": (edited("text_encoder/model.safetensors", lambda s: s.pop(NORM)), ["text_encoder", "1 missing", NORM]),
    "unexpected tensor": (edited("text_encoder_2/model.safetensors", lambda s: s.update(lora=torch.zeros(1))), ["text_encoder_2", "1 unexpected (lora)"]),
    "misshapen tensor": (edited("text_encoder_3/model.safetensors", lambda s: s.update({"shared.weight": torch.zeros(3, 4)})), ["text_encoder_3", "shape"]),
    "no second encoder": (lambda folder: shutil.rmtree(folder / "text_encoder_2"), ["text_encoder_2"]),
    "no T5 where one is named": (lambda folder: shutil.rmtree(folder / "text_encoder_3"), ["model_index.json names text_encoder_3", "no such folder"]),
    "no weights": (lambda folder: (folder / "text_encoder_3" / "model.safetensors").unlink(), ["text_encoder_3"]),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer_3"), ["model_index.json names tokenizer_3", "no such folder"]),
    "no tokens": (lambda folder: (folder / "tokenizer_2" / "tokenizer.json").write_text("{"), ["tokenizer_2"]),
    "width": (edited("transformer/config.json", lambda c: c.update(joint_attention_dim=90)), ["CLIP 64, T5 96", "joint_attention_dim=90"]),
    "pooled": (edited("transformer/config.json", lambda c: c.update(pooled_projection_dim=47)), ["48 channels", "pooled_projection_dim=47"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_an_encoder_that_does_not_fit_is_refused_with_its_folder_named(name: str, copy: Path) -> None:
    damage, words = REFUSALS[name]
    damage(copy)
    with pytest.raises(CheckpointError) as error:
        load_policy(ModelConfig(path=str(copy), init=True))
    for word in (copy.name, *words):
        assert word in str(error.value)


def test_without_transformers_the_error_says_how_to_get_it(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"need transformers: pip install 'ddrl\[models\]'"):
        load_policy(ModelConfig(path=str(copy), init=True))


def test_the_tiny_tokenizers_have_words_and_fall_back_to_letters() -> None:
    tokenizer = clip_tokenizer()
    assert tokenizer.tokenize("A red circle, zap") == ["a</w>", "red</w>", "circle</w>", ",</w>", "z", "a", "p</w>"]
    assert tokenizer("", padding="max_length", max_length=4).input_ids == [len(tokenizer) - 2] + [len(tokenizer) - 1] * 3
    assert clip_tokenizer(pad="!")("", padding="max_length", max_length=4).input_ids[2:] == [0, 0]
