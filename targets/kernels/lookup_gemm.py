"""Products of some dozens of rows with packed weights: a block of the weight is decoded once for all rows.

    y[m, n] = Σ_b Σ_{k in b} a[m, k] · w[k, n] + bias[n],   w = scale · codebook[code] + offset

The block lies in the first-level cache while the rows pass by; a weight that is dense never goes through memory.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets.kernels import _decode, _loops
from mc_opt.targets.kernels._decode import Tiles
from mc_opt.targets.kernels._loops import Buffer, Expr

# Rows of the weight that are decoded at a time: with AVX-512, 48 columns of them are 24 KiB.
_BLOCK = 128


def vectors(machine: Machine) -> int:
    """Vectors of columns that a tile has: three leave registers for the sums of eight rows."""
    return 3 if machine.registers == 32 else 2


def body(
    tiles: Tiles,
    machine: Machine,
    rows: int,
    n: int,
    has_bias: bool,
    a: Buffer,
    words: Buffer,
    codebook: Buffer,
    *rest: Buffer,
) -> None:
    """Write the loops of the kernel; its buffers are those of `lookup_gemv`."""
    table, bias, out = _decode.operands(tiles, machine, codebook, rest, has_bias=has_bias)
    lanes, per, depth, columns = tiles.lanes, tiles.per, tiles.depth, tiles.shape[-1]
    held = columns // lanes
    block = _BLOCK // per * per
    most = (machine.registers - 6) // held
    high = -(-rows // -(-rows // most))

    def decode(dense: Buffer, t: Expr, first: Expr, number: int) -> None:
        """`number` rows of the weight, from word `first` on."""
        for start, count, codes in ((0, number // per, per), (number // per, 1, number % per)):
            if not count or not codes:
                continue
            with T.serial(0, count) as i:
                for v in range(held):
                    word = _loops.load(words, t, v, first + start + i, 0, lanes=lanes)
                    for j in range(codes):
                        value = table.weight(word, j, t, v, (first + start + i) * per + j)
                        _loops.store(dense, value, (start + i) * per + j, v * lanes, lanes=lanes)

    def multiply(dense: Buffer, sums: Buffer, m: Expr, count: int, first: Expr, number: int) -> None:
        """Add the products of `count` rows from m on with the decoded block."""
        parts = [_loops.registers(held, lanes) for _ in range(count)]
        for i, part in enumerate(parts):
            for v in range(held):
                _loops.store(part, _loops.load(sums, m + i, v * lanes, lanes=lanes), v * lanes, lanes=lanes)
        with T.serial(0, number) as k:
            for i, part in enumerate(parts):
                for v in range(held):
                    term = _loops.load(dense, k, v * lanes, lanes=lanes) * _loops.splat(
                        a[m + i, first * per + k], lanes
                    )
                    _loops.store(part, _loops.load(part, v * lanes, lanes=lanes) + term, v * lanes, lanes=lanes)
        for i, part in enumerate(parts):
            for v in range(held):
                _loops.store(sums, _loops.load(part, v * lanes, lanes=lanes), m + i, v * lanes, lanes=lanes)

    def add_block(dense: Buffer, sums: Buffer, t: Expr, first: Expr, number: int) -> None:
        decode(dense, t, first, number)
        with T.serial(0, rows // high) as i:
            multiply(dense, sums, i * high, high, first, number)
        if rows % high:
            multiply(dense, sums, tirx.const(rows // high * high, "int32"), rows % high, first, number)

    def tile(t: Expr, width: int) -> None:
        dense = T.sblock_alloc_buffer((min(block, depth), columns), "float32")
        sums = T.sblock_alloc_buffer((rows, columns), "float32")
        with T.serial(0, rows) as m:
            for v in range(held):
                _loops.store(sums, _loops.splat(0.0, lanes), m, v * lanes, lanes=lanes)
        if depth // block:
            with T.serial(0, depth // block) as b:
                add_block(dense, sums, t, b * (block // per), block)
        if depth % block:
            add_block(dense, sums, t, tirx.const(depth // block * (block // per), "int32"), depth % block)
        with T.serial(0, rows) as m:
            for start, count, size in _loops.split(width, lanes):
                for c in range(start, start + count * size, size):
                    value = _loops.load(sums, m, c, lanes=size)
                    if bias is not None:
                        value = value + _loops.load(bias, t * columns + c, lanes=size)
                    _loops.store(out, value, m, t * columns + c, lanes=size)

    _loops.each_tile(n, columns, machine, tile, work=rows * n * depth)
