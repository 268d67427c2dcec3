"""`ddrl prepare-data` killed in the middle: run again, it makes the same set, to the digest, as a run nobody disturbed."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.mixed_pictures import BROKEN, write_folder
from tests.pipeline import ROOT, command

PICTURES = 500
DEADLINE_S = 400.0


def prepare(source: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    line = command("prepare-data", str(source), str(out), "--model", "recipes/glyph-base", "--size", "64x96", "--shard-rows", "8", *options)
    return subprocess.Popen(line, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err
    return out, err


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "shards").glob("*.safetensors"))}


@pytest.mark.long
def test_killed_in_the_middle_it_makes_the_same_set(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", PICTURES)
    out, err = finished(prepare(source, tmp_path / "undisturbed"))
    assert err == ""
    assert f"{PICTURES - 7} examples" in out
    assert "7 broken inputs left out" in out

    killed = prepare(source, tmp_path / "killed")
    end = time.monotonic() + DEADLINE_S
    while len(list((tmp_path / "killed").glob("shards/*.safetensors"))) < 5:
        assert time.monotonic() < end
        assert killed.poll() is None, "it was over before it could be killed"
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    there = len(shards(tmp_path / "killed"))
    assert 5 <= there < len(shards(tmp_path / "undisturbed")) - 5
    assert not (tmp_path / "killed" / "prepared.json").exists()

    finished(prepare(source, tmp_path / "killed"))
    assert shards(tmp_path / "killed") == shards(tmp_path / "undisturbed")
    manifests = [json.loads((tmp_path / name / "prepared.json").read_text()) for name in ("undisturbed", "killed")]
    assert manifests[0] == manifests[1]
    for name in ("undisturbed", "killed"):
        broken = {line["name"]: line["reason"] for line in map(json.loads, (tmp_path / name / "broken.jsonl").read_text().splitlines())}
        assert broken.keys() == BROKEN.keys()
        assert all(said in broken[file] for file, said in BROKEN.items()), broken

    grid = tmp_path / "grid.png"
    shown = subprocess.run(
        command("data", "inspect", str(tmp_path / "killed"), "--out", str(grid)), cwd=ROOT, text=True, capture_output=True, timeout=120, check=True
    )
    assert f"digest {manifests[0]['digest']}" in shown.stdout
    assert "broken inputs: 7" in shown.stdout
    assert grid.exists()
