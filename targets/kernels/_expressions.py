"""Expressions of TVM taken apart and put together again, with other variables and other reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tvm import tirx

from mc_opt.targets._relax import dims

Expr = Any

_BINARY = {"Add", "Sub", "Mul", "Div", "Mod", "FloorDiv", "FloorMod", "Min", "Max"}
_BINARY |= {"EQ", "NE", "LT", "LE", "GT", "GE", "And", "Or"}
_BINARY |= {"BitwiseAnd", "BitwiseOr", "BitwiseXor", "LShift", "RShift"}
_LEAVES = {"Var", "SizeVar", "IntImm", "FloatImm", "StringImm"}


def parts(expr: Expr) -> list[Expr]:
    """The operands of an expression, in order; ValueError for a kind that no tensor expression has."""
    kind = type(expr).__name__
    if kind in _BINARY:
        return [expr.a, expr.b]
    match kind:
        case _ if kind in _LEAVES:
            return []
        case "Not":
            return [expr.a]
        case "Cast":
            return [expr.value]
        case "Call":
            return list(expr.args)
        case "TensorLoad":
            return list(expr.indices)
        case "Select":
            return [expr.condition, expr.true_value, expr.false_value]
        case "Let":
            return [expr.value, expr.body]
        case _:
            raise ValueError(f"an expression of the kind {kind}")


def is_load(expr: Expr) -> bool:
    """Whether an expression is an element of a buffer."""
    return type(expr).__name__ == "TensorLoad"


def walk(expr: Expr) -> Iterator[Expr]:
    """The expression and everything in it."""
    yield expr
    for part in parts(expr):
        yield from walk(part)


def rebuilt(expr: Expr, variables: Mapping[Any, Expr], replace: Callable[[Expr], Expr | None] = lambda _: None) -> Expr:
    """The expression with other variables; where `replace` gives something for a part, that stands for it."""
    other = replace(expr)
    if other is not None:
        return other
    kind = type(expr).__name__
    if kind in ("Var", "SizeVar"):
        return variables.get(expr, expr)
    old = parts(expr)
    new = [rebuilt(part, variables, replace) for part in old]
    if all(a is b or a.same_as(b) for a, b in zip(new, old, strict=True)):
        return expr
    if kind in _BINARY or kind in ("Not", "Select"):
        return type(expr)(*new)
    match kind:
        case "Cast":
            return tirx.Cast(str(expr.ty), new[0])
        case "Call":
            return type(expr)(expr.op, new, attrs=expr.attrs, ret_ty=expr.ty)
        case "TensorLoad":
            return tirx.BufferLoad(expr.source, new)
        case _:  # Let: the variable stays
            return tirx.Let(expr.var, *new)


def pairs(buffer: Any, indices: Sequence[Expr], row: Any, column: Any, width: int) -> int:
    """How often an element is found by row and column of an image in successive places, so that both count as one."""
    places = zip(indices, indices[1:], buffer.shape[1:], strict=False)
    return sum(a.same_as(row) and b.same_as(column) and dims.same(dims.dim(n), width) for a, b, n in places)
