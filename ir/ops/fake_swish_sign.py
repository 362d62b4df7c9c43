"""FakeSwishSign: the training form of a weight or an activation that is binarised through SwishSign."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.op import Attribute, Body, Example, Op, Type, Work
from mc_opt.ir.ops import _levels


class FakeSwishSign(Op):
    """y = F(u)·(scale·unit), u = gain·x, with the gradient ∂y/∂u = F_β′(u)·(scale·unit), β the input `sharpness`.

    F_β is a sum of one SwishSign a midpoint m of two levels, of half-gap h; between −1 and 1 it is SS_β itself:
        F_β(u) = −1 + Σ_m h·(1 + SS_{β/h}(u − m))
        SS_β(x) = 2σ(βx)·[1 + βx·(1 − σ(βx))] − 1 = tanh(z) + z·sech²(z),  z = βx/2
        SS_β′(x) = β·(2 − βx·tanh(βx/2)) / (1 + cosh(βx))

    The input `hard`, 0 or 1, says whether F is F_β or the nearest level (at a midpoint the upper one); the gradient
    is that of F_β either way. Hard from the first step on this is BNN+, soft until the end BNN++. SS_β is the
    derivative of Foothill's tanh regulariser p(x) = x·tanh(βx/2), so that it also is Foothill's quantiser.
    ∂L/∂scale = Σ g·F·unit over the row. Papers: Darabi et al., arXiv 1812.11800; Belbahri et al., arXiv 1901.06414;
    Lu et al., NeurIPS 2023. The sum for three levels is ours.
    """

    inputs: ClassVar[tuple[str, ...]] = ("x", "sharpness", "hard", "scale?", "unit?")
    settings: ClassVar[tuple[str, ...]] = ("sharpness", "hard")
    training_form: ClassVar[bool] = True
    attributes: ClassVar[Mapping[str, Attribute]] = {
        "levels": Attribute(onnx_ir.AttributeType.INT, 2),
        "axes": Attribute(onnx_ir.AttributeType.INTS, (0,)),
        "gain": Attribute(onnx_ir.AttributeType.INT, 1),
    }

    def variant(self, node: onnx_ir.Node) -> str:
        """Levels, and how the scale meets the weight."""
        return f"l{node.attributes['levels'].as_int()}.{_levels.key(self, node)}"

    def body(self, op: Body, node: onnx_ir.Node) -> onnx_ir.Value:
        """Both maps, of which `hard` takes one."""
        levels, x = node.attributes["levels"].as_int(), _levels.amplified(op)
        one, half = _levels.number(op, 1, x), _levels.number(op, 1 / (levels - 1), x)
        slope = op.Div(op.CastLike(op.input("sharpness"), x), op.Add(half, half))
        soft, hard = None, None
        for midpoint in _levels.midpoints(levels):
            away = op.Sub(x, _levels.number(op, midpoint, x))
            z = op.Mul(away, slope)
            t = op.Tanh(z)
            swish = op.Add(t, op.Mul(z, op.Sub(one, op.Mul(t, t))))
            step = op.CastLike(op.GreaterOrEqual(away, _levels.number(op, 0, x)), x)
            soft = swish if soft is None else op.Add(soft, swish)
            hard = step if hard is None else op.Add(hard, step)
        assert soft is not None and hard is not None
        nearest = op.Sub(op.Mul(hard, op.Add(half, half)), one)
        is_hard = op.Greater(op.input("hard"), op.constant(0.5, np.float32))
        return _levels.scaled(self, op, node, op.Where(is_hard, nearest, op.Mul(soft, half)))

    def torch(self, node: onnx_ir.Node) -> Callable[..., Any]:
        """The same forward with the gradients of the class docstring."""
        from mc_opt.ir.ops import _fake_levels_torch as reference  # torch is an extra

        levels, gain = (node.attributes[name].as_int() for name in ("levels", "gain"))
        geometry = _levels.geometry(self, node)

        def fake_swish_sign(x: Any, sharpness: Any, hard: Any, scale: Any = None, unit: Any = None) -> Any:
            y = reference.swish_sign(x * gain, sharpness, hard, levels=levels)
            return reference.scaled(y, scale, unit, geometry)

        return fake_swish_sign

    def learns(self, node: onnx_ir.Node, index: int) -> bool:
        """The latent weight and its scale; the unit stays."""
        return super().learns(node, index) and self.inputs[index] != "unit?"

    def types(self, node: onnx_ir.Node) -> list[Type]:
        """That of x."""
        return _levels.types(node)

    def check(self, node: onnx_ir.Node) -> None:
        """Check levels and settings, and that scale and unit fit the rows.

        Raises:
            IRError: otherwise.
        """
        super().check(node)
        _levels.check(self, node)

    def work(self, node: onnx_ir.Node) -> Work:
        """What the reference does: a tanh, products and sums a midpoint; a training form has no kernel."""
        n, steps = _levels.elements(node), node.attributes["levels"].as_int() - 1
        return Work(mul=(3 * steps + 1) * n, add=4 * steps * n, lookup=steps * n, bytes=_levels.stored_bytes(node))

    def samples(self, rng: np.random.Generator) -> Iterator[Example]:
        """Both level sets, soft and hard; scales of rows along every axis; an activation."""
        for levels in _levels.LEVELS:
            for sharpness, hard in ((1.5, 0), (20.0, 0), (20.0, 1)):
                yield _sample(rng, f"l{levels}-{sharpness}-{hard}", (5, 7), (sharpness, hard), {"levels": levels})
        for name, shape, axes in _levels.PLACES:
            yield _sample(rng, name, shape, (3.0, 0), {"levels": 2, "axes": axes, "gain": 4})
        x = rng.standard_normal((2, 3, 4, 4)).astype(np.float32)
        yield Example("activation", (x, np.array(5, np.float32), np.array(1, np.float32)), {})
        far = np.array([[-1e4, -40, -1, -0.5, 0, 0.5, 1, 40, 1e4]], np.float32)
        for hard in (0, 1):
            yield Example(f"far-{hard}", (far, np.array(5, np.float32), np.array(hard, np.float32)), {"levels": 3})


def _sample(
    rng: np.random.Generator,
    name: str,
    shape: tuple[int, ...],
    settings: tuple[float, float],
    attributes: Mapping[str, Any],
) -> Example:
    x, scale, unit = _levels.sample(rng, shape, attributes.get("axes", (0,)))
    sharpness, hard = (np.array(value, np.float32) for value in settings)
    return Example(name, (x, sharpness, hard, scale, unit), attributes)
