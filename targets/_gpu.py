"""The GPU of this machine, asked of NVIDIA's driver; why a CUDA artefact cannot run here."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mc_opt.targets import _cuda
from mc_opt.targets._manifest import Manifest
from mc_opt.targets._runtime import open_library

_DRIVER = "libcuda.so.1"
# The runtime library that TVM 0.27 is linked with.
_RUNTIME = "libcudart.so.13"
# CUdevice_attribute.
_MAJOR, _MINOR = 75, 76


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU: its name, and its architecture as a number (80 for sm_80)."""

    name: str
    architecture: int


@dataclasses.dataclass(frozen=True)
class Tool:
    """A part of CUDA: where it was found, what it is for, and what to do where it is missing."""

    name: str
    found: str | None
    purpose: str
    advice: str


def cuda_tools() -> tuple[Tool, ...]:
    """What building for CUDA and running it needs, and what of it is here."""
    nvcc, nvrtc, gpu = _cuda.nvcc(), _cuda.nvrtc(), find()
    named = None if isinstance(gpu, str) else f"{gpu.name}, sm_{gpu.architecture}"
    advice = "" if nvcc or nvrtc else f"neither nvcc nor NVRTC is here, cuda artefacts hold source: {_cuda.TO_GET}"
    to_run = f"pip install 'nvidia-cuda-runtime>=13,<14' ({_RUNTIME}, for cuda artefacts on this machine's GPU)"
    return (
        Tool("nvcc", nvcc, "compiling CUDA kernels", advice),
        Tool("NVRTC", nvrtc, "compiling CUDA kernels without nvcc", ""),
        Tool("CUDA runtime", _runtime(), "running CUDA artefacts", to_run if named else ""),
        Tool("NVIDIA GPU", named, "running CUDA artefacts", ""),
    )


def find() -> Gpu | str:
    """The first GPU, or why there is none."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return f"NVIDIA's driver is not here ({_DRIVER})"
    code = driver.cuInit(0)
    count = ctypes.c_int()
    if code or driver.cuDeviceGetCount(ctypes.byref(count)):
        return f"NVIDIA's driver does not start (error {code})"
    if not count.value:
        return "NVIDIA's driver finds no GPU"
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), 0)
    major, minor = ctypes.c_int(), ctypes.c_int()
    for value, attribute in ((major, _MAJOR), (minor, _MINOR)):
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
    return Gpu(name.value.decode(errors="replace"), major.value * 10 + minor.value)


def unfit(manifest: Manifest) -> str | None:
    """Why this machine cannot run a CUDA artefact; None when it can."""
    if platform.machine() != "x86_64":
        return f"its host code is for x86_64, this machine is {platform.machine()}"
    gpu = find()
    if isinstance(gpu, str):
        return f"built for {manifest.cpu}, and {gpu}; copy the folder to a machine with a GPU and load it there"
    built = int(manifest.cpu.removeprefix("sm_"))
    same = built // 10 == gpu.architecture // 10
    if built > gpu.architecture or (manifest.form == "cubin" and not same):
        return (
            f"built for {manifest.cpu} ({manifest.form}), this GPU ({gpu.name}) is sm_{gpu.architecture};"
            f" build with cuda{{arch=sm_{gpu.architecture}}}"
        )
    if _runtime() is None:
        return f"CUDA's runtime library {_RUNTIME} is not here; pip install 'nvidia-cuda-runtime>=13,<14'"
    if manifest.form == "source" and _cuda.best_code() == "source":
        return f"its kernels are CUDA source, and neither nvcc nor NVRTC is here to compile them; {_cuda.TO_GET}"
    return None


class OnGpu:
    """TVM's virtual machine on the GPU, with a library that mc-opt built; `unfit` said that it runs here."""

    def __init__(self, path: Path, manifest: Manifest, *, pooled: bool) -> None:
        """Load a library; with `pooled`, memory of a run is kept for the next."""
        self._tvm = importlib.import_module("tvm")
        self._device = _device(self._tvm, manifest)
        machine = importlib.import_module("tvm.relax").VirtualMachine
        self._main = machine(open_library(path), self._device, "pooled" if pooled else "naive")["main"]

    def run(self, tensors: Sequence[Any]) -> list[np.ndarray]:
        """The outputs as arrays, for tensors in the order of the inputs; one call at a time."""
        return [self.fetch(result) for result in self.call(tensors)]

    def call(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """The outputs as tensors, for tensors in the order of the inputs; one call at a time."""
        found: Sequence[Any] = self._main(*tensors)
        return found

    def place(self, array: np.ndarray) -> Any:
        """A copy of an array as a tensor."""
        return self._tvm.runtime.tensor(array, self._device)

    def borrow(self, array: np.ndarray) -> Any:
        """A copy of an array as a tensor: a GPU has memory of its own."""
        return self.place(array)

    def fetch(self, tensor: Any) -> np.ndarray:
        """A copy of a tensor as an array."""
        found: np.ndarray = tensor.numpy()
        return found


def _device(tvm: Any, manifest: Manifest) -> Any:
    """The device to run an artefact on, TVM's part for CUDA loaded."""
    if tvm.get_global_func("device_api.cuda", allow_missing=True) is None:
        runtime = _runtime()
        assert runtime is not None  # unfit() saw to it
        # TVM looks for the library among the system's, where NVIDIA's packages do not put it.
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"), mode=ctypes.RTLD_GLOBAL)
    if manifest.form == "source":
        register = importlib.import_module("tvm_ffi").register_global_func
        register("tvm_callback_cuda_compile", lambda source: _compile(source, manifest.cpu), override=True)
    return tvm.cuda(0)


def _compile(source: str, arch: str) -> bytes:
    return _cuda.compile_source(source, arch, _cuda.best_code())


def _runtime() -> str | None:
    found = _cuda.library("cudart")
    if found is not None and found.split(".so.")[-1].split(".")[0] == _RUNTIME.rpartition(".")[2]:
        return found
    try:
        ctypes.CDLL(_RUNTIME)
    except OSError:
        return None
    return _RUNTIME
