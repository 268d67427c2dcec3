"""Decoding off the critical path: finished latents become pixels in a thread of their own, while sampling goes on.

Latents that are handed in together are decoded together, those of equal shape in one call of the codec, at most `batch` and
`LATENT_BYTES` at a time (the codec cuts what is too large for one call into tiles). Large clips are so decoded one at a time, each to 8 bits before
the next; `turns` bounds how many of them there are. What is handed in apart is decoded apart: a codec's output
depends on its batch by rounding, and who else asks must not matter. On a GPU the thread has a stream of its own.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from diffusion.codecs import Codec
from diffusion.engine.memory import out_of_memory
from diffusion.pixels import turn_size

LATENT_BYTES = 2 << 20
"""Most bytes of latents, in fp32, of one call of the codec with more than one: 8 pictures of 512 x 512 by a factor of 8."""
_Item = tuple[Tensor, "Future[np.ndarray]"]


def collect(futures: Sequence[Future[np.ndarray]], timeout_s: float) -> list[np.ndarray]:
    """Pixels that were asked for, in order. Raises TimeoutError, or what the codec raised."""
    late = wait(futures, timeout_s).not_done
    if late:
        raise TimeoutError(f"{len(late)} of {len(futures)} latents were not decoded within {timeout_s:g} s")
    return [f.result() for f in futures]


class Decoder:
    """See the module's docstring. Close it, or use it as a context manager.

    Args:
        codec: latents to pixels.
        device: where the codec decodes.
        batch: most latents in one call.
    """

    def __init__(self, codec: Codec, device: torch.device | str = "cpu", batch: int = 16) -> None:
        self._codec, self._device, self._batch = codec, torch.device(device), batch
        self._queue: queue.SimpleQueue[list[_Item] | None] = queue.SimpleQueue()
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._closed = False
        self._thread.start()

    def submit(self, latents: Sequence[Tensor]) -> list[Future[np.ndarray]]:
        """Pixels of each latent `[C, h, w]` (uint8 `[H, W, 3]`), or of each clip, when they are there."""
        if self._closed:
            raise RuntimeError("the decoder is closed")
        items: list[_Item] = [(latent, Future()) for latent in latents]
        self._queue.put(items)
        return [future for _, future in items]

    def decode(self, latents: Sequence[Tensor], timeout_s: float) -> list[np.ndarray]:
        """Pixels of several latents, in order. Raises TimeoutError, or what the codec raised."""
        return collect(self.submit(latents), timeout_s)

    def turns(self, latents: Sequence[Tensor], bytes_each: int, timeout_s: float) -> Iterator[np.ndarray]:
        """Pixels `[n, …]` of latents of one shape, in order, a turn after another (`turn_size`): while the caller looks at one, the next is
        decoded. Who lets go of each before the next has two turns in memory, whatever the number of latents.

        Args:
            bytes_each: of one sample's pixels.
            timeout_s: for each turn. Raises TimeoutError, or what the codec raised.
        """
        size = turn_size(len(latents), bytes_each)
        waiting = self.submit(latents[:size])
        for start in range(size, len(latents) + size, size):
            pixels = [_together(collect(waiting, timeout_s))]
            waiting = self.submit(latents[start : start + size]) if start < len(latents) else []
            yield pixels.pop()

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
            while (items := self._queue.get()) is not None:
                self._decode_all(items)
                del items  # while it waits: pixels are their asker's

    def _decode_all(self, items: list[_Item]) -> None:
        """What was handed in together."""
        by_shape = sorted(items, key=lambda item: tuple(item[0].shape))  # stable: order of the caller within a shape
        for _, same in groupby(by_shape, key=lambda item: tuple(item[0].shape)):
            equal = list(same)
            batch = max(1, min(self._batch, LATENT_BYTES // max(1, 4 * equal[0][0].numel())))
            for start in range(0, len(equal), batch):
                self._decode(equal[start : start + batch])

    def _decode(self, items: list[_Item]) -> None:
        """One call of the codec; one by one if that does not fit into memory. An error belongs to whoever waits for the pixels."""
        pixels: list[np.ndarray] = []
        problem: Exception | None = None
        try:
            pixels = list(self._codec.decode(torch.stack([latent.to(self._device) for latent, _ in items])))
            if len(pixels) != len(items):
                raise RuntimeError(f"the codec made {len(pixels)} pictures of {len(items)} latents")
        except Exception as error:
            problem = error
        if problem is not None and len(items) > 1 and out_of_memory(problem):
            problem = None  # lets go of the tensors that the error's frames hold
            for item in items:
                self._decode([item])
            return
        for i, (_, future) in enumerate(items):
            if future.set_running_or_notify_cancel():
                future.set_result(pixels[i]) if problem is None else future.set_exception(problem)


def _together(pixels: list[np.ndarray]) -> np.ndarray:
    return pixels[0][None] if len(pixels) == 1 else np.stack(pixels)
