"""Reductions over axes; the axes may come as an input or as an attribute."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mc_opt.ir.run.standard.dtypes import ints, widened

Reduction = Callable[[torch.Tensor, tuple[int, ...], bool], torch.Tensor]


def reduction(function: Reduction) -> Callable[..., torch.Tensor]:
    """The handler of an op that reduces by `function(x, axes, keepdim)`."""

    @widened
    def reduce(
        x: torch.Tensor,
        axes: torch.Tensor | list[int] | None = None,
        *,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> torch.Tensor:
        chosen = ints(axes)
        if not chosen and noop_with_empty_axes:
            return x
        every = tuple(range(x.dim()))
        return function(x, tuple(chosen) if chosen else every, bool(keepdims)) if every else function(x, (), False)

    reduce.__name__ = function.__name__
    return reduce


def _sum(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype)


def _mean(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep)
    total = x.sum(axes, keepdim=keep, dtype=x.dtype)
    return torch.div(total, x.numel() // max(total.numel(), 1), rounding_mode="trunc")


def _max(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    return x.amax(axes, keepdim=keep)


def _min(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    return x.amin(axes, keepdim=keep)


def _prod(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    # torch multiplies along one axis at a time; from the last one on, so that places stay valid.
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def _l1(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    return _sum(x.abs(), axes, keep)


def _l2(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    if not x.is_floating_point():
        return _sum(x * x, axes, keep).double().sqrt().to(x.dtype)
    return torch.linalg.vector_norm(x, dim=axes, keepdim=keep) if axes else x.abs()


def _sum_square(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    return _sum(x * x, axes, keep)


def _log_sum(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    return _sum(x, axes, keep).log()


def _log_sum_exp(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    return torch.logsumexp(x, axes, keepdim=keep)


HANDLERS: dict[str, Callable[..., torch.Tensor]] = {
    "ReduceL1": reduction(_l1),
    "ReduceL2": reduction(_l2),
    "ReduceLogSum": reduction(_log_sum),
    "ReduceLogSumExp": reduction(_log_sum_exp),
    "ReduceMax": reduction(_max),
    "ReduceMean": reduction(_mean),
    "ReduceMin": reduction(_min),
    "ReduceProd": reduction(_prod),
    "ReduceSum": reduction(_sum),
    "ReduceSumSquare": reduction(_sum_square),
}
