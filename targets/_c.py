"""The second printer: a lowered module as libmodel.a and model.h, plain C with a planned workspace and no runtime."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from mc_opt import ir
from mc_opt.targets import _c_source, _elf, _plan, _zig
from mc_opt.targets._base import TargetError
from mc_opt.targets._c_source import CONSTANTS, PORTS, WORKSPACE, Argument, Call, Identity, Program
from mc_opt.targets._manifest import Port
from mc_opt.targets._relax import intrinsics

Step = Callable[[str], AbstractContextManager[None]]

# What objects may ask of a C library and of the compiler's own; anything else would not link without a runtime.
_LIBC = frozenset({"memcpy", "memmove", "memset", "memcmp", "__tls_get_addr", "getauxval", "syscall"})
_MATHS = """
acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh erf erfc exp exp10 exp2 expm1 fabs floor fma fmax
fmin fmod hypot ldexp llrint llround log log10 log1p log2 lrint lround nearbyint nextafter pow remainder rint round
roundeven sin sincos sinh sqrt tan tanh tgamma trunc
"""
_LIBM = frozenset(f"{name}{suffix}" for name in _MATHS.split() for suffix in ("", "f"))
_MAX_CONSTANTS = (1 << 31) - (64 << 20)  # code reaches data by 32-bit distances
_ALLOCATION = re.compile(r"TVMBackendAllocWorkspace\(([^)]*\)?[^)]*)\)")
_SIZE = re.compile(r"\d+, \w+, (?:T\.u?int\d+\()?(\d+)")
# Debug information would be larger than the code, and names the folder of the build.
_LINKER_SCRIPT = "SECTIONS { /DISCARD/ : { *(.debug*) *(.rela.debug*) *(.comment) *(.llvm_addrsig) } }\n"
_CFLAGS = (
    *("-std=c11", "-O2", "-g0", "-fPIC", "-Wall", "-Wextra", "-Werror"),
    *("-fvisibility=hidden", "-fno-ident", "-fno-sanitize=all", "-fno-stack-protector"),
)

# Zig's names for what glue and constants are compiled for: any processor of the architecture, which they then ask.
_TARGETS = {
    "x86": ("-target", "x86_64-linux-gnu", "-mcpu=x86_64"),
    "arm": ("-target", "aarch64-linux-gnu", "-mcpu=generic"),
}


@dataclasses.dataclass(frozen=True)
class Printed:
    """What was made.

    Attributes:
        workspace: bytes of the workspace.
        planned: of these, bytes for intermediate tensors.
        bound: bytes of tensors alive at the busiest step; no plan needs less.
        libraries: functions of the C library that the code calls.
    """

    workspace: int
    planned: int
    bound: int
    libraries: tuple[str, ...]


def print_c(
    module: tvm.IRModule,
    target: tvm.target.Target,
    folder: Path,
    *,
    names: tuple[Sequence[str], Sequence[str]],
    identity: Identity,
    step: Step,
) -> Printed:
    """Write `lib<prefix>.a` and `<prefix>.h` into `folder`.

    Args:
        module: a scheduled module; its `main` is a straight list of call_tir.
        target: what the kernels are compiled for.
        folder: where the two files go.
        names: of the inputs and of the outputs, in main's order.
        identity: the prefix, and what the header says about the build.
        step: announces a step and takes its time.

    Raises:
        TargetError: main holds something that has no static form.
    """
    module = relax.transform.RewriteDataflowReshape()(module)
    reader = _Reader(module)
    program = reader.program(names)
    with tempfile.TemporaryDirectory(dir=folder, prefix="objects-") as place:
        work = Path(place)
        with step("compile"):
            scratch = _compile(module, reader.kernels, target, work / "kernels.o")
        with step("link"):
            program = dataclasses.replace(program, scratch=scratch)
            libraries = _link(program, identity, reader.constants, work)
            ir.write_bytes(folder / f"lib{identity.prefix}.a", (work / "model.a").read_bytes())
    ir.write_text(folder / f"{identity.prefix}.h", _c_source.header(program, identity, libraries))
    return Printed(program.workspace, program.planned, program.bound, tuple(libraries))


@dataclasses.dataclass
class _Storage:
    """A tensor's memory, while its lifetime is being found out."""

    base: int | None  # None: in the workspace, if no output takes it
    offset: int
    size: int
    first: int = 0
    last: int = 0


@dataclasses.dataclass(frozen=True)
class _View:
    """A tensor: some storage under a shape and type."""

    storage: _Storage
    shape: tuple[int, ...]
    dtype: str


