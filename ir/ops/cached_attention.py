"""CachedAttention: causal attention of new tokens over a cache of fixed length, heads of keys shared by groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.op import Attribute, Body, Example, Op, Type, Work, dtype_of, where


class CachedAttention(Op):
    """y[b, h, t] = Σ_j p_j v[b, h div r, j], p = softmax over j ≤ positions[t] of q[b, h, t]·k[b, h div r, j] / √s.

    q is [b, h, t, s], keys k and values v [b, h / r, m, s], positions int64 [t]: token t sees the rows of the
    cache up to its own position, which were written before. Rows behind that may hold anything finite.

    Scaled dot-product attention: Vaswani et al., arXiv 1706.03762; heads that share keys: Ainslie et al., arXiv
    2305.13245.
    """

    inputs: ClassVar[tuple[str, ...]] = ("q", "keys", "values", "positions")
    attributes: ClassVar[Mapping[str, Attribute]] = {}

    def variant(self, node: onnx_ir.Node) -> str:
        """One body for all."""
        return "float"

    def body(self, op: Body, node: onnx_ir.Node) -> onnx_ir.Value:
        """The r heads that share keys become rows of one product, as they lie next to each other."""
        q, keys, values, positions = (op.input(name) for name in self.inputs)
        shape = op.Shape(q)
        batch, length, size = op.Shape(q, start=0, end=1), op.Shape(q, start=2, end=3), op.Shape(q, start=3, end=4)
        groups = op.Shape(keys, start=1, end=2)
        room = op.Shape(keys, start=2, end=3)
        minus_one, one = op.constant([-1]), op.constant([1])
        rows = op.Reshape(q, op.Concat(batch, groups, minus_one, size, axis=0))
        root = op.Sqrt(op.CastLike(size, q))
        scores = op.MatMul(op.Div(rows, root), op.Transpose(keys, perm=[0, 1, 3, 2]))
        by_token = op.Reshape(scores, op.Concat(batch, groups, minus_one, length, room, axis=0))
        scalar = op.constant([], np.int64)
        index = op.Range(op.constant(0), op.Reshape(room, scalar), op.constant(1))
        seen = op.LessOrEqual(index, op.Unsqueeze(positions, one))
        lowest = op.CastLike(op.constant(-65504.0, np.float32), q)
        weights = op.Softmax(op.Where(seen, by_token, lowest), axis=-1)
        flat = op.Reshape(weights, op.Concat(batch, groups, minus_one, room, axis=0))
        return op.Reshape(op.MatMul(flat, values), shape)

    def types(self, node: onnx_ir.Node) -> list[Type]:
        """The type of q."""
        q = node.inputs[0]
        if q is None or q.shape is None:
            raise IRError(f"{where(node)}: the shape of input {q.name if q else '?'!r} is unknown; set it")
        return [(dtype_of(node, q), onnx_ir.Shape(q.shape))]

    def check(self, node: onnx_ir.Node) -> None:
        """Check ranks, the sharing of heads, and that keys and values fit.

        Raises:
            IRError: otherwise.
        """
        super().check(node)
        for name, rank in (("q", 4), ("keys", 4), ("values", 4), ("positions", 1)):
            value = self.input(node, name)
            assert value is not None  # super().check saw to it
            if value.shape is not None and len(value.shape) != rank:
                raise IRError(f"{where(node)}: {name} has rank {len(value.shape)}, expected {rank}; reshape it")
        q, keys, values = node.inputs[:3]
        assert q is not None and keys is not None and values is not None
        if keys.shape is not None and values.shape is not None and keys.shape != values.shape:
            raise IRError(f"{where(node)}: keys are {keys.shape}, values {values.shape}, expected one shape; pad them")
        if q.shape is None or keys.shape is None:
            return
        heads, groups = q.shape[1], keys.shape[1]
        if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
            raise IRError(f"{where(node)}: {heads} heads share {groups}, expected a multiple; correct the reshape")
        if isinstance(q.shape[3], int) and isinstance(keys.shape[3], int) and q.shape[3] != keys.shape[3]:
            raise IRError(
                f"{where(node)}: heads of q are {q.shape[3]} wide, of keys {keys.shape[3]}; correct the reshape"
            )

    def learns(self, node: onnx_ir.Node, index: int) -> bool:
        """It has no weights; the body carries the gradients."""
        return index < 3

    def work(self, node: onnx_ir.Node) -> Work:
        """Two products with the whole cache, which is the most that they take; symbolic sizes count as 1."""
        q, keys = node.inputs[:2]
        assert q is not None and keys is not None and q.shape is not None and keys.shape is not None
        batch, heads, length, size = (d if isinstance(d, int) else 1 for d in q.shape)
        _, groups, room, _ = (d if isinstance(d, int) else 1 for d in keys.shape)
        products = 2 * batch * heads * length * room * size
        stored = 2 * batch * groups * room * size * dtype_of(node, keys).itemsize
        return Work(mul=products, add=products, bytes=int(stored))

    def samples(self, rng: np.random.Generator) -> Iterator[Example]:
        """One token and several, heads shared and not, a batch, fp16."""
        yield _sample(rng, "step", heads=(6, 2), length=1, first=4)
        yield _sample(rng, "first", heads=(2, 2), length=1, first=0)
        yield _sample(rng, "prompt", heads=(4, 2), length=5, first=0)
        yield _sample(rng, "later", heads=(4, 1), length=3, first=6, batch=2)
        yield _sample(rng, "half", heads=(4, 2), length=2, first=3, dtype=np.float16)


def _sample(
    rng: np.random.Generator,
    name: str,
    *,
    heads: tuple[int, int],
    length: int,
    first: int,
    batch: int = 1,
    dtype: type = np.float32,
) -> Example:
    room, size = 9, 8
    q: np.ndarray = rng.standard_normal((batch, heads[0], length, size)).astype(dtype)
    cache: list[np.ndarray] = [rng.standard_normal((batch, heads[1], room, size)).astype(dtype) for _ in range(2)]
    return Example(name, (q, *cache, np.arange(first, first + length)))
