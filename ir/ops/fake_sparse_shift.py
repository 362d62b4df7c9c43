"""FakeSparseShift: the training form of a shift weight that may be 0, whose code is decided by latents (S3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.op import Attribute, Body, Example, Op, Type, Work, dtype_of, static_shape
from mc_opt.ir.ops import _shift_steps as shifts

_MOST = 6  # steps: a code of 4 bits


class FakeSparseShift(Op):
    """y = Sgn(sign)·H(value)·2^S·(scale·gain), with S counted by the steps as in FakeShift; without steps S is 0.

    `sign`, `value` and each step have the weight's shape; rows, groups and extents are those of Lookup. `gain` is what
    is learned of the scale; it starts at 1. Gradients, with g = ∂L/∂y (Li et al., "S3: Sign-Sparse-Shift
    Reparametrization", arXiv 2107.03453, and its released code): those of the true value, H and Sgn passing them
    straight through.
        ∂L/∂sign  = g·H(value)·2^S·scale·gain
        ∂L/∂value = g·Sgn(sign)·2^S·scale·gain
        ∂L/∂stepⱼ = g·ln 2·y·(Sⱼ₋₁ + 1)·Π_{i>j} H(stepᵢ)
        ∂L/∂gain  = Σ g·Sgn(sign)·H(value)·2^S·scale
    """

    inputs: ClassVar[tuple[str, ...]] = ("sign", "value", "scale", "gain", "step*")
    training_form: ClassVar[bool] = True
    attributes: ClassVar[Mapping[str, Attribute]] = {
        "axes": Attribute(onnx_ir.AttributeType.INTS, (0,)),
        "group_size": Attribute(onnx_ir.AttributeType.INT, 0),
    }

    def variant(self, node: onnx_ir.Node) -> str:
        """Steps, extent of the scale, form, transposition."""
        return f"n{len(node.inputs) - 4}.{shifts.grid_of(self, node).key}"

    def body(self, op: Body, node: onnx_ir.Node) -> onnx_ir.Value:
        """The recursion in whole numbers, a table of powers, a 0 that has no sign, and the scale."""
        steps = [op.input(name) for name in self.formal(len(node.inputs))[4:]]
        power = shifts.signed_power(op, op.input("sign"), shifts.exponent(op, steps), len(steps))
        zero = op.CastLike(op.constant(0, np.float32), power)
        levels = op.Where(op.Greater(op.input("value"), zero), power, zero)
        return shifts.scaled(op, levels, shifts.grid_of(self, node))

    def torch(self, node: onnx_ir.Node) -> Callable[..., Any]:
        """The same forward with the gradients of the class docstring."""
        from mc_opt.ir.ops import _fake_shift_torch as reference  # torch is an extra

        geometry = shifts.geometry_of(node)
        levels, slopes = tables(len(node.inputs) - 4)

        def fake_sparse_shift(sign: Any, value: Any, scale: Any, gain: Any, *steps: Any) -> Any:
            return reference.shift_form((sign, value, *steps), scale * gain, levels, slopes, geometry)

        return fake_sparse_shift

    def learns(self, node: onnx_ir.Node, index: int) -> bool:
        """All but the scale, which the gain changes."""
        return self.formal(len(node.inputs))[index] != "scale"

    def types(self, node: onnx_ir.Node) -> list[Type]:
        """Those of the sign."""
        return [(dtype_of(node, node.inputs[0]), onnx_ir.Shape(static_shape(node, node.inputs[0])))]

    def check(self, node: onnx_ir.Node) -> None:
        """Check that the latents are alike, and that scale and gain fit.

        Raises:
            IRError: otherwise.
        """
        super().check(node)
        shifts.check(self, node, most=_MOST)

    def work(self, node: onnx_ir.Node) -> Work:
        """A comparison a latent, a shift and a product a weight."""
        return shifts.work(node)

    def samples(self, rng: np.random.Generator) -> Iterator[Example]:
        """0, 2 and 6 steps; scales of every extent; latents that are 0."""
        for steps in (0, 2, 6):
            yield _sample(rng, f"n{steps}", steps=steps, shape=(6, 11), scale=(6, 1))
        for name, extent in {"tensor": (1, 1), "rows": (6, 1), "groups": (6, 4)}.items():
            yield _sample(rng, name, steps=2, shape=(6, 12), scale=extent, group_size=3)
            yield _sample(rng, f"{name}-short", steps=2, shape=(6, 11), scale=extent, group_size=3)
            yield _sample(rng, f"{name}-transposed", steps=2, shape=(11, 6), axes=(1,), scale=extent, group_size=3)
        yield _sample(rng, "conv", steps=2, shape=(8, 3, 3, 3), scale=(8, 1))
        yield _sample(rng, "conv-short", steps=6, shape=(8, 3, 3, 3), scale=(8, 7), group_size=4)
        yield _sample(rng, "conv-transpose", steps=2, shape=(3, 8, 2, 2), axes=(1,), scale=(8, 3), group_size=4)
        yield _sample(rng, "lstm", steps=2, shape=(2, 8, 5), axes=(0, 1), scale=(16, 1))
        zeros, ones = np.zeros((1, 4), np.float32), np.ones((1, 1), np.float32)
        yield Example("zeros", (zeros, zeros + 1, ones / 2, ones, zeros, zeros), {})


def tables(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The level of each code and the slopes of its latents: [2^(steps + 2)] and [steps + 2, 2^(steps + 2)].

    Bit 0 of a code is sign ≥ 0, bit 1 is value > 0, bit j + 1 is stepⱼ > 0.
    """
    total, chain = shifts.chain(steps)
    sign, alive = np.array([-1.0, 1.0]), np.array([[0.0], [1.0]])
    power = np.exp2(total)[:, None, None]
    levels = power * np.where(alive > 0, sign, 0.0)  # a 0 has no sign
    of_sign, of_value = np.broadcast_arrays(power * alive, power * sign, levels)[:2]
    of_steps = chain[:, :, None, None] * math.log(2) * levels
    slopes = [table.reshape(1, -1) for table in (of_sign, of_value)] + [of_steps.reshape(steps, levels.size)]
    return levels.reshape(-1), np.concatenate(slopes)


def _sample(
    rng: np.random.Generator,
    name: str,
    *,
    steps: int,
    shape: tuple[int, ...],
    scale: tuple[int, int],
    axes: tuple[int, ...] = (0,),
    group_size: int = 0,
) -> Example:
    latents = rng.normal(0.3, 1, (steps + 2, *shape)).astype(np.float32)
    factors = rng.uniform(0.5, 2, (2, *scale)).astype(np.float32)
    return Example(name, (*latents[:2], *factors, *latents[2:]), {"axes": axes, "group_size": group_size})
