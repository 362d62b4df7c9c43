"""What holds for every op of the dialect: body = numpy = torch = ONNX Runtime on its samples, and its storage."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest

from mc_opt import ir
from mc_opt.ir.op import Example, Op
from mc_opt.ir.ops import (
    add_sparse,
    euclid_conv,
    euclid_conv_integer,
    euclid_linear,
    euclid_linear_integer,
    fake_euclid_conv,
    fake_euclid_linear,
    fake_lookup,
    fake_prox,
    fake_shift,
    fake_sparse_shift,
    fake_swish_sign,
    fake_threshold,
    kron_linear,
    lookup,
    sekron_conv,
    sparse,
)
from tests.ir._levels_in_numpy import cut_below_threshold, draw_to_levels, swish_to_levels

CASES = [
    pytest.param(name, example, id=f"{name}-{example.name}")
    for name in ir.op_names()
    for example in ir.find_op(name).samples(np.random.default_rng(0))
]


def feeds(op: Op, example: Example) -> dict[str, np.ndarray]:
    formal = op.formal(len(example.inputs))
    return {n: a for n, a in zip(formal, example.inputs, strict=False) if a is not None}


def build(op: Op, example: Example, *, constant: bool, opset: int = 21) -> onnx_ir.Model:
    """A model of one node; its inputs are the graph's inputs, or initialisers."""
    values: list[onnx_ir.Value | None] = []
    for name, array in zip(op.formal(len(example.inputs)), example.inputs, strict=False):
        if array is None:
            values.append(None)
            continue
        values.append(
            onnx_ir.Value(
                name=name,
                type=onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype)),
                shape=onnx_ir.Shape(array.shape),
                const_value=onnx_ir.tensor(array) if constant else None,
            )
        )
    node = ir.node(op.name, values, example.attributes, name="decode", output="y")
    given = [v for v in values if v is not None]
    graph = onnx_ir.Graph(
        [] if constant else given,
        list(node.outputs),
        nodes=[node],
        initializers=given if constant else [],
        opset_imports={"": opset},
        name="g",
    )
    model = onnx_ir.Model(graph, ir_version=10)
    ir.add_functions(model)
    return model


def run(model: onnx_ir.Model, inputs: Mapping[str, np.ndarray], *, optimise: bool) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString(), options)
    return np.asarray(session.run(None, dict(inputs))[0])


def expected(op: Op, example: Example) -> np.ndarray:
    """The op in numpy, written without its body."""
    match op:
        case lookup.Lookup():
            return ir.decode(*example.inputs, **example.attributes)
        case add_sparse.AddSparse():
            w, indices, values = example.inputs
            total = w.copy().reshape(-1)
            np.add.at(total, indices, values)
            return total.reshape(w.shape)
        case _ if op.name == "FakeMask":
            return masked(example)
        case sparse.Sparse():
            return sparse.unpack(*example.inputs, example.attributes["shape"])
        case fake_lookup.FakeLookup():
            return round_to_codebook(example)
        case fake_shift.FakeShift() | fake_sparse_shift.FakeSparseShift():
            return signed_powers(op, example)
        case fake_prox.FakeProx():
            return draw_to_levels(example)
        case fake_swish_sign.FakeSwishSign():
            return swish_to_levels(example)
        case fake_threshold.FakeThreshold():
            return cut_below_threshold(example)
        case sekron_conv.SeKronConv():
            return convolve(example)
        case euclid_conv.EuclidConv() | fake_euclid_conv.FakeEuclidConv():
            return convolve_distances(op, example)
        case euclid_linear.EuclidLinear() | fake_euclid_linear.FakeEuclidLinear():
            return distances(op, example)
        case euclid_conv_integer.EuclidConvInteger():
            return convolve_squares(example)
        case euclid_linear_integer.EuclidLinearInteger():
            x, w = (a.astype(np.int64) for a in example.inputs)
            squares = np.square(x[..., None, :] - (w if example.attributes["transB"] else w.T))
            return -squares.sum(-1).astype(np.int32)
        case kron_linear.KronLinear():
            x, bias, *factors = example.inputs
            w = ir.kron_weight(factors, factors[0].ndim - 2).astype(float)
            return (x.astype(float) @ w.T + (0 if bias is None else bias)).astype(x.dtype)
    raise AssertionError(f"write {op.name} in numpy here")


def convolve(example: Example) -> np.ndarray:
    """The dense convolution, tap by tap."""
    x, bias, *factors = example.inputs
    w = ir.kron_weight(factors, factors[0].ndim - 2 - len(example.attributes["strides"])).astype(float)
    return sum_windows(example, x, w, bias, lambda block, patch: np.einsum("fc,nc...->nf...", block, patch))


