"""What main is given once: a run of fixed sizes allocates nothing, constants stand once in their file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import tvm
import tvm_ffi

import mc_opt
from mc_opt import ir
from mc_opt.targets import _bound, _build, _runtime
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


def compiled(
    text: str, *, has_states: bool = False, **weights: np.ndarray
) -> tuple[tvm.relax.VMExecutable, _bound.Constants]:
    """The virtual machine's program of a model, and its constants."""
    _kernels._register()
    machine = _kernels.machine()
    constants = _bound.Constants()
    lowered = lower.lower(onnx_ir.from_proto(_kernels.model(text, weights)), machine, lambda *_: None)
    with _build.llvm_target(machine) as target:
        module, _ = _build.schedule(_build.fuse(lowered.module), machine, target)
        pipeline = _build._pipeline(_bound.bind(constants, has_states=has_states))
        made = tvm.compile(module, target=target, relax_pipeline=pipeline, tir_pipeline=intrinsics.PIPELINE)
    return made, constants


def calls(made: tvm.relax.VMExecutable, function: str) -> list[str]:
    """What a function of a program calls, in order."""
    (body,) = re.findall(rf"@{function}:\n((?:  .*\n)*)", made.as_text())
    return re.findall(r"call +(\S+) ", body)


def test_a_run_makes_the_kernels_calls_alone(tmp_path: Path) -> None:
    made, constants = compiled(TIED, w=WEIGHT)
    main, places = calls(made, "main"), calls(made, "places")
    # The copy is of the number that main returns.
    assert sorted(main) == ["fused_mul_add", "gemm", "gemm", "softmax", "softmax", "vm.builtin.copy"]
    # a and b: what a kernel reads and writes stands apart, and c where a stood.
    assert places == ["vm.builtin.make_tuple"] * 3
    assert calls(made, "written") == calls(made, "outputs") == ["vm.builtin.make_tuple"] * 3  # y and z
    constants.write(tmp_path / "constants.bin")
    # The weight of both products is packed the same way, and stands there once.
    sizes = [WEIGHT.nbytes, 8 * 4]
    assert (tmp_path / "constants.bin").stat().st_size <= 2 * sum(-(-size // 64) * 64 for size in sizes)


def test_outputs_that_are_states_are_tensors_of_their_own() -> None:
    made, _ = compiled(TIED, has_states=True, w=WEIGHT)
    assert calls(made, "main").count("vm.builtin.alloc_tensor") == 2  # y and z
    assert calls(made, "written") == calls(made, "outputs") == ["vm.builtin.make_tuple"]


def test_open_sizes_are_allocated_in_each_run() -> None:
    made, _ = compiled("agraph (float[n,8] x) => (float[n,8] y) { a = Softmax(x) y = Softmax(a) }")
    assert calls(made, "main").count("vm.builtin.alloc_tensor") == 2
    assert calls(made, "places") == calls(made, "outputs") == ["vm.builtin.make_tuple"]


def test_equal_bytes_of_other_types_and_shapes_are_views() -> None:
    constants = _bound.Constants()
    bits = np.arange(32, dtype=np.int32)
    assert constants.offset(np.ones(3, np.int8)) == 0
    assert constants.offset(bits) == constants.offset(bits.view(np.float32).reshape(4, 8)) == 64
    assert constants.offset(np.zeros((), np.int64)) == 64 + 128


def tangled(seed: int) -> str:
    """A model of 24 nodes, each on any values before it: views, several outputs of a node, and several of the model."""
    rng = np.random.default_rng(seed)
    values, nodes = ["x", "z"], []
    for k in range(24):
        a, b = rng.choice(values[-8:], 2)
        nodes.append(
            [
                f"v{k} = Softmax({a})",
                f"v{k} = Add({a}, {b})",
                f"v{k} = MatMul({a}, w)",
                f"v{k}_s = Reshape({a}, columns) v{k} = Reshape(v{k}_s, rows)",
                f"v{k}_l, v{k}_r = Split<axis=1, num_outputs=2>({a}) v{k} = Concat<axis=1>(v{k}_r, v{k}_l)",
                f"v{k}_t = Transpose({b}) v{k}_m = MatMul({a}, v{k}_t) v{k} = MatMul(v{k}_m, {a})",
            ][rng.integers(6)]
        )
        values.append(f"v{k}")
    outputs = sorted({values[-1], *rng.choice(values[2:], 2)})
    weights = "<int64[2] rows = {6, 16}, int64[2] columns = {16, 6}, float[16,16] w>"
    listed = ", ".join(f"float[6,16] {name}" for name in outputs)
    return f"agraph (float[6,16] x, float[6,16] z) => ({listed}) {weights} {{ {' '.join(nodes)} }}"


@pytest.mark.parametrize("seed", range(6))
def test_places_do_not_disturb_each_other(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    weights = {"w": rng.standard_normal((16, 16), np.float32) / 4}
    made, constants = compiled(tangled(seed), **weights)
    constants.write(tmp_path / "constants.bin")
    machine = tvm.relax.VirtualMachine(made, tvm.cpu())
    rows = machine["places"]()
    room = _runtime.memory(_runtime._extent(rows))
    held = [*_runtime._views(machine["constants"](), _runtime.read(tmp_path / "constants.bin"))]
    held += _runtime._views(rows, room)
    written, outputs = machine["written"](), machine["outputs"]()
    slots = [memory.idle() for memory in _runtime.memories(tvm_ffi, written, outputs)]
    session = ir.Session(onnx_ir.from_proto(_kernels.model(tangled(seed), weights)))
    for _ in range(2):
        inputs = {name: rng.standard_normal((6, 16), np.float32) for name in ("x", "z")}
        room[:] = 255  # NaN
        arguments = [
            *map(tvm.runtime.tensor, inputs.values()),
            *(slots[k].tensors[v] for k, v in _runtime.views_of(written)),
        ]
        machine["main"](*arguments, *map(tvm.runtime.from_dlpack, held))
        found = [slots[k].taken(v) for k, v in _runtime.views_of(outputs)]
        for expected, array in zip(session.run(inputs).values(), found, strict=True):
            # float32 sums in another order, and the values grow from node to node
            np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


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
