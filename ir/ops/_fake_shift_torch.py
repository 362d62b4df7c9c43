"""The training forms of shift weights in torch: one byte a weight is kept for the gradients of all its latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mc_opt.ir.ops._packing import Geometry


def shift_form(
    latents: Sequence[Tensor], factor: Tensor, levels: np.ndarray, slopes: np.ndarray, geometry: Geometry
) -> Tensor:
    """levels[code]·factor, where bit 0 of a code is latents[0] ≥ 0 and bit b is latents[b] > 0.

    Args:
        latents: each `geometry.shape`.
        factor: [R|1, G|1].
        levels: [2^len(latents)], the value of each code.
        slopes: [len(latents), 2^len(latents)], what stands for ∂level/∂latent at each code.
        geometry: how the factor lies over the weight.
    """
    like = latents[0]
    tables = [torch.as_tensor(table, dtype=like.dtype, device=like.device) for table in (levels, *slopes)]
    level: Tensor = _Level.apply(tables[0], tables[1:], *latents)
    return level * _spread(factor, geometry)


def _spread(factor: Tensor, geometry: Geometry) -> Tensor:
    """factor: [R|1, G|1] -> a shape that broadcasts to the weight's."""
    rows = [geometry.shape[a] if factor.shape[0] > 1 else 1 for a in geometry.axes]
    if factor.shape[1] == 1:
        others = [1] * (len(geometry.shape) - len(rows))
    else:
        factor = factor.repeat_interleave(geometry.size, dim=1)[:, : geometry.columns]
        others = [geometry.shape[a] for a in geometry.perm[len(rows) :]]
    return factor.reshape(rows + others).permute(geometry.inverse)


class _Level(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed, so its classes are Any
    """The level of each weight, with the slopes that are given for its gradients."""

    @staticmethod
    def forward(ctx: Any, levels: Tensor, slopes: list[Tensor], *latents: Tensor) -> Tensor:
        code = (latents[0] >= 0).to(torch.uint8)
        for bit, latent in enumerate(latents[1:], 1):
            code |= (latent > 0).to(torch.uint8) << bit
        ctx.save_for_backward(code)
        ctx.slopes = slopes
        return _entries(levels, code.to(torch.int32))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (code,) = ctx.saved_tensors
        index = code.to(torch.int32)
        needed = ctx.needs_input_grad[2:]
        return (
            None,
            None,
            *(_entries(slope, index).mul_(g) if need else None for slope, need in zip(ctx.slopes, needed, strict=True)),
        )


def _entries(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.reshape(-1)).reshape(index.shape)
