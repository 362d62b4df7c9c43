"""What layers store: every byte once, shared parts apart."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

import mc_opt
from mc_opt import ir
from tests._harness import model

TWO = """
g (float[1,64] x) => (float[1,64] y) <float[64,64] w1, float[64,64] w2, float[64] b>
{
  a = MatMul(x, w1)
  c = MatMul(a, w2)
  y = Add(c, b)
}
"""


def test_parts_belong_to_their_layer_and_shared_ones_to_none() -> None:
    source = model(TWO)
    made, _ = mc_opt.compress(source, "denseshift{skip=}", check="structure")
    before, after = ir.storage_of(source), ir.storage_of(made)
    assert before.layers == {"w1": ir.Stored(4096, 16384), "w2": ir.Stored(4096, 16384), "b": ir.Stored(64, 256)}
    packed = ir.Stored(4096, 2048 + 256)  # half a byte a weight, and 64 scales
    assert after.layers == {"w1": packed, "w2": packed, "b": ir.Stored(64, 256)}
    assert after.shared == {"denseshift.4bit": 64}
    assert after.total == ir.Stored(8256, 2 * 2304 + 256 + 64)


def test_two_terms_are_one_weight() -> None:
    made, _ = mc_opt.compress(model(TWO), "denseshift{bits=3 terms=2 skip=}", check="structure")
    stored = ir.storage_of(made)
    assert stored.layers["w1"] == ir.Stored(4096, 2 * (1536 + 256))
    assert stored.total.parameters == 8256


def test_a_layer_that_was_split_is_the_sum_of_its_parts() -> None:
    source = model(TWO)
    other = model(
        TWO.replace("float[64,64] w1", "float[64,4] p, float[4,64] q").replace(
            "a = MatMul(x, w1)", "t = MatMul(x, p)\n  a = MatMul(t, q)"
        )
    )
    for old, new in (("p", "w1.factor1"), ("q", "w1.factor2")):
        value = other.graph.initializers.pop(old)
        value.name = new
        other.graph.register_initializer(value)
    rows = {row.layer: row for row in ir.diff(source, other).layers}
    assert list(rows) == ["w1", "w2", "b"]
    assert rows["w1"].before == ir.Stored(4096, 16384) and rows["w1"].after == ir.Stored(512, 2048)
    assert rows["w1"].changed and not rows["w2"].changed


def test_tensors_in_nodes_count() -> None:
    source = model("g (float[2] x) => (float[2] y) { c = Constant <value = float[2] {1.0, 2.0}> ()\n y = Add(x, c) }")
    stored = ir.storage_of(source)
    assert stored.in_nodes == 8 and stored.total == ir.Stored(0, 8)


def test_history_that_is_no_such_text_is_refused() -> None:
    source = model(TWO)
    source.metadata_props["mc_opt.history"] = '{"version": 1, "touched": [{}]}'
    with pytest.raises(ir.IRError, match=r"mc_opt\.history in the model's metadata is damaged .*remove it"):
        ir.read_history(source)
    source.metadata_props["mc_opt.history"] = '{"version": 9, "touched": []}'
    with pytest.raises(ir.IRError, match="has version 9, this mc-opt knows 1"):
        ir.read_history(source)


def test_drift_is_measured_value_by_value_though_names_and_inputs_go() -> None:
    source = model("g (float[1,4] x, float k) => (float[1,4] y) { a = Relu(x)\n b = Mul(a, k)\n y = Tanh(b) }")
    other = model("g (float[1,4] x) => (float[1,4] y) <float[1] two> { a = Relu(x)\n b = Mul(a, two)\n y = Tanh(b) }",
                  {"two": np.array([2.0])})  # fmt: skip
    data = ir.seeded_data(source, 3, 0)
    drift = ir.value_drift(source, other, data)
    assert [d.name for d in drift] == ["a", "b", "y"]
    assert drift[0].equal and not drift[1].equal and isinstance(source, onnx_ir.Model)
