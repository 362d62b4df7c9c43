"""binary, ternary and smart-quant through the training loop: a run prepares, trains, judges and stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mc_opt import ir, passes
from tests._harness import model

pytestmark = [pytest.mark.torch, pytest.mark.slow]
pytest.importorskip("torch")

NET = """
net (float[N,1,6,6] x) => (float[N,4] y)
<
  float[8,1,3,3] a, float[8] s1, float[8] b1, float[8] m1, float[8] var1,
  float[16,8,3,3] c, float[16] s2, float[16] b2, float[16] m2, float[16] var2, float[4,16] head
>
{
  i = Conv <pads: ints = [1,1,1,1]> (x, a)
  j = BatchNormalization (i, s1, b1, m1, var1)
  k = Relu (j)
  l = Conv <pads: ints = [1,1,1,1], strides: ints = [2,2]> (k, c)
  m = BatchNormalization (l, s2, b2, m2, var2)
  n = Relu (m)
  p = GlobalAveragePool (n)
  f = Flatten (p)
  y = Gemm <transB: int = 1> (f, head)
}
"""


def stripes(folder: Path, count: int = 128) -> Path:
    """Four kinds of noisy stripes, with labels."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, count)
    rows, columns = np.mgrid[0:6, 0:6]
    kinds = np.stack([rows % 2, columns % 2, (rows + columns) % 2, np.zeros((6, 6))])
    x = kinds[label][:, None] + 0.1 * rng.standard_normal((count, 1, 6, 6))
    path = folder / "stripes.npz"
    np.savez(path, x=x.astype(np.float32), label=label)
    return path


@pytest.mark.parametrize(
    "spec",
    [
        *(f"binary{{method={m}}}" for m in ("bc", "pc", "pcpp", "bnnpp", "bnnplus", "foothill")),
        "binary{activations=true}",
        "binary{method=bnnpp activations=true}",
        "ternary",
        "smart-quant",
    ],
)
def test_a_run_trains_and_stores_what_it_judged(tmp_path: Path, spec: str) -> None:
    data = stripes(tmp_path)
    training = passes.Training(
        data=data, held_out=data, epochs=12, batch_size=16, lr=1e-2, loss="labels", parameters=("all",)
    )
    source = model(NET)
    pipeline = passes.Pipeline.parse(spec)
    result = passes.run(source, pipeline, passes.Context(training=training), check="structure")
    report = result.report.passes[-1].training
    assert report is not None and report.epochs and report.epochs[-1].metric is not None
    ir.verify(result.model)
    held = np.load(data)
    scores = ir.Session(result.model).run({"x": held["x"]})["y"]
    accuracy = float((scores.argmax(1) == held["label"]).mean())
    assert accuracy > 0.9, "and four classes by chance are 0.25"
    assert accuracy == pytest.approx(report.epochs[-1].metric, abs=0.01), "stored as it was judged"
    stored = [n for n in result.model.graph if n.op_type == "Lookup"]
    assert [n.outputs[0].name for n in stored] == ["c"]
