"""TVM's elementary functions as LLVM functions of our own, printed from `kernels/_math.py` and always inlined.

Until LLVM has it, an `exp` of any width is one opaque node: TVM's simplifiers would otherwise put every
argument into its uses again and again, and a tanh of an exp would take minutes to compile.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.tirx import compilation_pipeline

from mc_opt.targets._relax import alignment, subnormals
from mc_opt.targets.kernels import _math

Expr = Any

# The name of the pipeline that compiles kernels, once `register` was called.
PIPELINE = "mc_opt"

_FUNCTIONS: dict[str, Callable[[Expr], Expr]] = {
    "exp": _math.exp_definition,
    "exp_not_positive": _math.exp_not_positive_definition,
    "erf": _math.erf_definition,
    "log": _math.log_definition,
    "sigmoid": _math.sigmoid_definition,
    "tanh": _math.tanh_definition,
}
# Vector widths that kernels use; any other width keeps the expression itself.
_LANES = (1, 2, 4, 8, 16, 32, 64)


def register() -> None:
    """Make code use our functions; for the whole process, so only a build's own process does it."""
    for name in _DOUBLE:
        tirx.register_intrin_lowering(f"tirx.{name}", target="llvm", f=_rule(name), level=99)
    compilation_pipeline.PIPELINE_MAP[PIPELINE] = _pipeline


def _pipeline() -> tuple[Any, ...]:
    """TVM's own way from schedules to LLVM, and our functions beside the kernels."""
    passes, *finalizers = s_tir.pipeline.default_s_tir_pipeline()
    functions = tvm.transform.module_pass(lambda module, _: with_functions(flushed(module)), opt_level=0)
    return tvm.transform.Sequential([passes, functions]), *finalizers


def _rule(name: str) -> Callable[[Any], Any]:
    def lower(call: Any) -> Any:
        kind, x = str(call.ty), call.args[0]
        scalar, cross, lanes = kind.partition("x")
        match scalar:
            case "float64":
                return _DOUBLE[name](x)
            case "float16":  # of functions' bodies, whose values have no types for half.py to see
                return tirx.Cast(kind, _single(name, tirx.Cast(f"float32{cross}{lanes}", x), int(lanes or 1)))
            case _:
                return _single(name, x, int(lanes or 1))

    return lower


def _single(name: str, x: Expr, lanes: int) -> Expr:
    if lanes not in _LANES:
        return _FUNCTIONS[name](x)
    return tirx.call_pure_extern(_math.type_of(x), _math.symbol(name, x), x)


def _library(name: str) -> Callable[[Expr], Expr]:
    """The C library's function, one call a lane."""
    return lambda x: tirx.call_llvm_pure_intrin(_math.type_of(x), f"llvm.{name}", x)


def _double_sigmoid(x: Expr) -> Expr:
    one = _math.constant(1.0, x)
    return one / (one + _library("exp")(-x))


def _double_tanh(x: Expr) -> Expr:
    one, two = _math.constant(1.0, x), _math.constant(2.0, x)
    return one - two / (_library("exp")(two * x) + one)


def _double_erf(x: Expr) -> Expr:
    """In single precision: LLVM has no vector form, and the result lies in [-1, 1]."""
    kind = _math.type_of(x)
    lanes = int(kind.partition("x")[2] or 1)
    return tirx.Cast(kind, _single("erf", tirx.Cast(kind.replace("64", "32"), x), lanes))


# Models in double precision are rare: right, not fast.
_DOUBLE: dict[str, Callable[[Expr], Expr]] = {
    "exp": _library("exp"),
    "erf": _double_erf,
    "log": _library("log"),
    "sigmoid": _double_sigmoid,
    "tanh": _double_tanh,
}


def flushed(module: tvm.IRModule) -> tvm.IRModule:
    """The module with kernels that take subnormal numbers for zero."""
    functions = {
        v: subnormals.flushed(alignment.loosened(f)) if isinstance(f, tirx.PrimFunc) else f
        for v, f in module.functions.items()
    }
    return tvm.IRModule(functions, attrs=module.attrs)


def with_functions(module: tvm.IRModule) -> tvm.IRModule:
    """The module with the functions' LLVM text attached to its first kernel; LLVM drops what is not called."""
    kernels = {v: f for v, f in module.functions.items() if isinstance(f, tirx.PrimFunc)}
    if not kernels:
        return module
    first = min(kernels, key=lambda v: str(v.name_hint))
    function = kernels[first]
    text = llvm_text() + subnormals.llvm_text(str(function.attrs["target"].attrs["mtriple"]))
    body = tirx.AttrStmt(tvm.ir.StringImm(""), "pragma_import_llvm", tvm.ir.StringImm(text), function.body)
    module = tvm.IRModule(dict(module.functions), attrs=module.attrs)
    module[first] = function.with_body(body)
    return module