def convolve_distances(op: Op, example: Example) -> np.ndarray:
    """S_λ of every window, term by term: (1 − λ)·x·w − λ·½(x − w)² is x·w − λ·½(x² + w²)."""
    named = dict(zip(op.formal(4), example.inputs, strict=False))
    share = float(named.get("strength", np.float32(1)))

    def term(block: np.ndarray, patch: np.ndarray) -> np.ndarray:
        w = block.reshape(1, *block.shape, *[1] * (patch.ndim - 2))
        return ((1 - share) * patch[:, None] * w - share / 2 * (patch[:, None] - w) ** 2).sum(2)

    return sum_windows(example, named["x"], named["w"].astype(float), named.get("bias"), term)


def convolve_squares(example: Example) -> np.ndarray:
    """−Σ (x − w)², each square from a table of |x − w|."""
    table = np.arange(256) ** 2

    def term(block: np.ndarray, patch: np.ndarray) -> np.ndarray:
        w = block.reshape(1, *block.shape, *[1] * (patch.ndim - 2))
        return -table[np.abs(patch[:, None] - w).astype(int)].sum(2)

    x, w = example.inputs
    return sum_windows(example, x.astype(np.int32), w.astype(float), None, term)


def distances(op: Op, example: Example) -> np.ndarray:
    named = dict(zip(op.formal(4), example.inputs, strict=False))
    share = float(named.get("strength", np.float32(1)))
    w = named["w"].astype(float) if example.attributes["transB"] else named["w"].astype(float).T
    x = named["x"].astype(float)[..., None, :]
    y = ((1 - share) * x * w - share / 2 * (x - w) ** 2).sum(-1)
    return (y if named.get("bias") is None else y + named["bias"]).astype(named["x"].dtype)


