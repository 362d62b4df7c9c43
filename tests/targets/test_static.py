"""The static artefact: its symbols on their own, then whole models linked into C programs and run."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from mc_opt import ir, passes, targets
from mc_opt.targets import _c_source, _elf
from mc_opt.targets._c_source import Argument, Call, Identity, Program
from mc_opt.targets._manifest import Port
from tests._harness import model as parsed

ZIG = [sys.executable, "-P", "-m", "ziglang"]


# --- symbols -------------------------------------------------------------------------------------

FIRST = """
static int table[3] = {1, 2, 3};
int *const pointer = &table[1];
int (*hook)(int) __attribute__((weak));
extern int elsewhere(int);
int inner(int x) { return x + *pointer; }
int first(int x) { return inner(x) + elsewhere(x) + (hook ? hook(x) : 0); }
"""
SECOND = """
int inner(int x) { return 100 * x; }
int elsewhere(int x) { return inner(x); }
extern int first(int);
int main(void) { return first(1) == 103 ? 0 : first(1); }
"""


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.zig
def test_localised_symbols_no_longer_clash(tmp_path: Path) -> None:
    for name, text in (("first", FIRST), ("second", SECOND)):
        (tmp_path / f"{name}.c").write_text(text)
        zig(tmp_path, "cc", "-fno-sanitize=all", "-fPIC", "-O1", "-c", f"{name}.c", "-o", f"{name}.o")
    linked = _elf.Object(tmp_path / "first.o")
    assert linked.defined() == {"pointer", "hook", "inner", "first"}
    linked.localise({"first"})
    for made in (linked, _elf.Object(tmp_path / "first.o")):
        assert made.defined() == {"first"} and made.undefined() == {"elsewhere"}
    zig(tmp_path, "cc", "first.o", "second.o", "-o", "program")
    subprocess.run([tmp_path / "program"], check=True)


# --- whole models --------------------------------------------------------------------------------


def zig(folder: Path, *words: str) -> None:
    done = subprocess.run([*ZIG, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


CNN = """
agraph (float[1,3,12,12] x) => (float[1,5] y)
<float[8,3,3,3] w1, float[8] scale, float[8] bias, float[8] mean, float[8] var, float[16,8,3,3] w2, float[16,5] w3>
{
    a = Conv <pads=[1,1,1,1]> (x, w1)
    b = BatchNormalization (a, scale, bias, mean, var)
    c = Relu (b)
    d = Conv <strides=[2,2], pads=[1,1,1,1]> (c, w2)
    e = Relu (d)
    f = GlobalAveragePool (e)
    g = Flatten (f)
    y = MatMul (g, w3)
}
"""
LSTM = """
agraph (float[6,2,8] x, float[1,2,16] h, float[1,2,16] c) => (float[6,1,2,16] y, float[1,2,16] hn, float[1,2,16] cn)
<float[1,64,8] w, float[1,64,16] r, float[1,128] b>
{
    y, hn, cn = LSTM <hidden_size=16> (x, w, r, b, , h, c)
}
"""
# Integer input, a scalar; one output is read by the other's kernels, through a reshape; an input is passed on.
TABLE = """
agraph (int64[3,4] token, float[2,12] float, float int) => (float[3,4,8] row, float[2,48] new, float[2,12] same)
<float[20,8] table, float[48,12] w, int64[2] shape = {2, 48}>
{
    row = Gather (table, token)
    flat = Reshape (row, shape)
    wt = Transpose <perm=[1,0]> (w)
    product = MatMul (float, wt)
    sum = Add (flat, product)
    scaled = Mul (sum, int)
    new = Tanh (scaled)
    same = Identity (float)
}
"""
MODELS = {
    "cnn": (CNN, "fold-batch-norm,denseshift{skip=}"),
    "lstm": (LSTM, ""),
    "table": (TABLE, "denseshift{skip=}"),
}


def compressed(name: str) -> onnx_ir.Model:
    text, spec = MODELS[name]
    model = parsed(text)
    return passes.run(model, passes.Pipeline.parse(spec), passes.Context()).model if spec else model


def build(model: onnx_ir.Model, folder: Path, target: str) -> Path:
    folder.mkdir()
    targets.parse_target(target).compile(model, folder, lambda *_: None)
    return folder


MAIN = """
#include <stdio.h>
#include <stdlib.h>
{includes}
static void *place(size_t size) {{ return aligned_alloc(64, (size + 64) / 64 * 64); }}
static void *get(const char *path, size_t size) {{
  void *data = place(size);
  FILE *file = fopen(path, "rb");
  if (!file || fread(data, 1, size, file) != size) exit(10);
  fclose(file);
  return data;
}}
static void put(const char *path, const void *data, size_t size) {{
  FILE *file = fopen(path, "wb");
  if (!file || fwrite(data, 1, size, file) != size || fclose(file)) exit(11);
}}
int main(void) {{
{body}
  return 0;
}}
"""


def caller(prefix: str, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], *, times: int = 2) -> str:
    """The lines that run a model on <prefix>.<k>.in and write <prefix>.<k>.out; a second call must not differ."""
    lines = [f'  void *{prefix}_i{k} = get("{prefix}.{k}.in", {a.nbytes});' for k, a in enumerate(inputs.values())]
    lines += [f"  void *{prefix}_o{k} = place({a.nbytes});" for k, a in enumerate(outputs.values())]
    words = [f"{prefix}_i{k}" for k in range(len(inputs))] + [f"{prefix}_o{k}" for k in range(len(outputs))]
    call = f"{prefix}_run({', '.join([*words, f'place({prefix}_workspace_size())'])})"
    lines += [f"  if ({call}) return 1;" for _ in range(times)]
    lines += [f'  put("{prefix}.{k}.out", {prefix}_o{k}, {a.nbytes});' for k, a in enumerate(outputs.values())]
    return "\n".join(lines)


def compiled(folder: Path, text: str, libraries: Sequence[Path], command: Sequence[str]) -> Path:
    (folder / "main.c").write_text(text)
    includes = [f"-I{p.parent}" for p in libraries]
    words = [*command, "-O1", *includes, "main.c", *map(str, libraries), "-lm", "-o", "program"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    return folder / "program"


def compilers() -> list[list[str]]:
    found = [[*ZIG, "cc"]]
    return found + [["gcc", "-Wall", "-Wextra", "-Werror", "-static"]] * (shutil.which("gcc") is not None)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 64 bytes."""
    room = np.zeros(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[onnx_ir.Model, Path]]:
    """Each model once, its names starting with its own name."""
    place = tmp_path_factory.mktemp("static")
    made = {}
    for name in MODELS:
        model = compressed(name)
        made[name] = (model, build(model, place / name, f"x86{{form=static prefix={name}}}"))
    return made


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.tvm
@pytest.mark.zig
class TestBuilt:
    Built = dict[str, tuple[onnx_ir.Model, Path]]

    @pytest.mark.parametrize("name", MODELS)
    def test_a_c_program_gives_the_numbers_of_onnx_runtime(self, built: Built, name: str, tmp_path: Path) -> None:
        model, folder = built[name]
        sample = next(iter(ir.seeded_data(model, 1, 3))).inputs
        expected = ir.Session(model).run(sample)
        for k, array in enumerate(sample.values()):
            array.tofile(tmp_path / f"{name}.{k}.in")
        text = MAIN.format(includes=f'#include "{name}.h"', body=caller(name, sample, expected))
        for command in compilers():
            subprocess.run([compiled(tmp_path, text, [folder / f"lib{name}.a"], command)], cwd=tmp_path, check=True)
            for k, (output, wanted) in enumerate(expected.items()):
                given = np.fromfile(tmp_path / f"{name}.{k}.out", wanted.dtype).reshape(wanted.shape)
                # fp32 sums in another order
                np.testing.assert_allclose(given, wanted, rtol=0, atol=1e-4 * np.ptp(wanted), err_msg=output)

    def test_all_models_fit_in_one_program(self, built: Built, tmp_path: Path) -> None:
        wanted, body = {}, []
        for name, (model, _) in built.items():
            sample = next(iter(ir.seeded_data(model, 1, 5))).inputs
            wanted[name] = ir.Session(model).run(sample)
            for k, array in enumerate(sample.values()):
                array.tofile(tmp_path / f"{name}.{k}.in")
            body.append(caller(name, sample, wanted[name], times=1))
        includes = "\n".join(f'#include "{name}.h"' for name in built)
        text = MAIN.format(includes=includes, body="\n".join(body))
        libraries = [folder / f"lib{name}.a" for name, (_, folder) in built.items()]
        subprocess.run([compiled(tmp_path, text, libraries, compilers()[0])], cwd=tmp_path, check=True)
        for name, outputs in wanted.items():
            for k, array in enumerate(outputs.values()):
                given = np.fromfile(tmp_path / f"{name}.{k}.out", array.dtype).reshape(array.shape)
                np.testing.assert_allclose(given, array, rtol=0, atol=1e-4 * np.ptp(array))

    @pytest.mark.parametrize("name", MODELS)
    def test_only_the_interface_is_visible(self, built: Built, name: str, tmp_path: Path) -> None:
        _, folder = built[name]
        zig(tmp_path, "ar", "x", str(folder / f"lib{name}.a"))
        (member,) = tmp_path.iterdir()
        linked = _elf.Object(member)
        assert linked.defined() == _c_source.symbols(name)
        assert not [n for n in linked.undefined() if re.search("tvm|TVM|DL", n)]
        manifest = (folder / "manifest.json").read_text()
        assert f'"lib{name}.a"' in manifest and f'"{name}.h"' in manifest and "static" in manifest

    def test_wrong_pointers_are_refused(self, built: Built, tmp_path: Path) -> None:
        _, folder = built["cnn"]
        body = """
  float *x = place(4 * 433), *y = place(20);
  void *w = place(CNN_WORKSPACE_SIZE);
  if (cnn_check_cpu() != CNN_OK || cnn_workspace_size() != CNN_WORKSPACE_SIZE) return 1;
  if (cnn_run(x + 1, y, w) != CNN_ERROR_ALIGNMENT) return 2;
  if (cnn_run(x, (float *)((char *)y + 4), w) != CNN_ERROR_ALIGNMENT) return 3;
  if (cnn_run(0, y, w) != CNN_ERROR_ARGUMENT) return 4;
  if (cnn_run(x, y, 0) != CNN_ERROR_ARGUMENT) return 5;
  puts(cnn_error_text(CNN_ERROR_ALIGNMENT));
  puts(cnn_error_text(-1));
  puts(cnn_version());
"""
        text = MAIN.format(includes='#include "cnn.h"', body=body)
        # put and get are not used here
        made = compiled(tmp_path, text, [folder / "libcnn.a"], compilers()[0])
        said = subprocess.run([made], check=True, capture_output=True, text=True).stdout.splitlines()
        assert said[:2] == ["a pointer is not aligned to 64 bytes", "unknown error"]
        assert re.fullmatch(r"mc-opt \S+, TVM \S+", said[2])

    def test_threads_with_their_own_workspaces_do_not_disturb_each_other(self, built: Built, tmp_path: Path) -> None:
        model, folder = built["lstm"]
        words = ["-shared", "--whole-archive", str(folder / "liblstm.a"), "-o", str(tmp_path / "lstm.so")]
        zig(tmp_path, "ld.lld", *words)
        library = ctypes.CDLL(str(tmp_path / "lstm.so"))  # libc and libm are those of this process
        samples = [s.inputs for s in ir.seeded_data(model, 4, 7)]
        session = ir.Session(model)
        expected = [list(session.run(s).values()) for s in samples]

        def work(k: int) -> None:
            inputs = [aligned(a) for a in samples[k].values()]
            outputs = [aligned(np.zeros_like(a)) for a in expected[k]]
            workspace = aligned(np.zeros(library.lstm_workspace_size(), np.uint8))
            pointers = [ctypes.c_void_p(a.ctypes.data) for a in (*inputs, *outputs, workspace)]
            for _ in range(300):
                for output in outputs:
                    output.fill(0)
                assert library.lstm_run(*pointers) == 0
                for made, wanted in zip(outputs, expected[k], strict=True):
                    np.testing.assert_allclose(made, wanted, rtol=0, atol=1e-4 * np.ptp(wanted))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))

    def test_the_header_is_also_cpp(self, built: Built, tmp_path: Path) -> None:
        _, folder = built["table"]
        (tmp_path / "check.cc").write_text('#include "table.h"\nint main() { return &table_run == nullptr; }\n')
        zig(tmp_path, "c++", "-Wall", "-Wextra", "-Werror", f"-I{folder}", "-c", "check.cc", "-o", "check.o")

    def test_the_same_model_gives_the_same_bytes(self, built: Built, tmp_path: Path) -> None:
        """Every build is a process of its own, with a hash seed of its own."""
        model, folder = built["cnn"]
        again = build(model, tmp_path / "cnn", "x86{form=static prefix=cnn}")
        assert sorted(p.name for p in again.iterdir()) == ["cnn.h", "libcnn.a", "manifest.json"]
        for path in again.iterdir():
            assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


# A processor is asked for what it cannot have: the bit of a register that means nothing.
@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.zig
def test_a_processor_without_a_feature_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_c_source.CPUID, "invented", (7, 0, 0, 31))
    one = Argument(_c_source.PORTS, 0, (2, 3), "float32")
    made = Program(
        (Port("x", (2, 3), "float32"),), (Port("y", (2, 3), "float32"),), (Call("never", (one, one)),), (), 64, 64
    )
    identity = Identity("model", "x86", "none", ("avx2", "invented"), "test")
    (tmp_path / "model.h").write_text(_c_source.header(made, identity, ()))
    (tmp_path / "glue.c").write_text(_c_source.glue(made, identity, ()))
    (tmp_path / "main.c").write_text(
        '#include "model.h"\nconst char model_constants[1];\nint __tvm_ffi_never() { return 0; }\n'
        "int main(void) { return model_check_cpu() != MODEL_ERROR_CPU || model_run(0, 0, 0) != MODEL_ERROR_CPU; }\n"
    )
    zig(tmp_path, "cc", "-std=gnu11", "glue.c", "main.c", "-o", "program")
    subprocess.run([tmp_path / "program"], check=True)
