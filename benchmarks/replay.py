"""What the replay buffer costs: against raw Redis and a bare Ray queue, alone, under many producers, and in staleness.

    python benchmarks/replay.py [--quick] [--json | --markdown] [--only bandwidth,ledger,…]

Everything runs against one private redis-server with the product's own settings (append-only file, everysec), in one
run. Sides of a comparison take turns in every repeat, so that a slow minute of the machine hits all of them, and use
one client thread each. Figures are medians over the repeats with their range. The tables of docs/benchmarks.md are what
`--markdown` prints (also the default). `--quick` is a check that everything runs, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if sys.path[0] == str(ROOT / "benchmarks"):  # run as a script: `replay` must be the package, not this file
    sys.path[0] = str(ROOT)

SECTIONS = ("bandwidth", "ledger", "latency", "producers", "staleness", "compression")


def measure(url: str, sections: list[str], quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Every section's result by name, measured on the server at `url`."""
    from benchmarks.ledger import bandwidth, compression, latency, producers, staleness, throughput

    plan: dict[str, Callable[[str, bool], Any]] = {
        "bandwidth": bandwidth.measure,
        "ledger": throughput.measure,
        "latency": latency.measure,
        "producers": producers.measure,
        "staleness": staleness.measure,
        "compression": compression.measure,
    }
    found = {}
    for name in sections:
        say(f"{name} …")
        found[name] = plan[name](url, quick)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and small repeats: does everything run?")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables (the default)")
    parser.add_argument("--only", metavar="NAMES", help=f"some of: {', '.join(SECTIONS)}")
    parser.add_argument("--folder", type=Path, help="where the server keeps its append-only file [default: a temporary folder]")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(SECTIONS)
    unknown = set(chosen) - set(SECTIONS)
    if unknown or (options.json and options.markdown):
        parser.error(f"unknown: {', '.join(sorted(unknown))}" if unknown else "choose one of --json and --markdown")

    from benchmarks.ledger.machine import describe
    from benchmarks.ledger.tables import markdown
    from replay.embedded import EmbeddedRedis

    with tempfile.TemporaryDirectory(prefix="ddrl-bench-", dir=options.folder) as folder, EmbeddedRedis.start(Path(folder)) as server:
        result = {"machine": describe(server.url), "quick": options.quick}
        result |= measure(server.url, chosen, options.quick, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(result, indent=1) if options.json else markdown(result))


if __name__ == "__main__":
    main()
