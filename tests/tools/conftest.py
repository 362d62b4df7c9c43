"""Small model files for the command line, and a way to run it in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from mc_opt.tools import cli

TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
mlp (float[1, 16] x) => (float[1, 4] y)
<float[16, 32] fc1, float[32, 32] fc2, float[32, 4] fc3>
{
  a = MatMul(x, fc1)
  b = Relu(a)
  c = MatMul(b, fc2)
  d = Relu(c)
  y = MatMul(d, fc3)
}
"""


@dataclass(frozen=True)
class Ran:
    """What a run of the command line did."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what went wrong."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("mc-opt:")]
        return line


@pytest.fixture
def mc_opt(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`mc_opt("inspect", path)` runs the command line in this process."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = cli.run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


def proto(**changes: np.ndarray) -> onnx.ModelProto:
    """The small MLP with seeded weights; `changes` replaces some."""
    model = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(0)
    shapes = {"fc1": (16, 32), "fc2": (32, 32), "fc3": (32, 4)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} | changes
    del model.graph.initializer[:]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(w, name) for name, w in weights.items())
    return model


@pytest.fixture
def mlp(tmp_path: Path) -> Path:
    """The small MLP as a file in a folder of its own."""
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / "mlp.onnx"
    onnx.save(proto(), path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder that does not exist yet."""
    return tmp_path / "out"
