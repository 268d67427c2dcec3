"""`ddrl prepare-data` killed in the middle: run again, it makes the same set, to the digest, as a run nobody disturbed."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffusion.families.wan.tiny import write_tiny
from tests import mixed_clips, mixed_pictures
from tests.pipeline import ROOT, command

DEADLINE_S = 400.0


@dataclass(frozen=True)
class Kind:
    """What is prepared: so many files, broken ones among them, with these options."""

    write: Callable[[Path, int], Path]
    count: int
    broken: dict[str, str]
    options: tuple[str, ...]


KINDS = {
    "pictures": Kind(mixed_pictures.write_folder, 500, mixed_pictures.BROKEN, ("--size", "64x96", "--shard-rows", "8")),
    "clips": Kind(mixed_clips.write_folder, 90, mixed_clips.BROKEN, ("--size", "32x48", "--shard-rows", "3", "--frames", "9", "--max-broken", "0.1")),
}


def prepare(source: Path, out: Path, model: Path, *options: str) -> subprocess.Popen[str]:
    line = command("prepare-data", str(source), str(out), "--model", str(model), *options)
    return subprocess.Popen(line, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err
    return out, err


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "shards").glob("*.safetensors"))}


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_killed_in_the_middle_it_makes_the_same_set(name: str, tmp_path: Path) -> None:
    kind, model = KINDS[name], ROOT / "recipes" / "glyph-base"
    if name == "clips":
        model = tmp_path / "wan"
        write_tiny(model)
    source = kind.write(tmp_path / "source", kind.count)
    out, err = finished(prepare(source, tmp_path / "undisturbed", model, *kind.options))
    assert not err or (name == "clips" and err.startswith("WARNING[XFORMERS]"))  # diffusers imports it for the VAE; its kernels want a GPU
    assert f"{kind.count - len(kind.broken)} examples" in out
    assert f"{len(kind.broken)} broken inputs left out" in out

    killed = prepare(source, tmp_path / "killed", model, *kind.options)
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

    finished(prepare(source, tmp_path / "killed", model, *kind.options))
    assert shards(tmp_path / "killed") == shards(tmp_path / "undisturbed")
    manifests = [json.loads((tmp_path / name / "prepared.json").read_text()) for name in ("undisturbed", "killed")]
    assert manifests[0] == manifests[1]
    for one in ("undisturbed", "killed"):
        broken = {line["name"]: line["reason"] for line in map(json.loads, (tmp_path / one / "broken.jsonl").read_text().splitlines())}
        assert broken.keys() == kind.broken.keys()
        assert all(said in broken[file] for file, said in kind.broken.items()), broken

    grid = tmp_path / "grid.png"
    shown = subprocess.run(
        command("data", "inspect", str(tmp_path / "killed"), "--out", str(grid)), cwd=ROOT, text=True, capture_output=True, timeout=120, check=True
    )
    assert f"digest {manifests[0]['digest']}" in shown.stdout
    assert f"broken inputs: {len(kind.broken)}" in shown.stdout
    assert grid.exists()
