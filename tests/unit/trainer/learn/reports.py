"""Ray Train's `report` for ranks that Ray did not start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray.train import CheckpointUploadMode

from tests.gloo import DEADLINE_S


class Reports:
    """Uploads checkpoints as Ray Train's worker does: one after the other in a thread; in the mode SYNC the caller waits.

    Attributes:
        gate: no upload begins before it is set; it is, to begin with.
        registered: name and metrics of what was uploaded, in order. (Ray waits for the same report of the other ranks, too.)
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.registered: list[tuple[str, dict[str, Any]]] = []
        self._thread = ThreadPoolExecutor(1)

    def __call__(
        self,
        metrics: dict[str, Any],
        *,
        checkpoint: Any,
        checkpoint_dir_name: str,
        checkpoint_upload_mode: CheckpointUploadMode,
        delete_local_checkpoint_after_upload: bool,
        checkpoint_upload_fn: Callable[[Any, str], Any],
    ) -> None:
        assert not delete_local_checkpoint_after_upload  # it would delete the checkpoint: it is written where it stays

        def upload() -> None:
            assert self.gate.wait(DEADLINE_S)
            assert checkpoint_upload_fn(checkpoint, checkpoint_dir_name) is checkpoint
            self.registered.append((checkpoint_dir_name, metrics))

        uploaded = self._thread.submit(upload)
        if checkpoint_upload_mode is CheckpointUploadMode.SYNC:
            uploaded.result(DEADLINE_S)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.registered]
