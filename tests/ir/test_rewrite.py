"""Where weights are found and why others are not; a weight is replaced and keeps its name."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest

from mc_opt import ir

Found = dict[str, tuple[str, tuple[int, ...]]]


def parse(body: str, *, signature: str = "float[N,8] x", outputs: str = "y", **weights: np.ndarray) -> onnx_ir.Model:
    """A model of the given nodes; `weights` become initialisers of the main graph."""
    outs = ", ".join(f"float[N,M] {name}" for name in outputs.split())
    text = f'<ir_version: 10, opset_import: ["": 21, "own": 1]> g ({signature}) => ({outs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in weights.items())
    return onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def found(model: onnx_ir.Model) -> Found:
    return {s.layer: (s.kind, s.axes) for s in ir.weight_sites(model) if isinstance(s, ir.WeightSite)}


def skipped(model: onnx_ir.Model) -> dict[str, str]:
    return {s[0]: str(s[1]) for s in ir.weight_sites(model) if not isinstance(s, ir.WeightSite)}


def weight(*shape: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def lookup(site: ir.WeightSite, bits: int = 2) -> onnx_ir.Node:
    """A Lookup that decodes to something of the site's type."""
    dtype = site.tensor.dtype.numpy()
    count = int(np.prod(site.shape))
    codes = ir.pack_codes(np.arange(count, dtype=np.uint8) % 4, bits)
    book = np.array([-1, -0.5, 0.5, 1], dtype)
    return ir.node("Lookup", [codes, book], {"bits": bits, "shape": site.shape, "axes": site.axes})


def compress(model: onnx_ir.Model) -> int:
    count = 0
    for site in ir.weight_sites(model):
        if isinstance(site, ir.WeightSite):
            ir.replace_weight(site, lookup(site), by=("toy", "to-lookup"))
            count += 1
    ir.add_functions(model)
    return count


def run(model: onnx_ir.Model, **inputs: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString(), options)
    return list(session.run(None, inputs))


@pytest.mark.parametrize(
    ("body", "shape", "kind", "axes"),
    [
        ("y = MatMul(x, w)", (8, 4), "MatMul", (1,)),
        ("y = MatMul(w, x)", (4, 8), "MatMul", (0,)),
        ("y = MatMul(x, w)", (3, 8, 4), "MatMul", (0, 2)),
        ("y = Gemm(x, w)", (8, 4), "Gemm", (1,)),
        ("y = Gemm<transB=1>(x, w)", (4, 8), "Gemm", (0,)),
        ("y = Gemm(w, x)", (4, 8), "Gemm", (0,)),
        ("y = Gemm<transA=1>(w, x)", (8, 4), "Gemm", (1,)),
        ("i = Cast<to=7>(x) y = Gather(w, i)", (8, 4), "Gather", (0,)),
        ("i = Cast<to=7>(x) y = Gather<axis=-2>(w, i)", (8, 4), "Gather", (0,)),
        ("y = Conv(x, w)", (4, 3, 3, 3), "Conv", (0,)),
        ("y = ConvTranspose(x, w)", (3, 4, 3, 3), "ConvTranspose", (1,)),
        ("a, y = LSTM<hidden_size=4>(x, w, r)", (1, 16, 8), "LSTM", (0, 1)),
        ("a, y = GRU<hidden_size=4>(x, w, r)", (1, 12, 8), "GRU", (0, 1)),
        ("a, y = RNN<hidden_size=4>(x, w, r)", (1, 4, 8), "RNN", (0, 1)),
    ],
)
def test_row_axes_of_every_kind(body: str, shape: tuple[int, ...], kind: str, axes: tuple[int, ...]) -> None:
    text = f'<ir_version: 10, opset_import: ["": 21]> g (float[8,8] x, float r) => (float y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)  # types are not inferred: x stands for inputs of every rank
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight(*shape), "w"))
    assert found(onnx_ir.from_proto(proto)) == {"w": (kind, axes)}


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_float_types_are_sites(dtype: str) -> None:
    name = {"float32": "float", "float64": "double"}.get(dtype, dtype)
    model = parse("y = MatMul(x, w)", signature=f"{name}[N,8] x", w=weight(8, 4, dtype=dtype))
    assert found(model) == {"w": ("MatMul", (1,))}


