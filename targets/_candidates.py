"""The kernels that candidates of tiles would make: taken out of the lowered model, with what they read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, s_tir, tirx

from mc_opt import ir
from mc_opt.targets import _build, _prompt
from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import intrinsics, lower
from mc_opt.targets.kernels import _choice, _general, _schedule
from mc_opt.targets.kernels._loops import SCHEDULED

# The symbol of a kernel that is compiled by itself.
_SYMBOL = "kernel"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A fused kernel before its schedule, and what it is called with.

    Attributes:
        function: the PrimFunc.
        arguments: tensors that the model holds; None for those that hang on its inputs.
    """

    function: Any
    arguments: tuple[Any, ...]

    @property
    def buffers(self) -> list[tuple[tuple[int, ...], str]]:
        """Shape and type of each parameter: the arguments, then the outputs."""
        return [(tuple(int(s) for s in p.ty.shape), str(p.ty.dtype)) for p in self.function.params]

    def inputs(self, like: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Seeded values for the arguments that hang on the model's inputs.

        Args:
            like: those of another candidate for the same shape. Rows that fill up its last tile may differ in number;
                what the model keeps does not hang on them.
        """
        rng = np.random.default_rng(0)
        made = []
        for argument, (shape, dtype) in zip(self.arguments, self.buffers, strict=False):
            if argument is not None:
                continue
            if like is None:
                made.append((rng.standard_normal(shape) * 2).astype(dtype))
                continue
            value, given = np.zeros(shape, dtype), like[len(made)]
            both = tuple(slice(min(a, b)) for a, b in zip(shape, given.shape, strict=True))
            value[both] = given[both]
            made.append(value)
        return made


def kernels(
    path: str, machine: Machine, tiles: Mapping[str, str]
) -> tuple[dict[str, tuple[str, ...]], dict[str, Kernel]]:
    """What each shape of a model offers, the rule's tile first, and one kernel of each as it is with such tiles."""
    model = ir.load_model(path, check="structure")
    if _prompt.chunk_of(model):
        model = _prompt.step_of(model)  # what reads a prompt keeps to the step's panels
    with _build.target_of(machine):
        lowered = lower.lower(model, machine, lambda *_: None, tiles=tiles)
        reader = _Reader(_build.fuse(lowered.module), machine)
        return lowered.choices.offered, dict(reader.kernels())


def compiled(function: Any, machine: Machine) -> tuple[Any, list[str]]:
    """A fused PrimFunc as code in this process, and the notes of its schedule."""
    target = _build.target_of(machine)
    named = function.with_attr("global_symbol", _SYMBOL)
    with target:
        module, notes = _schedule.schedule(tvm.IRModule({_SYMBOL: named}), machine)
        return tvm.compile(module, target=target, tir_pipeline=intrinsics.PIPELINE).jit()[_SYMBOL], notes


class _Reader:
    """Reads main: which kernels it calls, and what it knows of their arguments."""

    def __init__(self, module: tvm.IRModule, machine: Machine) -> None:
        self._functions = {v.name_hint: f for v, f in module.functions.items()}
        self._machine = machine
        self._bindings = {b.var: b.value for block in self._functions["main"].body.blocks for b in block.bindings}
        self._known: dict[Any, Any] = {}

    def kernels(self) -> Iterator[tuple[str, Kernel]]:
        """The first kernel of each shape."""
        found = set()
        for value in self._bindings.values():
            if not _is_kernel(value):
                continue
            function = self._functions[value.args[0].name_hint]
            shape = _shape(function)
            if shape and shape not in found:
                found.add(shape)
                yield shape, Kernel(function, tuple(self._value(a) for a in value.args[1].fields))

    def _value(self, expr: Any) -> Any:
        """The tensor that an expression stands for; None when it hangs on the model's inputs."""
        if isinstance(expr, tvm.ir.GenericConst):
            return expr.value
        if expr not in self._known:
            self._known[expr] = self._computed(self._bindings.get(expr))
        return self._known[expr]

    def _computed(self, value: Any) -> Any:
        """What a kernel makes of constants, as one that decodes a weight."""
        if not _is_kernel(value) or not isinstance(value.ty, relax.TensorType):
            return None
        arguments = [self._value(a) for a in value.args[1].fields]
        if any(a is None for a in arguments):
            return None
        kernel = Kernel(self._functions[value.args[0].name_hint], tuple(arguments))
        (shape, dtype) = kernel.buffers[-1]
        result = tvm.runtime.empty(shape, dtype)
        compiled(kernel.function, self._machine)[0](*arguments, result)
        return result


def _is_kernel(value: Any) -> bool:
    return isinstance(value, relax.Call) and getattr(value.op, "name", "") == "relax.call_tir"


def _shape(function: Any) -> str:
    """What a table calls the shape of a kernel; empty where there is nothing to choose."""
    if function.attrs and _choice.SHAPE in function.attrs:
        return str(function.attrs[_choice.SHAPE])
    if not isinstance(function, tirx.PrimFunc) or (function.attrs and SCHEDULED in function.attrs):
        return ""
    state = s_tir.Schedule(function)
    names = [state.get(b).annotations.get(_choice.SHAPE, "") for b in _general.blocks(state)]
    return next((str(name) for name in names if name), "")
