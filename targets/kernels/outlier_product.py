"""Products with a packed weight and its outliers: the packed product as it is, and what the outliers add to it.

    x·(W + S) = x·W + x·S

S is stored by output columns while building. Adding it to a decoded W would make the weight dense at every run.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import onnx_ir
from tvm import relax
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._relax import dims
from mc_opt.targets._relax.emitter import Emitter
from mc_opt.targets.kernels import _loops
from mc_opt.targets.kernels._loops import Buffer

# Outliers of all rows cost as much as so many decoded elements (measured: 1.2 and 3 nanoseconds).
_MOST = 2.5


@dataclasses.dataclass(frozen=True)
class Outliers:
    """A right operand [k, n] taken apart.

    Attributes:
        weight: what is packed.
        first: int32 [n + 1]: where the outliers of each column begin.
        rows: int32 [count], by columns.
        values: [count], likewise.
    """

    weight: onnx_ir.Value
    first: np.ndarray
    rows: np.ndarray
    values: np.ndarray


def outliers_of(e: Emitter, value: onnx_ir.Value, rows: Any) -> Outliers | None:
    """The parts of a packed weight with known outliers; None for any other weight, or for too many of them."""
    node = value.producer()
    if node is None or (node.domain, node.op_type) != ("mc_opt", "AddSparse") or e.machine.kind == "cuda":
        return None
    weight, indices, values = node.inputs
    assert weight is not None
    where, added = e.constant(indices), e.constant(values)
    if where is None or added is None or e.lookup(weight) is None or e.dtype(value) != "float32":
        return None
    depth, columns = (int(d) for d in e.shape(value))
    if not isinstance(rows, int) or where.size * rows > _MOST * depth * columns:
        return None
    order = np.argsort(where % columns, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(where % columns, minlength=columns))])
    return Outliers(weight, first.astype(np.int32), (where[order] // columns).astype(np.int32), added[order])


def added(e: Emitter, y: relax.Expr, x: relax.Expr, outliers: Outliers) -> relax.Expr:
    """y: [.., n], x: [.., k] -> y + x·S."""
    *lead, columns = dims.sizes(y)
    depth, rows, count = dims.sizes(x)[-1], math.prod(lead), len(outliers.rows)

    def body(total: Buffer, a: Buffer, first: Buffer, row: Buffer, value: Buffer, out: Buffer) -> None:
        with _loops.each(rows, e.machine, work=4 * rows * (count + columns)) as m, T.serial(0, columns) as o:
            held = _loops.registers(1, 1)
            T.buffer_store(held, total[m, o], [0])
            with T.serial(0, first[o + 1] - first[o]) as k:
                at = first[o] + k
                T.buffer_store(held, held[0] + a[m, row[at]] * value[at], [0])
            T.buffer_store(out, held[0], [m, o])

    shape = ((rows, columns), "float32")
    function = _loops.kernel(
        [
            *(shape, ((rows, depth), "float32")),
            *(((columns + 1,), "int32"), ((count,), "int32"), ((count,), "float32")),
            shape,
        ],
        body,
    )
    tables = [e.weight(t) for t in (outliers.first, outliers.rows, outliers.values)]
    inputs = [e.reshape(y, (rows, columns)), e.reshape(x, (rows, depth)), *tables]
    made = e.call(function, inputs, [shape], name="add_outliers")[0]
    return e.reshape(made, (*lead, columns))
