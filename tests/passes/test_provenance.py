"""Which rule is named for each change of a pass: stated, signed, or that of the nearest change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir

import mc_opt
from mc_opt import ir, passes
from mc_opt.passes import _provenance
from mc_opt.passes._base import Log
from tests._harness import model

TEXT = """
g (float[1,4] x) => (float[1,4] y) <float[4,4] w, float[4] b>
{
  [first] a = MatMul(x, w)
  [second] c = Add(a, b)
  [third] y = Relu(c)
}
"""


def rules(before: onnx_ir.Model, after: onnx_ir.Model) -> dict[str, str]:
    return {f"{c.kind} {c.name}": ", ".join(map(str, c.by)) for c in ir.diff(before, after).changes}


def recorded(edit: Callable[[onnx_ir.Model, passes.Context], None]) -> dict[str, str]:
    """What is told of a pass `p` that does `edit`."""
    old, log = model(TEXT), Log()
    new = old.clone()
    edit(new, passes.Context(log=log))
    _provenance.record(old, new, made_by="p", log=log)
    return rules(old, new)


def drop_second(new: onnx_ir.Model) -> None:
    first, second = new.graph.node("first"), new.graph.node("second")
    second.outputs[0].replace_all_uses_with(first.outputs[0])
    new.graph.remove(second, safe=True)
    new.graph.initializers.pop("b")


def test_a_stated_rule_reaches_what_follows_from_it() -> None:
    def edit(new: onnx_ir.Model, ctx: passes.Context) -> None:
        ctx.did("no bias", new.graph.node("second"))
        drop_second(new)

    assert recorded(edit) == dict.fromkeys(("removed second", "changed third", "removed b"), "p: no bias")


def test_a_signed_node_tells_for_what_it_replaced() -> None:
    def edit(new: onnx_ir.Model, ctx: passes.Context) -> None:
        old = new.graph.node("third")
        made = onnx_ir.node("Sigmoid", [old.inputs[0]])
        made.outputs[0].type, made.outputs[0].shape = old.outputs[0].type, old.outputs[0].shape
        onnx_ir.convenience.replace_nodes_and_values(new.graph, old, [old], [made], old.outputs, made.outputs)
        ir.provenance(made, ("p", "smooth"))

    assert recorded(edit) == {"removed third": "p: smooth", "added p/y": "p: smooth"}


def test_a_rule_for_the_rest_and_none_at_all() -> None:
    def told(new: onnx_ir.Model, ctx: passes.Context) -> None:
        ctx.did("a script")
        drop_second(new)

    assert set(recorded(told).values()) == {"p: a script"}
    assert set(recorded(lambda new, ctx: drop_second(new)).values()) == {"p"}  # the pass is known, no rule: unexplained


def test_what_is_apart_keeps_its_own_rule() -> None:
    def edit(new: onnx_ir.Model, ctx: passes.Context) -> None:
        ctx.did("doubled", new.graph.initializers["w"])
        weight = new.graph.initializers["w"]
        assert weight.const_value is not None
        weight.const_value = onnx_ir.tensor(2 * weight.const_value.numpy())
        ctx.did("smooth", new.graph.node("third"))
        new.graph.node("third").op_type = "Sigmoid"

    assert recorded(edit) == {"changed w": "p: doubled", "changed first": "p: doubled", "changed third": "p: smooth"}


def test_several_passes_are_all_named_and_names_are_followed(tmp_path: Path) -> None:
    (tmp_path / "fix.py").write_text("def edit(graph):\n    graph.nodes[2].op = 'Sigmoid'\n    return graph\n")
    source = model(TEXT.replace("y = Relu(c)", "r = Relu(c)\n  [last] y = Identity(r)"))
    made, _ = mc_opt.compress(
        source, f"fold-constants,surgeon{{script={tmp_path}/fix.py}}", check="structure", allow_scripts=True
    )
    assert rules(source, made) == {
        "changed third": "surgeon: edit() of fix.py",
        "removed last": "fold-constants: hands on its input",
    }


def test_a_fixed_input_and_what_follows() -> None:
    source = model("""
    g (float[1,4] x, bool flag) => (float[1,4] y)
    {
      [choice] y = If (flag) <
        then_branch = t () => (float[1,4] p) { [yes] p = Relu(x) },
        else_branch = e () => (float[1,4] q) { [no] q = Tanh(x) }>
    }""")
    made, _ = mc_opt.compress(source, "specialize{flag=true}", check="structure")
    assert rules(source, made) == {
        "removed flag": "specialize: fixed input",
        "removed choice": "specialize: If of a known condition",
        "changed yes": "specialize: If of a known condition",
        "removed no": "specialize: If of a known condition",
    }
