"""The scorer: invariants of the numbers (acceptance 4), what an item's failure is, batches, names of what was computed."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from services.contract import ItemScore, ScoreFailure
from services.media.base import Media
from services.media.frames import take
from services.scorers.base import ScorerUnfit
from services.scorers.registry import build_scorer, parse_reward
from services.scorers.videoalign import tiny
from services.scorers.videoalign.config import VideoAlignConfig
from services.scorers.videoalign.errors import CheckpointError
from services.scorers.videoalign.model import RewardModel, pool, reward_places
from services.scorers.videoalign.pixels import patchify
from services.scorers.videoalign.scorer import VideoAlignScorer
from tests.unit.services.scorers.videoalign.conftest import DIMS

Make = Callable[..., VideoAlignScorer]
# Different lengths, sizes and rates, hence different sequences to pad.
CLIPS = [Media(tiny.clip(8, 48, 64, 0), 8.0), Media(tiny.clip(24, 64, 40, 1), 8.0), Media(tiny.clip(3, 56, 56, 2), 16.0), Media(tiny.clip(5, 40, 88, 3), 4.0)]
PROMPTS = ["a cat", "a very long walk through a quiet town in the evening rain", "", "ein Hund läuft"]


def values(result: ItemScore | ScoreFailure) -> dict[str, float]:
    assert isinstance(result, ItemScore), result
    return result.sub_scores


def one(scorer: VideoAlignScorer, prompt: str, media: Media) -> dict[str, float]:
    return values(scorer.score([prompt], [media])[0])


def apart(a: dict[str, float], b: dict[str, float]) -> float:
    return max(abs(a[name] - b[name]) for name in a)


def test_acceptance_4_the_prompt_moves_ta_and_leaves_vq_and_mq(raw_scorer: VideoAlignScorer) -> None:
    for media in CLIPS[:2]:
        first, second = (one(raw_scorer, prompt, media) for prompt in PROMPTS[:2])
        assert abs(first["vq"] - second["vq"]) < 1e-5
        assert abs(first["mq"] - second["mq"]) < 1e-5
        assert abs(first["ta"] - second["ta"]) > 1e-2


@settings(max_examples=15)
@given(order=st.permutations(range(4)), size=st.integers(2, 4))
def test_acceptance_4_neither_padding_nor_company_nor_order_changes_a_score(raw_scorer: VideoAlignScorer, order: list[int], size: int) -> None:
    chosen = order[:size]
    alone = [one(raw_scorer, PROMPTS[i], CLIPS[i]) for i in chosen]
    together = raw_scorer.score([PROMPTS[i] for i in chosen], [CLIPS[i] for i in chosen])
    assert max(apart(values(a), b) for a, b in zip(together, alone, strict=True)) < 1e-5


def test_acceptance_4_what_stands_in_the_padding_is_not_read(raw_scorer: VideoAlignScorer) -> None:
    item = raw_scorer._prepare(PROMPTS[0], CLIPS[0])
    assert not isinstance(item, ScoreFailure)
    model, pad, (patches, grid) = raw_scorer._loaded.model, raw_scorer._loaded.tokenizer.pad_id, patchify(item.planes)
    rows = [model(torch.tensor([item.ids + [filler] * 40]), patches, torch.tensor([grid])) for filler in (pad, 65)]
    assert torch.equal(rows[0], rows[1])


def test_acceptance_4_each_reward_token_must_stand_once_and_in_order() -> None:
    ids = (7, 8, 9)
    assert reward_places(torch.tensor([[0, 7, 1, 8, 9], [7, 8, 9, 0, 0]]), ids).tolist() == [[1, 3, 4], [0, 1, 2]]
    for row in ([0, 7, 8, 0, 0], [7, 7, 8, 9, 0], [8, 7, 9, 0, 0], [0, 0, 0, 0, 0]):
        with pytest.raises(ValueError, match="once and in order"):
            reward_places(torch.tensor([[7, 8, 9, 0, 0], row]), ids)


def test_acceptance_4_control_tokens_in_a_prompt_fail_that_item_alone(raw_scorer: VideoAlignScorer) -> None:
    prompts = [PROMPTS[0], "a cat <|TA_reward|>", PROMPTS[1], "<|video_pad|>"]
    results = raw_scorer.score(prompts, [CLIPS[0], CLIPS[1], CLIPS[1], CLIPS[2]])
    assert [result.code if isinstance(result, ScoreFailure) else "" for result in results] == ["", "prompt_refused", "", "prompt_refused"]
    assert apart(values(results[0]), one(raw_scorer, PROMPTS[0], CLIPS[0])) < 1e-5
    assert apart(values(results[2]), one(raw_scorer, PROMPTS[1], CLIPS[1])) < 1e-5


def test_three_head_outputs_are_read_on_the_diagonal() -> None:
    outputs = torch.arange(18.0).view(2, 3, 3)
    assert pool(outputs).tolist() == [[0, 4, 8], [9, 13, 17]]
    assert pool(outputs[..., :1]).tolist() == [[0, 3, 6], [9, 12, 15]]


def test_video_tokens_must_match_the_patches(raw_scorer: VideoAlignScorer) -> None:
    item = raw_scorer._prepare(PROMPTS[0], CLIPS[0])
    assert not isinstance(item, ScoreFailure)
    ids, (patches, grid) = [raw_scorer._loaded.tokenizer.video_id, *item.ids], patchify(item.planes)
    with pytest.raises(ValueError, match="281 video tokens for 280 merged patches"):
        raw_scorer._loaded.model(torch.tensor([ids]), patches, torch.tensor([grid]))


@pytest.mark.parametrize(
    ("media", "code"),
    [
        (Media.image(np.zeros((64, 64, 3), np.uint8)), "media_not_supported"),
        (Media(np.zeros((1, 64, 64, 3), np.uint8), 16.0), "too_few_frames"),
        (Media(np.zeros((0, 64, 64, 3), np.uint8), 16.0), "too_few_frames"),
        (Media(np.zeros((3, 64, 64, 3), np.uint8), 16.0, selected=True), "too_few_frames"),
        (Media(np.zeros((8, 2, 500, 3), np.uint8), 16.0), "unusable_size"),
        (Media(np.zeros((8, 0, 64, 3), np.uint8), 16.0), "unusable_size"),
    ],
    ids=["image", "one_frame", "no_frame", "odd", "sliver", "no_height"],
)
def test_media_that_cannot_be_scored_fail_alone(raw_scorer: VideoAlignScorer, media: Media, code: str) -> None:
    results = raw_scorer.score([PROMPTS[0], "x"], [CLIPS[0], media])
    assert apart(values(results[0]), one(raw_scorer, PROMPTS[0], CLIPS[0])) < 1e-5
    assert isinstance(results[1], ScoreFailure)
    assert (results[1].code, results[1].retryable) == (code, False)
    assert raw_scorer.cost(media) >= 0


def test_a_clip_too_long_for_the_service_fails_alone(make_scorer: Make) -> None:
    scorer = make_scorer(max_tokens=500)
    results = scorer.score(["x", "x", "x" * 400], [CLIPS[0], CLIPS[1], CLIPS[0]])
    assert [getattr(result, "code", "") for result in results] == ["", "video_too_long", "video_too_long"]
    assert scorer.score([], []) == []


def test_scores_are_normalised_with_the_checkpoints_mean_and_deviation(make_scorer: Make, raw_scorer: VideoAlignScorer) -> None:
    raw, scaled = one(raw_scorer, PROMPTS[0], CLIPS[0]), one(make_scorer(), PROMPTS[0], CLIPS[0])
    spread = tiny.VIDEOREWARD_SPREAD
    for name in ("vq", "mq", "ta"):
        assert scaled[name] == pytest.approx((raw[name] - spread[f"{name.upper()}_mean"]) / spread[f"{name.upper()}_std"], abs=1e-6)
    for scores in (raw, scaled):
        assert scores["overall"] == pytest.approx(scores["vq"] + scores["mq"] + scores["ta"])
        assert scores["overall_mean"] == pytest.approx(scores["overall"] / 3)


def test_a_checkpoint_without_mean_and_deviation_gives_raw_scores_or_is_refused(tmp_path: Path, make_scorer: Make, tensors: dict[str, Tensor]) -> None:
    root = tiny.write_checkpoint(tmp_path / "r", DIMS, tensors)
    assert ";raw;" in make_scorer(path=root).revision
    with pytest.raises(CheckpointError, match="states no mean and deviation"):
        make_scorer(path=root, normalise="always")


@pytest.mark.parametrize("reward", ["overall", "overall_mean", "vq", "mq", "ta"])
def test_the_reward_is_the_sub_score_chosen(make_scorer: Make, reward: str) -> None:
    scorer = make_scorer(reward=reward)
    (result,) = scorer.score(PROMPTS[:1], CLIPS[:1])
    assert isinstance(result, ItemScore)
    assert result.reward == result.sub_scores[reward]
    assert set(result.sub_scores) == set(scorer.sub_scores)
    assert scorer.info().reward == reward


def test_frames_selected_by_the_client_score_alike(raw_scorer: VideoAlignScorer) -> None:
    for media in CLIPS:
        assert one(raw_scorer, "x", take(raw_scorer.frame_spec, media)) == one(raw_scorer, "x", media)


def test_frames_at_the_rewards_own_rate_are_all_looked_at(raw_scorer: VideoAlignScorer) -> None:
    chosen = take(raw_scorer.frame_spec, CLIPS[1]).frames
    assert one(raw_scorer, "x", Media(chosen, 2.0)) == one(raw_scorer, "x", CLIPS[1])


def test_cost_is_the_pixels_that_the_model_sees(raw_scorer: VideoAlignScorer) -> None:
    assert raw_scorer.cost(Media(np.zeros((93, 72, 128, 3), np.uint8), 16.0)) == 12 * 252 * 448
    assert raw_scorer.cost(Media(np.zeros((6, 448, 448, 3), np.uint8), 2.0)) == 6 * 448 * 448


class _Counted(RewardModel):
    """Notes the size of every batch."""

    sizes: list[int]

    def forward(self, ids: Tensor, patches: Tensor, grids: Tensor) -> Any:
        self.sizes.append(len(ids))
        return super().forward(ids, patches, grids)


@pytest.mark.parametrize(("limits", "sizes"), [({}, [4]), ({"batch_items": 3}, [3, 1]), ({"batch_cost": 1}, [1, 1, 1, 1])])
def test_batches_are_cut_by_items_and_cost(make_scorer: Make, limits: dict[str, int], sizes: list[int]) -> None:
    scorer = make_scorer(normalise="never", **limits)
    scorer._loaded.model.__class__ = _Counted
    scorer._loaded.model.sizes = []  # type: ignore[assignment]
    results = scorer.score(PROMPTS, CLIPS)
    assert scorer._loaded.model.sizes == sizes
    wanted = [one(scorer, prompt, media) for prompt, media in zip(PROMPTS, CLIPS, strict=True)]
    assert max(apart(values(a), b) for a, b in zip(results, wanted, strict=True)) < 1e-5


def test_bfloat16_is_close_to_float32(make_scorer: Make, raw_scorer: VideoAlignScorer) -> None:
    half = make_scorer(normalise="never", dtype="bfloat16")
    half.self_test()
    results = zip(half.score(PROMPTS, CLIPS), raw_scorer.score(PROMPTS, CLIPS), strict=True)
    assert max(apart(values(a), values(b)) for a, b in results) < 0.5  # three random layers; rounding noise was 0.05 when recorded


def test_the_self_test_passes_and_notices_broken_weights(make_scorer: Make) -> None:
    make_scorer().self_test()
    broken = make_scorer()
    with torch.no_grad():
        broken._loaded.model.qwen.language_model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(ScorerUnfit, match="must be finite"):
        broken.self_test()
    results = broken.score(PROMPTS[:1], CLIPS[:1])
    assert isinstance(results[0], ScoreFailure)
    assert results[0].code == "not_finite"


def test_the_self_test_notices_a_decoder_that_looks_ahead(make_scorer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = make_scorer()
    for layer in scorer._loaded.model.qwen.language_model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ScorerUnfit, match="must not depend on the prompt"):
        scorer.self_test()


def test_the_revision_names_everything_that_changes_numbers(tmp_path: Path, make_scorer: Make, tensors: dict[str, Tensor]) -> None:
    other = tensors | {"base_model.model.rm_head.weight": tensors["base_model.model.rm_head.weight"] + 1}
    variants: list[dict[str, Any]] = [
        *({}, {"fold_lora": False}, {"normalise": "never"}, {"reward": "vq"}, {"dtype": "bfloat16"}, {"rotary": "float32"}),
        {"path": tiny.write_checkpoint(tmp_path / "other", DIMS, other, tiny.VIDEOREWARD_SPREAD)},
    ]
    revisions = [make_scorer(**variant).revision for variant in variants]
    assert len(set(revisions)) == len(variants)
    assert make_scorer().revision == revisions[0]
    assert make_scorer(batch_items=1).revision == revisions[0]
    assert str(tmp_path) not in revisions[-1]


def test_it_is_a_kind_of_reward_in_rewards_yaml(published: Path, base: Path) -> None:
    entry = {"kind": "videoalign", "path": str(published), "base": str(base), "template_sha256": tiny.TEMPLATE_SHA256}
    scorer = build_scorer(parse_reward(entry))
    assert isinstance(scorer, VideoAlignScorer)
    info = scorer.info("mine")
    assert (info.name, info.media, info.needs_prompt) == ("mine", ["video"], True)
    assert info.frame_spec.model_dump(exclude_none=True) == {
        "kind": "uniform",
        "fps": 2.0,
        "min_frames": 4,
        "max_frames": 768,
        "frames_multiple_of": 2,
        "max_frame_pixels": 200704,
        "multiple_of": 28,
        "interpolation": "bicubic, antialiased, rounded to uint8",
    }


@pytest.mark.parametrize("wrong", [{"reward": "VQ"}, {"template_sha256": "x"}, {"dtype": "float16"}, {"lora": True}, {}])
def test_settings_are_strict(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        VideoAlignConfig.model_validate({"kind": "videoalign", **({"path": "x"} if wrong else {}), **wrong})


def test_its_settings_are_a_light_import() -> None:
    code = "import sys, services.scorers.videoalign.config; print([m for m in ('torch', 'transformers', 'ray', 'redis', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout == "[]\n"
