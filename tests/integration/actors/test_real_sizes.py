"""A group of 93-frame clips at 720p, in its real sizes, through ledger and store, with memory that one member bounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from replay.buffer import BufferSettings, ReplayBuffer
from replay.connect import connect
from replay.embedded import EmbeddedRedis
from replay.payloads import make_payloads
from tests.integration.actors.real_sizes import LATENT_BYTES, MEMBERS, RUN, states

ROOT = Path(__file__).parents[3]
OTHERS = 130e6
"""Bytes that blocks in flight and first calls take, whatever the size of a member."""


def peak(what: str, url: str, chained: bool) -> int:
    line = [sys.executable, "-m", "tests.integration.actors.real_sizes", what, url, "chained" if chained else "apart"]
    # glibc gives freed blocks back at once: what is measured is what is held, not what the allocator keeps of the states that are compared
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    done = subprocess.run(line, cwd=ROOT, text=True, capture_output=True, timeout=540, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found: int = json.loads(done.stdout)["peak"]
    return found


@pytest.mark.long
@pytest.mark.parametrize(("kind", "chained"), [("folder", False), ("redis", True)])
def test_a_group_of_93_frame_clips_passes_with_flat_memory(kind: str, chained: bool, tmp_path: Path) -> None:
    """2.6 GB through a folder, steps apart; 1.8 GB through Redis in parts of 64 MiB, steps that share states."""
    member = states(chained) * LATENT_BYTES
    settings = BufferSettings(groups_per_step=1, max_staleness=0, max_bytes=3 * MEMBERS * member, part_bytes=(64 if kind == "redis" else 256) << 20)
    with EmbeddedRedis.start(tmp_path / "redis") as server:
        client = connect(server.url)
        store = make_payloads("redis" if kind == "redis" else str(tmp_path / "payloads"), client, RUN, settings)
        buffer = ReplayBuffer(client, RUN, settings, store)
        buffer.initialise()

        written = peak("write", server.url, chained)
        held = buffer.counts()["bytes"]
        assert MEMBERS * member < held < MEMBERS * member + 10_000
        was_read = peak("read", server.url, chained)
        print(f"{kind}: a member {member / 1e6:.0f} MB, a group {held / 1e6:.0f} MB; writer {written / 1e6:.0f} MB, reader {was_read / 1e6:.0f} MB")
        # the member as it was made (chained states stand in it twice), and its segment
        assert written < (30 / states(chained) + 1) * member + OTHERS
        # its bytes, and the same in fp32
        assert was_read < 3 * member + OTHERS

        epoch = int(buffer.rollback(0))
        assert [group.group for group in buffer.claim(1, epoch, 10).groups] == [0]
        buffer.publish(1, epoch)
        buffer.settle(1, epoch)
        assert buffer.counts()["bytes"] == 0
        stored = [*client.scan_iter("*payload:*"), *(tmp_path / "payloads").rglob("*.0*"), *(tmp_path / "payloads").rglob("g*")]
        assert [one for one in stored if not isinstance(one, Path) or one.is_file()] == []
        assert buffer.audit() == []
