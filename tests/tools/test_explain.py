"""Why a layer was left alone."""

from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir
import pytest

from mc_opt import ir, passes
from mc_opt.passes import Context, Pipeline
from mc_opt.tools._explain import Finding, explain, to_json
from tests.passes.toy import Toy

W1 = ", ".join(str(i % 7 - 3) for i in range(32))
MODEL = f"""
<ir_version: 10, opset_import: ["": 21]>
g (float[2,4] x) => (float[2,8] y)
<float[4,8] w1 = {{{W1}}}, float[8,8] w2 = {{{", ".join(["1"] * 64)}}}>
{{
  [first] h = MatMul (x, w1)
  [middle] r = Relu (h)
  [last] y = MatMul (r, w2)
}}
"""


@pytest.fixture
def model() -> onnx_ir.Model:
    made = onnx_ir.from_proto(onnx.parser.parse_model(MODEL))
    for node in made.graph:
        node.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        node.outputs[0].shape = onnx_ir.Shape([2, 8])
    return made


def test_each_pass_of_a_pipeline_says_what_it_did(model: onnx_ir.Model) -> None:
    pipeline = Pipeline.of(Toy(skip=("w1",)), Toy(layers=("w1",)))
    found = explain(model, "w1", pipeline=pipeline)
    assert found.findings == (
        Finding("toy", "declined", "skip=w1 names it"),
        Finding("toy", "rewritten", "toy: 128 -> 128 bytes, 32 bits a weight"),
    )


def test_a_layer_stands_somewhere_in_the_graph(model: onnx_ir.Model) -> None:
    found = explain(model, "w2", pipeline=Pipeline())
    assert found.consumers == ("MatMul last",)
    assert found.feeds == ("Relu middle",)
    assert found.fed == ()
    assert (found.upstream, found.downstream) == (2, 0)
    assert to_json(found)["layer"] == "w2"


def test_a_report_is_asked_instead_of_the_passes(model: onnx_ir.Model) -> None:
    report = passes.run(model, Pipeline.of(Toy(skip=("w1",))), Context(), check="structure").report
    assert explain(model, "w1", report=report).findings == (Finding("toy", "declined", "skip=w1 names it"),)


def test_a_node_names_its_layer(model: onnx_ir.Model) -> None:
    assert explain(model, "first", pipeline=Pipeline()).layer == "w1"


def test_an_unknown_layer_lists_the_known_ones(model: onnx_ir.Model) -> None:
    with pytest.raises(ir.OptionError, match=r"unknown layer 'w11'; did you mean 'w1'\? \(known: w1, w2\)"):
        explain(model, "w11")


NORM = """
<ir_version: 10, opset_import: ["": 21]>
g (float[1,2,4,4] x) => (float[1,2,4,4] y)
<float[2,2,1,1] w = {1, 2, 3, 4}, float[2] s1 = {1, 2}, float[2] b = {0, 1}, float[2] m = {0, 1}, float[2] v = {1, 2},
 float[2] s2 = {1, 2}>
{
  [conv] h = Conv (x, w)
  [folded] n = BatchNormalization (h, s1, b, m, v)
  [act] r = Relu (n)
  [kept] y = BatchNormalization (r, s2, b, m, v)
}
"""


@pytest.mark.parametrize(("name", "outcome"), [("s1", "rewritten"), ("folded", "rewritten"), ("kept", "declined")])
def test_a_batch_norm_says_why_it_stays(name: str, outcome: str) -> None:
    """Under the name that the report gives it, its scale's, and under its node's."""
    model = ir.infer_shapes(made := onnx_ir.from_onnx_text(NORM)) or made
    found = explain(model, name, pipeline=Pipeline.parse("fold-batch-norm"))
    assert found.layer in ("s1", "s2") and [f.outcome for f in found.findings] == [outcome]
