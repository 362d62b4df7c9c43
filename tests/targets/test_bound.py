"""What main is given once: a run allocates its outputs alone, constants stand once in their file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import tvm

import mc_opt
from mc_opt.targets import _bound, _build
from mc_opt.targets._relax import intrinsics, lower
from tests._harness import model
from tests.targets import _kernels

pytestmark = [pytest.mark.tvm, pytest.mark.slow, pytest.mark.ci]

TIED = """
agraph (float[2,8] x, float[2,8] s) => (float[2,8] y, float[2,8] z)
<float[8,8] w, float[8] one = {1, 1, 1, 1, 1, 1, 1, 1}>
{ a = MatMul(x, w)  b = Softmax(a)  c = MatMul(b, w)  d = Mul(c, one)  z = Add(d, s)  y = Softmax(c) }
"""
WEIGHT = np.random.default_rng(0).standard_normal((8, 8), np.float32)


def compiled(text: str, **weights: np.ndarray) -> tuple[str, _bound.Constants]:
    """The virtual machine's program of a model, as text, and its constants."""
    _kernels._register()
    machine = _kernels.machine()
    constants = _bound.Constants()
    lowered = lower.lower(onnx_ir.from_proto(_kernels.model(text, weights)), machine, lambda *_: None)
    with _build.llvm_target(machine) as target:
        module, _ = _build.schedule(_build.fuse(lowered.module), machine, target)
        pipeline = _build._pipeline(_bound.bind(constants))
        made = tvm.compile(module, target=target, relax_pipeline=pipeline, tir_pipeline=intrinsics.PIPELINE)
    return str(made.as_text()), constants


def calls(text: str, function: str) -> list[str]:
    """What a function of a program calls, in order."""
    (body,) = re.findall(rf"@{function}:\n((?:  .*\n)*)", text)
    return re.findall(r"call +(\S+) ", body)


def test_a_run_allocates_nothing_but_its_outputs(tmp_path: Path) -> None:
    text, constants = compiled(TIED, w=WEIGHT)
    main, places = calls(text, "main"), calls(text, "places")
    assert main.count("gemm") == 2
    assert main.count("vm.builtin.alloc_storage") == main.count("vm.builtin.alloc_tensor") == 2  # y and z
    assert places.count("vm.builtin.alloc_tensor") == 3  # a, b and c
    constants.write(tmp_path / "constants.bin")
    # The weight of both products is packed the same way, and stands there once.
    sizes = [WEIGHT.nbytes, 8 * 4]
    assert (tmp_path / "constants.bin").stat().st_size <= 2 * sum(-(-size // 64) * 64 for size in sizes)


def test_open_sizes_are_allocated_in_each_run() -> None:
    text, _ = compiled("agraph (float[n,8] x) => (float[n,8] y) { a = Softmax(x) y = Softmax(a) }")
    assert calls(text, "main").count("vm.builtin.alloc_tensor") == 2
    assert calls(text, "places") == ["vm.builtin.make_tuple"]


def test_equal_bytes_of_other_types_and_shapes_are_views() -> None:
    constants = _bound.Constants()
    bits = np.arange(32, dtype=np.int32)
    assert constants.offset(np.ones(3, np.int8)) == 0
    assert constants.offset(bits) == constants.offset(bits.view(np.float32).reshape(4, 8)) == 64
    assert constants.offset(np.zeros((), np.int64)) == 64 + 128


@pytest.mark.zig
def test_constants_of_all_types_and_ranks_come_back(tmp_path: Path) -> None:
    text = """
agraph (float[2] x, int64[1] k) => (float[2] y, int64[1,3] row, bool[2] same, double[2] wide, float[0] none)
<int64[4,3] table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}, bool[2] yes = {1, 0}, double[2] two = {2, 3},
 float scale = {0.5}, float[0] empty = {}>
{
    y = Mul(x, scale)
    row = Gather(table, k)
    big = Greater(x, scale)
    same = Equal(big, yes)
    long = Cast<to=11>(x)
    wide = Mul(long, two)
    none = Identity(empty)
}
"""
    proto = model(text)
    mc_opt.build(proto, "x86{cpu=x86-64-v3}", tmp_path)
    inputs = {"x": np.array([1, 0.25], np.float32), "k": np.array([2])}
    expected = mc_opt.ir.Session(proto).run(inputs)
    artefact = mc_opt.load(tmp_path)
    for _ in range(2):
        found = artefact.run(inputs)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
