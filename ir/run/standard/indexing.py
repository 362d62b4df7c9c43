"""Ops that pick, place, order or count elements by index."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mc_opt.ir.errors import IRError
from mc_opt.ir.run.standard.dtypes import torch_type, widened

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _from_start(indices: torch.Tensor, length: int) -> torch.Tensor:
    indices = indices.long()
    return torch.where(indices < 0, indices + length, indices)


@widened
def _gather(x: torch.Tensor, indices: torch.Tensor, *, axis: int = 0) -> torch.Tensor:
    axis %= x.dim()
    places = _from_start(indices, x.shape[axis])
    picked = x.index_select(axis, places.reshape(-1))
    return picked.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


@widened
def _gather_elements(x: torch.Tensor, indices: torch.Tensor, *, axis: int = 0) -> torch.Tensor:
    return torch.gather(x, axis, _from_start(indices, x.shape[axis]))


@widened
def _gather_nd(x: torch.Tensor, indices: torch.Tensor, *, batch_dims: int = 0) -> torch.Tensor:
    batch, depth = x.shape[:batch_dims], indices.shape[-1]
    flat = x.reshape((-1, *x.shape[batch_dims:]))
    tuples = indices.reshape(flat.shape[0], -1, depth)
    rows = torch.arange(flat.shape[0], device=x.device)[:, None].expand(tuples.shape[:2])
    columns = [_from_start(tuples[..., i], flat.shape[1 + i]) for i in range(depth)]
    picked = flat[(rows, *columns)]
    return picked.reshape((*batch, *indices.shape[batch_dims:-1], *x.shape[batch_dims + depth :]))


@widened
def _scatter_elements(
    x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, *, axis: int = 0, reduction: str = "none"
) -> torch.Tensor:
    places = _from_start(indices, x.shape[axis])
    if reduction == "none":
        return torch.scatter(x, axis, places, updates)
    return torch.scatter_reduce(x, axis, places, updates, _reduction(reduction), include_self=True)


@widened
def _scatter_nd(
    x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, *, reduction: str = "none"
) -> torch.Tensor:
    depth = indices.shape[-1]
    tail = x.shape[depth:]
    block = tail.numel()
    # One flat row of `block` elements for each index tuple: both kinds are then a scatter along one axis.
    rows = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for i in range(depth):
        rows = rows * x.shape[i] + _from_start(indices[..., i], x.shape[i])
    places = (rows.reshape(-1, 1) * block + torch.arange(block, device=x.device)).reshape(-1)
    placed = _scatter_elements(x.reshape(-1), places, updates.reshape(-1), reduction=reduction)
    return placed.reshape(x.shape)


def _reduction(name: str) -> str:
    if name not in _REDUCTIONS:
        raise IRError(f"Scatter: reduction {name!r}, expected none, {', '.join(_REDUCTIONS)}")
    return _REDUCTIONS[name]


def _one_hot(indices: torch.Tensor, depth: torch.Tensor, values: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    count = int(depth.item())
    places = _from_start(indices, count)
    hot = places.unsqueeze(-1) == torch.arange(count, device=indices.device)
    off, on = values.unbind()
    return torch.where(hot, on, off).movedim(-1, axis)


def _non_zero(x: torch.Tensor) -> torch.Tensor:
    return torch.nonzero(x).T


def _arg_extreme(
    function: Callable[..., torch.Tensor],
) -> Callable[..., torch.Tensor]:
    def pick(x: torch.Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> torch.Tensor:
        if not select_last_index:
            return function(x, dim=axis, keepdim=bool(keepdims))
        return x.shape[axis] - 1 - function(x.flip(axis), dim=axis, keepdim=bool(keepdims))

    pick.__name__ = function.__name__
    return pick


def _top_k(
    x: torch.Tensor, k: torch.Tensor, *, axis: int = -1, largest: int = 1, sorted: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    # A stable sort: among equals ONNX takes the smaller index first, torch.topk takes any.
    values, places = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    count = int(k.item())
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


def _cumulative_sum(x: torch.Tensor, axis: torch.Tensor, *, exclusive: int = 0, reverse: int = 0) -> torch.Tensor:
    dim = int(axis.item())
    x = x.flip(dim) if reverse else x
    total = torch.cumsum(x, dim, dtype=x.dtype)
    total = total - x if exclusive else total
    return total.flip(dim) if reverse else total


def _trilu(x: torch.Tensor, k: torch.Tensor | None = None, *, upper: int = 1) -> torch.Tensor:
    diagonal = 0 if k is None else int(k.item())
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


def _eye_like(x: torch.Tensor, *, dtype: int | None = None, k: int = 0) -> torch.Tensor:
    kind = x.dtype if dtype is None else torch_type(dtype)
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return (torch.arange(x.shape[1], device=x.device) - rows == k).to(kind)


def _compress(x: torch.Tensor, condition: torch.Tensor, *, axis: int | None = None) -> torch.Tensor:
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis)
    places = torch.nonzero(condition[: x.shape[axis]]).reshape(-1)
    return x.index_select(axis, places)


def _reverse_sequence(
    x: torch.Tensor, lengths: torch.Tensor, *, batch_axis: int = 1, time_axis: int = 0
) -> torch.Tensor:
    y = x.movedim((batch_axis, time_axis), (0, 1))
    steps = torch.arange(y.shape[1], device=x.device)[None]
    counts = lengths.long()[:, None]
    places = torch.where(steps < counts, counts - 1 - steps, steps)
    batch = torch.arange(y.shape[0], device=x.device)[:, None]
    return y[batch, places].movedim((0, 1), (batch_axis, time_axis))


HANDLERS: dict[str, Callable[..., torch.Tensor]] = {
    "ArgMax": _arg_extreme(torch.argmax),
    "ArgMin": _arg_extreme(torch.argmin),
    "Compress": _compress,
    "CumSum": _cumulative_sum,
    "EyeLike": _eye_like,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "NonZero": _non_zero,
    "OneHot": _one_hot,
    "ReverseSequence": _reverse_sequence,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Trilu": _trilu,
}

MULTIPLE: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "TopK": _top_k,
}
