"""Loading: every layout gives the reference's numbers, and what does not fit exactly is refused by name (acceptance 1 and 3)."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from services.contract import ItemScore
from services.media.base import Media
from services.scorers.videoalign import tiny
from services.scorers.videoalign.checkpoint import find, read
from services.scorers.videoalign.errors import CheckpointError, KeyMismatch
from services.scorers.videoalign.layout import empty_model, stock_name
from services.scorers.videoalign.pixels import patchify
from services.scorers.videoalign.scorer import Prepared, VideoAlignScorer
from tests.unit.services.scorers.videoalign import oracle
from tests.unit.services.scorers.videoalign.conftest import DIMS

PROMPTS = ["a cat", "a dog runs far away"]
CLIPS = [Media(tiny.clip(8, 48, 64), 8.0), Media(tiny.clip(20, 64, 40, seed=1), 8.0)]
# Recorded from transformers 4.45.2 and peft 0.10.0 with float32 weights: VideoAlign's class and forward, `get_peft_model`, a
# strict load of the same model.pth, the token ids and patches of these clips, one clip at a time. "bfloat16": with the rotary
# buffers cast, as `model.to(torch.bfloat16)` casts them there. By head outputs; rows are clips, columns VQ, MQ, TA.
REFERENCE = {
    ("float32", 1): [[-0.358801484, -0.349793881, -1.04483724], [-1.08976912, -0.0764975548, 0.0305912793]],
    ("float32", 3): [[-0.913305759, -0.628157794, 0.752545714], [0.381743371, -0.430324733, 0.303438455]],
    ("bfloat16", 1): [[-0.357439995, -0.331819564, -1.05703759], [-1.10118544, -0.0677839518, 0.0049239099]],
    ("bfloat16", 3): [[-0.920768619, -0.634293437, 0.761251152], [0.410504043, -0.395449281, 0.241898492]],
}
USUAL = REFERENCE["bfloat16", 1]
REFERENCE_UNTIED = [[-0.325767457, -0.307927728, 1.18520164], [0.31203258, 1.66301751, 1.26717162]]
Make = Callable[..., VideoAlignScorer]


def raw(scorer: VideoAlignScorer) -> np.ndarray:
    """VQ, MQ, TA of the two clips [2, 3]."""
    results = scorer.score(PROMPTS, CLIPS)
    assert all(isinstance(result, ItemScore) for result in results)
    return np.array([[result.sub_scores[name] for name in ("vq", "mq", "ta")] for result in results if isinstance(result, ItemScore)])


def prepare(scorer: VideoAlignScorer, i: int) -> Prepared:
    item = scorer._prepare(PROMPTS[i], CLIPS[i])
    assert isinstance(item, Prepared)
    return item


def close(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "beside"])
@pytest.mark.parametrize(("rotary", "head_dim"), list(REFERENCE))
def test_acceptance_1_the_published_layout_equals_the_reference(tmp_path: Path, make_scorer: Make, rotary: str, head_dim: int, fold: bool) -> None:
    dims = tiny.Dims(head_dim=head_dim)
    root = tiny.write_checkpoint(tmp_path / "r", dims, tiny.published_tensors(dims))
    close(raw(make_scorer(path=root, fold_lora=fold, rotary=rotary)), REFERENCE[rotary, head_dim])


def test_acceptance_1_the_adapter_layout_equals_the_reference(tmp_path: Path, base: Path, make_scorer: Make, tensors: dict[str, Tensor]) -> None:
    root = tiny.write_adapter(tmp_path / "trained", DIMS, tensors)
    close(raw(make_scorer(path=root)), USUAL)
    assert find(root, base=base).layout == "adapter"


def test_an_adapter_with_all_other_weights_needs_no_base_weights(tmp_path: Path, make_scorer: Make, tensors: dict[str, Tensor]) -> None:
    base = tiny.write_base(tmp_path / "base", DIMS)
    close(raw(make_scorer(path=tiny.write_adapter(tmp_path / "trained", DIMS, tensors, frozen=False), base=base)), USUAL)


def test_names_of_later_transformers_load_alike(tmp_path: Path, make_scorer: Make, tensors: dict[str, Tensor]) -> None:
    pre = "base_model.model."
    renamed = {
        name.replace(f"{pre}visual.", f"{pre}model.visual.").replace(f"{pre}model.", f"{pre}model.language_model.")
        if not name.startswith(f"{pre}visual.")
        else name.replace(f"{pre}visual.", f"{pre}model.visual."): tensor
        for name, tensor in tensors.items()
    }
    assert f"{pre}model.language_model.norm.weight" in renamed
    close(raw(make_scorer(path=tiny.write_checkpoint(tmp_path / "r", DIMS, renamed), normalise="never")), USUAL)


def test_a_full_fine_tune_without_updates_loads(tmp_path: Path, make_scorer: Make, tensors: dict[str, Tensor]) -> None:
    merged = {n.removeprefix(oracle.PRE).replace(".base_layer.", "."): t for n, t in _merged(tensors).items()}
    root = tiny.write_checkpoint(tmp_path / "r", DIMS, merged)
    config = json.loads((root / "model_config.json").read_text())
    config["peft_lora_config"]["lora_enable"] = False
    (root / "model_config.json").write_text(json.dumps(config))
    scorer = make_scorer(path=root)
    close(raw(scorer), USUAL)
    assert "no-lora" in scorer.revision


@pytest.mark.parametrize("rotary", ["float32", "bfloat16"])
def test_the_arithmetic_written_out_agrees(make_scorer: Make, tensors: dict[str, Tensor], rotary: str) -> None:
    scorer = make_scorer(normalise="never", rotary=rotary)
    tokenizer, ours = scorer._loaded.tokenizer, raw(scorer)
    for i in range(2):
        p = prepare(scorer, i)
        item = oracle.Item(p.ids, *patchify(p.planes), tokenizer.video_id, tokenizer.reward_ids)
        close(ours[i], oracle.raw_scores(tensors, DIMS, item, coarse=rotary == "bfloat16"))


def _merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published names without updates: folded by numpy."""
    out = {}
    for name, tensor in tensors.items():
        if ".lora_" in name:
            continue
        a = name.replace("base_layer.weight", "lora_A.default.weight")
        update = tensors[a.replace("lora_A", "lora_B")].numpy() @ tensors[a].numpy() * (DIMS.alpha / DIMS.rank) if a in tensors and a != name else 0
        out[name] = torch.from_numpy(tensor.numpy() + np.float32(update))
    return out


