"""`ddrl score`, `ddrl rewards …`, and what `ddrl serve` refuses before anything starts."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from services.fleet.file import parse_fleet
from trainer.cli.rewards import DEFAULT

ROOT = Path(__file__).resolve().parents[4]
SIGN = ROOT / "docs" / "media" / "sign.png"


def ddrl(*words: str, folder: Path = ROOT, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment},
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_without_a_file_the_recipe_is_served() -> None:
    assert parse_fleet(DEFAULT) == parse_fleet(yaml.safe_load((ROOT / "recipes" / "rewards.yaml").read_text()))


def test_score_in_this_process_as_a_table_and_as_json() -> None:
    words = ("score", str(SIGN), str(SIGN), "--reward", "jpeg", "--reward", "scene")
    status, table, _ = ddrl(*words)
    assert status == 0
    assert len(re.findall(r"sign\.png +jpeg", table)) == 2
    assert "colour_entropy" in table
    status, out, _ = ddrl(*words, "--json")
    answer = json.loads(out)
    assert status == 0
    assert list(answer["rewards"]) == ["jpeg", "scene"]
    assert len(answer["rewards"]["jpeg"]["results"]) == 2


def test_a_service_that_is_not_there_is_said_within_seconds() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        status, _, error = ddrl("score", str(SIGN), "--reward", "jpeg", "--url", url)
    assert status == 1
    assert time.monotonic() - started < 30  # of 60 s that an answer may take
    assert f"reward service {url}: cannot be reached" in error
    assert "--url names its host and port" in error
    assert "reward.url" not in error


def test_an_item_without_a_score_is_status_1(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    status, out, _ = ddrl("score", str(broken), str(SIGN), "--reward", "jpeg")
    assert status == 1
    assert "media_invalid" in out
    assert re.search(r"sign\.png +jpeg +-?\d", out), "the other file has its score"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("score", "none.png", "--reward", "jpeg"), 2, "none.png: No such file"),
        (("score", str(SIGN), "--reward", "nothing"), 2, "no reward 'nothing'; there is ocr, jpeg, scene"),
        (("score", str(SIGN), "--url", "http://127.0.0.1:1", "--timeout", "0.5"), 1, "cannot be reached"),
        (("score", str(SIGN), "--url", "http://127.0.0.1:1", "--key-env", "NOT_SET_ANYWHERE"), 2, "NOT_SET_ANYWHERE, which is not set"),
        (("serve", "none.yaml"), 2, "none.yaml cannot be read"),
        (("serve", "--host", "0.0.0.0"), 2, "there are no keys"),
        (("serve", "--redis-url", "localhost:6379"), 2, "redis_url"),
        (("serve", "--keys-file", "none"), 2, "cannot be read"),
        (("rewards", "self-test", "--only", "nothing"), 2, "no reward 'nothing'"),
        (("rewards", "convert-videoalign", "nowhere", "there"), 2, "nowhere"),
    ],
)
def test_a_mistake_is_one_line(words: tuple[str, ...], status: int, message: str, tmp_path: Path) -> None:
    got, _, error = ddrl(*words, folder=tmp_path)
    assert got == status, error
    assert message in error
    assert error.startswith("ddrl: ")
    assert "Traceback" not in error


def test_a_taken_port_is_said_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, _, error = ddrl("serve", "--port", str(taken.getsockname()[1]))
    assert status == 1
    assert "choose another with --port" in error


def test_kinds_and_self_tests(tmp_path: Path) -> None:
    _, out, _ = ddrl("rewards", "list")
    for kind in ("ocr", "jpeg", "scene", "videoalign", "module:Class"):
        assert kind in out
    file = tmp_path / "rewards.yaml"
    file.write_text("rewards: {jpeg: {kind: jpeg}, pick: {kind: pickscore, path: nowhere}}\n")
    status, out, _ = ddrl("rewards", "self-test", str(file))
    assert status == 1
    assert re.search(r"^jpeg: ok in [\d.]+ s, jpeg-1", out, re.MULTILINE)
    assert re.search(r"^pick: FAILED: ", out, re.MULTILINE)
    assert ddrl("rewards", "self-test", str(file), "--only", "jpeg")[0] == 0
