"""The anchor feeder: batch k is a function of k, and it stops when told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from actors.anchor import AnchorFeeder, AnchorSpec
from actors.config import DataConfig
from actors.payload import DataPayload, decode_data
from actors.prepared import Row, begin, finish, write_shard
from actors.sources.draws import training_batch, training_rows
from actors.sources.glyph import GlyphSource
from diffusion.config import ModelConfig, SamplerConfig


@dataclass
class Ledger:
    """Grants data batches; nothing at first, then 0, 1, … until the feeder is stopped at `last`."""

    last: int
    feeder: AnchorFeeder | None = None
    waits: int = 2
    committed: dict[int, DataPayload] = field(default_factory=dict)

    def buffer(self) -> Ledger:
        return self

    def release(self, owner: str) -> tuple[int, int]:
        return 0, 0

    def lease_data(self, owner: str, timeout_s: float) -> int | None:
        if self.waits:
            self.waits -= 1
            return None
        return len(self.committed)

    def commit_data(self, batch: int, payload: list[bytearray]) -> None:
        self.committed[batch] = decode_data(payload, range(len(payload) - 1))
        if batch == self.last:
            assert self.feeder is not None
            self.feeder.stop()


def feeder(folder: Path, ledger: Ledger) -> AnchorFeeder:
    spec = AnchorSpec(5, ModelConfig(path=str(folder), init=True), SamplerConfig(), DataConfig(), 4, ledger)  # type: ignore[arg-type]
    ledger.feeder = AnchorFeeder(spec)
    return ledger.feeder


def test_batches_are_clean_latents_with_their_own_captions(policy_folder: Path) -> None:
    made = feeder(policy_folder, Ledger(0))
    captions, pixels = training_batch(GlyphSource(), 0.0, 5, 3, 4, 16, 48)
    payload = made.make(3)
    np.testing.assert_array_equal(made.codec.decode(payload.x0), pixels)
    assert list(payload.texts) == captions


def test_it_feeds_until_stopped_and_a_restart_makes_the_same(policy_folder: Path) -> None:
    first, again = Ledger(2), Ledger(1)
    assert feeder(policy_folder, first).run() == 3
    assert feeder(policy_folder, again).run() == 2
    assert sorted(first.committed) == [0, 1, 2]
    for batch in (0, 1):
        assert torch.equal(first.committed[batch].x0, again.committed[batch].x0)
    assert not torch.equal(first.committed[0].x0, first.committed[1].x0)


def test_batches_of_a_prepared_set_are_its_latents(policy_folder: Path, tmp_path: Path) -> None:
    """As they were stored, without a codec."""
    begin(tmp_path / "set", {})
    x0 = np.random.default_rng(0).normal(size=(40, 3, 16, 48)).astype(np.float32)
    write_shard(tmp_path / "set", 0, x0, [Row(f"sign {i}", f"sign {i}", "", 1, 1) for i in range(40)], [])
    finish(tmp_path / "set", 1, [], codec="pixels", model="", height=16, width=48, latent=(3, 16, 48))
    data = DataConfig(kind="prepared", path=str(tmp_path / "set"))
    made = AnchorFeeder(AnchorSpec(5, ModelConfig(path=str(policy_folder), init=True), SamplerConfig(), data, 4, Ledger(0)))  # type: ignore[arg-type]
    payload = made.make(3)
    rows = training_rows(made.source, 0.0, 5, 3, 4)
    numbers = [int(caption.removeprefix("sign ")) for caption, _ in rows]
    np.testing.assert_array_equal(payload.x0.numpy(), x0[numbers])
    assert list(payload.texts) == [caption for caption, _ in rows]
