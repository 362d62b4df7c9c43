"""KronLinear: a linear layer whose weight is a sum of Kronecker products, run as one small product a factor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.op import Attribute, Body, Example, Op, Type, Work, dtype_of, static_shape, where
from mc_opt.ir.ops import _kron as kron
from mc_opt.ir.ops import _kron_body as bodies


class KronLinear(Op):
    """y[.., m] = x[.., n]·Wᵀ + bias with W = Σ_r ⊗_k A⁽ᵏ⁾[r]; W is never made.

    Factor k of S ≥ 2 is [R_1|1, .., R_p|1, m_k, n_k] with the same p ≥ 0 for all, 1 where it does not carry a rank;
    m = Π m_k, n = Π n_k, factor 1 the slow one. Each rank is carried by at least two factors. x has any rank ≥ 1.
    Stages run from factor S to factor 1; of two factors the first runs first where that multiplies less.
    """

    inputs: ClassVar[tuple[str, ...]] = ("x", "bias?", "factor*")
    attributes: ClassVar[Mapping[str, Attribute]] = {}

    def chain(self, node: onnx_ir.Node) -> kron.Chain:
        """The factors' shapes."""
        shapes = tuple(static_shape(node, value) for value in node.inputs[2:])
        return kron.Chain(shapes, len(shapes[0]) - 2)

    def skeleton(self, node: onnx_ir.Node) -> bodies.Skeleton:
        """What decides the body's nodes."""
        chain = self.chain(node)
        return bodies.skeleton(chain, bias=node.inputs[1] is not None, reverse=chain.runs_reversed())

    def variant(self, node: onnx_ir.Node) -> str:
        """Which extents are above 1, which ranks a factor carries, and the order of the stages."""
        return self.skeleton(node).key

    def body(self, op: Body, node: onnx_ir.Node) -> onnx_ir.Value:
        """One MatMul a factor; a factor whose outputs do not stand last multiplies from the left."""
        return bodies.Writer(op, self.skeleton(node)).product()

    def types(self, node: onnx_ir.Node) -> list[Type]:
        """The type of x, its last axis replaced by m."""
        x = node.inputs[0]
        if x is None or x.shape is None:
            raise IRError(f"{where(node)}: the rank of input {x.name if x else '?'!r} is unknown; set its shape")
        return [(dtype_of(node, x), onnx_ir.Shape([*x.shape[:-1], self.chain(node).dense()[0]]))]

    def check(self, node: onnx_ir.Node) -> None:
        """Check that the factors fit each other, the input and the bias.

        Raises:
            IRError: for the first that does not.
        """
        super().check(node)
        bodies.check_factors(node)
        x = node.inputs[0]
        assert x is not None  # super().check saw to it
        if x.shape is not None and len(x.shape) < 1:
            raise IRError(f"{where(node)}: x is a scalar, expected at least one axis; correct the pass")
        chain = self.chain(node)
        bodies.check_chain(node, chain)
        outputs, inputs = chain.dense()
        if x.shape is not None and isinstance(x.shape[-1], int) and x.shape[-1] != inputs:
            raise IRError(
                f"{where(node)}: the last axis of x is {x.shape[-1]}, expected {inputs}, the product of the factors' "
                "inputs; correct the factors"
            )
        bodies.check_bias(node, outputs)

    def learns(self, node: onnx_ir.Node, index: int) -> bool:
        """Factors are stored as they are trained; the body carries the gradients."""
        return True

    def row_axes(self, node: onnx_ir.Node, index: int) -> tuple[int, ...] | None:
        """A factor's rows are what one output channel of its stage sums over."""
        return bodies.row_axes(self.skeleton(node), index - 1) if index > 1 else None

    def work(self, node: onnx_ir.Node) -> Work:
        """The multiplications of every stage for all rows; symbolic sizes count as 1."""
        x, chain = node.inputs[0], self.chain(node)
        shape = x.shape if x is not None and x.shape is not None else onnx_ir.Shape(())
        rows = math.prod(d if isinstance(d, int) else 1 for d in shape[:-1])
        itemsize = int(dtype_of(node, x).itemsize)
        return kron.factored_work(chain.shapes, chain.ranks, outputs=rows, itemsize=itemsize)

    def samples(self, rng: np.random.Generator) -> Iterator[Example]:
        """Two and three factors, both orders, low rank, each number of leading axes, fp16."""
        yield _sample(rng, "gkpd", [(3, 4, 2), (3, 2, 5)])
        yield _sample(rng, "gkpd-bias", [(3, 4, 2), (3, 2, 5)], lead=(2, 3), bias=True)
        yield _sample(rng, "outer-first", [(2, 2, 6), (2, 6, 2)], lead=(2, 3), bias=True)
        yield _sample(rng, "low-rank", [(4, 6, 1), (4, 1, 8)], lead=(2, 3), bias=True)
        yield _sample(rng, "low-rank-row", [(4, 6, 1), (4, 1, 8)], lead=())
        yield _sample(rng, "row", [(2, 4, 2), (2, 2, 3)], lead=(), bias=True)
        yield _sample(rng, "product", [(4, 2), (2, 5)], ranks=0, lead=(2, 3, 2))
        yield _sample(rng, "product-of-three", [(4, 2), (2, 3), (3, 2)], ranks=0)
        yield _sample(rng, "cp", [(4, 6, 1), (4, 1, 2), (4, 1, 3)], bias=True)
        yield _sample(rng, "tt", [(1, 3, 2, 2), (4, 3, 2, 2), (4, 1, 2, 3)], ranks=2)
        yield _sample(rng, "tucker", [(1, 3, 6, 1), (4, 3, 1, 1), (4, 1, 1, 5)], ranks=2)
        yield _sample(rng, "free", [(2, 1, 2, 2), (2, 3, 2, 3), (2, 3, 3, 2)], ranks=2, lead=(2, 3), bias=True)
        yield _sample(rng, "half", [(2, 4, 2), (2, 2, 3)], dtype=np.float16)


def _sample(
    rng: np.random.Generator,
    name: str,
    shapes: list[tuple[int, ...]],
    *,
    ranks: int = 1,
    lead: tuple[int, ...] = (3,),
    bias: bool = False,
    dtype: type = np.float32,
) -> Example:
    chain = kron.Chain(tuple(shapes), ranks)
    outputs, inputs = chain.dense()
    x: np.ndarray = rng.standard_normal((*lead, inputs)).astype(dtype)
    spread = inputs * math.prod(chain.rank(r) for r in range(ranks))
    scale = spread ** (-0.5 / len(shapes))
    factors = [(rng.standard_normal(shape) * scale).astype(dtype) for shape in shapes]
    given: np.ndarray | None = rng.standard_normal(outputs).astype(dtype) if bias else None
    return Example(name, (x, given, *factors), {})
