"""Reading weights that lie in files of their own: mapped, and held to the folder of the model."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from mc_opt import ir


def external(
    folder: Path, *, location: str = "m.data", rows: int = 64, written: int | None = None, **entries: int
) -> Path:
    """A model whose weight [rows, rows] lies in another file."""
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[1, {rows}] x) => (float[1, {rows}] y){{ y = MatMul (x, w) }}'
    )
    data = np.arange(rows * rows, dtype=np.float32)
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[rows, rows])
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        weight.external_data.add(key=key, value=str(value))
    model.graph.initializer.append(weight)
    (folder / "m.data").write_bytes(data.tobytes()[:written])
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(ir.IRError) as caught:
        ir.load_model(path, **options)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def test_external_data_is_mapped_and_survives_the_file(tmp_path: Path) -> None:
    path = external(tmp_path, offset=0, length=64 * 64 * 4)
    model = ir.load_model(path)
    digest = hashlib.sha256((tmp_path / "m.data").read_bytes()).hexdigest()
    assert model.meta["mc_opt.source"].external == (("m.data", 64 * 64 * 4, digest),)
    (tmp_path / "m.data").unlink()
    weight = model.graph.initializers["w"].const_value.numpy()
    np.testing.assert_array_equal(weight.reshape(-1), np.arange(64 * 64))
    assert not weight.flags.owndata


@pytest.mark.parametrize("location", ["/etc/passwd", "../m.data", "a/../../m.data", "..\\m.data", ""])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    text = refusal(external(tmp_path, location=location))
    assert "weight 'w'" in text
    assert repr(location)[1:-1] in text or not location


def test_external_data_behind_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = external(tmp_path / "model", location="link.data")
    os.rename(tmp_path / "model/m.data", tmp_path / "secret")
    (tmp_path / "model/link.data").symlink_to(tmp_path / "secret")
    assert "is a link to" in refusal(path)
    (tmp_path / "model/link.data").unlink()
    os.rename(tmp_path / "secret", tmp_path / "model/real.data")
    (tmp_path / "model/link.data").symlink_to("real.data")
    ir.load_model(path)


def test_external_data_in_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = external(tmp_path)
    (tmp_path / "m.data").unlink()
    os.mkfifo(tmp_path / "m.data")
    with pytest.raises(ir.IRError, match=r"'m\.data' is not a regular file"):
        ir.load_model(path)


def test_external_data_must_be_there_and_long_enough(tmp_path: Path) -> None:
    assert "is missing" in refusal(external(tmp_path, location="none.data"))
    assert "has 100 bytes, expected at least 16384" in refusal(external(tmp_path, written=100))
    assert "has 0 bytes" in refusal(external(tmp_path, written=0))
    assert "expected at least 16388" in refusal(external(tmp_path, offset=4))
    assert "12 bytes of external data" in refusal(external(tmp_path, length=12))
    assert "offset of its external data is '-4'" in refusal(external(tmp_path, offset=-4))
    (tmp_path / "folder").mkdir()
    refusal(external(tmp_path, location="folder"))
