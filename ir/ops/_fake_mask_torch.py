"""FakeMask in torch: forward by comparison, backward by the formulas of its class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fake_mask(
    x: Tensor, theta: Tensor, threshold: Tensor, sharpness: Tensor, index: Tensor | None, *, behind: int, least: bool
) -> Tensor:
    """x: any shape, theta: [n] or x's shape, threshold, sharpness: [], index: [C] or None -> x's shape."""
    live = theta > threshold
    if least:
        live = live | (theta == theta.max())
    mask: Tensor = _Hard.apply(theta, live, threshold, sharpness)
    if index is not None:
        # -1 reads the last one, which stays.
        mask = torch.cat([mask, mask.new_ones(1)])[index]
    if mask.dim() == 1:
        mask = mask.reshape(-1, *[1] * behind)
    y: Tensor = _Masked.apply(x, mask)
    return y


class _Hard(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed, so its classes are Any
    """theta, live: [n] -> live as numbers; backward that of σ(β·(θ − τ)) where it is 1."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, live: Tensor, threshold: Tensor, sharpness: Tensor) -> Tensor:
        ctx.save_for_backward(theta, live, threshold, sharpness)
        return live.to(theta.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        theta, live, threshold, sharpness = ctx.saved_tensors
        soft = torch.sigmoid(sharpness * (theta - threshold))
        return g * sharpness * soft * (1 - soft) * live, None, None, None


class _Masked(torch.autograd.Function):  # type: ignore[misc]  # as above
    """x, mask (broadcast to it) -> x where the mask is 1, else 0: not even NaN passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, mask)
        return torch.where(mask > 0, x, torch.zeros((), dtype=x.dtype, device=x.device))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None]:
        x, mask = ctx.saved_tensors
        d_mask = (g * x).sum_to_size(mask.shape).to(mask.dtype) if ctx.needs_input_grad[1] else None
        return torch.where(mask > 0, g, torch.zeros_like(g)), d_mask
