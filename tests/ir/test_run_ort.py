"""Sessions, streams with states, drift and its corner cases, noise, and the verdict of exact passes."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest

from mc_opt import ir
from mc_opt.ir.run import ort
from mc_opt.ir.run.drift import DriftMeter
from mc_opt.ir.run.ort import Session, compare, exactness, noise, run_data

SCALED = """
    g (float[n,3] x) => (float[n,3] y, int64[2] s) <float[3] w = {1, 2, 3}> { y = Mul(x, w)  s = Shape(y) }
"""
COUNTER = """
    g (float[b,2] x, float[b,2] state) => (float[b,2] y, float[b,2] next) <float w = {2}> {
        next = Add(x, state)  y = Mul(next, w)
    }
"""


def parse(text: str, **changes: float) -> onnx_ir.Model:
    model = onnx_ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text}'))
    for name, factor in changes.items():
        value = model.graph.initializers[name]
        value.const_value = onnx_ir.tensor((value.const_value.numpy() * factor).astype(np.float32), name=name)
    return model


def samples(count: int, *shape: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]


@dataclasses.dataclass(frozen=True)
class Sample:
    inputs: dict[str, np.ndarray]
    label: int | None = None


def test_a_session_runs_and_says_what_it_takes() -> None:
    session = Session(parse(SCALED))
    assert [str(spec) for spec in session.inputs] == ["x: float32['n', 3]"]
    outputs = session.run({"x": np.ones((2, 3), np.float32)})
    assert list(outputs) == ["y", "s"]
    np.testing.assert_array_equal(outputs["y"], [[1, 2, 3], [1, 2, 3]])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"input 'x': missing in the data, expected x: float32\['n', 3\]"),
        ({"z": np.ones(1)}, r"input 'z': the model has no such input, expected x"),
        ({"x": np.ones((2, 3))}, r"input 'x': type float64, expected float32; convert the array"),
        ({"x": np.ones((2, 4), np.float32)}, r"input 'x': shape \[2, 4\], expected \['n', 3\]"),
        ({"x": np.ones(3, np.float32)}, r"input 'x': shape \[3\], expected"),
    ],
)
def test_data_that_does_not_fit_is_refused(inputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ir.DataError, match=message):
        Session(parse(SCALED)).run(inputs)


def test_a_model_that_onnx_runtime_refuses_is_one_line(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ir.IRError, match=r"g: ONNX Runtime refuses the model: .*Foo") as caught:
        Session(parse("g (float[2] x) => (float[2] y) { y = Foo(x) }"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ir.IRError, match=r"none\.onnx: ONNX Runtime refuses the model"):
        Session(tmp_path / "none.onnx")
    assert capfd.readouterr().err == ""


def test_a_failure_while_running_is_an_ir_error(capfd: pytest.CaptureFixture[str]) -> None:
    session = Session(parse("g (float[n] x, int64[1] s) => (float[m] y) { y = Reshape(x, s) }"))
    with pytest.raises(ir.IRError, match="ONNX Runtime failed to run the model"):
        session.run({"x": np.ones(4, np.float32), "s": np.array([3])})
    assert capfd.readouterr().err == ""


def test_external_weights_are_read_and_left_alone(tmp_path: pathlib.Path) -> None:
    model = parse(SCALED)
    model.graph.initializers["w"].const_value.numpy().tofile(tmp_path / "w.data")
    external = onnx_ir.ExternalTensor(
        "w.data", 0, 12, onnx_ir.DataType.FLOAT, shape=onnx_ir.Shape([3]), name="w", base_dir=str(tmp_path)
    )
    model.graph.initializers["w"].const_value = external
    x = np.ones((1, 3), np.float32)
    np.testing.assert_array_equal(Session(model).run({"x": x})["y"], [[1, 2, 3]])
    assert model.graph.initializers["w"].const_value is external


def test_a_large_model_runs_from_a_file_that_goes_away(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "LARGEST_PROTO", 1000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model = parse("g (float[2,64] x) => (float[2,64] y) { y = MatMul(x, w) }")
    stray = next(v for v in model.graph[0].inputs if v is not None and v.name == "w")
    onnx_ir.convenience.replace_all_uses_with(stray, ir.initializer(model.graph, "w", weight))
    ir.verify(model)
    session = Session(model)
    assert list(tmp_path.iterdir()) == []
    x = np.ones((2, 64), np.float32)
    np.testing.assert_allclose(session.run({"x": x})["y"], x @ weight, rtol=1e-5, atol=1e-5)


def test_states_are_carried_and_start_at_zero_or_where_a_sample_says() -> None:
    session = Session(parse(COUNTER))
    ones = np.ones((3, 2), np.float32)
    stream = [{"x": ones}, Sample({"x": ones}), {"x": ones, "state": 10 * ones}, {"x": ones}]
    totals = [outputs["next"][0, 0] for outputs in run_data(session, stream, {"next": "state"})]
    assert totals == [1, 2, 11, 12]


def test_data_names_its_own_states() -> None:
    model = parse(COUNTER)
    data = ir.seeded_data(model, 4, states={"next": "state"})
    *_, last = run_data(Session(model), data)
    np.testing.assert_allclose(last["next"], sum(s.inputs["x"] for s in data), rtol=1e-6)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"nxt": "state"}, "state nxt=state: the model has no output 'nxt', its outputs are y, next"),
        ({"next": "s"}, "state next=s: the model has no input 's', its inputs are x, state"),
    ],
)
def test_unknown_states_are_refused(states: dict[str, str], message: str) -> None:
    with pytest.raises(ir.DataError, match=message):
        next(run_data(Session(parse(COUNTER)), samples(1, 1, 2), states))


def test_drift_is_the_same_in_one_sample_or_many() -> None:
    model, other = parse(SCALED), parse(SCALED, w=1.01)
    data = samples(6, 2, 3)
    drift = compare(model, other, data)
    whole = compare(model, other, [{"x": np.concatenate([d["x"] for d in data])}])
    y, s = drift.outputs
    # The other is 1 % larger everywhere: 20·log10(100) = 40 dB.
    assert y.sqnr_db == pytest.approx(40, abs=1e-3)
    assert y.max_abs == whole.outputs[0].max_abs
    assert y.spread == whole.outputs[0].spread
    assert y.relative == pytest.approx(y.max_abs / y.spread)
    assert y.top1 == 1
    assert y.elements == 36
    assert drift.samples == 6
    assert s.equal
    assert s.top1 is None
    assert s.sqnr_db is None
    assert drift.max_abs == y.max_abs
    assert drift.sqnr_db == y.sqnr_db


def meter(a: object, b: object, dtype: type = np.float32) -> ir.Drift:
    result = DriftMeter()
    result.add({"y": np.array(a, dtype)}, {"y": np.array(b, dtype)})
    return result.result()


def test_top1_counts_rows() -> None:
    assert meter([[1, 2], [3, 0], [0, 1], [5, 4]], [[1, 2], [0, 3], [0, 1], [5, 4]]).top1 == 0.75
    assert meter([[1], [2]], [[1], [2]]).top1 is None
    assert meter([[1, 2]], [[2, 1]], np.int64).top1 is None


def test_nan_is_never_hidden() -> None:
    one_sided = meter([1, 2, 3], [1, np.nan, 3]).outputs[0]
    assert (one_sided.nonfinite_reference, one_sided.nonfinite_other, one_sided.unmatched) == (0, 1, 1)
    assert not one_sided.equal
    both = meter([1, np.nan, np.inf], [1, np.nan, np.inf]).outputs[0]
    assert (both.nonfinite_reference, both.nonfinite_other, both.unmatched) == (2, 2, 0)
    assert both.equal
    assert meter([np.inf], [-np.inf]).unmatched == 1


def test_corner_cases_have_plain_numbers() -> None:
    assert meter([2, 2], [2, 2]).relative == 0
    constant = meter([2, 2], [2, 3])
    assert constant.relative is None
    assert constant.outputs[0].spread == 0
    assert meter([0, 0], [0, 1]).sqnr_db is None
    assert meter([True, False], [True, True], np.bool_).max_abs == 1
    assert meter([], []).equal
    assert meter(["a", "b"], ["a", "c"], np.str_).unmatched == 1
    for drift in (constant, meter([np.nan], [1]), meter([], [])):
        assert json.loads(json.dumps(drift.to_json(), allow_nan=False))["samples"] == 1


def test_outputs_that_do_not_fit_are_refused() -> None:
    data = samples(1, 2, 3)
    other = parse("g (float[n,3] x) => (float[m] y, int64[2] s) { y = ReduceSum<keepdims=0>(x)  s = Shape(x) }")
    with pytest.raises(ir.DataError, match=r"output 'y': shape \(\), expected \(2, 3\) as in the reference"):
        compare(parse(SCALED), other, data)
    missing = parse("g (float[n,3] x) => (float[n,3] y) { y = Relu(x) }")
    with pytest.raises(ir.DataError, match="output 's': missing in the other model, which has y"):
        compare(parse(SCALED), missing, data)
    with pytest.raises(ir.DataError, match="no samples, expected at least one"):
        compare(parse(SCALED), parse(SCALED), [])


def test_exactness_is_held_against_range_and_noise() -> None:
    model = parse(SCALED)
    data = samples(8, 2, 3)
    own = noise(model, data)
    assert own.equal  # one multiplication has no order to change
    verdict = exactness(model, parse(SCALED, w=1 + 1e-6), data)
    assert verdict.ok
    assert verdict.outputs[0].tolerance == pytest.approx(1e-5 * verdict.outputs[0].spread)
    bad = exactness(model, parse(SCALED, w=1.001), data, own_noise=own)
    assert not bad.ok
    assert str(bad.outputs[0]).startswith("y: max |a-b| 0.00")
    assert "r 0)" in str(bad)
    assert json.loads(json.dumps(bad.to_json()))["ok"] is False


def test_exactness_fails_on_new_nan() -> None:
    root = "g (float[n,3] x) => (float[n,3] y) {{ {body} }}"
    data = [{"x": np.array([[1, 0, 4]], np.float32)}]
    verdict = exactness(
        parse(root.format(body="y = Sqrt(x)")), parse(root.format(body="h = Neg(x) m = Sqrt(h) y = Neg(m)")), data
    )
    assert not verdict.ok
    assert "2 elements NaN or infinite on one side only" in str(verdict)


def test_states_drift_apart_on_their_own() -> None:
    data = [{"x": np.ones((1, 2), np.float32)}] * 20
    text = COUNTER.replace("next = Add(x, state)", "k = Mul(state, decay) next = Add(x, k)").replace(
        "<float w = {2}>", "<float w = {2}, float decay = {0.5}>"
    )
    drift = compare(parse(text), parse(text, decay=1.02), data, states={"next": "state"})
    # Fixed points 1/(1-0.5) and 1/(1-0.51): each model feeds itself.
    assert drift.output("next").max_abs == pytest.approx(1 / 0.49 - 2, rel=1e-3)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 1, 1], (2 / 3, 1 / 3)),
        ([0, None, 1], (None, None)),
        (["a", "b", "c"], (None, None)),
    ],
)
def test_labels_give_the_accuracy_of_both(labels: list[Any], expected: tuple[float | None, float | None]) -> None:
    sums = DriftMeter()
    for a, b, label in zip(np.eye(2)[[0, 1, 0]], np.eye(2)[[1, 1, 0]], labels, strict=True):
        sums.add({"y": a[None], "z": b}, {"y": b[None], "z": b}, None if label is None else np.array(label))
    drift = sums.result()
    assert (drift.accuracy_reference, drift.accuracy_other) == expected


def test_an_output_of_several_rows_has_no_accuracy() -> None:
    sums = DriftMeter()
    sums.add({"y": np.eye(2)}, {"y": np.eye(2)}, np.array(0))
    assert sums.result().accuracy_other is None


def test_a_refusal_is_told_without_places_in_c_source() -> None:
    """A model of an IR version that this ONNX Runtime does not read."""
    model = onnx_ir.from_onnx_text(f'<ir_version: 99, opset_import: ["": 21]> {SCALED}')
    with pytest.raises(ir.IRError, match=r"refuses the model: Unsupported model IR version: 99"):
        Session(model)


def test_nothing_is_reported_or_left_at_home(tmp_path: pathlib.Path) -> None:
    """ONNX Runtime's wheels would keep a device id and a queue of events in the user's cache."""
    code = "from mc_opt.ir.run import ort"
    names = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    environment = {k: v for k, v in os.environ.items() if k not in names} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-P", "-c", code], env=environment, check=True)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
