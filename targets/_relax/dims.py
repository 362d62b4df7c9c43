"""Extents that may be known only at run time: an integer, or an expression of the model's named dimensions.

Two expressions are compared as polynomials of the names, b·s·12·32 = 384·s·b; what is no polynomial (a quotient
that does not come out even, a minimum) counts as a name of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tvm import te, tirx

# An integer, or an expression of a package without types.
Dim = Any
Shape = tuple[Dim, ...]

# What an open extent counts as where work is estimated: a sentence, a few pictures.
NOMINAL = 32

_Terms = dict[tuple[str, ...], int]


@dataclasses.dataclass(frozen=True)
class _Polynomial:
    """Σ coefficient · Π names, and what each name stands for."""

    terms: _Terms
    atoms: Mapping[str, Any]


def is_static(shape: Iterable[Dim]) -> bool:
    """Whether all extents are integers."""
    return all(isinstance(d, int) for d in shape)


def dim(extent: Any) -> Dim:
    """The extent as a Python integer where it is one."""
    return int(extent) if isinstance(extent, int | tirx.IntImm) else extent


def sizes(x: Any) -> list[Dim]:
    """The extents of a Relax expression or of a tensor of a tensor expression."""
    return [dim(s) for s in (x.ty.shape if hasattr(x, "ty") and hasattr(x.ty, "shape") else x.shape)]


def same(a: Dim, b: Dim) -> bool:
    """Whether two extents are equal for every size of the dimensions; False also where that is not known."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return _polynomial(a).terms == _polynomial(b).terms


