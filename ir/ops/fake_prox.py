"""FakeProx: the training form of a weight or an activation that is drawn to levels by a proximal map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.op import Attribute, Body, Example, Op, Type, Work
from mc_opt.ir.ops import _levels

TRANSFORMS = ("identity", "clip", "bireal")
"""T by the number of the attribute `transform`."""


class FakeProx(Op):
    """y = P_κ(T(u))·(scale·unit), u = gain·x, with ∂y/∂u = T′(u)·(scale·unit): forward and backward differ.

    P_κ is a proximal map that κ, the input `sharpness`, leads from the identity (0) to the nearest level (1). Between
    levels a < b of half-gap h it is a up to a + κh, b from b − κh, and linear between; beyond the outermost levels
    its slope is 1 − κ. At the midpoint of two levels the hard map takes the upper one, so sign(0) = 1.

    T is, by `transform`:
        0  u                            T′ = 1: ProxConnect; with κ = 1, BinaryConnect
        1  clip(u, −1, 1)               T′ = 1 where |u| ≤ 1: with κ = 1, BNN
        2  2z − z·|z|, z = clip(u/2)    T′ = 1 − |u|/2 where |u| ≤ 2: with κ = 1, Bi-Real's pair, stretched to T′(0) = 1

    As T increases and P_κ is proximal, (P_κ∘T, T′) is a pair of ProxConnect++. ∂L/∂scale = Σ g·P_κ(T(u))·unit over
    the row. Papers: Dockhorn et al., NeurIPS 2021, and Lu et al., NeurIPS 2023; the map beyond the outermost levels
    and the stretch are ours.
    """

    inputs: ClassVar[tuple[str, ...]] = ("x", "sharpness", "scale?", "unit?")
    settings: ClassVar[tuple[str, ...]] = ("sharpness",)
    training_form: ClassVar[bool] = True
    attributes: ClassVar[Mapping[str, Attribute]] = {
        "levels": Attribute(onnx_ir.AttributeType.INT, 2),
        "transform": Attribute(onnx_ir.AttributeType.INT, 0),
        "axes": Attribute(onnx_ir.AttributeType.INTS, (0,)),
        "gain": Attribute(onnx_ir.AttributeType.INT, 1),
    }

    def _form(self, node: onnx_ir.Node) -> tuple[int, str]:
        return node.attributes["levels"].as_int(), TRANSFORMS[node.attributes["transform"].as_int()]

    def variant(self, node: onnx_ir.Node) -> str:
        """Levels, transform, and how the scale meets the weight."""
        levels, transform = self._form(node)
        return f"l{levels}.{transform}.{_levels.key(self, node)}"

    def body(self, op: Body, node: onnx_ir.Node) -> onnx_ir.Value:
        """The sum of a ramp a midpoint, −1, and what lies beyond the outermost levels."""
        levels, transform = self._form(node)
        x = _levels.amplified(op)
        t = _transformed(op, x, transform)
        one, zero = _levels.number(op, 1, x), _levels.number(op, 0, x)
        free = op.Sub(one, op.CastLike(op.input("sharpness"), x))
        half, gap = _levels.number(op, 0.5, x), _levels.number(op, 2 / (levels - 1), x)
        width = op.Mul(free, gap)
        tiny = _levels.number(op, TINY, x)
        soft = op.Greater(width, tiny)
        safe = op.Max(width, tiny)
        steps = None
        for midpoint in _levels.midpoints(levels):
            m = _levels.number(op, midpoint, x)
            ramp = op.Clip(op.Add(op.Div(op.Sub(t, m), safe), half), zero, one)
            step = op.Where(soft, ramp, op.CastLike(op.GreaterOrEqual(t, m), x))
            steps = step if steps is None else op.Add(steps, step)
        beyond = op.Mul(op.Sub(t, op.Clip(t, op.Neg(one), one)), free)
        return _levels.scaled(self, op, node, op.Add(op.Sub(op.Mul(steps, gap), one), beyond))

    def torch(self, node: onnx_ir.Node) -> Callable[..., Any]:
        """The same forward with the gradients of the class docstring."""
        from mc_opt.ir.ops import _fake_levels_torch as reference  # torch is an extra

        levels, transform = self._form(node)
        geometry, gain = _levels.geometry(self, node), node.attributes["gain"].as_int()

        def fake_prox(x: Any, sharpness: Any, scale: Any = None, unit: Any = None) -> Any:
            y = reference.prox(x * gain, sharpness, levels=levels, transform=transform)
            return reference.scaled(y, scale, unit, geometry)

        return fake_prox

    def learns(self, node: onnx_ir.Node, index: int) -> bool:
        """The latent weight and its scale; the unit stays."""
        return super().learns(node, index) and self.inputs[index] != "unit?"

    def types(self, node: onnx_ir.Node) -> list[Type]:
        """That of x."""
        return _levels.types(node)

    def check(self, node: onnx_ir.Node) -> None:
        """Check levels, transform, and that scale and unit fit the rows.

        Raises:
            IRError: otherwise.
        """
        super().check(node)
        _levels.check(self, node)
        _levels.check_choice(node, "transform", TRANSFORMS)

    def work(self, node: onnx_ir.Node) -> Work:
        """What the reference does: a transform, a ramp a midpoint, a product; a training form has no kernel."""
        n, ramps = _levels.elements(node), node.attributes["levels"].as_int() - 1
        return Work(mul=(3 + ramps) * n, add=(3 + 2 * ramps) * n, bytes=_levels.stored_bytes(node))

    def samples(self, rng: np.random.Generator) -> Iterator[Example]:
        """Both level sets and all transforms, from soft to hard; scales of rows along every axis; an activation."""
        for levels in _levels.LEVELS:
            for transform, name in enumerate(TRANSFORMS):
                for sharpness in (0.0, 0.6, 1.0):
                    form = {"levels": levels, "transform": transform}
                    yield _sample(rng, f"l{levels}-{name}-{sharpness}", (5, 7), sharpness, form)
        for name, shape, axes in _levels.PLACES:
            yield _sample(rng, name, shape, 0.5, {"levels": 3, "axes": axes, "gain": 4})
        x = rng.standard_normal((2, 3, 4, 4)).astype(np.float32)
        yield Example("activation", (x, np.array(0.5, np.float32)), {"transform": 1})
        ties = np.array([[-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]], np.float32)
        for levels in _levels.LEVELS:
            yield Example(f"ties-{levels}", (ties, np.array(1, np.float32)), {"levels": levels})


TINY = 1e-6
"""A ramp narrower than this is a step."""


def _sample(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], sharpness: float, attributes: Mapping[str, Any]
) -> Example:
    x, scale, unit = _levels.sample(rng, shape, attributes.get("axes", (0,)))
    return Example(name, (x, np.array(sharpness, np.float32), scale, unit), attributes)


def _transformed(op: Body, x: onnx_ir.Value, transform: str) -> onnx_ir.Value:
    match transform:
        case "clip":
            one = _levels.number(op, 1, x)
            return op.Clip(x, op.Neg(one), one)
        case "bireal":
            one = _levels.number(op, 1, x)
            z = op.Clip(op.Mul(x, _levels.number(op, 0.5, x)), op.Neg(one), one)
            return op.Sub(op.Add(z, z), op.Mul(z, op.Abs(z)))
        case _:
            return x
