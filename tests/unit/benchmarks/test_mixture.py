"""On the line, with a reward whose maximum lies off the data: who leaves the data, and who stays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import mixture
from benchmarks.mixture import EDGE, OBJECTIVES, Velocity, base, density, draw, judge, reward, tilt, train
from diffusion.seeds import generator


@pytest.fixture(scope="module")
def start() -> Velocity:
    return base(updates=1200)


def test_the_start_is_the_data(start: Velocity) -> None:
    found, data = judge(start, start), draw(20_000, generator(0, "x")).flatten().numpy()
    assert float(reward(data).mean()) == pytest.approx(0.25, abs=0.02)
    assert found.reward == pytest.approx(0.25, abs=0.05)
    assert found.beyond < 1e-3
    assert found.loss == 0
    assert (data > EDGE).mean() < 2e-4
    within = [0.1, 0.2, 0.3, 0.7, 0.8, 0.9]  # of the modes; between them lies next to nothing
    np.testing.assert_allclose(np.quantile(found.samples, within), np.quantile(data, within), atol=0.25)


def test_the_tilt_has_the_mean_reward_that_was_asked_for_and_stays_within_the_data() -> None:
    for mean in (0.3, 0.45):
        x, p, beta = tilt(mean)
        assert np.trapezoid(p, x) == pytest.approx(1, abs=1e-6)
        assert np.trapezoid(p * reward(x), x) == pytest.approx(mean, abs=1e-4)
        assert np.trapezoid(np.where(x > EDGE, p, 0), x) < 1e-3
        np.testing.assert_allclose(p / p.max(), (q := density(x) * np.exp(reward(x) / beta)) / q.max(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "leaves"), [("no regulariser", True), ("reverse KL 0.04", True), ("DDRL 0.2, exponential", False), ("DDRL 1", False)], ids=lambda value: str(value)
)
def test_without_an_anchor_in_the_data_a_policy_leaves_it(name: str, leaves: bool, start: Velocity) -> None:
    found = train(start, OBJECTIVES[name], 0, 160)
    if leaves:
        assert found.beyond > 0.5
        assert found.loss > 0.5
    else:
        assert found.beyond < 0.005
        assert found.loss < 0.3
        assert found.reward > 0.25


def test_the_command_prints_a_line_for_every_objective_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(mixture, "base", lambda: base(updates=5))
    monkeypatch.setattr(mixture, "JUDGED", 200)
    monkeypatch.setattr(mixture, "HELD_OUT", 200)
    mixture.main(["--json", "--updates", "2", "--seeds", "3", "--figure", str(tmp_path / "media" / "mixture.svg")])
    found = json.loads(capsys.readouterr().out)
    assert found["updates"] == 2
    assert list(found["runs"]) == ["before", *OBJECTIVES]
    assert all(set(run) == {"reward", "beyond", "loss"} for runs in found["runs"].values() for run in runs)
    text = (tmp_path / "media" / "mixture.svg").read_text()
    assert "<svg" in text
    assert "<dc:date>" not in text
    mixture.main(["--updates", "1", "--seeds", "0", "1"])
    assert capsys.readouterr().out.count("…") == 3 * len(OBJECTIVES)
