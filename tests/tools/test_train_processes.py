"""`mc-opt --train` as a process: killed at any moment and started again, and as several processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

from mc_opt import ir
from tests._harness import model as parsed
from tests.passes.test_train import NET, patterns

pytestmark = [pytest.mark.torch, pytest.mark.slow]
pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[2]
COMMAND = Path(sysconfig.get_path("scripts")) / "mc-opt"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*command: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.mark.ci
def test_a_killed_training_ends_with_the_same_bytes(tmp_path: Path) -> None:
    ir.save_model(parsed(NET), tmp_path / "net.onnx")
    words = [str(tmp_path / "net.onnx"), "--passes", "denseshift{bits=3 skip=}", "--train", str(patterns(tmp_path))]
    words += ["--epochs", "120", "--batch-size", "16", "--threads", "1", "--checkpoint-every", "0.1", "-o"]
    command = [sys.executable, "-c", "from mc_opt.tools.cli import main; main()", *words]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=ENVIRONMENT, **quiet)
    kept = tmp_path / "out.training"
    for seed in (None, 0):
        child = subprocess.Popen([*command, str(tmp_path / "out")], env=ENVIRONMENT, **quiet)
        known = {p: p.stat().st_mtime_ns for p in kept.glob("*.safetensors")}
        while {p: p.stat().st_mtime_ns for p in kept.glob("*.safetensors")} == known:  # it is not training yet
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert not (tmp_path / "out").exists() and list(kept.glob("*.safetensors"))
    done = run(*command, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "denseshift: goes on at epoch" in done.stderr
    for name in ("model.onnx", "report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not kept.exists()


def test_two_processes_train_write_and_print_as_one(tmp_path: Path) -> None:
    digits = ROOT / "examples" / "digits"
    words = [str(digits / "digits.onnx"), "--passes", "denseshift{bits=3}", "--loss", "labels,output", "--threads", "1"]
    words += ["--train", str(digits / "digits-heldout.npz"), "--epochs", "2", "--lr", "0.002", "--check", "structure"]
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", str(COMMAND)]
    reports = []
    for name, start in {"one": [str(COMMAND)], "two": [sys.executable, *together]}.items():
        done = run(*start, *words, "-o", tmp_path / name)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("trained denseshift") == 1 and "process 1" not in done.stderr
        reports.append(json.loads((tmp_path / name / "report.json").read_text())["passes"][0]["training"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
    for key in ("samples", "held_out", "batches", "steps", "parameters"):
        assert reports[0][key] == reports[1][key]
    losses = [[epoch["held_out"] for epoch in report["epochs"]] for report in reports]
    # Sums in another order, and statistics of BatchNormalization over half the batch.
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.2)
    done = run(sys.executable, *together, *words, "--batch-size", 33, "-o", tmp_path / "three")
    assert done.returncode != 0 and "batch_size=33: 2 processes cannot share it equally" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
