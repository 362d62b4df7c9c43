"""Products of bytes in the tiles of Intel AMX: codes are decoded into tiles that lie in the first-level cache.

`tdpbssd` multiplies 16 rows of 64 inputs with 64 rows of 16 weights, of which four rows share a register's lane: the
order of the words of `_bytes`. Eight tile registers: four sums, and the operands of which one side stays.

Linux lets a process touch tiles once it has asked: the kernel asks each time, which costs a tenth of a microsecond,
and where it is refused (no AMX, an older kernel, a sandbox) runs without tiles. Intel SDM vol. 1, chapter 18;
Documentation/arch/x86/xstate.rst.
"""

from __future__ import annotations

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets.kernels import _loops
from mc_opt.targets.kernels._bytes import BYTES, Bytes, Finish, permuted
from mc_opt.targets.kernels._dot import WIDE as LANES
from mc_opt.targets.kernels._loops import Buffer, Expr

_HIGH, _SUMS, _TILES = 16, 4, 8
# Fewer rows are done by the time that their weights are read.
_FEWEST_ROWS = 6
# Rows of the weight in a tile are 64, or half of them where groups end there.
_LEAST_STEP = 32
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


def takes(rows: int, depth: int, group_size: int, machine: Machine) -> bool:
    """Whether a product is worth tiles, and its groups are made of whole ones."""
    is_whole = not group_size or group_size >= depth or group_size % _LEAST_STEP == 0
    return "amx-int8" in machine.requested and rows >= _FEWEST_ROWS and is_whole


def granted() -> Expr:
    """Whether this process may use tiles."""
    numbers = (_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)
    return T.call_extern("int64", "syscall", *(tirx.const(k, "int64") for k in numbers)) == tirx.const(0, "int64")


