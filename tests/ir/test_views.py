"""Questions about the graph: edges through subgraphs, cycles by name, reach, longest path."""

from __future__ import annotations

import onnx
import onnx_ir
import pytest

from mc_opt import ir

MODEL = """<ir_version: 10, opset_import: ["": 21]> g (float[4] x, bool flag) => (float[4] y) {
  a = Relu(x)
  b = Neg(a)
  c = If(flag) <
    then_branch = t () => (float[4] p) { q = Exp(b) p = Sqrt(q) },
    else_branch = e () => (float[4] r) { r = Abs(a) }>
  y = Add(c, a)
}"""


@pytest.fixture
def model() -> onnx_ir.Model:
    return onnx_ir.from_proto(onnx.parser.parse_model(MODEL))


def close(model: onnx_ir.Model, node: str, value: str) -> None:
    """Let a node take a value that is made after it."""
    values = {o.name: o for n in model.graph.all_nodes() for o in n.outputs}
    next(n for n in model.graph.all_nodes() if n.outputs[0].name == node).replace_input_with(0, values[value])


def test_edges_carry_values_and_pass_through_subgraphs(model: onnx_ir.Model) -> None:
    view = ir.graph_of(model)
    assert list(view) == ["a", "b", "c", "q", "p", "r", "y"]
    assert view.nodes["c"]["op_type"] == "If"
    assert view.edges["b", "q"]["values"] == ("b",)
    assert view.edges["p", "c"]["values"] == ("p",)
    assert set(view.edges) == {
        *[("a", "b"), ("a", "r"), ("a", "y"), ("b", "q"), ("q", "p")],
        *[("q", "c"), ("p", "c"), ("r", "c"), ("c", "y")],
    }


def test_names_that_repeat_or_miss_are_told_apart(model: onnx_ir.Model) -> None:
    for node in model.graph:
        node.name = "same"
    assert list(ir.graph_of(model))[:4] == ["same", "same#2", "same#3", "q"]


def test_reach(model: onnx_ir.Model) -> None:
    view = ir.graph_of(model)
    assert ir.upstream(view, "q") == {"a", "b"}
    assert ir.downstream(view, "q") == {"p", "c", "y"}
    assert ir.path_between(view, "b", "y") == ("b", "q", "c", "y")
    assert ir.path_between(view, "y", "b") is None
    assert ir.longest_path(view) == ("a", "b", "q", "p", "c", "y")
    with pytest.raises(ir.IRError, match="z: the model has no node of this name"):
        ir.upstream(view, "z")


def test_a_sound_model_has_no_cycle(model: onnx_ir.Model) -> None:
    assert ir.find_cycle(model) is None
    assert list(ir.cycles(model)) == []


def test_the_shortest_cycle_is_found(model: onnx_ir.Model) -> None:
    close(model, "a", "y")  # a -> y -> a, and the longer way through b
    assert ir.find_cycle(model) == ("a", "y")
    with pytest.raises(ir.IRError, match="has a cycle"):
        ir.longest_path(ir.graph_of(model))


def test_a_cycle_through_a_subgraph_is_found(model: onnx_ir.Model) -> None:
    close(model, "b", "c")
    assert ir.find_cycle(model) == ("b", "q", "c") or ir.find_cycle(model) == ("b", "c", "q")


def test_a_node_that_feeds_itself(model: onnx_ir.Model) -> None:
    close(model, "b", "b")
    assert ir.find_cycle(model) == ("b",)
