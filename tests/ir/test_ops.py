"""What holds for every op of the dialect: body = numpy = torch = ONNX Runtime on its samples, and its storage."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest

from mc_opt import ir
from mc_opt.ir.op import Example, Op
from mc_opt.ir.ops import (
    sparse,
)
from tests.ir._ops_in_numpy import expected

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


def tolerance(op: Op, dtype: np.dtype) -> float:
    if op.name in {"SeKronConv", "KronLinear"}:
        # Sums of some hundred products in another order, rounded once more between stages.
        return 2e-6 if dtype == np.float32 else 4e-3
    if op.name == "CachedAttention":
        return 2e-6 if dtype == np.float32 else 4e-3  # two products of eight and nine, an exponential between them
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
        "CachedAttention",
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
