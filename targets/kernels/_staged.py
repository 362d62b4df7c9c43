"""Softmax and normalisations as reductions of a row, one after the other: what a GPU's schedules take.

A processor runs through a row in one kernel of its own (softmax.py, norm.py); the threads of a GPU share a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tvm import te, tirx


def softmax(x: te.Tensor, *, log: bool) -> te.Tensor:
    """x: [outer, length, inner] -> the same shape, normalised along the middle axis."""
    outer, length, inner = x.shape
    first, second = (te.reduce_axis((0, length), name=name) for name in ("k", "j"))
    highest = te.compute((outer, inner), lambda o, i: te.max(x(o, first, i), axis=first), name="highest")
    total = te.compute(
        (outer, inner), lambda o, i: te.sum(tirx.exp(x(o, second, i) - highest(o, i)), axis=second), name="total"
    )

    def element(o: Any, k: Any, i: Any) -> Any:
        shifted = x(o, k, i) - highest(o, i)
        return shifted - tirx.log(total(o, i)) if log else tirx.exp(shifted) / total(o, i)

    return te.compute((outer, length, inner), element, name="softmax")


@dataclasses.dataclass(frozen=True)
class Norm:
    """What a normalisation of rows does.

    Attributes:
        epsilon: added to the variance.
        centred: whether the mean is subtracted.
        scale: whether there is a scale, and likewise `bias`.
        statistics: whether mean and 1 / deviation are results too.
        period: parameters of successive rows: a row's first one is (row mod period) · length / block.
        block: successive elements that share a parameter.
    """

    epsilon: float
    centred: bool
    scale: bool
    bias: bool
    statistics: bool
    period: int
    block: int


def norm(x: te.Tensor, parameters: Sequence[te.Tensor], what: Norm) -> list[te.Tensor]:
    """x: [rows, length], parameters flat -> [rows, length], and the statistics [rows] if asked for."""
    rows, length = x.shape
    dtype = x.dtype
    count = tirx.Cast(dtype, length)
    given = list(parameters)
    scale = given.pop(0) if what.scale else None
    bias = given.pop(0) if what.bias else None
    first, second = (te.reduce_axis((0, length), name=name) for name in ("k", "j"))
    sums = te.compute((rows,), lambda r: te.sum(x(r, first), axis=first), name="sums") if what.centred else None

    def deviation(r: Any, i: Any) -> Any:
        return x(r, i) if sums is None else x(r, i) - sums(r) / count

    def square(r: Any, i: Any) -> Any:
        return deviation(r, i) * deviation(r, i)

    squares = te.compute((rows,), lambda r: te.sum(square(r, second), axis=second), name="squares")

    def factor(r: Any) -> Any:
        return tirx.const(1, dtype) / tirx.sqrt(squares(r) / count + tirx.const(what.epsilon, dtype))

    def element(r: Any, i: Any) -> Any:
        at = tirx.floormod(r, what.period) * tirx.floordiv(length, what.block) + tirx.floordiv(i, what.block)
        value = deviation(r, i) * factor(r)
        if scale is not None:
            value = value * scale(at)
        return value if bias is None else value + bias(at)

    results = [te.compute((rows, length), element, name="norm")]
    if what.statistics:
        zero = tirx.const(0, dtype)
        results.append(te.compute((rows,), lambda r: zero if sums is None else sums(r) / count, name="mean"))
        results.append(te.compute((rows,), factor, name="factor"))
    return results
