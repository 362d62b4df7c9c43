"""Subnormal numbers are zero inside of artefacts of both forms, in all threads; the caller's stay as they were."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

import mc_opt
from tests import _qemu
from tests._harness import model
from tests.targets.test_static import aligned, zig

pytestmark = [pytest.mark.tvm, pytest.mark.zig, pytest.mark.slow]

TINY = np.float32(1e-40)
SMALLEST = np.finfo(np.float32).smallest_normal


def halves() -> onnx_ir.Model:
    return model(
        "agraph (float[4] x) => (float[4] y, float[4] large) <float half = {0.5}, float many = {1e30}>"
        " { y = Mul(x, half) large = Mul(x, many) }"
    )


X = np.array([TINY, 1.5 * SMALLEST, -TINY, 4], np.float32)
EXPECTED = {"y": [0, 0, 0, 2], "large": [0, X[1] * np.float32(1e30), 0, X[3] * np.float32(1e30)]}


@pytest.mark.ci
def test_operands_and_results_are_flushed_and_the_mode_comes_back(tmp_path: Path) -> None:
    mc_opt.build(halves(), "x86{cpu=x86-64-v3}", tmp_path)
    artefact = mc_opt.load(tmp_path)
    for _ in range(2):
        found = artefact.run({"x": X})
        assert {name: array.tolist() for name, array in found.items()} == EXPECTED
        assert X[0] * np.float32(0.5) == np.float32(5e-41)


@pytest.mark.ci
def test_in_every_thread(tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("missing: a second processor")
    wide = model("agraph (float[256,512] x, float[512,512] w) => (float[256,512] y) { y = MatMul(x, w) }")
    mc_opt.build(wide, "x86{cpu=x86-64-v3 threads=2}", tmp_path)
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((256, 512), np.float32), rng.standard_normal((512, 512), np.float32)
    y = mc_opt.load(tmp_path).run({"x": x * TINY, "w": w})["y"]
    assert not y.any()
    assert (np.abs(x * TINY) > 0).mean() > 0.99


def test_in_a_static_library(tmp_path: Path) -> None:
    mc_opt.build(halves(), "x86{cpu=x86-64-v3 form=static}", tmp_path)
    zig(tmp_path / "x86", "cc", "-shared", "-Wl,--whole-archive", "libmodel.a", "-Wl,--no-whole-archive", "-o", "m.so")
    library = ctypes.CDLL(str(tmp_path / "x86/m.so"))
    library.model_workspace_size.restype = ctypes.c_size_t
    workspace = aligned(np.zeros(max(1, library.model_workspace_size()), np.uint8))
    x, y, large = (aligned(array) for array in (X, np.ones_like(X), np.ones_like(X)))
    assert library.model_run(*(ctypes.c_void_p(array.ctypes.data) for array in (x, y, large, workspace))) == 0
    assert {"y": y.tolist(), "large": large.tolist()} == EXPECTED
    assert X[0] * np.float32(0.5) == np.float32(5e-41)


@pytest.mark.qemu
def test_on_arm(tmp_path: Path) -> None:
    mc_opt.build(halves(), "arm", tmp_path)
    (found,) = _qemu.run_arm(tmp_path / "arm", [{"x": X}])
    assert {name: array.tolist() for name, array in found.items()} == EXPECTED
