"""ARM artefacts run under qemu: one process an artefact, fed through pipes, for tests and benchmarks.

    with qemu.artefact(out / "arm") as run:
        outputs = run({"x": x})

A run says that the code is right. Its time says nothing about an ARM processor.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from mc_opt.targets import _c_source, _manifest
from mc_opt.targets._manifest import Manifest, Port
from tests.models._fetch import CACHE, FetchError, fetch_public

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays], dict[str, np.ndarray]]
Call = Callable[[Sequence[np.ndarray]], list[np.ndarray]]

# glibc and libstdc++ for ARM, from Debian's package libstdc++6-arm64-cross.
SYSTEM = Path("/usr/aarch64-linux-gnu")
SOURCE = Path(__file__).with_name("_qemu_driver.c")
_CODES = {"int": 0, "uint": 1, "float": 2, "bool": 6}
_NAMES = {code: name for name, code in _CODES.items()}
# What qemu 7.2 has no model of; its `max` has all their features.
_UNKNOWN_TO_QEMU = ("neoverse-n2", "neoverse-v1")


def program() -> str | None:
    """The name of qemu's user emulation; None where there is none."""
    return next((n for n in ("qemu-aarch64", "qemu-aarch64-static") if shutil.which(n)), None)


def missing() -> str | None:
    """What running needs and this machine lacks; None when it has everything."""
    if program() is None:
        return "program qemu-aarch64 is not installed (Debian: qemu-user)"
    if not (SYSTEM / "lib" / "libstdc++.so.6").exists():
        return f"{SYSTEM}/lib/libstdc++.so.6 is not installed (Debian: libstdc++6-arm64-cross)"
    try:
        _libraries()
    except FetchError as error:
        return f"TVM's runtime for ARM: {error}"
    return None


@contextmanager
def artefact(folder: Path, *, cpu: str | None = None) -> Iterator[Run]:
    """A function that runs the artefact in `folder`, of either form, on the processor that it was built for.

    Args:
        folder: the folder with manifest.json.
        cpu: another processor, in qemu's words.
    """
    manifest = _manifest.read(folder)
    with tempfile.TemporaryDirectory() as place:
        if manifest.form == "static":
            words = [str(_static_driver(folder, manifest, Path(place)))]
        else:
            memory = "naive" if any(isinstance(d, str) for port in manifest.inputs for d in port.shape) else "pooled"
            words = [str(_driver()), str(folder / "model.so"), memory, str(folder / _manifest.CONSTANTS)]
        with _process(words, cpu or manifest.cpu) as call:
            yield lambda inputs: _named(manifest, call([np.asarray(inputs[port.name]) for port in manifest.inputs]))


@contextmanager
def library(path: Path, *, cpu: str) -> Iterator[Call]:
    """A function that runs a model.so without a manifest: inputs and outputs in its own order."""
    with _process([str(_driver()), str(path), "naive"], cpu) as call:
        yield call


