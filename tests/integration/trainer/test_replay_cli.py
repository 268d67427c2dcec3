"""`ddrl replay` on real ledgers: by URL, by run folder with and without a driver, and as a person mistypes it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from replay.buffer import BufferSettings, ReplayBuffer
from replay.connect import connect
from replay.embedded import EmbeddedRedis, find_server
from replay.inspection import find_runs, inspect
from tests.integration.replay.test_replay_cluster import free_ports
from trainer.cli.main import app
from trainer.config.load import load_config
from trainer.run.folder import RunFolder

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = BufferSettings(groups_per_step=1, data_per_step=1, max_staleness=3, max_attempts=2, checkpoint_interval=2)
SETTLED, CLAIMED, READY, LEASED, WAITING, DEAD, UNOPENED = 0, 1, 2, 3, 4, 5, 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def fresh(server: EmbeddedRedis) -> Iterator[EmbeddedRedis]:
    yield server
    connect(server.url).flushall()


def populate(url: str, run: str) -> ReplayBuffer:
    """A ledger with one group in each state, as the constants say."""
    buffer = ReplayBuffer(connect(url), run, SETTINGS)
    buffer.initialise()
    epoch = buffer.rollback(0)

    def commit(version: int) -> None:
        lease = buffer.lease("generator-0", 0)
        assert lease is not None
        assert buffer.commit(lease, b"x" * 100, [0.25, 0.75], version, {"prompt": "a [sign]"})

    for step in (1, 2):
        assert buffer.lease_data("feeder", 0) == step - 1
        buffer.commit_data(step - 1, b"latents")
        commit(step - 1)
        buffer.claim(step, epoch, 0)
        buffer.publish(step, epoch)
        if step == 1:
            buffer.settle(1, epoch)
    commit(2)
    held = [buffer.lease(f"generator-{i}", 0) for i in range(3)]
    assert all(held)
    buffer.fail(held[2], "scoring: no text")
    again = buffer.lease("generator-2", 0)
    assert again is not None
    assert again.group == DEAD
    buffer.fail(again, "scoring: still no text")
    buffer.fail(held[1], "sampling: cosmic ray")
    return buffer


def ddrl(*arguments: str, status: int = 0, environment: dict[str, str] | None = None) -> Result:
    result = CliRunner().invoke(app, ["replay", *arguments], env={"COLUMNS": "200", **(environment or {})})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, (result.stdout, result.stderr)
    assert result.stderr.count("\n") == int(status == 2)
    return result


def words(text: str) -> str:
    return " ".join(text.split())


def test_inspection_sees_every_state(fresh: EmbeddedRedis) -> None:
    populate(fresh.url, "r")
    client = connect(fresh.url)
    before = client.info("persistence")["rdb_changes_since_last_save"]
    view = inspect(client, "r")
    assert client.info("persistence")["rdb_changes_since_last_save"] == before, "looking changes nothing"
    states = {g: view.group(g).state for g in range(UNOPENED + 1)}
    assert states == dict(enumerate(("settled", "claimed", "ready", "leased", "waiting", "dead", "unopened")))
    ready, leased = view.group(READY), view.group(LEASED)
    assert (ready.rewards, ready.bytes, ready.version, ready.attempt, ready.meta) == ([0.25, 0.75], 100, 2, 1, {"prompt": "a [sign]"})
    assert ready.ready_age_s is not None
    assert leased.owner == "generator-0"
    assert leased.lease_left_s is not None
    assert 0 < leased.lease_left_s <= SETTINGS.lease_s
    assert leased.min_version == 0
    assert view.group(CLAIMED).step == 2
    assert [(claim.step, claim.groups, claim.data, claim.published) for claim in view.claims] == [(2, [CLAIMED], [1], True)]
    assert view.group(DEAD).failures == ["scoring: no text", "scoring: still no text"]
    assert view.group(WAITING).failures == ["sampling: cosmic ray"]


def test_inspection_agrees_with_the_counts(fresh: EmbeddedRedis) -> None:
    buffer = populate(fresh.url, "r")
    counts, view = buffer.counts(), inspect(connect(fresh.url), "r")
    for state in ("ready", "claimed", "settled", "evicted", "dead", "waiting"):
        assert view.count(state) == counts[state], state
    assert view.count("leased") + view.count("waiting") == counts["leased"]


def test_status(fresh: EmbeddedRedis) -> None:
    populate(fresh.url, "r")
    text = words(ddrl("status", "--url", fresh.url).stdout)
    assert "run r: version 2, claimed through step 2, settled through step 1" in text
    assert "pipeline slots 3 4" in text
    assert "last failure: group 4: sampling: cosmic ray" in text
    found = json.loads(ddrl("status", "--url", fresh.url, "--json").stdout)
    assert found["counts"]["dead"] == 1
    assert [group["group"] for group in found["live"]] == [CLAIMED, READY, LEASED, WAITING]


def test_inspect(fresh: EmbeddedRedis) -> None:
    populate(fresh.url, "r")
    text = words(ddrl("inspect", str(READY), str(SETTLED), str(DEAD), "--url", fresh.url).stdout)
    for part in ("state ready", "meta.prompt a [sign]", "state settled", "failure 2 scoring: still no text"):
        assert part in text
    assert json.loads(ddrl("inspect", "5", "--url", fresh.url, "--json").stdout)[0]["state"] == "dead"
    assert "not opened yet: 6; the run has 6 groups so far" in ddrl("inspect", "6", "--url", fresh.url, status=2).stderr


def test_audit_is_clean_then_prints_what_it_finds(fresh: EmbeddedRedis) -> None:
    populate(fresh.url, "r")
    assert ddrl("audit", "--url", fresh.url).stdout.startswith("audit of run r: clean; 6 groups: 1 leased, 1 waiting, 1 ready, 1 claimed, 1 settled, 1 dead")
    assert json.loads(ddrl("audit", "--url", fresh.url, "--json").stdout)["findings"] == []
    connect(fresh.url).setbit("ddrl:{r}:settled", SETTLED, 0)
    broken = ddrl("audit", "--url", fresh.url, status=1)
    assert f"finding: group {SETTLED} is lost: in no state" in broken.stdout
    found = json.loads(ddrl("audit", "--url", fresh.url, "--json", status=1).stdout)
    assert not found["clean"]
    assert found["findings"]


def test_dead_then_requeue(fresh: EmbeddedRedis) -> None:
    buffer = populate(fresh.url, "r")
    assert "1. scoring: no text" in words(ddrl("dead", "--url", fresh.url).stdout)
    done = ddrl("requeue", str(DEAD), "--url", fresh.url)
    assert words(done.stdout) == (
        "group 5: will be made again instead of the next new index, as soon as a producer asks and a slot is free; it died of: scoring: still no text"
    )
    assert json.loads(ddrl("dead", "--url", fresh.url, "--json").stdout)["dead"][0]["requeued"]
    refused = ddrl("requeue", str(READY), str(DEAD), "--url", fresh.url, status=2)
    assert "only dead groups can be made again: group 2 is ready" in refused.stderr
    assert buffer.lease("generator-9", 0).group == WAITING  # type: ignore[union-attr]
    assert buffer.lease("generator-9", 0).group == DEAD  # type: ignore[union-attr]
    assert ddrl("dead", "--url", fresh.url).stdout == "run r: no dead groups\n"
    assert buffer.audit() == []


def test_trim_then_forget(fresh: EmbeddedRedis) -> None:
    buffer = populate(fresh.url, "r")
    buffer._ledger.settle(2, 1)  # a controller that dies before it deletes the payloads
    assert "deleted 2 payloads" in ddrl("trim", "--url", fresh.url).stdout
    assert json.loads(ddrl("trim", "--url", fresh.url, "--json").stdout) == {"run": "r", "trash": 0, "orphans": 0}
    assert "Add --yes" in ddrl("trim", "--forget", "--url", fresh.url, status=2).stderr
    assert "in use" in ddrl("trim", "--forget", "--yes", "--url", fresh.url, status=2).stderr
    for owner in ("generator-0", "generator-1", "generator-2"):
        buffer.release(owner)
    assert ddrl("trim", "--forget", "--yes", "--url", fresh.url).stdout.startswith("deleted the ledger of run r: 6 groups, 3 of them not settled")
    assert connect(fresh.url).keys("*") == []


def test_one_run_needs_no_name_several_do(fresh: EmbeddedRedis) -> None:
    assert "holds no ledger" in ddrl("status", "--url", fresh.url, status=2).stderr
    populate(fresh.url, "one")
    ddrl("status", "--url", fresh.url)
    populate(fresh.url, "two")
    assert find_runs(connect(fresh.url)) == ["one", "two"]
    several = ddrl("status", "--url", fresh.url, status=2).stderr
    assert re.search(r"holds 2 runs: choose one with --run: one, two", several)
    assert "run two" in ddrl("status", "--url", fresh.url, "--run", "two").stdout
    assert "no ledger of run 'three'" in ddrl("status", "--url", fresh.url, "--run", "three", status=2).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status"], "which ledger?"),
        (["status", "--url", "redis://:sesame@127.0.0.1:1/0"], "cannot reach Redis at redis://127.0.0.1:1/0"),
        (["status", "--url", "redis://:sesame/oil@127.0.0.1/0"], "the Redis URL cannot be read"),
        (["status", "--url", "http://:sesame@127.0.0.1/0"], "not usable"),
        (["audit", "no/such/run"], "no/such/run is not a run folder"),
        (["inspect", "no/such/run"], "which group?"),
        (["requeue", "1", "a", "b"], "one run folder at a time"),
    ],
)
def test_a_mistake_is_one_line_without_the_password(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.cli.replay_target.CONNECT_TIMEOUT_S", 0.3)
    error = ddrl(*arguments, status=2).stderr
    assert error.startswith("ddrl: ")
    assert message in error
    assert "sesame" not in error


def test_in_a_process_of_its_own(fresh: EmbeddedRedis) -> None:
    populate(fresh.url, "r")
    command = [sys.executable, "-m", "trainer", "replay", "audit"]
    environment = os.environ | {"DDRL_REDIS_URL": fresh.url}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("audit of run r: clean")


def test_a_limited_user_may_look(fresh: EmbeddedRedis) -> None:
    """The ACL of replay/README.md is enough for every command."""
    populate(fresh.url, "r")
    text = (ROOT / "replay" / "README.md").read_text()
    line = re.search(r"^ACL SETUSER (?:.*\\\n)*.*", text, re.MULTILINE)
    assert line is not None
    connect(fresh.url).execute_command(*line.group().replace("\\\n", " ").replace("RUN", "r").replace("PASSWORD", "pw").split())
    url = re.sub(r"redis://.*@", "redis://ddrl-r:pw@", fresh.url)
    for command in (["status"], ["inspect", "5"], ["audit"], ["dead"], ["requeue", "5"], ["trim"]):
        assert ddrl(*command, "--url", url).stdout
    assert "Redis refused" in ddrl("status", "--run", "another", "--url", url, status=2).stderr


def test_on_a_cluster_the_run_must_be_named(tmp_path: Path) -> None:
    """One node that holds every slot is a cluster all the same."""
    (port,) = free_ports(1)
    options = f"--port {port} --bind 127.0.0.1 --dir {tmp_path} --cluster-enabled yes --appendonly yes".split()
    node = subprocess.Popen([str(find_server()[0]), *options, "--save", ""], stdout=subprocess.DEVNULL)
    url = f"redis://127.0.0.1:{port}/0"
    try:
        client = connect(url, 20)
        client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
        deadline = time.monotonic() + 20
        while b"cluster_state:ok" not in client.execute_command("CLUSTER", "INFO"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        populate(url, "r")
        assert "name the run with --run" in ddrl("audit", "--url", url, status=2).stderr
        assert "run r: clean" in ddrl("audit", "--url", url, "--run", "r").stdout
        assert "run r: version 2" in ddrl("status", "--url", url, "--run", "r").stdout
    finally:
        node.kill()
        node.wait()


# -- run folders --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run folder whose driver has gone, with a ledger in its embedded server's append-only file."""
    run = RunFolder(tmp_path / "run")
    run.open(load_config(ROOT / "recipes" / "glyph-ocr.yaml"), resume=False)
    with EmbeddedRedis.start(run.redis) as server:
        populate(server.url, "glyph-ocr")
    run.close()
    return run


