"""Families of installed packages, by entry points."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffusion.checkpoint import CheckpointError, load_network
from diffusion.config import ModelConfig
from diffusion.families.glyph.policy import write_skeleton
from diffusion.families.registry import FAMILIES, Family, family_of

MODULE = "from diffusion.families.registry import FAMILIES\nFAMILY = FAMILIES['SD3Transformer2DModel']\nNONE = 3\n"


def install(site: Path, package: str, *points: str) -> None:
    """A package of one module with these entry points."""
    (site / f"{package}-1.dist-info").mkdir(parents=True)
    (site / f"{package}-1.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    (site / f"{package}-1.dist-info" / "entry_points.txt").write_text("\n".join(["[ddrl.families]", *points]) + "\n")
    (site / f"{package}.py").write_text(MODULE)


def test_a_package_brings_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", "mine_of_registry", "MyTransformer = mine_of_registry:FAMILY")
    write_skeleton(tmp_path / "policy")
    config = tmp_path / "policy" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "MyTransformer"}))
    model = ModelConfig(path=str(tmp_path / "policy"), init=True)
    with pytest.raises(CheckpointError, match=r"is a MyTransformer; this build knows Cosmos.*docs/add-a-model.md says how to add one"):
        load_network(model)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert family_of("MyTransformer") is FAMILIES["SD3Transformer2DModel"]
    assert type(load_network(model)[0]).__name__ == "SD3Transformer"
    with pytest.raises(ValueError, match=r"a None; this build knows .*WanTransformer3DModel, MyTransformer, and"):
        family_of(None)


def test_an_entry_point_to_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", "wrong_of_registry", "Wrong = wrong_of_registry:NONE")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(ValueError, match=r"a Wrong, and wrong_of_registry:NONE is no diffusion.families.registry.Family; correct the entry points"):
        family_of("Wrong")


def test_two_packages_with_one_class_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("first_of_registry", "second_of_registry"):
        install(tmp_path / "site", package, f"Twice = {package}:FAMILY")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(ValueError, match="a Twice, and more than one package brings it"):
        family_of("Twice")


def test_what_ddrl_has_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", "other_of_registry", "WanTransformer3DModel = other_of_registry:FAMILY")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert family_of("WanTransformer3DModel") is FAMILIES["WanTransformer3DModel"]
    assert isinstance(FAMILIES["WanTransformer3DModel"], Family)
