"""The C text of a static artefact: its header, the program that calls the kernels, and the processor check."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from string import Template

from mc_opt.targets import _c_text
from mc_opt.targets._machine import HWCAP
from mc_opt.targets._manifest import Port
from mc_opt.targets._plan import ALIGNMENT

# Where an argument of a call lives: the number of a base pointer. Inputs and then outputs follow.
CONSTANTS, WORKSPACE, PORTS = 0, 1, 2

_TYPES = {
    **{f"{sign}int{bits}": f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{"float32": "float", "float64": "double", "bool": "uint8_t", "float16": "uint16_t", "bfloat16": "uint16_t"},
}
_TYPE_NOTES = {"bool": ", 0 or 1", "float16": ", the bits of IEEE halves", "bfloat16": ", the upper halves of floats"}
# DLPack's type codes.
_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}

# In the words of a header's comment.
_ARCHITECTURES = {"x86": "x86-64", "arm": "64-bit ARM"}

# Words of C and C++, and macros of the systems' compilers, that no parameter can be called.
_TAKEN = """
alignas alignof and and_eq asm auto bitand bitor bool break case catch char char16_t char32_t char8_t class
co_await co_return co_yield compl concept const const_cast consteval constexpr constinit continue decltype default
delete do double dynamic_cast else enum explicit export extern false float for friend goto if inline int long
mutable namespace new noexcept not not_eq nullptr operator or or_eq private protected public register
reinterpret_cast requires restrict return short signed sizeof static static_assert static_cast struct switch
template this thread_local throw true try typedef typeid typename typeof typeof_unqual union unsigned using
virtual void volatile wchar_t while xor xor_eq size_t linux unix i386 errno assert stdin stdout stderr NULL EOF
I complex imaginary near far min max
"""
_WORDS = frozenset(_TAKEN.split())

_LIMITS = re.compile(r"[A-Z0-9_]+_(MAX|MIN|WIDTH|C)")  # macros of stdint.h

# Processor features by LLVM's name: CPUID leaf, subleaf, register (eax, ebx, ecx, edx) and bit.
CPUID: dict[str, tuple[int, int, int, int]] = {
    **{"sse3": (1, 0, 2, 0), "ssse3": (1, 0, 2, 9), "fma": (1, 0, 2, 12), "sse4.1": (1, 0, 2, 19)},
    **{"sse4.2": (1, 0, 2, 20), "movbe": (1, 0, 2, 22), "popcnt": (1, 0, 2, 23), "avx": (1, 0, 2, 28)},
    **{"f16c": (1, 0, 2, 29), "lzcnt": (0x80000001, 0, 2, 5)},
    **{"bmi": (7, 0, 1, 3), "avx2": (7, 0, 1, 5), "bmi2": (7, 0, 1, 8), "avx512f": (7, 0, 1, 16)},
    **{"avx512dq": (7, 0, 1, 17), "avx512ifma": (7, 0, 1, 21), "avx512cd": (7, 0, 1, 28)},
    **{"avx512bw": (7, 0, 1, 30), "avx512vl": (7, 0, 1, 31)},
    **{"avx512vbmi": (7, 0, 2, 1), "avx512vbmi2": (7, 0, 2, 6), "gfni": (7, 0, 2, 8), "vaes": (7, 0, 2, 9)},
    **{"vpclmulqdq": (7, 0, 2, 10), "avx512vnni": (7, 0, 2, 11), "avx512bitalg": (7, 0, 2, 12)},
    **{"avx512vpopcntdq": (7, 0, 2, 14), "avx512fp16": (7, 0, 3, 23)},
    **{"avxvnni": (7, 1, 0, 4), "avx512bf16": (7, 1, 0, 5)},
}
# Bits of XCR0: the registers that the operating system saves.
_SAVES_YMM, _SAVES_ZMM = 0x6, 0xE6


@dataclasses.dataclass(frozen=True)
class Argument:
    """One tensor of a call: `offset` bytes after base pointer `base`."""

    base: int
    offset: int
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Call:
    """One kernel call; outputs are the last arguments."""

    kernel: str
    arguments: tuple[Argument, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """A straight list of kernel calls on planned storage.

    Attributes:
        inputs: the model's inputs.
        outputs: the model's outputs.
        calls: what runs, in order.
        copies: outputs that no kernel writes in place: (output's number, where its content stands, bytes).
        planned: bytes of the intermediate tensors.
        bound: bytes of them that are alive at the busiest step.
        scratch: bytes that one kernel may ask for beside its arguments.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    calls: tuple[Call, ...]
    copies: tuple[tuple[int, Argument, int], ...]
    planned: int
    bound: int
    scratch: int = 0

    @property
    def workspace(self) -> int:
        """Bytes of the workspace: the tensors, then the kernels' scratch."""
        return self.planned + self.scratch


@dataclasses.dataclass(frozen=True)
class Identity:
    """What the header says about the build.

    Attributes:
        prefix: starts every name that the library offers.
        kind: the target, x86 or arm.
        cpu: the processor it was built for.
        features: LLVM's names of the features that the processor must have.
        versions: of the tools that built it, for people.
    """

    prefix: str
    kind: str
    cpu: str
    features: tuple[str, ...]
    versions: str


def symbols(prefix: str) -> frozenset[str]:
    """The names that the library offers."""
    return frozenset(f"{prefix}_{n}" for n in ("run", "workspace_size", "check_cpu", "error_text", "version"))


def parameters(program: Program, prefix: str) -> list[str]:
    """A C name for each input and output, in order: unique, no keyword, recognisable."""
    used = {"workspace", f"{prefix}_ALIGNMENT".upper(), f"{prefix}_WORKSPACE_SIZE".upper()}
    names = []
    for port in (*program.inputs, *program.outputs):
        base = re.sub(r"[^A-Za-z0-9]+", "_", port.name).strip("_") or "tensor"
        base = f"t{base}" if base[0].isdigit() else base
        base = f"{base}_" if base in _WORDS or _LIMITS.fullmatch(base) else base
        name, k = base, 2
        while name in used:
            name, k = f"{base}_{k}", k + 1
        used.add(name)
        names.append(name)
    return names


def is_prefix(text: str) -> bool:
    """Whether a text can start the names of the library."""
    return re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", text) is not None and text not in _WORDS


def header(program: Program, identity: Identity, libraries: Sequence[str]) -> str:
    """The text of model.h; `libraries` are the functions of the C library that the kernels call."""
    names = parameters(program, identity.prefix)
    rows = [*_rows("in", program.inputs, names), *_rows("out", program.outputs, names[len(program.inputs) :])]
    maths = [n for n in libraries if not n.startswith(("mem", "__", "getauxval"))]
    return Template(_c_text.HEADER).substitute(
        p=identity.prefix,
        P=identity.prefix.upper(),
        versions=identity.versions,
        rows="\n".join(f" *   {row}" for row in rows),
        architecture=_ARCHITECTURES[identity.kind],
        cpu=identity.cpu,
        features=_wrapped(identity.features),
        link="" if not maths else f" -lm   (it calls {', '.join(maths)})",
        align=ALIGNMENT,
        workspace=program.workspace,
        planned=program.planned,
        scratch=program.scratch,
        bound=program.bound,
        parameters=_declaration(program, names),
    )


def glue(program: Program, identity: Identity, hooks: Iterable[str]) -> str:
    """The text of the C file behind model.h; `hooks` are the runtime functions that the kernels ask for."""
    ports = (*program.inputs, *program.outputs)
    names = [f"p{k}" for k in range(len(ports))]  # the header's names could be names of this file
    shapes, numbers = _shapes(program)
    arguments: list[str] = []
    calls = []
    for call in program.calls:
        calls.append(f"{{__tvm_ffi_{call.kernel}, {len(arguments)}, {len(call.arguments)}}}")
        arguments += [_argument(a, numbers) for a in call.arguments]
    copies = [
        f"  memcpy(bases[{PORTS + len(program.inputs) + k}], bases[{a.base}] + {a.offset}, {size});"
        for k, a, size in program.copies
    ]
    present = [n for n, port in zip(names, ports, strict=True) if 0 not in port.shape]
    present += ["workspace"] if program.workspace else []
    return Template(_c_text.GLUE).substitute(
        p=identity.prefix,
        P=identity.prefix.upper(),
        versions=identity.versions,
        hooks="".join(
            Template(_c_text.HOOKS[h]).substitute(align=ALIGNMENT, mask=ALIGNMENT - 1) for h in sorted(hooks)
        ),
        scratch=_c_text.SCRATCH if program.scratch else "",
        set_scratch=_set_scratch(program) if program.scratch else "",
        kernels="\n".join(_kernel(k) for k in sorted({c.kernel for c in program.calls})),
        shapes=_listed([str(d) for d in shapes] or ["0"]),
        arguments=_listed(arguments or ["{0}"]),
        calls=_listed(calls or ["{0}"]),
        call_count=len(calls),
        most=max([len(c.arguments) for c in program.calls], default=1),
        check_header=_c_text.CHECK_HEADER[identity.kind],
        check=processor_check(identity.kind, identity.features),
        parameters=_declaration(program, names),
        bases=", ".join(f"(char *){n}" for n in (f"{identity.prefix}_constants", "workspace", *names)),
        present="\n".join(f"  if (!{n}) return {identity.prefix.upper()}_ERROR_ARGUMENT;" for n in present),
        bits=" | ".join(f"(uintptr_t){n}" for n in (*names, "workspace")),
        align=ALIGNMENT,
        mask=ALIGNMENT - 1,
        copies="".join(f"{c}\n" for c in copies),
    )


def constants(prefix: str, files: Sequence[str]) -> str:
    """The assembler text that holds the constants: these files, in order."""
    lines = [".section .rodata", f".balign {ALIGNMENT}", f".globl {prefix}_constants", f"{prefix}_constants:"]
    for name in files:
        lines += [f".balign {ALIGNMENT}", f'.incbin "{name}"']
    return "\n".join([*lines, ".byte 0", '.section .note.GNU-stack,"",%progbits', ""])


def item_size(dtype: str) -> int:
    """Bytes of one element.

    Raises:
        KeyError: for a type that has no C form here.
    """
    _TYPES[dtype]
    return max(int(dtype.lstrip("abcdefghijklmnopqrstuvwxyz") or 8) // 8, 1)


def _rows(what: str, ports: Sequence[Port], names: Sequence[str]) -> list[str]:
    rows = []
    for port, name in zip(ports, names, strict=False):
        given = "" if port.name == name else f', "{_comment(port.name)}"'
        shape = "x".join(map(str, port.shape)) or "one value"
        rows.append(f"{what:3} {name}: {port.dtype}{_TYPE_NOTES.get(port.dtype, '')}, {shape}{given}")
    return rows


def _comment(text: str) -> str:
    """A text that cannot end a comment, nor start a line."""
    shown = text.encode("ascii", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f]", "?", shown).replace("*/", "* /").replace("/*", "/ *").replace("\\\n", " ")


def _declaration(program: Program, names: Sequence[str]) -> str:
    ports = [*(("const ", p) for p in program.inputs), *(("", p) for p in program.outputs)]
    words = [f"{const}{_TYPES[p.dtype]} *{n}" for (const, p), n in zip(ports, names, strict=True)]
    return ",\n    ".join([*words, "void *workspace"])


def _wrapped(words: Sequence[str]) -> str:
    lines, line = [], ""
    for word in words:
        if len(line) + len(word) > 100:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return "\n *     ".join([*lines, line])


def _kernel(name: str) -> str:
    return f"int32_t __tvm_ffi_{name}(void *, const Value *, int32_t, Value *);"


def _set_scratch(program: Program) -> str:
    return (
        f"    scratch.next = bases[{WORKSPACE}] + {program.planned};\n"
        f"    scratch.end = scratch.next + {program.scratch};\n"
    )


def _listed(items: Sequence[str]) -> str:
    return "".join(f"  {item},\n" for item in items)


def _shapes(program: Program) -> tuple[list[int], dict[tuple[int, ...], int]]:
    """All shapes in one row, each once, and where each starts."""
    row: list[int] = []
    numbers: dict[tuple[int, ...], int] = {}
    for call in program.calls:
        for argument in call.arguments:
            if argument.shape not in numbers:
                numbers[argument.shape] = len(row)
                row += argument.shape
    return row, numbers


def _argument(argument: Argument, numbers: dict[tuple[int, ...], int]) -> str:
    kind = argument.dtype.rstrip("0123456789")
    bits = argument.dtype[len(kind) :] or "8"
    shape = argument.shape
    return f"{{{argument.offset}u, {numbers[shape]}, {argument.base}, {len(shape)}, {_CODES[kind]}, {bits}}}"


def processor_check(kind: str, features: Iterable[str]) -> str:
    """The text, C and C++, of a function `supported` that asks the processor whether it has the features."""
    text = Template(_c_text.CHECK[kind])
    if kind == "arm":
        words = {16: 0, 26: 0}
        for feature in features:
            word, bit = HWCAP[feature]
            words[word] |= 1 << bit
        return text.substitute(hwcap=hex(words[16]), hwcap2=hex(words[26]))
    return text.substitute(features=_listed(_features(features)), xcr0=hex(_saved(features)))


def _features(features: Iterable[str]) -> list[str]:
    need: dict[tuple[int, int], list[int]] = {(1, 0): [0, 0, 1 << 27, 0]}  # 27: xgetbv may be asked
    for feature in features:
        leaf, subleaf, register, bit = CPUID[feature]
        need.setdefault((leaf, subleaf), [0, 0, 0, 0])[register] |= 1 << bit
    return [
        f"{{{leaf:#x}, {subleaf}, {{{', '.join(f'{m:#x}' for m in masks)}}}}}"
        for (leaf, subleaf), masks in sorted(need.items())
    ]


def _saved(features: Iterable[str]) -> int:
    return _SAVES_ZMM if any(f.startswith("avx512") for f in features) else _SAVES_YMM