def test_sites_come_in_the_order_of_first_use() -> None:
    body = "a = MatMul(x, w2) b = MatMul(a, w1) y = MatMul(b, w3)"
    model = parse(body, w1=weight(8, 8), w2=weight(8, 8), w3=weight(8, 8))
    assert list(found(model)) == ["w2", "w1", "w3"]


def test_tied_weight_with_one_meaning_is_one_site() -> None:
    model = parse("a = MatMul(x, w) y = MatMul(a, w)", w=weight(8, 8))
    (site,) = ir.weight_sites(model)
    assert isinstance(site, ir.WeightSite)
    assert [(n.op_type, i) for n, i in site.consumers] == [("MatMul", 1), ("MatMul", 1)]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = MatMul(x, w) y = Gemm<transB=1>(a, w)", "shared by sites with different row axes: MatMul 'a' [1], Gemm"),
        ("a = MatMul(x, w) b = Add(a, w) y = Relu(b)", "also used by Add 'b'"),
        ("a = MatMul(x, w) t = Transpose(w) y = MatMul(a, t)", "also used by Transpose 't', whose result is constant;"),
        ("y = Add(x, w)", "used by Add 'y', which is no matrix product"),
        ("t = Transpose(w) y = MatMul(x, t)", "used by Transpose 't', whose result is constant; run fold-constants"),
        ("i = Cast<to=7>(x) y = Gather<axis=1>(w, i)", "Gather 'y' reads along axis 1, not whole rows"),
        ("y = own.Foo(x, w)", "used by own.Foo 'y', which is no matrix product"),
    ],
)
def test_declined_with_a_reason(body: str, reason: str) -> None:
    model = parse(body, w=weight(8, 8))
    assert skipped(model)["w"].startswith(reason)
    assert found(model) == {}


def test_computed_and_quantised_operands_are_named() -> None:
    transposed = parse("t = Transpose(w) y = MatMul(x, t)", w=weight(8, 8))
    assert skipped(transposed)["t"] == "computed by Transpose 't', not constant; run fold-constants first"
    made = parse("c = ConstantOfShape(s) y = MatMul(x, c)", s=np.array([8, 4096]))
    assert skipped(made)["c"] == (
        "computed by ConstantOfShape 'c', and fold-constants leaves it: it would store 131072 bytes and free 16; "
        "make it an initialiser"
    )
    half = parse("c = Cast<to=1>(w) y = MatMul(x, c)", w=weight(8, 512, dtype="float16"))
    assert "and fold-constants leaves it: it would store 16384 bytes and free 8192" in skipped(half)["c"]
    quantised = parse(
        "d = DequantizeLinear(q, s) y = MatMul(x, d)", q=np.ones((8, 4), np.int8), s=np.array(0.5, np.float32)
    )
    assert skipped(quantised) == {"d": "quantised already: made by DequantizeLinear 'd'"}
    integer = parse("a = Cast<to=2>(x) b = MatMulInteger(a, q) y = Cast<to=1>(b)", q=np.ones((8, 4), np.uint8))
    assert skipped(integer) == {"q": "quantised already: MatMulInteger 'b' takes integers"}


def test_activations_are_not_mentioned() -> None:
    model = parse("a = Relu(x) t = Transpose(a) y = MatMul(a, t)")
    assert list(ir.weight_sites(model)) == []


def test_biases_scales_and_small_constants_are_not_mentioned() -> None:
    model = parse("a = Mul(x, s) y = Add(a, b)", s=np.ones((1, 8), np.float32), b=np.ones(8, np.float32))
    assert list(ir.weight_sites(model)) == []


def test_integer_tables_are_not_mentioned() -> None:
    body = "i = Cast<to=7>(x) a = Gather(w, i) y = Cast<to=1>(a)"
    assert list(ir.weight_sites(parse(body, w=np.ones((8, 4), np.int64)))) == []


