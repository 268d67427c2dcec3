"""The real OCR engine on clean, blank, broken and mixed pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from services.contract import ItemScore, ScoreFailure
from services.media.base import Image, Media
from services.media.frames import take
from services.scorers.ocr import ENGINE_ERROR, OcrScorer
from services.scorers.settings import OcrReward
from services.scorers.text import NO_QUOTED_TEXT

Draw = Callable[..., Image]


@pytest.fixture(scope="module")
def scorer() -> OcrScorer:
    return OcrScorer(OcrReward())


def score(scorer: OcrScorer, prompts: list[str], images: list[Image]) -> list[ItemScore | ScoreFailure]:
    return scorer.score(prompts, [Media.image(image) for image in images])


def rewards(results: list[ItemScore | ScoreFailure]) -> list[float]:
    assert all(isinstance(r, ItemScore) for r in results), results
    return [r.reward for r in results if isinstance(r, ItemScore)]


def test_clean_text_is_read_perfectly(scorer: OcrScorer, draw: Draw) -> None:
    styles = [
        ("DejaVuSans", (0, 0, 0), (255, 255, 255)),
        ("DejaVuSans-Bold", (250, 240, 80), (40, 60, 120)),
        ("DejaVuSansMono", (30, 120, 40), (220, 200, 180)),
    ]
    words = ["407", "862", "175", "039"]
    cases = [(w, draw(w, px, *style)) for w in words for px in (11, 12, 13, 14) for style in styles]
    results = score(scorer, [f'the number "{w}"' for w, _ in cases], [image for _, image in cases])
    assert rewards(results) == [1.0] * len(cases)


def test_wrong_blank_and_noisy_pictures(scorer: OcrScorer, draw: Draw) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 48, 3), dtype=np.uint8)
    blank = np.full((16, 48, 3), 255, np.uint8)
    results = score(scorer, ['"862"', '"409"', '"407"', '"407"'], [draw("407"), draw("407"), noise, blank])
    assert rewards(results) == [0.0, pytest.approx(2 / 3), 0.0, 0.0]


def test_results_do_not_depend_on_the_batch(scorer: OcrScorer, draw: Draw) -> None:
    narrow, wide = draw("407"), np.hstack([draw("407"), draw("862")])
    images = [narrow, wide, draw("13"), narrow] * 5
    prompts = ['"407"', '"407862"', '"13"', '"40"'] * 5
    together = score(scorer, prompts, images)
    alone = [score(scorer, [p], [i])[0] for p, i in zip(prompts[:4], images[:4], strict=True)]
    assert together == alone * 5
    assert rewards(alone) == [1.0] * 4


def test_failures_stay_with_their_item(scorer: OcrScorer, draw: Draw) -> None:
    unreadable = np.zeros((0, 48, 3), np.uint8)  # makes the engine raise
    results = score(scorer, ['"407"', "no quotes", '"407"', '"407"'], [draw("407"), draw("407"), unreadable, draw("407")])
    first, unquoted, broken, last = results
    assert rewards([first, last]) == [1.0, 1.0]
    assert isinstance(unquoted, ScoreFailure)
    assert unquoted.code == NO_QUOTED_TEXT
    assert isinstance(broken, ScoreFailure)
    assert broken.code == ENGINE_ERROR
    assert "Traceback" not in broken.message


def test_the_revision_names_what_changes_the_numbers(scorer: OcrScorer) -> None:
    parts = scorer.revision.split(";")
    assert parts[1].startswith("rapidocr-")
    assert parts[2] == "PP-OCRv6_rec_small"
    assert parts[3:] == ["recognition", "upscale-3-cubic", "confidence-0.5", "stride-4"]
    assert OcrScorer(OcrReward(mode="strict")).revision != scorer.revision
    assert OcrScorer(OcrReward(upscale=2)).revision != scorer.revision
    assert scorer.info().revision == scorer.revision


@pytest.mark.parametrize("config", [OcrReward(), OcrReward(upscale=1), OcrReward(reading="detection", upscale=1)])
def test_self_test_passes(config: OcrReward) -> None:
    OcrScorer(config).self_test()


def test_detection_finds_two_lines(draw: Draw) -> None:
    big = np.kron(np.vstack([draw("407"), draw("862")]), np.ones((4, 4, 1), np.uint8)).astype(np.uint8)
    assert rewards(score(OcrScorer(OcrReward(reading="detection", upscale=1)), ['"407862"'], [big])) == [1.0]


def test_a_clip_is_read_at_every_fourth_frame(scorer: OcrScorer, draw: Draw) -> None:
    good, other = draw("407"), draw("862")
    clip = np.stack([good, other, other, other, good, other, other, other, draw("40")])
    (result,) = scorer.score(['"407"'], [Media(clip, fps=8)])
    assert isinstance(result, ItemScore)
    assert result.sub_scores["flow_grpo"] == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert result.sub_scores["strict"] == pytest.approx(2 / 3)
    assert result.text == "40"
    (chosen,) = scorer.score(['"407"'], [take(scorer.frame_spec, Media(clip, fps=8))])
    assert chosen == result


def test_images_and_clips_in_one_batch(scorer: OcrScorer, draw: Draw) -> None:
    image, clip = Media.image(draw("407")), Media(np.stack([draw("862")] * 5), fps=8)
    broken = Media(np.zeros((5, 0, 48, 3), np.uint8), fps=8)
    first, second, third, fourth = scorer.score(['"407"', '"862"', '"407"', "no quotes"], [image, clip, broken, clip])
    assert rewards([first, second]) == [1.0, 1.0]
    assert isinstance(third, ScoreFailure)
    assert third.code == ENGINE_ERROR
    assert isinstance(fourth, ScoreFailure)
    assert fourth.code == NO_QUOTED_TEXT


@pytest.mark.parametrize("mode", ["cosmos", "strict"])
def test_the_mode_is_the_reward(mode: Literal["cosmos", "strict"], draw: Draw) -> None:
    scorer = OcrScorer(OcrReward(mode=mode))
    scorer.self_test()
    assert scorer.info().reward == mode
    (result,) = score(scorer, ['"4 0"'], [draw("407")])
    assert rewards([result]) == [{"cosmos": 1.0, "strict": pytest.approx(2 / 3)}[mode]]


def test_acceptance_6_rendered_targets_of_flow_grpo_are_read(shared_data: Callable[[str], Path], draw_line: Draw) -> None:
    """The first 60 targets of flow_grpo's OCR test prompts, drawn large and clean: mean reward at least 0.99."""
    prompts = shared_data("ocr/test.txt").read_text().splitlines()[:60]
    scorer = OcrScorer(OcrReward(reading="detection", upscale=1))
    pictures = [Media.image(draw_line(prompt.split('"')[1])) for prompt in prompts]
    each = rewards(scorer.score(prompts, pictures))
    assert float(np.mean(each)) >= 0.99, [(p.split('"')[1], r) for p, r in zip(prompts, each, strict=True) if r < 1]
