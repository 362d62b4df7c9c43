from __future__ import annotations

import numpy as np
import onnx_ir
import pytest
from onnx import shape_inference

from mc_opt import ir
from tests.targets._kernels import check, compare, feeds, machine, model, normal, running

pytestmark = [pytest.mark.tvm, pytest.mark.slow, pytest.mark.ci]


def _samples(op):
    return {s.name: s for s in ir.find_op(op).samples(np.random.default_rng(0)) if s.inputs[0].dtype == np.float32}


SAMPLES = {(op, name): sample for op in ("EuclidConv", "EuclidLinear") for name, sample in _samples(op).items()}
FEW = [("EuclidConv", "padded-bias"), ("EuclidConv", "groups-dilated"), ("EuclidLinear", "bias")]


def _text(key, *, lead=(), weight="w", nodes="", sample=None):
    """The text of a sample and its weights; `lead` replaces the first sizes of x, `weight` and `nodes` its weight."""
    x, w, bias = (*(sample or SAMPLES[key]).inputs, None)[:3]
    attributes = (sample or SAMPLES[key]).attributes
    given = ", ".join(f"{k}={list(v) if isinstance(v, tuple) else v}" for k, v in attributes.items())
    shape = (*lead, *x.shape[len(lead) :])
    out = ",".join(f"d{i}" for i in range(x.ndim))
    weights = {"bias": bias} if bias is not None else {}
    weights |= {"w": w} if weight == "w" else {}
    operands = f"x, {weight}{', bias' if bias is not None else ''}"
    made = "" if weight == "w" else f"<float[{','.join(map(str, w.shape))}] {weight}>"
    head = f"g (float[{','.join(map(str, shape))}] x) => (float[{out}] y) {made}"
    return f"{head} {{ {nodes} c = mc_opt.{key[0]}<{given}>({operands}) y = Relu(c) }}", weights


@pytest.mark.parametrize("key", SAMPLES, ids="-".join)
def test_layer(key):
    text, weights = _text(key)
    check(text.replace("y = Relu", "y = Neg"), weights)  # all but a bias is negative


@pytest.mark.parametrize("key", FEW, ids="-".join)
def test_layer_on_avx2(key):
    check(*_text(key), cpu="x86-64-v3")


@pytest.mark.parametrize("key", FEW, ids="-".join)
def test_open_batch(key):
    text, weights = _text(key, lead=("b",))
    check(text.replace("y = Relu", "y = Neg"), weights, sizes=[{"b": b} for b in (1, 2, 7, 13)])


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("op", ["EuclidConv", "EuclidLinear"])
def test_packed_weight(op, rows):
    """‖w‖² of a packed weight is that of what it decodes to."""
    attributes = {"strides": (1, 1), "dilations": (1, 1), "pads": (1,) * 4, "group": 1} if op == "EuclidConv" else {}
    shape, x = ((16, 8, 3, 3), (1, 8, 5, 6)) if op == "EuclidConv" else ((16, 48), (rows, 48))
    codes = np.random.default_rng(3).integers(0, 16, shape).astype(np.uint8)
    weights = {
        "codes": ir.pack_codes(codes, 4),
        "book": normal(16),
        "scale": (np.random.default_rng(4).random((16, 1)) + 0.5).astype(np.float32),
    }
    nodes = f"w4 = mc_opt.Lookup<bits=4, shape={list(shape)}, axes=[0], group_size=0>(codes, book, scale)"
    sample = ir.Example("", (normal(*x), np.zeros(shape), normal(16)), attributes or {"transB": 1})
    text, rest = _text((op, ""), weight="w4", nodes=nodes, sample=sample)
    check(text.replace("y = Relu", "y = Neg"), weights | rest)


@pytest.mark.parametrize("key", FEW, ids="-".join)
def test_weight_that_the_model_computes(key):
    w = SAMPLES[key].inputs[1]
    nodes = "w2 = mc_opt.AddSparse(w1, at, values)"
    text, rest = _text(key, weight="w2", nodes=nodes)
    check(text, rest | {"w1": w, "at": np.array([0, w.size - 1]), "values": normal(2)}, quiet=False)