class _Reader:
    """Reads main: which kernels run on which tensors, and where those may stand."""

    def __init__(self, module: tvm.IRModule) -> None:
        self.kernels: dict[str, str] = {}  # a function's name in the module: its symbol
        self.constants: list[np.ndarray] = []
        self._functions = {v.name_hint: f for v, f in module.functions.items()}
        self._values: dict[Any, Any] = {}
        self._offsets: dict[tuple[bytes, int], int] = {}
        self._end = 0
        self._storages: list[_Storage] = []
        self._calls: list[tuple[str, list[_View]]] = []

    def program(self, names: tuple[Sequence[str], Sequence[str]]) -> Program:
        """The whole program; `names` of inputs and outputs."""
        main = self._functions["main"]
        for k, parameter in enumerate(main.params):
            shape, dtype = _type(parameter.ty)
            self._values[parameter] = _View(_Storage(PORTS + k, 0, _size(shape, dtype)), shape, dtype)
        inputs = [self._values[p] for p in main.params]
        for block in main.body.blocks:
            for binding in block.bindings:
                self._values[binding.var] = self._read(binding)
        outputs = self._value(main.body.body)
        copies = self._give_outputs(outputs, PORTS + len(inputs))
        placed = [s for s in self._storages if s.base is None]
        plan = _plan.plan([_plan.Lifetime(s.size, s.first, s.last) for s in placed])
        for storage, offset in zip(placed, plan.offsets, strict=True):
            storage.base, storage.offset = WORKSPACE, offset
        return Program(
            inputs=_ports(names[0], inputs),
            outputs=_ports(names[1], outputs),
            calls=tuple(Call(k, tuple(_argument(v) for v in views)) for k, views in self._calls),
            copies=tuple((k, _argument(v), v.storage.size) for k, v in copies),
            planned=plan.size,
            bound=plan.bound,
        )

    def _read(self, binding: Any) -> Any:
        value = binding.value
        if isinstance(value, relax.Call) and getattr(value.op, "name", "") == "relax.call_tir":
            return self._call(value, binding.var.ty)
        if isinstance(value, relax.Call) and getattr(value.op, "name", "") == "relax.reshape":
            source = self._value(value.args[0])
            shape, dtype = _type(binding.var.ty)
            return _View(source.storage, shape, dtype)
        return self._value(value)

    def _value(self, expr: Any) -> Any:
        """A view, or a list of views for a tuple."""
        if expr in self._values:
            return self._values[expr]
        if isinstance(expr, relax.Tuple):
            return [self._value(e) for e in expr.fields]
        if isinstance(expr, relax.TupleGetItem):
            return self._value(expr.tuple_value)[expr.index]
        if isinstance(expr, tvm.ir.GenericConst):
            return self._constant(expr)
        raise TargetError(f"form=static: {type(expr).__name__} has no static form; build with form=vm, and report this")

    def _constant(self, expr: Any) -> _View:
        array = np.ascontiguousarray(expr.value.numpy())
        shape, dtype = _type(expr.ty)
        key = (hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest(), array.nbytes)
        if key not in self._offsets:
            self._offsets[key] = self._end
            self.constants.append(array)
            self._end += -(-array.nbytes // _plan.ALIGNMENT) * _plan.ALIGNMENT
        if self._end > _MAX_CONSTANTS:
            raise TargetError("form=static: the weights exceed 1.9 GiB, which one object cannot hold; use form=vm")
        view = self._values[expr] = _View(_Storage(CONSTANTS, self._offsets[key], array.nbytes), shape, dtype)
        return view

    def _call(self, call: Any, result: Any) -> Any:
        name = call.args[0].name_hint
        now = len(self._calls)
        arguments = self._value(call.args[1])
        single = not isinstance(result, relax.TupleType)
        made = []
        for ty in [result] if single else result.fields:
            shape, dtype = _type(ty)
            storage = _Storage(None, 0, _size(shape, dtype), now, now)
            self._storages.append(storage)
            made.append(_View(storage, shape, dtype))
        views = [*arguments, *made]
        self._hold_to(name, views)
        for view in views:
            view.storage.last = now
        symbol = self.kernels.setdefault(name, f"k{len(self.kernels)}_{re.sub(r'[^A-Za-z0-9_]', '_', name)}")
        self._calls.append((symbol, views))
        return made[0] if single else made

    def _hold_to(self, name: str, views: Sequence[_View]) -> None:
        """The kernel is compiled without checks of its arguments: they are made here, once and for all."""
        wanted = [_type(p.ty) for p in self._functions[name].params]
        given = [(v.shape, v.dtype) for v in views]
        if wanted != given:
            raise TargetError(
                f"form=static: {name} takes {wanted}, main gives {given}; build with form=vm, and report this"
            )

    def _give_outputs(self, outputs: Sequence[_View], first: int) -> list[tuple[int, _View]]:
        """Let kernels write outputs in place; returns those that must be copied at the end."""
        copies = []
        for k, view in enumerate(outputs):
            if view.storage.base is None:
                view.storage.base = first + k
            else:
                copies.append((k, view))
        return copies


def _argument(view: _View) -> Argument:
    assert view.storage.base is not None
    return Argument(view.storage.base, view.storage.offset, view.shape, view.dtype)


def _ports(names: Sequence[str], views: Sequence[_View]) -> tuple[Port, ...]:
    return tuple(Port(n, v.shape, v.dtype) for n, v in zip(names, views, strict=True))


def _type(ty: Any) -> tuple[tuple[int, ...], str]:
    return tuple(int(d) for d in ty.shape), str(ty.dtype)


def _size(shape: tuple[int, ...], dtype: str) -> int:
    try:
        return math.prod(shape) * _c_source.item_size(dtype)
    except KeyError:
        raise TargetError(f"form=static: {dtype} has no C type; build with form=vm") from None


def _compile(module: tvm.IRModule, kernels: Mapping[str, str], target: tvm.target.Target, path: Path) -> int:
    """Compile the kernels to one object; returns the bytes of scratch that the hungriest asks for."""
    functions = {v.name_hint: f for v, f in module.functions.items()}
    named = {
        tvm.ir.GlobalVar(symbol): functions[name].with_attr("global_symbol", symbol)
        for name, symbol in kernels.items()
        if isinstance(functions[name], tirx.PrimFunc)
    }
    scratch = _Scratch()
    # The asserts check what _hold_to has checked, and take more room than the kernels.
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}, instruments=[scratch]):
        tvm.tirx.build(tvm.IRModule(named), target=target, pipeline=intrinsics.PIPELINE).write_to_file(str(path))
    return int(scratch.most)