def _outer(scorer: VideoAlignScorer, tensors: dict[str, Tensor]) -> Qwen2VLForConditionalGeneration:
    """The stock generation model with the same weights, filled by name."""
    config = Qwen2VLConfig.from_dict(tiny.base_config(DIMS) | {"tie_word_embeddings": False, "torch_dtype": "float32"})
    config.text_config.vocab_size = DIMS.vocab
    config.video_token_id = scorer._loaded.tokenizer.video_id
    outer = Qwen2VLForConditionalGeneration(config).eval()
    plain = {stock_name(n.removeprefix(oracle.PRE).replace(".base_layer.", ".")): t for n, t in _merged(tensors).items() if "rm_head" not in n}
    outer.load_state_dict({name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in plain.items()}, strict=True)
    return outer


def _through_outer(scorer: VideoAlignScorer, tensors: dict[str, Tensor], i: int, **positions: Any) -> Tensor:
    item, outer = prepare(scorer, i), _outer(scorer, tensors)
    patches, grid = patchify(item.planes)
    ids, grids = torch.tensor([item.ids]), torch.tensor([grid])
    if positions.pop("three_d", False):
        kinds = (ids == scorer._loaded.tokenizer.video_id).int() * 2
        positions = {"mm_token_type_ids": kinds}
    with torch.inference_mode():
        out = outer(input_ids=ids, pixel_values_videos=patches, video_grid_thw=grids, output_hidden_states=True, use_cache=False, **positions)
    places = [item.ids.index(token) for token in scorer._loaded.tokenizer.reward_ids]
    return (out.hidden_states[-1][0, places] @ tensors["base_model.model.rm_head.weight"].T)[:, 0]


def test_acceptance_3_positions_are_sequential_and_not_three_dimensional(make_scorer: Make, tensors: dict[str, Tensor]) -> None:
    scorer = make_scorer(normalise="never", rotary="float32")
    ours = raw(scorer)
    for i in range(2):
        length = len(prepare(scorer, i).ids)
        close(_through_outer(scorer, tensors, i, position_ids=torch.arange(length).expand(3, 1, -1)), ours[i])
        assert np.abs(_through_outer(scorer, tensors, i, three_d=True).numpy() - ours[i]).max() > 1e-2


def test_tied_embeddings_that_differ_follow_the_references_order_of_loading(tmp_path: Path, make_scorer: Make, tensors: dict[str, Tensor]) -> None:
    flipped = tensors | {"base_model.model.lm_head.weight": tensors["base_model.model.model.embed_tokens.weight"].flip(0).clone()}
    close(raw(make_scorer(path=tiny.write_checkpoint(tmp_path / "r", DIMS, flipped))), REFERENCE_UNTIED)


