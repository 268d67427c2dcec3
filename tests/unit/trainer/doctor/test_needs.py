"""What a recipe needs, looked for: files, GPUs, packages, and services on loopback that answer or do not."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from replay.embedded import EmbeddedRedis
from tests.unit.trainer.doctor.facts import H100
from trainer.config.load import load_config
from trainer.config.run import RunConfig
from trainer.doctor.needs import gather_recipe, lacking, planned, redis_of, rewards_of, uncached

RECIPE = Path(__file__).resolve().parents[4] / "recipes" / "glyph-ocr.yaml"
MODELS = {"models": [{"name": "redness", "revision": "redness-1", "media": ["image"], "reward": "redness", "sub_scores": ["redness"]}]}


def settings(*overrides: str) -> RunConfig:
    return load_config(RECIPE, list(overrides))


class Service(BaseHTTPRequestHandler):
    """The smallest reward service of docs/own.md, its list of models alone."""

    def do_GET(self) -> None:
        body = json.dumps(MODELS).encode()
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_demo_on_a_machine_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPE.parents[1])
    found = gather_recipe(RECIPE, settings(), ())
    assert (found.files_error, found.plan_error, found.lacking, found.hub, found.services) == ("", "", {}, "", ())
    assert found.object_store >= 80 << 20
    assert found.plan is not None
    assert (found.plan.where, found.plan.errors) == ("a machine without GPUs", ())
    assert found.plan.disk > 0
    assert found.plan.hosts > 0


def test_files_that_are_missing() -> None:
    found = gather_recipe(RECIPE, settings("model.path=nowhere"), ())
    assert "nowhere does not exist" in found.files_error
    assert found.plan is None
    assert "nowhere" in found.plan_error


def test_a_plan_on_the_gpus_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPE.parents[1])
    wants = settings("learner.ranks=1", "learner.gpus=1")
    assert planned(wants, [H100]).errors == ()
    assert planned(wants, [H100]).where == "1 x NVIDIA H100 80GB HBM3"
    assert any("find no GPU" in error for error in planned(wants, []).errors)
    assert planned(settings("ray.address=auto", "redis.url=redis://host:6379/0"), []).where == ""


def test_packages_of_extras() -> None:
    assert lacking(settings("wandb_project=mine")) in ({}, {"wandb": "wandb"})  # the extra is no part of dev
    assert lacking(settings()) == {}


def test_a_policy_of_the_hub(cached_policy: tuple[str, Path]) -> None:
    assert uncached(settings(f"model.path={cached_policy[0]}")) == ""
    assert uncached(settings("model.path=team/other")) == "team/other"
    assert uncached(settings("model.path=recipes/glyph-base")) == ""


def test_redis_answers_and_is_fit(tmp_path: Path) -> None:
    assert redis_of(settings(), 1.0) == []
    with EmbeddedRedis.start(tmp_path, max_bytes=None) as server:
        (found,) = redis_of(settings(f"redis.url={server.url}"), 5.0)
        assert (found.error, found.answer) == ("", f"redis-server {server.version}")
        assert ":***@127.0.0.1" in found.where
        (small,) = redis_of(settings(f"redis.url={server.url}", "replay.max_bytes=1000000000000000"), 5.0)
        assert "do not fit" in small.error


def test_redis_that_does_not_answer() -> None:
    (found,) = redis_of(settings("redis.url=redis://:sesame@127.0.0.1:9/0"), 0.5)
    assert "cannot reach Redis" in found.error
    assert "sesame" not in repr(found)


def test_reward_services(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rewards_of(settings(), 1.0) == []
    (whole,) = rewards_of(settings(f"fleet.url={url}", "rewards={redness: {weight: 1.0}}"), 5.0)
    assert (whole.what, whole.answer, whole.error) == ("fleet.url", "offers redness", "")
    entry = "fleet.rewards={there: {kind: http, url: '%s', model: %s}}"
    (one,) = rewards_of(settings(entry % (url, "redness"), "held_out_rewards=[there]"), 5.0)
    assert (one.what, one.answer) == ("fleet.rewards.there.url", "offers redness")
    (other,) = rewards_of(settings(entry % (url, "hpsv2"), "held_out_rewards=[there]"), 5.0)
    assert other.error == "it has no reward hpsv2; it has redness"
    monkeypatch.delenv("DDRL_TEST_KEY", raising=False)
    (keyless,) = rewards_of(settings(f"fleet.url={url}", "fleet.api_key_env=DDRL_TEST_KEY", "rewards={redness: {weight: 1.0}}"), 5.0)
    assert keyless.error == "fleet.api_key_env names DDRL_TEST_KEY, which is not set"


def test_a_reward_service_that_is_not_there() -> None:
    (found,) = rewards_of(settings("fleet.url=http://127.0.0.1:9", "rewards={redness: {weight: 1.0}}"), 0.5)
    assert "cannot be reached" in found.error
