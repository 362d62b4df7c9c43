"""What the compiled main is given once, when it is loaded: its constants, and places for what it computes on the way.

A run then makes hardly more calls than its kernels. The constants leave the library for a file of their own, so that a
loader reads them to where it wants them, and holds them once. The library's function `constants` says what stands where
in the file, its function `places` makes the tensors that no caller gets to see; both are main's last arguments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

from mc_opt.targets._plan import ALIGNMENT

_ALLOCATIONS = ("relax.vm.alloc_storage", "relax.vm.alloc_tensor")
_VIEW = "vm.builtin.reshape"
_KILL = "relax.vm.kill_object"


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


def bind(constants: Constants) -> tvm.transform.Pass:
    """A pass behind all that lowers calls: it makes parameters of main of what main is given once.

    Args:
        constants: collects main's.
    """

    def run(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
        names = {v.name_hint: v for v in module.functions}
        taken = sorted({"constants", "places"} & set(names))
        assert not taken, f"a kernel is called {taken[0]}, as a function of every artefact is"
        reader = _Reader(module[names["main"]], constants)
        main = reader.main()
        module = module.clone()
        module[names["main"]] = main
        module[tvm.ir.GlobalVar("constants")] = _function([], reader.rows)
        module[tvm.ir.GlobalVar("places")] = _function(reader.made, reader.places())
        return module

    return tvm.transform.module_pass(run, opt_level=0, name="Bind")


class _Reader:
    """Takes main apart: what is given once, and what stays."""

    def __init__(self, main: Any, constants: Constants) -> None:
        self._main = main
        self._constants = constants
        self._bindings = [b for block in main.body.blocks for b in block.bindings]
        self._returned = _returned(main.body.body, {b.var: b.value for b in self._bindings})
        self._parameters: dict[tuple[int, tuple[int, ...], str], Any] = {}
        self._used: set[Any] = set()
        self.rows: list[Any] = []
        self.made: list[Any] = []

    def main(self) -> Any:
        """Main with its last parameters."""
        owned: set[Any] = set()
        kept = []
        for binding in self._bindings:
            if self._is_made_once(binding, owned):
                owned.add(binding.var)
                self.made.append(binding)
            elif not _kills(binding.value, owned):
                kept.append(relax.VarBinding(binding.var, self._given(binding.value, owned)))
        parameters = [*self._main.params, *self._parameters.values(), *self.places()]
        body = relax.SeqExpr([relax.BindingBlock(kept)], self._main.body.body)
        return relax.Function(parameters, body, self._main.ret_ty, self._main.is_pure, self._main.attrs)

    def places(self) -> list[Any]:
        """The variables of tensors that main still speaks of."""
        return [b.var for b in self.made if b.var in self._used]

    def _is_made_once(self, binding: Any, owned: set[Any]) -> bool:
        """Whether a binding allocates, or views, memory of a fixed size that does not leave main."""
        value = binding.value
        if binding.var in self._returned or _callee(value) not in (*_ALLOCATIONS, _VIEW):
            return False
        return all(a in owned if isinstance(a, relax.Var) else _is_fixed(a) for a in value.args)

    def _given(self, value: Any, owned: set[Any]) -> Any:
        """A binding's value with parameters for its constants."""
        if isinstance(value, relax.Tuple):
            return relax.Tuple([self._argument(a, owned) for a in value.fields])
        if not isinstance(value, relax.Call):
            return value
        arguments = [self._argument(a, owned) for a in value.args]
        return relax.Call(value.op, arguments, value.attrs, value.ty_args, ret_ty=value.ty)

    def _argument(self, argument: Any, owned: set[Any]) -> Any:
        if isinstance(argument, relax.Var) and argument in owned:
            self._used.add(argument)
        if not isinstance(argument, tvm.ir.GenericConst) or not isinstance(argument.value, tvm.runtime.Tensor):
            return argument
        array = argument.value.numpy()
        row = (self._constants.offset(array), array.shape, str(array.dtype))
        if row not in self._parameters:
            self._parameters[row] = relax.Var(f"constant_{len(self.rows)}", argument.ty)
            self.rows.append(relax.Tuple([tvm.ir.StringImm(row[2]), relax.ShapeExpr(row[1]), relax.ShapeExpr(row[:1])]))
        return self._parameters[row]


def _returned(result: Any, values: dict[Any, Any]) -> set[Any]:
    """The variables whose memory a caller may hold after the call: what leads to the result, views included."""
    found: set[Any] = set()
    waiting = [result]
    while waiting:
        expr = waiting.pop()
        if isinstance(expr, relax.Var) and expr not in found:
            found.add(expr)
            waiting.extend([values[expr]] if expr in values else [])
        elif isinstance(expr, relax.Tuple):
            waiting.extend(expr.fields)
        elif isinstance(expr, relax.TupleGetItem):
            waiting.append(expr.tuple_value)
        elif isinstance(expr, relax.Call):
            waiting.extend(expr.args)
    return found


def _callee(value: Any) -> str:
    """The name of what a binding calls that is no kernel; else an empty text."""
    if not isinstance(value, relax.Call):
        return ""
    if isinstance(value.op, relax.ExternFunc):
        return str(value.op.global_symbol)
    return value.op.name if isinstance(value.op, tvm.ir.Op) else ""


def _is_fixed(argument: Any) -> bool:
    if isinstance(argument, relax.ShapeExpr):
        return all(isinstance(d, tvm.tirx.IntImm) for d in argument.values)
    return True


def _kills(value: Any, owned: set[Any]) -> bool:
    return _callee(value) == _KILL and value.args[0] in owned


def _function(bindings: Sequence[Any], fields: Sequence[Any]) -> Any:
    """A function without arguments that returns the fields, whose tuples get names of their own."""
    bound, named = list(bindings), list[Any]()
    for field in fields:
        if isinstance(field, relax.Tuple):
            bound.append(relax.VarBinding(relax.Var(f"row_{len(named)}", field.ty), field))
            field = bound[-1].var
        named.append(field)
    result = relax.Tuple(named)
    last = relax.Var("result", result.ty)
    block = relax.BindingBlock([*bound, relax.VarBinding(last, result)])
    return relax.Function([], relax.SeqExpr([block], last), result.ty, is_pure=False)
