"""What draws latents to levels: the regularisers of BNN+, Foothill and Smart Quantization, on tensors of any kind.

Each is the mean over a layer's u, of size 1 (GAIN times the latents), so that its weight fits layers of any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Kind = Literal["r1", "r2", "foothill"]

BETA_LOWEST, BETA_HIGHEST = math.pi / 4, math.pi / 2 - 1e-3
_FOOTHILL = 5.0  # β


def wells(latent: torch.Tensor, scale: torch.Tensor, axes: Sequence[int], kind: Kind) -> torch.Tensor:
    """The mean of R(α − |u|), α the scale of u's row: two wells, at ±α.

    R1 and R2 are |x| and x² (Darabi et al., arXiv 1812.11800); Foothill's x·tanh(βx/2) passes from the second, near
    0, to the first (Belbahri et al., arXiv 1901.06414). For R2 the best α is the mean of |u|.

    Args:
        latent: any shape.
        scale: [R, 1], of the rows along `axes`.
        axes: the row axes.
        kind: R.
    """
    others = [a for a in range(latent.ndim) if a not in axes]
    away = scale - latent.permute(*axes, *others).reshape(scale.shape[0], -1).abs()
    match kind:
        case "r1":
            return away.abs().mean()
        case "r2":
            return away.square().mean()
        case "foothill":
            return (away * (away * (_FOOTHILL / 2)).tanh()).mean()


def three_wells(latent: torch.Tensor, beta: torch.Tensor, gamma: float) -> torch.Tensor:
    """The mean of min((|u| − 1)², tan β·u²), and γ·cot β: wells at −1, 0 and 1, of which β → π/2 closes the middle one.

    Razani et al., "Adaptive Binary-Ternary Quantization", arXiv 1909.12205, with p = 2. u passes from the middle well
    to an outer one at |u| = 1/(1 + √tan β). β is held in [π/4, π/2) as FakeThreshold does, by a wall that is ours.
    """
    inside = beta.clamp(BETA_LOWEST, BETA_HIGHEST).detach() + (beta - beta.detach())
    slope = inside.tan()
    size = latent.abs()
    well = (size - 1).square().minimum(slope * size.square()).mean()
    return well + gamma / slope


def wall(beta: torch.Tensor) -> torch.Tensor:
    """How far β is outside of [π/4, π/2): steep enough to turn any other gradient around."""
    return (beta - beta.clamp(BETA_LOWEST, BETA_HIGHEST)).abs()
