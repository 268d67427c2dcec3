"""Finished pixels: how many at a time, and numbers about them (diversity of samples, scene statistics). NumPy only.

A clip of 93 x 704 x 1280 is 251 MB, and 2 GB in fp64: numbers are made block by block.
"""

from __future__ import annotations

import numpy as np

TURN_BYTES = 256 << 20
"""Most bytes of pixels that are decoded, sent or looked at together, where they are of more than one sample: a clip of 93 x 704 x 1280 goes alone."""
BLOCK = 1 << 22
"""Values that are looked at together in fp64, but for a whole picture."""


def turn_size(count: int, bytes_each: int) -> int:
    """Samples of one turn, of `count` whose pixels have so many bytes each."""
    return max(1, min(count, TURN_BYTES // max(1, bytes_each)))


def pairwise_rms(images: np.ndarray) -> np.ndarray:
    """Diversity: mean RMS pixel distance over all pairs of samples of one prompt.

    Args:
        images: uint8 `[prompts, samples, H, W, 3]`, samples ≥ 2; clips have a frame axis before H.
    Returns:
        `[prompts]` in units of the full pixel range (0 = identical, 1 = black against white).
    """
    flat = images.reshape(*images.shape[:2], -1)
    pairs = list(zip(*np.triu_indices(images.shape[1], 1), strict=True))
    return np.array([np.mean([np.sqrt(_square(samples[i], samples[j])) for i, j in pairs]) for samples in flat])


def _square(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared distance of uint8 values, in units of the full range; summed in whole numbers."""
    blocks = (slice(start, start + BLOCK) for start in range(0, len(a), BLOCK))
    total = sum(int(((a[s].astype(np.int32) - b[s]) ** 2).sum(dtype=np.int64)) for s in blocks)
    return total / len(a) / 255**2


def scene_statistics(images: np.ndarray) -> dict[str, float]:
    """Cheap hacking detectors over uint8 `[n, H, W, 3]`, or the frames of clips `[n, F, H, W, 3]`:
    brightness, contrast, colourfulness, edge density, all in 0…1 units.

    Colourfulness is the opponent-colour measure of Hasler & Süsstrunk (2003) over pixels in [0, 1].
    """
    return {name: float(values.mean()) for name, values in scene_numbers(images).items()}


def scene_numbers(images: np.ndarray) -> dict[str, np.ndarray]:
    """`scene_statistics` of each of n samples `[n]`; of a clip the mean over its frames."""
    pictures = images.reshape(-1, *images.shape[-3:])
    at_once = max(1, BLOCK // pictures[0].size)
    blocks = [_statistics(pictures[start : start + at_once]) for start in range(0, len(pictures), at_once)]
    return {name: np.concatenate([block[name] for block in blocks]).reshape(len(images), -1).mean(1) for name in blocks[0]}


def _statistics(pictures: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers of each picture `[n, H, W, 3]`."""
    x = pictures.astype(np.float64) / 255
    luma = x @ np.array([0.299, 0.587, 0.114])
    rg = x[..., 0] - x[..., 1]
    yb = (x[..., 0] + x[..., 1]) / 2 - x[..., 2]
    axes = (1, 2)
    colour = np.hypot(rg.std(axes), yb.std(axes)) + 0.3 * np.hypot(rg.mean(axes), yb.mean(axes))
    edges = np.abs(np.diff(luma, axis=1)).mean(axes) + np.abs(np.diff(luma, axis=2)).mean(axes)
    return {
        "brightness": luma.mean(axes),
        "contrast": luma.std(axes),
        "colourfulness": colour,
        "edge_density": edges,
    }
