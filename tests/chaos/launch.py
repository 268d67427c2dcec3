"""`ddrl` with kill points: the same program, whose Ray workers run `tests.chaos.points.install` first."""

from __future__ import annotations

import functools
import sys


def main() -> None:
    from trainer.environment import prepare

    address = sys.argv[sys.argv.index("--ray-address") + 1] if "--ray-address" in sys.argv else None
    prepare(address)
    import ray

    ray.init = functools.partial(ray.init, runtime_env={"worker_process_setup_hook": "tests.chaos.points.install"})
    from trainer.cli import main as ddrl

    ddrl()


if __name__ == "__main__":
    main()
