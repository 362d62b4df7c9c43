"""Lookups of at most 16 float32 entries by NEON's `tbl`, which picks bytes: a codebook is four tables, one a byte.

    plane_p[l, b] = table_p[code(l, b)]          four codes a lane l, one `tbl` a byte p of the entries
    value_b[l]    = (plane_0 .. plane_3)[l, b]   a transposition of four by four bytes in each lane, by `trn`

Four tables and eight transpositions give four vectors; two and six do when the lower bytes of all entries are zero, as
those of powers of two are.
"""

from __future__ import annotations

import numpy as np
from tvm import te, tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets.kernels import _loops
from mc_opt.targets.kernels._loops import Buffer, Expr

LANES = 4
# Bits of a code that fit: at 5 a table would be two registers.
MOST_BITS = 4
_ENTRIES = 16
_BYTES = "int8x16"


def tables(codebook: np.ndarray) -> np.ndarray:
    """codebook: at most 16 float32 values in any shape -> int8 [64]: the lowest bytes of all entries, the next, ..."""
    full = np.zeros(_ENTRIES, np.float32)
    full[: codebook.size] = codebook.reshape(-1)
    return np.ascontiguousarray(full.view(np.int8).reshape(_ENTRIES, 4).T).reshape(-1)


def turn(j: int, bits: int) -> tuple[int, int]:
    """(run, byte) of code j: the codes of one run are decoded together, each from its own byte of a word."""
    return (j // 4, j % 4) if bits == 3 else (j * bits % 8, j * bits // 8)


def is_short(made: np.ndarray) -> bool:
    """Whether the lower two bytes of all entries are zero, given their tables."""
    return not made[: 2 * _ENTRIES].any()


def entry(held: te.Tensor, code: Expr) -> Expr:
    """The entry of one code: float32."""
    low, *others = (held(p * _ENTRIES + code).astype("uint8").astype("uint32") for p in range(4))
    for p, byte in enumerate(others, 1):
        low = low | byte << tirx.const(8 * p, "uint32")
    return tirx.reinterpret("float32", low)


def value(held: Buffer, word: Expr, j: int, bits: int, *, is_short: bool) -> Expr:
    """The entries of code j of each lane: float32x4.

    held: what `tables` made; word: int32x4; is_short: that the lower two bytes of all entries are zero.
    """
    run, byte = turn(j, bits)
    index = tirx.reinterpret(_BYTES, _codes(word, run, bits))
    low = _loops.splat(0, 8, "int16") if is_short else _pair(held, index, 0, odd=byte % 2 == 1)
    high = _pair(held, index, 2, odd=byte % 2 == 1)
    return tirx.reinterpret("float32x4", _transposed(low, high, 8, odd=byte >= 2))


def _codes(word: Expr, run: int, bits: int) -> Expr:
    """The codes of a run, one in each byte of int32x4."""
    if bits != 3:
        return _masked(_shifted(word, run), ((1 << bits) - 1) * 0x01010101)
    # Codes of 3 bits do not stand in bytes: move the upper two of four to the upper half, then the upper of each two.
    word = _shifted(word, 12 * run)
    word = T.bitwise_or(_masked(word, 0x3F), _masked(_raised(word, 10), 0x3F0000))
    return T.bitwise_or(_masked(word, 0x070007), _masked(_raised(word, 5), 0x07000700))


def _pair(held: Buffer, index: Expr, first: int, *, odd: bool) -> Expr:
    """Two successive bytes of the entries for the codes in the even (or odd) bytes of `index`: int16x8."""
    planes = [
        T.call_llvm_pure_intrin(
            _BYTES, "llvm.aarch64.neon.tbl1.v16i8", _loops.load(held, p * _ENTRIES, lanes=_ENTRIES), index
        )
        for p in (first, first + 1)
    ]
    return tirx.reinterpret("int16x8", _transposed(planes[0], planes[1], _ENTRIES, odd=odd))


def _transposed(a: Expr, b: Expr, count: int, *, odd: bool) -> Expr:
    """The even (or odd) elements of two vectors, in turn: `trn1` (or `trn2`)."""
    return tirx.Shuffle([a, b], [k + part + odd for k in range(0, count, 2) for part in (0, count)])


def _shifted(word: Expr, by: int) -> Expr:
    return word if by == 0 else T.shift_right(word, _loops.splat(by, LANES, "int32"))


def _raised(word: Expr, by: int) -> Expr:
    return T.shift_left(word, _loops.splat(by, LANES, "int32"))


def _masked(word: Expr, mask: int) -> Expr:
    return T.bitwise_and(word, _loops.splat(mask, LANES, "int32"))