def test_a_run_folder_at_rest_is_started_for_the_look_and_stopped(folder: RunFolder) -> None:
    path = str(folder.path)
    assert "audit of run glyph-ocr: clean; 6 groups" in ddrl("audit", path).stdout
    assert "state dead" in words(ddrl("inspect", "5", path).stdout)
    assert "when the run goes on (--resume)" in ddrl("requeue", path, "5").stdout
    with EmbeddedRedis.start(folder.redis, timeout_s=1) as server:  # the look is over: nobody holds the folder
        assert inspect(connect(server.url), "glyph-ocr").requeued == {DEAD}
    assert json.loads(ddrl("trim", path, "--json").stdout)["run"] == "glyph-ocr"


def test_a_run_folder_with_a_driver_is_joined_and_left_alone(folder: RunFolder) -> None:
    config = load_config(folder.path / "config.yaml")
    folder.open(config, resume=True)
    try:
        with EmbeddedRedis.start(folder.redis) as server:
            client: Any = connect(server.url)
            pid = client.info()["process_id"]
            assert "clean" in ddrl("audit", str(folder.path)).stdout
            assert "stop it before its ledger is deleted" in ddrl("trim", str(folder.path), "--forget", "--yes", status=2).stderr
            assert client.info()["process_id"] == pid
    finally:
        folder.close()


def test_a_driver_without_its_server_is_not_disturbed(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.cli.replay_target.CONNECT_TIMEOUT_S", 0.3)
    with (folder.path / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert "cannot reach Redis" in ddrl("status", str(folder.path), status=2).stderr
        (folder.redis / "redis.conf").unlink()
        assert "try again in a moment" in ddrl("status", str(folder.path), status=2).stderr


def test_a_folder_that_names_a_server_of_its_own(folder: RunFolder, fresh: EmbeddedRedis) -> None:
    text = (folder.path / "config.yaml").read_text()
    config = folder.path / "config.yaml"
    config.write_text(re.sub(r"(?m)^  url: embedded", "  url: redis://:***@127.0.0.1:1/0", text, count=1))
    assert "the password of redis://:***@127.0.0.1:1/0 is not kept" in ddrl("audit", str(folder.path), status=2).stderr
    populate(fresh.url, "glyph-ocr")
    assert "run glyph-ocr: clean" in ddrl("audit", str(folder.path), "--url", fresh.url).stdout


def test_a_folder_without_a_ledger(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((ROOT / "recipes" / "glyph-ocr.yaml").read_text())
    assert "has no ledger yet" in ddrl("status", str(tmp_path), status=2).stderr
