"""Runs an artefact of the target `cuda`, built with code=source, on the processor.

Its CUDA source goes through a C++ compiler, each thread of a block is a fiber. Slow, and no proof of what a GPU does;
but the kernels, their barriers and their launches are the artefact's own. It takes CUDA's place in its process:

    python -m tests.targets._cuda_on_cpu FOLDER INPUTS.npz OUTPUTS.npz
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
_SIGNATURE = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(([^)]*)\)\s*\{')


def run(folder: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of an artefact, computed in another process."""
    with tempfile.TemporaryDirectory() as place:
        given, made = Path(place, "inputs.npz"), Path(place, "outputs.npz")
        np.savez(given, **inputs)
        command = [sys.executable, "-m", "tests.targets._cuda_on_cpu", str(folder), str(given), str(made)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1])
        assert done.returncode == 0, done.stderr
        with np.load(made) as arrays:
            return dict(arrays)


def _compile(words: list[str]) -> None:
    done = subprocess.run(["g++", "-std=c++17", "-shared", "-fPIC", "-w", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


def _device(folder: Path) -> Path:
    library = folder / "device.so"
    places = {}
    for package in ("tvm", "tvm_ffi"):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations is not None
        places[package] = spec.submodule_search_locations[0]
    words = [word for place in places.values() for word in (f"-I{place}/include", f"-L{place}/lib")]
    _compile([str(HERE / "_cuda_on_cpu.cc"), *words, "-ltvm_runtime", "-ltvm_ffi", "-o", str(library)])
    return library


def _kernels(source: str, folder: Path) -> Path:
    """The library of a module's kernels; `run_NAME` launches one."""
    text = re.sub(r"#include <(cuda|math_constants)\.h>", "", source).replace("alignas(64)", "")
    text = re.sub(r"^\s*using (uint|uchar|ushort|int64_t|uint64_t) = .*$", "", text, flags=re.MULTILINE)
    calls = []
    for name, parameters in _SIGNATURE.findall(text):
        types = [p.replace("__restrict__", "").rsplit(maxsplit=1)[0] for p in parameters.split(",")]
        values = ", ".join(f"*({t}*)a[{k}]" for k, t in enumerate(types))
        calls.append(
            f'extern "C" void run_{name}(void** a, const int64_t* size)'
            f" {{ emulated::Launch(size, [&] {{ {name}({values}); }}); }}"
        )
    file, library = folder / "kernels.cc", folder / "kernels.so"
    file.write_text('#include "_cuda_on_cpu.h"\n' + text + "\n".join(calls) + "\n")
    _compile(["-O1", "-ffp-contract=off", f"-I{HERE}", str(file), "-o", str(library)])
    return library


def main(folder: Path, given: Path, made: Path) -> None:
    import tvm

    from mc_opt.targets import _gpu, _manifest

    manifest = _manifest.read(folder)
    assert manifest.form == "source", manifest.form
    with tempfile.TemporaryDirectory() as place:
        ctypes.CDLL(str(_device(Path(place))), mode=ctypes.RTLD_GLOBAL)
        text = source_of(folder / "model.so")
        tvm.get_global_func("mc_opt.tests.use_kernels")(str(_kernels(text, Path(place))))
        _gpu._device = lambda tvm, _manifest: tvm.cuda(0)  # there is no driver
        machine = _gpu.OnGpu(folder / "model.so", manifest, pooled=True)
        with np.load(given) as arrays:
            inputs = [machine.place(arrays[port.name]) for port in manifest.inputs]
        results = [machine.fetch(value) for value in machine.call(inputs)]
    np.savez(made, **{port.name: array for port, array in zip(manifest.outputs, results, strict=True)})


def source_of(library: Path) -> str:
    """The CUDA source in an artefact."""
    content = library.read_bytes()
    start = content.index(b"#ifdef __CUDACC_RTC__") - 1
    size = int.from_bytes(content[start - 8 : start], "little")
    return content[start : start + size].decode()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
