"""Products of one input with several packed weights as one product: the weights stand side by side.

    [y₁ y₂ ..] = x · [W₁ W₂ ..]

Queries, keys and values of an attention have one input, and so have a gate and what it opens. Of few rows each product
is little more than a pass over its weights, which begins slowly; and their rows are rounded once for activations=int8.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir
from tvm import relax, te

from mc_opt.targets._relax import dims
from mc_opt.targets._relax.emitter import Emitter, LookupWeight
from mc_opt.targets.kernels import lookup_gemv


def product(e: Emitter, node: onnx_ir.Node, a: relax.Expr) -> relax.Expr | None:
    """a: [.., m, k], the rows of a MatMul's left operand -> [.., m, n]; sets the outputs of the products that it joins.

    None where there is nothing to join, or no kernel for what is joined.
    """
    left, parts = node.inputs[0], _parts(e, node)
    if left is None or len(parts) < 2:
        return None
    whole = lookup_gemv.with_packed(e, a, _side_by_side([weight for _, weight in parts]), None)
    if whole is None:
        return None
    e.note_kernel(f"one product: {', '.join(str(part.outputs[0].name) for part, _ in parts)}")
    first, results = 0, list[relax.Expr]()
    for _, weight in parts:
        results.append(_columns(e, whole, first, weight.shape[1]))
        first += weight.shape[1]
    # `a` may have the rows of a batch in one axis, and nobody else gives an output that is set ahead its shape.
    lead = e.shape(left)[:-1]
    for (part, weight), result in zip(parts[1:], results[1:], strict=True):
        e.set_ahead(part.outputs[0], e.reshape(result, (*lead, weight.shape[1])))
    return results[0]


def _parts(e: Emitter, node: onnx_ir.Node) -> list[tuple[onnx_ir.Node, LookupWeight]]:
    """The MatMuls of a node's left operand whose weights fit beside its own, itself first; and their weights."""
    left, own = node.inputs[0], e.lookup(node.inputs[1])
    if left is None or own is None or not _is_joinable(own):
        return []
    found = [(node, own)]
    for user, index in left.uses():
        if user is node or index or (user.domain, user.op_type) != ("", "MatMul") or user.graph is not node.graph:
            continue
        weight = e.lookup(user.inputs[1])
        if weight is not None and _is_joinable(weight) and _fit(own, weight) and not e.is_set(user.outputs[0]):
            found.append((user, weight))
    return found


def _is_joinable(weight: LookupWeight) -> bool:
    """Whether a weight [k, n] has a scale or several a column, no offset, and columns of whole bytes."""
    if weight.axes != (1,) or len(weight.shape) != 2 or weight.offset is not None or weight.scale is None:
        return False
    k, n = weight.shape
    return weight.scale.shape[0] == n and k * weight.bits % 8 == 0 and weight.codebook.size == weight.codebook.shape[-1]


def _fit(a: LookupWeight, b: LookupWeight) -> bool:
    """Whether two weights differ in their codes, scales and columns alone."""
    same = (a.bits, a.group_size, a.shape[0], _scales(a)) == (b.bits, b.group_size, b.shape[0], _scales(b))
    return same and a.codebook.dtype == b.codebook.dtype and np.array_equal(a.codebook, b.codebook)


def _scales(weight: LookupWeight) -> int:
    """The scales of a column: one for each group, or one for all of them."""
    return 0 if weight.scale is None else weight.scale.shape[1]


def _side_by_side(weights: list[LookupWeight]) -> LookupWeight:
    """[k, n₁ + n₂ + ..]: rows of the packed matrix are columns of the weight."""
    k, bits = weights[0].shape[0], weights[0].bits
    codes = [w.codes.reshape(-1)[: math.prod(w.shape) * bits // 8] for w in weights]
    scales = [w.scale for w in weights if w.scale is not None]
    return dataclasses.replace(
        weights[0],
        codes=np.concatenate(codes),
        scale=np.concatenate(scales),
        shape=(k, sum(w.shape[1] for w in weights)),
    )


def _columns(e: Emitter, whole: relax.Expr, first: int, count: int) -> relax.Expr:
    """Some columns of [.., n]."""
    *lead, _ = dims.sizes(whole)

    def cut(x: te.Tensor) -> te.Tensor:
        return te.compute((*lead, count), lambda *i: x(*i[:-1], i[-1] + first), name="columns")

    return e.moved(cut, whole, name="columns")
