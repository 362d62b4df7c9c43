"""Sums of four products of bytes in each lane, u unsigned and q signed, as the processors of x86 have them.

    s + Σ_4 u·q           `vpdpbusd`, of AVX-512 VNNI or of AVX-VNNI
    s + Σ_2 1·(Σ_2 u·q)   `vpmaddubsw` and `vpmaddwd` of AVX2: the inner sums have 16 bits, and must fit in them

Where u would be too large for that, |u| is multiplied with q of the sign of u: 128 · 127 · 2 < 2^15.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets.kernels import _loops
from mc_opt.targets.kernels._loops import Expr

WIDE, NARROW = 16, 8
# The largest sizes of q, and of sums of two products.
_LARGEST, _MOST = 127, (1 << 15) - 1


@dataclasses.dataclass(frozen=True)
class Dot:
    """The instructions of a processor.

    Attributes:
        lanes: of 32 bits in a vector.
        has_vnni: whether one instruction multiplies and adds.
        has_vbmi: whether one finds bytes among 64; else one among 16, whose indices have zeros above them.
    """

    lanes: int
    has_vnni: bool
    has_vbmi: bool

    @property
    def size(self) -> int:
        """Bytes of a vector."""
        return 4 * self.lanes

    @property
    def most_sums(self) -> int:
        """Vectors of sums that leave registers for what is multiplied and for constants."""
        if self.lanes == WIDE:
            return 24
        return 10 if self.has_vnni else 8

    def raised(self, low: int, high: int) -> int:
        """What is added to levels from `low` to `high` so that they are unsigned; 0 where they stay signed."""
        if self.has_vnni:
            return 128
        return -low if self.pairs(low, high) else 0

    def pairs(self, low: int, high: int) -> int:
        """Sums of two products, with levels from `low` to `high` made unsigned, whose sum has room in 16 bits."""
        return _MOST // (2 * _LARGEST * max(high - low, 1))

    def found(self, table: Expr, index: Expr) -> Expr:
        """The bytes of a table (16 of them, repeated) by the lower four bits of each byte of int32 lanes."""
        if self.has_vbmi:
            name = "llvm.x86.avx512.permvar.qi.512"
            return T.call_llvm_pure_intrin("int8x64", name, table, tirx.reinterpret("int8x64", index))
        kind = f"int8x{self.size}"
        index = tirx.reinterpret(kind, T.bitwise_and(index, _loops.splat(0x0F0F0F0F, self.lanes, "int32")))
        name = "llvm.x86.avx512.pshuf.b.512" if self.lanes == WIDE else "llvm.x86.avx2.pshuf.b"
        return T.call_llvm_pure_intrin(kind, name, table, index)

    def added(self, total: Expr, products: Sequence[tuple[Expr, Expr]], *, is_signed: bool) -> Expr:
        """Add products (levels, q) to int32 lanes: one with VNNI, else as many as `pairs`, or one of signed levels."""
        if self.has_vnni:
            ((levels, q),) = products
            name = f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}"
            return T.call_llvm_pure_intrin(f"int32x{self.lanes}", name, total, levels, q)
        sums = None
        for levels, q in products:
            if is_signed:
                levels, q = _signed(levels, levels), _signed(q, levels)
            pair = T.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", levels, q)
            sums = pair if sums is None else sums + pair
        ones = _loops.splat(1, 2 * NARROW, "int16")
        return total + T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", sums, ones)


def _signed(values: Expr, signs: Expr) -> Expr:
    """The values, or what they are less than zero by where signs are negative."""
    return T.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.psign.b", values, signs)


def of(machine: Machine) -> Dot | str:
    """The instructions of a processor; or that it has none."""
    features = set(machine.features)
    if {"avx512bw", "avx512vnni"} <= features:
        return Dot(WIDE, has_vnni=True, has_vbmi="avx512vbmi" in features)
    if "avx2" in features:
        return Dot(NARROW, has_vnni="avxvnni" in features, has_vbmi=False)
    return f"{machine.cpu} has not avx2"
