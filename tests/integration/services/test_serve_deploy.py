"""`serve deploy` as docs/rest.md describes it: the file's fleet in a Ray cluster that already runs, a reward on shares of a GPU included.

The GPU is a logical one: Ray's part (two replicas on one GPU) is real, that a scorer computes there is not (docs/unverified.md).
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import yaml

from services.client.rest import RestRewardClient
from services.contract import ItemScore
from tests.integration.services.conftest import until
from tests.integration.services.probe_scorers import KIND

ROOT = Path(__file__).resolve().parents[3]
BIN = Path(sys.executable).parent
KEY = "a-secret-of-this-test-0123456789"


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, int, dict[str, str]]]:
    """Address of a cluster's dashboard, a port for Serve, and the environment of its processes."""
    gcs, dashboard, agent, http, client = free_ports(5)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    words = ["start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    words += [f"--ray-client-server-port={client}", "--num-cpus=4", "--num-gpus=1", "--include-dashboard=true", "--object-store-memory=100000000"]
    log = (tmp_path / "ray.log").open("w")
    ray = subprocess.Popen([BIN / "ray", *words], env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=tmp_path)
    try:
        yield f"http://127.0.0.1:{dashboard}", http, environment
    finally:
        ray.send_signal(signal.SIGTERM)
        try:
            ray.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(ray.pid, signal.SIGKILL)
        log.close()


@pytest.mark.long
def test_the_fleet_is_deployed_into_a_running_cluster(cluster: tuple[str, int, dict[str, str]], tmp_path: Path) -> None:
    address, port, environment = cluster
    (tmp_path / "keys").write_text(f"trainer score {KEY}\n")
    (tmp_path / "keys").chmod(0o600)
    shared = {"kind": KIND, "device": "cuda", "gpus": 0.5, "replicas": 2, "cpus": 0.5}
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({"rewards": {"mean": shared, "jpeg": {"kind": "jpeg", "cpus": 0.5}}, "keys_file": "keys"}))
    page = (ROOT / "docs" / "rest.md").read_text()
    described = yaml.safe_load(next(block for block in re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if "import_path" in block))
    described["http_options"] = {"host": "127.0.0.1", "port": port}
    described["applications"][0]["args"] = {"file": str(tmp_path / "rewards.yaml")}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(described))

    def serve(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([BIN / "serve", *words, "-a", address], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    until(lambda: serve("status").returncode == 0, 120)
    deployed = serve("deploy", "serve.yaml")
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    status = until(lambda: (s := serve("status").stdout) and ("RUNNING" in s or "DEPLOY_FAILED" in s) and "DEPLOYING" not in s and s, 240)
    (application,) = yaml.safe_load(status)["applications"].values()
    assert application["status"] == "RUNNING", status
    assert application["deployments"]["mean"]["replica_states"] == {"RUNNING": 2}
    client = RestRewardClient(f"http://127.0.0.1:{port}", api_key=KEY)
    found = client.score_all(["mean", "jpeg"], ["a"], np.full((1, 8, 8, 3), 50, np.uint8), 60)
    assert all(isinstance(result, ItemScore) for results in found.values() for result in results)
    client.close()
    assert serve("shutdown", "-y").returncode == 0
