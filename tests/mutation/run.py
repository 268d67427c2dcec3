"""Break the ledger, the learner and the objective on purpose, one line at a time, and see whether the suite notices.

    python -m tests.mutation.run [--section NAME …] [--only NAME …] [--workers N] [--json] [--record]

For each mutant of `tests/mutation/mutants.yaml` the tree is copied to a temporary folder, changed there, and the tests the
mutant names are run until the first failure. A mutant that no test notices survives: exit status 1. The same tests are
first run on an unchanged copy: they must pass, else a failure would prove nothing. `--record` writes the tables of
the sections that were run into docs/mutations.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.mutation.mutants import MUTANTS, TITLES, Mutant

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "mutations.md"
DEADLINE_S, BASELINE_DEADLINE_S = 420.0, 3600.0
"""For the tests of one mutant, and for those of all on the unchanged copy."""
LEFT_OUT = (".git", ".venv", "runs", "__pycache__", ".hypothesis", ".*_cache", "*.egg-info")
# A mutant that cannot run at all is a mistake in the list, not a kill.
BROKEN = re.compile(r"Error compiling script|SyntaxError|IndentationError|attempt to (?:call|index|compare|concatenate|perform)|unexpected symbol")


@dataclass(frozen=True)
class Outcome:
    """`verdict`: killed, survived, or broken (the mutant does not run); `by`: the test that failed first."""

    section: str
    mutant: str
    promise: int
    what: str
    file: str
    verdict: str
    by: str
    seconds: float


def copy_tree(target: Path) -> None:
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*LEFT_OUT))


def outdated(mutants: Sequence[Mutant]) -> list[str]:
    """Mutants whose text does not occur exactly once any more."""
    counts = {mutant.name: (ROOT / mutant.file).read_text().count(mutant.old) for mutant in mutants}
    return [f"{name} ({count} times)" for name, count in counts.items() if count != 1]


def mutate(tree: Path, mutant: Mutant) -> None:
    """Apply `mutant` to a copy."""
    file = tree / mutant.file
    file.write_text(file.read_text().replace(mutant.old, mutant.new))


def run_tests(tree: Path, tests: tuple[str, ...], deadline_s: float = DEADLINE_S) -> tuple[int | None, str]:
    """(pytest's exit status, its output); None when the deadline passed."""
    arguments = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=short", *tests]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)}
    process = subprocess.Popen(arguments, cwd=tree, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=deadline_s)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the session started above; servers end with their parent
        output, _ = process.communicate()
        return None, output


def judge(status: int | None, output: str) -> tuple[str, str]:
    """(verdict, the test that noticed)."""
    if status == 0:
        return "survived", ""
    if status is None:
        return "killed", "a test that ran out of time"
    found = re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py::\S+)", output, re.MULTILINE)
    if status != 1 or found is None or BROKEN.search(output):
        return "broken", output.strip().splitlines()[-1] if output.strip() else f"exit {status}"
    return "killed", found.group(1)


def attempt(mutant: Mutant) -> Outcome:
    """Try one mutant in a fresh copy."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ddrl-mutant-") as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        mutate(tree, mutant)
        verdict, by = judge(*run_tests(tree, mutant.tests))
    return Outcome(mutant.section, mutant.name, mutant.breaks, mutant.what, mutant.file, verdict, by, round(time.monotonic() - started, 1))


def baseline(mutants: list[Mutant]) -> None:
    """The tests of all `mutants` pass on an unchanged copy; else leave with what they say."""
    tests = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    with tempfile.TemporaryDirectory(prefix="ddrl-mutant-") as folder:
        copy_tree(Path(folder) / "tree")
        status, output = run_tests(Path(folder) / "tree", tests, BASELINE_DEADLINE_S)
    if status is None:
        raise SystemExit(f"the tests on the unchanged tree took longer than {BASELINE_DEADLINE_S:.0f} s\n{output[-3000:]}")
    if status != 0:
        raise SystemExit(f"the tests do not pass on the unchanged tree; mend that first\n{output[-3000:]}")


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown, one row per mutant of a section; with the promise that it breaks, where it breaks a numbered one."""
    numbered = any(o.promise for o in outcomes)
    names = ["mutant", *["breaks promise"] * numbered, "what goes wrong", "in", "verdict", "noticed first by"]
    rows = [f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]
    for o in outcomes:
        cells = [o.mutant, *[str(o.promise)] * numbered, o.what, f"`{o.file}`", o.verdict, f"`{o.by}`" if o.by else ""]
        rows.append(f"| {' | '.join(cells)} |")
    killed = sum(o.verdict == "killed" for o in outcomes)
    return "\n".join([*rows, "", f"{killed} of {len(outcomes)} mutants killed."])


def record(page: Path, section: str, text: str) -> None:
    """Replace what stands between a section's marker lines in the page by `text`."""
    first, last = f"<!-- {section}: written by python -m tests.mutation.run --record -->", f"<!-- end of {section} -->"
    head, found, rest = page.read_text().partition(first)
    _, ended, tail = rest.partition(last)
    if not found or not ended:
        raise SystemExit(f"{page} has no lines {first!r} and {last!r}")
    page.write_text(f"{head}{first}\n\n{text}\n\n{last}{tail}")


def chosen_of(options: argparse.Namespace) -> list[Mutant]:
    """The mutants asked for. Raises ValueError for a name that is none, and where a table would be recorded in part."""
    for what, asked, known in (("mutant", options.only, {m.name for m in MUTANTS}), ("section", options.section, set(TITLES))):
        if unknown := set(asked or ()) - known:
            raise ValueError(f"no such {what}: {', '.join(sorted(unknown))}")
    if options.record and options.only:
        raise ValueError("--record wants all mutants of a section")
    return [m for m in MUTANTS if (not options.only or m.name in options.only) and (not options.section or m.section in options.section)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", nargs="+", metavar="NAME", help=f"these sections only: {', '.join(TITLES)}")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants only")
    parser.add_argument("--workers", type=int, default=2, help="mutants that are tried at a time [default: 2]")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown tables")
    parser.add_argument("--record", action="store_true", help="write the tables into docs/mutations.md")
    options = parser.parse_args()
    try:
        chosen = chosen_of(options)
    except ValueError as error:
        parser.error(str(error))
    if late := outdated(chosen):
        raise SystemExit(f"the code has changed, adapt these mutants: {', '.join(late)}")
    baseline(chosen)
    outcomes = []
    with ThreadPoolExecutor(options.workers) as pool:
        for number, last in enumerate(pool.map(attempt, chosen), 1):
            outcomes.append(last)
            print(f"{number}/{len(chosen)} {last.mutant}: {last.verdict} {last.by} ({last.seconds:.0f} s)", file=sys.stderr, flush=True)
    tables = {section: table([o for o in outcomes if o.section == section]) for section in TITLES if any(o.section == section for o in outcomes)}
    print(json.dumps([asdict(o) for o in outcomes], indent=1) if options.json else "\n\n".join(f"## {TITLES[s]}\n\n{t}" for s, t in tables.items()))
    if options.record:
        for section, text in tables.items():
            record(PAGE, section, text)
    sys.exit(any(outcome.verdict != "killed" for outcome in outcomes))


if __name__ == "__main__":
    main()