@pytest.mark.parametrize("channels", [24, 32, 33])
def test_sums_of_any_number_of_channels(channels):
    attributes = {"strides": (1, 1), "dilations": (1, 1), "pads": (1,) * 4, "group": 1}
    sample = ir.Example("", (normal(1, channels, 7, 9), normal(8, channels, 3, 3), None), attributes)
    text, rest = _text(("EuclidConv", ""), sample=sample)
    check(text.replace("y = Relu", "y = Neg"), rest)


INTEGER = {
    (op, s.name): s
    for op in ("EuclidConvInteger", "EuclidLinearInteger")
    for s in ir.find_op(op).samples(np.random.default_rng(0))
}


@pytest.mark.parametrize("key", INTEGER, ids="-".join)
def test_integers_are_exact(key):
    """The input's codes come from a QuantizeLinear, as the pass writes it; sums above 2²⁴ lose nothing before they are
    floats, which both sides round alike.
    """
    sample = INTEGER[key]
    attributes = ", ".join(f"{k}={list(v) if isinstance(v, tuple) else v}" for k, v in sample.attributes.items())
    shape, out = sample.inputs[0].shape, ",".join(f"d{i}" for i in range(sample.inputs[0].ndim))
    text = (
        f"g (float[{','.join(map(str, shape))}] x) => (float[{out}] y) {{ q = QuantizeLinear(x, scale, zero) "
        f"c = mc_opt.{key[0]}<{attributes}>(q, w) y = DequantizeLinear(c, scale) }}"
    )
    weights = {"scale": np.array(2.0**-5, np.float32), "zero": np.array(0, np.int8), "w": sample.inputs[1]}
    whole = onnx_ir.from_proto(shape_inference.infer_shapes(model(text, weights)))
    ir.add_functions(whole)  # no kernel takes these ops: their bodies run
    proto = onnx_ir.to_proto(whole)
    with running(proto, machine()) as (run, _):
        compare(proto, run, feeds(proto))


@pytest.mark.parametrize("kind", ["plain", "groups", "depthwise", "centred"])
def test_conv_integer(kind):
    """ConvInteger with zero points of the input and the weight."""
    groups = {"groups": 2, "depthwise": 4}.get(kind, 1)
    rng = np.random.default_rng(0)
    weights = {
        "scale": np.array(0.05, np.float32),
        "zero": np.array(3 if kind == "centred" else 0, np.int8),
        "w": rng.integers(-128, 128, (8, 4 // groups, 3, 3)).astype(np.int8),
    }
    operands = "q, w"
    if kind == "centred":
        operands += ", zero, point"
        weights["point"] = np.array(-4, np.int8)
    text = (
        "g (float[1,4,6,7] x) => (int32[1,8,a,b] y) { q = QuantizeLinear(x, scale, zero) "
        f"y = ConvInteger<pads=[1,1,1,1], strides=[1,2], group={groups}>({operands}) }}"
    )
    check(text, weights, quiet=False)


def test_conv_integer_with_a_zero_point_of_each_output():
    """ONNX Runtime has none: beside the same weight with its zero points subtracted."""
    rng = np.random.default_rng(0)
    w, point = rng.integers(-100, 100, (8, 4, 3, 3)).astype(np.int8), rng.integers(-9, 9, 8).astype(np.int8)
    weights = {"scale": np.array(0.05, np.float32), "zero": np.array(0, np.int8), "w": w, "point": point}
    text = "g (float[1,4,6,7] x) => (int32[1,8,a,b] y) { q = QuantizeLinear(x, scale, zero) y = ConvInteger(q, w%s) }"
    given = model(text % ", zero, point", weights)
    plain = model(text % "", weights | {"w": w - point.reshape(-1, 1, 1, 1)})
    with running(given, machine()) as (run, _):
        compare(plain, run, feeds(given))
