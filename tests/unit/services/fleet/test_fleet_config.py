"""``rewards.yaml``: what is accepted, and the one line that each mistake gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.config import FleetConfigError
from services.fleet.file import parse_fleet, read_fleet

ROOT = Path(__file__).resolve().parents[4]


def write(folder: Path, text: str) -> Path:
    path = folder / "rewards.yaml"
    path.write_text(text)
    return path


def test_the_recipe_is_a_fleet() -> None:
    fleet = read_fleet(ROOT / "recipes" / "rewards.yaml")
    assert list(fleet.rewards) == ["ocr", "jpeg", "scene"]
    assert fleet.rewards["ocr"].model_dump()["mode"] == "strict"
    assert fleet.needs() == {"CPU": pytest.approx(3.1), "GPU": 0}
    assert fleet.room() == pytest.approx(4.1)


def test_plain_values_make_the_same_fleet_again() -> None:
    fleet = read_fleet(ROOT / "recipes" / "rewards.yaml")
    assert parse_fleet(fleet.model_dump(mode="json")) == fleet


def test_a_number_fixes_the_replicas() -> None:
    assert parse_fleet({"rewards": {"a": {"kind": "jpeg", "replicas": 3}}}).rewards["a"].replicas.model_dump() == {"min": 3, "max": 3}


def test_paths_start_from_the_files_folder(tmp_path: Path) -> None:
    fleet = read_fleet(write(tmp_path, "rewards: {jpeg: {kind: jpeg}}\nkeys_file: keys.txt\n"))
    assert fleet.keys_file == tmp_path / "keys.txt"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rewards: {ocr: {kind: ocr, moed: strict}}", "unknown key 'rewards.ocr.moed'; did you mean 'rewards.ocr.mode'?"),
        ("rewards: {ocr: {kind: ocr, replicas: {mim: 1}}}", "unknown key 'rewards.ocr.replicas.mim'; did you mean 'rewards.ocr.replicas.min'?"),
        ("rewards: {ocr: {kind: ocr}}\nprot: 1", "unknown key 'prot'; did you mean 'port'?"),
        ("rewards: {ocr: {kind: ocr}}\nlimits: {max_itmes: 1}", "unknown key 'limits.max_itmes'; did you mean 'limits.max_items'?"),
        ("rewards: {ocr: {kind: orc}}", "rewards.ocr.kind: unknown kind 'orc'"),
        ("rewards: {ocr: {kind: 'nowhere:Thing'}}", "cannot be loaded"),
        ("rewards: {ocr: {kind: 'json:JSONDecoder'}}", "is not a subclass"),
        ("rewards: {sign: {mode: strict}}", "rewards.sign.kind: a reward needs a kind"),
        ("rewards: {ocr: strict}", "rewards.ocr: must be a mapping"),
        ("rewards: {}", "rewards: name at least one"),
        ("rewards: {ocr: {kind: ocr}}\nurl: http://127.0.0.1:1", "url (http://127.0.0.1:1) is for runs"),
        ("rewards: {ocr: {kind: ocr, upscale: 99, moed: strict}}", "rewards.ocr.upscale: Input should be less than or equal to 16 (got 99) (and 1 more)"),
        ("port: 8000", "a mapping of names to settings"),
        ("- ocr", "a mapping of names to settings"),
        ("rewards: {ocr: {kind: ocr}, ocr: {kind: jpeg}}", "the key 'ocr' stands twice"),
        ("rewards: {ocr: {kind: ocr}}\nport: 1\nport: 2", "the key 'port' stands twice"),
        ("rewards: {Ocr: {kind: ocr}}", "cannot be called 'Ocr'"),
        ("rewards: {ingress: {kind: ocr}}", "cannot be called 'ingress'"),
        ("rewards: {ocr: {kind: ocr, replicas: {min: 3, max: 2}}}", r"rewards.ocr.replicas: max (2) is below min (3)"),
        ("rewards: {ocr: {kind: ocr, device: cuda}}", "device cuda needs gpus above 0"),
        ("rewards: {ocr: {kind: ocr, gpus: 1}}", "gpus is set but device is cpu"),
        ("rewards: {ocr: {kind: ocr, device: cuda, gpus: 1.5}}", "must be a whole number"),
        ("rewards: {ocr: {kind: ocr, batch_wait_s: 1, timeout_s: 0.5}}", "may wait 1 s but a request only 0.5 s"),
        ("rewards: {ocr: {kind: ocr}}\njobs: {lease_s: 60, ttl_s: 30}", "jobs.lease_s (60) must be below jobs.ttl_s (30)"),
        ("rewards: {ocr: {kind: ocr}}\nport: 70000", "port: Input should be less than or equal to 65535 (got 70000)"),
        ("rewards: {ocr: {kind: ocr}}\nredis_url: localhost", "redis_url"),
        ("rewards: [", "is not YAML"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FleetConfigError) as error:
        read_fleet(write(tmp_path, text))
    assert message in str(error.value)
    assert str(tmp_path / "rewards.yaml") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FleetConfigError, match="cannot be read: No such file"):
        read_fleet(tmp_path / "none.yaml")
