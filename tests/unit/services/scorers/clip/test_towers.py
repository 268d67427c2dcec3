"""Cosine rewards on tiny random CLIP models against transformers' own pipeline; folders that must not load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from services.contract import ItemScore, ScoreFailure
from services.media.base import Image, Media
from services.media.frames import take
from services.scorers.clip.errors import ModelFolderError
from services.scorers.clip.scorers import ClipScorer, PickScorer
from services.scorers.clip.tiny import TEXT_LENGTH, write_clip
from services.scorers.settings import ClipScoreReward, PickScoreReward

PROMPTS = ["a red square", "Two dogs, RED and blue!", "日本 née", ""]
RNG = np.random.default_rng(3)
IMAGES: list[Image] = [RNG.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((64, 48), (32, 32), (40, 90), (7, 5))]


@pytest.fixture(scope="module")
def scorer(clip_folder: Path) -> ClipScorer:
    return ClipScorer(ClipScoreReward(path=clip_folder))


def scores(results: list[ItemScore | ScoreFailure], name: str) -> list[float]:
    assert all(isinstance(r, ItemScore) for r in results), results
    return [r.sub_scores[name] for r in results if isinstance(r, ItemScore)]


def on_images(scorer: ClipScorer | PickScorer, prompts: list[str] = PROMPTS) -> list[ItemScore | ScoreFailure]:
    return scorer.score(prompts, [Media.image(image) for image in IMAGES])


def reference_logits(folder: Path) -> tuple[list[float], float]:
    """transformers' processor and forward pass, the way its documentation shows."""
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder))
    model = CLIPModel.from_pretrained(folder).eval()
    inputs = processor(text=PROMPTS, images=IMAGES, padding=True, truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits_per_image.diagonal().tolist(), float(model.logit_scale.exp())


def test_clipscore_equals_transformers(scorer: ClipScorer, clip_folder: Path) -> None:
    logits, scale = reference_logits(clip_folder)
    results = on_images(scorer)
    assert scores(results, "cosine") == pytest.approx([x / scale for x in logits], abs=1e-5)
    assert scores(results, "flow_grpo") == pytest.approx([x / 30 for x in logits], abs=1e-4)
    assert scores(results, "clipscore") == pytest.approx([max(0.0, 2.5 * x / scale) for x in logits], abs=1e-5)
    assert [r.reward for r in results if isinstance(r, ItemScore)] == scores(results, "clipscore")


def test_pickscore_equals_transformers(clip_folder: Path) -> None:
    logits, _ = reference_logits(clip_folder)
    results = on_images(PickScorer(PickScoreReward(path=clip_folder)))
    assert scores(results, "logit") == pytest.approx(logits, abs=1e-3)
    assert scores(results, "pickscore") == pytest.approx([x / 26 for x in logits], abs=1e-4)


def test_the_scores_tell_prompts_and_pictures_apart(scorer: ClipScorer) -> None:
    assert len({round(x, 4) for x in scores(on_images(scorer), "cosine")}) == len(IMAGES)
    scorer.self_test()


def test_company_and_order_do_not_matter(scorer: ClipScorer) -> None:
    together = scores(on_images(scorer), "cosine")
    alone = [scores(scorer.score([p], [Media.image(i)]), "cosine")[0] for p, i in zip(PROMPTS, IMAGES, strict=True)]
    backwards = scores(scorer.score(PROMPTS[::-1], [Media.image(i) for i in IMAGES[::-1]]), "cosine")[::-1]
    assert together == pytest.approx(alone, abs=1e-5)
    assert together == pytest.approx(backwards, abs=1e-5)


def test_batches_are_cut_by_cost_without_changing_scores(scorer: ClipScorer, clip_folder: Path) -> None:
    cut = ClipScorer(ClipScoreReward(path=clip_folder, batch_cost=1))
    assert scores(on_images(cut), "cosine") == pytest.approx(scores(on_images(scorer), "cosine"), abs=1e-5)


def test_a_clip_is_the_mean_of_evenly_spaced_frames(clip_folder: Path) -> None:
    scorer = ClipScorer(ClipScoreReward(path=clip_folder, frames=3))
    clip = Media(np.stack([np.full((20, 30, 3), 25 * i, np.uint8) for i in range(9)]), fps=8)
    (whole,) = scorer.score(["red"], [clip])
    parts = scores(scorer.score(["red"] * 3, [Media.image(clip.frames[i]) for i in (0, 4, 8)]), "cosine")
    assert scores([whole], "cosine") == pytest.approx([sum(parts) / 3], abs=1e-5)
    chosen = take(scorer.frame_spec, clip)
    assert scorer.cost(clip) == scorer.cost(chosen) == 3 * 32 * 32
    assert scorer.score(["red"], [chosen]) == [whole]


def test_what_cannot_be_scored_fails_alone(scorer: ClipScorer) -> None:
    empty = Media(np.zeros((1, 0, 5, 3), np.uint8))
    image = Media.image(IMAGES[0])
    first, ended, started, blank, broken, last = scorer.score(
        ["red", "see <|endoftext|> here", "<|startoftext|>", "red", "\ud800", "red"], [image, image, image, empty, image, image]
    )
    assert first == last
    codes = [r.code for r in (ended, started, blank, broken) if isinstance(r, ScoreFailure)]
    assert codes == ["prompt_refused", "prompt_refused", "image_invalid", "prompt_invalid"]


def test_a_long_prompt_is_cut_at_the_end(scorer: ClipScorer) -> None:
    long = "red " * 100
    (full,), (cut,) = (scorer.score([p], [Media.image(IMAGES[0])]) for p in (long, "red " * 22))
    assert full == cut


def test_broken_weights_fail_the_item_and_the_self_test(tmp_path: Path) -> None:
    write_clip(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"visual_projection.weight": t["visual_projection.weight"] * float("nan")}))
    scorer = ClipScorer(ClipScoreReward(path=tmp_path))
    (result,) = scorer.score(["red"], [Media.image(IMAGES[0])])
    assert isinstance(result, ScoreFailure)
    assert result.code == "not_finite"
    with pytest.raises(RuntimeError, match="not_finite"):
        scorer.self_test()


