"""docs/add-a-model.md: its package, taken off the page and installed beside ddrl, is a family as any other: what it draws, keeps, trains and
exports is looked at with diffusers' own classes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

from actors.conditioning import Subject
from actors.groups import group_payload, group_request
from actors.payload import decode_group, encode
from diffusion.checkpoint import load_policy
from diffusion.config import LoRAConfig
from diffusion.engine.engine import Engine
from diffusion.engine.generate import DiffusionEngine, SamplingParams
from diffusion.families.base import PackedModel
from diffusion.families.tiny import stirred, t5_tokenizer
from diffusion.lora import add_lora
from diffusion.precision import itemsize
from diffusion.seeds import INITIAL, step_noise
from tests.gloo import alone
from tests.pipeline import ROOT, Run, check_ledger, settings
from tests.unit.diffusion.test_saved import kept
from trainer.config.load import load_config, parse_config
from trainer.learn.batch import StepBatch, transitions_of
from trainer.learn.exports import Exports
from trainer.learn.learner import Learner
from trainer.learn.objective import Anchors
from trainer.run.preflight import check_files, check_policy

PAGE = (ROOT / "docs" / "add-a-model.md").read_text()
FILES: dict[str, str] = dict(re.findall(r"`([\w./]+)`:\n\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = [shlex.split(line) for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()]
CPU = torch.device("cpu")
PROMPTS = ["a small red circle", "", 'A sign "407", on the blue SQUARE']


def command_of(words: str) -> list[str]:
    """The page's one command with these words, by this interpreter."""
    (found,) = [line for line in COMMANDS if words in " ".join(line)]
    program = Path(found[0]).name
    return [sys.executable, *([] if program == "python" else ["-m", {"pip": "pip", "ddrl": "trainer"}[program]]), *found[1:]]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What somebody who follows the page has in a folder, installed in `site` there instead of among this interpreter's packages."""
    folder = tmp_path_factory.mktemp("package")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    install = [word for word in command_of("pip install") if word != "-e"]
    done = subprocess.run([*install, "--target", str(folder / "site")], cwd=folder, text=True, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def network(package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Its module `network`, in this process."""
    monkeypatch.syspath_prepend(str(package / "site"))
    import ddrl_auraflow.network as found  # type: ignore[import-not-found]

    yield found
    for name in [name for name in sys.modules if name.startswith("ddrl_auraflow")]:
        del sys.modules[name]


def write_tiny(folder: Path) -> None:
    """Every component of the published AuraFlow, with their classes, but for the tokenizer's, which is a T5's."""
    tokens: Any = t5_tokenizer()
    shape: dict[str, Any] = {"d_model": 24, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    blocks = {"block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    layers = {"num_mmdit_layers": 2, "num_single_dit_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        AuraFlowPipeline(
            tokenizer=tokens,
            text_encoder=stirred(UMT5EncoderModel(UMT5Config(vocab_size=len(tokens), **shape))),
            vae=stirred(AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=4, scaling_factor=0.5)),
            transformer=stirred(AuraFlowTransformer2DModel(**layers, joint_attention_dim=24, pos_embed_max_size=576)),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        ).save_pretrained(folder)


def opened(folder: Path) -> AuraFlowPipeline:
    found = AuraFlowPipeline.from_pretrained(folder)
    found.set_progress_bar_config(disable=True)
    return found


def test_the_page_has_the_files_and_the_commands_that_are_tested_here() -> None:
    assert FILES.keys() == {
        "pyproject.toml",
        "test_network.py",
        *(f"ddrl_auraflow/{name}.py" for name in ("network", "cost", "text", "__init__")),
    }
    assert [line[0] for line in COMMANDS] == [".venv/bin/pip", ".venv/bin/python", ".venv/bin/ddrl"]
    chosen = [word for word in command_of("ddrl train") if "=" in word]
    assert load_config(ROOT / "recipes" / "sd35-medium-ocr.yaml", chosen).model.path == "fal/AuraFlow-v0.3"


def test_the_page_s_own_test_passes(package: Path) -> None:
    done = subprocess.run(
        [*command_of("pytest"), "-q"], cwd=package, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout


@pytest.mark.usefixtures("network")
def test_a_whole_folder_draws_what_its_pipeline_draws(tmp_path: Path) -> None:
    write_tiny(tmp_path / "policy")
    pipeline, sizes = opened(tmp_path / "policy"), [(16, 24), (24, 8), (16, 24)]
    params = [SamplingParams(height, width, 4, 1, 3, 3.5) for height, width in sizes]
    with DiffusionEngine.from_pretrained(str(tmp_path / "policy"), grid="diffusers") as engine:
        samples = engine.generate(PROMPTS, params)
    for group, ((height, width), (one,)) in enumerate(zip(sizes, samples, strict=True)):
        noise = step_noise(3, group, one.number, INITIAL, (4, height // 2, width // 2))[None]
        options = {"height": height, "width": width, "num_inference_steps": 4, "guidance_scale": 3.5, "output_type": "latent"}
        with torch.no_grad():
            expected = pipeline(one.prompt, negative_prompt="", latents=noise, **options).images[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(one.trajectory.latent, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("rank", [0, 2], ids=["full", "adapter"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_training_keeps_is_what_the_page_counts(dtype: str, rank: int, network: ModuleType) -> None:
    config = {"num_mmdit_layers": 2, "num_single_dit_layers": 3, "attention_head_dim": 32, "num_attention_heads": 6, "caption_projection_dim": 192}
    model: PackedModel = network.AuraFlowTransformer(network.AuraFlowConfig.from_dict(config | {"joint_attention_dim": 40, "pos_embed_max_size": 576}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if rank:
        add_lora(model, LoRAConfig(rank=rank), torch.Generator())
    given = torch.randn(2, 4, 20, 22), torch.rand(2), torch.randn(2, 23, 40)
    saved = model.saved((4, 20, 22), 23, itemsize(dtype), rank > 0)
    activations, casts = kept(model, given, dtype)
    assert 2 * (sum(saved.blocks) + saved.ends) == pytest.approx(activations, rel=0.04)
    if rank and dtype == "bfloat16":
        assert 2 * sum(saved.weights) == pytest.approx(casts, rel=0.12)


@pytest.fixture
def group() -> Iterator[None]:
    with alone():
        yield


@pytest.mark.usefixtures("network", "group")
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "adapter"])
def test_an_update_and_its_export(rank: int, tmp_path: Path) -> None:
    """Sampled, stored, replayed, updated with recomputed blocks; the export is a pipeline whose network makes the same of the same."""
    write_tiny(tmp_path / "policy")
    (tmp_path / "prompts.txt").write_text("".join(f"{'a' * n} cat\n" for n in range(1, 40)))
    config = parse_config(
        {
            "model": {"path": str(tmp_path / "policy"), "lora": {"rank": rank}},
            "prompts": {"kind": "file", "path": str(tmp_path / "prompts.txt")},
            "sampler": {"steps": 4, "trained_steps": [0, 1, 2], "height": 16, "width": 24, "guidance": 3.5},
            "objective": {"clip": 0.2, "data_weight": 0.3},
            "optimizer": {"lr": 1e-2, "ema": 0.9},
            "learner": {"ranks": 1, "recompute": True},
            "evaluation": {"test_prompts": 2, "every": 0},
        }
    )
    check_files(config)
    check_policy(config)
    learner, policy = Learner(config, CPU), load_policy(config.model, seed=config.seed)
    text, negative = (policy.text_encoder.encode([prompt])[0] for prompt in ("a cat", ""))
    request = group_request(config.sampler, config.rollout, config.seed, 0, text, negative, learner.shape)
    sampled = Engine(policy.transformer, policy.process, 100_000).run([request])
    payload, members = decode_group(encode(group_payload(sampled, "a cat"))), len(sampled)
    rows = transitions_of(payload, [(-1.0) ** i for i in range(members)], learner.kernel)
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, *learner.shape, generator=g)
    anchors = Anchors(x0, eps, torch.rand(5, generator=g), torch.ones(5), torch.zeros(5, dtype=torch.int64))
    before = {name: tensor.clone() for name, tensor in learner.full_state().items()}
    stats = learner.update([StepBatch(learner.encode([Subject(payload.text)]), rows, anchors, 3 * members, 5, [3 * members], [5])], 1)
    assert not stats.get("skipped")
    assert stats["ratio_deviation"] < 1e-4
    changed = [name for name, tensor in learner.full_state().items() if not torch.equal(tensor, before[name])]
    assert changed
    assert all(".lora_" in name for name in changed) == (rank > 0)

    exports = Exports(tmp_path / "exports", config.model, 0)
    exports.take(learner, 1)
    exports.finish(60)
    export = tmp_path / "exports" / "step-000001"
    theirs, ours = opened(export).transformer, load_policy(config.model.model_copy(update={"path": str(export), "lora": LoRAConfig()})).transformer
    x, t, words = torch.randn(2, *learner.shape), torch.rand(2), text.prompt_embeds.expand(2, -1, -1)
    with torch.no_grad():
        expected, found, former = theirs(x, words, t).sample, ours(x, t, words), policy.transformer(x, t, words)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - former).abs().max() > 1e-3  # type: ignore[operator]


@pytest.mark.long
def test_a_run(package: Path, start: Callable[..., Run], tmp_path: Path) -> None:
    """`ddrl train`, with Ray's actors: each finds the family by its entry point."""
    write_tiny(tmp_path / "policy")
    run = start("run", *settings(f"model.path={tmp_path / 'policy'}", "updates=2"), environment={"PYTHONPATH": str(package / "site")})
    run.succeed()
    check_ledger(run.folder, 2)
    opened(run.folder / "exports" / "step-000002")
