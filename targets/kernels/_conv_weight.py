"""The weight of a convolution in tiles of output channels: known while building, in codes, or computed by the model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir
from tvm import relax, te, tirx

from mc_opt.targets._relax.emitter import Emitter
from mc_opt.targets.kernels import _decode, _packed, _sliding_streamed, _weights
from mc_opt.targets.kernels._packed import Packed


@dataclasses.dataclass(frozen=True)
class Weight:
    """A convolution's weight.

    Attributes:
        shape: (o, c / groups, *kernel).
        packed: makes [o / columns, *kernel, c / groups, columns] for a number of columns.
        is_constant: whether it is known while building, so that tiles can be measured with it.
        codes: makes the same in codes, for a kernel that decodes them by itself, given also for how many positions it
            does; of one input channel without the axis of channels. None where there are none for it.
        stored: how they are stored, in words: `4 bits, groups of 64`; empty without any.
    """

    shape: tuple[int, ...]
    packed: Callable[[int], relax.Expr]
    is_constant: bool = False
    codes: Callable[[int, int], Packed] | None = None
    stored: str = ""


def constant_weight(
    e: Emitter, value: onnx_ir.Value, shape: Sequence[int], ordered: Callable[[np.ndarray], np.ndarray]
) -> Weight | None:
    """The weight that `ordered` makes of a constant or packed value; None when the model computes it, or its codes
    do not allow the order.
    """

    def pack(array: np.ndarray, columns: int, unit: int = 1) -> np.ndarray:
        return _pack(ordered(array), columns=columns, unit=unit)

    def packed(columns: int) -> relax.Expr:
        expr = _weights.packed(e, value, functools.partial(pack, columns=columns))
        assert expr is not None  # `fits` said so
        return expr

    def codes(columns: int, positions: int) -> Packed:
        unit = _sliding_streamed.unit(terms[0].bits, shape[1], positions, e.machine)

        def in_rows(array: np.ndarray) -> np.ndarray:
            tiles = pack(array, columns, unit)
            return tiles if shape[1] > 1 else tiles.reshape(*tiles.shape[:-2], columns)

        made = _packed.arranged(e, value, in_rows)
        assert made is not None  # `fits` said so
        return made

    if e.constant(value) is not None:
        return Weight(tuple(shape), packed, is_constant=True)
    terms = _decode.terms(e, value)
    if not terms or not all(_decode.fits(t, functools.partial(pack, columns=1)) for t in terms):
        return None
    if not _packed.takes(e, terms):
        return Weight(tuple(shape), packed, is_constant=True)
    return Weight(tuple(shape), packed, is_constant=True, codes=codes, stored=_packed.described(terms))


def computed_weight(e: Emitter, weight: relax.Expr) -> Weight:
    """A weight [o, c / groups, *kernel] that the model computes, packed at run time."""
    shape = tuple(int(s) for s in weight.ty.shape)
    return Weight(shape, lambda columns: e.moved(functools.partial(_pack_te, columns=columns), weight, name="pack"))


def _pack(weight: np.ndarray, *, columns: int, unit: int = 1) -> np.ndarray:
    """weight: [o, i, *kernel] -> [o / columns, *kernel, i, columns], i filled up to a multiple of `unit`."""
    filled = _weights.pad_to(_weights.pad_to(weight, 0, columns), 1, unit)
    tiles = filled.reshape(-1, columns, *filled.shape[1:])
    rank = weight.ndim - 2
    return np.ascontiguousarray(tiles.transpose(0, *range(3, 3 + rank), 2, 1))


def _pack_te(weight: te.Tensor, *, columns: int) -> te.Tensor:
    """`_pack` for a weight that the model computes."""
    o, i, *kernel = (int(s) for s in weight.shape)
    tiles = -(-o // columns)

    def element(t: Any, *rest: Any) -> Any:
        *k, c, column = rest
        row = t * columns + column
        return tirx.if_then_else(row < o, weight(row, c, *k), tirx.const(0, weight.dtype))

    return te.compute((tiles, *kernel, i, columns), element, name="pack")
