"""The child's side of a build for CUDA: kernels in threads, compiled, and packed into the library of the host."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx

from mc_opt.targets import _cuda, _zig
from mc_opt.targets._cuda import Code
from mc_opt.targets._machine import Machine

# The symbol that TVM's loader reads the serialised modules from.
_SYMBOL = "__tvm_ffi__library_bin"

# TVM writes CUDA's fast functions, of which __powf keeps few digits: the precise ones instead.
_FUNCTIONS = ("exp", "exp2", "exp10", "log", "log2", "log10", "pow", "sin", "cos", "tan", "tanh")


def register() -> None:
    """Make kernels call the precise functions, and one that TVM lacks; for the whole process, a build's own."""
    for name in _FUNCTIONS:
        tirx.register_intrin_lowering(f"tirx.{name}", target="cuda", f=_precise, level=99)
    tirx.register_intrin_lowering("tirx.popcount", target="cuda", f=_ones, level=99)


def _precise(call: Any) -> Any:
    name, kind = call.op.name.removeprefix("tirx."), str(call.ty)
    if kind == "float16":
        return tirx.Cast(
            kind, tirx.call_pure_extern("float32", f"{name}f", *(tirx.Cast("float32", a) for a in call.args))
        )
    return tirx.call_pure_extern(kind, name if kind == "float64" else f"{name}f", *call.args)


def _ones(call: Any) -> Any:
    return tirx.call_pure_extern(str(call.ty), "__popc", call.args[0])


def cuda_target(machine: Machine) -> tvm.target.Target:
    """The CUDA target; its limits are those of every architecture since sm_75."""
    return tvm.target.Target(
        {
            "kind": "cuda",
            "arch": machine.cpu,
            "max_threads_per_block": 1024,
            "max_shared_memory_per_block": machine.l1,
            "thread_warp_size": 32,
            "host": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64"},
        }
    )


def device_module(executable: Any, names: set[str]) -> Any:
    """The module that holds the kernels `names`, which TVM leaves out without a word when nothing is in threads."""
    found: list[Any] = []
    waiting = [executable.mod]
    while waiting:
        module = waiting.pop()
        found += [module] if module.kind == "cuda" else []
        waiting = [*waiting, *module.imports]
    assert len(found) == 1, f"expected one CUDA module beside the host's code, found {len(found)}"
    defined = _cuda.kernels(found[0].inspect_source())
    absent = sorted(n for n in names if not any(k.startswith(f"{n}_kernel") for k in defined))
    assert not absent, f"the CUDA module lacks the kernels of {', '.join(absent)}"
    return found[0]


def link(executable: Any, device: Any, output: Path, *, arch: str, code: Code) -> None:
    """Write the library: the host's code, the constants, and the kernels in the form asked for."""
    source = device.inspect_source()
    compiled = _cuda.compile_source(source, arch, code)
    work = output.parent / "objects"
    work.mkdir()

    def pack(module: Any, _is_system: bool, _prefix: str, folder: str) -> str:
        blob = tvm.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy().tobytes()
        path = Path(folder, "imports.bin")
        path.write_bytes(repacked(blob, source.encode(), compiled, "cuda" if code == "source" else code))
        return str(path)

    def join(library: str, objects: list[str], **_options: Any) -> None:
        *compiled_objects, imports = objects
        start = f"_binary_{''.join(c if c.isalnum() else '_' for c in Path(imports).name)}_start"
        _zig.run(
            *("ld.lld", "-shared", "--build-id=none", "--strip-all", f"--defsym={_SYMBOL}={start}"),
            *("-o", library, *compiled_objects, "--format=binary", Path(imports).name),
            cache=work / "cache",
            folder=work,
        )

    executable.mod.export_library(
        str(output.resolve()), fcompile=join, fpack_imports=pack, workspace_dir=str(work.resolve())
    )
    shutil.rmtree(work)


def repacked(blob: bytes, source: bytes, compiled: bytes, form: str) -> bytes:
    """TVM's serialised modules with the CUDA source replaced by compiled code.

    TVM compiles the source when it loads the library, which takes seconds, a compiler and Python; a module that
    holds PTX, cubin or fatbin it hands to the driver as it is. The text is [size][tree of imports] and then, for each
    module, its kind and its bytes; a CUDA module's bytes are [form][signatures][code].
    """
    (starts,) = struct.unpack_from("<Q", blob, 8)  # where each module's imports begin, and the end of the last
    (edges,) = struct.unpack_from("<Q", blob, 16 + 8 * starts)
    at = 24 + 8 * (starts + edges)
    parts = [blob[8:at]]
    for _ in range(starts - 1):
        kind, at = _text(blob, at)
        parts.append(_counted(kind))
        if kind == b"_lib":
            continue
        content, at = _text(blob, at)
        parts.append(_counted(_compiled(content, source, compiled, form.encode()) if kind == b"cuda" else content))
    assert at == len(blob), "the serialised modules have another format than TVM 0.27's"
    body = b"".join(parts)
    return struct.pack("<Q", len(body)) + body


def _compiled(content: bytes, source: bytes, compiled: bytes, form: bytes) -> bytes:
    old, at = _text(content, 0)
    code = _counted(source)
    assert old == b"cuda" and content.endswith(code), "a serialised CUDA module has another format than TVM 0.27's"
    return _counted(form) + content[at : len(content) - len(code)] + _counted(compiled)


def _text(blob: bytes, at: int) -> tuple[bytes, int]:
    (size,) = struct.unpack_from("<Q", blob, at)
    return blob[at + 8 : at + 8 + size], at + 8 + size


def _counted(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text
