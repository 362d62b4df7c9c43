"""Per-channel scale and shift as numbers: made from a BatchNormalization, carried through shapes, put into weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Affine:
    """x ↦ s·x + t along one axis of a value.

    Attributes:
        s: [channels] float64.
        t: [channels] float64.
        axis: the channels' axis, counted from 0.
    """

    s: np.ndarray
    t: np.ndarray
    axis: int

    @property
    def shifts(self) -> bool:
        """Whether any channel is shifted."""
        return bool(self.t.any())

    @property
    def is_finite(self) -> bool:
        """Whether every number is finite."""
        return bool(np.isfinite(self.s).all() and np.isfinite(self.t).all())

    def then(self, scale: np.ndarray | float, shift: np.ndarray | float) -> Affine:
        """This affine, then x ↦ scale·x + shift."""
        return replace(self, s=self.s * scale, t=self.t * scale + shift)

    def after(self, scale: np.ndarray | float, shift: np.ndarray | float) -> Affine:
        """First x ↦ scale·x + shift, then this affine."""
        return replace(self, s=self.s * scale, t=self.s * shift + self.t)

    def unshifted(self) -> Affine:
        """The same scale without the shift."""
        return replace(self, t=np.zeros_like(self.t))


def normalization(
    scale: np.ndarray, bias: np.ndarray, mean: np.ndarray, variance: np.ndarray, epsilon: float
) -> Affine:
    """BN(x) = s·x + t with s = γ/√(σ²+ε), t = β − s·μ, in float64."""
    gamma, beta, mu, var = (np.asarray(a, np.float64) for a in (scale, bias, mean, variance))
    with np.errstate(invalid="ignore", divide="ignore"):
        s = gamma / np.sqrt(var + epsilon)
        return Affine(s, beta - s * mu, axis=1)


def reshaped(affine: Affine, before: Sequence[int | None], after: Sequence[int | None]) -> Affine | None:
    """The affine on the value that a reshape makes of it; None where one axis cannot carry it. None: unknown dims."""
    tail = before[affine.axis :]
    if any(d is None for d in tail):
        return None
    size = math.prod(d for d in tail if d is not None)
    inner = size // max(tail[0] or 0, 1)
    for axis in reversed(range(len(after))):  # the innermost of several: the others have one entry each
        rest = after[axis:]
        if any(d is None for d in rest):
            return None
        if math.prod(d for d in rest if d is not None) != size:
            continue
        below = size // max(rest[0] or 0, 1)
        if below == 0 or inner % below:
            return None
        return Affine(np.repeat(affine.s, inner // below), np.repeat(affine.t, inner // below), axis)
    return None


def per_channel(constant: np.ndarray, rank: int, affine: Affine) -> np.ndarray | None:
    """The constant of an elementwise op as one number a channel, [channels] or []; None if it varies elsewhere."""
    if constant.ndim > rank:
        return None
    shape = (1,) * (rank - constant.ndim) + constant.shape
    if any(d != 1 for axis, d in enumerate(shape) if axis != affine.axis):
        return None
    if shape[affine.axis] not in (1, affine.s.size):
        return None
    vector: np.ndarray = constant.reshape(-1).astype(np.float64)
    return vector if vector.size > 1 else vector.reshape(())


def scale_axis(w: np.ndarray, s: np.ndarray, axis: int) -> np.ndarray:
    """Scale w by s along `axis`, in float64, in w's type. s: [w.shape[axis]]."""
    return _multiply(w, s.reshape([-1 if a == axis else 1 for a in range(w.ndim)]))


def scale_grouped(w: np.ndarray, s: np.ndarray, groups: int) -> np.ndarray:
    """Scale w by s along axis 1, which holds the channels of one group; the groups are blocks of axis 0.

    w: [n, channels/groups, ...], s: [channels].
    """
    factors = np.repeat(s.reshape(groups, -1), w.shape[0] // groups, axis=0)
    return _multiply(w, factors.reshape(*factors.shape, *(1,) * (w.ndim - 2)))


def _multiply(w: np.ndarray, factors: np.ndarray) -> np.ndarray:
    out = np.empty(w.shape, w.dtype)
    if w.dtype.kind == "f":
        np.multiply(w, factors, out=out, casting="same_kind", dtype=np.float64)  # in blocks: no float64 copy of w
        return out
    out[...] = (w.astype(np.float64) * factors).astype(w.dtype)  # bfloat16
    return out


def shift_of_taps(w: np.ndarray, t: np.ndarray, groups: int) -> np.ndarray:
    """What a shift t of the inputs adds under each tap. w: [f, c/groups, *kernel], t: [c] -> [f, *kernel] float64."""
    filters = w.shape[0] // groups
    taps = np.empty((w.shape[0], *w.shape[2:]))
    for g, part in enumerate(t.reshape(groups, -1)):
        rows = slice(g * filters, (g + 1) * filters)
        taps[rows] = np.tensordot(part, w[rows].astype(np.float64), axes=(0, 1))
    return taps


def border_map(
    taps: np.ndarray,
    size: Sequence[int],
    *,
    pads: Sequence[tuple[int, int]],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> np.ndarray:
    """What the taps that fall inside the image add at each output place, zero padding around it.

    taps: [f, *kernel] -> [1, f, *out] float64.
    """
    total = taps
    for axis, length in enumerate(size):
        kernel, (before, after) = taps.shape[1 + axis], pads[axis]
        outputs = (length + before + after - dilations[axis] * (kernel - 1) - 1) // strides[axis] + 1
        place = np.arange(outputs)[:, None] * strides[axis] + np.arange(kernel) * dilations[axis] - before
        inside = ((place >= 0) & (place < length)).astype(np.float64)  # [out, kernel]
        total = np.moveaxis(np.tensordot(total, inside, axes=(1 + axis, 1)), -1, 1 + axis)
    return total[None]
