"""``FleetConfig`` as a branch of somebody else's settings, and the rewards that a run picks from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from services.config import FleetConfig, FleetConfigError, fleet_of, one_line
from services.scorers.settings import OcrReward

OWN = "tests.integration.services.probe_scorers:Mean"


class Run(BaseModel):
    """As the recipe of a run holds it."""

    fleet: FleetConfig = FleetConfig()


def test_a_branch_of_other_settings_reads_back_as_it_was() -> None:
    tree = {"fleet": {"rewards": {"sign": {"kind": "ocr", "upscale": 4, "replicas": 2}, "own": {"kind": OWN, "delay_s": 0.5}}, "timeout_s": 9}}
    run = Run.model_validate(tree)
    assert run.fleet.rewards["sign"].model_dump()["upscale"] == 4
    assert run.fleet.rewards["own"].model_dump()["delay_s"] == 0.5
    assert Run.model_validate(run.model_dump(mode="json")) == run
    assert Run.model_validate({"fleet": {"rewards": dict(run.fleet.rewards)}}).fleet.rewards == run.fleet.rewards


@pytest.mark.parametrize(
    ("fleet", "loc", "words"),
    [
        ({"rewards": {"ocr": {"kind": "ocr", "mode": "loud"}}}, "fleet.rewards.ocr.mode", "'flow_grpo', 'cosmos' or 'strict'"),
        ({"rewards": {"ocr": {"kind": "ocr", "moed": "strict"}}}, "fleet.rewards.ocr.moed", "unknown key; did you mean 'mode'?"),
        ({"rewards": {"ocr": {"kind": "ocr", "replicas": {"mim": 1}}}}, "fleet.rewards.ocr.replicas.mim", "did you mean 'min'?"),
        ({"rewards": {"a": {"kind": "orc"}}}, "fleet.rewards.a.kind", "unknown kind 'orc'"),
        ({"rewards": {"a": 3}}, "fleet.rewards.a", "must be a mapping"),
        ({"rewards": {"Ocr": {"kind": "ocr"}}}, "fleet.rewards", "cannot be called 'Ocr'"),
        ({"rewards": {"a": {"kind": "clipscore"}}}, "fleet.rewards.a.path", "Field required"),
        ({"url": "ftp://x"}, "fleet.url", "match"),
        ({"api_key_env": "KEY"}, "fleet", "api_key_env (KEY) is the key for url"),
        ({"port": "http"}, "fleet.port", "valid integer"),
    ],
)
def test_errors_name_dotted_keys(fleet: dict[str, Any], loc: str, words: str) -> None:
    with pytest.raises(ValidationError) as error:
        Run.model_validate({"fleet": fleet})
    first = error.value.errors()[0]
    assert ".".join(map(str, first["loc"])) == loc
    assert words in first["msg"]
    assert loc in one_line(error.value, Run)


def test_a_run_gets_exactly_the_rewards_it_names() -> None:
    config = FleetConfig.model_validate({"rewards": {"sign": {"kind": "ocr", "upscale": 4}, "other": {"kind": "scene"}}})
    fleet = fleet_of(config, ["jpeg", "sign"])
    assert list(fleet.rewards) == ["jpeg", "sign"]
    assert (fleet.rewards["jpeg"].kind, fleet.rewards["sign"]) == ("jpeg", config.rewards["sign"])
    assert fleet.needs(http=False) == {"CPU": 2, "GPU": 0}


def test_defaults_fit_one_line_of_glyphs() -> None:
    ocr = fleet_of(FleetConfig(), ["ocr"]).rewards["ocr"]
    assert isinstance(ocr, OcrReward)
    assert FleetConfig.model_validate({"rewards": {"ocr": {"upscale": 3}}}).rewards["ocr"] == ocr, "a reward called like a kind is of that kind"
    assert (ocr.mode, ocr.reading, ocr.upscale) == ("flow_grpo", "recognition", 3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("orc", r"unknown reward 'orc'; did you mean 'ocr'\?.*ocr, jpeg, scene.*fleet\.rewards\.orc"),
        ("beauty", r"unknown reward 'beauty'.*fleet\.rewards\.beauty"),
        ("clipscore", r"'clipscore' needs settings: fleet\.rewards\.clipscore: .* with path"),
    ],
)
def test_a_reward_that_is_not_known_is_said(name: str, words: str) -> None:
    with pytest.raises(FleetConfigError, match=words):
        fleet_of(FleetConfig(), [name])


def test_a_service_at_a_url_decides_what_names_mean() -> None:
    config = FleetConfig.model_validate({"url": "http://127.0.0.1:8000", "rewards": {"ocr": {"kind": "ocr", "timeout_s": 5}, "jpeg": {"kind": "jpeg"}}})
    assert list(fleet_of(config, ["beauty", "ocr"]).rewards) == ["ocr"]


def test_paths_become_absolute(tmp_path: Path) -> None:
    config = FleetConfig.model_validate({"rewards": {"clip": {"kind": "clipscore", "path": "models/clip"}}, "keys_file": "keys"})
    located = config.located(tmp_path)
    assert located.keys_file == tmp_path / "keys"
    assert located.rewards["clip"].model_dump()["path"] == tmp_path / "models" / "clip"


def test_every_setting_is_described() -> None:
    for model in (FleetConfig, OcrReward):
        assert all(field.description for field in model.model_fields.values())
