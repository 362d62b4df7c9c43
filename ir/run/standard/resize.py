"""Resize: every axis is a weighted sum of a few picked elements, y = Σ_k w_k · x[i_k]."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from mc_opt.ir.errors import IRError
from mc_opt.ir.run.standard.dtypes import ints


@dataclasses.dataclass(frozen=True)
class _Axis:
    """One axis: its length, the length asked for, the scale and the region (start, end) of tf_crop_and_resize."""

    length: int
    target: int
    scale: float
    region: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class _Options:
    mode: str
    coordinates: str
    rounding: str
    cubic_coeff: float
    exclude_outside: bool
    extrapolation: float


def _resize(
    x: torch.Tensor,
    roi: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    sizes: torch.Tensor | None = None,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    antialias: int = 0,
    axes: list[int] | None = None,
    keep_aspect_ratio_policy: str = "stretch",
) -> torch.Tensor:
    if antialias:
        raise IRError("Resize: antialias=1, expected 0; export the model without antialiasing")
    options = _Options(
        mode, coordinate_transformation_mode, nearest_mode, cubic_coeff_a, bool(exclude_outside), extrapolation_value
    )
    chosen = [axis % x.dim() for axis in axes] if axes is not None else list(range(x.dim()))
    lengths = [x.shape[axis] for axis in chosen]
    regions = _regions(roi, len(chosen))
    if scales is not None and scales.numel():
        factors = [float(s) for s in scales.tolist()]
        targets = [int(np.floor(np.float32(n) * np.float32(s))) for n, s in zip(lengths, factors, strict=True)]
        if coordinate_transformation_mode == "tf_crop_and_resize":
            spans = [end - start for start, end in regions]
            targets = [int(n * span * s) for n, span, s in zip(lengths, spans, factors, strict=True)]
    else:
        targets, factors = _from_sizes(lengths, ints(sizes) or [], keep_aspect_ratio_policy)
    for axis, length, target, factor, region in zip(chosen, lengths, targets, factors, regions, strict=True):
        x = _resize_axis(x, axis, _Axis(length, target, factor, region), options)
    return x


def _regions(roi: torch.Tensor | None, count: int) -> list[tuple[float, float]]:
    if roi is None or not roi.numel():
        return [(0.0, 1.0)] * count
    values = [float(v) for v in roi.tolist()]
    return list(zip(values[:count], values[count:], strict=True))


def _from_sizes(lengths: list[int], sizes: list[int], policy: str) -> tuple[list[int], list[float]]:
    factors = [target / length for target, length in zip(sizes, lengths, strict=True)]
    if policy == "stretch":
        return sizes, factors
    factor = min(factors) if policy == "not_larger" else max(factors)
    return [int(np.floor(factor * length + 0.5)) for length in lengths], [factor] * len(lengths)


def _resize_axis(x: torch.Tensor, dim: int, axis: _Axis, options: _Options) -> torch.Tensor:
    if axis.length == axis.target and axis.scale == 1 and options.coordinates != "tf_crop_and_resize":
        return x
    places = _coordinates(axis, options.coordinates)
    outside = (places < 0) | (places > axis.length - 1)
    picks, weights = _taps(places, axis, options)
    result = None
    for k in range(picks.shape[0]):
        part = x.index_select(dim, torch.from_numpy(picks[k]).to(x.device))
        if options.mode != "nearest":
            part = part * _along(torch.from_numpy(weights[k]).to(x), dim, x.dim())
        result = part if result is None else result + part
    assert result is not None
    if options.coordinates == "tf_crop_and_resize" and outside.any():
        mask = _along(torch.from_numpy(outside).to(x.device), dim, x.dim())
        result = torch.where(mask, torch.full_like(result, options.extrapolation), result)
    return result


def _along(vector: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    return vector.reshape([-1 if i == dim else 1 for i in range(rank)])


def _coordinates(axis: _Axis, kind: str) -> np.ndarray:
    """Where each resized element stands in the original axis; float32, as ONNX Runtime computes it."""
    places = np.arange(axis.target, dtype=np.float32)
    scale, one = np.float32(axis.scale), np.float32(1)
    half = np.float32(0.5)
    start, end = (np.float32(v) for v in axis.region)
    last = np.float32(axis.length - 1)
    single = axis.target == 1
    match kind:
        case "half_pixel":
            return (places + half) / scale - half
        case "half_pixel_symmetric":
            adjustment = np.float32(axis.target) / (scale * np.float32(axis.length))
            centre = np.float32(axis.length) / 2
            return centre * (one - adjustment) + (places + half) / scale - half
        case "pytorch_half_pixel":
            return np.zeros_like(places) if single else (places + half) / scale - half
        case "align_corners":
            return np.zeros_like(places) if single else places * last / np.float32(axis.target - 1)
        case "asymmetric":
            return places / scale
        case "tf_crop_and_resize":
            if single:
                return np.full_like(places, half * (start + end) * last)
            return start * last + places * (end - start) * last / np.float32(axis.target - 1)
        case _:
            raise IRError(f"Resize: coordinate_transformation_mode {kind!r} is unknown")


def _taps(places: np.ndarray, axis: _Axis, options: _Options) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights, both [taps, target]."""
    last = axis.length - 1
    if options.mode == "nearest":
        picks = _nearest(places, options.rounding)[None]
        return np.clip(picks, 0, last), np.ones_like(places)[None]
    if options.mode == "linear":
        inside = np.clip(places, 0, last)
        low = np.floor(inside).astype(np.int64)
        share = inside - low
        return np.stack([low, np.minimum(low + 1, last)]), np.stack([1 - share, share])
    if options.mode != "cubic":
        raise IRError(f"Resize: mode {options.mode!r}, expected nearest, linear or cubic")
    low = np.floor(places).astype(np.int64)
    picks = np.stack([low - 1, low, low + 1, low + 2])
    weights = _cubic(places - low, np.float32(options.cubic_coeff))
    if options.exclude_outside:
        weights = np.where((picks < 0) | (picks > last), np.float32(0), weights)
        weights = weights / weights.sum(0)
    return np.clip(picks, 0, last), weights


def _nearest(places: np.ndarray, rounding: str) -> np.ndarray:
    match rounding:
        case "round_prefer_floor":
            rounded = np.ceil(places - np.float32(0.5))
        case "round_prefer_ceil":
            rounded = np.floor(places + np.float32(0.5))
        case "floor":
            rounded = np.floor(places)
        case "ceil":
            rounded = np.ceil(places)
        case _:
            raise IRError(f"Resize: nearest_mode {rounding!r} is unknown")
    return rounded.astype(np.int64)


def _cubic(t: np.ndarray, a: np.float32) -> np.ndarray:
    """Keys' kernel with parameter a at distances 1+t, t, 1-t and 2-t: [4, n]."""
    far = [((a * d - 5 * a) * d + 8 * a) * d - 4 * a for d in (1 + t, 2 - t)]
    near = [((a + 2) * d - (a + 3)) * d * d + 1 for d in (t, 1 - t)]
    return np.stack([far[0], near[0], near[1], far[1]]).astype(np.float32)


HANDLERS: dict[str, Callable[..., torch.Tensor]] = {
    "Resize": _resize,
}
