"""Memory, disks, limits, environment, servers and leftovers: each check with facts that pass and facts that do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.trainer.doctor.facts import GB, MACHINE
from trainer.doctor import judge_machine as judge
from trainer.doctor.facts import Disk, HubAnswer
from trainer.doctor.finding import worst


def test_a_sound_machine_is_ok_throughout() -> None:
    findings = judge.judge(MACHINE)
    assert worst(findings) == "ok"
    assert not any(f.advice for f in findings)


@pytest.mark.parametrize(
    ("available", "needed", "level"), [(24, 0, "ok"), (24, 20, "ok"), (3, 0, "warning"), (1, 0, "problem"), (24, 25, "problem"), (None, 40, "problem")]
)
def test_memory(available: int | None, needed: int, level: str) -> None:
    found = judge.memory(replace(MACHINE, available=None if available is None else available * GB), needed * GB)
    assert found.level == level
    assert ("the run takes" in found.found) == (needed > 20)


def test_memory_is_never_more_than_a_containers_limit() -> None:
    assert judge.memory(replace(MACHINE, memory=3 * GB)).found == "3.0 GB available of 3.0 GB, 8 CPUs"


def test_shared_memory() -> None:
    assert judge.shared_memory(replace(MACHINE, shm=64 << 20), 0) is None  # a cluster that is joined
    assert judge.shared_memory(replace(MACHINE, shm=None)) is None
    enough, little = judge.shared_memory(MACHINE), judge.shared_memory(replace(MACHINE, shm=64 << 20))
    assert enough is not None
    assert enough.level == "ok"
    assert little is not None
    assert little.level == "warning"
    assert "--shm-size=0.4gb" in little.advice


@pytest.mark.parametrize(("free", "total", "needed", "level"), [(50, 100, 0, "ok"), (8, 100, 0, "warning"), (40, 1000, 0, "warning"), (0.5, 100, 0, "problem")])
def test_disk(free: float, total: float, needed: float, level: str) -> None:
    assert judge.disk(Disk("run folders", "runs", int(free * GB), int(total * GB)), needed * GB).level == level


def test_a_run_that_leaves_more_than_the_disk_holds() -> None:
    found = judge.judge(MACHINE, stored=300 * GB)
    (disk,) = [f for f in found if f.level == "problem"]
    assert (disk.check, disk.found) == ("disk for run folders", "200.0 GB free at runs; the run may take 300.0 GB")


@pytest.mark.parametrize(
    ("limits", "level"),
    [((1024, 65536), "ok"), ((256, -1), "ok"), ((-1, -1), "ok"), ((20000, 20000), "ok"), ((1024, 2048), "warning"), ((256, 512), "problem")],
)
def test_open_files(limits: tuple[int, int], level: str) -> None:
    """Ray raises the soft limit itself, so the hard one counts."""
    assert judge.open_files(replace(MACHINE, open_files=limits)).level == level


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        ("RAY_TRAIN_V2_ENABLED", "0", "problem"),
        ("RAY_TRAIN_V2_ENABLED", "1", "ok"),
        ("RAY_AUTH_MODE", "kerberos", "problem"),
        ("RAY_AUTH_MODE", "disabled", "ok"),
        ("RAY_AUTH_MODE", "token", "ok"),
        ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1", "warning"),
        ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0", "ok"),
        ("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE", "1", "warning"),
        ("RAY_ADDRESS", "10.0.0.1:6379", "ok"),
        ("RAY_DEDUP_LOGS", "1", "ok"),
        ("CUDA_VISIBLE_DEVICES", "", "warning"),
        ("CUDA_VISIBLE_DEVICES", "0", "ok"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", "warning"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", "ok"),
    ],
)
def test_environment(name: str, value: str, level: str) -> None:
    (finding,) = judge.environment(replace(MACHINE, environment={name: value}))
    assert finding.level == level
    assert (finding.level == "ok") == (finding.advice == "")


def test_redis_server() -> None:
    assert judge.redis_server(MACHINE).found == "7.0.15 at /usr/bin/redis-server; also /venv/redis-server is 6.2.14"
    old = replace(MACHINE, redis_servers=(("/usr/bin/redis-server", "5.0.7"), ("/venv/redis-server", "6.2.14")))
    assert judge.redis_server(old).found == "6.2.14 at /venv/redis-server; also /usr/bin/redis-server is 5.0.7"
    unusable = replace(MACHINE, redis_servers=(("/usr/bin/redis-server", ""), ("/venv/redis-server", "6.0.16")))
    assert judge.redis_server(unusable).level == "problem"
    assert judge.redis_server(replace(MACHINE, redis_servers=())).level == "problem"


def hub(**changes: object) -> judge.Finding:
    return judge.hub(replace(MACHINE, **changes))  # type: ignore[arg-type]


def test_the_hubs_token_is_never_a_problem_by_itself() -> None:
    assert hub().found.startswith("none")
    assert hub(environment={"HF_HUB_OFFLINE": "1"}).found.endswith("only its cache is read")
    assert hub(token=True).found == "there; --online asks the hub about it"
    assert hub(token=True, hub=HubAnswer(who="somebody")).found == "belongs to somebody"
    refused = hub(token=True, hub=HubAnswer(error="HfHubHTTPError: 401"))
    assert (refused.level, refused.advice) == ("warning", "hf auth login")


def test_leftovers() -> None:
    assert judge.leftovers(MACHINE).level == "ok"
    found = judge.leftovers(replace(MACHINE, leftovers=tuple(f"/tmp/ddrl-ray-{i}" for i in range(4))))
    assert (found.level, found.found) == ("warning", "4 of killed runs: /tmp/ddrl-ray-0, /tmp/ddrl-ray-1, /tmp/ddrl-ray-2, …")
