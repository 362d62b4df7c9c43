"""What the compiled main is given beside its inputs: its constants, places for what it computes, and for its outputs.

A run then makes hardly more calls than its kernels. The constants leave the library for a file of their own, so that a
loader reads them to where it wants them, and holds them once; tensors of fixed sizes that no caller gets to see have
their places in one workspace. The library's functions `constants` and `places` return rows of (type, shape, offset),
which say what stands where in the file and in the workspace: main's last arguments, in this order, given once. Rows of
`written` are of (type, shape, number of an output): memory that main's arguments behind the inputs are views of, as
large as the largest. Rows of `outputs`, a row each, say what the outputs are there. Without rows main returns its
outputs as tensors of their own: an open size is not known before, a state may be an input, and so may an output.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

from mc_opt.targets import _direct, _plan, _prompt
from mc_opt.targets._plan import ALIGNMENT, Lifetime
from mc_opt.targets._relax.alignment import ANYWHERE

_KILL = "relax.vm.kill_object"
# What the virtual machine checks of its inputs at each run; loaders have checked inputs of fixed sizes before.
_CHECKS = {"vm.builtin.check_tensor_info", "vm.builtin.match_shape"}

Row = tuple[str, tuple[int, ...], int]


class Constants:
    """The constants of a main, each content once, in the order in which they are used first."""

    def __init__(self) -> None:
        """Begin without any."""
        self._arrays: list[np.ndarray] = []
        self._offsets: dict[bytes, int] = {}
        self._end = 0

    def offset(self, array: np.ndarray) -> int:
        """Where the bytes of an array stand in the file."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        key = hashlib.sha256(data.data).digest()
        if key not in self._offsets:
            self._offsets[key] = self._end
            self._arrays.append(data)
            self._end += -(-data.nbytes // ALIGNMENT) * ALIGNMENT
        return self._offsets[key]

    def write(self, path: Path) -> None:
        """Write the file."""
        with path.open("wb") as file:
            for data in self._arrays:
                file.write(data.data)
                file.write(bytes(-data.nbytes % ALIGNMENT))


def bind(constants: Constants, *, has_states: bool) -> tvm.transform.Pass:
    """A pass behind all that lowers calls: it makes parameters of main of what main is given once.

    A second function, which reads prompts, is treated alike; the names of its functions begin with its own.

    Args:
        constants: collects what both use.
        has_states: whether outputs are inputs of the next run.
    """

    def add(module: tvm.IRModule, name: str, function: Any) -> None:
        taken = {v.name_hint for v in module.functions}
        assert name not in taken, f"a kernel is called {name}, as every artefact's function"
        module[tvm.ir.GlobalVar(name)] = function

    def run(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
        names = {v.name_hint: v for v in module.functions}
        module = module.clone()
        for name, prefix in (("main", ""), (_prompt.NAME, f"{_prompt.NAME}_")):
            if name not in names:
                continue
            given, made, written = (_Parameters(kind) for kind in ("constant", "place", "out"))
            main = _Main(module[names[name]], takes_outputs=not has_states)
            bound = module[names[name]] = main.bound(constants, given, made, written)
            for kernel, anywhere in main.anywhere().items():
                module[kernel] = module[kernel].with_attr(ANYWHERE, sorted(anywhere))
            tables: dict[str, Iterable[Row]] = {
                "constants": given.variables,
                "places": made.variables,
                "written": written.variables,
            }
            tables["outputs"] = main.outputs()
            for table, rows in tables.items():
                add(module, prefix + table, _table(rows))
            if main.is_fixed() and (direct := _direct.function(bound, main.inputs, [given.block(), made.block()])):
                add(module, _direct.NAME, direct)
        return module

    return tvm.transform.module_pass(run, opt_level=0, name="Bind")


class _Parameters:
    """New parameters of main, one for each row that is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.variables: dict[Row, Any] = {}

    def variable(self, row: Row) -> Any:
        """The parameter of a row."""
        if row not in self.variables:
            kind = relax.TensorType(row[1], row[0])
            self.variables[row] = relax.Var(f"{self._name}_{len(self.variables)}", kind)
        return self.variables[row]

    def block(self) -> _direct.Block:
        """The rows as tensors in one block of bytes."""
        size = max((offset + _size(variable) for (_, _, offset), variable in self.variables.items()), default=0)
        return _direct.Block({variable: offset for (_, _, offset), variable in self.variables.items()}, size)


def _table(rows: Iterable[Row]) -> Any:
    """A function without arguments that returns rows."""
    bindings = list[Any]()
    for kind, shape, offset in rows:
        value = relax.Tuple([tvm.ir.StringImm(kind), relax.ShapeExpr(shape), relax.ShapeExpr([offset])])
        bindings.append(relax.VarBinding(relax.Var(f"row_{len(bindings)}", value.ty), value))
    found = relax.Tuple([binding.var for binding in bindings])
    result = relax.Var("rows", found.ty)
    block = relax.BindingBlock([*bindings, relax.VarBinding(result, found)])
    return relax.Function([], relax.SeqExpr([block], result), found.ty, is_pure=False)


class _Main:
    """The lowered main, a straight list of bindings, taken apart."""

    def __init__(self, main: Any, *, takes_outputs: bool) -> None:
        self._main = main
        self._bindings = [b for block in main.body.blocks for b in block.bindings]
        values = {b.var: b.value for b in self._bindings}
        result = values.get(main.body.body, main.body.body)
        returned = list(result.fields) if isinstance(result, relax.Tuple) else [result]
        # Tensors that main does not allocate and their views, each with the tensor whose memory it is.
        self._owned = self._given(set())
        self._returned = returned if takes_outputs and all(part in self._owned for part in returned) else []
        if not self._returned:
            self._owned = self._given(_leading_to(main.body.body, values))
        # Of those the outputs' memory, by number.
        self._numbers = {tensor: k for k, tensor in enumerate(dict.fromkeys(map(self._owned.get, self._returned)))}
        calls = [(b.var, b.value) for b in self._bindings if isinstance(b.value, relax.Call)]
        others = {v.args[0] for var, v in calls if _callee(v) == "relax.vm.alloc_tensor" and var not in self._owned}
        storages = [var for var, v in calls if _callee(v) == "relax.vm.alloc_storage"]
        self._dropped = {*self._owned, *(v for v in storages if v not in others)}
        self._offsets = self._plan()

    def _given(self, outside: set[Any]) -> dict[Any, Any]:
        """The tensors of fixed sizes, and their views, that are not outside."""
        owned: dict[Any, Any] = {}
        for binding in self._bindings:
            variable, value = binding.var, binding.value
            match _callee(value):
                case "relax.vm.alloc_tensor" if variable not in outside and _is_fixed(value.args[2]):
                    owned[variable] = variable
                case "vm.builtin.reshape" if variable not in outside and _is_fixed(value.args[1]):
                    if value.args[0] in owned:
                        owned[variable] = owned[value.args[0]]
        return owned

    @property
    def inputs(self) -> int:
        """How many parameters main had before."""
        return len(self._main.params)

    def is_fixed(self) -> bool:
        """Whether main takes its outputs, and all of its inputs have fixed sizes."""
        return bool(self._returned) and all(_is_fixed(p.ty.shape) for p in self._main.params)

    def outputs(self) -> list[Row]:
        """What the outputs are in their memory; none when main returns them."""
        return [(*_type(variable), self._numbers[self._owned[variable]]) for variable in self._returned]

    def anywhere(self) -> dict[Any, set[int]]:
        """By kernel the arguments that callers may have put anywhere: inputs, where nothing is written to them."""
        if not self._returned:
            return {}
        inputs = set(self._main.params)
        found: dict[Any, set[int]] = {}
        for binding in self._bindings:
            value = binding.value
            if _callee(value) == "vm.builtin.reshape" and value.args[0] in inputs:
                inputs.add(binding.var)
            if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
                found.setdefault(value.op, set()).update(k for k, a in enumerate(value.args) if a in inputs)
        return {kernel: places for kernel, places in found.items() if places}

    def bound(self, constants: Constants, given: _Parameters, made: _Parameters, written: _Parameters) -> Any:
        """Main with its new parameters."""

        def argument(expr: Any) -> Any:
            if isinstance(expr, relax.Var) and expr in self._owned:
                tensor = self._owned[expr]
                if tensor in self._numbers:
                    return written.variable((*_type(expr), self._numbers[tensor]))
                return made.variable((*_type(expr), self._offsets[tensor]))
            if isinstance(expr, tvm.ir.GenericConst) and isinstance(expr.value, tvm.runtime.Tensor):
                array = expr.value.numpy()
                return given.variable((str(array.dtype), array.shape, constants.offset(array)))
            return expr

        kept = []
        unneeded = _CHECKS if all(_is_fixed(p.ty.shape) for p in self._main.params) else set()
        for binding in self._bindings:
            value = binding.value
            kills = _callee(value) == _KILL and value.args[0] in self._dropped
            if binding.var not in self._dropped and not kills and _callee(value) not in unneeded:
                kept.append(relax.VarBinding(binding.var, _replaced(value, argument)))
        parameters = [*self._main.params, *(v for new in (written, given, made) for v in new.variables.values())]
        result = self._main.body.body
        if self._returned:  # as little as main may return
            kept = [binding for binding in kept if binding.var != result]
            result = tvm.tirx.IntImm("int64", 0)
        body = relax.SeqExpr([relax.BindingBlock(kept)], result)
        return relax.Function(parameters, body, result.ty, self._main.is_pure, self._main.attrs)

    def _plan(self) -> dict[Any, int]:
        """Where each tensor stands in the workspace: two that are needed at the same step stand apart."""
        tensors = {tensor for tensor in self._owned.values() if tensor not in self._numbers}
        steps: dict[Any, list[int]] = {v: [] for v in self._owned if v in tensors}
        behind: dict[Any, set[Any]] = {v: {tensor} & tensors for v, tensor in self._owned.items()}
        for step, binding in enumerate(self._bindings):
            if _callee(binding.value) == _KILL:
                continue
            used = {tensor for part in _parts(binding.value) for tensor in behind.get(part, ())}
            for tensor in used:
                steps[tensor].append(step)
            behind.setdefault(binding.var, used)  # a tuple, or another name
        lives = [Lifetime(_size(v), min(at, default=0), max(at, default=0)) for v, at in steps.items()]
        return dict(zip(steps, _plan.plan(lives).offsets, strict=True))


def _leading_to(result: Any, values: dict[Any, Any]) -> set[Any]:
    """The variables whose memory a caller may hold after the call: what leads to the result, views included."""
    found: set[Any] = set()
    waiting = [result]
    while waiting:
        expr = waiting.pop()
        if expr in found:
            continue
        if isinstance(expr, relax.Var):
            found.add(expr)
        waiting.extend(_parts(values.get(expr, expr) if isinstance(expr, relax.Var) else expr))
    return found


def _parts(value: Any) -> list[Any]:
    """What an expression is made of."""
    match value:
        case relax.Tuple():
            return list(value.fields)
        case relax.TupleGetItem():
            return [value.tuple_value]
        case relax.Call():
            return list(value.args)
        case relax.Var():
            return [value]
        case _:
            return []


def _replaced(value: Any, argument: Callable[[Any], Any]) -> Any:
    """An expression with its parts replaced."""
    match value:
        case relax.Tuple():
            return relax.Tuple([argument(part) for part in value.fields])
        case relax.TupleGetItem():
            return relax.TupleGetItem(argument(value.tuple_value), value.index)
        case relax.Call():
            arguments = [argument(part) for part in value.args]
            return relax.Call(value.op, arguments, value.attrs, value.ty_args, ret_ty=value.ty)
        case _:
            return argument(value)


def _callee(value: Any) -> str:
    """The name of what a binding calls that is no kernel; else an empty text."""
    if not isinstance(value, relax.Call):
        return ""
    if isinstance(value.op, relax.ExternFunc):
        return str(value.op.global_symbol)
    return value.op.name if isinstance(value.op, tvm.ir.Op) else ""


def _is_fixed(shape: Any) -> bool:
    return isinstance(shape, relax.ShapeExpr) and all(isinstance(d, tvm.tirx.IntImm) for d in shape.values)


def _type(variable: Any) -> tuple[str, tuple[int, ...]]:
    return str(variable.ty.dtype), tuple(int(d) for d in variable.ty.shape)


def _size(variable: Any) -> int:
    kind, shape = _type(variable)
    return math.prod(shape) * np.dtype(kind).itemsize
