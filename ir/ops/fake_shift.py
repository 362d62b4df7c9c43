"""FakeShift: the training form of a zero-free shift weight, whose code is decided by latents (DenseShift)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.op import Attribute, Body, Example, Op, Type, Work, dtype_of, static_shape
from mc_opt.ir.ops import _shift_steps as shifts

_MOST = 7  # steps: a code of 4 bits


class FakeShift(Op):
    """y = Sgn(sign)·2^S·(scale·gain), with S counted by the steps; rows, groups and extents are those of Lookup.

        S₀ = 0, Sⱼ = (Sⱼ₋₁ + 1)·H(stepⱼ)    S of the last step is in {0, .., number of steps}

    `sign` and each step have the weight's shape. `gain` is what is learned of the scale: it starts at 1, so that one
    learning rate serves it and the latents, whatever the weight's range. Gradients, with g = ∂L/∂y (Li et al.,
    "DenseShift", arXiv 2208.09708, and its released code): those of Sgn(sign)·√(S + 1)·(scale·gain) in place of
    2^S, H and Sgn passing them straight through; the gain's is that of y itself.
        ∂L/∂sign  = g·√(S + 1)·scale·gain
        ∂L/∂S     = g·Sgn(sign)/(2·√(S + 1))·scale·gain
        ∂L/∂stepⱼ = ∂L/∂S·(Sⱼ₋₁ + 1)·Π_{i>j} H(stepᵢ)
        ∂L/∂gain  = Σ g·Sgn(sign)·2^S·scale
    """

    inputs: ClassVar[tuple[str, ...]] = ("sign", "scale", "gain", "step*")
    training_form: ClassVar[bool] = True
    attributes: ClassVar[Mapping[str, Attribute]] = {
        "axes": Attribute(onnx_ir.AttributeType.INTS, (0,)),
        "group_size": Attribute(onnx_ir.AttributeType.INT, 0),
    }

    def variant(self, node: onnx_ir.Node) -> str:
        """Steps, extent of the scale, form, transposition."""
        return f"n{len(node.inputs) - 3}.{shifts.grid_of(self, node).key}"

    def body(self, op: Body, node: onnx_ir.Node) -> onnx_ir.Value:
        """The recursion in whole numbers, a table of powers, and the scale over the rows or groups."""
        steps = [op.input(name) for name in self.formal(len(node.inputs))[3:]]
        levels = shifts.signed_power(op, op.input("sign"), shifts.exponent(op, steps), len(steps))
        return shifts.scaled(op, levels, shifts.grid_of(self, node))

    def torch(self, node: onnx_ir.Node) -> Callable[..., Any]:
        """The same forward with the gradients of the class docstring."""
        from mc_opt.ir.ops import _fake_shift_torch as reference  # torch is an extra

        geometry = shifts.geometry_of(node)
        levels, slopes = tables(len(node.inputs) - 3)

        def fake_shift(sign: Any, scale: Any, gain: Any, *steps: Any) -> Any:
            return reference.shift_form((sign, *steps), scale * gain, levels, slopes, geometry)

        return fake_shift

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
        """1, 3 and 7 steps; scales of every extent; latents that are 0."""
        for steps in (1, 3, 7):
            yield _sample(rng, f"n{steps}", steps=steps, shape=(6, 11), scale=(6, 1))
        for name, extent in {"tensor": (1, 1), "rows": (6, 1), "groups": (6, 4)}.items():
            yield _sample(rng, name, steps=3, shape=(6, 12), scale=extent, group_size=3)
            yield _sample(rng, f"{name}-short", steps=3, shape=(6, 11), scale=extent, group_size=3)
            yield _sample(rng, f"{name}-transposed", steps=3, shape=(11, 6), axes=(1,), scale=extent, group_size=3)
        yield _sample(rng, "conv", steps=3, shape=(8, 3, 3, 3), scale=(8, 1))
        yield _sample(rng, "conv-short", steps=7, shape=(8, 3, 3, 3), scale=(8, 7), group_size=4)
        yield _sample(rng, "conv-transpose", steps=3, shape=(3, 8, 2, 2), axes=(1,), scale=(8, 3), group_size=4)
        yield _sample(rng, "lstm", steps=3, shape=(2, 8, 5), axes=(0, 1), scale=(16, 1))
        zeros = np.zeros((1, 4), np.float32)
        yield Example("zeros", (zeros, np.full((1, 1), 0.5, np.float32), np.ones((1, 1), np.float32), zeros), {})


def tables(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The level of each code and the slopes of its latents: [2^(steps + 1)] and [steps + 1, 2^(steps + 1)].

    Bit 0 of a code is sign ≥ 0, bit j is stepⱼ > 0.
    """
    total, chain = shifts.chain(steps)
    sign = np.array([-1.0, 1.0])
    levels = np.exp2(total)[:, None] * sign
    of_sign = np.sqrt(total + 1)[:, None] * np.ones(2)
    of_steps = (chain / (2 * np.sqrt(total + 1)))[:, :, None] * sign
    return levels.reshape(-1), np.concatenate([of_sign[None], of_steps]).reshape(steps + 1, -1)


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
    latents = rng.normal(0.3, 1, (steps + 1, *shape)).astype(np.float32)
    factors = rng.uniform(0.5, 2, (2, *scale)).astype(np.float32)
    return Example(name, (latents[0], *factors, *latents[1:]), {"axes": axes, "group_size": group_size})
