"""Kernels that only move or decode elements, kept as expressions: a consumer may do their work while it reads.

A GPU's matrix product pads, transposes and decodes on its way into the memory that a block of threads shares; as a
kernel of its own, each would write the whole tensor out and read it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tvm import relax

Function = Callable[..., Any]


class Moves:
    """What made each variable that a move made."""

    def __init__(self) -> None:
        self._made: dict[relax.Var, tuple[Function, Sequence[relax.Expr]]] = {}

    def add(self, result: relax.Var, fn: Function, args: Sequence[relax.Expr]) -> relax.Var:
        """State that `result` is `fn(*args)`, each element from a few of theirs; returns it."""
        self._made[result] = (fn, args)
        return result

    def joined(self, fn: Function, args: Sequence[relax.Expr]) -> tuple[Function, list[relax.Expr]]:
        """`fn(*args)` as an expression that makes itself what moves made of its arguments, and its own arguments."""
        leaves: list[relax.Expr] = []
        makers = [self._maker(argument, leaves) for argument in args]

        def whole(*tensors: Any) -> Any:
            rest = iter(tensors)
            return fn(*(make(rest) for make in makers))

        return whole, leaves

    def _maker(self, argument: relax.Expr, leaves: list[relax.Expr]) -> Callable[[Iterator[Any]], Any]:
        if not isinstance(argument, relax.Var) or argument not in self._made:
            leaves.append(argument)
            return next
        fn, args = self._made[argument]
        makers = [self._maker(a, leaves) for a in args]
        return lambda rest: fn(*(make(rest) for make in makers))
