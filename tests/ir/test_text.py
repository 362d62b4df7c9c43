"""The text form: what it shows, what it leaves out, and that it is stable."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest

from mc_opt import ir

MODEL = """<ir_version: 10, opset_import: ["": 21]>
g (float[N,8] x, bool flag) => (float[N,4] y, float[N,4] z)
<float[8,4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31,32}> {
  y = Gemm<beta=0.1, alpha=0.5>(x, w)
  z = If(flag) <
    then_branch = a () => (float[N,4] t) { t = Relu(y) },
    else_branch = b () => (float[N,4] e) { e = Neg(y) }>
}"""


@pytest.fixture
def model() -> onnx_ir.Model:
    return onnx_ir.from_proto(onnx.parser.parse_model(MODEL))


def test_text_of_a_model(model: onnx_ir.Model) -> None:
    digest = ir.digest(model.graph.initializers["w"].const_value)
    assert (
        ir.to_text(model)
        == f"""\
ir 10, opset 21
g(x: f32[N,8], flag: b8[]) -> (y: f32[N,4], z: f32[N,4])
  w: f32[8,4] #{digest}
  y = Gemm(x, w) {{alpha=0.5, beta=0.1}}
  z = If(flag)
    else_branch:
      b() -> (e: f32[N,4])
        e = Neg(y)
    then_branch:
      a() -> (t: f32[N,4])
        t = Relu(y)
"""
    )


def test_our_ops_print_without_their_functions_and_defaults(model: onnx_ir.Model) -> None:
    (site,) = ir.weight_sites(model)
    assert isinstance(site, ir.WeightSite)
    codes = ir.pack_codes(np.zeros((4, 8), np.uint8), 4)
    node = ir.node(
        "Lookup", [codes, np.ones(16, np.float32)], {"bits": 4, "shape": site.shape, "axes": site.axes, "group_size": 0}
    )
    ir.replace_weight(site, node, by=("denseshift", "to-shift"))
    ir.add_functions(model)
    text = ir.to_text(model)
    assert text.splitlines()[0] == "ir 10, opset 21, mc_opt 1"
    assert "  w = mc_opt.Lookup(w.codes, w.codebook) {axes=[1], bits=4, shape=[8, 4]}\n" in text
    assert "BitShift" not in text
    assert ir.nodes_text(model.graph).startswith("w = mc_opt.Lookup(w.codes, w.codebook) {")


def test_text_is_that_of_the_clone_and_the_reload(model: onnx_ir.Model) -> None:
    text = ir.to_text(model)
    assert ir.to_text(model.clone()) == text
    assert ir.to_text(onnx_ir.from_proto(onnx_ir.to_proto(model))) == text


def test_text_has_no_history(model: onnx_ir.Model) -> None:
    text = ir.to_text(model)
    for node in model.graph.all_nodes():
        node.name, node.metadata_props["mc_opt.pass"] = "other", "denseshift"
    assert ir.to_text(model) == text


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "uint8", "bool"])
def test_digest_sees_the_bytes(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    other = array.copy()
    other[0, 0] = 1 - other[0, 0]
    assert ir.digest(onnx_ir.tensor(array)) == ir.digest(onnx_ir.tensor(np.asfortranarray(array)))
    assert ir.digest(onnx_ir.tensor(array)) != ir.digest(onnx_ir.tensor(other))
    assert len(ir.digest(onnx_ir.tensor(array))) == 12


def test_digest_of_empty_scalar_string_and_packed_tensors() -> None:
    four_bits = onnx_ir.tensor(np.array([1, 2, 3], np.uint8), dtype=onnx_ir.DataType.UINT4)
    for tensor in (
        onnx_ir.tensor(np.zeros((0, 3), np.float32)),
        onnx_ir.tensor(np.float32(1)),
        onnx_ir.StringTensor(np.array([b"a", b"bc"], object), shape=onnx_ir.Shape([2])),
        four_bits,
    ):
        assert len(ir.digest(tensor)) == 12


def test_values_without_a_type_print_a_question_mark() -> None:
    assert ir.type_text(onnx_ir.Value(name="x")) == "?[*]"
    half = onnx_ir.Value(name="x", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT16), shape=onnx_ir.Shape([None, 2]))
    assert ir.type_text(half) == "f16[?,2]"