def same_shape(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    """`same` for all axes."""
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def simple(extent: Dim) -> Dim:
    """The extent in its one form: terms and names in order, an integer where it is one."""
    return extent if isinstance(extent, int) else _expression(_polynomial(extent))


def product(extents: Iterable[Dim]) -> Dim:
    """The product of extents, 1 of none."""
    held = list(extents)
    return math.prod(held) if is_static(held) else simple(math.prod(held[1:], start=held[0]))


def divide(a: Dim, b: Dim) -> Dim:
    """a / b rounded down; without a division where b divides a for every size."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    whole = _quotient(_polynomial(a), _polynomial(b))
    return tirx.floordiv(a, b) if whole is None else _expression(whole)


def tiles(extent: Dim, width: int) -> Dim:
    """How many tiles of `width` cover an extent."""
    return -(-extent // width) if isinstance(extent, int) else divide(simple(extent + (width - 1)), width)


def nominal(extent: Dim) -> int:
    """A number to estimate work with."""
    if isinstance(extent, int):
        return extent
    # A quotient such as the number of tiles counts as one name.
    terms = _polynomial(extent).terms
    return max(1, sum(count * int(NOMINAL ** len(names)) for names, count in terms.items()))


def factor(extent: Dim) -> int:
    """An integer that divides the extent for every size."""
    return abs(extent) if isinstance(extent, int) else math.gcd(*_polynomial(extent).terms.values())


def broadcast(*shapes: Sequence[Dim]) -> Shape:
    """Numpy's broadcasting; an open extent meets itself or 1.

    Raises:
        ValueError: the shapes do not fit, or it depends on the sizes whether they do.
    """
    rank = max((len(s) for s in shapes), default=0)
    result: list[Dim] = []
    for axis in range(-rank, 0):
        extent: Dim = 1
        for shape in shapes:
            if len(shape) >= -axis:
                extent = _met(extent, shape[axis])
        result.append(extent)
    return tuple(result)


def _met(a: Dim, b: Dim) -> Dim:
    if isinstance(b, int) and b == 1:
        return a
    if (isinstance(a, int) and a == 1) or same(a, b):
        return b
    raise ValueError(
        f"extents {text(a)} and {text(b)} meet, and are not known to be equal; give equal dimensions of the inputs one"
        " name with --shape, or fix them"
    )


def text(extent: Dim) -> str:
    """The extent as messages write it."""
    return str(extent) if isinstance(extent, int) else str(extent).replace("T.int64(", "(").replace(" * ", "*")


def is_natural(extent: Dim) -> bool:
    """Whether an extent is never negative: a sum of products of sizes."""
    return extent >= 0 if isinstance(extent, int) else all(c > 0 for c in _polynomial(extent).terms.values())


def _polynomial(extent: Dim) -> _Polynomial:
    if isinstance(extent, int | tirx.IntImm):
        return _Polynomial({(): int(extent)} if int(extent) else {}, {})
    kind = type(extent).__name__
    if kind == "Var":
        return _atom(str(extent.name), extent)
    if kind not in ("Add", "Sub", "Mul", "FloorDiv"):
        return _atom(str(extent), extent)
    a, b = _polynomial(extent.a), _polynomial(extent.b)
    atoms = {**a.atoms, **b.atoms}
    match kind:
        case "Add":
            return _Polynomial(_added(a.terms, b.terms, 1), atoms)
        case "Sub":
            return _Polynomial(_added(a.terms, b.terms, -1), atoms)
        case "Mul":
            result: _Terms = {}
            for left, p in a.terms.items():
                result = _added(result, {tuple(sorted((*left, *names))): q for names, q in b.terms.items()}, p)
            return _Polynomial(result, atoms)
        case _:
            return _quotient(a, b) or _atom(str(extent), extent)


def _atom(name: str, extent: Any) -> _Polynomial:
    return _Polynomial({(name,): 1}, {name: extent})


def _added(a: _Terms, b: _Terms, sign: int) -> _Terms:
    total = dict(a)
    for names, count in b.items():
        total[names] = total.get(names, 0) + sign * count
    return {names: count for names, count in total.items() if count}


def _quotient(a: _Polynomial, b: _Polynomial) -> _Polynomial | None:
    """a / b when b is one term, or a is one term times b; None otherwise."""
    if not b.terms or not a.terms:
        return None if not b.terms else a
    if len(b.terms) > 1:
        ratio = _term_ratio(*max(a.terms.items()), *max(b.terms.items()))
        if ratio is None:
            return None
        scaled: _Terms = {}
        for names, count in b.terms.items():
            scaled[tuple(sorted((*names, *ratio[0])))] = count * ratio[1]
        return _Polynomial(dict([ratio]), a.atoms) if scaled == a.terms else None
    ((names, count),) = b.terms.items()
    parts = [_term_ratio(n, c, names, count) for n, c in a.terms.items()]
    return None if None in parts else _Polynomial(dict(p for p in parts if p is not None), a.atoms)


def _term_ratio(
    names: tuple[str, ...], count: int, divisor: tuple[str, ...], by: int
) -> tuple[tuple[str, ...], int] | None:
    rest = list(names)
    for name in divisor:
        if name not in rest:
            return None
        rest.remove(name)
    return (tuple(rest), count // by) if count % by == 0 else None


def _expression(polynomial: _Polynomial) -> Dim:
    total: Dim = None
    for names, count in sorted(polynomial.terms.items(), key=lambda item: (-len(item[0]), item[0])):
        term: Dim = None
        for name in names:
            atom = polynomial.atoms[name]
            term = atom if term is None else term * atom
        term = count if term is None else (term if count == 1 else term * count)
        total = term if total is None else total + term
    return 0 if total is None else dim(total)


def written(extents: np.ndarray, kind: str) -> te.Tensor:
    """The extents as a tensor, for what computes with them at run time."""
    flat = extents.reshape(-1)

    def element(*i: Any) -> Any:
        at: Any = 0
        for k, extent in zip(i, extents.shape, strict=True):
            at = at * extent + k
        value = zero = tirx.const(0, "int64")
        for k, extent in enumerate(flat):
            value = tirx.Select(at >= k, zero + extent, value)
        return value.astype(kind)

    return te.compute(extents.shape, element, name="sizes")
