"""Laws of Euclid layers: the identity, what does not change them, their gradients, and what float32 loses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir
import pytest

from mc_opt import ir

WINDOW = {"strides": (1, 1), "dilations": (1, 1), "pads": (0, 0, 0, 0)}
PADDED = {"strides": (2, 1), "dilations": (1, 2), "pads": (1, 0, 2, 1)}


def layer(op: str, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> onnx_ir.Model:
    """A model of one node whose operands are all inputs."""
    values = []
    for name, array in arrays.items():
        kind = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype))
        values.append(onnx_ir.Value(name=name, type=kind, shape=onnx_ir.Shape(array.shape)))
    node = ir.node(op, values, attributes, name="layer", output="y")
    graph = onnx_ir.Graph(values, list(node.outputs), nodes=[node], opset_imports={"": 21}, name="g")
    model = onnx_ir.Model(graph, ir_version=10)
    ir.add_functions(model)
    ir.verify(model)
    return model


def run(op: str, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(ir.Session(layer(op, arrays, attributes)).run(arrays)["y"])


def operands(seed: int = 0, group: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((2, 4, 6, 7)).astype(np.float32),
        "w": rng.standard_normal((6, 4 // group, 3, 2)).astype(np.float32),
    }


def test_a_common_shift_changes_nothing() -> None:
    """S(x + c, w + c) = S(x, w), where no zeros are added around x."""
    arrays = operands()
    moved = {name: array + np.float32(0.75) for name, array in arrays.items()}
    want, got = (run("EuclidConv", a, WINDOW) for a in (arrays, moved))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_weight_at_its_input_gives_zero_up_to_rounding() -> None:
    """The three terms cancel: what is left is an error of a few u·½(‖x‖ + ‖w‖)², u = 2⁻²⁴."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((8, 512)).astype(np.float32)
    y = run("EuclidLinear", {"x": w, "w": w}, {"transB": 1})
    norms = np.linalg.norm(w.astype(float), axis=1)
    assert np.all(np.abs(np.diag(y)) <= np.sqrt(512) * 2**-24 * 0.5 * (2 * norms) ** 2)


@pytest.mark.parametrize("group", [1, 2])
def test_no_strength_is_the_convolution_to_the_bit(group: int) -> None:
    arrays = operands(group=group) | {"strength": np.array(0, np.float32)}
    got = run("FakeEuclidConv", arrays, {**PADDED, "group": group})
    text = (
        '<ir_version: 10, opset_import: ["": 21]> g (float[2,4,6,7] x, float[6,C,3,2] w) => (float[2,6,a,b] y) '
        f"{{ y = Conv <strides=[2,1], dilations=[1,2], pads=[1,0,2,1], group={group}> (x, w) }}"
    )
    plain = onnx_ir.from_onnx_text(text)
    want = ir.Session(plain).run({n: arrays[n] for n in ("x", "w")})["y"]
    assert np.array_equal(got, want)


@pytest.mark.parametrize("op", ["FakeEuclidConv", "EuclidConv"])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.torch
def test_gradients_are_those_of_finite_differences(op: str, group: int) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    arrays = {
        "x": rng.standard_normal((1, 4, 4, 5)).astype(np.float32),
        "w": rng.standard_normal((4, 4 // group, 2, 3)).astype(np.float32),
    }
    if op == "FakeEuclidConv":
        arrays["strength"] = np.array(0.7, np.float32)
    module = ir.interpret(layer(op, arrays, {**PADDED, "group": group}))
    given = [torch.tensor(a, dtype=torch.float64, requires_grad=n != "strength") for n, a in arrays.items()]
    assert torch.autograd.gradcheck(lambda *tensors: module.double()(*tensors)[0], given)


@pytest.mark.torch
def test_gradients_follow_their_formula() -> None:
    """∂S/∂w = x − w and ∂S/∂x = w − x."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    arrays = {"x": rng.standard_normal((1, 5)).astype(np.float32), "w": rng.standard_normal((1, 5)).astype(np.float32)}
    module = ir.interpret(layer("EuclidLinear", arrays, {"transB": 1}))
    x, w = (torch.tensor(a, requires_grad=True) for a in arrays.values())
    module(x, w)[0].sum().backward()
    np.testing.assert_allclose(w.grad, arrays["x"] - arrays["w"], atol=1e-6)
    np.testing.assert_allclose(x.grad, arrays["w"] - arrays["x"], atol=1e-6)


def test_sums_of_squares_of_half_precision_do_not_overflow() -> None:
    x = np.full((1, 16), 120, np.float16)  # Σ x² = 230400, above the 65504 of half precision
    y = run("EuclidLinear", {"x": x, "w": np.full((16, 1), 119, np.float16)}, {})
    assert y.item() == -8.0


@pytest.mark.parametrize(
    ("op", "shapes", "attributes", "message"),
    [
        ("EuclidConv", [(1, 4, 5, 5), (6, 3, 3, 3)], WINDOW, "x has 4 channels, expected 3"),
        ("EuclidConv", [(1, 4, 5, 5), (6, 4, 3)], WINDOW, "x has rank 4, w 3"),
        ("EuclidConv", [(1, 4, 5, 5), (6, 4, 3, 3), (5,)], WINDOW, r"bias is \[5\], expected \[6\]"),
        ("EuclidConv", [(1, 4, 5, 5), (6, 4, 3, 3)], {**WINDOW, "strides": (0, 1)}, "strides is"),
        ("EuclidLinear", [(2, 4), (3, 5)], {}, "the last axis of x is 4, expected 3"),
        ("EuclidLinear", [(2, 4), (1, 4, 5)], {}, "expected a matrix"),
        ("FakeEuclidLinear", [(2, 4), (4, 5), (1,)], {}, "strength is no FLOAT scalar"),
    ],
)
def test_refuses(op: str, shapes: list[tuple[int, ...]], attributes: dict[str, Any], message: str) -> None:
    arrays = {f"i{k}": np.zeros(shape, np.float32) for k, shape in enumerate(shapes)}
    with pytest.raises(ir.IRError, match=message):
        layer(op, arrays, attributes)
