"""Settling from the controller: a step is settled when Ray Train has registered its checkpoint, never earlier.

`ray.train.report` returns in the worker before the checkpoint is written, let alone registered; a rank killed in between starts
again from the checkpoint before. This callback runs in the controller, after registration. It has a short deadline and
never raises: a settle that is missed is made good by the next one, or by the rollback at the next start.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from ray.train import Checkpoint, UserCallback

from actors.connect import Target
from trainer.learn.metrics import SettleMetrics

logger = logging.getLogger(__name__)

DEADLINE_S = 2.0


class SettleCheckpointed(UserCallback):
    """Settles the ledger up to the step of every registered checkpoint.

    Args:
        target: the run's replay buffer.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._metrics: SettleMetrics | None = None  # made in the controller's process

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        if checkpoint is None or not metrics:
            return
        step, epoch = int(metrics[0]["step"]), int(metrics[0]["epoch"])
        pool = ThreadPoolExecutor(1, "settle")
        try:
            pool.submit(lambda: self.target.buffer().settle(step, epoch)).result(DEADLINE_S)
            self._metrics = self._metrics or SettleMetrics(self.target.run)
            self._metrics.settled(time.time() - float(metrics[0]["reported_at"]))
        except FutureTimeout:
            logger.warning("settling step %d took longer than %.0f s; the next checkpoint settles it", step, DEADLINE_S)
        except Exception as error:  # the controller's loop must go on; the ledger loses nothing
            logger.warning("settling step %d failed (%s); the next checkpoint settles it", step, error)
        finally:
            pool.shutdown(wait=False)
