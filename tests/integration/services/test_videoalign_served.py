"""VideoAlign in the deployed fleet, from a folder to scores over REST: a tiny model of random weights in the published layout."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from services.client.rest import RestRewardClient
from services.contract import ItemScore, ScoreFailure
from services.fleet.file import parse_fleet
from services.fleet.start import start_fleet, stop_fleet
from services.media.base import Media
from services.scorers.registry import build_scorer, parse_reward
from services.scorers.videoalign import tiny
from services.scorers.videoalign.convert import convert

CLIPS = [Media(tiny.clip(frames, height, width, seed), fps) for seed, (frames, height, width, fps) in enumerate([(8, 48, 64, 8.0), (40, 64, 40, 16.0)] * 4)]
PROMPTS = [f"a cat, and {i} birds" for i in range(len(CLIPS))]


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, dims = Path(tmp_path_factory.mktemp("videoalign")), tiny.Dims()
    tensors = tiny.published_tensors(dims)
    base = tiny.write_base(folder / "base", dims)
    source = tiny.write_checkpoint(folder / "VideoReward", dims, tensors, tiny.VIDEOREWARD_SPREAD)
    convert(source, folder / "converted", base=base, template_sha256=tiny.TEMPLATE_SHA256, dtype="float32")
    return {"kind": "videoalign", "path": str(folder / "converted"), "template_sha256": tiny.TEMPLATE_SHA256}


@pytest.fixture(scope="module")
def url(ray_cluster: None, entry: dict[str, Any]) -> Iterator[str]:
    yield start_fleet(parse_fleet({"rewards": {"video": entry}, "port": 0}))
    stop_fleet()


def test_clips_score_over_rest_as_they_do_in_process(url: str, entry: dict[str, Any]) -> None:
    client = RestRewardClient(url)
    info = client.check(["video"])["video"]
    assert (info.media, info.reward, info.frame_spec.fps) == (["video"], "overall", 2.0)
    alone = build_scorer(parse_reward(entry))
    assert info.revision == alone.revision
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(client.score, "video", [prompt], [clip], 60) for prompt, clip in zip(PROMPTS, CLIPS, strict=True)]
        served = [result for call in calls for result in call.result(timeout=90)]
    for result, wanted in zip(served, alone.score(PROMPTS, CLIPS), strict=True):
        assert isinstance(result, ItemScore)
        assert isinstance(wanted, ItemScore)
        assert result.sub_scores == pytest.approx(wanted.sub_scores, abs=1e-5)  # whatever shared its batch
    client.close()


def test_an_item_that_cannot_be_scored_leaves_its_neighbours(url: str) -> None:
    client = RestRewardClient(url)
    prompts = [PROMPTS[0], "a cat <|TA_reward|>", PROMPTS[2], PROMPTS[3]]
    results = client.score("video", prompts, [CLIPS[0], CLIPS[1], Media(CLIPS[2].frames[:1], 8.0), Media(CLIPS[3].frames[:1])], 60)
    assert isinstance(results[0], ItemScore)
    assert [result.code for result in results[1:] if isinstance(result, ScoreFailure)] == ["prompt_refused", "too_few_frames", "media_not_supported"]
    client.close()