def sum_windows(
    example: Example,
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None,
    term: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """Sum over the taps what `term` makes of w[:, :, tap] and of what each window of x sees there."""
    strides, dilations, pads = (example.attributes[n] for n in ("strides", "dilations", "pads"))
    n, group = len(strides), example.attributes["group"]
    spaces = [(pads[a], pads[n + a]) for a in range(n)]
    padded = np.pad(x.astype(float), [(0, 0), (0, 0), *spaces])
    taps = list(itertools.product(*(range(k) for k in w.shape[2:])))
    free = [s - d * (k - 1) - 1 for s, d, k in zip(padded.shape[2:], dilations, w.shape[2:], strict=True)]
    counts = [f // s + 1 for f, s in zip(free, strides, strict=True)]
    y = np.zeros((x.shape[0], w.shape[0], *counts))
    rows, columns = w.shape[0] // group, w.shape[1]
    for tap in taps:
        places = zip(tap, dilations, strides, counts, strict=True)
        where = tuple(slice(t * d, t * d + s * (c - 1) + 1, s) for t, d, s, c in places)
        for g in range(group):
            mine = padded[:, g * columns : (g + 1) * columns][(slice(None), slice(None), *where)]
            block = w[(slice(g * rows, (g + 1) * rows), slice(None), *tap)]
            y[:, g * rows : (g + 1) * rows] += term(block, mine)
    if bias is not None:
        y += bias.reshape(-1, *[1] * n)
    return y.astype(x.dtype)


def masked(example: Example) -> np.ndarray:
    x, theta, threshold, _, index = (*example.inputs, None)[:5]
    axis, least = example.attributes["axis"], example.attributes["least"]
    live = (theta > threshold) | (least and theta == theta.max())
    y = x.copy()
    for place in np.ndindex(x.shape):
        k = place if theta.ndim > 1 else place[axis] if index is None else index[place[axis]]
        if theta.size == 1:
            k = 0
        y[place] *= 1 if np.isscalar(k) and k < 0 else live[k]
    return y


def round_to_codebook(example: Example) -> np.ndarray:
    w, codebook, scale = (*example.inputs, None)[:3]
    axes, size = example.attributes.get("axes", (0,)), example.attributes.get("group_size", 0)
    matrix = ir.canonical(w, axes)
    rows, columns = matrix.shape
    y = np.empty_like(matrix)
    books = codebook.reshape((1, 1, -1)) if codebook.ndim == 1 else codebook
    factors = np.ones((1, 1), np.float32) if scale is None else scale
    for r in range(rows):
        for c in range(columns):
            g = c // size if size else 0
            book = books[r % books.shape[0], g % books.shape[1]]
            s = factors[r % factors.shape[0], g % factors.shape[1]]
            y[r, c] = book[ir.nearest_codes(matrix[r, c] / s, book)] * s
    return ir.restore(y, w.shape, axes)


def signed_powers(op: Op, example: Example) -> np.ndarray:
    given = dict(zip(op.formal(len(example.inputs)), example.inputs, strict=True))
    sign, scale, gain = given.pop("sign"), given.pop("scale"), given.pop("gain")
    alive = given.pop("value", np.ones_like(sign)) > 0
    exponent = np.zeros(sign.shape)
    for step in given.values():
        exponent = np.where(step > 0, exponent + 1, 0)
    return scale_rows(np.where(sign >= 0, 1, -1) * alive * 2**exponent, scale * gain, example)


def scale_rows(levels: np.ndarray, factor: np.ndarray, example: Example) -> np.ndarray:
    axes, size = example.attributes.get("axes", (0,)), example.attributes.get("group_size", 0)
    matrix = ir.canonical(levels, axes)
    columns = np.arange(matrix.shape[1]) // size if size and factor.shape[1] > 1 else np.zeros(matrix.shape[1], int)
    return ir.restore(matrix * factor[:, columns], levels.shape, axes).astype(np.float32)


def tolerance(op: Op, dtype: np.dtype) -> float:
    if op.name in {"SeKronConv", "KronLinear"}:
        # Sums of some hundred products in another order, rounded once more between stages.
        return 2e-6 if dtype == np.float32 else 4e-3
    if op.name == "FakeSwishSign":
        return 2e-6  # tanh is approximated differently, and 1 − tanh² is multiplied by up to 10
    if "Integer" in op.name:
        return 0.0
    if "Euclid" in op.name:
        # Three sums of some ten products, which cancel; half precision is rounded once, at the end.
        return 2e-6 if dtype == np.float32 else 1e-3
    # float32: one product and one sum, each rounded the same way everywhere but for a fused multiply-add.
    # float16: ONNX Runtime computes in float32 and rounds once, where numpy rounds after each step.
    return 2.5e-7 if dtype == np.float32 else 1e-3


@pytest.mark.parametrize(("name", "example"), CASES)
def test_body_is_numpy_in_onnx_runtime(name: str, example: Example) -> None:
    op = ir.find_op(name)
    want = expected(op, example)
    for constant in (False, True):
        model = build(op, example, constant=constant)
        ir.verify(model)
        for optimise in (False, True):
            got = run(model, {} if constant else feeds(op, example), optimise=optimise)
            assert got.dtype == want.dtype
            assert got.shape == want.shape
            limit = tolerance(op, want.dtype) * max(1.0, float(np.abs(want).max(initial=0)))
            assert np.abs(got.astype(float) - want.astype(float)).max(initial=0) <= limit


@pytest.mark.torch
@pytest.mark.parametrize(("name", "example"), CASES)
def test_torch_is_numpy(name: str, example: Example) -> None:
    torch = pytest.importorskip("torch")
    op = ir.find_op(name)
    module = ir.interpret(build(op, example, constant=False))
    (got,) = module(*(torch.from_numpy(a) for a in feeds(op, example).values()))
    want = expected(op, example)
    limit = tolerance(op, want.dtype) * max(1.0, float(np.abs(want).max(initial=0)))
    assert np.abs(got.detach().numpy().astype(float) - want.astype(float)).max(initial=0) <= limit


@pytest.mark.parametrize(("name", "example"), CASES)
def test_checker_infers_the_stated_type(name: str, example: Example) -> None:
    op = ir.find_op(name)
    model = build(op, example, constant=False)
    output = model.graph.outputs[0]
    output.shape = None  # else inference has nothing to say
    inferred = onnx.shape_inference.infer_shapes(onnx_ir.to_proto(model), strict_mode=True, data_prop=True)
    found = inferred.graph.output[0].type.tensor_type
    dtype, shape = op.types(model.graph[0])[0]
    assert found.elem_type == dtype.value
    takes_shape = {"AddSparse", "FakeLookup", "FakeProx", "FakeSwishSign", "FakeThreshold"}
    if op.name not in takes_shape:  # these take it from an input at run time
        assert [d.dim_value for d in found.shape.dim] == list(shape)


@pytest.mark.parametrize(("name", "example"), CASES)
def test_work_is_stated(name: str, example: Example) -> None:
    op = ir.find_op(name)
    work = op.work(build(op, example, constant=False).graph[0])
    assert work.bytes > 0 or not any(a.size for a in example.inputs[1:] if a is not None)
    assert work + ir.Work() == work


def test_work_counts_what_the_kernel_does() -> None:
    node = lookup_node(np.zeros((64, 32), np.uint8), bits=4, scale=np.ones((64, 1), np.float32))
    # one lookup a weight, one product a row; half a byte a weight, 16 entries and 64 scales of 4 bytes
    assert ir.find_op("Lookup").work(node) == ir.Work(lookup=2048, mul=64, bytes=1024 + 64 + 256)


@pytest.mark.parametrize("name", ir.op_names())
def test_body_is_small_and_opset_independent(name: str) -> None:
    op = ir.find_op(name)
    for example in op.samples(np.random.default_rng(0)):
        texts = set()
        for opset in (21, 22, 23):
            (function,) = build(op, example, constant=True, opset=opset).functions.values()
            texts.add(tuple(n.op_type for n in function))
            assert function.opset_imports == {"": opset}
        assert len(texts) == 1
        assert len(texts.pop()) <= (48 if name == "Lookup" else 90)


@pytest.mark.parametrize("name", ir.op_names())
def test_one_variant_has_one_body(name: str) -> None:
    op = ir.find_op(name)
    bodies: dict[str, bytes] = {}
    for seed in range(2):
        for example in op.samples(np.random.default_rng(seed)):
            node = build(op, example, constant=True).graph[0]
            body = onnx_ir.serde.serialize_function(op.function(node, 21)).SerializeToString(deterministic=True)
            assert bodies.setdefault(op.variant(node), body) == body


def test_files_are_named_after_their_ops() -> None:
    assert ir.op_names() == (
        "AddSparse",
        "EuclidConv",
        "EuclidConvInteger",
        "EuclidLinear",
        "EuclidLinearInteger",
        "FakeEuclidConv",
        "FakeEuclidLinear",
        "FakeLookup",
        "FakeMask",
        "FakeProx",
        "FakeShift",
        "FakeSparseShift",
        "FakeSwishSign",
        "FakeThreshold",
        "KronLinear",
        "Lookup",
        "SeKronConv",
        "Sparse",
    )
    assert importlib.import_module("mc_opt.ir.ops.fake_lookup").FakeLookup is type(ir.find_op("FakeLookup"))


def test_unknown_op_lists_the_known() -> None:
    with pytest.raises(ir.IRError, match=r"unknown op 'Lockup'; did you mean 'Lookup'\? \(known: AddSparse"):
        ir.find_op("Lockup")


def lookup_node(
    codes: np.ndarray,
    *,
    bits: int,
    scale: np.ndarray | None = None,
    codebook: np.ndarray | None = None,
    **attributes: object,
) -> onnx_ir.Node:
    book = np.arange(1 << bits, dtype=np.float32) if codebook is None else codebook
    shape = attributes.pop("shape", codes.shape)
    packed = ir.pack_codes(codes, min(max(bits, 1), 8))
    return ir.node("Lookup", [packed, book, scale], {"bits": bits, "shape": shape, **attributes}, output="w")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9, "codebook": np.zeros(4, np.float32)}, "w: Lookup bits is 9, expected 1 to 8"),
        ({"shape": (4, 9)}, r"codes are UINT8\[16\], expected UINT8\[20\] for 36 codes of 4 bits"),
        ({"shape": (4, 0)}, "expected dimensions of at least 1"),
        ({"axes": (0, 0)}, "expected different axes"),
        ({"axes": (2,)}, "expected different axes"),
        ({"group_size": -1}, "group_size is -1"),
        ({"scale": np.ones((3, 1), np.float32)}, r"scale is \[3, 1\], expected \[1, 1\], \[4, 1\] or \[4, 1\]"),
        ({"scale": np.ones((1, 2), np.float32), "group_size": 4}, r"scale is \[1, 2\]"),
        ({"scale": np.ones((1, 1), np.int64)}, "expected a float type"),
        ({"codebook": np.zeros(17, np.float32)}, "with n from 1 to 16"),
        ({"codebook": np.zeros(16, np.int32)}, "expected a float type"),
        ({"codebook": np.zeros((2, 16), np.float32)}, "expected"),
        ({"flavour": 3}, "unknown attribute 'flavour'"),
    ],
)
def test_lookup_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ir.IRError, match=message):
        lookup_node(np.zeros((4, 8), np.uint8), **{"bits": 4, **change})  # type: ignore[arg-type]


