"""What verify refuses, by its message; and that a sound model passes unchanged and fast."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir
import pytest

from mc_opt import ir

MODEL = """<ir_version: 10, opset_import: ["": 21]> g (float[2,8] x, bool flag) => (float[2,4] y, float[2,4] z)
<float[8,4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31,32}> {
  h = MatMul(x, w)
  y = Relu(h)
  z = If(flag) <
    then_branch = a () => (float[2,4] t) { t = Relu(y) },
    else_branch = b () => (float[2,4] e) { e = Neg(y) }>
}"""


@pytest.fixture
def model() -> onnx_ir.Model:
    return typed(onnx.parser.parse_model(MODEL))


def typed(proto: onnx.ModelProto) -> onnx_ir.Model:
    return onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def compressed() -> onnx_ir.Model:
    model = typed(onnx.parser.parse_model(MODEL))
    (site,) = ir.weight_sites(model)
    assert isinstance(site, ir.WeightSite)
    codes = ir.pack_codes(np.zeros((4, 8), np.uint8), 4)
    node = ir.node("Lookup", [codes, np.ones(9, np.float32)], {"bits": 4, "shape": site.shape, "axes": site.axes})
    ir.replace_weight(site, node, by=("denseshift", "to-shift"))
    ir.add_functions(model)
    return model


def refused(model: onnx_ir.Model, message: str, level: str = "structure") -> None:
    with pytest.raises(ir.IRError, match=message):
        ir.verify(model, level=level)  # type: ignore[arg-type]  # one of the two


def value(model: onnx_ir.Model, name: str) -> onnx_ir.Value:
    return next(o for n in model.graph.all_nodes() for o in n.outputs if o.name == name)


def node(model: onnx_ir.Model, name: str) -> onnx_ir.Node:
    producer = value(model, name).producer()
    assert producer is not None
    return producer


@pytest.mark.parametrize("build", [lambda: typed(onnx.parser.parse_model(MODEL)), compressed])
def test_a_sound_model_passes_unchanged(build: Callable[[], onnx_ir.Model]) -> None:
    model = build()
    before = onnx_ir.to_proto(model).SerializeToString()
    ir.verify(model)
    ir.verify(model, level="structure")
    assert onnx_ir.to_proto(model).SerializeToString() == before


def test_a_name_for_two_values(model: onnx_ir.Model) -> None:
    value(model, "h").name = "x"
    refused(model, "x: the name stands for two values.*an output of MatMul.*take new names from ir.free_name")


def test_a_value_that_is_two_outputs(model: onnx_ir.Model) -> None:
    model.graph.outputs.append(model.graph.outputs[0])
    refused(model, "y: is an output of the graph twice, expected a name for each; copy it by an Identity")


def test_a_name_of_a_subgraph_and_its_outside(model: onnx_ir.Model) -> None:
    value(model, "t").name = "h"
    refused(model, "h: the name stands for two values")


def test_a_name_in_both_branches_is_legal() -> None:
    text = MODEL.replace(" e) { e = Neg", " t) { t = Neg")
    ir.verify(typed(onnx.parser.parse_model(text)))


def test_a_value_without_a_type(model: onnx_ir.Model) -> None:
    value(model, "h").type = None
    refused(model, "h: MatMul: output 'h' has no type, expected one; set type and shape")


@pytest.mark.parametrize("node", ["h = MatMul(x, w) y = Relu(h)", "y = MatMul(x, w)"])
def test_shapes_that_do_not_fit_are_named(node: str) -> None:
    weight = "<float[3,4] w = {1,2,3,4,5,6,7,8,9,10,11,12}>"
    text = f'<ir_version: 10, opset_import: ["": 21]> g (float[2,9] x) => (float[2,4] y) {weight} {{ {node} }}'
    reason = (
        "takes x FLOAT\\[2,9\\], w FLOAT\\[3,4\\]: incompatible dimensions for matrix multiplication; correct the node"
    )
    refused(typed(onnx.parser.parse_model(text)), f"^[hy]: MatMul: {reason}, or the shape of an input$", level="full")


def test_what_follows_a_foreign_op_may_lack_a_type() -> None:
    text = """<ir_version: 10, opset_import: ["": 21, "own": 1]> g (float[2] x) => (float[2] y) {
      a = own.Foo(x) b = Relu(a) y = Neg(b) }"""
    ir.verify(typed(onnx.parser.parse_model(text)), level="structure")


def test_a_constant_that_no_graph_holds(model: onnx_ir.Model) -> None:
    model.graph.initializers.pop("w")
    refused(model, "h: MatMul takes the constant 'w', which no graph holds; register it with ir.initializer")


def test_a_value_that_nothing_makes(model: onnx_ir.Model) -> None:
    node(model, "y").replace_input_with(0, onnx_ir.Value(name="lost"))
    refused(model, "y: Relu takes 'lost', which nothing makes")


def test_a_value_of_a_removed_node(model: onnx_ir.Model) -> None:
    model.graph.remove(node(model, "h"))
    refused(model, "y: Relu takes 'h' of MatMul, which is in no graph")


def test_a_second_value_of_a_known_name(model: onnx_ir.Model) -> None:
    node(model, "y").replace_input_with(0, onnx_ir.Value(name="h"))
    refused(model, "y: Relu takes a second value called 'h'")


def test_an_order_that_cannot_run(model: onnx_ir.Model) -> None:
    moved = node(model, "h")
    model.graph.remove(moved)
    model.graph.append(moved)
    refused(model, "y: Relu takes 'h' before h: MatMul makes it.*sort the graph")


def test_a_cycle_is_named_by_its_shortest_way(model: onnx_ir.Model) -> None:
    for made in model.graph:
        made.name = f"node_{made.outputs[0].name}"
    node(model, "h").replace_input_with(0, value(model, "y"))
    refused(model, "h: MatMul depends on itself: node_h -> node_y -> node_h; expected no cycle")


def test_a_value_of_a_branch_used_outside(model: onnx_ir.Model) -> None:
    extra = onnx_ir.node("Neg", [value(model, "t")], name="late")
    extra.outputs[0].name = "late"
    model.graph.append(extra)
    refused(model, "late: Neg takes 't' before t: Relu makes it, or from a subgraph that is not around it")


def test_an_output_that_nothing_makes(model: onnx_ir.Model) -> None:
    model.graph.outputs.append(onnx_ir.Value(name="lost", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT)))
    refused(model, "graph 'g', output 'lost' takes 'lost', which nothing makes")


def test_an_initialiser_of_another_shape(model: onnx_ir.Model) -> None:
    model.graph.initializers["w"].const_value = onnx_ir.tensor(np.zeros((4, 8), np.float32))
    refused(model, r"w: the initialiser is typed FLOAT\[8, 4\], but its data is FLOAT\[4, 8\]")


def test_an_initialiser_without_data(model: onnx_ir.Model) -> None:
    model.graph.initializers["w"].const_value = None
    refused(model, "w: an initialiser without data")


def test_a_missing_import(model: onnx_ir.Model) -> None:
    node(model, "y").domain = "own"
    refused(model, "y: Relu: domain 'own' is not among the model's imports")


def test_an_op_that_the_opset_lacks(model: onnx_ir.Model) -> None:
    node(model, "y").op_type = "Relo"
    refused(model, "y: Relo: opset 21 has no op 'Relo'")


def test_an_old_opset(model: onnx_ir.Model) -> None:
    model.opset_imports[""] = 17
    refused(model, "model: opset is 17, expected 21 or newer; read it with ir.load_model")


def test_a_missing_function() -> None:
    model = compressed()
    model.functions.clear()
    refused(model, "w: Lookup: the model has no function Lookup:b4.* call ir.add_functions")


def test_a_function_that_means_something_else() -> None:
    model = compressed()
    (function,) = model.functions.values()
    next(n for n in function if n.op_type == "BitwiseAnd").op_type = "BitwiseOr"
    refused(model, "w: Lookup: the function Lookup:b4.* is not what the op means")


def test_an_overload_that_does_not_fit() -> None:
    model = compressed()
    node(model, "w").overload = "b4"
    refused(model, "w: Lookup: overload is 'b4', expected 'b4")


def test_an_op_of_ours_with_a_wrong_attribute() -> None:
    model = compressed()
    node(model, "w").attributes["bits"] = onnx_ir.AttrInt64("bits", 11)
    refused(model, "w: Lookup bits is 11, expected 1 to 8")


def test_an_op_of_ours_with_a_wrong_type() -> None:
    model = compressed()
    value(model, "w").shape = onnx_ir.Shape([4, 8])
    refused(model, r"w: Lookup: the output is typed FLOAT \[4, 8\], expected FLOAT \[8, 4\]")


def test_codes_beyond_the_codebook_are_seen_with_the_data() -> None:
    model = compressed()
    codes = np.full((4, 8), 12, np.uint8)
    model.graph.initializers["w.codes"].const_value = onnx_ir.tensor(ir.pack_codes(codes, 4))
    ir.verify(model, level="structure")
    refused(model, "w: Lookup has code 12, expected codes below 9", level="full")


def test_what_the_checker_refuses(model: onnx_ir.Model) -> None:
    node(model, "y").attributes["wrong"] = onnx_ir.AttrInt64("wrong", 1)
    ir.verify(model, level="structure")
    refused(model, "model: onnx's checker says: Unrecognized attribute: wrong", level="full")


class Heavy(onnx_ir.LazyTensor):
    """A weight that must not be read."""


def test_the_checker_reads_no_large_weight() -> None:
    def explode() -> onnx_ir.Tensor:
        raise AssertionError("read")

    n = 1 << 15
    text = f'<ir_version: 10, opset_import: ["": 21]> g (float[1,{n}] x) => (float[1,{n}] y) {{ y = MatMul(x, w) }}'
    model = onnx_ir.from_proto(onnx.parser.parse_model(text))
    weight = model.graph[0].inputs[1]
    assert weight is not None
    weight.type, weight.shape = onnx_ir.TensorType(onnx_ir.DataType.FLOAT), onnx_ir.Shape([n, n])
    weight.const_value = Heavy(explode, dtype=onnx_ir.DataType.FLOAT, shape=onnx_ir.Shape([n, n]), name="w")  # 4 GiB
    model.graph.register_initializer(weight)
    ir.verify(model)


def test_nine_hundred_nodes_take_no_time() -> None:
    lines = "\n".join(f"  a{i + 1} = Relu(a{i})" for i in range(900))
    text = f'<ir_version: 10, opset_import: ["": 21]> g (float[2] a0) => (float[2] a900) {{\n{lines}\n}}'
    model = typed(onnx.parser.parse_model(text))
    ir.verify(model, level="structure")
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        ir.verify(model, level="structure")
        taken.append(time.perf_counter() - start)
    assert min(taken) <= 0.05  # 0.01 s measured on an idle core; the best of five, as the machine may be shared
