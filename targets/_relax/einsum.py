"""Einsum: each operand loses its diagonals and lone axes, then two at a time become one batched matrix product.

    y[batch, left, right] = Σ_depth a[batch, left, depth] · b[batch, depth, right]

A label stands in both operands and the result (batch), in both alone (depth), or in one of them (left, right).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx_ir
from tvm import relax, te

from mc_opt.targets._relax.emitter import Emitter, Handler
from mc_opt.targets.kernels import _tile, _weights, gemm

_FLOAT = "float32"


@dataclasses.dataclass(frozen=True)
class _Operand:
    """An array and a label an axis.

    Attributes:
        labels: letters; the axes of an ellipsis are numbers, counted from the last one.
        expr: what computes it.
        array: its data, when that is known while building.
    """

    labels: tuple[str, ...]
    expr: relax.Expr
    array: np.ndarray | None = None

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self.labels, (int(s) for s in self.expr.ty.shape), strict=True))


def _einsum(e: Emitter, node: onnx_ir.Node) -> None:
    values = [v for v in node.inputs if v is not None]
    terms, result = parse(str(e.attribute(node, "equation", "")), [len(e.shape(v)) for v in values])
    operands = [_Operand(labels, e.plain(v), e.constant(v)) for labels, v in zip(terms, values, strict=True)]
    total = operands[0]
    for k, operand in enumerate(operands[1:], 1):
        wanted = {*result, *(label for later in operands[k + 1 :] for label in later.labels)}
        total = _pair(e, total, operand, wanted)
    e.set(node.outputs[0], _arranged(e, total, result).expr)


def parse(equation: str, ranks: Sequence[int]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """The labels of every operand and of the result; without an arrow, the result has those that appear once."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    texts = left.split(",")
    terms = [_labels(text, rank) for text, rank in zip(texts, ranks, strict=True)]
    widest = max(
        (rank - len(t.replace("...", "")) for t, rank in zip(texts, ranks, strict=True) if "..." in t), default=0
    )
    if arrow:
        return terms, _labels(right, len(right.replace("...", "")) + widest)
    letters = sorted(c for c in left if c.isalpha())
    once = tuple(c for c in letters if letters.count(c) == 1)
    return terms, (*map(str, reversed(range(widest))), *once)


def _labels(text: str, rank: int) -> tuple[str, ...]:
    before, dots, after = text.partition("...")
    covered = rank - len(before) - len(after) if dots else 0
    return (*before, *map(str, reversed(range(covered))), *after)


def _pair(e: Emitter, a: _Operand, b: _Operand, wanted: Collection[str]) -> _Operand:
    """The sum over all labels that nobody wants any more of a · b."""
    sizes = {k: max(a.sizes.get(k, 1), b.sizes.get(k, 1)) for k in (*a.labels, *b.labels)}
    a, b = (_alone(e, x, {*wanted, *other.labels}, sizes) for x, other in ((a, b), (b, a)))
    batch = tuple(k for k in a.labels if k in b.labels and k in wanted)
    depth = tuple(k for k in a.labels if k in b.labels and k not in wanted)
    if a.array is not None and b.array is None:
        a, b = b, a  # a constant on the right is packed while building
    left = tuple(k for k in a.labels if k not in b.labels)
    right = tuple(k for k in b.labels if k not in a.labels)
    labels = (*batch, *left, *right)
    if str(a.expr.ty.dtype) != _FLOAT or not depth:
        fn = functools.partial(_direct, a=a.labels, b=b.labels, labels=labels, sizes=sizes)
        return _Operand(labels, e.te(fn, a.expr, b.expr, name="einsum"))
    lead, m, k, n = (math.prod(sizes[x] for x in group) for group in (batch, left, depth, right))
    rows = e.reshape(_arranged(e, a, (*batch, *left, *depth)).expr, (lead, m, k))
    b = _arranged(e, b, (*batch, *depth, *right))
    tile = _tile.choose(1, m, n, e.machine)
    if b.array is None:
        packed = gemm.pack_dynamic(e, e.reshape(b.expr, (lead, k, n)), tile.columns)
    else:
        matrices = b.array.reshape(lead, k, n)
        packed = e.weight(np.stack([_weights.pack_columns(matrix, tile.columns) for matrix in matrices]))
    y = gemm.product(e, rows, packed, None, tile=tile, columns=n, name="einsum")
    return _Operand(labels, e.reshape(y, [sizes[x] for x in labels]))


def _alone(e: Emitter, x: _Operand, wanted: Collection[str], sizes: dict[str, int]) -> _Operand:
    """The operand without diagonals, without axes that it alone has, and without axes that broadcast."""
    own = x.sizes
    kept = tuple(k for k in dict.fromkeys(x.labels) if k in wanted and own[k] == sizes[k])
    return _arranged(e, x, kept)


def _arranged(e: Emitter, x: _Operand, labels: tuple[str, ...]) -> _Operand:
    """The operand with these axes: others are summed over, of a repeated one the diagonal is taken."""
    if labels == x.labels:
        return x
    sizes = x.sizes
    if x.array is not None:
        numbers = {k: index for index, k in enumerate(sizes)}
        array = np.einsum(x.array, [numbers[k] for k in x.labels], [numbers[k] for k in labels])
        array = np.ascontiguousarray(array, x.array.dtype)
        return _Operand(labels, e.weight(array), array)

    def fn(source: te.Tensor) -> te.Tensor:
        along = {
            k: te.reduce_axis((0, size), name=f"r{n}") for n, (k, size) in enumerate(sizes.items()) if k not in labels
        }

        def element(*i: Any) -> Any:
            at = {**dict(zip(labels, i, strict=False)), **along}
            item = source(*(at[k] for k in x.labels))
            return te.sum(item, axis=list(along.values())) if along else item

        return te.compute([sizes[k] for k in labels], element, name="arrange")

    return _Operand(labels, e.te(fn, x.expr, name="arrange"))


def _direct(
    x: te.Tensor, y: te.Tensor, *, a: Sequence[str], b: Sequence[str], labels: Sequence[str], sizes: dict[str, int]
) -> te.Tensor:
    """The product without a tile: of other types than float32, or with nothing to sum over."""
    along = {k: te.reduce_axis((0, sizes[k]), name=f"r{n}") for n, k in enumerate(a) if k in b and k not in labels}

    def element(*i: Any) -> Any:
        at = {**dict(zip(labels, i, strict=False)), **along}
        item = x(*(at[k] for k in a)) * y(*(at[k] for k in b))
        return te.sum(item, axis=list(along.values())) if along else item

    return te.compute([sizes[k] for k in labels], element, name="einsum")


HANDLERS: dict[str, Handler] = {"Einsum": _einsum}
