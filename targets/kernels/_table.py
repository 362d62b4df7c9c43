"""A codebook as kernels read it: a register permutation where the machine has one, else a gather."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets.kernels import _loops, _tbl
from mc_opt.targets.kernels._loops import Buffer, Expr

# Lanes of AVX-512, whose permutations take indices of four bits.
WIDE = 16


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
    """

    bits: int
    lanes: int
    columns: int
    entries: int
    groups: int
    has_scale: bool
    has_offset: bool
    is_short: bool

    @property
    def per(self) -> int:
        """Codes in a word."""
        return 32 // self.bits

    def registers(self, machine: Machine) -> int:
        """Registers that hold the codebook for a permutation; 0 when there is none for it."""
        if self.has_tables(machine):
            return 4
        available = {WIDE: "avx512f", 8: "avx2"}.get(self.lanes, "")
        if self.entries or available not in machine.features or (1 << self.bits) > 2 * self.lanes:
            return 0
        return max(1, (1 << self.bits) // self.lanes)

    def has_tables(self, machine: Machine) -> bool:
        """Whether the codebook is tables of NEON's `tbl`."""
        return not self.entries and takes_tbl(self.bits, self.lanes, machine)


class Table:
    """The weights that words stand for."""

    def __init__(self, form: Form, machine: Machine, codebook: Buffer, factors: Sequence[Buffer]) -> None:
        """factors: the buffers of scale, offset and group, of those that there are."""
        self._form, self._codebook = form, codebook
        held = list(factors)
        self.scale = held.pop(0) if form.has_scale else None
        self.offset = held.pop(0) if form.has_offset else None
        self.group = held.pop(0) if form.groups > 1 else None
        self._wide = form.lanes == WIDE
        self._tbl = form.has_tables(machine)
        self._registers = form.registers(machine)
        self._in_fours = self._wide and self._registers > 0 and form.bits <= 2

    def weight(self, word: Expr, j: int, t: Expr, v: Expr, k: Expr) -> Expr:
        """The weights that code j of each lane of a word stands for, in row k."""
        g = 0 if self.group is None else self.group[k]
        return self.scaled(self.value(word, j, t, v, g), t, v, g)

    def scaled(self, value: Expr, t: Expr, v: Expr, g: Expr) -> Expr:
        """Entries of the codebook times the scales of group g, and its offsets added."""
        lanes = self._form.lanes
        if self.scale is not None:
            value = value * _loops.load(self.scale, t, g, v * lanes, lanes=lanes)
        return value if self.offset is None else value + _loops.load(self.offset, t, g, v * lanes, lanes=lanes)

    def place(self, j: int) -> int:
        """The bit of a word that a permutation needs at the bottom of a lane to find code j."""
        bits = self._form.bits
        return bits * j // 4 * 4 if self._in_fours else bits * j

    def value(self, word: Expr, j: int, t: Expr, v: Expr, g: Expr, *, past: int = 0) -> Expr:
        """The codebook entries of code j of each lane of a word, of which the lowest `past` bits are gone already."""
        bits, lanes = self._form.bits, self._form.lanes
        if self._tbl:
            return _tbl.value(self._codebook, word, j, bits, is_short=self._form.is_short)
        shift = self.place(j) - past
        code = word if shift == 0 else T.shift_right(word, _loops.splat(shift, lanes, "int32"))
        if not self._registers:
            return self._gathered(T.bitwise_and(code, _loops.splat((1 << bits) - 1, lanes, "int32")), t, v, g)
        if self._in_fours:
            table = _loops.load(self._codebook, bits * j % 4 // bits * lanes, lanes=lanes)
            return self._permuted(table, code)
        parts = [_loops.load(self._codebook, r * lanes, lanes=lanes) for r in range(self._registers)]
        if len(parts) == 1:
            return self._permuted(parts[0], code)
        if self._wide:
            return T.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.vpermi2var.ps.512", parts[0], code, parts[1])
        high = T.bitwise_and(code, _loops.splat(lanes, lanes, "int32"))
        picked = [self._permuted(part, code) for part in parts]
        return tirx.Select(tirx.NE(high, _loops.splat(0, lanes, "int32")), picked[1], picked[0])

    def _permuted(self, part: Expr, code: Expr) -> Expr:
        if self._wide:
            return T.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.permvar.sf.512", part, code)
        return T.call_llvm_pure_intrin("float32x8", "llvm.x86.avx2.permps", part, code)

    def _gathered(self, code: Expr, t: Expr, v: Expr, g: Expr) -> Expr:
        if not self._form.entries:
            return self._codebook[code]
        lanes, columns = self._form.lanes, self._form.columns
        groups, entries = self._form.groups, self._form.entries
        first = ((t * columns + v * lanes) * groups + g) * entries
        starts = first if lanes == 1 else T.ramp(first, groups * entries, lanes)
        return self._codebook[starts + code]


def takes_tbl(bits: int, lanes: int, machine: Machine) -> bool:
    """Whether a shared codebook becomes tables of NEON's `tbl`."""
    return "neon" in machine.features and lanes == _tbl.LANES and bits <= _tbl.MOST_BITS
