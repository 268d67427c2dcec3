"""Polling with jitter and a deadline, the only way anything in this package waits for the ledger."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

FIRST_PAUSE_S = 0.004
LONGEST_PAUSE_S = 0.1


def poll(attempt: Callable[[], T | None], timeout_s: float) -> T | None:
    """Call `attempt` until it returns something or `timeout_s` has passed; then None.

    Pauses grow from 4 ms to 100 ms and are jittered, so that many waiting producers do not ask in step.
    `timeout_s` 0 asks once.
    """
    deadline = time.monotonic() + timeout_s
    pause = FIRST_PAUSE_S
    while True:
        result = attempt()
        if result is not None:
            return result
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        time.sleep(min(left, pause * random.uniform(0.5, 1.0)))
        pause = min(LONGEST_PAUSE_S, pause * 1.5)
