"""Chains of Kronecker factors against the dense layer with the weight that they stand for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx_ir
import onnxruntime
import pytest
from hypothesis import assume, given, settings

from mc_opt import ir

STRUCTURES = ("gkpd", "cp", "tt", "tucker", "sekron")


def carries(structure: str, count: int) -> list[set[int]]:
    """The rank axes that each of `count` factors carries; the shapes say which structure it is."""
    last = count - 1
    match structure:
        case "gkpd" | "cp":
            return [{0} for _ in range(count)]
        case "tt":
            return [{r for r in (k - 1, k) if 0 <= r < last} for k in range(count)]
        case "tucker":  # the last factor is the core
            return [{k} for k in range(last)] + [set(range(last))]
        case _:
            return [set(range(min(k + 1, last))) for k in range(count)]


@dataclass(frozen=True)
class Layer:
    """Factors with their number of rank axes, and the window and groups of the dense layer."""

    factors: tuple[np.ndarray, ...]
    ranks: int
    attributes: Mapping[str, Any]
    x: np.ndarray
    bias: np.ndarray | None


@st.composite
def layers(draw: st.DrawFn, *, spatial: int) -> Layer:
    """Layers of two or three factors of any structure; spatial=0 is a linear layer."""
    count = draw(st.integers(2, 3))
    structure = draw(st.sampled_from(STRUCTURES))
    carried = carries(structure, count)
    ranks = max(r for axes in carried for r in axes) + 1
    extents = [draw(st.integers(1, 3)) for _ in range(ranks)]
    shapes = [
        tuple(extents[r] if r in axes else 1 for r in range(ranks))
        + tuple(draw(st.integers(1, 3)) for _ in range(2))
        + tuple(draw(st.sampled_from((1, 1, 2, 3))) for _ in range(spatial))
        for axes in carried
    ]
    group = draw(st.sampled_from((1, 1, 2, 3))) if spatial else 1
    outer = list(shapes[0])
    outer[ranks] *= group
    shapes[0] = tuple(outer)
    rng = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    kernel = [math.prod(shape[ranks + 2 + a] for shape in shapes) for a in range(spatial)]
    strides = [draw(st.integers(1, 3)) for _ in range(spatial)]
    dilations = [draw(st.integers(1, 2)) for _ in range(spatial)]
    pads = [draw(st.integers(0, 2)) for _ in range(2 * spatial)]
    sizes = [draw(st.integers(1, 5)) + d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    assume(max(sizes, default=0) <= 24)
    channels = group * math.prod(shape[ranks + 1] for shape in shapes)
    x: np.ndarray = rng.standard_normal((2, channels, *sizes) if spatial else (2, 3, channels))
    factors = tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    outputs = math.prod(shape[ranks] for shape in shapes)
    bias = rng.standard_normal(outputs).astype(np.float32) if draw(st.booleans()) else None
    window = {"strides": strides, "dilations": dilations, "pads": pads, "group": group} if spatial else {}
    return Layer(factors, ranks, window, x.astype(np.float32), bias)


def model_of(layer: Layer, *, symbolic: bool) -> onnx_ir.Model:
    """The layer as a model of one node; `symbolic` leaves the batch and the positions open."""
    shape: list[int | str] = list(layer.x.shape)
    if symbolic:
        shape = ["n", shape[1], *(f"s{k}" for k in range(len(shape) - 2))] if layer.attributes else ["n", "t", shape[2]]
    x = onnx_ir.Value(name="x", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=onnx_ir.Shape(shape))
    op_type = "SeKronConv" if layer.attributes else "KronLinear"
    given_ = [None if layer.bias is None else layer.bias, *layer.factors]
    names = ["bias", *(f"w.factor{k + 1}" for k in range(len(layer.factors)))]
    values = [
        None
        if array is None
        else onnx_ir.Value(
            name=name,
            type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
            shape=onnx_ir.Shape(array.shape),
            const_value=onnx_ir.tensor(array),
        )
        for name, array in zip(names, given_, strict=True)
    ]
    node = ir.node(op_type, [x, *values], layer.attributes, name="layer", output="y")
    constants = [v for v in values if v is not None]
    graph = onnx_ir.Graph(
        [x], list(node.outputs), nodes=[node], initializers=constants, opset_imports={"": 21}, name="g"
    )
    model = onnx_ir.Model(graph, ir_version=10)
    ir.add_functions(model)
    return model


def in_onnx_runtime(model: onnx_ir.Model, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString(), options)
    return np.asarray(session.run(None, {"x": x})[0])


def dense(layer: Layer) -> np.ndarray:
    """The dense layer with the reconstructed weight, in double precision."""
    import torch

    weight = torch.from_numpy(ir.kron_weight([f.astype(np.float64) for f in layer.factors], layer.ranks))
    x = torch.from_numpy(layer.x.astype(np.float64))
    bias = None if layer.bias is None else torch.from_numpy(layer.bias.astype(np.float64))
    if not layer.attributes:
        return np.asarray(torch.nn.functional.linear(x, weight, bias))
    n = weight.dim() - 2
    pads = layer.attributes["pads"]
    sides = [p for axis in reversed(range(n)) for p in (pads[axis], pads[n + axis])]
    convolve = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[n - 1]
    names = {"stride": "strides", "dilation": "dilations", "groups": "group"}
    options = {ours: layer.attributes[theirs] for ours, theirs in names.items()}
    return np.asarray(convolve(torch.nn.functional.pad(x, sides), weight, bias, **options))


def holds(layer: Layer, result: np.ndarray) -> None:
    expected = dense(layer)
    assert result.shape == expected.shape
    # fp32 of at most 729 products of three factors: relative 1e-5.
    assert np.abs(result - expected).max() <= 1e-5 * np.abs(expected).max()


def cancels(layer: Layer) -> bool:
    """Whether terms a hundred times the result cancel in it: then float32 itself leaves no five digits."""
    positive = dataclasses.replace(
        layer,
        factors=tuple(np.abs(f) for f in layer.factors),
        x=np.abs(layer.x),
        bias=None if layer.bias is None else np.abs(layer.bias),
    )
    return float(np.abs(dense(layer)).max()) < 0.01 * float(dense(positive).max())


def sweep(layer: Layer) -> None:
    from mc_opt.ir import interpret

    assume(not cancels(layer))
    model = model_of(layer, symbolic=False)
    holds(layer, in_onnx_runtime(model, layer.x))
    holds(layer, in_onnx_runtime(model_of(layer, symbolic=True), layer.x))
    import torch

    with torch.no_grad():
        result = interpret(model)(torch.from_numpy(layer.x))
    holds(layer, np.asarray(result[0] if isinstance(result, (tuple, list)) else result))


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.ci
@settings(max_examples=60, deadline=None)
@given(layers(spatial=2))
def test_factored_convolution_is_the_dense_one(layer: Layer) -> None:
    sweep(layer)


@pytest.mark.torch
@pytest.mark.parametrize("spatial", [1, 3])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_other_ranks_of_convolution_are_the_dense_one(spatial: int, data: st.DataObject) -> None:
    sweep(data.draw(layers(spatial=spatial)))


@pytest.mark.torch
@settings(max_examples=60, deadline=None)
@given(layers(spatial=0))
def test_factored_product_is_the_dense_one(layer: Layer) -> None:
    sweep(layer)


def test_numbers_of_the_worked_example() -> None:
    """A of shape 2x1x2x1 and B of shape 1x2x1x3, with outputs computed by hand."""
    a = np.array([[1, 2], [3, 4]], np.float32).reshape(1, 2, 1, 2, 1)
    b = np.array([[1, -1, 2], [0, 3, 1]], np.float32).reshape(1, 1, 2, 1, 3)
    weight = ir.kron_weight([a, b], 1)
    assert weight.shape == (2, 2, 2, 3)
    np.testing.assert_array_equal(weight[0, 0], [[1, -1, 2], [2, -2, 4]])
    np.testing.assert_array_equal(weight[1, 1], [[0, 9, 3], [0, 12, 4]])
    window = {"strides": [1, 1], "dilations": [1, 1], "pads": [0] * 4, "group": 1}
    layer = Layer((a, b), 1, window, np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4), None)
    result = in_onnx_runtime(model_of(layer, symbolic=False), layer.x)
    np.testing.assert_array_equal(result, [[[[216, 234], [288, 306]], [[488, 530], [656, 698]]]])


def test_parameters_and_work_of_a_candidate() -> None:
    """Parameters are the factors' elements; a stage multiplies where it runs."""
    shapes = [(4, 8, 2, 1, 1), (4, 2, 16, 3, 3)]  # R = 4, F = 16, C = 32, 3x3
    work = ir.factored_work(shapes, 1, outputs=100)
    first, second = 4 * 2 * 2 * 16 * 9, 4 * 2 * 8 * 2  # R·C1·F2·C2·K, then R·F2·F1·C1
    assert work.mul == (first + second) * 100
    assert work.bytes == 4 * sum(math.prod(s) for s in shapes)


