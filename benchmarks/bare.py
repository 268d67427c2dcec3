"""The bare loop that benchmarks/pipeline.py holds ddrl against: sample, score, learn, in one process, one after the other.

    python -m benchmarks.bare RECIPE UPDATES FILE [--set KEY=VALUE …]

`trainer.solo` on every thread of the machine: torch on all cores, a scorer of one thread for each core. Writes what each update took to FILE, in
the form of a run's metrics.jsonl.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from trainer.config.load import load_config
from trainer.solo.loop import SoloLoop


def main() -> None:
    recipe, updates, file, *overrides = sys.argv[1:]
    config = load_config(Path(recipe), [f"updates={updates}", *(value for value in overrides if value != "--set")])
    loop = SoloLoop(config, len(os.sched_getaffinity(0)))
    with Path(file).open("w") as out:
        for step in range(1, config.updates + 1):
            out.write(json.dumps(loop.update(step)) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