@tvm.instrument.pass_instrument
class _Scratch:
    """Reads off the lowered kernels how much scratch memory each asks for."""

    def __init__(self) -> None:
        self.most = 0

    def run_after_pass(self, module: tvm.IRModule, info: Any) -> None:
        """Look at the kernels when calls of the runtime stand in them."""
        if info.name == "tirx.LowerTVMBuiltin":
            for function in module.functions.values():
                self.most = max(self.most, scratch_size(function.script()))


def scratch_size(text: str) -> int:
    """Bytes that a kernel's text allocates, as if nothing were released in between."""
    total = 0
    for call in _ALLOCATION.findall(text):
        size = _SIZE.match(call)
        if size is None:
            raise TargetError(f"form=static: a kernel allocates {call}; expected a constant size; build with form=vm")
        total += -(-int(size[1]) // _plan.ALIGNMENT) * _plan.ALIGNMENT
    return total


def _link(program: Program, identity: Identity, constants: Sequence[np.ndarray], work: Path) -> list[str]:
    """Make model.a of kernels.o in `work`; returns what it needs of the C library."""
    prefix = identity.prefix
    hooks = {n for n in _elf.Object(work / "kernels.o").defined() if n.startswith("__TVMBackend")}
    ir.write_text(work / f"{prefix}.h", _c_source.header(program, identity, ()))
    ir.write_text(work / "glue.c", _c_source.glue(program, identity, hooks))
    files = []
    for k, array in enumerate(constants):
        array.tofile(work / f"{k}.bin")
        files.append(f"{k}.bin")
    ir.write_text(work / "constants.s", _c_source.constants(prefix, files))
    ir.write_text(work / "discard.ld", _LINKER_SCRIPT)
    zig = functools.partial(_zig.run, cache=work / "cache", folder=work)
    zig("cc", *_TARGETS[identity.kind], *_CFLAGS, "-c", "glue.c", "-o", "glue.o")
    zig("cc", *_TARGETS[identity.kind], "-c", "constants.s", "-o", "constants.o")
    zig("ld.lld", "-r", "-T", "discard.ld", "-o", f"{prefix}.o", "kernels.o", "glue.o", "constants.o")
    linked = _elf.Object(work / f"{prefix}.o")
    linked.localise(_c_source.symbols(prefix))
    needed = sorted(linked.undefined())
    foreign = [n for n in needed if n not in _LIBC | _LIBM]
    if foreign:
        raise TargetError(f"form=static: kernels call {', '.join(foreign)}, which no C library has; build with form=vm")
    zig("ar", "rcsD", "model.a", f"{prefix}.o")
    return needed
