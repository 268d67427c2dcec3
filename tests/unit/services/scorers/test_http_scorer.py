"""A remote reward behind our contract: a real service with real scorers on the other side, which also misbehaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from services.client.base import RewardError
from services.contract import ItemScore, ScoreFailure
from services.errors import ProblemError
from services.limits import LimitsConfig
from services.media.base import Image, Media
from services.rest.auth import parse_keys
from services.rest.ingress import make_app
from services.scorers.base import ScorerUnfit
from services.scorers.http import REMOTE_REFUSED, REMOTE_UNAVAILABLE, REVISION_CHANGED, HttpScorer
from services.scorers.settings import HttpReward, SceneReward

Draw = Callable[..., Image]
LIMITS = LimitsConfig(max_prompt_chars=100)


@pytest.fixture(scope="module")
def url(serve_app: Callable[[Any], str], backend: Any) -> str:
    return serve_app(make_app(backend, LIMITS))


@pytest.fixture(autouse=True)
def _well(backend: Any) -> Iterator[None]:
    yield
    backend.faults.clear()


def remote(url: str, model: str = "ocr", timeout_s: float = 20.0) -> HttpScorer:
    return HttpScorer(HttpReward(url=url, model=model, timeout_s=timeout_s))


def codes(results: list[ItemScore | ScoreFailure]) -> list[str]:
    return [r.code if isinstance(r, ScoreFailure) else "scored" for r in results]


def test_a_remote_reward_is_the_same_reward(url: str, backend: Any, draw: Draw) -> None:
    there, here = backend.scorers["ocr"], remote(url)
    prompts, media = ['"407"', "no quotes", '"409"'], [Media.image(draw("407"))] * 3
    assert here.score(prompts, media) == there.score(prompts, media)
    assert here.score([], []) == []
    ours, theirs = here.info(), there.info()
    assert ours.model_copy(update={"name": "ocr", "revision": theirs.revision}) == theirs
    assert ours.revision.endswith(theirs.revision)
    here.self_test()


def test_clips_of_different_sizes_travel(url: str, backend: Any) -> None:
    clips = [Media(np.random.default_rng(n).integers(0, 256, (n, 16, 8 * n, 3), np.uint8), fps=8) for n in (3, 5, 2)]
    there, here = backend.scorers["scene"], remote(url, "scene")
    results = here.score(["", "", ""], clips)
    assert results == there.score(["", "", ""], clips)
    assert codes(results) == ["scored", "scored", "too_few_frames"]


def test_a_refused_item_does_not_spoil_its_neighbours(url: str, draw: Draw) -> None:
    long = '"407"' + "x" * 200  # more than the other service takes
    results = remote(url).score(['"407"', long, '"407"', '"407"', long], [Media.image(draw("407"))] * 5)
    assert codes(results) == ["scored", REMOTE_REFUSED, "scored", "scored", REMOTE_REFUSED]
    refused = results[1]
    assert isinstance(refused, ScoreFailure)
    assert not refused.retryable
    assert url not in refused.message


def test_an_overloaded_service_is_a_retryable_failure_within_the_deadline(url: str, backend: Any, draw: Draw) -> None:
    here = remote(url, timeout_s=1.0)

    async def full() -> None:
        raise ProblemError(503, "queue_full", "full", retry_after_s=1)

    backend.faults["ocr"] = full
    results = here.score(['"407"'] * 2, [Media.image(draw("407"))] * 2)
    assert codes(results) == [REMOTE_UNAVAILABLE] * 2
    assert all(isinstance(r, ScoreFailure) and r.retryable for r in results)
    with pytest.raises(ScorerUnfit, match="503"):
        here.self_test()


def test_another_revision_is_not_passed_off_as_the_announced_one(url: str, backend: Any) -> None:
    here, image = remote(url, "scene"), Media.image(np.full((16, 16, 3), 9, np.uint8))
    before = backend.scorers["scene"]
    backend.scorers["scene"] = type(before)(SceneReward(reward="contrast"))
    try:
        assert codes(here.score([""], [image])) == [REVISION_CHANGED]
        with pytest.raises(ScorerUnfit, match="changed from revision"):
            here.self_test()
    finally:
        backend.scorers["scene"] = before
    assert codes(here.score([""], [image])) == ["scored"]


def test_a_service_that_is_not_there_or_lacks_the_reward(url: str) -> None:
    with pytest.raises(ScorerUnfit, match="cannot be reached"):
        remote("http://127.0.0.1:9", timeout_s=0.5)
    with pytest.raises(ScorerUnfit, match="no model 'pickscore'"):
        remote(url, "pickscore")


def test_the_key_comes_from_the_environment(serve_app: Callable[[Any], str], backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = serve_app(make_app(backend, LIMITS, keyring=parse_keys("trainer score sesame-sesame-sesame-sesame", "a test")))
    settings = HttpReward(url=guarded, model="scene", api_key_env="DDRL_TEST_REMOTE_KEY", timeout_s=5)
    with pytest.raises(RewardError, match="DDRL_TEST_REMOTE_KEY, which is not set"):
        HttpScorer(settings)
    monkeypatch.setenv("DDRL_TEST_REMOTE_KEY", "wrong-wrong-wrong-wrong-wrong")
    with pytest.raises(ScorerUnfit, match="401"):
        HttpScorer(settings)
    monkeypatch.setenv("DDRL_TEST_REMOTE_KEY", "sesame-sesame-sesame-sesame")
    HttpScorer(settings).self_test()