def test_the_highest_checkpoint_is_taken_unless_one_is_named(tmp_path: Path, base: Path, tensors: dict[str, Tensor]) -> None:
    root = tiny.write_checkpoint(tmp_path / "r", DIMS, tensors, step=900)
    (root / "checkpoint-1000").mkdir()
    assert find(root, 900, base).folder.name == "checkpoint-900"
    with pytest.raises(CheckpointError, match="checkpoint-1000 holds neither"):
        find(root, base=base)
    with pytest.raises(CheckpointError, match="no checkpoint-7, only 900, 1000"):
        find(root, 7, base)
    assert find(root / "checkpoint-900", base=base).settings.lora is not None


@pytest.mark.parametrize("change", ["missing", "unexpected", "wrong_shape", "renamed"])
def test_acceptance_1_a_tensor_that_does_not_fit_is_named(tmp_path: Path, make_scorer: Make, tensors: dict[str, Tensor], change: str) -> None:
    layer = "base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"
    changed = dict(tensors)
    if change in ("missing", "renamed"):
        tensor = changed.pop(layer)
    if change == "renamed":
        changed[layer.replace("lora_B", "lora_C")] = tensor
    if change == "unexpected":
        changed["base_model.model.extra.weight"] = torch.zeros(2)
    if change == "wrong_shape":
        changed[layer] = torch.zeros(96, 5)
    with pytest.raises(KeyMismatch) as caught:
        make_scorer(path=tiny.write_checkpoint(tmp_path / "r", DIMS, changed))
    error = caught.value
    wanted: dict[str, tuple[list[str], list[str], list[str]]] = {
        "missing": ([layer], [], []),
        "unexpected": ([], ["base_model.model.extra.weight"], []),
        "wrong_shape": ([], [], [f"{layer}: [96, 5], expected [96, 4]"]),
        "renamed": ([layer], [layer.replace("lora_B", "lora_C")], []),
    }
    assert (error.missing, error.unexpected, error.wrong_shape) == wanted[change]
    assert all(name in str(error) for names in wanted[change] for name in names)


def test_an_adapter_without_its_base_says_what_is_missing(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    root = tiny.write_adapter(tmp_path / "trained", DIMS, tensors)
    base = tiny.write_base(tmp_path / "base", DIMS)
    found = find(root, base=base)
    with pytest.raises(KeyMismatch) as caught:
        read(found, empty_model(found.architecture, DIMS.vocab))
    assert len(caught.value.missing) == DIMS.layers * (7 + 3 + 2) + 2  # weights, biases, norms; embedding and final norm
    assert caught.value.unexpected == []


def test_an_unknown_base_model_asks_for_its_folder(published: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'somebody/Tiny-VL' is not known here; set `base`"):
        find(published)


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize("content", ["pickle", "object", "list", "text", "empty"])
def test_a_file_that_is_not_tensors_is_refused_and_not_run(
    tmp_path: Path, make_scorer: Make, tensors: dict[str, Tensor], content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tiny.write_checkpoint(tmp_path / "r", DIMS, tensors)
    file = root / "checkpoint-11352" / "model.pth"
    if content == "pickle":
        file.write_bytes(pickle.dumps(_Trap()))
    elif content == "object":
        torch.save({"weight": torch.zeros(1), "trap": _Trap()}, file)
    elif content == "list":
        torch.save([torch.zeros(1)], file)
    else:
        file.write_bytes(b"not a checkpoint" if content == "text" else b"")
    with pytest.raises(CheckpointError, match=r"model\.pth is not a"):
        make_scorer(path=root)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data_config", "prompt_template_type", "detailed"),
        ("data_config", "sample_type", "multi_pts"),
        ("data_config", "eval_dim", ["MQ", "VQ", "TA"]),
        ("model_config", "reward_token", "last"),
        ("model_config", "use_special_tokens", False),
        ("model_config", "output_dim", 4),
        ("peft_lora_config", "lora_modules_to_save", ["embed_tokens"]),
        ("peft_lora_config", "lora_namespan_exclude", ["lm_head", "rm_head", "visual"]),
        ("inference_config", "VQ_std", 0.0),
    ],
)
def test_a_setting_this_scorer_does_not_compute_is_refused(
    tmp_path: Path, make_scorer: Make, tensors: dict[str, Tensor], section: str, key: str, value: Any
) -> None:
    root = tiny.write_checkpoint(tmp_path / "r", DIMS, tensors, tiny.VIDEOREWARD_SPREAD)
    config = json.loads((root / "model_config.json").read_text())
    config[section][key] = value
    (root / "model_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        make_scorer(path=root)
