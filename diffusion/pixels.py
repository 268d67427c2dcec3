"""Numbers about finished pixels: diversity of samples, scene statistics. NumPy only."""

from __future__ import annotations

import numpy as np


def pairwise_rms(images: np.ndarray) -> np.ndarray:
    """Diversity: mean RMS pixel distance over all pairs of samples of one prompt.

    Args:
        images: uint8 `[prompts, samples, H, W, 3]`, samples ≥ 2; clips have a frame axis before H.
    Returns:
        `[prompts]` in units of the full pixel range (0 = identical, 1 = black against white).
    """
    flat = images.reshape(*images.shape[:2], -1).astype(np.float64) / 255
    square = (flat[:, :, None] - flat[:, None]) ** 2
    distance = np.sqrt(square.mean(-1))
    upper = np.triu_indices(images.shape[1], 1)
    mean: np.ndarray = distance[:, upper[0], upper[1]].mean(1)
    return mean


def scene_statistics(images: np.ndarray) -> dict[str, float]:
    """Cheap hacking detectors over uint8 `[n, H, W, 3]`, or the frames of clips `[n, F, H, W, 3]`:
    brightness, contrast, colourfulness, edge density, all in 0…1 units.

    Colourfulness is the opponent-colour measure of Hasler & Süsstrunk (2003) over pixels in [0, 1].
    """
    x = images.reshape(-1, *images.shape[-3:]).astype(np.float64) / 255
    luma = x @ np.array([0.299, 0.587, 0.114])
    rg = x[..., 0] - x[..., 1]
    yb = (x[..., 0] + x[..., 1]) / 2 - x[..., 2]
    axes = (1, 2)
    colour = np.hypot(rg.std(axes), yb.std(axes)) + 0.3 * np.hypot(rg.mean(axes), yb.mean(axes))
    edges = np.abs(np.diff(luma, axis=1)).mean(axes) + np.abs(np.diff(luma, axis=2)).mean(axes)
    return {
        "brightness": float(luma.mean()),
        "contrast": float(luma.std(axes).mean()),
        "colourfulness": float(colour.mean()),
        "edge_density": float(edges.mean()),
    }
