"""Data for models: npz files as streams, states, and seeded samples."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest

from mc_opt import ir

TEXT = """<ir_version: 10, opset_import: ["": 21]>
net (float[1, 3] x, float[n, 2] y, int64 k, float[2, n, 4] h)
=> (float[1, 3] a, float[n, 2] b, int64 d, float[2, n, 4] hn) {
  a = Relu (x) b = Relu (y) d = Identity (k) hn = Add (h, one) one = Constant <value = float {1}> ()
}"""
STATES = {"hn": "h"}


def model(text: str = TEXT) -> onnx_ir.Model:
    made = onnx_ir.from_proto(onnx.parser.parse_model(text))
    made.graph.sort()
    return made


def arrays(n: int = 3, **more: Any) -> dict[str, Any]:
    x = np.arange(n * 3, dtype=np.float32).reshape(n, 3)
    return {"x": x, "y": x[:, None, :2].repeat(5, 1), "k": np.arange(n)} | more


def save(path: Path, content: dict[str, Any]) -> Path:
    np.savez(path, **content)
    return path


def refusal(path: Path, states: dict[str, str] = STATES) -> str:
    with pytest.raises(ir.DataError) as caught:
        ir.load_data(path, model(), states)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_first_axis_is_the_samples(tmp_path: Path) -> None:
    data = ir.load_data(save(tmp_path / "d.npz", arrays(label=np.array([4, 5, 6]))), model(), STATES)
    assert (len(data), data.labelled, data.states) == (3, True, STATES)
    for _ in range(2):  # as often as one likes
        samples = list(data)
        assert [{k: v.shape for k, v in s.inputs.items()} for s in samples] == [
            {"x": (1, 3), "y": (5, 2), "k": ()} | ({"h": (2, 5, 4)} if i == 0 else {}) for i in range(3)
        ]
        np.testing.assert_array_equal(samples[2].inputs["x"], [[6, 7, 8]])
        assert [int(s.label) for s in samples if s.label is not None] == [4, 5, 6]


def test_a_whole_batch_axis_is_taken_too(tmp_path: Path) -> None:
    data = ir.load_data(save(tmp_path / "d.npz", arrays(x=np.ones((3, 1, 3), np.float32))), model(), STATES)
    assert [s.inputs["x"].shape for s in data] == [(1, 3)] * 3


def test_a_folder_is_read_in_order_and_states_start_anew(tmp_path: Path) -> None:
    for name in ("b", "a"):
        save(tmp_path / f"{name}.npz", arrays(2, x=np.full((2, 3), ord(name), np.float32)))
    (tmp_path / "notes.txt").write_text("mine")
    data = ir.load_data(tmp_path, model(), STATES)
    assert [(chr(int(s.inputs["x"][0, 0])), "h" in s.inputs) for s in data] == [
        ("a", True),
        ("a", False),
        ("b", True),
        ("b", False),
    ]
    session = ir.Session(model())
    assert [float(o["hn"].max()) for o in ir.run_data(session, data, data.states)] == [1, 2, 1, 2]


@pytest.mark.parametrize("saver", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_way_to_save(tmp_path: Path, saver: Any, order: str) -> None:
    x = np.asarray(np.arange(9, dtype=np.float32).reshape(3, 3), order=order)  # type: ignore[call-overload]
    saver(tmp_path / "d.npz", **arrays(x=x))
    rows = [s.inputs["x"][0] for s in ir.load_data(tmp_path / "d.npz", model(), STATES)]
    np.testing.assert_array_equal(rows, x)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"k": None}, "no array for input 'k', expected x FLOAT[1,3], y FLOAT[n,2], k INT64[]; drop"),
        ({"q": np.ones(3)}, "array 'q' is no input of the model, expected x FLOAT[1,3]"),
        ({"h": np.ones(3)}, "array 'h' is a recurrent state"),
        ({"x": np.ones((3, 3))}, "array 'x' is float64[3,3], expected float32 for FLOAT[1,3]"),
        ({"x": np.ones((3, 4), np.float32)}, "array 'x' is float32[3,4], expected [samples,3] for input FLOAT[1,3]"),
        ({"x": np.ones((3, 2, 3), np.float32)}, "expected [samples,3]"),
        ({"y": np.ones((3,), np.float32)}, "expected [samples,n,2]"),
        ({"k": np.int64(3)}, "array 'k' is int64[], expected [samples]"),
        ({"k": np.arange(4)}, "first axes count x 3, y 3, k 4"),
        ({"label": np.arange(2)}, "first axes count"),
        (arrays(0), "first axes count x 0"),
        ({"x": np.array([None] * 3)}, "array 'x' holds Python objects, which are never loaded"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    path = save(tmp_path / "d.npz", {k: v for k, v in (arrays() | content).items() if v is not None})
    text = refusal(path)
    assert message.removesuffix("; drop") in text
    assert str(path) in text


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.npz")
    assert "holds no .npz file" in refusal(tmp_path)
    (tmp_path / "a.csv").write_text("1,2")
    assert "is no .npz file" in refusal(tmp_path / "a.csv")
    (tmp_path / "a.npz").write_text("1,2")
    assert "cannot be read as an .npz file" in refusal(tmp_path / "a.npz")
    whole = save(tmp_path / "b.npz", arrays()).read_bytes()
    (tmp_path / "c.npz").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as an .npz file" in refusal(tmp_path / "c.npz")
    save(tmp_path / "a.npz", arrays(label=np.arange(3)))
    (tmp_path / "c.npz").unlink()
    assert "b.npz has no array 'label', other files do" in refusal(tmp_path)
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00")
    assert "cannot be read" in refusal(tmp_path / "d.npz")


def test_states_must_exist(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", arrays())
    assert "no output 'q', expected one of a, b, d, hn" in refusal(path, {"q": "h"})
    assert "no input 'q', expected one of x, y, k, h" in refusal(path, {"hn": "q"})
    assert "--state output=input" in refusal(path, {})


def test_seeded_samples_repeat() -> None:
    data = ir.seeded_data(model(), 4, 7, states=STATES)
    first, again, other = list(data), list(data), list(ir.seeded_data(model(), 4, 8, states=STATES))
    assert len(first) == len(data) == 4
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a.inputs["x"], b.inputs["x"])
        assert (a.inputs["x"] != c.inputs["x"]).any()
    assert ["h" in s.inputs for s in first] == [True, False, False, False]
    assert {k: v.shape for k, v in first[0].inputs.items()} == {"x": (1, 3), "y": (1, 2), "k": (), "h": (2, 1, 4)}


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        (
            "int64[b, s] x) => (y) <float[5, 1] t = {0,0,0,0,0}> { r = Cast <to = 6> (x) y = Gather (t, r) }",
            range(5),
        ),
        ("int64 x) => (y) <int64 a = {8000}> { y = Equal (x, a) }", [8000]),
        (
            "int32[1, 4] x) => (y) "
            "<int32[3] a = {3, 4, 5}, int64[2] e = {4, 3}> { q = Expand (x, e) y = Equal (q, a) }",
            [3, 4, 5],
        ),
        ("int64[1, 4] x) => (y) <int64 a = {0}> { y = Equal (x, a) }", range(2)),
        ("int64[1, 4] attention_mask) => (y) { y = Relu (attention_mask) }", [1]),
        ("bool[1, 4] x) => (y) { y = Not (x) }", [False, True]),
    ],
)
def test_seeded_integers_are_what_the_input_is_made_for(text: str, allowed: Any) -> None:
    made = model(f'<ir_version: 10, opset_import: ["": 21]> g ({text}')
    values = np.concatenate([next(iter(s.inputs.values())).reshape(-1) for s in ir.seeded_data(made, 8, 0)])
    assert set(values.tolist()) <= set(allowed)
    if len(allowed) > 1:
        assert len(set(values.tolist())) > 1


def test_an_input_that_cannot_be_drawn() -> None:
    made = model('<ir_version: 10, opset_import: ["": 21]> g (string[2] x) => (y) { y = Identity (x) }')
    with pytest.raises(ir.DataError, match=re.escape("input 'x' is STRING[2]")):
        ir.seeded_data(made)


def test_seeded_data_has_several_batches_and_lengths() -> None:
    text = '<ir_version: 10, opset_import: ["": 21]> g (int64[b,s] ids, float[b,s,4] x, float[b,7] z) => (y) {y=Abs(x)}'
    data = list(ir.seeded_data(model(text), 4, 0, sizes="several"))
    assert [s.inputs["ids"].shape for s in data] == [(1, 64), (2, 8), (3, 33), (1, 64)]
    assert all(s.inputs["x"].shape[:2] == s.inputs["ids"].shape for s in data)
    assert [s.inputs["z"].shape[0] for s in data] == [1, 2, 3, 1]
    assert len({s.inputs["ids"].shape for s in ir.seeded_data(model(text), 4, 0)}) == 1
