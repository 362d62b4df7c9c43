"""Packed weights as kernels for activations of 8 bits take them: codes by fours of rows, levels rounded to bytes.

Codes of more than four bits take the room of their levels, which stand in their places.

w[k, n] ≈ step · scale[g(k), n] · level[code[k, n]],   level = round(codebook / step), -128 <= level <= 127

Without VNNI levels lose the powers of two that they have in common, and `step` gains them: their products are as small
as can be, and the sums are the very floats that they are with VNNI.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax.emitter import LookupWeight
from mc_opt.targets.kernels import _decode, _dot, _loops, _weights
from mc_opt.targets.kernels._decode import Pack
from mc_opt.targets.kernels._dot import Dot
from mc_opt.targets.kernels._loops import Buffer, Expr

# Bytes that rows are filled up to: a register of the widest vectors.
BYTES = 64
# Writes sums of products: (a vector of them in float32, row, first column, lanes).
Finish = Callable[[Expr, Expr, Expr, int], None]
# Bits of the field of a code in a byte.
_FIELD = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
_LEVEL = 8
# Sums of 255 · 127 stay below 2^31.
_MOST_TERMS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A weight [k, n] in bytes.

    Attributes:
        dot: the instructions that multiply.
        words: int32 [t, G · run / unit, V, lanes]: plane p of byte q of a word is row word · unit + p · 4 + q.
        levels: int8 [4 · lanes], the levels repeated: a permutation finds them whatever stands above a code; or zeros,
            where a field of eight bits holds a level: as it is in the widest vectors, raised in others.
        raised: what is added to levels when they are multiplied.
        pairs: products by such whose sums are added in 16 bits, where there is no VNNI.
        scale: float32 [t, G, lanes · V], times the step of the levels.
        vectors: of columns that are multiplied at a time; the V of a tile of words, or a part of them.
        run: rows of a group; a single one is filled up to whole registers of bytes.
        field: bits of a code in a byte.
        error: of the levels, √(Σ (w - ŵ)² / Σ w²) without the scales.
    """

    dot: Dot
    words: np.ndarray
    levels: np.ndarray
    raised: int
    pairs: int
    scale: np.ndarray
    vectors: int
    run: int
    field: int
    error: float

    @property
    def unit(self) -> int:
        """Rows in a word."""
        return 4 * self.planes

    @property
    def planes(self) -> int:
        """Codes in a byte."""
        return 8 // self.field

    @property
    def table(self) -> np.ndarray:
        """The levels as they are multiplied: uint8 [4 · lanes]."""
        return (self.levels.astype(np.int16) + self.raised).astype(np.uint8)

    @property
    def groups(self) -> int:
        """Groups of rows."""
        return int(self.scale.shape[1])

    def at(self, t: Expr, v: int) -> tuple[Expr, Expr]:
        """Where vector v of the t-th columns that are multiplied at a time is: the tile, and the vector in it."""
        parts = int(self.words.shape[2]) // self.vectors
        return (t, v) if parts == 1 else (t // parts, t % parts * self.vectors + v)


def arrange(weight: LookupWeight, pack: Pack, machine: Machine, dot: Dot, *, vectors: int) -> Bytes | str:
    """The weight in bytes, of which `vectors` of columns are multiplied at a time; or why it cannot be."""
    if weight.codebook.size != weight.codebook.shape[-1] or weight.offset is not None:
        return "only codes with one codebook and no offsets become bytes"
    tiles = _decode.arrange(weight, pack, machine)
    if tiles is None:
        return "its columns or groups lie across the product's"
    field = _FIELD[weight.bits]
    unit = 4 * (8 // field)
    run = _decode.run_of(tiles, unit) if tiles.group is not None else -(-tiles.depth // BYTES) * BYTES
    if not run:
        return f"its groups are no multiples of {unit} rows"
    if run > _MOST_TERMS:
        return f"sums of {run} products do not fit in 32 bits"
    own = _decode.codes_of(weight)
    codes = pack(own)
    book = weight.codebook.reshape(-1) / (tiles.step or 1)  # what the scales have of it
    levels, step, error = _levels(book, np.bincount(own.reshape(-1), minlength=1 << field))
    if not dot.has_vnni:
        shared = _common(levels)
        levels, step = levels // shared, step * shared
    low, high = int(levels.min()), int(levels.max())
    if not dot.has_vnni and not dot.pairs(low, high) and "avx512f" in machine.features:
        return f"{machine.cpu} has no avx512vnni, and vectors of floats are as fast as levels from {low} to {high}"
    raised = dot.raised(low, high)
    if field == _LEVEL:
        held = levels.astype(np.int16) + (0 if dot.lanes == _dot.WIDE else raised)
        codes, levels = held.astype(np.uint8)[codes], np.zeros(1, np.int8)
    count, _, columns = codes.shape
    groups = -(-tiles.depth // run)
    scale = np.ones((count, groups, columns), np.float32) if tiles.scale is None else tiles.scale
    return Bytes(
        dot=dot,
        words=_words(_weights.pad_to(codes, 1, run), field, dot.lanes),
        levels=np.tile(levels, dot.size // levels.size),
        raised=raised,
        pairs=max(dot.pairs(low, high), 1),
        scale=np.ascontiguousarray(np.broadcast_to(scale, (count, groups, columns)) * np.float32(step)),
        vectors=vectors,
        run=run,
        field=field,
        error=error,
    )


def _levels(codebook: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, float, float]:
    """codebook: [n] -> (int8 [len(counts)], the levels; their step; their error), of the least squared error.

    Powers of two up to 2^6 are exact at a step of the largest / 64; up to 2^7 all are but the positive largest.
    """
    book = np.zeros(counts.size)
    book[: codebook.size] = codebook
    top = float(np.abs(book).max()) or 1.0
    found = []
    for step in (top / 64, top / 127, top / 128):
        rounded = np.clip(np.round(book / step), -128, 127)
        found.append((float(counts @ (book - rounded * step) ** 2), step, rounded))
    least, step, rounded = min(found, key=lambda at: at[0])
    power = float(counts @ book**2)
    return rounded.astype(np.int8), step, math.sqrt(least / power) if power else 0.0


def _common(levels: np.ndarray) -> int:
    """The largest power of two that divides all levels."""
    bits = int(np.bitwise_or.reduce(levels.astype(np.int64)))
    return bits & -bits or 1


def _words(codes: np.ndarray, field: int, lanes: int) -> np.ndarray:
    """codes: [t, K, c], K whole words -> int32 [t, K / unit, c / lanes, lanes]."""
    tiles, depth, columns = codes.shape
    planes = 8 // field
    split = codes.reshape(tiles, depth // (4 * planes), planes, 4, columns // lanes, lanes)
    held = np.zeros((tiles, split.shape[1], 4, columns // lanes, lanes), np.uint8)
    for p in range(planes):
        held |= split[:, :, p] << np.uint8(p * field)
    return np.ascontiguousarray(held.transpose(0, 1, 3, 4, 2)).view(np.int32)[..., 0]


def permuted(levels: Buffer, weight: Bytes, word: Expr, plane: int) -> Expr:
    """The entries of `levels` for the codes of a plane of a vector of words, in bytes; raised where those are."""
    lanes, size = weight.dot.lanes, weight.dot.size
    table = _loops.load(levels, 0, lanes=size)
    if weight.field == _LEVEL:
        if lanes == _dot.WIDE:  # 128 in each byte turns its uppermost bit
            word = T.bitwise_xor(word, tirx.reinterpret(f"int32x{lanes}", table))
        return tirx.reinterpret(f"int8x{size}", word)
    if plane:
        word = T.shift_right(word, _loops.splat(plane * weight.field, lanes, "int32"))
    return weight.dot.found(table, word)
