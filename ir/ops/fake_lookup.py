"""FakeLookup: the training form of Lookup, a float weight rounded to the nearest codebook entry."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.op import Attribute, Body, Example, Op, Type, Work, dtype_of, static_shape, where
from mc_opt.ir.ops import _grid as grids
from mc_opt.ir.ops._packing import Geometry


def nearest_codes(x: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """x: any shape, codebook: [n], n ≤ 256 -> the index of the nearest entry: uint8, x's shape.

    Between two entries at the same distance the lower one is taken, the first of a codebook that ascends. The
    midpoints are formed in the codebook's type, as FakeLookup does, so that both agree to the bit.
    """
    order = np.argsort(codebook, kind="stable")
    ascending = codebook[order]
    half = codebook.dtype.type(0.5)
    return order.astype(np.uint8)[np.searchsorted((ascending[:-1] + ascending[1:]) * half, x, side="left")]


class FakeLookup(Op):
    """y = c[k]·s with k the nearest entry to w/s; rows, groups and the extents of c and s are those of Lookup.

    The nearest entry is found by the midpoints of the ascending codebook, mₖ = (cₖ + cₖ₊₁)/2: the number of
    midpoints below w/s is the index. At a midpoint the lower entry is taken, the first of a codebook that
    ascends; `nearest_codes` follows the same rule. A codebook need not ascend, training moves its entries.

    Gradients, with g = ∂L/∂y:
        ∂L/∂w  = g                        (straight through)
        ∂L/∂s  = Σ g·c[k]                 over the group, row or tensor that s belongs to
        ∂L/∂cⱼ = Σ g·s  where k = j       over all that c belongs to
    """

    inputs: ClassVar[tuple[str, ...]] = ("w", "codebook", "scale?")
    training_form: ClassVar[bool] = True
    attributes: ClassVar[Mapping[str, Attribute]] = {
        "axes": Attribute(onnx_ir.AttributeType.INTS, (0,)),
        "group_size": Attribute(onnx_ir.AttributeType.INT, 0),
    }

    def geometry(self, node: onnx_ir.Node) -> Geometry:
        """The matrix of rows and groups that the weight is seen as."""
        given = node.attributes
        return Geometry(
            static_shape(node, self.input(node, "w")), given["axes"].as_ints(), given["group_size"].as_int()
        )

    def grid(self, node: onnx_ir.Node) -> grids.Grid:
        """The extents of codebook and scale."""
        kinds = {"codebook": grids.codebook_kind(static_shape(node, self.input(node, "codebook")))}
        if self.input(node, "scale") is not None:
            rows, groups = static_shape(node, self.input(node, "scale"))
            kinds["scale"] = grids.kind(rows, groups)
        return grids.Grid(self.geometry(node), kinds)

    def _entries(self, node: onnx_ir.Node) -> int:
        return static_shape(node, self.input(node, "codebook"))[-1]

    def variant(self, node: onnx_ir.Node) -> str:
        """Entries of a codebook, extents, form, transposition."""
        return f"n{self._entries(node)}.{self.grid(node).key}"

    def body(self, op: Body, node: onnx_ir.Node) -> onnx_ir.Value:
        """Search the midpoints by halving: each step compares a weight with one of them, so memory stays that of
        the weight.
        """
        grid, n = self.grid(node), self._entries(node)
        steps = [1 << b for b in reversed(range((n - 1).bit_length()))]
        books = 1 << len(steps)  # a whole tree has 2^steps − 1 midpoints; +∞ fills the missing ones
        shape = op.Shape(op.input("w"))
        spread = grids.Spread(op, grid, shape)
        x = op.Transpose(op.input("w"), perm=grid.geometry.perm) if grid.geometry.is_transposed else op.input("w")
        x = grids.to_grid(op, x, grid, operands=op.inputs, shape=shape)
        scale = spread(op.input("scale"), grid.kinds["scale"]) if "scale" in grid.kinds else None
        if scale is not None:
            x = op.Div(x, scale)
        ascending, _ = op.emit("TopK", [op.input("codebook"), op.constant([n])], {"largest": 0}, outputs=2)
        last = op.constant([-1])
        low = op.Slice(ascending, op.constant([0]), op.constant([n - 1]), last)
        high = op.Slice(ascending, op.constant([1]), op.constant([n]), last)
        middle = op.Mul(op.Add(low, high), op.CastLike(op.constant(0.5, np.float32), low))
        endless = op.CastLike(op.constant(np.inf, np.float32), middle)
        middle = op.Pad(middle, op.constant([0, books - n]), endless, last)
        middle, ascending = op.Reshape(middle, last), op.Reshape(ascending, last)

        own = grid.kinds["codebook"] in "rg"
        first = spread(grids.book_numbers(op, op.input("codebook")), grid.kinds["codebook"]) if own else None
        bound = op.Mul(first, op.constant(books - 1, np.int32)) if first is not None else op.constant(0, np.int32)
        code = op.constant(0, np.int32)
        for step in steps:
            place = op.Add(op.Add(bound, code), op.constant(step - 1, np.int32))
            above = op.Cast(op.Greater(x, op.Gather(middle, place)), to=onnx_ir.DataType.INT32)
            code = op.Add(code, op.Mul(above, op.constant(step, np.int32)))
        if first is not None:
            code = op.Add(code, op.Mul(first, op.constant(n, np.int32)))
        y = op.Gather(ascending, code)
        return grids.from_grid(op, y if scale is None else op.Mul(y, scale), grid, shape)

    def torch(self, node: onnx_ir.Node) -> Callable[..., Any]:
        """The same forward with the gradients of the class docstring, one byte a weight kept for them."""
        from mc_opt.ir.ops import _fake_lookup_torch as reference  # torch is an extra

        geometry = self.geometry(node)

        def fake_lookup(w: Any, codebook: Any, scale: Any = None) -> Any:
            return reference.fake_lookup(w, codebook, scale, geometry)

        return fake_lookup

    def types(self, node: onnx_ir.Node) -> list[Type]:
        """The weight's own."""
        return [(dtype_of(node, node.inputs[0]), onnx_ir.Shape(static_shape(node, node.inputs[0])))]

    def check(self, node: onnx_ir.Node) -> None:
        """Check that codebook and scale fit the weight and have its type.

        Raises:
            IRError: otherwise.
        """
        super().check(node)
        geometry = self.geometry(node)
        geometry.check(where(node))
        grids.check_codebook(node, self.input(node, "codebook"), geometry, 256)
        if self._entries(node) < 2:
            raise IRError(f"{where(node)} codebook has 1 entry, expected at least 2; there is nothing to choose")
        if self.input(node, "scale") is not None:
            grids.check_factor(node, "scale", self.input(node, "scale"), geometry)
        for name in ("codebook", "scale"):
            value = self.input(node, name)
            if value is not None and dtype_of(node, value) != dtype_of(node, node.inputs[0]):
                raise IRError(
                    f"{where(node)} {name} is {dtype_of(node, value)}, expected {dtype_of(node, node.inputs[0])} "
                    "as the weight; cast it"
                )

    def work(self, node: onnx_ir.Node) -> Work:
        """A search and a scaling a weight; a training form has no kernel, this is what the reference does."""
        n = self.geometry(node).count
        steps = (self._entries(node) - 1).bit_length()
        scaled = self.input(node, "scale") is not None
        stored = sum(
            math.prod(static_shape(node, v)) * math.ceil(dtype_of(node, v).itemsize)
            for v in node.inputs
            if v is not None
        )
        return Work(mul=2 * n if scaled else 0, add=steps * n, lookup=n, bytes=stored)

    def samples(self, rng: np.random.Generator) -> Iterator[Example]:
        """Codebooks of 2 to 16 entries, shared and grouped, in any order; scales of every extent; weights that lie
        on midpoints.
        """
        for n in (2, 3, 5, 16):
            yield _sample(rng, f"n{n}", n=n, shape=(6, 11), scale=(6, 1))
        forms: dict[str, dict[str, Any]] = {
            "bare": {},
            "tensor": {"scale": (1, 1)},
            "rows": {"scale": (6, 1)},
            "groups": {"scale": (6, 4)},
            "books": {"books": (6, 4), "scale": (6, 4)},
            "books-of-rows": {"books": (6, 1)},
            "books-of-groups": {"books": (1, 4), "scale": (6, 1)},
        }
        for name, extents in forms.items():
            yield _sample(rng, name, n=8, shape=(6, 12), group_size=3, **extents)
            yield _sample(rng, f"{name}-short", n=7, shape=(6, 11), group_size=3, **extents)
            yield _sample(rng, f"{name}-transposed", n=4, shape=(11, 6), axes=(1,), group_size=3, **extents)
        yield _sample(rng, "conv", n=16, shape=(8, 3, 3, 3), scale=(8, 1))
        yield _sample(rng, "conv-short", n=7, shape=(8, 3, 3, 3), scale=(8, 7), group_size=4)
        yield _sample(rng, "lstm", n=16, shape=(2, 8, 5), axes=(0, 1), scale=(16, 1))
        ties = np.array([[-1.5, -0.75, 0.0, 0.75, 1.5, 3.0]], np.float32)
        yield Example("ties", (ties, np.array([-2, -1, -0.5, 0.5, 1, 2], np.float32)), {})


def _sample(
    rng: np.random.Generator,
    name: str,
    *,
    n: int,
    shape: tuple[int, ...],
    axes: tuple[int, ...] = (0,),
    group_size: int = 0,
    books: tuple[int, ...] = (),
    scale: tuple[int, ...] | None = None,
) -> Example:
    w = rng.standard_normal(shape).astype(np.float32)
    codebook = rng.standard_normal((*books, n)).astype(np.float32)
    factor = None if scale is None else rng.uniform(0.5, 2, scale).astype(np.float32)
    return Example(name, (w, codebook, factor), {"axes": axes, "group_size": group_size})
