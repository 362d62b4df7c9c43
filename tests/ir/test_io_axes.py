"""Axes that count samples: of inputs and of recurrent states."""

from __future__ import annotations

import onnx
import onnx_ir
import pytest

from mc_opt import ir

LSTM = """<ir_version: 10, opset_import: ["": 21]>
net (float[1, 1, 3] x, float[1, 1, 2] h) => (float[1, 1, 2] hn)
<float[1, 8, 3] w = {0}, float[1, 8, 2] r = {0}> {
  same = Identity (h) y, hn = LSTM <hidden_size = 2> (x, w, r, , , same)
}"""


def axes(inputs: str, states: dict[str, str] | None = None) -> dict[str, int | None] | None:
    text = f"""<ir_version: 10, opset_import: ["": 21]>
    net ({inputs}) => (float[n] y, float[n] z) {{ y = Identity (x) z = Identity (x) }}"""
    return ir.batch_axes(onnx_ir.from_proto(onnx.parser.parse_model(text)), states or {})


@pytest.mark.parametrize(
    ("inputs", "states", "expected"),
    [
        ("float[n, 3] x", {}, {"x": 0}),
        ("float[1, 3] x, int64 k", {}, {"x": 0, "k": None}),
        ("float[4, 3] x", {}, None),
        ("float[n, 3] x, float[2, n, 4] h", {"y": "h"}, {"x": 0, "h": 1}),
        ("float[1, 3] x, float[1, 4] h", {"y": "h"}, {"x": 0, "h": 0}),
        ("float[1, 3] x, float[2, 1, 4] h", {"y": "h"}, {"x": 0, "h": 1}),
        ("float[1, 3] x, float[2, 4] h", {"y": "h"}, None),
    ],
)
def test_axes(inputs: str, states: dict[str, str], expected: dict[str, int | None] | None) -> None:
    assert axes(inputs, states) == expected


def test_a_recurrent_op_says_where_its_state_counts() -> None:
    def zeros(count: int) -> str:
        return ", ".join(["0"] * count)

    text = LSTM.replace(
        "= {0}, float[1, 8, 2] r = {0}", "= {" + "0," * 23 + "0}, float[1, 8, 2] r = {" + "0," * 15 + "0}"
    )
    model = onnx_ir.from_proto(onnx.parser.parse_model(text))
    assert ir.batch_axes(model, {"hn": "h"}) == {"x": 0, "h": 1}
