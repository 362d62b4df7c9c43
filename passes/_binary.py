"""The numbers of binary and ternary weights: what a row is divided by, and the codes of what is left."""

from __future__ import annotations

import numpy as np


def mean_scale(w: np.ndarray) -> np.ndarray:
    """w: [R, K] -> mean |w| of each row: f32 [R, 1], which minimises ‖w − α·sign(w)‖²."""
    scale: np.ndarray = np.abs(w).mean(axis=1, keepdims=True, dtype=np.float32)
    return scale


def ternary_scale(w: np.ndarray) -> np.ndarray:
    """w: [R, K] -> the scale α of each row that minimises ‖w − α·t‖² over t in {−1, 0, 1}: f32 [R, 1].

    Of all t with k entries that are not 0, those at the k largest |w| are best, with α = c_k/k, c_k their sum, and
    the error ‖w‖² − c_k²/k; so one sort finds the best k. For it t is 0 exactly below α/2. Ternary Weight Networks
    (Li et al., arXiv 1605.04711) take 0.7·mean |w| for that threshold; the search is ours.
    """
    sums = np.cumsum(-np.sort(-np.abs(w.astype(np.float64)), axis=1), axis=1)
    counts = np.arange(1, w.shape[1] + 1)
    best = np.argmax(sums * sums / counts, axis=1)
    kept: np.ndarray = np.take_along_axis(sums, best[:, None], axis=1) / (best[:, None] + 1)
    return kept.astype(np.float32)


def root_mean_square(w: np.ndarray) -> np.ndarray:
    """w: [R, K] -> √(mean w²) of each row: f32 [R, 1]."""
    power: np.ndarray = np.square(w, dtype=np.float32).mean(axis=1, keepdims=True)
    root: np.ndarray = np.sqrt(power)
    return root


def kept_mean(latent: np.ndarray, bound: float) -> np.ndarray:
    """latent: [R, K] -> the mean of |u| ≥ bound in each row: [R, 1], 1 where there is none."""
    size = np.abs(latent)
    kept = size >= bound
    sums = np.where(kept, size, 0).sum(axis=1, keepdims=True, dtype=np.float32)
    counts = kept.sum(axis=1, keepdims=True)
    return np.where(sums > 0, sums / np.maximum(counts, 1), 1).astype(latent.dtype)


GAIN = 4
"""Latents are so much smaller than u: in training they change a sign sooner, at the learning rate of everything else.

Of 1, 1/2, 1/4 .. the choice is ours; a power of two loses no digit.
"""


def latents(w: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """w: [R, K], alpha: f32 [R, 1] -> (latents [R, K], scale [R, 1], unit [R, 1]) in w's type.

    w ≈ GAIN·latents·scale·unit. The scale is 1, in a row of zeros 0; training moves it.
    """
    unit = np.where(alpha > 0, alpha, 1).astype(w.dtype)
    unit = np.where(unit > 0, unit, np.finfo(w.dtype).tiny)  # a mean may be too small for half precision
    scale = (alpha > 0).astype(w.dtype)
    return (w.astype(np.float32) / unit.astype(np.float32) / GAIN).astype(w.dtype), scale, unit


def level_codes(latent: np.ndarray, levels: int) -> np.ndarray:
    """latent: any shape -> the number of the nearest of `levels` levels from −1 to 1, the upper one at a tie: uint8."""
    gap = 2 / (levels - 1)
    codes = np.zeros(latent.shape, np.uint8)
    for k in range(levels - 1):
        codes += latent >= -1 + gap * (k + 0.5)
    return codes


def codes_beyond(latent: np.ndarray, bound: float) -> np.ndarray:
    """latent: any shape -> 1 where |u| < bound, else 0 or 2 by the sign: uint8."""
    return np.where(np.abs(latent) < bound, 1, np.where(latent >= 0, 2, 0)).astype(np.uint8)
