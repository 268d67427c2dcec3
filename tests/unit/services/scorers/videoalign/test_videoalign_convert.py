"""Conversion: a complete folder of safetensors that scores like its source, or nothing at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from services.contract import ItemScore
from services.media.base import Media
from services.scorers.videoalign import tiny
from services.scorers.videoalign.checkpoint import find
from services.scorers.videoalign.convert import convert
from services.scorers.videoalign.errors import CheckpointError, KeyMismatch
from services.scorers.videoalign.scorer import VideoAlignScorer
from tests.unit.services.scorers.videoalign.conftest import DIMS

Make = Callable[..., VideoAlignScorer]
SHA = tiny.TEMPLATE_SHA256


def scores(scorer: VideoAlignScorer) -> list[dict[str, float]]:
    results = scorer.score(["a cat", "a dog"], [Media(tiny.clip(8, seed=3), 8.0), Media(tiny.clip(6, seed=4), 2.0)])
    assert all(isinstance(result, ItemScore) for result in results)
    return [result.sub_scores for result in results if isinstance(result, ItemScore)]


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "beside"])
def test_a_converted_folder_scores_bit_for_bit_like_its_source(tmp_path: Path, published: Path, base: Path, make_scorer: Make, fold: bool) -> None:
    report = convert(published, tmp_path / "out", base=base, template_sha256=SHA, fold=fold, dtype="float32", shard_bytes=100_000)
    assert report.tensors_in == len(tiny.published_shapes(DIMS))
    assert report.unused == ("base_model.model.lm_head.weight",)
    assert report.folded_updates == (21 if fold else 0)
    assert report.tensors_out == report.tensors_in - 1 - (42 if fold else 0)
    assert report.normalised
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert sum(file.stat().st_size for file in shards) == report.bytes_out
    from_source, converted = make_scorer(fold_lora=fold), make_scorer(path=tmp_path / "out", base=None, fold_lora=fold)
    assert scores(converted) == scores(from_source)
    assert converted.revision != from_source.revision  # other files, told apart


def test_updates_kept_beside_can_be_folded_at_load(tmp_path: Path, published: Path, base: Path, make_scorer: Make) -> None:
    convert(published, tmp_path / "out", base=base, template_sha256=SHA, fold=False, dtype="float32")
    assert scores(make_scorer(path=tmp_path / "out", base=None)) == scores(make_scorer())


def test_folded_weights_cannot_be_unfolded(tmp_path: Path, published: Path, base: Path, make_scorer: Make) -> None:
    convert(published, tmp_path / "out", base=base, template_sha256=SHA)
    with pytest.raises(CheckpointError, match=r"convert it with fold=False, or set fold_lora: true"):
        make_scorer(path=tmp_path / "out", base=None, fold_lora=False)


def test_bfloat16_is_the_fold_rounded_once(tmp_path: Path, published: Path, base: Path, tensors: dict[str, Tensor]) -> None:
    convert(published, tmp_path / "out", base=base, template_sha256=SHA)
    layer = "base_model.model.model.layers.2.mlp.down_proj"
    a, b = tensors[f"{layer}.lora_A.default.weight"], tensors[f"{layer}.lora_B.default.weight"]
    wanted = (tensors[f"{layer}.base_layer.weight"].double() + 2.0 * b.double() @ a.double()).float()
    with safe_open(tmp_path / "out" / "model-00001.safetensors", "pt") as file:
        found = file.get_tensor("language_model.layers.2.mlp.down_proj.weight")
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118  not a mapping
    step = wanted.abs() * 2**-8  # half a step of bfloat16's 8 bits
    assert ((found.float() - wanted).abs() <= step + 1e-6).all()


def test_the_adapter_layout_converts_with_its_base(tmp_path: Path, base: Path, make_scorer: Make, tensors: dict[str, Tensor]) -> None:
    trained = tiny.write_adapter(tmp_path / "trained", DIMS, tensors)
    report = convert(trained, tmp_path / "out", base=base, template_sha256=SHA, dtype="float32")
    assert report.layout == "adapter"
    assert not report.normalised
    assert "raw" in str(report)
    assert scores(make_scorer(path=tmp_path / "out", base=None)) == scores(make_scorer(normalise="never"))


def test_without_a_template_the_folder_asks_for_one_when_it_is_served(tmp_path: Path, base: Path, make_scorer: Make, tensors: dict[str, Tensor]) -> None:
    root = tiny.write_checkpoint(tmp_path / "r", DIMS, tensors)
    template = (root / "prompt_template.txt").rename(tmp_path / "elsewhere.txt")
    convert(root, tmp_path / "out", base=base)
    with pytest.raises(CheckpointError, match=r"no prompt template at .* set `template`"):
        make_scorer(path=tmp_path / "out", base=None)
    assert scores(make_scorer(path=tmp_path / "out", base=None, template=template))


def test_a_template_given_is_checked_and_copied(tmp_path: Path, published: Path, base: Path) -> None:
    (tmp_path / "t.py").write_text(f"DETAILED_PROMPT_WITH_SPECIAL_TOKEN = {tiny.TEMPLATE!r}")
    convert(published, tmp_path / "out", base=base, template=tmp_path / "t.py", template_sha256=SHA)
    assert (tmp_path / "out" / "prompt_template.txt").read_bytes() == tiny.TEMPLATE.encode()
    with pytest.raises(CheckpointError, match="hashes to"):
        convert(published, tmp_path / "other", base=base, template=tmp_path / "t.py")


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, base: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    short = {name: tensor for name, tensor in tensors.items() if "rm_head" not in name}
    root = tiny.write_checkpoint(tmp_path / "r", DIMS, short)
    with pytest.raises(KeyMismatch):
        convert(root, tmp_path / "out" / "deep", base=base, template_sha256=SHA)
    whole = tiny.write_checkpoint(tmp_path / "whole", DIMS, tensors)
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("services.scorers.videoalign.convert.save_file", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space"):
        convert(whole, tmp_path / "out" / "deep", base=base, template_sha256=SHA)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_folder_is_not_written_to_and_a_converted_one_not_converted(tmp_path: Path, published: Path, base: Path) -> None:
    convert(published, tmp_path / "out", base=base, template_sha256=SHA)
    with pytest.raises(CheckpointError, match="exists"):
        convert(published, tmp_path / "out", base=base, template_sha256=SHA)
    with pytest.raises(CheckpointError, match="is converted already"):
        convert(tmp_path / "out", tmp_path / "again", template_sha256=SHA)


@pytest.mark.parametrize("damage", ["bit", "short", "gone", "manifest", "outside", "swapped"])
def test_a_damaged_folder_is_refused(tmp_path: Path, published: Path, base: Path, make_scorer: Make, damage: str) -> None:
    convert(published, tmp_path / "out", base=base, template_sha256=SHA, shard_bytes=100_000)
    file, manifest = tmp_path / "out" / "model-00001.safetensors", tmp_path / "out" / "videoalign.json"
    if damage == "bit":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "gone":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
    elif damage == "outside":
        manifest.write_text(manifest.read_text().replace("model-00001", "../model-00001"))
    else:
        written = json.loads(manifest.read_text())
        written["files"].pop("model-00002.safetensors")
        manifest.write_text(json.dumps(written))
    with pytest.raises(CheckpointError):
        make_scorer(path=tmp_path / "out", base=None)
    if damage != "manifest" and damage != "outside":
        assert find(tmp_path / "out").layout == "converted"
