"""The README of a room lists every module of the room."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ["diffusion", "replay", "services", "actors", "trainer"]


@pytest.mark.parametrize("room", ROOMS)
def test_a_readme_lists_every_module(room: str) -> None:
    """By its file name, in backticks; where two folders have a module of one name, it stands there as often."""
    named = re.findall(r"`(?:\w+/)*(\w+\.py)`", (ROOT / room / "README.md").read_text())
    modules = [f.name for f in (ROOT / room).rglob("*.py") if f.name not in ("__init__.py", "__main__.py")]
    assert {name for name in modules if named.count(name) < modules.count(name)} == set(), "modules that the README does not list"
    assert {name for name in named if name not in modules and not name.startswith("test_")} == set(), "modules that the README lists and that are not there"
