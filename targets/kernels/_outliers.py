"""Outliers and masks of weights on a GPU: each element finds what is meant for it, and waits for no other.

A processor runs through the list in order (lookup.py). Here tables that are made while building say, for a block of
elements, which values of the list belong into it.
"""

from __future__ import annotations

import numpy as np
from tvm import te, tirx

# Elements that share a row of the table of outliers.
_BLOCK = 256


def outlier_table(indices: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """indices: [n] into [size] -> (place within its block, place in the list), int32 [blocks, most of a block].

    A place within the block of -1 is filling.
    """
    flat = indices.reshape(-1).astype(np.int64)
    order = np.argsort(flat // _BLOCK, kind="stable")
    block = flat[order] // _BLOCK
    counts = np.bincount(block, minlength=-(-size // _BLOCK))
    column = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = (len(counts), max(1, int(counts.max(initial=0))))
    where, source = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    where[block, column] = flat[order] % _BLOCK
    source[block, column] = order
    return where, source


def added(dense: te.Tensor, values: te.Tensor, where: te.Tensor, source: te.Tensor) -> te.Tensor:
    """dense: [size], values: [n], the tables of `outlier_table` -> [size] with the values added."""
    k = te.reduce_axis((0, where.shape[1]), name="k")
    zero = tirx.const(0, dense.dtype)

    def outliers(i: tirx.Var) -> tirx.Expr:
        block = i // _BLOCK
        here = where(block, k) == (i % _BLOCK).astype("int32")
        return te.sum(tirx.Select(here, values(source(block, k)), zero), axis=k)

    total = te.compute(dense.shape, outliers, name="mc_outliers")
    return te.compute(dense.shape, lambda i: dense(i) + total(i), name="add_sparse")


def ones_before(bitmap: np.ndarray) -> np.ndarray:
    """bitmap: uint8 [b] -> int32 [b], the ones in all bytes before each."""
    counts: np.ndarray = np.unpackbits(bitmap[:, None], axis=1).sum(axis=1, dtype=np.int32)
    before: np.ndarray = np.cumsum(counts, dtype=np.int32) - counts
    return before


def spread(bitmap: te.Tensor, before: te.Tensor, values: te.Tensor, *, size: int) -> te.Tensor:
    """bitmap: uint8 [b], before: `ones_before` [b], values: [n] -> [size], zeros where the bitmap has them."""
    last = tirx.const(max(int(values.shape[0]) - 1, 0), "int32")

    def element(i: tirx.Var) -> tirx.Expr:
        byte, bit = bitmap(i // 8).astype("int32"), (i % 8).astype("int32")
        mask = (tirx.const(1, "int32") << bit) - 1
        at = before(i // 8) + tirx.popcount(byte & mask)
        return tirx.if_then_else((byte >> bit & 1) > 0, values(tirx.min(at, last)), tirx.const(0, values.dtype))

    return te.compute((size,), element, name="sparse")
