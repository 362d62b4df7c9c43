"""Artefacts as they are loaded: what is there now runs, what was changed or does not fit is refused."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import mc_opt
from mc_opt import ir
from tests._harness import model

pytestmark = [pytest.mark.tvm, pytest.mark.zig, pytest.mark.slow, pytest.mark.ci]

CPU = "x86{cpu=x86-64-v3}"


def scaled(factor: float, width: int = 4) -> str:
    return f"""<ir_version: 10, opset_import: ["": 21]> g (float[2,{width}] x) => (float[2,{width}] y)
        <float k = {{{factor}}}> {{ y = Mul(x, k) }}"""


@pytest.fixture(scope="module")
def doubled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefact") / "ein Ordner"
    mc_opt.build(model(scaled(2)), CPU, folder)
    return folder


def test_the_artefact_that_is_there_now_runs(tmp_path: Path) -> None:
    x = np.ones((2, 4), np.float32)
    for factor in (2.0, 3.0):  # the dynamic loader would give the first library again for the same path
        mc_opt.build(model(scaled(factor)), CPU, tmp_path / "out")
        assert mc_opt.load(tmp_path / "out").run({"x": x})["y"].tolist() == (x * factor).tolist()


def test_two_loads_run_in_threads(doubled: Path) -> None:
    artefacts = [mc_opt.load(doubled), mc_opt.load(doubled, target="x86")]
    wrong: list[float] = []

    def work(value: float) -> None:
        x = np.full((2, 4), value, np.float32)
        for turn in range(50):
            y = artefacts[turn % 2].run({"x": x})["y"]
            if not np.array_equal(y, x * 2):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(k),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"input 'x': missing; expected float32\[2, 4\]"),
        ({"x": np.ones((2, 5), np.float32)}, r"input 'x': has shape \[2, 5\], expected \[2, 4\]"),
        ({"x": np.ones((2, 4))}, r"input 'x': is float64, expected float32"),
        ({"x": np.ones((2, 4), np.float32), "z": np.ones(1)}, r"input 'z': the model has no such input \(known: x\)"),
    ],
)
def test_inputs_that_do_not_fit(doubled: Path, inputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ir.DataError, match=message):
        mc_opt.load(doubled).run(inputs)


def test_inputs_in_any_memory_and_outputs_of_the_caller(doubled: Path) -> None:
    artefact = mc_opt.load(doubled)
    wide = np.arange(17, dtype=np.float32)
    views = (wide[1:9].reshape(2, 4), wide[:16:2].reshape(4, 2).T, np.broadcast_to(wide[:4], (2, 4)))
    outputs = [artefact.run({"x": x})["y"] for x in views]
    for x, y in zip(views, outputs, strict=True):  # a later run leaves them as they were
        assert y.tolist() == (x * 2).tolist()
        y += 1
    assert artefact.run({"x": [[np.float32(1)] * 4] * 2})["y"].tolist() == [[2] * 4] * 2


LARGE = """agraph (float[128,256] x) => (float[128,256] y, float[256,128] z, float[128,256] s)
<int64[2] turned = {256, 128}> { y = Softmax(x)  z = Reshape(y, turned)  s = Add(x, x) }"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    mc_opt.build(model(LARGE), CPU, folder)
    return folder


def test_large_inputs_are_taken_from_any_memory(large: Path) -> None:
    artefact, session = mc_opt.load(large), ir.Session(model(LARGE))
    room = np.random.default_rng(0).standard_normal(4 * 128 * 256 + 1, np.float32)
    whole = room[1 : 1 + 128 * 256].reshape(128, 256)  # no vector begins a line
    frozen = whole.copy()
    frozen.flags.writeable = False
    odd = np.frombuffer(b"." + whole.tobytes(), np.float32, offset=1).reshape(128, 256)
    for x in (whole, room[: 2 * 128 * 256 : 2].reshape(128, 256), np.asfortranarray(whole), frozen, odd, whole[::-1]):
        before = x.copy()
        found, expected = artefact.run({"x": x}), session.run({"x": x})
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-7)
        assert x.tobytes() == before.tobytes()


def test_large_outputs_are_the_caller_s_until_nobody_holds_them(large: Path) -> None:
    artefact = mc_opt.load(large)
    xs = [np.full((128, 256), k, np.float32) for k in range(8)]
    held = [artefact.run({"x": x})["s"][3, 4:] for x in xs]  # a view of an array that is gone
    assert [view.tolist() for view in held] == [[2.0 * k] * 252 for k in range(8)]
    state = xs[1]
    for _ in range(5):  # an output that is the next input
        state = artefact.run({"x": state})["s"]
    assert np.all(state == 32)
    del held, state
    frames: list[object] = []  # a debugger has them, and with them what their variables refer to
    sys.settrace(lambda frame, *_: frames.append(frame))
    traced = mc_opt.load(large)
    held = [traced.run({"x": x})["s"] for x in xs[:2]]
    sys.settrace(None)
    frames.clear()
    held += [traced.run({"x": x})["s"] for x in xs[2:4]]
    assert [array[0, 0] for array in held] == [0, 2, 4, 6]
    addresses = {artefact.run({"x": xs[0]})["s"].ctypes.data for _ in range(8)}
    assert len(addresses) == 1
    found = artefact.run({"x": xs[0]})
    found["y"][:] = 5  # z is the same numbers, and another array
    assert np.all(found["z"] == np.float32(1 / 256))


