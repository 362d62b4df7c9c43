"""Diffs of models: what counts as a change, what does not, and who is named for it."""

from __future__ import annotations

import random
import re

import numpy as np
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mc_opt
from mc_opt import ir
from tests._harness import model

CNN = """
g (float[1,3,8,8] x) => (float[1,4,8,8] y)
  <float[4,3,3,3] w, float[4] scale, float[4] shift, float[4] mean, float[4] var>
{
  c = Conv <pads=[1,1,1,1]> (x, w)
  b = BatchNormalization (c, scale, shift, mean, var)
  r = Relu(b)
  y = Identity(r)
}
"""


def named(source: onnx_ir.Model) -> onnx_ir.Model:
    """The model with a name on every node, as `load_model` gives it."""
    for node in source.graph.all_nodes():
        node.name = f"{node.outputs[0].name}_node"
    return source


def summary(found: ir.Diff) -> list[str]:
    """Each change as one text."""
    return [f"{c.kind} {c.what} {c.title} {c.name}: {', '.join(map(str, c.by))}" for c in found.changes]


def renamed(source: onnx_ir.Model, seed: int) -> onnx_ir.Model:
    """A copy in which every node and value has another name, names that others had among them."""
    copy = source.clone()
    rng = random.Random(seed)
    values = [v for g in copy.graphs() for v in (*g.inputs, *(o for n in g for o in n.outputs if o.name))]
    stored = [(g, v) for g in copy.graphs() for v in g.initializers.values()]
    names = [str(v.name) for v in (*values, *(v for _, v in stored))]
    rng.shuffle(names)
    for graph in copy.graphs():
        for name in list(graph.initializers):
            graph.initializers.pop(name)
    for value, name in zip((*values, *(v for _, v in stored)), names, strict=True):
        value.name = name
    for graph, value in stored:
        graph.register_initializer(value)
    nodes = list(copy.graph.all_nodes())
    titles = [str(n.name) for n in nodes]
    rng.shuffle(titles)
    for node, title in zip(nodes, titles, strict=True):
        node.name = title
    return copy


# --- what is no change -----------------------------------------------------------------------------


def test_a_model_does_not_differ_from_itself() -> None:
    source = model(CNN)
    found = ir.diff(source, source.clone())
    assert found.equal and not found.renames and found.before == found.after and found.drift is None


def test_a_saved_model_does_not_differ(tmp_path: pytest.TempPathFactory) -> None:
    made, _ = mc_opt.compress(model(CNN), "fold-constants,fold-batch-norm", check="structure")
    mc_opt.save_model(made, f"{tmp_path}/m.onnx")
    found = mc_opt.diff(made, f"{tmp_path}/m.onnx")
    assert found.equal and not found.renames


def test_names_are_no_change_but_are_listed() -> None:
    source = model(CNN)
    other = source.clone()
    for node in other.graph:
        node.name = f"other/{node.name}"
    other.graph.node(1).outputs[0].name = "normalised"
    found = ir.diff(source, other)
    assert found.equal
    assert ir.Rename("value", "b", "normalised") in found.renames
    assert sum(r.what == "node" for r in found.renames) == 4


@pytest.mark.parametrize("seed", range(5))
def test_names_may_change_places(seed: int) -> None:
    source = model(CNN)
    assert ir.diff(source, renamed(source, seed)).equal


UNARY = ("Relu", "Sigmoid", "Tanh")


@st.composite
def graphs(draw: st.DrawFn) -> onnx_ir.Model:
    """A small graph: unary and binary nodes on earlier values, MatMuls by weights of one shape, an If now and then."""
    lines, names, weights = [], ["x"], 0
    for i in range(draw(st.integers(1, 9))):
        kind = draw(st.sampled_from((*UNARY, "Add", "Sub", "MatMul", "If")))
        a, b = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        if kind == "MatMul":
            lines.append(f"v{i} = MatMul({a}, w{weights})")
            weights += 1
        elif kind == "If":
            branches = [
                f"{n} = g{i}{n} () => (float[2,2] t{i}{n}) {{ t{i}{n} = {op}({a}) }}"
                for n, op in (
                    ("then_branch", draw(st.sampled_from(UNARY))),
                    ("else_branch", draw(st.sampled_from(UNARY))),
                )
            ]
            lines.append(f"v{i} = If (flag) <{', '.join(branches)}>")
        else:
            lines.append(f"v{i} = {kind}({a}{f', {b}' if kind in ('Add', 'Sub') else ''})")
        names.append(f"v{i}")
    declared = ", ".join(f"float[2,2] w{i}" for i in range(weights))
    body = "\n".join(lines)
    outputs = ", ".join(f"float[2,2] {n}" for n in draw(st.lists(st.sampled_from(names[1:]), min_size=1, unique=True)))
    text = f"g (float[2,2] x, bool flag) => ({outputs}) {f'<{declared}>' if weights else ''} {{ {body} }}"
    parsed = model(text)
    for number, node in enumerate(parsed.graph.all_nodes()):
        node.name = f"n{number}"
    return parsed


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(0, 1000))
def test_a_renamed_model_does_not_differ(source: onnx_ir.Model, seed: int) -> None:
    assert ir.diff(source, source.clone()).changes == ()
    assert ir.diff(source, renamed(source, seed)).changes == ()
    assert ir.diff(source, renamed(source, seed)).changes == ()


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(0, 1000), st.integers(0, 1000))
def test_a_changed_op_is_found_whatever_the_names(source: onnx_ir.Model, seed: int, pick: int) -> None:
    other = renamed(source, seed)
    nodes = [n for n in other.graph.all_nodes() if n.op_type in UNARY]
    if not nodes:
        return
    node = nodes[pick % len(nodes)]
    node.op_type = "Softsign"
    assert not ir.diff(source, other).equal
    assert not ir.diff(other, source).equal


