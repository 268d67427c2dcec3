"""Which numbers of a metrics line become TensorBoard scalars."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import img_mime_type_detector

from actors.clips import write_clip
from trainer.run.errors import RunFailed
from trainer.run.scalars import Scalars, Wandb, scalars


def test_an_update_line() -> None:
    record = {
        "kind": "update",
        "step": 3,
        "time": 1.0,
        "loss": 0.5,
        "skipped": 0,
        "rewards": {"ocr": 0.3},
        "warnings": ["x"],
        "seconds": {"train": 2.0, "note": "x"},
        "reason": None,
    }
    assert dict(scalars(record)) == {"update/loss": 0.5, "update/skipped": 0.0, "update/rewards/ocr": 0.3, "update/seconds/train": 2.0}


def test_evaluations_are_kept_apart_by_split_and_weights() -> None:
    record = {"kind": "evaluation", "split": "test", "weights": "ema", "step": 0, "prompts": 512, "set": "s", "rewards": {"ocr": 0.25, "jpeg": None}}
    record |= {"revisions": {"ocr": "r"}, "scene": {"brightness": 0.4}}
    assert dict(scalars(record)) == {"test/ema/rewards/ocr": 0.25, "test/ema/scene/brightness": 0.4}


def written(folder: Path, purged: bool) -> EventAccumulator:
    found = EventAccumulator(str(folder), purge_orphaned_data=purged)
    found.Reload()
    return found


def test_a_resume_forgets_what_was_written_of_later_steps(tmp_path: Path) -> None:
    line = {"kind": "update", "time": 1.0, "loss": 0.5}
    with Scalars(tmp_path) as first:
        for step in (1, 2, 3, 4):
            first.add(line | {"step": step})
    with Scalars(tmp_path, resumed_at=2) as second:
        for step in (3, 4, 5):
            second.add(line | {"step": step, "loss": 0.25})
    events = written(tmp_path, purged=True).Scalars("update/loss")
    assert [(event.step, event.value) for event in events] == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25), (5, 0.25)]


def test_sample_grids_are_written_once_each_at_their_step(tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    samples.mkdir()
    picture = Image.new("RGB", (8, 4), "red")
    picture.save(samples / "before.png")
    (samples / "step-000002.png").write_bytes(b"\x89PNG half")
    with Scalars(tmp_path / "tb", samples=samples) as first:
        first.add({"kind": "update", "step": 2, "loss": 0.5})
        picture.save(samples / "step-000002.png")
        first.add({"kind": "update", "step": 3, "loss": 0.5})
        first.add({"kind": "update", "step": 4, "loss": 0.5})
    assert [event.step for event in written(tmp_path / "tb", purged=False).Images("samples")] == [0, 2]
    with Scalars(tmp_path / "tb", resumed_at=4, samples=samples) as second:
        second.add({"kind": "update", "step": 5, "loss": 0.5})
        picture.save(samples / "after.png")
    assert [event.step for event in written(tmp_path / "tb", purged=False).Images("samples")] == [0, 2, 5]


def test_clips_play_where_tensorboard_shows_images(tmp_path: Path) -> None:
    """The event holds a GIF with every frame of the mp4, beside the strips of the same step; it is served as one."""
    samples = tmp_path / "samples"
    samples.mkdir()
    Image.new("RGB", (64, 8), "red").save(samples / "before.png")
    clip = np.stack([np.full((16, 34, 3), level, np.uint8) for level in (0, 120, 240)])
    write_clip(samples / "step-000002.mp4", clip, 8.0)
    Image.new("RGB", (64, 8), "red").save(samples / "step-000002.png")
    with Scalars(tmp_path / "tb", samples=samples) as writer:
        writer.add({"kind": "update", "step": 2, "loss": 0.5})
        writer.add({"kind": "update", "step": 3, "loss": 0.5})
    found = written(tmp_path / "tb", purged=False)
    assert [event.step for event in found.Images("samples")] == [0, 2]
    (event,) = found.Images("clips")
    assert (event.step, event.width, event.height) == (2, 34, 16)
    assert img_mime_type_detector.from_bytes(event.encoded_image_string) == "image/gif"
    with Image.open(io.BytesIO(event.encoded_image_string)) as gif:
        frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(gif)]
        assert gif.info["duration"] == 120  # of 125 ms: a GIF counts hundredths of a second
        assert gif.info["loop"] == 0
    assert np.abs(np.stack(frames) - clip).max() <= 4


def test_wandb_says_what_to_install_when_it_is_missing(tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed; the test below runs instead")
    with pytest.raises(RunFailed, match=r"wandb: .*ddrl\[wandb\]"):
        Wandb("project", "run", {}, tmp_path)


def test_wandb_keeps_every_record_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with Wandb("project", "run", {"seed": 0}, tmp_path) as run:
        run.add({"kind": "update", "step": 1, "reward_mean": 0.5})
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
