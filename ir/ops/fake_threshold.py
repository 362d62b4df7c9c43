"""FakeThreshold: the training form of a weight that becomes binary or ternary, as its shape parameter says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.op import Attribute, Body, Example, Op, Type, Work, static_shape, where
from mc_opt.ir.ops import _levels

LOWEST, HIGHEST = math.pi / 4, math.pi / 2 - 1e-3
"""Where β is held."""
BINARY = math.pi / 2 - 0.05
"""A layer of a larger β is binary."""
FEW = 20
"""A layer with fewer than one zero in so many weights is binary."""


def threshold(x: np.ndarray, beta: float) -> float:
    """x: any shape -> Δ, below which |x| becomes 0; 0 where the whole of x is binary."""
    tangent = math.tan(float(np.clip(np.float32(beta), np.float32(LOWEST), np.float32(HIGHEST))))
    delta = float(x.dtype.type(1 / (1 + math.sqrt(tangent))))
    few = int((np.abs(x) < delta).sum()) * FEW < x.size
    return 0.0 if few or np.float32(beta) > np.float32(BINARY) else delta


class FakeThreshold(Op):
    """y = t(u)·(scale·unit), u = gain·x, t(u) = 0 where |u| < Δ, else sign(u), with sign(0) = 1.

    Δ = 1/(1 + √tan β), β held in [π/4, π/2), is where the outer wells of Smart Quantization's regulariser meet the
    middle one: ½ for β = π/4, and 0, which is binary, for β → π/2. u is binary, Δ = 0, as soon as β > π/2 − 0.05 or Δ
    leaves less than one zero in 20 weights.

    Gradients, with g = ∂L/∂y:
        ∂L/∂u     = g·(scale·unit)                                        (straight through)
        ∂L/∂scale = Σ g·t(u)·unit                                         over the row
        ∂L/∂β     = −Σ g·(scale·unit)·sign(u)/(2Δ)·dΔ/dβ, |u| < 2Δ        t as a ramp of width 2Δ about Δ

    Paper: Razani et al., "Adaptive Binary-Ternary Quantization", arXiv 1909.12205. When a layer is binary, and the
    gradient of β, are ours.
    """

    inputs: ClassVar[tuple[str, ...]] = ("x", "beta", "scale?", "unit?")
    training_form: ClassVar[bool] = True
    attributes: ClassVar[Mapping[str, Attribute]] = {
        "axes": Attribute(onnx_ir.AttributeType.INTS, (0,)),
        "gain": Attribute(onnx_ir.AttributeType.INT, 1),
    }

    def variant(self, node: onnx_ir.Node) -> str:
        """How the scale meets the weight."""
        return _levels.key(self, node)

    def body(self, op: Body, node: onnx_ir.Node) -> onnx_ir.Value:
        """Compare with Δ, or with 0 where all of x is binary."""
        x = _levels.amplified(op)
        beta = op.Cast(op.input("beta"), to=onnx_ir.DataType.FLOAT)
        one, zero = _levels.number(op, 1, x), _levels.number(op, 0, x)
        held = op.Clip(beta, op.constant(LOWEST, np.float32), op.constant(HIGHEST, np.float32))
        root = op.Add(op.Sqrt(op.Tan(held)), op.constant(1, np.float32))
        delta = op.CastLike(op.Reciprocal(root), x)
        size = op.Abs(x)
        zeros = op.ReduceSum(op.Cast(op.Less(size, delta), to=onnx_ir.DataType.INT64), keepdims=0)
        few = op.Less(op.Mul(zeros, op.constant(FEW)), op.Size(x))
        binary = op.Or(few, op.Greater(beta, op.constant(BINARY, np.float32)))
        bound = op.Where(binary, zero, delta)
        signs = op.Where(op.GreaterOrEqual(x, zero), one, op.Neg(one))
        return _levels.scaled(self, op, node, op.Where(op.Less(size, bound), zero, signs))

    def torch(self, node: onnx_ir.Node) -> Callable[..., Any]:
        """The same forward with the gradients of the class docstring."""
        from mc_opt.ir.ops import _fake_levels_torch as reference  # torch is an extra

        geometry, gain = _levels.geometry(self, node), node.attributes["gain"].as_int()

        def fake_threshold(x: Any, beta: Any, scale: Any = None, unit: Any = None) -> Any:
            return reference.scaled(reference.threshold(x * gain, beta), scale, unit, geometry)

        return fake_threshold

    def learns(self, node: onnx_ir.Node, index: int) -> bool:
        """The latent weight, β and the scale; the unit stays."""
        return super().learns(node, index) and self.inputs[index] != "unit?"

    def types(self, node: onnx_ir.Node) -> list[Type]:
        """That of x."""
        return _levels.types(node)

    def check(self, node: onnx_ir.Node) -> None:
        """Check that β is one number, and that scale and unit fit the rows.

        Raises:
            IRError: otherwise.
        """
        super().check(node)
        _levels.check(self, node)
        shape = static_shape(node, self.input(node, "beta"))
        if shape:
            raise IRError(f"{where(node)} beta is {list(shape)}, expected one number of shape []; reshape it")

    def work(self, node: onnx_ir.Node) -> Work:
        """What the reference does: two comparisons, a count, a product; a training form has no kernel."""
        n = _levels.elements(node)
        return Work(mul=n, add=4 * n, bytes=_levels.stored_bytes(node))

    def samples(self, rng: np.random.Generator) -> Iterator[Example]:
        """β from below its range to above it; a layer with few zeros; scales of rows along every axis."""
        for beta in (0.5, 0.9, 1.3, 1.53, 1.7):
            yield _sample(rng, f"beta-{beta}", (5, 7), beta, (0,))
        for name, shape, axes in _levels.PLACES:
            yield _sample(rng, name, shape, 1.0, axes)
        x = rng.choice([-1.0, 1.0], (4, 25)).astype(np.float32)
        for zeros in (4, 5):
            x[0, :zeros] = 0.1
            yield Example(f"zeros-{zeros}", (x.copy(), np.array(1, np.float32)), {})


def _sample(rng: np.random.Generator, name: str, shape: tuple[int, ...], beta: float, axes: tuple[int, ...]) -> Example:
    x, scale, unit = _levels.sample(rng, shape, axes)
    return Example(name, (x, np.array(beta, np.float32), scale, unit), {"axes": axes, "gain": 2})
