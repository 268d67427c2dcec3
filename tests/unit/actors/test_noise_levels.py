"""Which points of the held-out loss make a band."""

from __future__ import annotations

from actors.noise_levels import by_band


def test_a_band_of_few_points_is_none() -> None:
    assert by_band([0.1, 0.2, 0.3, 0.6, 0.9], [1.0] * 5) == {}
    assert by_band([], []) == {}


def test_points_of_each_quarter_keep_their_order() -> None:
    """A level just below 1 may be 1 in single precision."""
    assert by_band([0.0, 0.75, 0.2, 0.25, 0.4, 0.5, 0.7, 1.0], [1.0, 2.0, 3.0, 5.0, 8.0, 9.0, 1.0, 5.0]) == {
        "least_noise": [1.0, 3.0],
        "less_noise": [5.0, 8.0],
        "more_noise": [9.0, 1.0],
        "most_noise": [2.0, 5.0],
    }