# --- what is one -----------------------------------------------------------------------------------


def test_attributes_types_and_weights_count() -> None:
    source = model(CNN)
    other = source.clone()
    conv = other.graph.node(0)
    conv.attributes["pads"] = onnx_ir.AttrInt64s("pads", [0, 0, 2, 2])
    weight = other.graph.initializers["w"]
    weight.const_value = onnx_ir.tensor(weight.const_value.numpy() + np.float32(1))  # type: ignore[union-attr]
    found = ir.diff(source, other)
    (node,), (stored,) = found.of("node"), found.of("weight")
    assert [d.what for d in node.details] == ["pads", "weight w"]
    assert (node.details[0].before, node.details[0].after) == ("[1, 1, 1, 1]", "[0, 0, 2, 2]")
    assert stored.kind == "changed" and re.fullmatch(r"f32\[4,3,3,3\] #\w{12}", stored.details[0].after)
    assert found.unexplained() == found.changes  # nobody says who did it
    assert found.before == found.after


def test_a_node_of_another_op_under_the_same_name_has_changed() -> None:
    source, other = model(CNN), model(CNN.replace("Relu", "Sigmoid"))
    (change,) = ir.diff(source, other).changes
    assert change.kind == "changed" and change.details == (ir.Detail("op", "Relu", "Sigmoid"),)


def test_the_rest_is_matched_around_a_change() -> None:
    """Other names everywhere, and one node more: that node alone is added."""
    source = model(CNN)
    text = CNN.replace("r = Relu(b)", "q = Sigmoid(b)\n  r = Relu(q)")
    other = renamed(model(text), 1)
    found = ir.diff(source, other)
    assert [(c.kind, c.title) for c in found.of("node")] == [("added", "Sigmoid"), ("changed", "Relu")]


def test_shapes_that_were_not_known_are_no_change_inside() -> None:
    source, other = model(CNN), model(CNN)
    source.graph.node(0).outputs[0].shape = None
    assert ir.diff(source, other).equal
    other.graph.node(0).outputs[0].shape = onnx_ir.Shape([1, 5, 8, 8])
    assert ir.diff(source, other).equal
    source.graph.node(0).outputs[0].shape = onnx_ir.Shape([1, 4, 8, 8])
    assert [d.what for c in ir.diff(source, other).changes for d in c.details] == ["type of c"]


def test_inputs_and_outputs_count() -> None:
    source = model(CNN)
    other = source.clone()
    ir.fix_shapes(other, {"x": (1, 3, 8, 8)})
    assert ir.diff(source, other).equal
    open_ = model(CNN.replace("float[1,3,8,8] x", "float[N,3,8,8] x").replace("float[1,4", "float[N,4"))
    fixed = open_.clone()
    ir.fix_shapes(fixed, {"x": (2, 3, 8, 8)})
    assert summary(ir.diff(open_, fixed)) == [
        "changed input f32[2,3,8,8] x: --shape: x=2x3x8x8",
        "changed output f32[2,4,8,8] y: --shape: x=2x3x8x8",
    ]


# --- who did it ------------------------------------------------------------------------------------


def test_every_change_of_a_run_has_its_pass_and_rule() -> None:
    source = named(model(CNN))
    made, _ = mc_opt.compress(source, "fold-constants,fold-batch-norm,denseshift{skip=}", check="structure")
    found = ir.diff(source, made)
    assert found.unexplained() == ()
    folded = "fold-batch-norm: into the layer before"
    assert summary(found) == [
        "added node mc_opt.Lookup denseshift/w: denseshift: 4-bit shift",
        f"changed node Conv c_node: {folded}",
        f"removed node BatchNormalization b_node: {folded}",
        "removed node Identity y_node: fold-constants: hands on its input",
        f"changed weight f32[4,3,3,3] w: {folded}, denseshift: 4-bit shift",
        f"removed weight f32[4] scale: {folded}",
        f"removed weight f32[4] shift: {folded}",
        f"removed weight f32[4] mean: {folded}",
        f"removed weight f32[4] var: {folded}",
        f"added weight f32[4] w.bias: {folded}",
        "added weight f32[16] denseshift.4bit: denseshift: 4-bit shift",
        "added weight u8[56] w.codes: denseshift: 4-bit shift",
        "added weight f32[4,1] w.scale: denseshift: 4-bit shift",
    ]