def rewrite(folder: Path, change: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("visual_projection.weight"), "1 missing"),
        (lambda t: t.update(extra=torch.zeros(2)), r"1 unexpected \(extra\)"),
        (lambda t: t.update({"visual_projection.weight": torch.zeros(3, 3)}), "shape"),
    ],
)
def test_a_folder_with_other_tensors_is_refused(change: object, says: str, tmp_path: Path) -> None:
    write_clip(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ModelFolderError, match=says):
        ClipScorer(ClipScoreReward(path=tmp_path))


def test_buffers_of_old_checkpoints_are_no_obstacle(clip_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(clip_folder, tmp_path / "old")
    rewrite(tmp_path / "old", lambda t: t.update({f"{tower}_model.embeddings.position_ids": torch.arange(9)[None] for tower in ("text", "vision")}))
    old, new = (ClipScorer(ClipScoreReward(path=folder)) for folder in (tmp_path / "old", clip_folder))
    assert on_images(old) == on_images(new)
    assert old.revision != new.revision


@pytest.mark.parametrize("lacking", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_an_incomplete_folder_is_refused(lacking: str, clip_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(clip_folder, tmp_path / "model")
    (tmp_path / "model" / lacking).unlink()
    with pytest.raises(ModelFolderError):
        ClipScorer(ClipScoreReward(path=tmp_path / "model"))


def test_weights_in_pickles_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(clip_folder, tmp_path / "model")
    torch.save(load_file(tmp_path / "model" / "model.safetensors"), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError):
        ClipScorer(ClipScoreReward(path=tmp_path / "model"))


def test_a_tokenizer_of_another_model_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(clip_folder, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["eos_token_id"] = 5
    file.write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match="does not fit"):
        ClipScorer(ClipScoreReward(path=tmp_path / "model"))


def test_the_end_token_of_old_configs_reads_the_same_place(clip_folder: Path, tmp_path: Path) -> None:
    """Configs before 2023 say 2; transformers then takes the highest id, which is CLIP's end token."""
    shutil.copytree(clip_folder, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["eos_token_id"] = 2
    file.write_text(json.dumps(config))
    old, new = (ClipScorer(ClipScoreReward(path=folder)) for folder in (tmp_path / "model", clip_folder))
    assert on_images(old) == on_images(new)


def test_a_processor_of_another_folder(clip_folder: Path, tmp_path: Path) -> None:
    """PickScore's weights come without a tokenizer; its authors take the base model's."""
    shutil.copytree(clip_folder, tmp_path / "model", ignore=lambda *_: {"tokenizer.json", "preprocessor_config.json"})
    apart = PickScorer(PickScoreReward(path=tmp_path / "model", processor=clip_folder))
    assert on_images(apart) == on_images(PickScorer(PickScoreReward(path=clip_folder)))


def test_half_precision_is_close(scorer: ClipScorer, clip_folder: Path) -> None:
    half = ClipScorer(ClipScoreReward(path=clip_folder, dtype="bfloat16"))
    assert scores(on_images(half), "cosine") == pytest.approx(scores(on_images(scorer), "cosine"), abs=0.05)
    assert half.revision != scorer.revision
