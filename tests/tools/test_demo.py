"""The demo holds what it prints: accuracy, agreement of the artefact, and it ends with 0."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.tvm
@pytest.mark.zig
def test_the_demo() -> None:
    done = subprocess.run([sys.executable, ROOT / "examples" / "digits" / "demo.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    for text in (
        "float, ONNX Runtime",
        "4 bits, x86 artefact",
        "4 bits, C library",
        "within 1 point of float",
        "trained sekron+denseshift",
        "out/digits/arm/model.so",
        "at most 1/6 of their bytes",
    ):
        assert text in done.stdout
