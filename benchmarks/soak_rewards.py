"""Mixed traffic on a deployed fleet for a while: everything answered, memory flat.

    python benchmarks/soak_rewards.py [--minutes 10] [--json FILE]

Eight clients send pictures, clips, batches, requests that must fail, repeats under one idempotency key, jobs and cancelled jobs.
Every answer is checked. The resident memory of each of the fleet's processes is read every five seconds; what counts is how much it
grows after the first quarter, when caches and pools have filled.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
REWARDS = {
    "ocr": {"kind": "ocr", "mode": "strict", "reading": "recognition", "upscale": 3},
    "jpeg": {"kind": "jpeg"},
    "scene": {"kind": "scene"},
}
PROCESSES = {"ingress": "ServeReplica:rewards:ingress", "proxy": "ProxyActor", **{name: f"ServeReplica:rewards:{name}" for name in REWARDS}}


def prepare() -> None:
    """Our packages for all processes, a Ray without tokens, one thread per library."""
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")


def npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


class Client:
    """One client; ``seen`` counts what was done, ``wrong`` what was not answered as it must be."""

    def __init__(self, url: str, seed: int) -> None:
        self._http = httpx.Client(base_url=url, timeout=60)
        self._random, self._numbers = random.Random(seed), np.random.default_rng(seed)
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []

    def step(self) -> None:
        name = self._random.choice(["picture", "picture", "batch", "clip", "bad", "repeat", "job", "cancel", "status"])
        done: str | None = getattr(self, f"_{name}")()
        self.seen[name] += 1
        if done is not None:
            self.wrong.append(f"{name}: {done}"[:500])

    def _pixels(self, *shape: int) -> bytes:
        return npy(self._numbers.integers(0, 256, (*shape, 3), dtype=np.uint8))

    def _post(self, path: str, data: dict[str, Any], body: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
        return self._http.post(path, data=data, files={"file": ("a.npy", body)}, headers=headers)

    def _picture(self) -> str | None:
        answer = self._post("/v1/score", {"model": "ocr", "prompt": 'a sign "42"'}, self._pixels(16, 48))
        return None if answer.status_code == 200 and "reward" in answer.json()["results"][0] else answer.text

    def _batch(self) -> str | None:
        answer = self._post("/v1/score", {"reward": ["jpeg", "scene"], "prompt": ["a"] * 8}, self._pixels(8, 128, 128))
        return None if answer.status_code == 200 and all("reward" in r for each in answer.json()["rewards"].values() for r in each["results"]) else answer.text

    def _clip(self) -> str | None:
        answer = self._post("/v1/score", {"model": "scene", "fps": "8"}, self._pixels(16, 96, 96))
        return None if answer.status_code == 200 and "motion" in answer.json()["results"][0]["scores"] else answer.text

    def _bad(self) -> str | None:
        item = self._post("/v1/score", {"model": "ocr", "prompt": "no quotes"}, self._pixels(16, 48))
        request = self._post("/v1/score", {"model": "nothing"}, self._pixels(4, 4))
        fine = item.status_code == 200 and "error" in item.json()["results"][0] and request.status_code == 404
        return None if fine else item.text + request.text

    def _repeat(self) -> str | None:
        key, body = {"Idempotency-Key": f"{self._random.getrandbits(64):x}"}, self._pixels(32, 32)
        first, again = (self._post("/v1/score", {"model": "jpeg"}, body, key) for _ in range(2))
        return None if first.status_code == 200 and first.content == again.content else first.text + again.text

    def _job(self) -> str | None:
        place = self._post("/v1/jobs", {"model": "jpeg"}, self._pixels(64, 64)).headers["location"]
        deadline = time.monotonic() + 60
        while (job := self._http.get(place).json())["status"] in ("queued", "running"):
            if time.monotonic() > deadline:
                return f"the job did not end: {job}"
            time.sleep(0.05)
        return None if job["status"] == "succeeded" else str(job)

    def _cancel(self) -> str | None:
        place = self._post("/v1/jobs", {"model": "scene"}, self._pixels(64, 64)).headers["location"]
        state = self._http.delete(place).json()["status"]
        return None if state in ("cancelled", "succeeded") else state

    def _status(self) -> str | None:
        answer = self._http.get("/v1/status")
        return None if answer.status_code == 200 and self._http.get("/metrics").status_code == 200 else answer.text


def memory() -> dict[str, float]:
    """Resident MB of the fleet's processes by role."""
    found: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            title, size = " ".join(process.cmdline()), process.memory_info().rss / 2**20
        except psutil.Error:  # ended meanwhile
            continue
        if "redis-server" in title:
            found["redis"] = size
        for role, mark in PROCESSES.items():
            if mark in title:
                found[role] = found.get(role, 0.0) + size
    return found


def soak(url: str, minutes: float, clients: int = 8) -> dict[str, Any]:
    """The traffic, and what it came to."""
    end, workers = time.monotonic() + 60 * minutes, [Client(url, seed) for seed in range(clients)]

    def work(client: Client) -> None:
        while time.monotonic() < end:
            try:
                client.step()
            except (httpx.HTTPError, KeyError, ValueError) as error:
                client.wrong.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(client,)) for client in workers]
    for thread in threads:
        thread.start()
    samples: list[dict[str, float]] = []
    while time.monotonic() < end:
        samples.append(memory())
        time.sleep(5)
    for thread in threads:
        thread.join()
    samples.append(memory())
    settled = samples[len(samples) // 4 :]
    tenth = max(1, len(settled) // 10)

    def level(part: list[dict[str, float]], role: str) -> float:
        return statistics.median(sample[role] for sample in part if role in sample)

    growth = {
        role: {"after_a_quarter_mb": round(level(settled[:tenth], role), 1), "at_the_end_mb": round(level(settled[-tenth:], role), 1)} for role in samples[-1]
    }
    seen = sum((client.seen for client in workers), Counter[str]())
    wrong = [text for client in workers for text in client.wrong]
    return {"minutes": minutes, "steps": dict(seen), "wrong": len(wrong), "first_wrong": wrong[:5], "memory": growth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    prepare()
    import ray
    from ray import serve

    from replay.embedded import EmbeddedRedis
    from services.fleet.file import parse_fleet
    from services.fleet.start import start_fleet

    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, configure_logging=False)
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis.start(Path(folder)) as redis:
        try:
            jobs = {"ttl_s": 60, "tombstone_s": 60}  # answers go while the soak lasts
            url = start_fleet(parse_fleet({"rewards": REWARDS, "port": 0, "redis_url": redis.url, "jobs": jobs, "limits": {"idempotency_ttl_s": 60}}))
            result = soak(url, arguments.minutes)
        finally:
            serve.shutdown()
            ray.shutdown()
    text = json.dumps(result, indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