def test_lookup_refuses_codes_beyond_the_codebook() -> None:
    codes = np.array([[0, 1, 2, 7]], np.uint8)
    node = lookup_node(codes, bits=3, codebook=np.zeros(7, np.float32))
    with pytest.raises(ir.IRError, match="has code 7, expected codes below 7"):
        ir.find_op("Lookup").check_data(node)


def test_sparse_refuses_a_wrong_count() -> None:
    bitmap, values = sparse.pack_sparse(np.array([1, 0, 2, 0], np.float32))
    node = ir.node("Sparse", [bitmap, values[:1]], {"shape": (4,)}, output="w")
    with pytest.raises(ir.IRError, match="bitmap has 2 ones, expected 1"):
        ir.find_op("Sparse").check_data(node)


def test_add_sparse_refuses_indices_outside() -> None:
    node = ir.node("AddSparse", [np.zeros((2, 2), np.float32), np.array([4]), np.ones(1, np.float32)], output="w")
    with pytest.raises(ir.IRError, match="has indices from 4 to 4, expected 0 to 3"):
        ir.find_op("AddSparse").check_data(node)


def test_second_level_lookup_decodes_its_scale() -> None:
    """The scale of a Lookup is made by another Lookup."""
    rng = np.random.default_rng(0)
    codes, books = rng.integers(0, 16, (6, 8)).astype(np.uint8), rng.standard_normal(16).astype(np.float32)
    scales, levels = rng.integers(0, 4, (6, 2)).astype(np.uint8), np.array([0.5, 1, 2, 4], np.float32)
    scale = ir.node("Lookup", [ir.pack_codes(scales, 2), levels], {"bits": 2, "shape": (6, 2)}, output="s")
    outer = ir.node(
        "Lookup",
        [ir.pack_codes(codes, 4), books, scale.outputs[0]],
        {"bits": 4, "shape": (6, 8), "group_size": 4},
        output="w",
    )
    constants = [v for node in (scale, outer) for v in node.inputs if v is not None and v.const_value is not None]
    for i, value in enumerate(constants):
        value.name = f"c{i}"
    graph = onnx_ir.Graph(
        [], list(outer.outputs), nodes=[scale, outer], initializers=constants, opset_imports={"": 21}, name="g"
    )
    model = onnx_ir.Model(graph, ir_version=10)
    ir.add_functions(model)
    ir.verify(model)
    want = books[codes] * np.repeat(levels[scales], 4, axis=1)
    assert np.array_equal(run(model, {}, optimise=True), want)
    assert np.array_equal(run(model, {}, optimise=False), want)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["shared", "short-groups", "books"])
