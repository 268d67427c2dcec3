"""A run whose rewards come over REST, with a key, from a service that somebody else runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from services.rest.auth import new_key
from tests.e2e.test_run import check_finished
from tests.pipeline import ROOT, Run, settings

pytestmark = pytest.mark.long

FLEET = "rewards: {ocr: {kind: ocr, mode: flow_grpo, reading: recognition, upscale: 3}}\nport: 0\nkeys_file: keys\n"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """URL and key of a service of its own processes."""
    secret, line = new_key("trainer")
    (tmp_path / "keys").write_text(line + "\n")
    (tmp_path / "keys").chmod(0o600)
    (tmp_path / "rewards.yaml").write_text(FLEET)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "serve", "rewards.yaml"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    out: list[str] = []
    url = next((found[1] for line in process.stdout if out.append(line) is None and (found := re.search(r"ready: (http://\S+)", line))), None)  # type: ignore[func-returns-value]
    assert url is not None, "".join(out)
    yield url, secret
    process.send_signal(signal.SIGINT)
    process.wait(60)


def test_a_run_over_rest_with_a_key(start: Callable[..., Run], service: tuple[str, str], tmp_path: Path) -> None:
    url, key = service
    run = start("over-rest", *settings(f"fleet.url={url}", "fleet.api_key_env=REWARD_KEY"), environment={"REWARD_KEY": key})
    status, out, error = run.finish()
    assert status == 0, out + error
    check_finished(run.folder, 4)
    model = httpx.get(f"{url}/v1/status", headers={"Authorization": f"Bearer {key}"}).json()["models"][0]
    assert model["p50_s"] is not None, "the service was asked"


def test_a_wrong_key_is_said_before_the_run_begins(start: Callable[..., Run], service: tuple[str, str]) -> None:
    url, _ = service
    run = start("wrong-key", *settings(f"fleet.url={url}", "fleet.api_key_env=REWARD_KEY"), environment={"REWARD_KEY": "wrong-key-0123456789"})
    status, _, error = run.finish()
    assert status == 1
    assert "key_unknown" in error
    assert "wrong-key-0123456789" not in error
