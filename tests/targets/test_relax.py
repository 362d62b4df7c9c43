"""Every op without a kernel of its own, held to ONNX Runtime; one compiled module a family, to save time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import tvm
from onnx import parser

from mc_opt import targets
from tests.targets import _kernels

pytestmark = [pytest.mark.tvm, pytest.mark.zig, pytest.mark.slow, pytest.mark.ci]

RNG = np.random.default_rng(0)


def check(
    tmp_path: Path, text: str, feeds: dict[str, np.ndarray], *, target: str = "x86", atol: float = 1e-6
) -> targets.Artefact:
    """Build the model and compare every output with ONNX Runtime's, types and shapes included."""
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]>\n{text}')
    model = onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    targets.parse_target(target).compile(model, tmp_path, lambda *_: None)
    artefact = targets.load_artefact(tmp_path)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    results = artefact.run(feeds)
    for name, expected in zip(results, session.run(None, feeds), strict=True):
        actual = results[name]
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
        # Both sides round every float32 operation; polynomials add a unit or two in the last place.
        np.testing.assert_allclose(actual, expected, rtol=3e-6, atol=atol, err_msg=name)
    return artefact


def graph(inputs: str, lines: list[tuple[str, str]], weights: str = "", before: str = "") -> str:
    """A graph with one output a line: (its type, the node)."""
    outputs = ", ".join(_typed(kind, k) for k, (kind, _) in enumerate(lines))
    body = "\n".join(f"y{k} = {node}" for k, (_, node) in enumerate(lines))
    return f"g ({inputs}) => ({outputs}) {f'<{weights}>' if weights else ''} {{\n{before}\n{body}\n}}"


def _typed(kind: str, k: int) -> str:
    return f"{kind} y{k}"


def test_functions_of_one_element(tmp_path: Path) -> None:
    names = ["Abs", "Neg", "Ceil", "Floor", "Round", "Reciprocal", "Exp", "Sin", "Cos", "Erf", "Sigmoid", "Tanh"]
    names += ["Softplus", "Elu", "Selu", "LeakyRelu", "HardSigmoid", "HardSwish", "Gelu", "Relu", "Sign", "Identity"]
    shape = "[2,3,5,7]"
    lines = [(f"float{shape}", f"{name}(x)") for name in names]
    lines += [
        (f"float{shape}", "Sqrt(p)"),
        (f"float{shape}", "Log(p)"),
        (f"float{shape}", 'Gelu<approximate="tanh">(p)'),
    ]
    lines += [(f"bool{shape}", "IsNaN(x)"), (f"bool{shape}", "IsInf(x)")]
    x = (RNG.standard_normal((2, 3, 5, 7)) * 3).astype(np.float32)
    x.flat[:11] = [0, 0.5, 1.5, 2.5, -0.5, np.nan, np.inf, -np.inf, -100, 100, 1e-30]
    p = np.abs(RNG.standard_normal((2, 3, 5, 7))).astype(np.float32)
    check(tmp_path, graph(f"float{shape} x, float{shape} p", lines), {"x": x, "p": p})


