"""A codebook as kernels read it: permutations of registers, arithmetic where its entries are even steps, else a gather.

A permutation of AVX-512 finds one of 32 entries, so that 256 are eight permutations and a choice among these. One of
AVX2 finds eight: more than 16 entries are gathered from the first cache there, and 16 may be found by their bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets.kernels import _loops, _pshufb, _tbl
from mc_opt.targets.kernels._loops import Buffer, Expr

# Lanes of AVX-512, whose permutations take indices of four bits, and of AVX2.
WIDE, NARROW = 16, 8
# Registers that a codebook may take: choosing among more is slower than to gather, or there are no more.
_MOST_REGISTERS = {WIDE: 16, NARROW: 2}
_ALL_BITS = -1
# A gather of eight entries takes as long as so many instructions on vectors.
_GATHER = 8
# Those of `_pshufb` beside a shift, which is for four vectors at a time.
_BY_BYTES = 1.7


@dataclasses.dataclass(frozen=True)
class Form:
    """How a packed weight stands in a consumer's order: all that its kernels' loops depend on, but its numbers.

    Attributes:
        bits: width of a code.
        lanes: of a vector of words.
        columns: of a tile.
        entries: 0 for a shared codebook, else the size of each.
        groups: of rows, each with a scale, an offset and a codebook of its own.
        has_scale: whether the entries are multiplied by scales.
        has_offset: whether offsets are added.
        is_short: whether the lower two bytes of all entries are zero, as those of powers of two are.
        is_even: whether an entry is its code less the first of the codebook, and the scales have the step.
        is_in_bytes: whether the codebook and the words are those of `_pshufb`.
    """

    bits: int
    lanes: int
    columns: int
    entries: int
    groups: int
    has_scale: bool
    has_offset: bool
    is_short: bool
    is_even: bool
    is_in_bytes: bool

    @property
    def per(self) -> int:
        """Codes in a word."""
        return 32 // self.bits

    def registers(self, machine: Machine) -> int:
        """Registers that hold the codebook for a permutation; 0 when there is none for it."""
        if self.is_in_bytes or self.has_tables(machine):
            return 4
        if self.entries or self.is_even or _permutation(self.lanes) not in machine.features:
            return 0
        count = max(1, (1 << self.bits) // self.lanes)
        return count if count <= _MOST_REGISTERS[self.lanes] else 0

    def is_vectorised(self, machine: Machine) -> bool:
        """Whether a vector of codes is decoded as one: else a product decodes its weight once, for all of its rows."""
        return self.is_even or self.registers(machine) > 0 or self.is_gathered(machine)

    def is_gathered(self, machine: Machine) -> bool:
        """Whether one instruction reads an entry for each lane."""
        return self.lanes == NARROW and not self.entries and _permutation(self.lanes) in machine.features

    def instructions(self, machine: Machine) -> float:
        """About how many vector instructions decode a vector of codes: shifts, permutations, choices among these."""
        first = 1 - 2 / self.per + (2.0 if self.has_offset else 0.0)
        count = self.registers(machine)
        if self.is_in_bytes:
            return first + _BY_BYTES
        if self.is_even:
            return first + 3
        if not count:
            return first + _GATHER
        parts = count if self.lanes == NARROW else max(1, count // 2)
        choices = (parts - 1) * (2 if self.lanes == NARROW else 1) + math.log2(parts)
        return first + parts + choices

    def has_tables(self, machine: Machine) -> bool:
        """Whether the codebook is tables of NEON's `tbl`."""
        return not self.entries and takes_tbl(self.bits, self.lanes, machine)


