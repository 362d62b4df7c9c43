"""The dialect's weights where no kernel takes them packed: decoded dense at run time, or row by row for Gather."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir
from tvm import relax, te, tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._base import TargetError
from mc_opt.targets._relax import dims
from mc_opt.targets._relax.emitter import Emitter, Handler, LookupWeight
from mc_opt.targets._relax.mapped import elementwise
from mc_opt.targets.kernels import _decode, _loops, _outliers
from mc_opt.targets.kernels._loops import Buffer


def decode(e: Emitter, weight: LookupWeight) -> relax.Expr:
    """The weight dense in its own shape."""
    arrays, value = _decoder(weight)
    arguments = [e.weight(a) for a in arrays]
    e.note_kernel(f"decode: {weight.bits} bits, {'x'.join(map(str, weight.shape))}")
    return e.moved(
        lambda *buffers: te.compute(weight.shape, lambda *i: value(buffers, i), name="decode"),
        *arguments,
        name="decode",
    )


def gather(e: Emitter, weight: LookupWeight, indices: relax.Expr, axis: int = 0) -> relax.Expr:
    """Gather of a packed table: decodes the slices that are picked and nothing else."""
    arrays, value = _decoder(weight)
    axis %= len(weight.shape)
    picked = dims.sizes(indices)
    shape = (*weight.shape[:axis], *picked, *weight.shape[axis + 1 :])

    def compute(where: te.Tensor, *buffers: te.Tensor) -> te.Tensor:
        def element(*i: Any) -> Any:
            at = where(*i[axis : axis + len(picked)]).astype("int32")
            at = tirx.Select(at < 0, at + weight.shape[axis], at)
            return value(buffers, (*i[:axis], at, *i[axis + len(picked) :]))

        return te.compute(shape, element, name="gather")

    e.note_kernel(f"lookup gather: {weight.bits} bits, {'x'.join(map(str, weight.shape))}")
    return e.te(compute, indices, *[e.weight(a) for a in arrays], name="gather")


def _decoder(weight: LookupWeight) -> tuple[list[np.ndarray], Callable[[Sequence[te.Tensor], Sequence[Any]], Any]]:
    """The arrays of a weight, and the expression of one element given their tensors and its index."""
    order = [*weight.axes, *[a for a in range(len(weight.shape)) if a not in weight.axes]]
    rows = math.prod(weight.shape[a] for a in weight.axes)
    columns = math.prod(weight.shape) // max(rows, 1)
    size = weight.group_size or columns
    # A code may reach into the next byte, of which the last code has none.
    stream = np.append(weight.codes.reshape(-1), np.zeros(1, np.uint8))
    arrays = [stream, weight.codebook]
    arrays += [a for a in (weight.scale, weight.offset) if a is not None]

    def flat(i: Sequence[Any], axes: Sequence[int]) -> Any:
        result: Any = tirx.const(0, "int32")
        for axis in axes:
            result = result * weight.shape[axis] + i[axis]
        return result

    def element(buffers: Sequence[te.Tensor], i: Sequence[Any]) -> Any:
        codes, codebook, *rest = buffers
        row, column = flat(i, weight.axes), flat(i, order[len(weight.axes) :])
        code = _code(codes, row * columns + column, weight.bits)
        group = column // size

        def part(tensor: te.Tensor) -> tuple[Any, Any]:
            return (row if int(tensor.shape[0]) > 1 else 0, group if int(tensor.shape[1]) > 1 else 0)

        value = codebook(code) if len(codebook.shape) == 1 else codebook(*part(codebook), code)
        if weight.scale is not None:
            scale = rest[0]
            value = value * scale(*part(scale)).astype(codebook.dtype)
        if weight.offset is not None:
            offset = rest[-1]
            value = value + offset(*part(offset)).astype(codebook.dtype)
        return value

    return arrays, element


def _code(codes: te.Tensor, position: Any, bits: int) -> Any:
    """The code at a position of a little-endian bit stream."""
    if bits == 8:
        return codes(position).astype("int32")
    # Units of eight codes keep the bit position small: a table of 2^28 weights has 2^31 bits.
    unit, inside = position // 8, (position % 8) * bits
    byte, shift = unit * bits + inside // 8, inside % 8
    value = codes(byte).astype("int32")
    if 8 % bits:
        value = value | (codes(byte + 1).astype("int32") << 8)
    return (value >> shift) & tirx.const((1 << bits) - 1, "int32")


def lookup(e: Emitter, node: onnx_ir.Node) -> None:
    """A Lookup emits nothing until a consumer asks for the weight dense."""
    weight = e.lookup(node.outputs[0])
    if weight is None:
        raise TargetError(
            f"Lookup {node.name!r}: its codes, codebook, scale or offset are computed by the model;"
            " expected constants; run fold-constants first"
        )
    e.set_lazy(node.outputs[0], weight.shape, functools.partial(decode, e, weight))


def add(e: Emitter, node: onnx_ir.Node) -> None:
    """Add; a sum of packed weights emits nothing until a consumer asks for it dense."""
    left, right = node.inputs
    assert left is not None and right is not None
    terms = _decode.terms(e, node.outputs[0])
    if not terms:
        elementwise(e, node.outputs[0], [left, right], lambda a, b: a + b, name="add")
        return
    e.set_lazy(node.outputs[0], terms[0].shape, lambda: _decode.added(e, e.plain(left), e.plain(right)))


def add_sparse(e: Emitter, node: onnx_ir.Node) -> None:
    """AddSparse: the dense weight copied, then the values added where they belong."""
    weight, indices, values = node.inputs
    assert weight is not None and indices is not None and values is not None
    shape, dtype = e.shape(weight), e.dtype(weight)
    size, count = math.prod(shape), math.prod(e.shape(indices))

    def make() -> relax.Expr:
        where = e.constant(indices)
        if e.machine.kind == "cuda" and where is not None:
            tables = [e.weight(table) for table in _outliers.outlier_table(where, size)]
            flat = [e.reshape(e.plain(weight), (size,)), e.reshape(e.plain(values), (count,))]
            return e.reshape(e.te(_outliers.added, *flat, *tables, name="add_sparse"), shape)
        e.note_fallback(f"AddSparse {node.name}: its weight is made dense at every run, to add {count} outliers")
        kind = str(e.plain(indices).ty.dtype)
        function = _loops.kernel(
            [((size,), dtype), ((count,), kind), ((count,), dtype), ((size,), dtype)], _add_body(size, count)
        )
        dense, added = e.reshape(e.plain(weight), (size,)), e.reshape(e.plain(values), (count,))
        y = e.call(function, [dense, e.plain(indices), added], [((size,), dtype)], name="add_sparse")[0]
        return e.reshape(y, shape)

    e.set_lazy(node.outputs[0], shape, make)


def _add_body(size: int, count: int) -> Callable[..., None]:
    def body(dense: Buffer, indices: Buffer, values: Buffer, out: Buffer) -> None:
        with T.serial(0, size) as i:
            T.buffer_store(out, dense[i], [i])
        with T.serial(0, count) as i:
            T.buffer_store(out, out[indices[i]] + values[i], [indices[i]])

    return body


def sparse(e: Emitter, node: onnx_ir.Node) -> None:
    """Sparse: values spread to where the bitmap has a one."""
    bitmap, values = node.inputs[0], node.inputs[1]
    assert bitmap is not None and values is not None
    shape = tuple(e.attribute(node, "shape", ()))
    size, count, held = math.prod(shape), math.prod(e.shape(values)), math.prod(e.shape(bitmap))
    dtype = e.dtype(values)

    def make() -> relax.Expr:
        if e.machine.kind == "cuda":
            return e.reshape(_spread_in_threads(e, node, size), shape)
        function = _loops.kernel(
            [((held,), "uint8"), ((count,), dtype), ((size,), dtype)], _spread_body(size, count, dtype)
        )
        y = e.call(function, [e.plain(bitmap), e.reshape(e.plain(values), (count,))], [((size,), dtype)], name="sparse")
        return e.reshape(y[0], shape)

    e.set_lazy(node.outputs[0], shape, make)


def _spread_in_threads(e: Emitter, node: onnx_ir.Node, size: int) -> relax.Expr:
    bitmap, values = node.inputs[0], node.inputs[1]
    array = e.constant(bitmap)
    if array is None or bitmap is None or values is None:
        raise TargetError(f"Sparse {node.name!r}: its bitmap is computed by the model; run fold-constants first")
    flat = e.reshape(e.plain(values), (math.prod(e.shape(values)),))
    before = e.weight(_outliers.ones_before(array.reshape(-1)))
    return e.moved(functools.partial(_outliers.spread, size=size), e.plain(bitmap), before, flat, name="sparse")


def _spread_body(size: int, count: int, dtype: str) -> Callable[..., None]:
    def body(bitmap: Buffer, values: Buffer, out: Buffer) -> None:
        following = _loops.registers(1, 1, "int32")
        T.buffer_store(following, tirx.const(0, "int32"), [0])
        with T.serial(0, size) as i:
            bit = (bitmap[i // 8].astype("int32") >> (i % 8)) & 1
            at = tirx.min(following[0], tirx.const(max(count - 1, 0), "int32"))
            T.buffer_store(out, tirx.if_then_else(bit > 0, values[at], tirx.const(0, dtype)), [i])
            T.buffer_store(following, following[0] + bit, [0])

    return body


HANDLERS: dict[str, Handler] = {
    "Add": add,
    "mc_opt.Lookup": lookup,
    "mc_opt.AddSparse": add_sparse,
    "mc_opt.Sparse": sparse,
}
