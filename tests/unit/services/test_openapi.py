"""Requests generated from the OpenAPI document: no 5xx, every answer as documented, invalid requests refused.

The service is real (uvicorn, OCR and statistics in process), the generator is schemathesis' command. `make test` runs a
share of the cases; the long test runs at least 5,000.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.ingress import make_app
from services.limits import LimitsConfig

HOOKS = Path(__file__).with_name("openapi_hooks.py")
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method,allow_header_conformance"
)


@pytest.mark.parametrize(("examples", "at_least"), [(30, 400), pytest.param(2600, 5000, marks=pytest.mark.long)])
def test_generated_requests(serve_app: Callable[[Any], str], backend: Any, tmp_path: Path, examples: int, at_least: int) -> None:
    url = serve_app(make_app(backend, LimitsConfig(max_pixels=100_000, max_total_pixels=1_000_000)))
    report = tmp_path / "report.json"
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--checks", CHECKS, "--phases", "examples,coverage,fuzzing"]
    options = ["-n", str(examples), "--continue-on-failure", "--report", "json", "--report-json-path", str(report)]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": str(HOOKS), "NO_COLOR": "1"}
    done = subprocess.run([*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    found = json.loads(report.read_text())
    assert (found["failures"], found["errors"], found["operations"]["tested"]) == ([], [], found["operations"]["total"])
    assert found["test_cases"]["generated"] >= at_least
    statuses = _statuses(httpx.get(f"{url}/metrics").text)
    print(found["test_cases"], statuses)
    assert statuses["200"] > at_least / 50, "too few requests came through to the scorers"
    assert not [status for status in statuses if status.startswith("5")]


def _statuses(text: str) -> dict[str, int]:
    """Answers of ``POST /v1/score`` by status."""
    rows = [line for line in text.splitlines() if line.startswith("ddrl_reward_requests_total{") and 'method="POST",route="/v1/score"' in line]
    return {row.partition('status="')[2][:3]: int(float(row.rpartition(" ")[2])) for row in rows}