def _named(manifest: Manifest, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    return {port.name: array for port, array in zip(manifest.outputs, arrays, strict=True)}


def run_arm(folder: Path, inputs: Sequence[Arrays], *, cpu: str | None = None) -> list[dict[str, np.ndarray]]:
    """The outputs for each of several sets of inputs, in one process."""
    with artefact(folder, cpu=cpu) as run:
        return [run(arrays) for arrays in inputs]


def run_program(folder: Path, words: Sequence[str], *, cpu: str = "max") -> subprocess.CompletedProcess[str]:
    """Run any ARM program in `folder`, with TVM's runtime where the linker looks."""
    return subprocess.run([*_emulator(cpu), *words], cwd=folder, capture_output=True, text=True, check=False)


def _emulator(cpu: str) -> list[str]:
    libraries = ":".join(str(p.parent) for p in _libraries())
    processor = "max" if cpu in _UNKNOWN_TO_QEMU else cpu
    return [str(program()), "-cpu", processor, "-L", str(SYSTEM), "-E", f"LD_LIBRARY_PATH={libraries}"]


@contextmanager
def _process(words: Sequence[str], cpu: str) -> Iterator[Call]:
    with subprocess.Popen([*_emulator(cpu), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            yield lambda arrays: _call(child, arrays)
        finally:
            assert child.stdin is not None
            child.stdin.close()  # the driver ends


def _call(child: subprocess.Popen[bytes], inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    assert child.stdin is not None
    try:
        child.stdin.write(struct.pack("<i", len(inputs)))
        for array in inputs:
            _write(child.stdin, array)
        child.stdin.flush()
    except BrokenPipeError:
        pass  # what the driver said before it ended is read below
    (count,) = struct.unpack("<i", _read(child, 4))
    if count < 0:
        (length,) = struct.unpack("<i", _read(child, 4))
        raise RuntimeError(f"the artefact under qemu: {_read(child, length).decode()}")
    return [_tensor(child) for _ in range(count)]


def _write(pipe: IO[bytes], array: np.ndarray) -> None:
    code, bits = _type(str(array.dtype))
    pipe.write(struct.pack(f"<3i{array.ndim}q", code, bits, array.ndim, *array.shape))
    pipe.write(array.tobytes())  # C order


def _tensor(child: subprocess.Popen[bytes]) -> np.ndarray:
    code, bits, rank = struct.unpack("<3i", _read(child, 12))
    shape = struct.unpack(f"<{rank}q", _read(child, 8 * rank))
    dtype = np.dtype("bool" if _NAMES[code] == "bool" else f"{_NAMES[code]}{bits}")
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return np.frombuffer(_read(child, size), dtype).reshape(shape)


def _read(child: subprocess.Popen[bytes], size: int) -> bytes:
    assert child.stdout is not None
    data = child.stdout.read(size)
    if len(data) < size:
        raise RuntimeError(f"the artefact under qemu ended with code {child.wait()}")
    return data


def _type(dtype: str) -> tuple[int, int]:
    kind = dtype.rstrip("0123456789")
    return _CODES[kind], int(dtype[len(kind) :] or 8)


# --- drivers -------------------------------------------------------------------------------------


def _libraries() -> list[Path]:
    """TVM's runtime for ARM, as its wheels hold it."""
    root = fetch_public("apache-tvm", "apache-tvm-ffi")
    return [root / "apache-tvm/tvm/lib/libtvm_runtime.so", root / "apache-tvm-ffi/tvm_ffi/lib/libtvm_ffi.so"]


def _headers() -> Path:
    return fetch_public("apache-tvm-ffi") / "apache-tvm-ffi/tvm_ffi/include"


def _driver() -> Path:
    """The program that loads model.so, compiled once for each state of its source."""
    key = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    made = CACHE.parent / "qemu" / f"driver-{key}"
    if not made.is_file():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as place:
            new = Path(place, "driver")
            # The runtime registers what the driver asks for by name: no symbol of it is used.
            libraries = ["-Wl,--no-as-needed", *map(str, _libraries())]
            compile_c("aarch64-linux-gnu.2.28", str(SOURCE), f"-I{_headers()}", *libraries, "-o", str(new))
            os.replace(new, made)
    return made


def _static_driver(folder: Path, manifest: Manifest, place: Path) -> Path:
    """The program around libmodel.a; it needs no library of the machine that runs it."""
    (library,) = (n for n in manifest.files if n.endswith(".a"))
    (place / "static_model.h").write_text(_static_tables(manifest, library.removeprefix("lib").removesuffix(".a")))
    words = [str(SOURCE), "-DSTATIC_MODEL", f"-I{folder}", f"-I{place}", f"-I{_headers()}", str(folder / library)]
    compile_c("aarch64-linux-musl", *words, "-static", "-lm", "-o", str(place / "driver"))
    return place / "driver"


def _static_tables(manifest: Manifest, prefix: str) -> str:
    def row(k: int, port: Port) -> str:
        code, bits = _type(port.dtype)
        return f"  {{.ndim = {len(port.shape)}, .dtype = {{{code}, {bits}, 1}}, .shape = shape{k}}},"

    shapes = [
        f"static int64_t shape{k}[] = {{{', '.join(map(str, (*p.shape, 1)))}}};" for k, p in enumerate(manifest.outputs)
    ]
    words = [f"inputs[{k}].data" for k in range(len(manifest.inputs))]
    words += [f"outputs[{k}].data" for k in range(len(manifest.outputs))]
    assert _c_source.is_prefix(prefix)
    return "\n".join(
        [
            f'#include "{prefix}.h"',
            f"enum {{ OUTPUTS = {len(manifest.outputs)} }};",
            f"#define WORKSPACE_SIZE {prefix}_workspace_size()",
            f"#define ERROR_TEXT {prefix}_error_text",
            f"#define CALL(inputs, outputs, workspace) {prefix}_run({', '.join([*words, 'workspace'])})",
            *shapes,
            "static const DLTensor kOutputs[] = {",
            *(row(k, port) for k, port in enumerate(manifest.outputs)),
            "};\n",
        ]
    )


def compile_c(target: str, *words: str) -> None:
    """Run zig's C compiler for a target; any word of it is an error."""
    command = [sys.executable, "-P", "-m", "ziglang", "cc", "-target", target, "-std=c11", "-O1", "-fno-sanitize=all"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