def test_fake_lookup_gradients_follow_their_formulas(kind: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    shape, size, n = (4, 7), 0 if kind == "shared" else 3, 5
    groups = 1 if kind == "shared" else 3
    codebook = rng.standard_normal((4, groups, n) if kind == "books" else n).astype(np.float32)
    arrays = [
        rng.standard_normal(shape).astype(np.float32),
        codebook,
        rng.uniform(1, 2, (4, groups)).astype(np.float32),
    ]
    node = ir.node("FakeLookup", arrays, {"group_size": size}, output="y")
    w, c, s = (torch.tensor(a, requires_grad=True) for a in arrays)
    y = ir.find_op("FakeLookup").torch(node)(w, c, s)
    g = torch.tensor(rng.standard_normal(shape).astype(np.float32))
    y.backward(g)
    assert torch.equal(w.grad, g)
    want_c, want_s = np.zeros_like(codebook), np.zeros((4, groups), np.float32)
    for r in range(4):
        for k in range(7):
            group = k // size if size else 0
            book = codebook[r, group] if kind == "books" else codebook
            code = int(ir.nearest_codes(arrays[0][r, k] / arrays[2][r, group], book))
            want_s[r, group] += g[r, k].item() * book[code]
            place = (r, group, code) if kind == "books" else (code,)
            want_c[place] += g[r, k].item() * arrays[2][r, group]
    np.testing.assert_allclose(s.grad.numpy(), want_s, rtol=1e-5, atol=1e-6)  # sums of 7 in another order
    np.testing.assert_allclose(c.grad.numpy(), want_c, rtol=1e-5, atol=1e-6)


def test_decode_of_row_blocks_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large weight is decoded in blocks of rows; here a block is one row."""
    packing = importlib.import_module("mc_opt.ir.ops._packing")
    examples = [e for e in ir.find_op("Lookup").samples(np.random.default_rng(1)) if "books" in e.name]
    whole = [ir.decode(*e.inputs, **e.attributes) for e in examples]
    monkeypatch.setattr(packing, "_BLOCK", 1)
    for example, want in zip(examples, whole, strict=True):
        assert np.array_equal(ir.decode(*example.inputs, **example.attributes), want)
