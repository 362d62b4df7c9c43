"""Main as one function of machine code, and the function of Python that is written to call it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mc_opt
from mc_opt.targets import _call, _runtime
from mc_opt.targets._call import Input
from tests._harness import model

# Views of an input and of an output, an output that is used further, memory that is used again, a weight used twice.
TANGLED = """agraph (float[4,96] x, float[384] s, bool[4,96] chosen) => (float[4,96] y, float[8,48] z, float[4,96] t)
<float[96,96] w, int64[2] turned = {8, 48}, int64[2] back = {4, 96}> {
    a = MatMul(x, w)  b = Softmax(a)  c = MatMul(b, w)  r = Reshape(s, back)  y = Add(c, r)  z = Reshape(y, turned)
    d = Softmax(y)  e = MatMul(d, w)  t = Where(chosen, e, x) }"""


@pytest.mark.tvm
@pytest.mark.zig
@pytest.mark.slow
@pytest.mark.ci
def test_machine_code_gives_what_the_virtual_machine_gives(tmp_path: Path) -> None:
    mc_opt.build(model(TANGLED), "x86{cpu=x86-64-v3}", tmp_path / "out")
    artefact = mc_opt.load(tmp_path / "out")
    machine = artefact._machine
    assert isinstance(machine, _runtime.Processor)
    assert machine._blocks, "the library has main as machine code"
    rng = np.random.default_rng(1)
    arrays = {"x": rng.standard_normal((4, 96), np.float32), "s": rng.standard_normal(384, np.float32)}
    arrays["chosen"] = rng.random((4, 96)) < 0.5
    found = [artefact.run(arrays) for _ in range(2)]
    kernels: list[str] = []
    machine.instrument(lambda _function, name, before, *_: kernels.append(str(name)) if before else None)
    expected = machine.run([machine.borrow(array) for array in arrays.values()])
    assert len(kernels) > 5, "an instrument sees every kernel"
    for outputs in found:
        for array, wanted in zip(outputs.values(), expected, strict=True):
            np.testing.assert_array_equal(array, wanted)


ODD = ('a"b', "x\ny", "{k}", "'")
LONG = 2048


@pytest.fixture
def summed() -> tuple[_call.Run, np.ndarray]:
    """y = x0 + x1, small and copied; z = y, repeated, large and lent; and where x0 is copied to."""
    alike: Any = SimpleNamespace(from_dlpack=lambda array: array)
    rows = [("float32", (3,), (0,)), ("float32", (LONG,), (1,))]
    place, dtype = np.zeros(3, np.float32), np.dtype(np.float32)

    def main(x0: np.ndarray, x1: np.ndarray, y: np.ndarray, z: np.ndarray, behind: str) -> None:
        assert behind == "constants"
        y[:] = x0 + x1
        z[:] = y[0]

    run = _call.function(
        main,
        [Input(ODD[0], (3,), dtype, (place, place)), Input(ODD[1], (3,), dtype, None)],
        lambda array: array,
        _runtime.memories(alike, rows, rows),
        _runtime.views_of(rows),
        list(zip(ODD[2:], _runtime.views_of(rows), strict=True)),
        behind=["constants"],
    )
    return run, place


def outputs_of(run: _call.Run, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a run gives for inputs that fit."""
    found = run(inputs)
    assert found is not None
    return found


def test_inputs_that_do_not_fit_are_left_to_others(summed: tuple[_call.Run, np.ndarray]) -> None:
    run, place = summed
    one = np.ones(3, np.float32)
    shapes: list[Any] = [np.ones(4, np.float32), np.ones((3, 1), np.float32)]
    for wrong in [*shapes, np.ones(3), [1.0, 1.0, 1.0], one.astype(">f4"), None]:
        assert run({ODD[0]: one, ODD[1]: wrong}) is None
        assert run({ODD[0]: wrong, ODD[1]: one}) is None
    assert run({ODD[0]: one}) is None
    assert run({ODD[0]: one, "other": one}) is None
    assert run({ODD[0]: one, ODD[1]: one, "other": one}) is None
    assert not place.any(), "nothing is copied before everything fits"


def test_outputs_stay_as_they_were_returned(summed: tuple[_call.Run, np.ndarray]) -> None:
    run, _ = summed
    found = [outputs_of(run, {ODD[0]: np.full(3, k, np.float32), ODD[1]: np.ones(3, np.float32)}) for k in range(6)]
    for k, outputs in enumerate(found):
        assert list(outputs) == [*ODD[2:]]
        assert outputs[ODD[2]].tolist() == [k + 1] * 3
        assert outputs[ODD[3]].tolist() == [k + 1] * LONG
    del found, outputs
    inputs = {ODD[0]: np.zeros(3, np.float32), ODD[1]: np.ones(3, np.float32)}
    addresses = {outputs_of(run, inputs)[ODD[3]].ctypes.data for _ in range(6)}
    assert len(addresses) == 1, "memory that nobody refers to is used again"
    view = outputs_of(run, inputs)[ODD[3]][5:7]
    shared = memoryview(outputs_of(run, inputs)[ODD[3]])
    run({ODD[0]: np.full(3, 8, np.float32), ODD[1]: np.ones(3, np.float32)})
    assert view.tolist() == list(shared[:2]) == [1, 1]
