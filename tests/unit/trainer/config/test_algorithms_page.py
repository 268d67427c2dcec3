"""docs/algorithms.md has a section for every preset, with its source and the keys that it sets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from trainer.config.objective import ObjectiveConfig
from trainer.config.presets import PRESETS, PresetName

PAGE = (Path(__file__).parents[4] / "docs" / "algorithms.md").read_text()


def test_the_page_has_a_section_for_every_preset_in_their_order() -> None:
    assert re.findall(r"^## (\w+)$", PAGE, re.MULTILINE) == list(PRESETS) == list(get_args(PresetName))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_section_has_the_source_and_the_keys_of_its_preset(preset: str) -> None:
    section = re.split(r"^## ", PAGE.split(f"\n## {preset}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    assert f"\nSource: {PRESETS[preset].source}\n" in section
    keys = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    assert [yaml.safe_load(block) for block in keys] == [dict(PRESETS[preset].objective)]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_holds_keys_of_an_objective_with_values_that_it_takes(preset: str) -> None:
    found = ObjectiveConfig(preset=preset)
    assert {key: getattr(found, key) for key in PRESETS[preset].objective} == PRESETS[preset].objective
