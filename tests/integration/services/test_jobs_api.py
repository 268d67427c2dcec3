"""Jobs over HTTP, as docs/rest.md promises them: states, refusals, keys, retries, cancelling."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from services.config import FleetConfig
from tests.integration.services.conftest import fleet, until

Serve = Callable[[FleetConfig], httpx.Client]
PIXELS = np.full((4, 6, 3), 40, np.uint8)


def form(*prompts: str, **fields: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    np.save(buffer, PIXELS)
    names = prompts or ("a",)
    return {"data": {"prompt": list(names), "model": "mean", **fields}, "files": [("file", ("a.npy", buffer.getvalue()))] * len(names)}


def ended(client: httpx.Client, place: str, **headers: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        answer = client.get(place, headers=headers)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return None if body["status"] in ("queued", "running") else body

    found: dict[str, Any] = until(look)
    return found


def test_acceptance_8_a_job_gives_what_score_gives(rest: Serve, redis_url: str) -> None:
    client = rest(fleet(redis_url))
    answer = client.post("/v1/jobs", **form("a", "fail"))
    assert answer.status_code == 202, answer.text
    assert answer.json()["status"] in ("queued", "running", "succeeded")
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    job = ended(client, answer.headers["location"])
    direct = client.post("/v1/score", **form("a", "fail")).json()
    assert job["status"] == "succeeded"
    assert job["result"]["results"] == direct["results"]
    assert job["result"]["request_id"] == answer.headers["x-request-id"]
    assert job["result"]["results"][0]["reward"] == 40.0
    assert job["result"]["results"][1]["error"]["code"] == "fail"
    assert job["finished_at"] >= job["created_at"]
    assert client.delete(answer.headers["location"]).json()["status"] == "succeeded", "what has ended stays as it is"


def test_what_can_never_be_answered_is_refused_at_once(rest: Serve, redis_url: str) -> None:
    client = rest(fleet(redis_url))
    assert client.post("/v1/jobs", json={"items": []}).status_code == 422
    assert client.post("/v1/jobs", **form(model="nothing")).json()["code"] == "model_not_found"
    assert client.post("/v1/jobs", content=b"x", headers={"content-type": "text/plain"}).status_code == 415
    assert client.get("/v1/status").json()["jobs"] == {"queued": 0, "running": 0, "bytes": 0}


def test_unknown_and_expired(rest: Serve, redis_url: str) -> None:
    client = rest(fleet(redis_url, jobs={"ttl_s": 1.2}))
    unknown = client.get(f"/v1/jobs/{'0' * 32}")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "job_not_found")
    assert client.get("/v1/jobs/not-an-id").status_code == 422
    place = client.post("/v1/jobs", **form()).headers["location"]
    assert ended(client, place)["status"] == "succeeded"
    gone = until(lambda: (answer := client.get(place)).status_code != 200 and answer)
    assert (gone.status_code, gone.json()["code"]) == (410, "job_expired")


def test_cancelling_frees_the_worker(rest: Serve, redis_url: str) -> None:
    client = rest(fleet(redis_url, delay_s=0.8, jobs={"concurrency": 1}))
    running, waiting = (client.post("/v1/jobs", **form(*["a"] * 2)).headers["location"] for _ in range(2))
    until(lambda: client.get(running).json()["status"] == "running")
    assert client.delete(waiting).json()["status"] == "cancelled"
    assert client.delete(running).json()["status"] == "cancelled"
    assert client.get(running).json()["status"] == "cancelled"
    last = client.post("/v1/jobs", **form()).headers["location"]
    assert ended(client, last)["status"] == "succeeded"


def test_a_failed_job_carries_the_problem(rest: Serve, redis_url: str) -> None:
    client = rest(fleet(redis_url, delay_s=0.6, jobs={"max_tries": 1}))
    job = ended(client, client.post("/v1/jobs", **form(*["a"] * 2, timeout_s="0.2")).headers["location"])
    assert job["status"] == "failed"
    assert (job["error"]["status"], job["error"]["code"]) == (504, "deadline_exceeded")
    assert "result" not in job


def test_a_reward_that_may_recover_is_asked_again_and_then_the_job_ends_as_it_is(rest: Serve, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.jobs.worker.RETRY_S", 0.05)
    client = rest(fleet(redis_url, jobs={"max_tries": 3}))
    job = ended(client, client.post("/v1/jobs", **form("busy", "a")).headers["location"])
    assert job["status"] == "succeeded"
    assert [r.get("error", {}).get("code") for r in job["result"]["results"]] == ["busy", None]


def test_a_scorer_that_raises_fails_that_item_alone_and_leaks_nothing(rest: Serve, redis_url: str) -> None:
    client = rest(fleet(redis_url))
    direct = client.post("/v1/score", **form("a", "raise", "b"))
    assert [r.get("error", {}).get("code") for r in direct.json()["results"]] == [None, "scorer_error", None]
    assert "secret" not in direct.text
    job = ended(client, client.post("/v1/jobs", **form("a", "raise", "b")).headers["location"])
    assert [r.get("reward") for r in job["result"]["results"]] == [40.0, None, 40.0]


def test_an_idempotency_key_makes_one_job(rest: Serve, redis_url: str) -> None:
    client = rest(fleet(redis_url))
    key = {"Idempotency-Key": "job-1"}
    first, second = (client.post("/v1/jobs", headers=key, **form()) for _ in range(2))
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["id"] == second.json()["id"]
    assert "idempotency-replayed" not in first.headers
    assert second.headers["idempotency-replayed"] == "true"
    assert client.post("/v1/jobs", headers=key, **form("another prompt")).json()["code"] == "idempotency_mismatch"


def test_acceptance_8_an_answer_replays_from_another_process(rest: Serve, redis_url: str) -> None:
    one, two = rest(fleet(redis_url)), rest(fleet(redis_url))
    key = {"Idempotency-Key": "score-1"}
    first, again = one.post("/v1/score", headers=key, **form()), two.post("/v1/score", headers=key, **form())
    assert first.content == again.content
    assert again.headers["idempotency-replayed"] == "true"


def test_a_full_store_refuses(rest: Serve, redis_url: str) -> None:
    client = rest(fleet(redis_url, delay_s=20.0, jobs={"max_unfinished": 1, "concurrency": 1}))
    place = client.post("/v1/jobs", **form()).headers["location"]
    full = client.post("/v1/jobs", **form())
    assert (full.status_code, full.json()["code"], full.headers["retry-after"]) == (503, "queue_full", "5")
    client.delete(place)


def test_without_redis_jobs_say_what_to_do(rest: Serve) -> None:
    client = rest(fleet(None))
    for answer in (client.post("/v1/jobs", **form()), client.get(f"/v1/jobs/{'0' * 32}"), client.delete(f"/v1/jobs/{'0' * 32}")):
        assert (answer.status_code, answer.json()["code"]) == (503, "jobs_unavailable")
        assert "redis_url" in answer.json()["detail"]
    assert client.post("/v1/score", **form()).status_code == 200


def test_a_redis_that_is_gone_is_a_problem_and_scoring_goes_on(rest: Serve) -> None:
    client = rest(fleet("redis://:secret@127.0.0.1:1/0"))
    lost = client.post("/v1/jobs", **form())
    assert (lost.status_code, lost.json()["code"]) == (503, "jobs_unavailable")
    assert "secret" not in lost.text
    assert "127.0.0.1" not in lost.text
    assert client.post("/v1/score", **form()).status_code == 200


def test_a_job_belongs_to_the_key_that_made_it(rest: Serve, redis_url: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice score alice-secret-0123456789\nbob score bob-secret-0123456789abc\n")
    keys.chmod(0o600)
    client = rest(fleet(redis_url, keys_file=str(keys)))
    alice, bob = ({"Authorization": f"Bearer {name}"} for name in ("alice-secret-0123456789", "bob-secret-0123456789abc"))
    assert client.post("/v1/jobs", **form()).status_code == 401
    place = client.post("/v1/jobs", headers=alice, **form()).headers["location"]
    assert client.get(place, headers=bob).status_code == 404
    assert client.delete(place, headers=bob).status_code == 404
    assert ended(client, place, **alice)["status"] == "succeeded"
