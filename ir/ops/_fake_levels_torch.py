"""The training forms with levels in torch: forward in full precision of its type, backward by the rule of each form."""

from __future__ import annotations

from typing import Any

from torch import Tensor, where

from mc_opt.ir.ops._levels import midpoints
from mc_opt.ir.ops._packing import Geometry
from mc_opt.ir.ops.fake_prox import TINY
from mc_opt.ir.ops.fake_threshold import BINARY, FEW, HIGHEST, LOWEST


def scaled(y: Tensor, scale: Tensor | None, unit: Tensor | None, geometry: Geometry | None) -> Tensor:
    """y·(scale·unit); scale, unit: [R, 1], the rows along `geometry.axes` of y."""
    if scale is None or geometry is None:
        return y
    factor = scale if unit is None else scale * unit
    rows = [geometry.shape[a] for a in geometry.axes]
    spread = factor.reshape(rows + [1] * (len(geometry.shape) - len(rows)))
    return y * spread.permute(geometry.inverse)


def prox(x: Tensor, sharpness: Tensor, *, levels: int, transform: str) -> Tensor:
    """P_κ(T(x)) with the gradient T′(x)."""
    t = _transformed(x, transform)
    return _instead(_drawn(t.detach(), sharpness.to(x.dtype), levels), t)


def swish_sign(x: Tensor, sharpness: Tensor, hard: Tensor, *, levels: int) -> Tensor:
    """F(x) with the gradient of F_β."""
    slope = sharpness.to(x.dtype) * ((levels - 1) / 2)
    soft: Any = 0.0
    steps: Any = 0.0
    for m in midpoints(levels):
        away = x - m
        z = away * slope
        t = z.tanh()
        soft = soft + (t + z * (1 - t * t))
        steps = steps + (away.detach() >= 0).to(x.dtype)
    soft = soft / (levels - 1)
    nearest = steps * (2 / (levels - 1)) - 1
    return _instead(where(hard > 0.5, nearest, soft.detach()), soft)


def _instead(forward: Tensor, backward: Tensor) -> Tensor:
    """`forward`, to the bit, with the gradient of `backward`."""
    return forward.detach() + (backward - backward.detach())


def _transformed(x: Tensor, transform: str) -> Tensor:
    match transform:
        case "clip":
            return x.clamp(-1, 1)
        case "bireal":
            z = (x * 0.5).clamp(-1, 1)
            return z + z - z * z.abs()
        case _:
            return x


def _drawn(t: Tensor, sharpness: Tensor, levels: int) -> Tensor:
    free, gap = 1 - sharpness, 2 / (levels - 1)
    width = free * gap
    steps: Any = 0.0
    for m in midpoints(levels):
        ramp = ((t - m) / width.clamp(min=TINY) + 0.5).clamp(0, 1)
        steps = steps + where(width > TINY, ramp, (t >= m).to(t.dtype))
    return steps * gap - 1 + (t - t.clamp(-1, 1)) * free


def threshold(x: Tensor, beta: Tensor) -> Tensor:
    """0 where |x| < Δ(β), else the sign of x, with the gradients of FakeThreshold."""
    held = _instead(beta.clamp(LOWEST, HIGHEST), beta)
    # In double precision, as where it is stored: so that both agree on which weights are below it.
    learned = (1 / (1 + held.double().tan().sqrt())).to(x.dtype)
    delta = learned.detach()
    size = x.detach().abs()
    few = (size < delta).sum() * FEW < x.numel()
    bound = delta * ~(few | (beta.detach() > BINARY))
    signs = where(x.detach() >= 0, 1.0, -1.0).to(x.dtype)
    hard = where(size < bound, 0.0, signs)
    ramp = where(size < 2 * delta, signs / (2 * delta), 0.0)
    return hard + (x - x.detach()) - ramp * (learned - delta)