def test_graph_input_and_graph_output_are_declined() -> None:
    body, w = "y = MatMul(x, w)", weight(8, 4)
    model = parse(body, signature="float[N,8] x, float[8,4] w", w=w)
    assert skipped(model)["w"].startswith("also a graph input")
    shown = parse(body, w=w)
    shown.graph.outputs.append(shown.graph.initializers["w"])
    assert skipped(shown) == {"w": "also a graph output"}


def test_a_cycle_does_not_hang() -> None:
    model = parse("a = Relu(x) b = Neg(a) y = MatMul(x, b)")
    made = {n.outputs[0].name: n for n in model.graph}
    made["a"].replace_input_with(0, made["b"].outputs[0])
    assert list(ir.weight_sites(model)) == []


def test_replacement_keeps_name_type_metadata_and_order() -> None:
    model = parse("y = MatMul(x, w)", w=weight(8, 4))
    old = model.graph.initializers["w"]
    old.metadata_props["mc_opt.layer"], old.doc_string = "fc", "the weight"
    assert list(found(model)) == ["fc"]
    assert compress(model) == 1
    node, matmul = model.graph
    assert matmul.inputs[1] is node.outputs[0]
    new = node.outputs[0]
    assert (new.name, new.dtype, tuple(new.shape or ())) == ("w", onnx_ir.DataType.FLOAT, (8, 4))
    assert (new.metadata_props["mc_opt.layer"], new.doc_string) == ("fc", "the weight")
    assert list(model.graph.initializers) == ["w.codes", "w.codebook"]
    assert node.metadata_props == {"mc_opt.pass": "toy", "mc_opt.rule": "to-lookup"}
    assert node.name == "toy/w"
    ir.verify(model)
    assert skipped(model) == {"fc": "compressed already: made by Lookup 'toy/w'"}


def test_the_original_is_untouched_and_shares_its_weights() -> None:
    model = parse("y = MatMul(x, w)", w=weight(8, 4))
    before = onnx_ir.to_proto(model).SerializeToString()
    clone = model.clone()
    assert clone.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value
    compress(clone)
    assert onnx_ir.to_proto(model).SerializeToString() == before


def test_tied_half_weight_and_weights_of_a_branch_run() -> None:
    branch = "then_branch = a () => (float16[N,8] p) { p = MatMul(h, v) }"
    other = "else_branch = b () => (float16[N,8] q) { t = MatMul(h, v) q = MatMul(t, v) }"
    body = f"h = MatMul(x, w) k = MatMul(h, w) y = If(flag) <{branch}, {other}>"
    model = parse(
        body,
        signature="float16[N,8] x, bool flag",
        w=weight(8, 8, dtype="float16"),
        v=weight(8, 8, dtype="float16", seed=1),
    )
    model.graph.outputs[0].dtype = onnx_ir.DataType.FLOAT16
    # one branch gets a weight of its own
    inner = next(a for n in model.graph for a in n.attributes.values() if a.name == "else_branch").as_graph()
    own = ir.initializer(inner, "u", weight(8, 8, dtype="float16", seed=2))
    inner[1].replace_input_with(1, own)
    assert found(model) == {"w": ("MatMul", (1,)), "v": ("MatMul", (1,)), "u": ("MatMul", (1,))}
    assert compress(model) == 3
    ir.verify(model)
    assert list(inner.initializers) == ["u.codes", "u.codebook"]
    names = [n.outputs[0].name for n in model.graph]
    assert names.index("w") < names.index("h") and names.index("v") < names.index("y")
    x = weight(3, 8, dtype="float16", seed=3)
    book = np.array([-1, -0.5, 0.5, 1], np.float16)
    decoded = book[np.arange(64) % 4].reshape(8, 8).T.astype(np.float32)
    (got,) = run(model, x=x, flag=np.array(True))
    want = x.astype(np.float32) @ decoded @ decoded
    assert np.abs(got - want).max() <= 0.01 * np.abs(want).max()  # products in float16


