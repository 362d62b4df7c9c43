"""Lookups of 16 float32 entries by AVX2's `vpshufb`, which picks bytes, where the lower half of all entries is zero.

    plane_p[b] = table_p[code(b)]                a code for each of 32 bytes b, one `vpshufb` a byte p of the entries
    value[l]   = (0, 0, plane_2, plane_3)[b(l)]  bytes of the planes side by side, by `vpunpck`, and a shift or a mask

A permutation of lanes finds one of 8 entries for 8 codes, so that 16 take two of them and a choice; here two
instructions find what 32 codes stand for. Entries are so short when they are powers of two, or integers of up to 8
bits, times a step that the scales take over. `vpunpck` puts bytes where it does: in the words they stand where their
values end up in the column and row that they belong to.
"""

from __future__ import annotations

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets.kernels import _loops
from mc_opt.targets.kernels._loops import Buffer, Expr

LANES, BITS = 8, 4
_BYTES = 32
_HIGH_HALF = -(1 << 16)


def tables(codebook: np.ndarray) -> tuple[np.ndarray, np.float32 | None] | None:
    """codebook: at most 16 values -> (int8 [96] for `value`; the step to scale by, if any); None of longer entries.

    Two tables, each twice, for `vpshufb` looks up in each half of a register; then a mask that keeps the upper half of
    each lane. As a constant it would become `vpblendw`, of which older processors do one a cycle, and `vpshufb` and
    `vpunpck` would have to wait for it.
    """
    found = short(codebook)
    if found is None:
        return None
    book, step = np.zeros(1 << BITS, np.float32), found[1]
    book[: codebook.size] = found[0]
    planes = book.view(np.int8).reshape(-1, 4).T[2:]
    mask = np.full(LANES, _HIGH_HALF, np.int32).view(np.int8)
    return np.append(np.tile(planes[:, None], (1, 2, 1)), mask), step


def short(codebook: np.ndarray) -> tuple[np.ndarray, np.float32 | None] | None:
    """codebook: n values -> ([n] whose lower half is zero; the step to scale by, if any); None of longer ones."""
    book = codebook.reshape(-1)
    top = np.abs(book).max()
    if not np.isfinite(book).all():
        return None
    even = (float(book[-1]) - float(book[0])) / max(book.size - 1, 1)
    for step in map(np.float32, (1, top, even)):
        held = _short(book / (step or np.float32(1)))
        # As they are, to the last bit of the largest.
        if np.abs(held * step - book).max() <= np.finfo(np.float32).eps * top:
            return held, None if step == 1 else step
    return None


def _short(values: np.ndarray) -> np.ndarray:
    """The nearest float32 whose lower half is zero."""
    bits = values.view(np.uint32).astype(np.uint64) + (1 << 15)
    return (bits >> np.uint64(16) << np.uint64(16)).astype(np.uint32).view(np.float32)


def in_order(words: np.ndarray) -> np.ndarray:
    """words: int32 [.., 8], with the bytes of the lanes where `value` takes them from.

    Byte 2u + p of lane 4h + i goes to half h, and there behind 8u + 2i + p others.
    """
    lanes = words.view(np.uint8).reshape(-1, 2, 4, 2, 2)
    return np.ascontiguousarray(lanes.transpose(0, 1, 3, 2, 4)).reshape(-1).view(np.int32).reshape(words.shape)


def turn(j: int) -> tuple[int, int]:
    """(run, byte) of code j: the codes of one run are decoded together, each from its own byte of a word."""
    return j % 2, j // 2


def value(held: Buffer, word: Expr, j: int) -> Expr:
    """The entries of code j of each lane: float32x8; held: what `tables` made; word: int32x8 of `in_order`."""
    run, byte = turn(j)
    shifted = T.shift_right(word, _splat(BITS)) if run else word
    index = tirx.reinterpret("int8x32", T.bitwise_and(shifted, _splat(0x0F0F0F0F)))
    low, high, mask = (_loops.load(held, part * _BYTES, lanes=_BYTES) for part in range(3))
    planes = [T.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.pshuf.b", table, index) for table in (low, high)]
    # The lower or the upper half of each half of the planes.
    first = 8 * (byte // 2)
    sides = [half + first + k + part for half in (0, 16) for k in range(8) for part in (0, _BYTES)]
    pair = tirx.reinterpret("int32x8", tirx.Shuffle(planes, sides))
    if byte % 2:
        return tirx.reinterpret("float32x8", T.bitwise_and(pair, tirx.reinterpret("int32x8", mask)))
    return tirx.reinterpret("float32x8", T.shift_left(pair, _splat(16)))


def _splat(value: int) -> Expr:
    return _loops.splat(value, LANES, "int32")
