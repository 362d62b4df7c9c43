"""The public functions of `import mc_opt`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

import mc_opt
from mc_opt import ir, passes
from tests.passes.toy import Toy

MODEL = f"""
<ir_version: 10, opset_import: ["": 21]>
g (float[2,4] x) => (float[2,8] y)
<float[4,8] w1 = {{{", ".join(str(i % 7 - 3) for i in range(32))}}}>
{{
  y = MatMul (x, w1)
}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "net.onnx"
    file.write_bytes(onnx.parser.parse_model(MODEL).SerializeToString())
    return file


def test_a_model_is_loaded_compressed_and_saved(path: Path) -> None:
    model = mc_opt.load_model(path)
    small, report = mc_opt.compress(model, [Toy(ratio=2.0)], data=ir.seeded_data(model, 2, 0))
    assert report.passes[0].rewrites == 1
    files = mc_opt.save_model(small, path.parent / "small.onnx")
    again = mc_opt.load_model(files[0])
    np.testing.assert_array_equal(
        again.graph.initializers["w1"].const_value.numpy(), 2 * model.graph.initializers["w1"].const_value.numpy()
    )


def test_a_recipe_may_be_text_or_a_pipeline(path: Path) -> None:
    _, report = mc_opt.compress(path, "", check="structure")
    assert report.passes == ()
    _, report = mc_opt.compress(str(path), passes.Pipeline.of(Toy()), check="structure")
    assert report.recipe == "toy"


def test_build_for_onnx_writes_the_file(path: Path) -> None:
    report = mc_opt.build(path, "onnx", path.parent / "out")
    assert (path.parent / "out/model.onnx").is_file()
    assert [t.name for t in report.targets] == ["onnx"]


@pytest.mark.torch
def test_a_model_is_a_torch_module(path: Path) -> None:
    import torch

    model = mc_opt.load_model(path)
    (y,) = mc_opt.to_torch(model)(torch.ones(2, 4))
    np.testing.assert_allclose(y.detach().numpy(), ir.Session(model).run({"x": np.ones((2, 4), np.float32)})["y"])


def test_symbolic_shapes_and_states_can_be_given(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[n,4] x, float[n,4] s) => (float[n,4] y) { y = Add (x, s) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "sum.onnx")
    shapes = {"x": (1, 4), "s": (1, 4)}
    np.savez(tmp_path / "x.npz", x=np.ones((3, 4), np.float32))
    model, _ = mc_opt.compress(
        tmp_path / "sum.onnx", [Toy()], data=tmp_path / "x.npz", shapes=shapes, states={"y": "s"}
    )
    assert ir.type_text(model.graph.outputs[0]) == "f32[1,4]"
    mc_opt.build(tmp_path / "sum.onnx", "onnx", tmp_path / "out", shapes=shapes)
    assert ir.type_text(mc_opt.load_model(tmp_path / "out/model.onnx").graph.inputs[0]) == "f32[1,4]"


def test_importing_the_package_loads_no_room() -> None:
    code = "import sys, mc_opt, mc_opt.passes; print({'onnx', 'onnx_ir', 'torch', 'tvm'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
