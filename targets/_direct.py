"""Main as one function of machine code, which calls its kernels one after the other.

TVM's virtual machine takes some tenths of a microsecond for each call of a kernel, and several where the kernels before
have driven its own data out of the caches: as long as a small kernel runs. A main of fixed sizes needs none of what the
machine is for. The function takes main's inputs, the memory of its outputs, and two blocks of bytes: the constants, and
the workspace in which all else has its place. The machine's main stays beside it, for whoever watches single kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._relax.alignment import ANYWHERE

NAME = "direct"
_NOTHING = {"relax.null_value", "relax.vm.kill_object"}


@dataclass(frozen=True)
class Block:
    """Tensors in one block of bytes: parameters of main, and where each begins."""

    offsets: Mapping[Any, int]
    size: int


def function(main: relax.Function, inputs: int, blocks: Sequence[Block]) -> tirx.PrimFunc | None:
    """The function of a lowered main, or None when main does more than call kernels.

    Args:
        main: a straight list of calls; its parameters are the inputs, the memory of outputs, and what is in blocks.
        inputs: how many of the parameters are inputs, which lie anywhere.
        blocks: the constants and the workspace; each becomes a parameter behind the others, uint8 [size].
    """
    inside = {tensor: (k, offset) for k, block in enumerate(blocks) for tensor, offset in block.offsets.items()}
    outside = [parameter for parameter in main.params if parameter not in inside]
    # Which of the function's parameters a tensor is in, and at which element of it.
    places = {tensor: (len(outside) + k, offset) for tensor, (k, offset) in inside.items()}
    places |= {tensor: (k, 0) for k, tensor in enumerate(outside)}
    calls = []
    for binding in (binding for part in main.body.blocks for binding in part.bindings):
        variable, value = binding.var, binding.value
        source = value.args[0] if _is_view(value) else value
        if _is_nothing(value):
            continue
        if isinstance(source, relax.Var) and source in places:
            places[variable] = places[source]
        elif _is_kernel(value) and places.keys() >= {*value.args}:
            calls.append((value.op.name_hint, [(*places[argument], argument.ty) for argument in value.args]))
        else:
            return None
    with IRBuilder() as builder, T.prim_func():
        T.func_name(NAME)
        kinds = [(math.prod(_shape(tensor.ty)), str(tensor.ty.dtype)) for tensor in outside]
        kinds += [(block.size, "uint8") for block in blocks]
        held = [T.arg(f"a{k}", T.buffer((_long(size),), dtype)) for k, (size, dtype) in enumerate(kinds)]
        for kernel, arguments in calls:
            T.evaluate(tirx.call_cpacked(kernel, *(_tensor(held[k], at, kind) for k, at, kind in arguments)))
    return builder.get().with_attr(ANYWHERE, list(range(inputs)))


def _tensor(memory: Any, at: int, kind: Any) -> Any:
    """A tensor that begins at an element of some memory, made on the stack."""
    shape = _shape(kind)
    return tirx.tvm_stack_make_array(
        tirx.address_of(memory[_long(at)]),
        tirx.tvm_stack_make_shape(*map(_long, shape)),
        0,
        len(shape),
        str(kind.dtype),
        0,
    )


def _long(number: int) -> Any:
    """A constant: weights may be larger than 32 bits can address."""
    return tirx.const(number, "int64")


def _is_kernel(value: Any) -> bool:
    return isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar)


def _is_nothing(value: Any) -> bool:
    """Whether a binding only has a name for what calls without a result give, or says that a view is used no more."""
    return isinstance(value, relax.Call) and getattr(value.op, "name", "") in _NOTHING


def _is_view(value: Any) -> bool:
    return isinstance(value, relax.Call) and getattr(value.op, "global_symbol", "") == "vm.builtin.reshape"


def _shape(kind: Any) -> tuple[int, ...]:
    return tuple(int(extent) for extent in kind.shape)
