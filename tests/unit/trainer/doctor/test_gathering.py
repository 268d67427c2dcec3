"""Facts of the real thing: this Python, this machine, processes that hang or crash."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest

from trainer.doctor.facts import GPU
from trainer.doctor.machine import available, disk, environment, gather_machine
from trainer.doctor.probe import root_of
from trainer.doctor.software import packages, parse_driver, probe, torch_of, xformers_of
from trainer.run import local_ray


def test_requirements_of_a_run_beside_what_is_installed() -> None:
    found = packages(["numpy<3,>=1.26", "no-such-thing==1.0", 'xformers==0.0.35; extra == "gpu"', 'pytest>=8; extra == "dev"', 'zstandard; extra == "bench"'])
    assert [(p.name, p.wanted, p.extra) for p in found] == [("numpy", "<3,>=1.26", ""), ("no-such-thing", "==1.0", ""), ("xformers", "==0.0.35", "gpu")]
    assert found[0].found == metadata.version("numpy")
    assert found[1].found is None


def test_ddrl_names_its_own() -> None:
    names = {p.name for p in packages(metadata.requires("ddrl") or [])}
    assert {"torch", "ray", "diffusers", "redis", "xformers", "transformers"} <= names
    assert "pytest" not in names


def told(code: str, deadline_s: float = 60.0) -> str:
    return str(probe(deadline_s, (sys.executable, "-c", code))["torch"]["error"])


def test_a_probe_that_hangs_crashes_or_says_nothing() -> None:
    assert told("import time; time.sleep(60)", 0.2) == "importing it and a small call took more than 0 s"
    assert told("import os; os.abort()") == "asking it ended with status -6: no output"
    assert told("raise SystemExit('driver too old')") == "asking it ended with status 1: driver too old"
    assert told("print('a library greets')") == "asking it ended with status 0: no output"


def test_a_probes_answer_is_its_last_line() -> None:
    answer = {"torch": {"error": "x"}, "xformers": {}}
    assert probe(60.0, (sys.executable, "-c", f"print('a library greets'); print({json.dumps(answer)!r})")) == answer


def test_torch_as_the_probe_tells_of_it() -> None:
    chosen = {"dtype": "bfloat16", "device": "cuda", "name": "xformers", "because": "which works", "others": {"sdpa": "slower"}, "trials": {"xformers": ""}}
    gpu = {"name": "H100", "memory": 80, "capability": [9, 0]}
    found = torch_of({"version": "2.13.0", "cuda": "13.0", "gpus": [gpu], "bf16": True, "attention": [chosen]})
    assert found.gpus == (GPU("H100", 80, (9, 0)),)
    assert (found.attention[0].name, found.attention[0].others) == ("xformers", {"sdpa": "slower"})
    assert torch_of({"error": "OSError: gone"}).error == "OSError: gone"


def test_xformers_says_in_its_wheel_what_it_was_built_for() -> None:
    found = xformers_of({"error": "libcudart.so.12"})
    assert (found.version, found.built_for, found.built_cuda) == ("0.0.35", "2.10.0+cu128", 1208)
    assert found.error == "libcudart.so.12"


def test_the_reason_of_a_library_that_does_not_load() -> None:
    """xformers' exception is raised from torch's, torch's from the loader's."""
    outer, middle, loader = RuntimeError("xformers"), OSError("could not load this library"), OSError("libcudart.so.12: cannot open shared object file")
    outer.__cause__, middle.__cause__ = middle, loader
    assert root_of(outer) is loader
    assert root_of(loader) is loader


def test_what_nvidia_smi_lists() -> None:
    text = "NVIDIA H100 80GB HBM3, 81559, 9.0, 580.65.06\nNVIDIA T4, 15360, 7.5, 580.65.06\nBroken, [N/A], [N/A], 580.65.06\n"
    assert parse_driver(text) == (
        GPU("NVIDIA H100 80GB HBM3", 81559 << 20, (9, 0), "580.65.06"),
        GPU("NVIDIA T4", 15360 << 20, (7, 5), "580.65.06"),
    )


def test_variables_that_matter_and_no_secret() -> None:
    kept = environment({"RAY_AUTH_TOKEN": "sesame", "RAY_ADDRESS": "auto", "HOME": "/home/me", "HF_TOKEN": "hf_sesame"})
    assert kept == {"RAY_AUTH_TOKEN": "set", "RAY_ADDRESS": "auto"}


def test_memory_and_disks(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       24684124 kB\nMemAvailable:   20000000 kB\n")
    assert available(file) == 20_000_000 * 1024
    assert available(tmp_path / "none") is None
    room = disk("run folders", tmp_path / "runs" / "mine")
    assert 0 < room.free <= room.total
    assert room.path == str(tmp_path / "runs" / "mine")


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed driver left is seen and stays; the token is there or not, and nowhere shown."""
    monkeypatch.setattr(local_ray, "temporary_root", lambda: tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_sesame")
    left = tmp_path / "ddrl-ray-dead"
    left.mkdir()
    (left / "lock").touch()
    found = gather_machine(tmp_path / "runs", online=False)
    assert found.leftovers == (str(left),)
    assert left.is_dir()
    assert found.token
    assert "sesame" not in repr(found)
    assert found.cpus >= 1
    assert found.memory > 0
    assert any(version.startswith("6.2") for _, version in found.redis_servers)
    assert [d.what for d in found.disks] == ["run folders", "temporary files"]
