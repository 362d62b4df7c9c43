"""Several processes train as one does with the same global batch: gloo, two of them, started as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mc_opt
from tests.passes.test_train import NET, model, patterns

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, sys
from pathlib import Path
import mc_opt
from mc_opt import passes

data, spec, out = sys.argv[1:]
training = passes.Training(
    data=Path(data), epochs=3, batch_size=16, loss="labels,output", holdout=0.25, parameters=("all",), lr=0.01,
    threads=1,
)
model, report = mc_opt.compress(Path(data).parent / "net.onnx", spec, training=training, check="structure")
if passes.is_main_process():
    mc_opt.save_model(model, out)
    print(json.dumps(report.to_json()["passes"][-1]["training"]))
"""


def run(folder: Path, spec: str, out: Path, processes: int) -> dict[str, object]:
    script = folder / "train.py"
    script.write_text(SCRIPT)
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=0", "--standalone"]
    done = subprocess.run(
        [*start, str(script), str(folder / "patterns0.npz"), spec, str(out)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize(
    "spec", ["fine-tune", pytest.param("denseshift{bits=3 skip=}", marks=pytest.mark.ci, id="denseshift")]
)
def test_two_processes_equal_one(tmp_path: Path, spec: str) -> None:
    patterns(tmp_path)
    mc_opt.save_model(model(NET), tmp_path / "net.onnx")
    told = [run(tmp_path, spec, tmp_path / f"{n}.onnx", n) for n in (1, 2)]
    for key in ("samples", "held_out", "steps", "parameters", "metric"):
        assert told[0][key] == told[1][key]
    losses = [[epoch["loss"] for epoch in t["epochs"]] for t in told]  # type: ignore[attr-defined]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)  # sums in another order, then 9 steps of AdamW
    one, two = (mc_opt.load_model(tmp_path / f"{n}.onnx") for n in (1, 2))
    if spec == "fine-tune":
        for name, value in one.graph.initializers.items():
            other = two.graph.initializers[name].const_value.numpy()
            np.testing.assert_allclose(value.const_value.numpy(), other, rtol=1e-3, atol=1e-4, err_msg=name)
