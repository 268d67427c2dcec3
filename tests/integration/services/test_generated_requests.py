"""Requests generated from the OpenAPI document of a whole fleet: no 5xx, every answer as documented, invalid requests refused.

The service is real (uvicorn, OCR and statistics in process, jobs in Redis), the generator is schemathesis' command. `make
test` runs a share of the cases; the long test runs at least 5,000.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from replay.embedded import EmbeddedRedis
from services.fleet.assembly import assemble
from services.fleet.file import parse_fleet
from services.fleet.local_backend import LocalBackend
from services.rest.metrics import FleetMetrics

HOOKS = Path(__file__).with_name("openapi_hooks.py")
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method,allow_header_conformance"
)
TREE = {
    "rewards": {"ocr": {"kind": "ocr", "mode": "flow_grpo", "reading": "recognition"}, "scene": {"kind": "scene"}},
    "limits": {"max_pixels": 100_000, "max_total_pixels": 1_000_000},
    "jobs": {"max_unfinished": 100_000, "ttl_s": 60, "lease_s": 5},
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedRedis.start(Path(tmp_path_factory.mktemp("redis"))) as redis:
        config = parse_fleet({**TREE, "redis_url": redis.url})
        app = assemble(config, LocalBackend(config.rewards), FleetMetrics()).app
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        end = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < end, "the service did not start"
            time.sleep(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


@pytest.mark.parametrize(("examples", "at_least"), [(20, 500), pytest.param(700, 5000, marks=pytest.mark.long)])
def test_generated_requests(url: str, tmp_path: Path, examples: int, at_least: int) -> None:
    report = tmp_path / "report.json"
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--checks", CHECKS, "--phases", "examples,coverage,fuzzing"]
    options = ["-n", str(examples), "--continue-on-failure", "--report", "json", "--report-json-path", str(report)]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": str(HOOKS), "NO_COLOR": "1"}
    done = subprocess.run([*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3600)
    assert report.exists(), done.stdout[-4000:] + done.stderr[-2000:]
    found = json.loads(report.read_text())
    assert not found["failures"], "\n".join(json.dumps(failure)[:3000] for failure in found["failures"])
    assert (done.returncode, found["errors"], found["operations"]["tested"]) == (0, [], found["operations"]["total"])
    assert found["test_cases"]["generated"] >= at_least
    scored, jobs = (_statuses(httpx.get(f"{url}/metrics").text, path) for path in ("/v1/score", "/v1/jobs"))
    print(found["operations"]["total"], found["test_cases"], scored, jobs)
    assert scored["200"] > at_least / 100, "too few requests came through to the scorers"
    assert jobs["202"] > at_least / 100
    assert not [status for status in (*scored, *jobs) if status.startswith("5")]


def _statuses(text: str, path: str) -> dict[str, int]:
    """Answers of ``POST path`` by status."""
    rows = [line for line in text.splitlines() if line.startswith(f'ddrl_reward_requests_total{{method="POST",route="{path}"')]
    return {row.partition('status="')[2][:3]: int(float(row.rpartition(" ")[2])) for row in rows}
