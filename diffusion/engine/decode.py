"""Decoding off the critical path: finished latents become pixels in a thread of their own, while sampling goes on.

Whatever waits is decoded together, latents of equal shape in one call of the codec, at most `batch` at a time (the codec
cuts what is too large for one call into tiles). On a GPU the thread has a stream of its own.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import nullcontext, suppress
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from diffusion.codecs import Codec

_Item = tuple[Tensor, "Future[np.ndarray]"]


class Decoder:
    """See the module's docstring. Close it, or use it as a context manager.

    Args:
        codec: latents to pixels.
        device: where the codec decodes.
        batch: latents in one call.
    """

    def __init__(self, codec: Codec, device: torch.device | str = "cpu", batch: int = 16) -> None:
        self._codec, self._device, self._batch = codec, torch.device(device), batch
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._closed = False
        self._thread.start()

    def submit(self, latent: Tensor) -> Future[np.ndarray]:
        """Pixels of one latent `[C, h, w]` (uint8 `[H, W, 3]`), or of a clip, when they are there."""
        if self._closed:
            raise RuntimeError("the decoder is closed")
        future: Future[np.ndarray] = Future()
        self._queue.put((latent, future))
        return future

    def decode(self, latents: Sequence[Tensor], timeout_s: float) -> list[np.ndarray]:
        """Pixels of several latents, in order. Raises TimeoutError, or what the codec raised."""
        return [f.result(timeout_s) for f in [self.submit(x) for x in latents]]

    def close(self) -> None:
        """Decode what waits, then end the thread."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        stream = torch.cuda.stream(torch.cuda.Stream(self._device)) if self._device.type == "cuda" else nullcontext()
        with stream, torch.no_grad():
            last = False
            while not last:
                items = [self._queue.get()]
                while len(items) < self._batch and not self._queue.empty():
                    items.append(self._queue.get())
                last = None in items
                waiting = sorted((i for i in items if i is not None), key=lambda i: tuple(i[0].shape))
                for _, same in groupby(waiting, key=lambda i: tuple(i[0].shape)):
                    self._decode(list(same))

    def _decode(self, items: list[_Item]) -> None:
        try:
            pixels = list(self._codec.decode(torch.stack([latent.to(self._device) for latent, _ in items])))
        except Exception as error:  # belongs to whoever waits for the pixels
            for _, future in items:
                with suppress(InvalidStateError):  # cancelled meanwhile
                    future.set_exception(error)
            return
        for (_, future), picture in zip(items, pixels, strict=True):
            with suppress(InvalidStateError):
                future.set_result(picture)
