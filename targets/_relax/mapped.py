"""Kernels that compute each output element from a few input elements, in whichever layout values are held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir
from tvm import relax, te, tirx

from mc_opt.targets._relax import dims
from mc_opt.targets._relax.dims import Dim, Shape
from mc_opt.targets._relax.emitter import Emitter, Layout

# Reads one element of an operand at a logical index, in ONNX's order of axes.
Reader = Callable[..., Any]

# TVM's kInjective: fused with what comes after it, never into a convolution before it.
_INJECTIVE = 2


def held(e: Emitter, value: onnx_ir.Value) -> tuple[relax.Expr, Layout]:
    """The value as it is held: an expression and its layout, without any conversion."""
    if e.layout(value) == "nhwc":
        return e.nhwc(value), "nhwc"
    return e.plain(value), "plain"


def reader(x: te.Tensor, layout: Layout) -> Reader:
    """Reads x, which is in `layout`, at logical indices."""
    if layout == "plain":
        return lambda *i: x(*i)
    return lambda *i: x(i[0], *i[2:], i[1])


def mapped(
    e: Emitter,
    output: onnx_ir.Value,
    shape: Sequence[Dim],
    operands: Sequence[tuple[relax.Expr, Layout]],
    element: Callable[..., Any],
    *,
    name: str,
    layout: Layout = "plain",
    widens: bool = False,
) -> None:
    """Emit `output[i] = element(readers, i)` with `i` logical, stored in `layout`.

    Args:
        e: the emitter.
        output: the value to set.
        shape: its logical shape.
        operands: expressions and the layouts that they are in.
        element: from the list of readers and the logical index to the element's expression.
        name: the kernel's name.
        layout: how the output is stored.
        widens: an operand that another kernel computes is smaller than the output, and must stay apart from it.
    """

    def fn(*tensors: te.Tensor) -> te.Tensor:
        readers = [reader(x, kind) for x, (_, kind) in zip(tensors, operands, strict=True)]
        if layout == "plain":
            return te.compute(tuple(shape), lambda *i: element(readers, i), name=name)
        stored = (shape[0], *shape[2:], shape[1])
        return te.compute(stored, lambda *i: element(readers, (i[0], i[-1], *i[1:-1])), name=name)

    # A convolution that computes a gate [1, C, 1, 1] has a tile of its own size: were this kernel fused into it,
    # the whole image would be written out, unrolled, beside that tile.
    attributes = {"op_pattern": _INJECTIVE} if widens else None
    args = [expr for expr, _ in operands]
    e.set(output, e.kernel(fn, *args, name=name, attributes=attributes), layout)


def elementwise(
    e: Emitter,
    output: onnx_ir.Value,
    values: Sequence[onnx_ir.Value],
    fn: Callable[..., Any],
    *,
    name: str,
) -> None:
    """Emit `output = fn(*values)` with numpy's broadcasting; constants of one element go into the code.

    Args:
        e: the emitter.
        output: the value to set.
        values: the operands.
        fn: from one expression an operand to the result's expression.
        name: the kernel's name.
    """
    shape = dims.broadcast(*(e.shape(v) for v in values))
    rank = len(shape)
    layout: Layout = "plain"
    if rank >= 3 and any(e.layout(v) == "nhwc" and len(e.shape(v)) == rank for v in values):
        layout = "nhwc"
    operands: list[tuple[relax.Expr, Layout]] = []
    access: list[Callable[[Sequence[Reader], Sequence[Any]], Any]] = []
    for value in values:
        array = e.constant(value)
        if array is not None and array.size == 1:
            access.append(_scalar(array))
            continue
        access.append(_access(len(operands), e.shape(value), shape))
        operands.append(_operand(e, value, shape, layout))
    computed = [v for v in values if e.constant(v) is None]
    mapped(
        e,
        output,
        shape,
        operands,
        lambda readers, i: fn(*(a(readers, i) for a in access)),
        name=name,
        layout=layout,
        widens=any(not dims.same(dims.product(e.shape(v)), dims.product(shape)) for v in computed),
    )


def constant(value: float | bool, dtype: str) -> Any:
    """A scalar expression of a numpy dtype."""
    return tirx.const(value, dtype)


def _scalar(array: np.ndarray) -> Callable[[Sequence[Reader], Sequence[Any]], Any]:
    item = tirx.const(array.reshape(-1)[0].item(), str(array.dtype))
    return lambda _readers, _index: item


def _access(k: int, shape: Shape, result: Shape) -> Callable[[Sequence[Reader], Sequence[Any]], Any]:
    skip = len(result) - len(shape)
    stretched = [dims.same(s, 1) and not dims.same(result[skip + axis], 1) for axis, s in enumerate(shape)]

    def read(readers: Sequence[Reader], index: Sequence[Any]) -> Any:
        return readers[k](*(0 if stretch else i for i, stretch in zip(index[skip:], stretched, strict=True)))

    return read


def _operand(e: Emitter, value: onnx_ir.Value, shape: Shape, layout: Layout) -> tuple[relax.Expr, Layout]:
    own = e.shape(value)
    if e.constant(value) is not None or not dims.same_shape(own, shape):
        # Small operands are read where they lie: a per-channel constant [C, 1, 1] has its bytes in order.
        return held(e, value)
    return (e.nhwc(value), "nhwc") if layout == "nhwc" else (e.plain(value), "plain")