def test_a_model_that_computes_nothing(tmp_path: Path) -> None:
    text = """g (float[3] x) => (float[3] y, float[3,1] column, float[2] z) <float[2] one = {1, 2}, int64[2] s = {3, 1}>
        { y = Identity(x)  column = Reshape(x, s)  z = Identity(one) }"""
    mc_opt.build(model(text), CPU, tmp_path)
    found = mc_opt.load(tmp_path).run({"x": np.arange(3, dtype=np.float32)})
    assert [array.tolist() for array in found.values()] == [[0, 1, 2], [[0], [1], [2]], [1, 2]]


def test_what_does_not_run_here_is_refused(doubled: Path, tmp_path: Path) -> None:
    text = (doubled / "x86/manifest.json").read_text()
    for old, new, message in [
        ('"avx2"', '"avx10"', r"cannot run here: built for x86-64-v3, .* lacks avx10"),
        ('"kind": "x86"', '"kind": "arm"', "built for aarch64 .*, this machine is x86_64; copy the folder"),
        ('"kind": "x86"', '"kind": "none"', "built for none, which has no loader here"),
    ]:
        place = tmp_path / new.strip('"').replace('"', "").replace(" ", "")
        place.mkdir()
        (place / "model.so").write_bytes((doubled / "x86/model.so").read_bytes())
        assert old in text
        (place / "manifest.json").write_text(text.replace(old, new, 1))
        with pytest.raises(ir.IRError, match=message):
            mc_opt.load(place)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("threads", "2"), ("threads", 0), ("kind", ["x86"]), ("features", [7]), ("files", []), ("limits", {"n": "4"}),
        ("states", {"y": 1}), ("prompt", -1), ("inputs", [{"name": "x", "shape": [2, -4], "dtype": "float32"}]),
        ("inputs", [{"name": "x", "shape": [2, 4.5], "dtype": "float32"}]),
        ("inputs", [{"name": "x", "shape": [2, 4], "dtype": "object"}]),
        ("outputs", [{"name": 7, "shape": [2, 4], "dtype": "float32"}]),
    ],
)  # fmt: skip
def test_a_manifest_with_a_wrong_entry_is_refused(doubled: Path, tmp_path: Path, entry: str, value: object) -> None:
    data = json.loads((doubled / "x86/manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**data, entry: value}))
    with pytest.raises(ir.IRError, match=f"an entry is missing or wrong .{entry}: .*; build the artefact again"):
        mc_opt.load(tmp_path)


def test_a_changed_library_is_refused(doubled: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text((doubled / "x86/manifest.json").read_text())
    (tmp_path / "model.so").write_bytes((doubled / "x86/model.so").read_bytes() + b"x")
    with pytest.raises(ir.IRError, match="differs from the file that was built"):
        mc_opt.load(tmp_path)


def test_what_was_not_built(doubled: Path, tmp_path: Path) -> None:
    with pytest.raises(ir.IRError, match=r"target 'arm' was not built \(built: x86\)"):
        mc_opt.load(doubled, target="arm")
    with pytest.raises(ir.IRError, match="holds no built target; build one with --target x86"):
        mc_opt.load(tmp_path)


def test_constants_are_checked_too(doubled: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "model.so"):
        (tmp_path / name).write_bytes((doubled / "x86" / name).read_bytes())
    with pytest.raises(ir.IRError, match=r"constants\.bin: missing; build the artefact again"):
        mc_opt.load(tmp_path)
    data = (doubled / "x86/constants.bin").read_bytes()
    (tmp_path / "constants.bin").write_bytes(data + bytes(64))
    with pytest.raises(ir.IRError, match=r"constants\.bin: differs from the file that was built"):
        mc_opt.load(tmp_path)


ALONE = """
import sys
import numpy as np
import mc_opt
artefact = mc_opt.load({folder!r})
assert artefact.run({{"x": np.ones((2, 4), np.float32)}})["y"].tolist() == [[2] * 4] * 2
print(*sorted({{"onnx", "onnx_ir", "onnxruntime", "torch", "tvm"}} & set(sys.modules)))
"""


def test_loading_imports_the_runtime_alone(doubled: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ALONE.format(folder=str(doubled))], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_the_verb_imports_neither_compiler_nor_runtime_of_onnx(doubled: Path) -> None:
    code = (
        f"import contextlib, io, sys\nfrom mc_opt.tools import cli\nwith contextlib.redirect_stdout(io.StringIO()):\n"
        f"    cli.run(['run', {str(doubled)!r}])\nprint(*sorted({{'onnxruntime', 'torch', 'tvm'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "\n", done.stdout + done.stderr


@pytest.mark.torch
def test_torch_is_hidden_from_one_import_and_thread_alone() -> None:
    pytest.importorskip("torch")
    text = (
        "import sys, threading; from mc_opt.targets import _runtime; found = []\n"
        "def other():\n    import torch\n    found.append(torch.__name__)\n"
        "with _runtime._hidden('torch'):\n"
        "    try:\n        import torch\n    except ModuleNotFoundError:\n        found.append('hidden')\n"
        "    thread = threading.Thread(target=other); thread.start(); thread.join()\n"
        "import torch; print(found, len(sys.meta_path))"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.stdout.startswith("['hidden', 'torch']"), done.stderr


WIDE = """<ir_version: 10, opset_import: ["": 21]> g (float[256,512] x) => (float[256,512] y)
    <float[512,512] w> { a = MatMul(x, w) y = MatMul(a, w) }"""
THREADS = """
import os, signal, sys, threading
import numpy as np
from mc_opt import targets
from mc_opt.targets import _runtime
workers = _runtime.load().get_global_func("runtime.NumThreads")
x = np.random.default_rng(0).standard_normal((256, 512), np.float32)
artefacts = [targets.load_artefact({folder!r}, threads=n) for n in (None, 1, 2)]
assert [a.threads for a in artefacts] == [2, 1, 2]
given = os.sched_getaffinity(0)
found = []
def run():
    for artefact in artefacts:
        y = artefact.run({{"x": x}})["y"]
        found.append((workers(), float(abs(y - artefacts[0].run({{"x": x}})["y"]).max())))
run()
other = threading.Thread(target=run); other.start(); other.join()
assert os.sched_getaffinity(0) == given
print(found)
def held():
    for _ in range(20):
        brief = threading.Thread(target=lambda: artefacts[0].run({{"x": x}})); brief.start(); brief.join()
    return len(os.listdir("/proc/self/task"))
before, after = held(), held()  # when 20 callers, and 20 more, have come and gone
print(after - before < 10)
child = os.fork()
if child == 0:
    signal.alarm(60)
    y = artefacts[0].run({{"x": x}})["y"]
    os._exit(0 if np.array_equal(y, artefacts[1].run({{"x": x}})["y"]) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_threads_are_those_of_the_load(tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("missing: a second processor")
    mc_opt.build(model(WIDE), "x86{cpu=x86-64-v3 threads=2}", tmp_path)
    code = THREADS.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    # Each run has the pool that its load asked for, in every thread of the caller's; the sums do not depend on it.
    # Pools of callers that are gone do not add up, and a forked process, which has none of their threads, runs too.
    assert done.stdout == f"{[(2, 0.0), (1, 0.0), (2, 0.0)] * 2}\nTrue\n0\n", done.stdout + done.stderr


def test_threads_of_an_artefact_that_was_built_for_one(doubled: Path) -> None:
    assert mc_opt.load(doubled, threads=8).threads == 1
    for count in (0, 2.5, "2", 1000):
        with pytest.raises(ValueError, match=r"expected a whole number, 1 to 256"):
            mc_opt.load(doubled, threads=count)


def test_what_nobody_holds_is_unloaded(doubled: Path) -> None:
    kept = mc_opt.load(doubled)
    inputs = {port.name: np.ones(port.shape, port.dtype) for port in kept.inputs}
    outputs = kept.run(inputs)
    memory = []
    for _ in range(3):
        for _ in range(100):
            mc_opt.load(doubled).run(inputs)
        gc.collect()
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert memory[2] - memory[1] < 300_000  # modules that stayed alive took 700 kB
    for name, array in kept.run(inputs).items():
        np.testing.assert_array_equal(array, outputs[name])


def test_a_stream_keeps_states_that_are_written_in_place_and_others(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[1] x, int64[1, 1] at, float[3] rows, float[1] sum) => (float[3] seen, float[3] new_rows, float[1] new_sum)
    { new_rows = ScatterND(rows, at, x) new_sum = Add(sum, x) seen = Add(new_rows, new_sum) }"""
    made = model(text)
    made.metadata_props["mc_opt.states"] = '{"new_rows": "rows", "new_sum": "sum"}'
    mc_opt.build(made, CPU, tmp_path / "out")
    streams = [mc_opt.load(tmp_path / "out").stream() for _ in range(2)]
    for x, at, wanted in ((1, 0, [2, 1, 1]), (2, 2, [4, 3, 5]), (5, 0, [13, 8, 10])):
        found = [s.run({"x": np.array([x], np.float32), "at": np.array([[at]])}) for s in streams]
        assert [{k: v.tolist() for k, v in outputs.items()} for outputs in found] == [{"seen": wanted}] * 2
