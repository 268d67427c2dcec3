"""Ending tasks that may miss a cancellation.

Python before 3.12 loses one that comes in the turn in which what `asyncio.wait_for` waits for is done, and redis-py (8.1.0, `send_packed_command`)
sends every command under `wait_for`. A loop over commands that was cancelled once could go on for ever, and who waits for it with it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

logger = logging.getLogger(__name__)

AGAIN_S, ATTEMPTS = 5.0, 12


async def ended(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they end, whatever they end with; cancelled again where one goes on, left to itself after a minute."""
    pending = set(tasks)
    for _ in range(ATTEMPTS):
        if not pending:
            break
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=AGAIN_S)
    for task in pending:
        logger.error("%s does not end", task.get_name())
    await asyncio.gather(*(task for task in tasks if task.done()), return_exceptions=True)  # an error is not reported as one that nobody saw
