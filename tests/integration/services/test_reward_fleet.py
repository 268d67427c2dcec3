"""The deployed fleet: scores through handle and REST, typed failures, a replica killed mid-work."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from services.client.base import RewardClient
from services.client.connect import connect
from services.client.handle import APP_NAME
from services.client.rest import RestRewardClient
from services.config import FleetConfig, fleet_of
from services.contract import ItemScore, ScoreFailure
from services.fleet.start import start_fleet, stop_fleet
from services.media.base import Image

RIGHT, WRONG = 'a plate with "407" on it', 'a plate with "862" on it'


def plate(text: str = "407") -> Image:
    picture = PILImage.new("RGB", (48, 16), "white")
    ImageDraw.Draw(picture).text((10, 0), text, fill="black", font=ImageFont.load_default(13))
    return np.asarray(picture, np.uint8)


def npy(images: Image) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, images)
    return buffer.getvalue()


def processes(title: str) -> list[int]:
    """Descendants of this process whose command line contains ``title``."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:  # ended meanwhile
                continue

    def ours(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return [pid for pid, line in titles.items() if title in line and ours(pid)]


def ocr_replica() -> int:
    (pid,) = processes("ServeReplica:rewards:ocr")
    return pid


@pytest.fixture(scope="module")
def fleet(ray_cluster: None) -> Iterator[str]:
    url = start_fleet(fleet_of(FleetConfig(), ["ocr"]))
    yield url
    stop_fleet()


@pytest.fixture(params=["handle", "rest"])
def client(request: pytest.FixtureRequest, fleet: str) -> Iterator[RewardClient]:
    config = FleetConfig(url=fleet if request.param == "rest" else None)
    client = connect(config, APP_NAME)
    yield client
    client.close()


def test_scores_and_typed_failures(client: RewardClient) -> None:
    info = client.check(["ocr"])["ocr"]
    assert info.name == "ocr"
    assert "upscale-3-cubic" in info.revision
    prompts = [RIGHT] * 20 + [WRONG, "no quoted text", 'an empty ""']
    results = client.score("ocr", prompts, np.stack([plate()] * 23), 60)
    assert [r.reward for r in results[:20] if isinstance(r, ItemScore)] == [1.0] * 20
    assert isinstance(results[20], ItemScore)
    assert results[20].reward < 1.0
    assert [r.code for r in results[21:] if isinstance(r, ScoreFailure)] == ["no_quoted_text", "empty_target"]


def test_handle_and_rest_agree(fleet: str) -> None:
    images = np.stack([plate("407"), plate("13"), np.full((16, 48, 3), 90, np.uint8)])
    prompts = ['"407"', '"18"', '"5"']
    handle, rest = connect(FleetConfig(), APP_NAME), RestRewardClient(fleet, encoding="png")
    assert handle.score("ocr", prompts, images, 60) == rest.score("ocr", prompts, images, 60)
    rest.close()


def test_the_service_listens_on_loopback_only(fleet: str) -> None:
    port = f"{int(fleet.rpartition(':')[2]):04X}"
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    listening = {row[1].rpartition(":")[0] for row in rows[1:] if row[1].endswith(f":{port}") and row[3] == "0A"}
    assert listening == {"0100007F"}


def test_a_killed_replica_costs_only_a_retry(fleet: str) -> None:
    """Plain HTTP posts (no client-side retry) and handle calls in flight all get their scores."""
    images = np.stack([plate()] * 24)
    body = npy(images)
    handle = connect(FleetConfig(), APP_NAME)
    victim = ocr_replica()

    def over_http(_: int) -> list[float]:
        answer = httpx.post(
            f"{fleet}/v1/score",
            data={"prompt": [RIGHT] * len(images)},
            files={"file": ("images.npy", body)},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        return [item["reward"] for item in answer.json()["results"]]

    def over_handle(_: int) -> list[float]:
        results = handle.score("ocr", [RIGHT] * len(images), images, 60)
        return [r.reward for r in results if isinstance(r, ItemScore)]

    with ThreadPoolExecutor(12) as pool:
        jobs = [pool.submit(job, i) for i in range(6) for job in (over_http, over_handle)]
        time.sleep(0.7)
        unfinished = sum(not job.done() for job in jobs)
        os.kill(victim, signal.SIGKILL)
        rewards = [reward for job in jobs for reward in job.result(timeout=90)]
    assert unfinished > 0, "the replica died too late to interrupt anything"
    assert rewards == [1.0] * (12 * len(images))
    assert ocr_replica() != victim