class Table:
    """The weights that words stand for."""

    def __init__(self, form: Form, machine: Machine, codebook: Buffer, factors: Sequence[Buffer]) -> None:
        """factors: the buffers of scale, offset and group, of those that there are."""
        self.form, self._codebook = form, codebook
        held = list(factors)
        self.scale = held.pop(0) if form.has_scale else None
        self.offset = held.pop(0) if form.has_offset else None
        self.group = held.pop(0) if form.groups > 1 else None
        self._wide = form.lanes == WIDE
        self._tbl = form.has_tables(machine)
        self._registers = form.registers(machine)
        self._is_gathered = form.is_gathered(machine)
        self._in_fours = self._wide and self._registers > 0 and form.bits <= 2

    def weight(self, word: Expr, j: int, t: Expr, v: Expr, k: Expr) -> Expr:
        """The weights that code j of each lane of a word stands for, in row k."""
        g = 0 if self.group is None else self.group[k]
        return self.scaled(self.value(word, j, t, v, g), t, v, g)

    def scaled(self, value: Expr, t: Expr, v: Expr, g: Expr) -> Expr:
        """Entries of the codebook times the scales of group g, and its offsets added."""
        lanes = self.form.lanes
        if self.scale is not None:
            value = value * _loops.load(self.scale, t, g, v * lanes, lanes=lanes)
        return value if self.offset is None else value + _loops.load(self.offset, t, g, v * lanes, lanes=lanes)

    def place(self, j: int) -> int:
        """The bit of a word that a permutation needs at the bottom of a lane to find code j."""
        bits = self.form.bits
        if self.form.is_in_bytes:
            return 0
        return bits * j // 4 * 4 if self._in_fours else bits * j

    def value(self, word: Expr, j: int, t: Expr, v: Expr, g: Expr, *, past: int = 0) -> Expr:
        """The codebook entries of code j of each lane of a word, of which the lowest `past` bits are gone already."""
        bits, lanes = self.form.bits, self.form.lanes
        if self.form.is_in_bytes:
            return _pshufb.value(self._codebook, word, j)
        if self._tbl:
            return _tbl.value(self._codebook, word, j, bits, is_short=self.form.is_short)
        shift = self.place(j) - past
        code = word if shift == 0 else T.shift_right(word, _loops.splat(shift, lanes, "int32"))
        if not self._registers:
            code = T.bitwise_and(code, _loops.splat((1 << bits) - 1, lanes, "int32"))
            if self.form.is_even:
                kind = "float32" if lanes == 1 else f"float32x{lanes}"
                return tirx.Cast(kind, code) - _loops.splat(self._codebook[0], lanes)
            return self._gathered(code, t, v, g)
        if self._in_fours:
            table = _loops.load(self._codebook, bits * j % 4 // bits * lanes, lanes=lanes)
            return self._permuted(table, code)
        found = self._found(code)
        while len(found) > 1:
            # Each choice is by one bit more; what permutations find, they find whatever stands above their indices.
            bit = (1 << bits) // len(found)
            high = tirx.NE(T.bitwise_and(code, _loops.splat(bit, lanes, "int32")), _loops.splat(0, lanes, "int32"))
            found = [tirx.Select(high, b, a) for a, b in zip(found[::2], found[1::2], strict=True)]
        return found[0]

    def _found(self, code: Expr) -> list[Expr]:
        """The entries for codes in each part of the codebook that one permutation takes."""
        lanes = self.form.lanes
        parts = [_loops.load(self._codebook, r * lanes, lanes=lanes) for r in range(self._registers)]
        if not self._wide or len(parts) == 1:
            return [self._permuted(part, code) for part in parts]
        name = "llvm.x86.avx512.vpermi2var.ps.512"
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return [T.call_llvm_pure_intrin("float32x16", name, low, code, high) for low, high in pairs]

    def _permuted(self, part: Expr, code: Expr) -> Expr:
        if self._wide:
            return T.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.permvar.sf.512", part, code)
        return T.call_llvm_pure_intrin("float32x8", "llvm.x86.avx2.permps", part, code)

    def _gathered(self, code: Expr, t: Expr, v: Expr, g: Expr) -> Expr:
        if self._is_gathered:
            every = tirx.reinterpret("float32x8", _loops.splat(_ALL_BITS, NARROW, "int32"))
            held, where = _loops.splat(0.0, NARROW), tirx.address_of(self._codebook[0])
            size = tirx.const(4, "int8")
            return T.call_llvm_pure_intrin("float32x8", "llvm.x86.avx2.gather.d.ps.256", held, where, code, every, size)
        if not self.form.entries:
            return self._codebook[code]
        lanes, columns = self.form.lanes, self.form.columns
        groups, entries = self.form.groups, self.form.entries
        first = ((t * columns + v * lanes) * groups + g) * entries
        starts = first if lanes == 1 else T.ramp(first, groups * entries, lanes)
        return self._codebook[starts + code]


def takes_tbl(bits: int, lanes: int, machine: Machine) -> bool:
    """Whether a shared codebook becomes tables of NEON's `tbl`."""
    return "neon" in machine.features and lanes == _tbl.LANES and bits <= _tbl.MOST_BITS


def takes_pshufb(bits: int, lanes: int, machine: Machine) -> bool:
    """Whether a shared codebook becomes tables of AVX2's `vpshufb` where its entries are short."""
    return (bits, lanes) == (_pshufb.BITS, _pshufb.LANES) and _permutation(lanes) in machine.features


def even(codebook: np.ndarray, bits: int, lanes: int, machine: Machine) -> tuple[np.ndarray, np.float32] | None:
    """([1], the code of zero; the step) of entries in even steps that are too many for two permutations; else None.

    The entries are float32 and come out as they are, to the last bit of the largest.
    """
    few = takes_tbl(bits, lanes, machine) or (1 << bits <= 2 * lanes and _permutation(lanes) in machine.features)
    book = codebook.reshape(-1).astype(np.float64)
    if machine.kind == "cuda" or few or book.size < 2 or book[0] == book[-1]:
        return None
    step = (book[-1] - book[0]) / (book.size - 1)
    zero = np.float32(-book[0] / step)
    found = (np.arange(book.size) - np.float64(zero)) * np.float32(step)
    close = np.abs(found - book).max() <= np.finfo(np.float32).eps * np.abs(book).max()
    return (np.full(1, zero), np.float32(step)) if close else None


def _permutation(lanes: int) -> str:
    """The feature that has permutations of so many lanes."""
    return {WIDE: "avx512f", NARROW: "avx2"}.get(lanes, "")
