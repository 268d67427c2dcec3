"""Numbers about samples: held-out diffusion loss on fixed points, diversity, scene statistics."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diffusion.processes import ForwardProcess


@torch.no_grad()
def diffusion_losses(
    model: Callable[..., Tensor], process: ForwardProcess, x0: Tensor, eps: Tensor, t: Tensor, prompt_embeds: Tensor, pooled: Tensor, chunk: int = 256
) -> Tensor:
    """Diffusion loss of each fixed point (x0, eps, t): `[n]`. All inputs have `n` rows; `chunk` rows a forward pass."""
    parts = []
    for i in range(0, len(x0), chunk):
        s = slice(i, i + chunk)
        x = process.noise(x0[s], eps[s], t[s])
        prediction = model(process.model_input(x, t[s]), process.model_time(t[s]), prompt_embeds[s], pooled[s])
        parts.append(process.loss(prediction, x0[s], eps[s], t[s]))
    return torch.cat(parts)


def pairwise_rms(images: np.ndarray) -> np.ndarray:
    """Diversity: mean RMS pixel distance over all pairs of samples of one prompt.

    Args:
        images: uint8 `[prompts, samples, H, W, 3]`, samples ≥ 2.
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
    """Cheap hacking detectors over uint8 `[n, H, W, 3]`: brightness, contrast, colourfulness, edge density, all in 0…1 units.

    Colourfulness is the opponent-colour measure of Hasler & Süsstrunk (2003) over pixels in [0, 1].
    """
    x = images.astype(np.float64) / 255
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