WINDOW = {"strides": [1, 1], "dilations": [1, 1], "pads": [0] * 4, "group": 1}


def conv_node(shapes: list[tuple[int, ...]], channels: int = 6, bias: int = 0, **window: object) -> onnx_ir.Node:
    x = onnx_ir.Value(
        name="x", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=onnx_ir.Shape(["n", channels, 8, "w"])
    )
    arrays = [np.zeros(shape, np.float32) for shape in shapes]
    given_bias = np.zeros(bias, np.float32) if bias else None
    return ir.node("SeKronConv", [x, given_bias, *arrays], {**WINDOW, **window}, output="y")


@pytest.mark.parametrize(
    ("shapes", "change", "message"),
    [
        ([(2, 4, 6, 3, 3)], {}, "y: SeKronConv has 1 factors, expected at least 2; leave the layer dense"),
        ([(2, 4, 3, 1, 1), (2, 2, 2, 3)], {}, r"factor 2 is \[2, 2, 2, 3\], expected the rank of factor 1"),
        ([(4, 3), (2, 2)], {}, r"factor 1 is \[4, 3\], expected \[ranks.., outputs, inputs, kernel..\]"),
        ([(2, 4, 3, 1, 1), (3, 2, 2, 3, 3)], {}, r"rank axis 0 is \[2, 3\] in the factors, expected 1 or one number"),
        ([(2, 4, 3, 1, 1), (1, 2, 2, 3, 3)], {}, r"rank axis 0 is \[2, 1\] in the factors, expected at least two"),
        ([(2, 4, 3, 1, 1), (2, 2, 3, 3, 3)], {}, "x has 6 channels, expected 9, group times the product"),
        ([(2, 4, 1, 1, 1), (2, 2, 2, 3, 3)], {"group": 3}, "group is 3, expected a divisor of F_1 = 4"),
        ([(2, 4, 3, 1, 1), (2, 2, 2, 3, 3)], {"bias": 4}, r"bias is FLOAT\[4\], expected FLOAT\[8\]"),
        ([(2, 4, 3, 1, 1), (2, 2, 2, 3, 3)], {"pads": [1, 1]}, r"pads is \[1, 1\], expected 4 numbers of at least 0"),
        ([(2, 4, 3, 1, 1), (2, 2, 2, 3, 3)], {"strides": [0, 1]}, r"strides is \[0, 1\], expected 2 numbers"),
    ],
)
def test_refuses(shapes: list[tuple[int, ...]], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ir.IRError, match=message):
        conv_node(shapes, **change)


