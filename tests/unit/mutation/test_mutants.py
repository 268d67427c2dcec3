"""The list of mutants stays true to the code, and the runner's judgement is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutation.mutants import MUTANTS, TITLES, Mutant
from tests.mutation.run import PAGE, Outcome, judge, outdated, record, table

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutants_text_occurs_exactly_once(mutant: Mutant) -> None:
    assert outdated([mutant]) == []
    assert mutant.new != mutant.old
    assert all((ROOT / test).exists() for test in mutant.tests)


def test_names_are_unique_and_every_promise_is_attacked() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20
    assert {mutant.breaks for mutant in MUTANTS if mutant.section == "ledger"} == set(range(1, 10))
    assert {mutant.section for mutant in MUTANTS} == set(TITLES)


FAILED = "F\n=== FAILURES ===\nE  assert 1 == 2\nFAILED tests/integration/replay/test_x.py::test_y[wheel] - assert\n1 failed in 1s"


@pytest.mark.parametrize(
    ("status", "output", "verdict", "by"),
    [
        (0, "12 passed", "survived", ""),
        (1, FAILED, "killed", "test_x.py::test_y[wheel]"),
        (1, FAILED.replace("FAILED t", "ERROR t"), "killed", "test_x.py::test_y[wheel]"),
        (None, "", "killed", "a test that ran out of time"),
        (1, f"E ResponseError: Error compiling script\n{FAILED}", "broken", "1 failed in 1s"),
        (1, f"E user_script:12: attempt to index a nil value\n{FAILED}", "broken", "1 failed in 1s"),
        (2, "ERROR tests/x.py\nInterrupted: 1 error during collection", "broken", "Interrupted: 1 error during collection"),
        (4, "", "broken", "exit 4"),
    ],
)
def test_judgement(status: int | None, output: str, verdict: str, by: str) -> None:
    assert judge(status, output) == (verdict, by)


def test_the_record_replaces_the_table_of_its_section_only(tmp_path: Path) -> None:
    page = tmp_path / "mutations.md"
    marker = "<!-- {}: written by python -m tests.mutation.run --record -->\nold table of {}\n<!-- end of {} -->\n"
    page.write_text(f"# Head\n{marker.format('x', 'x', 'x')}## Next\n{marker.format('y', 'y', 'y')}tail\n")
    outcomes = [Outcome("x", "a", 1, "b", "c.lua", "killed", "test_x.py::test_y", 1.0), Outcome("x", "d", 2, "e", "f.py", "survived", "", 2.0)]
    record(page, "x", table(outcomes))
    text = page.read_text()
    assert text.startswith("# Head\n<!-- x: written by python -m tests.mutation.run --record -->\n\n| mutant | breaks promise |")
    assert "old table of x" not in text
    assert "1 of 2 mutants killed.\n\n<!-- end of x -->\n## Next\n" in text
    assert text.endswith("old table of y\n<!-- end of y -->\ntail\n")
    with pytest.raises(SystemExit, match="has no lines"):
        record(page, "z", "")


def test_a_section_without_promises_has_no_column_for_them() -> None:
    assert table([Outcome("x", "a", 0, "b", "c.py", "killed", "t.py::test", 1.0)]).startswith("| mutant | what goes wrong |")


def test_the_page_has_a_place_for_every_section() -> None:
    assert all(f"<!-- end of {section} -->" in PAGE.read_text() for section in TITLES)
