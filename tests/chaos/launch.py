"""`ddrl` with kill points: the same program, whose Ray workers run `tests.chaos.points.install` first."""

from __future__ import annotations

import functools
import os
import sys

from tests.chaos.points import FOLDER


def main() -> None:
    from trainer.run.environment import prepare

    address = sys.argv[sys.argv.index("--ray-address") + 1] if "--ray-address" in sys.argv else None
    prepare(address)
    import ray

    # in a cluster that is joined, workers do not inherit this process's environment
    workers = {"worker_process_setup_hook": "tests.chaos.points.install", "env_vars": {FOLDER: os.environ[FOLDER]}}
    ray.init = functools.partial(ray.init, runtime_env=workers)
    from trainer.cli.main import main as ddrl

    ddrl()


if __name__ == "__main__":
    main()
