"""What the start-up deadline of a fleet blames: what is really short."""

from __future__ import annotations

import re

import pytest

from services.fleet.start import why_late


@pytest.mark.parametrize(
    ("free", "total", "words", "not_words"),
    [
        (3.0, 4.0, r"The 1\.1 Ray CPUs that it needs are free.*load average of this machine is 11\.2 on 2 cores; raise fleet\.start_timeout_s", "fewer"),
        (0.4, 4.0, r"needs 1\.1 Ray CPUs, of which 0\.4 of 4 are free now.*load average.*raise fleet\.start_timeout_s", "fewer"),
        (0.4, 1.0, r"needs 1\.1 Ray CPUs and the cluster has 1: ask for fewer replicas, or add nodes; waiting does not help", "raise"),
    ],
)
def test_the_deadline_blames_what_is_short(free: float, total: float, words: str, not_words: str) -> None:
    why = why_late({"CPU": 1.1, "GPU": 0}, {"CPU": free}, {"CPU": total}, 11.2, 2)
    assert re.search(words, why)
    assert not_words not in why