def llvm_text() -> str:
    """The definitions of all functions at all widths."""
    parts = [_Printer().function(name, f, lanes) for name, f in _FUNCTIONS.items() for lanes in _LANES]
    parts += [
        f"declare {_type('float32', n)} @llvm.{op}.{_suffix(n)}({_type('float32', n)})"
        for op in ("fabs", "floor")
        for n in _LANES
    ]
    return "\n".join(parts) + "\n"


def _type(scalar: str, lanes: int) -> str:
    word = {"float32": "float", "int32": "i32", "bool": "i1"}[scalar]
    return word if lanes == 1 else f"<{lanes} x {word}>"


def _suffix(lanes: int) -> str:
    return "f32" if lanes == 1 else f"v{lanes}f32"


_ARITHMETIC = {
    ("Add", "float32"): "fadd",
    ("Sub", "float32"): "fsub",
    ("Mul", "float32"): "fmul",
    ("Div", "float32"): "fdiv",
    ("Add", "int32"): "add",
    ("Sub", "int32"): "sub",
}
_SHIFT = {"LShift": "shl", "RShift": "ashr"}
_COMPARISON = {"GT": "ogt", "GE": "oge", "LT": "olt", "LE": "ole"}


class _Printer:
    """Prints one expression as LLVM instructions; a name that a Let binds is printed once."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names: dict[Any, str] = {}

    def function(self, name: str, make: Callable[[Expr], Expr], lanes: int) -> str:
        kind = _type("float32", lanes)
        x = tirx.Var("x", "float32" if lanes == 1 else f"float32x{lanes}")
        self.names[x] = "%x"
        result = self.value(make(x))
        body = "\n".join(self.lines)
        return f"define {kind} @{_math.symbol(name, x)}({kind} %x) {{\n{body}\n  ret {kind} {result}\n}}"

    def emit(self, text: str) -> str:
        name = f"%t{len(self.lines)}"
        self.lines.append(f"  {name} = {text}")
        return name

    def value(self, x: Expr) -> str:
        scalar, _, count = str(x.ty).partition("x")
        kind = _type(scalar, int(count or 1))
        word = type(x).__name__
        if (word, scalar) in _ARITHMETIC:
            return self.emit(f"{_ARITHMETIC[word, scalar]} {kind} {self.value(x.a)}, {self.value(x.b)}")
        if word in _SHIFT:
            return self.emit(f"{_SHIFT[word]} {kind} {self.value(x.a)}, {self.value(x.b)}")
        if word in _COMPARISON:
            left, right = self.value(x.a), self.value(x.b)
            return self.emit(f"fcmp {_COMPARISON[word]} {self.kind(x.a)} {left}, {right}")
        match word:
            case "Var":
                return self.names[x]
            case "FloatImm":
                return _float(float(x.value))
            case "IntImm":
                return str(int(x.value))
            case "Broadcast":
                return f"splat ({_type(scalar, 1)} {self.value(x.value)})"
            case "Let":
                self.names[x.var] = self.value(x.value)
                return self.value(x.body)
            case "Select":
                test = f"{self.kind(x.condition)} {self.value(x.condition)}"
                yes, no = self.value(x.true_value), self.value(x.false_value)
                return self.emit(f"select {test}, {kind} {yes}, {kind} {no}")
            case "Cast":
                op = "fptosi" if scalar == "int32" else "sitofp"
                return self.emit(f"{op} {self.kind(x.value)} {self.value(x.value)} to {kind}")
            case "Call":
                return self.call(x, kind)
            case _:
                raise AssertionError(f"_math uses {word} of {x.ty}, which has no LLVM text here")

    def call(self, x: Expr, kind: str) -> str:
        values = [self.value(a) for a in x.args]
        first = self.kind(x.args[0])
        match x.op.name.removeprefix("tirx."):
            case "floor" | "fabs" as op:
                count = int(str(x.ty).partition("x")[2] or 1)
                return self.emit(f"call {kind} @llvm.{op}.{_suffix(count)}({first} {values[0]})")
            case "reinterpret":
                return self.emit(f"bitcast {first} {values[0]} to {kind}")
            case "isnan":
                return self.emit(f"fcmp uno {first} {values[0]}, {values[0]}")
            case op:
                raise AssertionError(f"_math calls {op}, which has no LLVM text here")

    def kind(self, x: Expr) -> str:
        scalar, _, lanes = str(x.ty).partition("x")
        return _type(scalar, int(lanes or 1))


def _float(value: float) -> str:
    """A float32 as LLVM writes it: the bits of the double of the same value."""
    single = struct.unpack("f", struct.pack("f", value))[0]
    return f"0x{struct.unpack('Q', struct.pack('d', single))[0]:016X}"
