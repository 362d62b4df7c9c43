"""The same run gives the same bytes, whatever the hash seed and the folder; only timings.json may differ."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"


def digests(out: Path, target: str, seed: str) -> dict[str, str]:
    """Run the command line on the digits CNN and hash what it wrote."""
    arguments = [
        str(DIGITS / "digits.onnx"),
        "--passes",
        "fold-constants,fold-batch-norm,denseshift",
        "--target",
        target,
    ]
    arguments += ["--data", str(DIGITS / "digits-heldout.npz"), "--dump", "-o", str(out)]
    code = f"from mc_opt.tools import cli; raise SystemExit(cli.run({arguments!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env={"PYTHONHASHSEED": seed})
    files = sorted(p for p in out.rglob("*") if p.is_file() and p.name != "timings.json")
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.slow
@pytest.mark.ci
def test_the_onnx_file_and_the_report(tmp_path: Path) -> None:
    first = digests(tmp_path / "a", "onnx", "1")
    assert first == digests(tmp_path / "other" / "b", "onnx", "2")
    assert set(first) > {"model.onnx", "report.json"}


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.tvm
@pytest.mark.zig
def test_the_x86_artefact(tmp_path: Path) -> None:
    first = digests(tmp_path / "a", "x86", "1")
    assert first == digests(tmp_path / "other" / "b", "x86", "2")
    assert set(first) > {"x86/model.so", "x86/constants.bin", "x86/manifest.json", "x86/runner.cc"}
