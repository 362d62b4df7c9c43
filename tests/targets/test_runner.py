"""runner.cc, compiled against the headers and the runtime of TVM's packages."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from mc_opt import ir, targets
from mc_opt.targets import _c_source, _machine
from mc_opt.targets._manifest import Port
from mc_opt.targets._runner import runner
from tests import _qemu
from tests._harness import model as parsed
from tests.models._fetch import fetch_public

TWO = """
agraph (float[2,3] x, int64[4] k) => (float[4,3] rows, float[2] sum, bool[2,3] big)
<float[5,3] table, float[3] one = {1, 1, 1}, float half = {0.5}>
{
    rows = Gather (table, k)
    sum = MatMul (x, one)
    big = Greater (x, half)
}
"""


def test_ports_are_written_as_types_and_shapes() -> None:
    ports = (Port("x", (1, 3), "float32"), Port("k", (), "int64"), Port("m", (2,), "bool"))
    text = runner(ports, (), _machine.named("x86-64-v3", threads=2))
    assert "{{1, 3}, DLDataType{kDLFloat, 32, 1}}, {{}, DLDataType{kDLInt, 64, 1}}" in text
    assert "{{2}, DLDataType{kDLBool, 8, 1}}" in text
    assert "@" not in text


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.tvm
@pytest.mark.zig
def test_the_program_gives_the_numbers_of_onnx_runtime(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("missing tool: program g++ is not installed")
    model = parsed(TWO)
    folder = tmp_path / "x86"
    folder.mkdir()
    targets.parse_target("x86{threads=2}").compile(model, folder, lambda *_: None)
    compile_as_it_says(folder)
    sample = next(iter(ir.seeded_data(model, 1, 0))).inputs
    expected = ir.Session(model).run(sample)
    for name, array in sample.items():
        array.tofile(folder / f"{name}.bin")
    words = ["./runner", "model.so", *(f"{n}.bin" for n in (*sample, *expected))]
    said = subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True).stdout
    assert said == "float32 4x3\nfloat32 2\nbool 2x3\n"
    for name, wanted in expected.items():
        given = np.fromfile(folder / f"{name}.bin", wanted.dtype).reshape(wanted.shape)
        np.testing.assert_allclose(given, wanted, rtol=1e-6, atol=1e-6)  # fp32 sums in another order

    (folder / "constants.bin").rename(folder / "elsewhere")
    without = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert without.stderr == "./constants.bin: cannot be read; it belongs beside model.so\n"
    (folder / "constants.bin").write_bytes(b"1")
    cut = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert cut.stderr == "constants.bin: is shorter than model.so expects; copy it again\n"

    short = subprocess.run(["./runner", "model.so"], cwd=folder, capture_output=True, text=True)
    assert short.returncode == 2 and "(2 input files) (3 output files)" in short.stderr
    (folder / "x.bin").write_bytes(b"1")
    (folder / "elsewhere").rename(folder / "constants.bin")
    wrong = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert wrong.returncode == 1 and "x.bin: expected a file of 24 bytes" in wrong.stderr


# A processor is asked for what it cannot have: the bit of a register that means nothing.
@pytest.mark.slow
def test_a_processor_without_a_feature_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("missing tool: program g++ is not installed")
    monkeypatch.setitem(_c_source.CPUID, "invented", (7, 0, 0, 31))
    machine = dataclasses.replace(_machine.named("x86-64-v3", threads=2), features=("avx2", "invented"))
    (tmp_path / "runner.cc").write_text(runner((), (), machine))
    compile_as_it_says(tmp_path)
    done = subprocess.run(["./runner", "model.so"], cwd=tmp_path, capture_output=True, text=True)
    expected = "model.so was built for x86-64-v3, and this processor lacks a feature of it; build it again\n"
    assert (done.returncode, done.stderr) == (1, expected)


@pytest.mark.qemu
@pytest.mark.slow
@pytest.mark.tvm
@pytest.mark.zig
def test_the_program_runs_on_an_arm_machine(tmp_path: Path) -> None:
    compiler = "aarch64-linux-gnu-g++"
    if shutil.which(compiler) is None:
        pytest.skip(f"missing tool: program {compiler} is not installed (Debian: g++-aarch64-linux-gnu)")
    model = parsed(TWO)
    folder = tmp_path / "arm"
    folder.mkdir()
    targets.parse_target("arm").compile(model, folder, lambda *_: None)
    root = fetch_public("apache-tvm", "apache-tvm-ffi")
    compile_as_it_says(folder, compiler, {"tvm": root / "apache-tvm/tvm", "tvm_ffi": root / "apache-tvm-ffi/tvm_ffi"})
    sample = next(iter(ir.seeded_data(model, 1, 0))).inputs
    expected = ir.Session(model).run(sample)
    for name, array in sample.items():
        array.tofile(folder / f"{name}.bin")
    ran = _qemu.run_program(folder, ["./runner", "model.so", *(f"{n}.bin" for n in (*sample, *expected))])
    assert ran.stdout == "float32 4x3\nfloat32 2\nbool 2x3\n", ran.stderr
    for name, wanted in expected.items():
        given = np.fromfile(folder / f"{name}.bin", wanted.dtype).reshape(wanted.shape)
        np.testing.assert_allclose(given, wanted, rtol=1e-6, atol=1e-6)  # fp32 sums in another order


def compile_as_it_says(folder: Path, compiler: str = "g++", packages: Mapping[str, Path] | None = None) -> None:
    """Run the command in the comment at the program's top, word for word but for the compiler and the packages."""
    text = (folder / "runner.cc").read_text()
    (command,) = re.findall(r"^//   (g\+\+ .*?)\n//   \./runner", text, re.DOTALL | re.MULTILINE)
    for name, package in (("$TVM", "tvm"), ("$FFI", "tvm_ffi")):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        command = command.replace(name, str((packages or {}).get(package, spec.submodule_search_locations[0])))
    command = command.replace("g++", compiler, 1).replace("\\\n//", " ").replace("-O2", "-O0")
    done = subprocess.run(command.split(), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.tvm
@pytest.mark.zig
def test_the_program_takes_open_sizes(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("missing tool: program g++ is not installed")
    model = parsed(
        "agraph (float[b,s,3] x, int64[s] k) => (float[b,s,3] y) { f = Cast<to=1>(k) a = Constant<value_ints=[1]>()"
        " u = Unsqueeze(f, a) y = Add(x, u) }"
    )
    targets.parse_target("x86").compile(model, tmp_path, lambda *_: None)
    compile_as_it_says(tmp_path)
    for b, s in ((2, 5), (1, 1)):
        x, k = np.random.default_rng(s).standard_normal((b, s, 3), np.float32), np.arange(s)
        x.tofile(tmp_path / "x.bin")
        k.tofile(tmp_path / "k.bin")
        words = ["./runner", "model.so", f"s={s}", f"b={b}", "x.bin", "k.bin", "y.bin"]
        said = subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        assert said == f"float32 {b}x{s}x3\n"
        np.testing.assert_array_equal(
            np.fromfile(tmp_path / "y.bin", np.float32).reshape(x.shape), x + np.float32(k)[:, None]
        )
    words.remove("s=1")
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "usage: every dimension needs a size, as in s=4\n")