def test_linear_refuses_another_width() -> None:
    x = onnx_ir.Value(name="x", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=onnx_ir.Shape(["n", 7]))
    arrays = [np.zeros((2, 4, 3), np.float32), np.zeros((2, 2, 2), np.float32)]
    with pytest.raises(ir.IRError, match="the last axis of x is 7, expected 6, the product of the factors' inputs"):
        ir.node("KronLinear", [x, None, *arrays], output="y")


def test_layers_of_one_kind_share_a_function() -> None:
    """Sizes, strides and pads are no part of the body; a kernel that two factors own is."""
    small = conv_node([(2, 4, 3, 1, 1), (2, 2, 2, 3, 3)])
    large = conv_node([(5, 8, 4, 1, 1), (5, 3, 3, 5, 5)], 12, pads=[2] * 4, strides=[2, 2])
    split = conv_node([(2, 4, 3, 3, 1), (2, 2, 2, 1, 3)], pads=[1] * 4)
    assert small.overload == large.overload != split.overload


def test_sizes_that_the_window_keeps_stay_symbolic() -> None:
    kept = conv_node([(2, 4, 3, 1, 1), (2, 2, 2, 3, 3)], pads=[1] * 4).outputs[0]
    assert list(kept.shape) == ["n", 8, 8, "w"]
    cut = conv_node([(2, 4, 3, 1, 1), (2, 2, 2, 3, 3)], strides=[2, 2]).outputs[0]
    assert list(cut.shape)[:3] == ["n", 8, 3]
    assert cut.shape[3].value is None


@pytest.mark.parametrize(
    ("shapes", "rows"),
    [
        ([(5, 4, 3, 1, 1), (5, 2, 2, 3, 3)], [(1,), (0, 1)]),  # the inner factor makes the ranks, the outer sums them
        ([(1, 5, 8, 1, 1, 1), (4, 5, 1, 1, 3, 3), (4, 1, 1, 6, 1, 1)], [(2,), (1, 2), (0, 2)]),  # Tucker
        ([(2, 1, 4, 3, 1, 1), (2, 3, 2, 1, 3, 3), (2, 3, 1, 2, 1, 1)], [(2,), (0, 2), (0, 1, 2)]),  # the free form
    ],
)
def test_factors_are_sites_in_rows_of_their_stages_sums(
    shapes: list[tuple[int, ...]], rows: list[tuple[int, ...]]
) -> None:
    rng = np.random.default_rng(0)
    factors = tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    model = model_of(
        Layer(factors, len(shapes[0]) - 4, WINDOW, np.zeros((1, 6, 5, 5), np.float32), None), symbolic=True
    )
    sites = [site for site in ir.weight_sites(model) if isinstance(site, ir.WeightSite)]
    assert [(s.layer, s.kind, s.axes) for s in sites] == [
        (f"w.factor{k + 1}", "SeKronConv", axes) for k, axes in enumerate(rows)
    ]
