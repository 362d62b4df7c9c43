"""Normalisations and softmax; batch normalisation is plain arithmetic, so that its statistics have gradients too."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed.nn.functional as distributed_functions
import torch.nn.functional as F
from torch import distributed

from mc_opt.ir.errors import IRError


def _channels(vector: torch.Tensor, rank: int) -> torch.Tensor:
    return vector.reshape([1, -1] + [1] * (rank - 2))


def _computed(x: torch.Tensor, stash_type: int) -> torch.Tensor:
    """`x` in the type in which statistics are taken: 1 is float32, whatever x is."""
    return x.float() if stash_type == 1 and x.dtype in (torch.float16, torch.bfloat16) else x


def batch_normalization(
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> torch.Tensor:
    """Y = (x − μ) · γ / √(σ² + ε) + β over channels."""
    if training_mode:
        raise IRError("BatchNormalization: training_mode=1, expected 0; export the model in evaluation mode")
    rank = x.dim()
    factor = scale * torch.rsqrt(variance + epsilon)
    return (x - _channels(mean, rank)) * _channels(factor, rank) + _channels(bias, rank)


class BatchNorm(torch.nn.Module):  # type: ignore[misc]  # torch is not followed, so its classes are Any
    """BatchNormalization for training: the batch's own statistics in training mode, the running ones else.

    running ← momentum · running + (1 − momentum) · batch, with the unbiased variance, as torch does it. With several
    processes the statistics are those of all of them, so that N processes train as one with the whole batch does.

    Attributes:
        frozen: whether training mode too takes the running statistics and leaves them.
        taken: batches since `restart`; None keeps the exponential mean of normal training.
    """

    def __init__(self, *, epsilon: float = 1e-5, momentum: float = 0.9, training_mode: int = 0) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.momentum = momentum
        self.frozen = False
        self.taken: int | None = None

    def restart(self) -> None:
        """Let the running statistics become the plain mean over the batches from here on."""
        self.taken = 0

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor
    ) -> torch.Tensor:
        """x: [n, c, ..], the others [c]; `mean` and `variance` are moved in training mode."""
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        single = x.numel() == x.shape[1] and not several  # one value a channel has no variance
        if not self.training or self.frozen or single:
            return F.batch_norm(x, mean, variance, scale, bias, training=False, eps=self.epsilon)
        share = 1 - self.momentum
        if self.taken is not None:
            self.taken += 1
            share = 1 / self.taken
        if not several:
            return F.batch_norm(x, mean, variance, scale, bias, training=True, momentum=share, eps=self.epsilon)
        wide = _computed(x, 1)  # under autocast x is of half precision, whose sums lose the variance
        axes = [axis for axis in range(x.dim()) if axis != 1]
        count = wide.new_tensor([x.numel() / x.shape[1]])
        sums = torch.cat([wide.sum(axes), (wide * wide).sum(axes), count])
        sums = distributed_functions.all_reduce(sums)
        size = x.shape[1]
        of_batch = sums[:size] / sums[-1]
        spread = (sums[size:-1] / sums[-1] - of_batch * of_batch).clamp(min=0)
        with torch.no_grad():
            mean.lerp_(of_batch, share)
            variance.lerp_(spread * (sums[-1] / (sums[-1] - 1)), share)
        return batch_normalization(wide, scale, bias, of_batch, spread, epsilon=self.epsilon).to(x.dtype)


def _standardised(
    x: torch.Tensor, axes: tuple[int, ...], epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    inverse = torch.rsqrt((centred * centred).mean(axes, keepdim=True) + epsilon)
    return centred * inverse, mean, inverse


def _layer_normalization(
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> tuple[torch.Tensor, ...]:
    axes = tuple(range(axis % x.dim(), x.dim()))
    y, mean, inverse = _standardised(_computed(x, stash_type), axes, epsilon)
    y = y.to(x.dtype) * scale
    return (y if bias is None else y + bias), mean, inverse


def _rms_normalization(
    x: torch.Tensor, scale: torch.Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> torch.Tensor:
    axes = tuple(range(axis % x.dim(), x.dim()))
    computed = _computed(x, stash_type)
    inverse = torch.rsqrt((computed * computed).mean(axes, keepdim=True) + epsilon)
    return (computed * inverse).to(x.dtype) * scale


def _instance_normalization(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, *, epsilon: float = 1e-5
) -> torch.Tensor:
    y, _, _ = _standardised(x, tuple(range(2, x.dim())), epsilon)
    return y * _channels(scale, x.dim()) + _channels(bias, x.dim())


def _group_normalization(
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> torch.Tensor:
    groups = _computed(x, stash_type).reshape(x.shape[0], num_groups, -1)
    y = _standardised(groups, (2,), epsilon)[0].reshape(x.shape).to(x.dtype)
    return y * _channels(scale, x.dim()) + _channels(bias, x.dim())


def _lp_normalization(x: torch.Tensor, *, axis: int = -1, p: int = 2) -> torch.Tensor:
    norm = torch.linalg.vector_norm(x, ord=p, dim=axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


def _lrn(x: torch.Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> torch.Tensor:
    before = (size - 1) // 2
    squares = F.pad((x * x).movedim(1, -1), (before, size - 1 - before)).unfold(-1, size, 1).sum(-1)
    return x / (bias + alpha / size * squares.movedim(-1, 1)) ** beta


def _softmax(x: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    return torch.softmax(x, axis)


def _log_softmax(x: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    return torch.log_softmax(x, axis)


def _hardmax(x: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


def _dropout(
    x: torch.Tensor, ratio: torch.Tensor | None = None, training: torch.Tensor | None = None, *, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    if training is not None and bool(training):
        raise IRError("Dropout: training_mode is true, expected false; export the model in evaluation mode")
    return x, torch.ones_like(x, dtype=torch.bool)


HANDLERS: dict[str, Callable[..., torch.Tensor]] = {
    "BatchNormalization": batch_normalization,
    "GroupNormalization": _group_normalization,
    "Hardmax": _hardmax,
    "InstanceNormalization": _instance_normalization,
    "LRN": _lrn,
    "LogSoftmax": _log_softmax,
    "LpNormalization": _lp_normalization,
    "RMSNormalization": _rms_normalization,
    "Softmax": _softmax,
}

MULTIPLE: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "Dropout": _dropout,
    "LayerNormalization": _layer_normalization,
}
