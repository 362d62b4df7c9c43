"""CUDA source to code for a GPU: by nvcc, or by NVRTC (a library of PyPI's), whichever is there."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from mc_opt.targets._base import TargetError

Code = Literal["ptx", "cubin", "fatbin", "source"]

TO_GET = "pip install nvidia-cuda-nvrtc, or install NVIDIA's CUDA toolkit, which has nvcc"
_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(")
# Kernels in machine code are ELF sections, in PTX they are entries.
_IN_ELF = re.compile(rb"\0\.text\.([A-Za-z_]\w*)(?=\0)")
_IN_PTX = re.compile(rb"\.entry\s+(\w+)")
# Headers of TVM's preamble that NVRTC alone does not have.
_HEADERS = {
    "math_constants.h": """#define CUDART_INF_F __int_as_float(0x7f800000)
#define CUDART_NAN_F __int_as_float(0x7fffffff)
#define CUDART_INF __longlong_as_double(0x7ff0000000000000)
#define CUDART_NAN __longlong_as_double(0xfff8000000000000)
""",
    "cuda/std/cstdint": """namespace cuda { namespace std {
typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long long int64_t;
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
} }
""",
    "cuda/std/type_traits": """namespace cuda { namespace std {
template <bool B> struct truth { static constexpr bool value = B; };
template <class A, class B> struct is_same : truth<false> {};
template <class A> struct is_same<A, A> : truth<true> {};
template <class A, class B> inline constexpr bool is_same_v = is_same<A, B>::value;
template <class A> struct is_floating_point : truth<is_same_v<A, float> || is_same_v<A, double>> {};
template <class A, class... B> struct is_any : truth<(is_same_v<A, B> || ...)> {};
template <class A> struct is_integral : is_any<A, bool, char, signed char, unsigned char, short, unsigned short, int,
  unsigned int, long, unsigned long, long long, unsigned long long> {};
template <class A> struct is_signed : truth<(A(-1) < A(0))> {};
template <class A> struct is_unsigned : truth<!is_signed<A>::value> {};
template <bool B, class A = void> struct enable_if {};
template <class A> struct enable_if<true, A> { typedef A type; };
template <bool B, class A, class C> struct conditional { typedef A type; };
template <class A, class C> struct conditional<false, A, C> { typedef C type; };
} }
""",
}


def nvcc() -> str | None:
    """The path of nvcc, if it is there."""
    found = shutil.which("nvcc")
    places = [Path(found)] if found else sorted(Path("/usr/local").glob("cuda*/bin/nvcc"))
    return str(places[-1]) if places else None


def nvrtc() -> str | None:
    """The path of the NVRTC library, of a package or of a toolkit, if it is there."""
    return library("nvrtc")


def library(name: str) -> str | None:
    """The path of one of CUDA's own libraries, newest first: of NVIDIA's packages, or of a toolkit."""
    found = [path for place in _places() for path in place.glob(f"lib{name}.so*")]
    numbered = [(tuple(map(int, re.findall(r"\d+", path.name))), path) for path in found]
    return str(max(numbered)[1].resolve()) if numbered else None


def _places() -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        yield from Path(folder).glob("*/lib")
    yield from Path("/usr/local").glob("cuda*/lib64")


def best_code() -> Code:
    """What `code=auto` stands for here: machine code and PTX by nvcc, machine code by NVRTC, or source."""
    if nvcc() is not None:
        return "fatbin"
    return "cubin" if nvrtc() is not None else "source"


def check(code: Code) -> None:
    """Refuse a form of code that nothing here can make.

    Raises:
        TargetError: saying what is missing and how to get it.
    """
    if code == "source" or nvcc() is not None:
        return
    if nvrtc() is None:
        raise TargetError(
            f"cuda{{code={code}}}: neither nvcc nor NVRTC is here to make it; {TO_GET}, or build with code=source,"
            " which the machine with the GPU compiles when it loads the artefact"
        )
    if code == "fatbin":
        raise TargetError("cuda{code=fatbin}: needs nvcc, and only NVRTC is here; build with code=cubin or code=ptx")


def compile_source(source: str, arch: str, code: Code) -> bytes:
    """The source for one architecture (`sm_80`) as PTX, machine code, or both.

    Raises:
        TargetError: nothing here can make this form.
        RuntimeError: the compiler refuses the source, or leaves out a kernel: a mistake of ours or of TVM's.
    """
    check(code)
    if code == "source":
        return source.encode()
    made = _by_nvcc(source, arch, code) if nvcc() is not None else _by_nvrtc(source, arch, code)
    absent = sorted(set(kernels(source)) - compiled_kernels(made))
    if absent:
        raise RuntimeError(f"{len(absent)} kernels are not in the {code} of {arch}: {', '.join(absent[:5])}")
    return made


def kernels(source: str) -> list[str]:
    """The names of the kernels that a source defines."""
    return sorted(set(_KERNEL.findall(source)))


def compiled_kernels(code: bytes) -> set[str]:
    """The names of the kernels in PTX, in machine code, or in both together."""
    return {name.decode() for pattern in (_IN_ELF, _IN_PTX) for name in pattern.findall(code)}


def _by_nvcc(source: str, arch: str, code: Code) -> bytes:
    number = arch.removeprefix("sm_")
    real, virtual = f"arch=compute_{number},code={arch}", f"arch=compute_{number},code=compute_{number}"
    words = {
        "ptx": ["--ptx", f"-arch=compute_{number}"],
        "cubin": ["--cubin", "-gencode", real],
        "fatbin": ["--fatbin", "-no-compress", "-gencode", real, "-gencode", virtual],
    }[code]
    with tempfile.TemporaryDirectory(prefix="mc-opt-nvcc-") as folder:
        before, after = Path(folder, "kernels.cu"), Path(folder, f"kernels.{code}")
        before.write_text(source, encoding="utf-8")
        command = [str(nvcc()), *words, "-O3", "-w", "-o", str(after), str(before)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise RuntimeError(f"nvcc ended with code {done.returncode}: {_first(done.stderr + done.stdout)}")
        made = after.read_bytes()
    return made + b"\0" if code == "ptx" else made  # the driver reads PTX up to a zero


def _by_nvrtc(source: str, arch: str, code: Code) -> bytes:
    path = nvrtc()
    assert path is not None  # check() saw to it
    api = ctypes.CDLL(path)
    program = ctypes.c_void_p()
    names = (ctypes.c_char_p * len(_HEADERS))(*(name.encode() for name in _HEADERS))
    texts = (ctypes.c_char_p * len(_HEADERS))(*(text.encode() for text in _HEADERS.values()))
    made = api.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", len(_HEADERS), texts, names)
    if made:
        raise RuntimeError(f"NVRTC ({path}) makes no program: error {made}")
    try:
        wanted = arch if code == "cubin" else arch.replace("sm_", "compute_")
        words = [f"--gpu-architecture={wanted}", "--std=c++17"]
        words += [f"--include-path={place}" for place in [Path(path).parents[1] / "include"] if place.is_dir()]
        options = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
        if api.nvrtcCompileProgram(program, len(options), options):
            raise RuntimeError(f"NVRTC refuses the source: {_first(_read(api, program, 'ProgramLog').decode())}")
        return _read(api, program, "CUBIN" if code == "cubin" else "PTX")
    finally:
        api.nvrtcDestroyProgram(ctypes.byref(program))


def _read(api: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(api, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    room = ctypes.create_string_buffer(size.value)
    getattr(api, f"nvrtcGet{what}")(program, room)
    return room.raw


def _first(text: str) -> str:
    said = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in said if "error" in line), said[0] if said else "it said nothing")
