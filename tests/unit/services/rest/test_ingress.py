"""The REST ingress over a real scorer and a real HTTP server: forms, per-item results, limits, problems."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as PILImage

from services.client.rest import RestRewardClient
from services.contract import ItemScore, ScoreFailure
from services.limits import LimitsConfig
from services.media.base import Image
from services.rest.ingress import make_app
from services.rest.schemas import Problem, ScoreResponse

LIMITS = LimitsConfig(max_body_bytes=65_536, max_items=8, max_pixels=10_000, max_total_pixels=40_000, max_prompt_chars=100)


@pytest.fixture(scope="module")
def url(serve_app: Callable[[Any], str], backend: Any) -> str:
    return serve_app(make_app(backend, LIMITS))


@pytest.fixture(scope="module")
def png(draw: Callable[..., Image]) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(draw("407")).save(buffer, "PNG")
    return buffer.getvalue()


def problem(answer: httpx.Response, status: int, code: str) -> Problem:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document = Problem.model_validate_json(answer.content)
    assert (document.status, document.code) == (status, code)
    return document


def form(url: str, prompts: list[str], files: list[bytes], **fields: str) -> httpx.Response:
    return httpx.post(
        f"{url}/v1/score",
        data={"prompt": prompts, **fields},
        files=[("file", (f"{i}", data)) for i, data in enumerate(files)],
        timeout=30,
    )


def test_multipart_and_json_give_the_same_scores(url: str, png: bytes) -> None:
    prompts = ['"407"', '"409"']
    by_form = form(url, prompts, [png, png], model="ocr")
    items = [{"prompt": p, "image": base64.b64encode(png).decode()} for p in prompts]
    by_json = httpx.post(f"{url}/v1/score", json={"model": "ocr", "items": items}, timeout=30)
    assert by_form.status_code == by_json.status_code == 200
    assert by_form.json() | {"request_id": ""} == by_json.json() | {"request_id": ""}
    answer = ScoreResponse.model_validate_json(by_form.content)
    assert [r.reward for r in answer.results] == [1.0, pytest.approx(2 / 3)]
    assert answer.model == "ocr"
    assert "upscale-3" in answer.revision
    assert answer.results[0].scores is not None
    assert set(answer.results[0].scores.values()) == {1.0}


def test_acceptance_8_failures_are_typed_per_item(url: str, png: bytes) -> None:
    answer = form(url, ['"407"', "none", '""', '"407"'], [png, png, png, b"junk"], model="ocr")
    items = answer.json()["results"]
    assert items[0]["reward"] == 1.0
    codes = [item["error"]["code"] for item in items[1:]]
    assert codes == ["no_quoted_text", "empty_target", "media_invalid"]
    assert all("reward" not in item and "scores" not in item for item in items[1:])


@pytest.mark.parametrize("encoding", ["npy", "safetensors", "png"])
def test_the_client_agrees_with_the_service(url: str, draw: Callable[..., Image], encoding: Any) -> None:
    client = RestRewardClient(url, encoding=encoding, chunk_items=3)
    try:
        assert client.check(["ocr"])["ocr"].name == "ocr"
        results = client.score("ocr", ['"407"'] * 7 + ["none"], np.stack([draw("407")] * 8), 30)
    finally:
        client.close()
    assert [r.reward for r in results[:7] if isinstance(r, ItemScore)] == [1.0] * 7
    assert isinstance(results[7], ScoreFailure)
    assert results[7].code == "no_quoted_text"


def test_acceptance_8_limits(url: str, png: bytes) -> None:
    problem(form(url, ['"1"'], [b"x" * 70_000]), 413, "body_too_large")

    def stream() -> Any:  # no Content-Length: the cap works on what arrives
        for _ in range(70):
            yield b"x" * 1000

    headers = {"content-type": "application/json"}
    streamed = httpx.post(f"{url}/v1/score", content=stream(), headers=headers)
    problem(streamed, 413, "body_too_large")
    batch = io.BytesIO()
    np.save(batch, np.zeros((9, 1, 1, 3), np.uint8))
    problem(form(url, ['"1"'] * 8, [batch.getvalue()], model="ocr"), 413, "too_many_items")
    problem(form(url, ['"1"'] * 9, [png] * 9, model="ocr"), 413, "too_many_items")
    large = io.BytesIO()
    PILImage.new("RGB", (200, 100)).save(large, "PNG")
    problem(form(url, ['"1"'], [large.getvalue()], model="ocr"), 413, "image_too_large")
    problem(form(url, ['"1"' + "x" * 101], [png]), 413, "prompt_too_long")
    items = [{"prompt": '"1"', "image": "AAA="}] * 9
    problem(httpx.post(f"{url}/v1/score", json={"items": items}), 413, "too_many_items")


def test_acceptance_8_wrong_requests(url: str, png: bytes) -> None:
    problem(form(url, ['"1"', '"2"'], [png], model="ocr"), 422, "invalid_request")
    unnamed = httpx.post(f"{url}/v1/score", files=[("picture", ("x", png))])
    assert "unknown field 'picture'" in problem(unnamed, 422, "invalid_request").detail
    problem(form(url, ['"1"'], [png], model="nope"), 404, "model_not_found")
    problem(httpx.post(f"{url}/v1/score", content=b"x"), 415, "unsupported_media_type")
    problem(form(url, ['"1"'], [png]), 422, "invalid_request")  # two models: one must be named
    problem(form(url, ['"1"'], [png], modle="ocr"), 422, "invalid_request")
    problem(httpx.post(f"{url}/v1/score", json={"items": [{"prompt": "p"}]}), 422, "invalid_request")
    bad = {"items": [{"prompt": '"1"', "image": "no base64!"}]}
    problem(httpx.post(f"{url}/v1/score", json=bad), 422, "invalid_request")
    headers = {"content-type": "application/json"}
    deep = httpx.post(f"{url}/v1/score", content=b"[" * 50_000, headers=headers)
    problem(deep, 413, "json_too_large")
    headers = {"content-type": "multipart/form-data; boundary=x"}
    problem(httpx.post(f"{url}/v1/score", content=b"junk", headers=headers), 400, "invalid_request")
    problem(httpx.get(f"{url}/v1/score"), 405, "method_not_allowed")
    problem(httpx.get(f"{url}/v2"), 404, "not_found")


def test_a_bug_answers_a_problem_without_internals(url: str, backend: Any, png: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def crash() -> None:
        raise RuntimeError("secret detail in /srv/internal.py")

    backend.faults["ocr"] = crash
    try:
        answer = form(url, ['a private "prompt"'], [png], model="ocr")
    finally:
        backend.faults.clear()
    document = problem(answer, 500, "internal_error")
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert document.request_id in caplog.text
    assert "private" not in caplog.text


def test_descriptions(url: str) -> None:
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    ocr, scene = httpx.get(f"{url}/v1/models").json()["models"]
    assert (ocr["name"], scene["name"]) == ("ocr", "scene")
    assert ocr["reward"] in ocr["sub_scores"]
    assert httpx.get(f"{url}/v1/models/ocr").json() == ocr
    problem(httpx.get(f"{url}/v1/models/other"), 404, "model_not_found")
    problem(httpx.get(f"{url}/v1/models/%20"), 422, "invalid_request")
    page = httpx.get(f"{url}/docs")
    assert page.status_code == 200
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)|url: '([^']+)""", page.text)
    assert sorted(a or b for a, b in addresses) == ["docs/favicon.png", "docs/swagger-ui-bundle.js", "docs/swagger-ui.css", "openapi.json"]
    assert "//" not in re.sub(r"<!--.*?-->", "", page.text, flags=re.DOTALL), "nothing comes from elsewhere"
    kinds = [httpx.get(f"{url}/{a or b}").headers["content-type"].partition(";")[0] for a, b in addresses]
    assert sorted(kinds) == ["application/json", "image/png", "text/css", "text/javascript"]
    document = httpx.get(f"{url}/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert {"ScoreRequest", "ScoreItem", "ScoreResponse", "MultiScoreResponse", "TensorRequest", "Combine", "Problem"} <= schemas.keys()
    assert "multipart/form-data" in document["paths"]["/v1/score"]["post"]["requestBody"]["content"]


def test_readiness_asks_about_all_or_some(url: str, backend: Any) -> None:
    assert httpx.get(f"{url}/readyz").json() == {"status": "ready", "models": ["ocr", "scene"]}
    backend.faults["scene"] = None
    try:
        refused = httpx.get(f"{url}/readyz")
        assert httpx.get(f"{url}/readyz?model=ocr").json()["models"] == ["ocr"]
    finally:
        backend.faults.clear()
    assert problem(refused, 503, "not_ready").detail == "not ready: scene"
    assert int(refused.headers["retry-after"]) >= 1
    problem(httpx.get(f"{url}/readyz?model=other"), 404, "model_not_found")


def test_figures(url: str, png: bytes) -> None:
    form(url, ['"407"'], [b"junk"], model="ocr")
    text = httpx.get(f"{url}/metrics").text
    assert 'ddrl_reward_requests_total{method="POST",route="/v1/score",status="200"}' in text
    assert 'ddrl_reward_items_total{model="ocr",outcome="media_invalid"}' in text
    assert 'ddrl_reward_model_ready{model="ocr"} 1.0' in text