def test_second_level_names_derive_from_the_first() -> None:
    model = parse("y = MatMul(x, w)", w=weight(8, 4))
    (site,) = ir.weight_sites(model)
    assert isinstance(site, ir.WeightSite)
    level = ir.node(
        "Lookup", [ir.pack_codes(np.zeros(4, np.uint8), 1), np.ones(2, np.float32)], {"bits": 1, "shape": (4, 1)}
    )
    codes = ir.pack_codes(np.zeros(32, np.uint8), 3)
    outer = ir.node(
        "Lookup", [codes, np.ones(8, np.float32), level.outputs[0]], {"bits": 3, "shape": (8, 4), "axes": (1,)}
    )
    ir.replace_weight(site, [level, outer], by=("toy", "two-levels"))
    ir.add_functions(model)
    ir.verify(model)
    assert list(model.graph.initializers) == ["w.codes", "w.codebook", "w.scale.codes", "w.scale.codebook"]
    assert [n.name for n in model.graph][:2] == ["toy/w.scale", "toy/w"]
    x = weight(2, 8)
    np.testing.assert_allclose(run(model, x=x)[0], x @ np.ones((8, 4)), rtol=1e-5)


def test_a_sum_of_two_lookups_has_names() -> None:
    model = parse("y = MatMul(x, w)", w=weight(8, 4))
    (site,) = ir.weight_sites(model)
    assert isinstance(site, ir.WeightSite)
    parts = [lookup(site), lookup(site)]
    total = onnx_ir.node("Add", [p.outputs[0] for p in parts])
    total.outputs[0].type, total.outputs[0].shape = site.value.type, site.value.shape
    ir.replace_weight(site, [*parts, total], by=("toy", "two-terms"))
    ir.add_functions(model)
    ir.verify(model)
    assert [n.outputs[0].name for n in model.graph] == ["w.1", "w.2", "w", "y"]
    assert sorted(model.graph.initializers) == ["w.1.codebook", "w.1.codes", "w.2.codebook", "w.2.codes"]


def test_names_that_exist_are_not_taken() -> None:
    model = parse("a = Relu(x) c = Identity(a) y = MatMul(c, w)", w=weight(8, 4))
    next(n for n in model.graph if n.op_type == "Relu").outputs[0].name = "w.codes"
    compress(model)
    ir.verify(model)
    assert list(model.graph.initializers) == ["w.codes.1", "w.codebook"]


def test_a_replacement_of_another_shape_is_refused() -> None:
    model = parse("y = MatMul(x, w)", w=weight(8, 4))
    (site,) = ir.weight_sites(model)
    assert isinstance(site, ir.WeightSite)
    node = ir.node(
        "Lookup", [ir.pack_codes(np.zeros(32, np.uint8), 1), np.ones(2, np.float32)], {"bits": 1, "shape": (4, 8)}
    )
    with pytest.raises(ir.IRError, match=r"w: the replacement is FLOAT\[4, 8\], expected FLOAT\[8, 4\]"):
        ir.replace_weight(site, node, by=("toy", "wrong"))
    ir.replace_weight(site, lookup(site), by=("toy", "right"))
    with pytest.raises(ir.IRError, match=r"take sites from a fresh ir\.weight_sites"):
        ir.replace_weight(site, lookup(site), by=("toy", "again"))


def test_globs() -> None:
    assert ir.matches("encoder.0.w", ("encoder.*",))
    assert not ir.matches("Encoder.0.w", ("encoder.*", "decoder.?"))
    assert not ir.matches("w", ())


def test_free_names_and_initialisers() -> None:
    model = parse("y = MatMul(x, w)", w=weight(8, 4))
    assert ir.free_name(model.graph, "w") == "w.1"
    assert ir.free_name(model.graph, "v") == "v"
    value = ir.initializer(model.graph, "w", np.ones(3, np.float16))
    assert (value.name, value.dtype, tuple(value.shape or ())) == ("w.1", onnx_ir.DataType.FLOAT16, (3,))
    assert model.graph.initializers["w.1"] is value
