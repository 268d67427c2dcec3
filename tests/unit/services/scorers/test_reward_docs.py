"""docs/rewards/: every kind has its place, names its sub-scores, and its entries can be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from services.scorers.registry import BUILT_IN, parse_reward, scorer_class, settings_class

DOCS = Path(__file__).resolve().parents[4] / "docs" / "rewards"
INDEX = (DOCS / "README.md").read_text()
ROWS = {row[1]: row[0] for row in re.findall(r"^(\| \[(\w+)\]\(\w+\.md\) \|.*)$", INDEX, re.MULTILINE)}
ENTRIES = [
    (page.name, name, entry)
    for page in sorted(DOCS.glob("*.md"))
    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for name, entry in (lambda tree: tree.get("rewards", tree))(yaml.safe_load(block)).items()
]


def test_every_kind_has_a_row_and_a_page() -> None:
    assert set(ROWS) == set(BUILT_IN)
    for link in re.findall(r"\]\(([\w./-]+\.md)\)", "".join(page.read_text() for page in DOCS.glob("*.md"))):
        assert (DOCS / link).exists(), link


@pytest.mark.parametrize("kind", [kind for kind in BUILT_IN if kind != "http"])
def test_the_row_names_every_sub_score_and_the_default_reward(kind: str) -> None:
    row, scorer = ROWS[kind], scorer_class(kind)
    fields = settings_class(kind).model_fields
    default = fields["mode"].default if "mode" in fields else fields["reward"].default if "reward" in fields else scorer.reward
    named = row.split("|")[3]
    assert set(re.findall(r"\w+", named)) - {"video"} == set(scorer.sub_scores)
    assert re.findall(r"\*\*(\w+)\*\*", named) == [default]


@pytest.mark.parametrize(("page", "name", "entry"), ENTRIES)
def test_every_entry_of_the_pages_can_be_read(page: str, name: str, entry: dict[str, object]) -> None:
    assert parse_reward(entry).kind == entry["kind"], (page, name)


def test_the_pages_name_every_setting_of_ocr() -> None:
    from services.scorers.settings import OcrReward, RewardSettings

    page = (DOCS / "ocr.md").read_text()
    assert [key for key in OcrReward.model_fields if key not in RewardSettings.model_fields and f"`{key}`" not in page and key != "mode"] == []
