"""FakeMask: the training form of pruning, a value that is 0 where theta is not above a threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.op import Attribute, Body, Example, Op, Type, Work, dtype_of, static_shape, where


class FakeMask(Op):
    """y = x where m is 1, else 0;  m = 1[θ > τ], and with `least` also 1 where θ is largest, so that some stay.

    theta: [n], or of x's shape: one for each element. Along `axis` of x position p has θ[p] (n = 1: all have the
    one), or θ[index[p]], where an index of −1 says that the position has none and always stays.

    Gradients, with g = ∂L/∂y and the smooth m̃ = σ(β·(θ − τ)) of sharpness β in the place of m:
        ∂L/∂x = g·m
        ∂L/∂θ = m·Σ g·x·β·m̃·(1 − m̃)          over the positions that it belongs to
    What is masked gets none from here: near the threshold it would come back at once, for others to be masked.
    """

    inputs: ClassVar[tuple[str, ...]] = ("x", "theta", "threshold", "sharpness", "index?")
    training_form: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = ("threshold", "sharpness")
    attributes: ClassVar[Mapping[str, Attribute]] = {
        "axis": Attribute(onnx_ir.AttributeType.INT, 1),
        "least": Attribute(onnx_ir.AttributeType.INT, 0),
    }

    def _rank(self, node: onnx_ir.Node) -> int:
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        if shape is None:
            raise IRError(f"{where(node)}: the rank of input x is unknown; set its shape")
        return len(shape)

    def _is_whole(self, node: onnx_ir.Node) -> bool:
        """Whether theta has x's shape."""
        return len(static_shape(node, self.input(node, "theta"))) > 1

    def _behind(self, node: onnx_ir.Node) -> int:
        """Axes of x behind the masked one."""
        return 0 if self._is_whole(node) else self._rank(node) - 1 - node.attributes["axis"].as_int()

    def variant(self, node: onnx_ir.Node) -> str:
        """Axes behind the masked one, an index, some that stay."""
        indexed = ".index" if self.input(node, "index") is not None else ""
        least = ".least" if node.attributes["least"].as_int() else ""
        return ("whole" if self._is_whole(node) else f"b{self._behind(node)}") + indexed + least

    def body(self, op: Body, node: onnx_ir.Node) -> onnx_ir.Value:
        """Compare, spread along the axis, choose."""
        x, theta = op.input("x"), op.input("theta")
        live = op.Greater(theta, op.input("threshold"))
        if node.attributes["least"].as_int():
            live = op.Or(live, op.Equal(theta, op.ReduceMax(theta, keepdims=1)))
        if self.input(node, "index") is not None:
            # -1 reads the last one, which stays.
            live = op.Gather(op.Concat(live, op.constant([True], np.bool_), axis=0), op.input("index"))
        if behind := self._behind(node):
            live = op.Unsqueeze(live, op.constant(list(range(1, 1 + behind))))
        return op.Where(live, x, op.CastLike(op.constant(0, np.float32), x))

    def torch(self, node: onnx_ir.Node) -> Callable[..., Any]:
        """The same forward with the gradients of the class docstring."""
        from mc_opt.ir.ops import _fake_mask_torch as reference  # torch is an extra

        behind, least = self._behind(node), bool(node.attributes["least"].as_int())

        def fake_mask(x: Any, theta: Any, threshold: Any, sharpness: Any, index: Any = None) -> Any:
            return reference.fake_mask(x, theta, threshold, sharpness, index, behind=behind, least=least)

        return fake_mask

    def types(self, node: onnx_ir.Node) -> list[Type]:
        """Those of x."""
        x = node.inputs[0]
        assert x is not None and x.shape is not None
        return [(dtype_of(node, x), onnx_ir.Shape(tuple(x.shape)))]

    def check(self, node: onnx_ir.Node) -> None:
        """Check that theta, or the index, is as long as the axis.

        Raises:
            IRError: otherwise.
        """
        super().check(node)
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        axis, rank = node.attributes["axis"].as_int(), self._rank(node)
        theta, index = static_shape(node, self.input(node, "theta")), self.input(node, "index")
        assert shape is not None
        if not 0 <= axis < rank:
            raise IRError(f"{where(node)} axis is {axis}, expected 0 to {rank - 1}; correct the pass")
        if len(theta) > 1:
            expected: tuple[object, ...] = tuple(shape)
            given = theta if index is None else ("an index",)
        else:
            expected = (shape[axis],)
            given = theta if index is None else static_shape(node, index)
        if given != expected and not (len(theta) == 1 and given == (1,)):
            raise IRError(
                f"{where(node)} masks {list(given)} of x {list(shape)} along axis {axis}, expected {list(expected)}; "
                "correct the pass"
            )
        for name in self.settings:
            if static_shape(node, self.input(node, name)) != ():
                raise IRError(f"{where(node)} {name} is no scalar, expected shape []; correct the pass")

    def work(self, node: onnx_ir.Node) -> Work:
        """A comparison a theta; a training form has no kernel, this is what the reference does."""
        theta = math.prod(static_shape(node, self.input(node, "theta")))
        return Work(add=theta, bytes=4 * theta + 8)

    def samples(self, rng: np.random.Generator) -> Iterator[Example]:
        """Every axis, indices with positions that stay, one theta for all, one for each; none alive."""
        threshold, sharpness = np.array(-0.25, np.float32), np.array(4, np.float32)
        forms: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, list[int] | None]] = {
            "conv": ((2, 6, 3, 3), (6,), 1, None),
            "last": ((4, 5), (5,), 1, None),
            "first": ((6, 3), (6,), 0, None),
            "flat": ((2, 8), (4,), 1, [0, 0, 1, 1, 2, 2, 3, 3]),
            "joined": ((2, 5, 2), (3,), 1, [2, 0, -1, -1, 1]),
            "branch": ((2, 3, 4), (1,), 1, None),
            "weight": ((4, 3, 2), (4, 3, 2), 1, None),
            "lstm": ((2, 12, 3), (3,), 2, None),
        }
        for name, (shape, theta, axis, index) in forms.items():
            for least in (0, 1):
                arrays = [rng.standard_normal(s).astype(np.float32) for s in (shape, theta)]
                places = None if index is None else np.array(index)
                yield Example(
                    f"{name}-least{least}", (*arrays, threshold, sharpness, places), {"axis": axis, "least": least}
                )
        x = rng.standard_normal((2, 3)).astype(np.float32)
        for least in (0, 1):
            attributes = {"axis": 1, "least": least}
            yield Example(
                f"gone-least{least}", (x, np.array([-1, -2, -0.5], np.float32), threshold, sharpness), attributes
            )
