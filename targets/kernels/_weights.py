"""Weights in the order in which a kernel reads them: packed while building, or by a kernel when they are dynamic."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import onnx_ir
from tvm import relax

from mc_opt.targets._relax.emitter import Emitter
from mc_opt.targets.kernels import _decode

# weight [..] -> [tiles, .., columns]: a transposition with zero padding, for arrays of any type.
Pack = Callable[[np.ndarray], np.ndarray]


def packed(e: Emitter, value: onnx_ir.Value, pack: Pack, *, told: bool = False) -> relax.Expr | None:
    """The weight in the kernel's order, dense: a constant, or decoded from its codes by a kernel of its own.

    Args:
        e: the emitter.
        value: the weight.
        pack: puts an array of any type into the kernel's order.
        told: whether the report says already that 8-bit activations are not for this weight.

    Returns:
        None for a weight that is computed by the model.
    """
    array = e.constant(value)
    if array is not None:
        return e.weight(pack(array))
    parts = [_decode.tiled(e, lookup, pack) for lookup in _decode.terms(e, value)]
    if not parts or any(part is None for part in parts):
        return None
    if not told:
        note_float32(e, value)
    return functools.reduce(functools.partial(_decode.added, e), parts)


def note_float32(e: Emitter, value: onnx_ir.Value) -> None:
    """Say in the report that 8-bit activations are not for a weight."""
    if e.machine.activations == "int8":
        e.note_fallback(f"activations=int8: weight {value.name!r} is decoded and runs in float32: no matrix product")


def pad_to(array: np.ndarray, axis: int, multiple: int) -> np.ndarray:
    """The array with zeros appended along an axis up to a multiple."""
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return np.pad(array, widths)


def pack_columns(matrix: np.ndarray, columns: int) -> np.ndarray:
    """matrix: [k, n] -> [n / columns, k, columns], the last tile filled up with zeros."""
    k = matrix.shape[0]
    padded = pad_to(matrix, 1, columns)
    return np.ascontiguousarray(padded.reshape(k, -1, columns).transpose(1, 0, 2))
