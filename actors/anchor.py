"""The anchor feeder: makes anchor-data batches ahead of the learner, within the depth the ledger allows."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

import torch

from actors.config import DataConfig
from actors.connect import Target
from actors.encoding import SharedTextEncoder
from actors.payload import DataPayload, encode
from actors.sources.draws import data_source, training_rows
from actors.sources.latents import clean_latents
from diffusion.checkpoint import load_codec
from diffusion.config import ModelConfig, SamplerConfig
from diffusion.source import locate

IDLE_S = 1.0
OWNER = "anchor-feeder"


@dataclass(frozen=True)
class AnchorSpec:
    """Everything a feeder needs; `rows` is the batch size, `encoder` the Encoder actors that will be asked for the captions, if any."""

    seed: int
    model: ModelConfig
    sampler: SamplerConfig
    data: DataConfig
    rows: int
    target: Target
    encoder: SharedTextEncoder | None = None


class AnchorFeeder:
    """Plain class; the driver makes it a Ray actor. Batch k is a function of (run seed, k), so a restart repeats nothing."""

    def __init__(self, spec: AnchorSpec) -> None:
        torch.set_num_threads(1)
        self.spec = spec
        folder = locate(spec.model.path, spec.model.revision).folder
        self.codec = load_codec(folder)
        self.source = data_source(spec.data)
        self.buffer = spec.target.buffer()
        self._stop = threading.Event()

    def pid(self) -> int:
        return os.getpid()

    def stop(self) -> None:
        """Return from `run` after the batch in hand."""
        self._stop.set()

    def make(self, batch: int) -> DataPayload:
        """Anchor batch `batch`: clean latents and their own captions. The ranks will ask for these soon, so an Encoder may begin."""
        sampler = self.spec.sampler
        rows = training_rows(self.source, self.spec.data.caption_dropout, self.spec.seed, batch, self.spec.rows)
        captions = tuple(caption for caption, _ in rows)
        if self.spec.encoder is not None:
            self.spec.encoder.prefetch(captions)
        x0 = clean_latents([example for _, example in rows], self.codec, sampler.height, sampler.width, sampler.frames)
        return DataPayload(captions, x0)

    def run(self) -> int:
        """Feed until stopped; returns how many batches were committed."""
        self.buffer.release(OWNER)  # what a former self of this actor held
        committed = 0
        while not self._stop.is_set():
            batch = self.buffer.lease_data(OWNER, IDLE_S)
            if batch is not None:
                self.buffer.commit_data(batch, encode(self.make(batch)))
                committed += 1
        return committed
