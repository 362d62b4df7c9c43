"""surgeon: a user's script sees the model as onnx_graphsurgeon shows it, and nothing is lost on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mc_opt import ir, passes
from mc_opt.passes._gs import Surgery
from tests._harness import apply, check, model, script, to_bytes
from tests.passes.zoo import ZOO

LINEAR = "g (float[2,64] x) => (float[2,32] y) <float[64,32] w> { y = MatMul (x, w) }"


def run(path: Path, before: str = LINEAR) -> passes.Context:
    context = passes.Context(allow_scripts=True)
    passes.find_pass("surgeon")(script=str(path)).run(model(before), context)
    return context


def test_edits_nodes_and_weights(tmp_path: Path) -> None:
    path = script(tmp_path, """
        import onnx_graphsurgeon as gs

        def edit(graph):
            node = graph.nodes[0]
            node.inputs[1].values = node.inputs[1].values * 2
            inner = gs.Variable("inner", dtype=graph.outputs[0].dtype, shape=graph.outputs[0].shape)
            output = node.outputs[0]
            node.outputs = [inner]
            graph.nodes.append(gs.Node("Relu", inputs=[inner], outputs=[output]))
            return graph
    """)  # fmt: skip
    result = check(f"surgeon{{script={path}}}", LINEAR, "inner = MatMul(x, w)\ny = Relu(inner)", allow_scripts=True)
    old = model(LINEAR).graph.initializers["w"].const_value
    new = result.graph.initializers["w"].const_value
    assert old is not None and new is not None
    np.testing.assert_array_equal(new.numpy(), 2 * old.numpy())


def test_a_round_trip_keeps_every_byte() -> None:
    source, _ = apply("denseshift{skip=}", model(ZOO))
    source.metadata_props["author"] = "somebody"
    source.graph.doc_string = "about the graph"
    for number, node in enumerate(source.graph.all_nodes()):
        node.doc_string = f"node {number}"
        node.metadata_props["where"] = str(number)
        for value in node.outputs:
            value.metadata_props["of"] = str(number)
    for value in source.graph.initializers.values():
        value.metadata_props["mc_opt.layer"] = f"layer of {value.name}"
    surgery = Surgery(source.clone())
    made = surgery.close(surgery.graph)
    back = source.clone()
    back.graph = made.graph
    ir.add_functions(back)
    assert to_bytes(back) == to_bytes(source)


def test_a_script_that_does_nothing_changes_nothing(tmp_path: Path) -> None:
    path = script(tmp_path, """
        def edit(graph):
            for tensor in graph.tensors().values():
                getattr(tensor, "values", None)  # reading is no change
            return graph
    """)  # fmt: skip
    source, _ = apply("denseshift{skip=}", model(ZOO))
    changed, rewrites = apply(f"surgeon{{script={path}}}", source)
    assert rewrites == 0 and to_bytes(changed) == to_bytes(source)


def test_needs_permission(tmp_path: Path) -> None:
    path = script(tmp_path, "raise SystemExit('it ran')")
    with pytest.raises(ir.OptionError, match="--allow-scripts"):
        passes.find_pass("surgeon")(script=str(path)).run(model(LINEAR), passes.Context())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def edit(graph):\n    return graph.no_such_thing", "fix.py:2: AttributeError"),
        ("def edit(graph):\n    pass", "returned NoneType"),
        ("x = 1", "no function edit"),
        ("def edit(graph:\n    pass", "fix.py:1: SyntaxError"),
        ("import sys\nsys.exit(3)", "fix.py:2: SystemExit"),
        ("def edit(graph):\n    graph.opset = 13\n    return graph", "set opset 13"),
        ("def edit(graph):\n    graph.outputs[0].dtype = None\n    return graph", "type"),
        ("def edit(graph):\n    graph.nodes.clear()\n    return graph", "left an output that no node makes"),
    ],
)
def test_says_where_a_script_fails(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(passes.PassError, match=message) as caught:
        run(script(tmp_path, body))
    # A Python error behind it would read as a mistake of ours.
    assert isinstance(caught.value.__cause__, ir.IRError | None)


def test_says_which_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ir.OptionError, match=r"no\.py cannot be read"):
        run(tmp_path / "no.py")
    with pytest.raises(ir.OptionError, match="script= is missing"):
        passes.Pipeline.parse("surgeon")


def test_what_a_script_prints_is_not_our_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(script(tmp_path, "def edit(graph):\n    print('hello')\n    return graph"))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


def test_the_report_names_the_script(tmp_path: Path) -> None:
    context = run(script(tmp_path, "def edit(graph):\n    return graph"))
    assert "sha256" in dict(context.log.notes)[""]


def test_new_large_weights_are_taken(tmp_path: Path) -> None:
    path = script(tmp_path, """
        import numpy as np
        import onnx_graphsurgeon as gs

        def edit(graph):
            graph.nodes[0].inputs[1] = gs.Constant("fresh", np.ones((64, 32), np.float32))
            return graph.cleanup()
    """)  # fmt: skip
    result = check(f"surgeon{{script={path}}}", LINEAR, "y = MatMul(x, fresh)", allow_scripts=True)
    assert set(result.graph.initializers) == {"fresh"}
