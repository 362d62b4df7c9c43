"""Shapes: their text, fixing them, inferring them, and the advice on what to fix."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc_opt import ir

NET = """<ir_version: 10, opset_import: ["": 21]>
net (float[batch, 3, h, w] x, float[2, batch, 8] state) => (float[batch, c, oh, ow] y, float[2, batch, 8] s)
{
  y = Conv <pads = [1, 1, 1, 1]> (x, k)
  s = Relu (state)
}"""


def model(text: str = NET) -> onnx_ir.Model:
    proto = onnx.parser.parse_model(text)
    if text == NET:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((4, 3, 3, 3), np.float32), "k"))
    made: onnx_ir.Model = onnx_ir.from_proto(proto)
    return made


def shape(value: onnx_ir.Value) -> list[str]:
    assert value.shape is not None
    return [str(d) for d in value.shape]


@given(st.text("abcx=/.:_0", min_size=1), st.lists(st.integers(0, 10**6)))
def test_a_shape_text_reads_back(name: str, dims: list[int]) -> None:
    assert ir.parse_shape(ir.format_shape(name, tuple(dims))) == (name, tuple(dims))


@pytest.mark.parametrize("text", ["", "x", "x=", "=1x2", "x=1x", "x=1*2", "x=-1x2", "x=a-bx2", "x=1.5"])
def test_a_shape_text_that_is_none(text: str) -> None:
    with pytest.raises(ir.OptionError, match=r"expected input=dimensions"):
        ir.parse_shape(text)


def test_a_fixed_dimension_is_fixed_everywhere() -> None:
    made = model()
    ir.fix_shapes(made, {"x": (2, 3, 16, 24)})
    assert shape(made.graph.inputs[1]) == ["2", "2", "8"]
    assert shape(made.graph.outputs[0]) == ["2", "4", "16", "24"]
    assert shape(made.graph.outputs[1]) == ["2", "2", "8"]


def test_stale_shapes_are_forgotten() -> None:
    made = model("""<ir_version: 10, opset_import: ["": 21]>
    g (float[n, m] x) => (float[a, b] z) <float[q, r] y> { y = Transpose <perm = [1, 0]> (x) z = Relu (y) }""")
    ir.fix_shapes(made, {"x": (2, 5)})
    assert [shape(v) for n in made.graph for v in n.outputs] == [["5", "2"], ["5", "2"]]


def test_an_op_without_inference_keeps_what_was_declared() -> None:
    made = model("""<ir_version: 10, opset_import: ["": 21, "other": 1]>
    g (float[n, m] x) => (float[n, 7] z) { z = other.Op (x) }""")
    ir.fix_shapes(made, {"x": (2, 5)})
    assert shape(made.graph.outputs[0]) == ["2", "7"]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {"q": (1, 2)},
            "--shape q=1x2: unknown input 'q'; the inputs are: x FLOAT[batch,3,h,w], state FLOAT[2,batch,8]",
        ),
        ({"x": (1, 3, 8)}, "3 dimensions, but the input is FLOAT[batch,3,h,w]; give 4"),
        ({"x": (1, 4, 8, 8)}, "dimension 1 is 4, but the input is FLOAT[batch,3,h,w]; give 3"),
        ({"x": (1, 3, 8, 8), "state": (2, 2, 8)}, "dimension 'batch' is 2 here and 1 elsewhere"),
        ({"x": (0, 3, 8, 8)}, "a dimension is 0, expected 1 or more"),
    ],
)
def test_shapes_that_contradict_the_model(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ir.IRError, match=re.escape(message)):
        ir.fix_shapes(model(), shapes)


def test_inference_reaches_bodies_and_reads_small_constants() -> None:
    made = model("""<ir_version: 10, opset_import: ["": 21]>
    g (float[4, 6] x, bool c) => (y) <int64[2] to = {3, 8}> {
      r = Reshape (x, to)
      y = If (c) <then_branch = a () => (t) { t = Relu (r) }, else_branch = b () => (u) { u = Neg (r) }>
    }""")
    ir.infer_shapes(made)
    body = next(n for n in made.graph if n.op_type == "If").attributes["then_branch"].as_graph()
    assert shape(body.outputs[0]) == shape(made.graph.outputs[0]) == ["3", "8"]
    assert made.graph.outputs[0].dtype == onnx_ir.DataType.FLOAT


def test_inference_knows_functions() -> None:
    made = model("""<ir_version: 10, opset_import: ["": 21, "local": 1]>
    g (float[3, 4] x) => (y) { y = local.flip (x) }
    <domain: "local", opset_import: ["": 21]> flip (a) => (b) { b = Transpose <perm = [1, 0]> (a) }""")
    ir.infer_shapes(made)
    assert shape(made.graph.outputs[0]) == ["4", "3"]


def test_inference_never_reads_large_weights() -> None:
    made = model()

    class Unreadable(onnx_ir.Tensor[np.ndarray]):
        def tobytes(self) -> bytes:
            raise AssertionError("a weight was read")

    weight = np.zeros((4, 3, 30, 30), np.float32)
    made.graph.initializers["k"].const_value = Unreadable(weight, name="k")
    made.graph.initializers["k"].shape = onnx_ir.Shape(weight.shape)
    ir.fix_shapes(made, {"x": (1, 3, 32, 32)})
    assert shape(made.graph.outputs[0]) == ["1", "4", "5", "5"]


def test_advice_can_be_pasted() -> None:
    made = model()
    advice = ir.shape_advice(made)
    assert advice == "--shape x=1x3x224x224 --shape state=2x1x8"
    ir.fix_shapes(made, dict(ir.parse_shape(word) for word in advice.split() if "=" in word))
    assert ir.shape_advice(made) is None


def test_advice_fits_the_graph() -> None:
    made = model(f"""<ir_version: 10, opset_import: ["": 21]>
    g (float[n, 3, h, w] x) => (y) <float[1, 1, 48, 1] rows = {{{",".join(["1"] * 48)}}}> {{ y = Add (x, rows) }}""")
    assert ir.shape_advice(made) == "--shape x=1x3x48x192"


@pytest.mark.parametrize(
    ("inputs", "advice"),
    [
        ("int64[b, s] ids, int64[b, s] mask", "--shape ids=1x64 --shape mask=1x64"),
        ("float[n, t] wave", "--shape wave=1x576"),
        ("float[n, 160, 40] mel", "--shape mel=1x160x40"),
        ("float[3] x", None),
    ],
)
def test_advice_for_texts_and_signals(inputs: str, advice: str | None) -> None:
    name = inputs.rpartition(" ")[2]
    text = f'<ir_version: 10, opset_import: ["": 21]> g ({inputs}) => (y) {{ y = Identity ({name}) }}'
    assert ir.shape_advice(model(text)) == advice


def test_a_name_leaves_a_dimension_open() -> None:
    assert ir.parse_shape("x=Nx3x8x8") == ("x", ("N", 3, 8, 8))
    made = model()
    ir.fix_shapes(made, {"x": ("N", 3, 32, 32), "state": (2, "N", 8)})
    assert [shape(v) for v in made.graph.inputs[:2]] == [["N", "3", "32", "32"], ["2", "N", "8"]]
    assert shape(made.graph.outputs[0])[0] == "N"


def test_onnx_does_not_see_the_codes_of_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """It made an object for each byte of them: 4 GB and half a minute for a model of 76 MB."""
    made = model("""<ir_version: 10, opset_import: ["": 21]>
    g (float[n, 2] x, float[2, 2] w) => (float[n, m] y) { y = MatMul (x, w) }""")
    codes = ir.pack_codes(np.array([0, 1, 2, 3], np.uint8), 2)
    attributes = {"bits": 2, "shape": (2, 2), "axes": (1,)}
    lookup = ir.node("Lookup", [codes, np.arange(4, dtype=np.float32)], attributes, output="decoded")
    for value, name in zip(lookup.inputs, ("codes", "codebook"), strict=True):
        assert value is not None
        value.name = name
        made.graph.register_initializer(value)
    product = made.graph[0]
    made.graph.insert_before(product, lookup)
    product.replace_input_with(1, lookup.outputs[0])
    ir.add_functions(made)
    seen = list[onnx.ModelProto]()
    infer = onnx.shape_inference.infer_shapes
    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", lambda m, **k: seen.append(m) or infer(m, **k))
    lookup.outputs[0].shape = None
    ir.fix_shapes(made, {"x": (5, 2)})
    assert [node.op_type for node in seen[0].graph.node] == ["MatMul"]
    assert (shape(lookup.outputs[0]), lookup.outputs[0].dtype) == (["2", "2"], onnx_ir.DataType.FLOAT)
    assert shape(product.outputs[0]) == ["5", "2"]
