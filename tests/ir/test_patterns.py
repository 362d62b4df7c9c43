"""Pattern rules: names, types, metadata, shared weights, refusals, and an end."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest

from mc_opt import ir


class FoldScale(ir.Rule):
    """MatMul(x, w)·s is MatMul(x, w·s)."""

    def pattern(self, op: Any, x: Any, w: Any, s: Any) -> Any:
        return op.Mul(op.MatMul(x, w, _outputs=["product"]), s)

    def check(self, w: onnx_ir.Value, s: onnx_ir.Value) -> ir.Skip | None:
        if w.const_value is None or s.const_value is None:
            return ir.Skip("the weight is computed")
        return None

    def replace(self, op: Any, x: onnx_ir.Value, w: onnx_ir.Value, s: onnx_ir.Value) -> onnx_ir.Value | ir.Skip:
        assert w.const_value is not None and s.const_value is not None
        if s.const_value.size > 4:
            return ir.Skip("the factor is a matrix")
        return op.MatMul(x, op.constant(w.const_value.numpy() * s.const_value.numpy(), like=w))


class SplitProduct(ir.Rule):
    """A replacement that holds what its own pattern matches, with a value on the way."""

    def pattern(self, op: Any, x: Any, w: Any) -> Any:
        return op.MatMul(x, w)

    def replace(self, op: Any, x: onnx_ir.Value, w: onnx_ir.Value) -> onnx_ir.Value:
        return op.Neg(op.Neg(op.MatMul(x, w)))


class DropIdentity(ir.Rule):
    def pattern(self, op: Any, x: Any) -> Any:
        return op.Identity(x)

    def replace(self, op: Any, x: onnx_ir.Value) -> onnx_ir.Value:
        return x


def parse(body: str, outputs: str = "y", **weights: np.ndarray) -> onnx_ir.Model:
    outs = ", ".join(f"float[N,4] {name}" for name in outputs.split())
    text = f'<ir_version: 10, opset_import: ["": 21]> g (float[N,4] x, bool flag) => ({outs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in weights.items())
    model = onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for node in model.graph.all_nodes():
        node.name = f"node_{node.outputs[0].name}"
    return model


W = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
S = np.array([1, 2, 3, 4], np.float32)
X = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)


def run(model: onnx_ir.Model) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString(), options)
    feeds = {"x": X, "flag": np.array(True)}
    return list(session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()}))


def apply(model: onnx_ir.Model, *rules: ir.Rule) -> tuple[int, list[tuple[str, str]]]:
    """Apply, verify, and hold the result to the original in ONNX Runtime."""
    want = run(model)
    skips: list[tuple[str, str]] = []
    count = ir.apply_rules(model, rules, by="toy", on_skip=lambda layer, skip: skips.append((layer, skip.reason)))
    ir.verify(model)
    for a, b in zip(want, run(model), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # products in another order
    return count, skips


def test_a_match_is_replaced_and_everything_keeps_its_name() -> None:
    model = parse("m = MatMul(x, w) y = Mul(m, s)", w=W, s=S)
    first = model.graph[0]
    first.metadata_props["origin"], first.doc_string = "layer1", "a note"
    model.graph.initializers["w"].metadata_props["mc_opt.layer"] = "fc"
    assert apply(model, FoldScale()) == (1, [])
    (node,) = model.graph
    assert (node.op_type, node.name, node.doc_string) == ("MatMul", "node_m", "a note")
    assert node.metadata_props == {"origin": "layer1", "mc_opt.pass": "toy", "mc_opt.rule": "fold-scale"}
    assert [o.name for o in model.graph.outputs] == ["y"]
    assert list(model.graph.initializers) == ["w"]
    assert model.graph.initializers["w"].metadata_props == {"mc_opt.layer": "fc"}


def test_a_clone_is_rewritten_without_the_original() -> None:
    model = parse("m = MatMul(x, w) y = Mul(m, s)", w=W, s=S)
    before = onnx_ir.to_proto(model).SerializeToString()
    apply(model.clone(), FoldScale())
    assert onnx_ir.to_proto(model).SerializeToString() == before


def test_matches_that_share_a_weight_get_one_each() -> None:
    body = "m = MatMul(x, w) y = Mul(m, s) n = MatMul(y, w) z = Mul(n, t) u = MatMul(z, w)"
    model = parse(body, outputs="y z u", w=W, s=S, t=2 * S)
    assert apply(model, FoldScale()) == (2, [])
    assert sorted(model.graph.initializers) == ["w", "w.1", "w.2"]
    assert model.graph.initializers["w.1"].metadata_props == {"mc_opt.layer": "w"}


def test_refusals_come_with_layer_and_reason() -> None:
    body = """a = MatMul(x, w) b = Mul(a, s) c = Relu(a)
              d = MatMul(b, v) e = Mul(d, m) h = Neg(w) i = MatMul(e, h) y = Mul(i, s) z = Add(c, y)"""
    model = parse(body, outputs="z", w=W, v=W, s=S, m=W)
    assert apply(model, FoldScale()) == (
        0,
        [
            ("w", "'a' is also used by Relu 'node_c'"),
            ("v", "the factor is a matrix"),
            ("h", "the weight is computed"),
        ],
    )


def test_a_value_that_the_caller_sees_stays() -> None:
    model = parse("m = MatMul(x, w) y = Mul(m, s)", outputs="m y", w=W, s=S)
    assert apply(model, FoldScale()) == (0, [("w", "'m' is also a graph output")])


def test_a_replacement_that_matches_again_ends() -> None:
    model = parse("a = MatMul(x, w) y = MatMul(a, w)", w=W)
    assert apply(model, SplitProduct()) == (2, [])
    assert [o.name for n in model.graph for o in n.outputs] == ["a.1", "a.2", "a", "y.1", "y.2", "y"]
    assert [n.name for n in model.graph][:3] == ["node_a", "toy/a.2", "toy/a"]
    on_the_way = model.graph[0].outputs[0]
    assert on_the_way.dtype == onnx_ir.DataType.FLOAT
    assert str(on_the_way.shape) == "[N,4]"


def test_the_first_rule_that_matches_wins() -> None:
    model = parse("m = MatMul(x, w) y = Mul(m, s)", w=W, s=S)
    # The product comes first in the order of nodes, and only the second rule ends in one.
    assert apply(model, FoldScale(), SplitProduct()) == (1, [])
    assert [n.op_type for n in model.graph] == ["MatMul", "Neg", "Neg", "Mul"]


def test_a_value_that_passes_through_keeps_a_graph_output() -> None:
    model = parse("a = Identity(x) b = Relu(a) y = Identity(b)")
    assert apply(model, DropIdentity()) == (2, [])
    assert [(n.op_type, n.outputs[0].name) for n in model.graph] == [("Relu", "b"), ("Identity", "y")]
    assert model.graph[0].inputs[0] is model.graph.inputs[0]


def test_subgraphs_are_rewritten_in_place() -> None:
    body = """y = If(flag) <then_branch = a () => (float[N,4] p) { m = MatMul(x, w) p = Mul(m, s) },
                            else_branch = b () => (float[N,4] q) { q = Relu(x) }>"""
    model = parse(body, w=W, s=S)
    assert apply(model, FoldScale()) == (1, [])
    branch = model.graph[0].attributes["then_branch"].as_graph()
    assert [n.op_type for n in branch] == ["MatMul"]
    assert [*branch.initializers, *model.graph.initializers] == ["w"]


def test_constants_computed_for_the_match_alone_go_with_it() -> None:
    class Take(FoldScale):
        def check(self, **_: Any) -> None:  # type: ignore[override]
            return None

        def replace(self, op: Any, x: onnx_ir.Value, w: onnx_ir.Value, s: onnx_ir.Value) -> onnx_ir.Value:
            return op.MatMul(x, op.constant(W.T.copy() * S, like=w))

    model = parse("t = Transpose(w) m = MatMul(x, t) y = Mul(m, s)", w=W, s=S)
    assert apply(model, Take()) == (1, [])
    assert [n.op_type for n in model.graph] == ["MatMul"]
    assert list(model.graph.initializers) == ["t"]


def test_our_ops_can_be_made() -> None:
    class Encode(ir.Rule):
        def pattern(self, op: Any, x: Any, w: Any) -> Any:
            return op.MatMul(x, w)

        def replace(self, op: Any, x: onnx_ir.Value, w: onnx_ir.Value) -> onnx_ir.Value:
            codes = op.constant(ir.pack_codes(np.arange(16, dtype=np.uint8), 4), like=w)
            return op.MatMul(x, op.Lookup(codes, op.constant(W.reshape(-1), like=w), bits=4, shape=(4, 4)))

    model = parse("y = MatMul(x, w)", w=W)
    assert ir.apply_rules(model, [Encode()], by="toy") == 1
    ir.add_functions(model)
    ir.verify(model)
    np.testing.assert_allclose(run(model)[0], X @ W, rtol=1e-5, atol=1e-6)


def test_a_rule_that_changes_the_type_is_refused() -> None:
    class Narrow(ir.Rule):
        def pattern(self, op: Any, x: Any) -> Any:
            return op.Relu(x)

        def replace(self, op: Any, x: onnx_ir.Value) -> onnx_ir.Value:
            (made,) = op.node("Relu", [x])
            made.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT16)
            return made  # type: ignore[no-any-return]

    with pytest.raises(ir.IRError, match="y: narrow of toy makes FLOAT16, expected FLOAT as before"):
        ir.apply_rules(parse("y = Relu(x)"), [Narrow()], by="toy")


def test_a_pattern_of_two_ends_is_refused() -> None:
    class Two(ir.Rule):
        def pattern(self, op: Any, x: Any) -> Any:
            return op.Relu(x), op.Neg(x)

        def replace(self, op: Any, x: onnx_ir.Value) -> list[onnx_ir.Value]:
            return [x, x]

    with pytest.raises(ir.IRError, match="two: the pattern ends in several nodes"):
        ir.apply_rules(parse("y = Relu(x)"), [Two()], by="toy")