def test_functions_of_several_elements(tmp_path: Path) -> None:
    shape = "[2,3,4]"
    arithmetic = ["Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "PRelu", "Sum", "Mean"]
    lines = [(f"float{shape}", f"{n}(p, q)") for n in arithmetic]
    lines += [(f"bool{shape}", f"{n}(p, q)") for n in ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"]]
    lines += [(f"int64{shape}", f"{n}(a, b)") for n in ["Add", "Sub", "Mul", "Div", "Mod", "Max", "Min"]]
    lines += [(f"int64{shape}", "Mod<fmod=1>(a, b)"), (f"float{shape}", "Mod<fmod=1>(p, q)")]
    lines += [(f"bool{shape}", f"{n}(m, n)") for n in ["And", "Or", "Xor", "Equal"]] + [(f"bool{shape}", "Not(m)")]
    lines += [(f"float{shape}", "Where(m, p, q)"), (f"float{shape}", "Pow(p, two)"), (f"float{shape}", "Pow(p, half)")]
    lines += [(f"float{shape}", "Clip(p, half, two)"), (f"float{shape}", "Clip(p, , two)")]
    lines += [(f"{kind}{shape}", f"Cast<to={code}>(p)") for kind, code in (("int64", 7), ("int32", 6), ("uint8", 2))]
    lines += [(f"float{shape}", "Cast<to=1>(a)"), (f"float{shape}", "Cast<to=1>(m)"), (f"bool{shape}", "Cast<to=9>(a)")]
    lines += [(f"float{shape}", "CastLike(a, p)"), (f"float{shape}", "Dropout(p)")]
    lines += [(f"uint8{shape}", f'BitShift<direction="{d}">(u, v)') for d in ("LEFT", "RIGHT")]
    inputs = f"float{shape} p, float[3,1] q, int64{shape} a, int64{shape} b"
    inputs += f", uint8{shape} u, uint8{shape} v, bool{shape} m, bool{shape} n"
    full = (2, 3, 4)
    divisor = RNG.integers(-4, 4, full)
    feeds = {
        "p": (np.abs(RNG.standard_normal(full)) * 3 + 0.1).astype(np.float32),
        "q": RNG.standard_normal((3, 1)).astype(np.float32),
        "a": RNG.integers(-9, 9, full),
        "b": np.where(divisor == 0, 5, divisor),
        "u": RNG.integers(0, 255, full).astype(np.uint8),
        "v": RNG.integers(0, 7, full).astype(np.uint8),
        "m": RNG.integers(0, 2, full).astype(bool),
        "n": RNG.integers(0, 2, full).astype(bool),
    }
    check(tmp_path, graph(inputs, lines, "float two = {2}, float half = {0.5}"), feeds)


MOVES = [
    ("float[6,20]", "Flatten<axis=2>(x)"),
    ("float[2,60]", "Reshape(x, to)"),
    ("float[5,4,3,2]", "Transpose(x)"),
    ("float[2,4,5,3]", "Transpose<perm=[0,2,3,1]>(x)"),
    ("float[2,3,4,2]", "Slice(x, starts, ends, axes, steps)"),
    ("float[2,3,4,5]", "Concat<axis=1>(part1, part2)"),
    ("float[2,3,6,8]", "Pad(x, pads)"),
    ("float[2,3,6,8]", 'Pad<mode="reflect">(x, pads)'),
    ("float[2,3,6,8]", 'Pad<mode="edge">(x, pads)'),
    ("float[4,3,4,10]", "Tile(x, repeats)"),
    ("float[2,2,3,4,5]", "Expand(x, wide)"),
    ("float[2,1,3,4,5]", "Unsqueeze(x, one)"),
    ("float[2,3,4,5]", "Squeeze(long, one)"),
    ("float[2,3,4,5]", "Trilu(x)"),
    ("float[2,3,4,5]", "Trilu<upper=0>(x, below)"),
    ("float[2,3,4,5]", "CumSum(x, third)"),
    ("float[2,3,4,5]", "CumSum<exclusive=1, reverse=1>(x, third)"),
    ("int64[4]", "Shape(x)"),
    ("int64", "Size(x)"),
    ("float[2,2,4,5]", "Gather<axis=1>(x, pick)"),
    ("float[2,5]", "Gather(table, at)"),
    ("float[2,3,4,5]", "GatherElements<axis=3>(x, each)"),
    ("float[3,5]", "GatherND(x, points)"),
    ("float[2,3,4,5]", "ScatterND(x, points, update)"),
    ("float[2,3,4,5]", 'ScatterND<reduction="add">(x, points, update)'),
    ("float[2,3,8,10]", "Resize(x, , double)"),
    ("float[2,3,6,7]", 'Resize<mode="linear">(x, , , size)'),
    ("float[2,3,6,7]", 'Resize<mode="cubic", coordinate_transformation_mode="align_corners">(x, , , size)'),
    ("float[2,3,4,5]", "BatchNormalization(x, gamma, beta, mu, sigma)"),
    ("uint8[2,3,4,5]", "QuantizeLinear(x, step, zero)"),
    ("float[2,3,4,5]", "DequantizeLinear<axis=1>(codes, step3, zero3)"),
    ("float[5]", "Range(f0, f5, f1)"),
    ("float[2,3]", "ConstantOfShape(rows)"),
]
WEIGHTS = """int64[2] to = {2, 60}, int64[2] starts = {3, 0}, int64[2] ends = {-100, 5}, int64[2] axes = {2, 3},
int64[2] steps = {-1, 3}, int64[8] pads = {0, 0, 1, 2, 0, 0, 1, 1}, int64[4] repeats = {2, 1, 1, 2},
int64[5] wide = {2, 2, 3, 4, 5}, int64[1] one = {1}, int64[1] third = {2}, int64 below = {-1},
int64[2] pick = {2, -1}, int64[3,3] points = {0, 0, 0, 1, 2, 3, 1, 1, 1}, int64[2] cut = {1, 2},
float[4] double = {1, 1, 2, 2}, int64[4] size = {2, 3, 6, 7}, float[3] gamma = {1, 2, 3}, float[3] beta = {1, 0, -1},
float[3] mu = {0.5, -0.5, 0.1}, float[3] sigma = {1, 2, 0.5}, float step = {0.05}, uint8 zero = {10},
float[3] step3 = {0.1, 0.2, 0.3}, int8[3] zero3 = {0, 0, 0}, float f0 = {0}, float f5 = {5}, float f1 = {1},
int64[2] rows = {2, 3}"""


def test_movers_of_elements(tmp_path: Path) -> None:
    inputs = (
        "float[2,3,4,5] x, float[7,5] table, int64[2] at, int64[2,3,4,5] each, float[3,5] update, int8[2,3,4,5] codes"
    )
    before = "part1, part2 = Split<axis=1>(x, cut)\nlong = Unsqueeze(x, one)"
    shape = (2, 3, 4, 5)
    feeds = {
        "x": RNG.standard_normal(shape).astype(np.float32),
        "table": RNG.standard_normal((7, 5)).astype(np.float32),
        "at": np.array([3, -2]),
        "each": RNG.integers(-5, 5, shape),
        "update": RNG.standard_normal((3, 5)).astype(np.float32),
        "codes": RNG.integers(-100, 100, shape).astype(np.int8),
    }
    check(tmp_path, graph(inputs, MOVES, WEIGHTS, before), feeds)


def test_reductions(tmp_path: Path) -> None:
    names = "ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare ReduceLogSumExp"
    lines = []
    for name in names.split():
        lines += [
            ("float[2,1,4,1]", f"{name}(x, axes)"),
            ("float[2,4]", f"{name}<keepdims=0>(x, axes)"),
            ("float", f"{name}<keepdims=0>(x)"),
        ]
    for name in ("ArgMax", "ArgMin"):
        lines += [
            ("int64[2,3,1,5]", f"{name}<axis=2>(ties)"),
            ("int64[2,3,5]", f"{name}<axis=2, keepdims=0, select_last_index=1>(ties)"),
        ]
    x = RNG.standard_normal((2, 3, 4, 5)).astype(np.float32)
    ties = RNG.integers(0, 3, (2, 3, 4, 5)).astype(np.float32)
    text = graph("float[2,3,4,5] x, float[2,3,4,5] ties", lines, "int64[2] axes = {1, 3}")
    check(tmp_path, text, {"x": x, "ties": ties})


EINSUMS = [
    ("float[2,3,5]", "bij,bjk->bik", "a, b"),
    ("float[2,3,5]", "bij, bjk", "a, b"),
    ("float[2,5,3]", "...ij,...jk->...ki", "a, b"),
    ("float[2,3,3]", "...ij,kj->...ik", "a, c"),
    ("float[2,4,3,3]", "bij,kj->bjki", "a, c"),
    ("float[2,3,7]", "bij,jn->bin", "a, w"),
    ("float[7,2]", "jn,bij->nb", "w, a"),
    ("float[2,3,5]", "...ij,...jk->...ik", "a, one"),
    ("float[2,3]", "bij->bi", "a"),
    ("float[4,2,3]", "bij->jbi", "a"),
    ("float", "ii->", "square"),
    ("float[4]", "...ii->...i", "square"),
    ("float[2,3,7]", "bij,kj,jn->bkn", "a, c, w"),
    ("double[3,5]", "ij,jk->ik", "d, f"),
    ("int64[3]", "ij,j->i", "p, q"),
    ("float", "bij,bij->", "a, a"),
]


def test_einsum(tmp_path: Path) -> None:
    lines = [(kind, f'Einsum<equation="{equation}">({operands})') for kind, equation, operands in EINSUMS]
    shapes = {"a": (2, 3, 4), "b": (2, 4, 5), "c": (3, 4), "one": (1, 4, 5), "square": (4, 4)}
    feeds = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    inputs = [f"float[{','.join(map(str, shape))}] {name}" for name, shape in shapes.items()]
    inputs += ["double[3,4] d", "double[4,5] f", "int64[3,4] p", "int64[4] q"]
    feeds |= {"d": RNG.standard_normal((3, 4)), "f": RNG.standard_normal((4, 5))}
    feeds |= {"p": RNG.integers(-9, 9, (3, 4)), "q": RNG.integers(-9, 9, 4)}
    weights = f"float[4,7] w = {{{', '.join(f'{v:.6f}' for v in RNG.standard_normal(28))}}}"
    # Sums of up to 24 products, added in another order than ONNX Runtime's.
    check(tmp_path, graph(", ".join(inputs), lines, weights), feeds, atol=1e-5)


def test_top_k(tmp_path: Path) -> None:
    nodes = [
        ("float[3,4,2]", "TopK(x, two)"),
        ("float[2,4,5]", "TopK<axis=0, largest=0>(x, two)"),
        ("float[3,2,5]", "TopK<axis=1>(ties, two)"),
        ("float[3,2,5]", "TopK<axis=1, largest=0>(ties, two)"),
        ("float[3,4,5]", "TopK(ties, five)"),
        ("int64[2]", "TopK(a, two)"),
        ("int64[2]", "TopK<largest=0>(a, two)"),
    ]
    outputs = ", ".join(f"{kind} v{k}, {kind.replace('float', 'int64')} i{k}" for k, (kind, _) in enumerate(nodes))
    body = "\n".join(f"v{k}, i{k} = {node}" for k, (_, node) in enumerate(nodes))
    weights = "<int64[1] two = {2}, int64[1] five = {5}>"
    text = f"g (float[3,4,5] x, float[3,4,5] ties, int64[9] a) => ({outputs}) {weights} {{\n{body}\n}}"
    feeds = {
        "x": RNG.standard_normal((3, 4, 5)).astype(np.float32),
        "ties": RNG.integers(0, 3, (3, 4, 5)).astype(np.float32),
        "a": RNG.integers(-99, 99, 9),
    }
    check(tmp_path, text, feeds)


def test_scatter_elements(tmp_path: Path) -> None:
    reductions = ["none", "add", "mul", "max", "min"]
    lines = [
        (f"float{s}", f'ScatterElements<axis={axis}, reduction="{name}">(x, at{axis}, u{axis})')
        for name in reductions
        for axis, s in ((0, "[3,4,5]"), (2, "[3,4,5]"))
    ]
    lines += [("int64[9]", f'ScatterElements<reduction="{name}">(a, i, v)') for name in ("none", "add")]
    inputs = "float[3,4,5] x, int64[6,2,5] at0, float[6,2,5] u0, int64[3,4,2] at2, float[3,4,2] u2"
    feeds = {
        "x": RNG.standard_normal((3, 4, 5)).astype(np.float32),
        "at0": RNG.integers(-3, 3, (6, 2, 5)),
        "u0": RNG.standard_normal((6, 2, 5)).astype(np.float32),
        "at2": RNG.integers(-5, 5, (3, 4, 2)),
        "u2": RNG.standard_normal((3, 4, 2)).astype(np.float32),
        "a": RNG.integers(-9, 9, 9),
        "i": np.array([8, 0, -1, 3], np.int32),
        "v": RNG.integers(-9, 9, 4),
    }
    check(tmp_path, graph(f"{inputs}, int64[9] a, int32[4] i, int64[4] v", lines), feeds)


def test_integer_products(tmp_path: Path) -> None:
    lines = [
        ("int32[2,3,5]", "MatMulInteger(a, w)"),
        ("int32[2,3,5]", "MatMulInteger(a, w, five)"),
        ("int32[2,3,5]", "MatMulInteger(a, w, five, each)"),
        ("int32[2,3,5]", "MatMulInteger(a, u, , ten)"),
        ("int32[2,3,5]", "MatMulInteger(a, batch, five, ten)"),
    ]
    inputs = "uint8[2,3,7] a, int8[7,5] w, uint8[7,5] u, uint8[2,7,5] batch"
    feeds = {
        "a": RNG.integers(0, 255, (2, 3, 7)).astype(np.uint8),
        "w": RNG.integers(-128, 127, (7, 5)).astype(np.int8),
        "u": RNG.integers(0, 255, (7, 5)).astype(np.uint8),
        "batch": RNG.integers(0, 255, (2, 7, 5)).astype(np.uint8),
    }
    weights = "uint8 five = {5}, uint8 ten = {10}, int8[5] each = {1, -2, 3, -4, 5}"
    check(tmp_path, graph(inputs, lines, weights), feeds)


LAYOUT = """
g (float[1,8,6,6] x) => (float[1,4,12,12] up, float[1,16] flat, float[1,6,6,8] last, float[1,16,6,6] gated) {
  a = Conv<pads=[1,1,1,1]>(x, w)
  scaled = Mul(a, per_channel)
  b = Relu(scaled)
  joined = Concat<axis=1>(b, a)
  mean = ReduceMean(joined, spatial)
  flat = Flatten(mean)
  gate = Sigmoid(mean)
  gated = Mul(joined, gate)
  last = Transpose<perm=[0,2,3,1]>(b)
  first, second = Split<axis=1, num_outputs=2>(b)
  up = Resize(first, , double)
}"""


def test_values_stay_channels_last_between_convolutions(tmp_path: Path) -> None:
    weights = (RNG.standard_normal((8, 8, 3, 3)) * 0.2).astype(np.float32)
    lists = {
        "w": f"float[8,8,3,3] w = {{{', '.join(f'{v:.6f}' for v in weights.reshape(-1))}}}",
        "per_channel": "float[8,1,1] per_channel = {1, 2, 3, 4, 5, 6, 7, 8}",
        "spatial": "int64[2] spatial = {2, 3}",
        "double": "float[4] double = {1, 1, 2, 2}",
    }
    text = LAYOUT.replace(") {", f") <{', '.join(lists.values())}> {{", 1)
    x = RNG.standard_normal((1, 8, 6, 6)).astype(np.float32)
    # Sums of 72 products, added in another order than ONNX Runtime's, times up to 8.
    check(tmp_path, text, {"x": x}, target="x86{cpu=x86-64-v3}", atol=2e-5)


# Tokens to an image and back, as transformers with convolutions between their layers do; `kept` is asked for in both.
TOKENS = """g (float[2,12,8] tokens) => (float[2,12,8] y{outputs})
<float[8,8,3,3] w, int64[4] image = {2, 8, 3, 4}, int64[3] row = {0, 0, -1}> {
  t = Transpose<perm=[0,2,1]>(tokens)
  i = Reshape(t, image)
  c = Conv<pads=[1,1,1,1]>(i, w)
  r = Reshape(c, row)
  back = Transpose<perm=[0,2,1]>(r)
  y = Add(back, tokens)
BODY}"""
MIXED = """  kept = Transpose<perm=[0,2,1]>(y)
  j = Reshape(kept, image)
  n = Conv<pads=[1,1,1,1]>(j, w)
  s = Softmax<axis=2>(kept)
  z = Relu(r)
  m = Flatten<axis=2>(n)
"""


def test_tokens_are_positions_channels_last() -> None:
    weight = {"w": _kernels.normal(8, 8, 3, 3)}
    straight = TOKENS.replace("{outputs}", "").replace("BODY", "")
    lowered = _kernels.lowered_model(_kernels.model(straight, weight), _kernels.machine())
    module = tvm.relax.transform.DeadCodeElimination()(lowered.module)
    assert not [v.name_hint for v in module.functions if "transpose" in v.name_hint]
    _kernels.check(straight, weight)
    outputs = ", float[2,8,12] kept, float[2,8,12] s, float[2,8,12] z, float[16,12] m"
    _kernels.check(TOKENS.replace("{outputs}", outputs).replace("BODY", MIXED), weight)


@pytest.mark.parametrize("size", [(16, 5, 7), (6, 4, 16), (32, 9, 32)])
def test_channels_last_become_rows_in_blocks(size: tuple[int, int, int]) -> None:
    channels, *image = size
    length = channels // 2 * math.prod(image)
    text = f"""g (float[2,3,{image[0]},{image[1]}] x) => (float[2,2,{length}] y)
        <float[{channels},3,1,1] w, int64[3] rows = {{2, 2, -1}}>
        {{ c = Conv(x, w)  r = Reshape(c, rows)  y = Relu(r) }}"""
    weights = {"w": _kernels.normal(channels, 3, 1, 1)}
    _kernels.check(text, weights)
    _, module, _ = _kernels.compiled(_kernels.model(text, weights), _kernels.machine())
    texts = {v.name_hint: f.script() for v, f in module.functions.items()}
    (moved,) = [text for name, text in texts.items() if "reshape" in name]
    assert moved.count("T.sblock(") == 2 and 'T.sblock("transpose")' in moved, moved


def test_functions_in_double_precision(tmp_path: Path) -> None:
    lines = [(f"double[3,{n}]", f"{name}({x})") for n, x in ((7, "x"), (64, "z")) for name in ("Exp", "Sigmoid")]
    lines += [("double[3,7]", node) for node in ("Tanh(x)", "Log(p)", "Softmax(x)", "LogSoftmax(x)")]
    x, z = (RNG.standard_normal((3, n)) * 3 for n in (7, 64))
    p = np.abs(x) + 1e-300
    check(tmp_path, graph("double[3,7] x, double[3,64] z, double[3,7] p", lines), {"x": x, "z": z, "p": p}, atol=1e-15)


def test_half_precision_is_summed_in_single(tmp_path: Path) -> None:
    lines = [("float16[2,3]", "MatMul(x, w)"), ("float16[2,1]", "ReduceMean(x, one)")]
    text = graph("float16[2,2048] x, float16[2048,3] w", lines, "int64[1] one = {1}")
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]>\n{text}')
    model = onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    targets.parse_target("x86").compile(model, tmp_path, lambda *_: None)
    x, w = (RNG.uniform(0.5, 1, shape).astype(np.float16) for shape in ((2, 2048), (2048, 3)))
    product, mean = targets.load_artefact(tmp_path).run({"x": x, "w": w}).values()
    x, w = x.astype(np.float64), w.astype(np.float64)
    # Half a unit in the last place of float16, 2^-11: one rounding at the end.
    np.testing.assert_allclose(product, x @ w, rtol=5e-4)
    np.testing.assert_allclose(mean, x.mean(axis=1, keepdims=True), rtol=5e-4)


def test_ops_that_other_ops_make_up(tmp_path: Path) -> None:
    nodes = ["Mish(x)", "Celu<alpha=0.5>(x)", "Celu(x)", "Softsign(x)", "Shrink<lambd=0.3, bias=0.1>(x)"]
    nodes += ["ThresholdedRelu<alpha=0.2>(x)", "LRN<size=3>(x)", "LRN<size=5, alpha=0.1, beta=0.6, bias=2.0>(x)"]
    lines = [("float[2,5,3,3]", node) for node in (*nodes, "LpNormalization<axis=1, p=1>(x)")]
    lines += [("double[2,4]", "LpNormalization(z)")]
    x, z = RNG.standard_normal((2, 5, 3, 3)).astype(np.float32), RNG.standard_normal((2, 4))
    x[0, :, 0, 0] = 0  # a norm of 0
    built = check(tmp_path, graph("float[2,5,3,3] x, double[2,4] z", lines), {"x": x, "z": z})
    assert any(note.startswith("LRN") for note in built.manifest.fallbacks)