def high(rows: int) -> int:
    """Rows of a tile, as even as it goes."""
    return -(-rows // -(-rows // _HIGH))


def vectors(rows: int) -> int:
    """Vectors of columns that are multiplied at a time."""
    return max(1, _SUMS // -(-rows // _HIGH))


def _at_once(rows: int, weight: Bytes) -> int:
    """Tiles of rows that are multiplied at a time, as even as it goes."""
    blocks = -(-rows // _HIGH)
    return -(-blocks // -(-blocks // (_SUMS // weight.vectors)))


def _step(weight: Bytes) -> int:
    """Rows of the weight in a tile."""
    return BYTES if weight.run % BYTES == 0 else _LEAST_STEP


def _weights_stay(rows: int, weight: Bytes) -> bool:
    """Whether the weights' tiles stay in registers while the inputs' pass by, or the other way round."""
    return weight.vectors <= _at_once(rows, weight)


def configuration(weight: Bytes, rows: int) -> np.ndarray:
    """uint8 [64], what `ldtilecfg` reads: palette 1; at 16 the bytes of each tile's row, at 48 its rows."""
    sizes = {"sum": (high(rows), BYTES), "inputs": (high(rows), _step(weight)), "weights": (_step(weight) // 4, BYTES)}
    staying, passing = ("weights", "inputs") if _weights_stay(rows, weight) else ("inputs", "weights")
    held = min(weight.vectors, _at_once(rows, weight))
    kinds = ["sum"] * _SUMS + [staying] * held + [passing] * (_TILES - _SUMS - held)
    result = np.zeros(BYTES, np.uint8)
    result[0] = 1
    for k, kind in enumerate(kinds):
        result[48 + k], result[16 + 2 * k] = sizes[kind]
    return result


def tile(
    weight: Bytes,
    rows: int,
    operands: tuple[Buffer, Buffer, Buffer, Buffer],
    configured: Buffer,
    finish: Finish,
    t: Expr,
    width: int,
) -> None:
    """`width` columns of tile t for all rows; operands: the inputs, the words, the scales and the levels."""
    q, words, scale, levels = operands
    columns, step, run = weight.vectors, _step(weight), weight.run
    tall, at_once = int(q.shape[2]), _at_once(rows, weight)
    ahead = 2 if run // step % 2 == 0 else 1

    def decode(dense: Buffer, first: Expr, s: int) -> None:
        """The weights of step s of a few, from word `first` on."""
        for v in range(columns):
            for w in range(step // weight.unit):
                place, vector = weight.at(t, v)
                word = _loops.load(words, place, first + w, vector, 0, lanes=LANES)
                for p in range(weight.planes):
                    at = (w * weight.planes + p) * BYTES
                    _loops.store(dense, permuted(levels, weight, word, p), s, v, at, lanes=BYTES)

    def multiply(dense: Buffer, b: Expr, blocks: int, k: Expr, s: int) -> None:
        """Add the products of step s, whose first row is k."""
        inputs = [tirx.address_of(q[b + i, k // BYTES, 0, k % BYTES]) for i in range(blocks)]
        weights = [tirx.address_of(dense[s, v, 0]) for v in range(columns)]
        stay = _weights_stay(rows, weight)
        staying, passing = (weights, inputs) if stay else (inputs, weights)
        for i, place in enumerate(staying):
            _do("tileloadd64", _SUMS + i, place)
        held = _SUMS + min(columns, at_once)
        for j, place in enumerate(passing):
            passed = held + j % (_TILES - held)
            _do("tileloadd64", passed, place)
            for i in range(len(staying)):
                block, v = (j, i) if stay else (i, j)
                left, right = (passed, _SUMS + i) if stay else (_SUMS + i, passed)
                _do("tdpbssd", block * columns + v, left, right)

    def group(dense: Buffer, whole: Buffer, sums: Buffer, b: Expr, blocks: int, g: Expr) -> None:
        for k in range(blocks * columns):
            _do("tilezero", k)
        with T.serial(0, run // step // ahead) as i:
            first = g * run + i * (ahead * step)
            for s in range(ahead):
                decode(dense, tirx.floordiv(first + s * step, weight.unit), s)
            for s in range(ahead):
                multiply(dense, b, blocks, first + s * step, s)
        for k in range(blocks * columns):
            _do("tilestored64", k, tirx.address_of(whole[k // columns, k % columns, 0, 0]))
        for i in range(blocks):
            with T.serial(0, tall) as m:
                for v in range(columns):
                    at = v * LANES
                    value = tirx.Cast(f"float32x{LANES}", _loops.load(whole, i, v, m, 0, lanes=LANES))
                    place, vector = weight.at(t, v)
                    value = value * _loops.load(scale, place, g, vector * LANES, lanes=LANES)
                    _loops.store(sums, _loops.load(sums, i, m, at, lanes=LANES) + value, i, m, at, lanes=LANES)

    def some_rows(b: Expr, count: int) -> None:
        """`count` rows from the tile of rows b on."""
        blocks = -(-count // tall)
        dense = T.sblock_alloc_buffer((ahead, columns, BYTES * (step // 4)), "int8")
        whole = T.sblock_alloc_buffer((blocks, columns, tall, LANES), "int32")
        sums = T.sblock_alloc_buffer((blocks, tall, columns * LANES), "float32")
        with T.serial(0, blocks * tall) as m:
            for v in range(columns):
                _loops.store(sums, _loops.splat(0.0, LANES), m // tall, m % tall, v * LANES, lanes=LANES)
        with T.serial(0, weight.groups) as g:
            group(dense, whole, sums, b, blocks, g)
        with T.serial(0, count) as m:
            for start, number, size in _loops.split(width, LANES):
                for c in range(start, start + number * size, size):
                    value = _loops.load(sums, m // tall, m % tall, c, lanes=size)
                    finish(value, b * tall + m, t * columns * LANES + c, size)

    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.ldtilecfg", tirx.address_of(configured[0])))
    most = at_once * tall
    if rows // most:
        with T.serial(0, rows // most) as turn:
            some_rows(turn * at_once, most)
    if rows % most:
        some_rows(tirx.const(rows // most * at_once, "int32"), rows % most)
    # Tiles in use slow down the switch to another thread.
    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilerelease"))


def _do(name: str, *operands: Expr | int) -> None:
    """An instruction on tiles, their numbers and addresses; rows in memory are 64 bytes apart."""
    given = [tirx.const(k, "uint8") if isinstance(k, int) else k for k in operands]
    if name in ("tileloadd64", "tilestored64"):
        given.append(tirx.const(BYTES, "int64"))
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *given))
